"""What comes of an attempt, as data: a result, or a problem with the learner's frames."""

from __future__ import annotations

import builtins
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kata.course.catalog import STEM

UNWRITTEN = re.compile(r"exercise \d\d is not written yet")


class Frame(msgspec.Struct):
    """A line that an exception went through."""

    file: str
    line: int
    function: str
    text: str


class Problem(msgspec.Struct):
    """An exception as data. `types` are its class and the bases that every Python knows."""

    types: list[str]
    message: str
    frames: list[Frame] = []
    rank: int | None = None

    @property
    def unwritten(self) -> bool:
        return bool(UNWRITTEN.fullmatch(self.message))


class Done(msgspec.Struct):
    """What came of an attempt: a result, or a problem."""

    result: bytes = b""
    problem: Problem | None = None
    changed: list[str] = []
    reached: str = ""  # a forbidden function, even if the code caught our complaint
    left: list[str] = []  # settings of the process that the code left changed
    seconds: float = 0.0


class Job(msgspec.Struct):
    """An attempt that is asked for: `run`, a function of the spec file, on some module."""

    spec: str
    run: str
    call: bytes  # the arguments, see wire.py
    seed: int  # of the global random generators
    ranks: int = 0  # 0: in one process


class Attempted(msgspec.Struct):
    """One line of the record: enough to do it again elsewhere."""

    job: Job
    done: list[Done]

    @property
    def spec(self) -> str:
        return self.job.spec


class ArgumentChanged(AssertionError):
    """The code under test wrote into its arguments."""


class StateLeft(AssertionError):
    """The code under test left changed what others rely on: a mode, a seed."""


class Reached(AssertionError):
    """The code under test called what it was to write."""


def problem(error: BaseException, files: set[str], rank: int | None = None) -> Problem:
    """An exception as data, with the frames of the learner's files."""
    if isinstance(error, Elsewhere):
        return error.problem
    for each in _chain(error):  # also inside a compiler's complaint, which quotes the line
        if unwritten := UNWRITTEN.search(_words(each)):
            return Problem(["NotImplementedError", "RuntimeError"], unwritten[0], [], rank)
    types = [
        c.__name__ for c in type(error).__mro__ if c is type(error) or c.__module__ == "builtins"
    ]
    own: list[Frame] = []
    for each in _chain(error):
        through = frames(each)
        own += [f for f in through if _learners(f.file, files) and f not in own]
        if through and _learners(through[-1].file, files):
            break  # raised here; where a library has raised it, its cause may have been here
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        own = [Frame(error.filename, error.lineno or 0, "", _marked(error))]
    return Problem(types, _words(error), own, rank)


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and what it came from."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        hidden = None if following.__suppress_context__ else following.__context__
        following = following.__cause__ or hidden
    return chain


def _learners(file: str, files: set[str]) -> bool:
    return file in files or STEM.fullmatch(Path(file).stem) is not None


def _words(error: BaseException) -> str:
    """What an exception says; Triton's interpreter, what the error in the kernel says."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
        if type(error).__name__ != "InterpreterError":
            return f"{type(error).__name__}: {_words(error)}"
    try:
        return str(error.msg if isinstance(error, SyntaxError) else error)
    except Exception:
        return "its message cannot be read"


def _marked(error: SyntaxError) -> str:
    """The line of a syntax error, and a mark below the place."""
    line = (error.text or "").rstrip()
    place = (error.offset or 0) - 1
    return f"{line}\n{' ' * place}^" if line and 0 <= place <= len(line) else line


def frames(error: BaseException) -> list[Frame]:
    """Where an exception went through, outermost first."""
    return [
        Frame(f.filename, f.lineno or 0, f.name, (f.line or "").strip())
        for f in traceback.extract_tb(error.__traceback__)
    ]


def gravest(done: Sequence[Done]) -> Problem | None:
    """Of several ranks' problems the one that the others follow from."""

    def rank(problem: Problem) -> int:
        if problem.types[0] in ("RankWaits", "RankOutOfTime"):
            return 2
        return int("gloo" in problem.message and "Connection" in problem.message)

    return min((d.problem for d in done if d.problem), key=rank, default=None)


class Elsewhere(Exception):
    """An exception that was raised in another process, as near as it can be rebuilt here."""

    problem: Problem


def rebuilt(problem: Problem) -> Exception:
    """An exception which `pytest.raises` takes for the original, if that was a built-in one."""
    bases = [getattr(builtins, n, None) for n in problem.types]
    base = next((b for b in bases if isinstance(b, type) and issubclass(b, Exception)), Exception)
    kinds = (Elsewhere,) if base is Exception else (Elsewhere, base)
    try:
        error: Exception = type(problem.types[0], kinds, {})(problem.message)
    except TypeError:  # one whose constructor wants more, such as UnicodeDecodeError
        error = type(problem.types[0], (Elsewhere,), {})(problem.message)
    error.problem = problem  # type: ignore[attr-defined]
    return error
