"""A run is believed as data alone: whatever ends it, there is a verdict, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from small import SOLUTION, make_project

from kata.judge.report import Report

KILLS = int(os.environ.get("KATA_KILLS", "5"))  # of each kind

# Forked children need a process that has only imported, so each of these starts a fresh one.
JUDGE = """
import os, sys, msgspec
from kata.judge.child import Request, judge_all
from kata.judge.server import warm
warm()
requests = [msgspec.json.decode(line, type=Request) for line in sys.stdin]
reports = {which: report for which, report, _ in judge_all(requests, 2, sys.argv[2] == "together")}
with open(sys.argv[1], "wb") as file:
    for which in sorted(reports):
        file.write(msgspec.json.encode(reports[which]) + b"\\n")
os._exit(0)
"""

BODIES = {
    "leaves": "os._exit(0)",
    "exits pytest": "pytest.exit('enough', returncode=0)",
    "interrupts": "raise KeyboardInterrupt",
    "segfaults": "ctypes.string_at(0)",
    "kills itself": "os.kill(os.getpid(), 9)",
    "swallows the alarm": "while True:\n        try:\n            time.sleep(60)\n"
    "        except BaseException:\n            pass",
    "loops in C": "sum(itertools.repeat(0))",
    "disarms the alarm": "signal.setitimer(signal.ITIMER_REAL, 0)\n    while True:\n        pass",
    "writes junk": "[write(fd) for fd in range(3, 40)]\n    return 2 * x",
    "huge int": "return 10**10000",
    "deep": "return functools.reduce(lambda a, _: [a], range(500), 1)",
    "broadcast": "return torch.ones(1, dtype=torch.float64).expand(10**9)",
    "not a tensor": "return np.full(3, None)",
    "right": "if isinstance(x, str):\n        raise TypeError('a tensor')\n    return x * 2",
}  # fmt: skip
FILE = """
import ctypes, functools, itertools, os, signal, time
import numpy as np, pytest, torch

def write(fd):
    try:
        os.write(fd, b"\\xff" * 100)
    except OSError:
        pass

def double(x):
    {}
"""


def judged(root, sources, options=(), together=False):
    """The reports on several texts, judged by one process."""
    lines = []
    for i, text in enumerate(sources):
        path = root / "submissions" / str(i) / "ex05_doubling.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        request = {"root": str(root), "stem": "ex05_doubling", "submission": str(path)}
        lines.append(msgspec.json.encode(request | {"options": list(options)}) + b"\n")
    answers = root / "reports"
    command = [sys.executable, "-c", JUDGE, str(answers), "together" * together]
    subprocess.run(command, input=b"".join(lines), capture_output=True, check=True)
    return [msgspec.json.decode(line, type=Report) for line in answers.read_bytes().splitlines()]


@pytest.fixture(scope="module", params=["here", "isolated", "together"])
def reports(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    make_project(root)
    options = ["--time-limit", "2"] + ["--isolate"] * (request.param == "isolated")
    sources = [FILE.format(body) for body in BODIES.values()]
    found = judged(root, sources, options, request.param == "together")
    return dict(zip(BODIES, found, strict=True))


@pytest.mark.parametrize("body", [name for name in BODIES if name != "right"])
def test_whatever_the_code_does_there_is_a_verdict_and_it_is_not_passed(reports, body):
    report = reports[body]

    if body == "writes junk" and report.state == "passed":
        return  # a worker holds nothing that could be written into
    assert report.state == "failed"
    assert len(report.specs) == 3
    assert report.error or any(spec.detail for spec in report.specs if spec.status == "failed")


def test_the_right_version_passes_beside_them(reports):
    assert reports["right"].state == "passed"


@pytest.fixture
def small(tmp_path):
    return make_project(tmp_path)


def run(exercise, *options, **more):
    """`kata run 05`."""
    command = [sys.executable, "-m", "kata", "run", "05", *options]
    return subprocess.run(command, cwd=exercise.root, capture_output=True, text=True, **more)


@pytest.mark.parametrize("body", ["leaves", "exits pytest", "segfaults"])
def test_the_status_is_0_only_where_the_verdict_says_passed(small, body):
    small.stub.write_text(FILE.format(BODIES[body]))
    done = run(small)

    assert done.returncode == 1
    assert "not yet" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert "failing" in (small.root / "progress.md").read_text()


def test_the_status_of_a_right_version_is_0_and_the_run_is_written_down(small):
    small.stub.write_text(SOLUTION)
    done = run(small)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed | 3/3" in (small.root / "progress.md").read_text()


def test_the_spec_that_takes_long_is_told_and_its_time_is_kept(small):
    small.stub.write_text(FILE.format(BODIES["loops in C"]))
    start = time.monotonic()
    done = run(small, "--time-limit", "2")

    assert time.monotonic() - start < 30
    assert "not done in time" in done.stdout


def test_a_pytest_that_nobody_waits_for_ends_itself(small):
    small.stub.write_text(FILE.format(BODIES["loops in C"]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "--time-limit",
        "1",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=small.root, capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert "in double" in done.stderr  # on which line it was


def test_what_a_worker_prints_is_bounded(small):
    small.stub.write_text(FILE.format("print('x' * 20_000_000)\n    return 3 * x"))
    done = run(small, "--isolate")

    assert len(done.stdout) + len(done.stderr) < 20_000
    assert done.returncode == 1 and "elements differ" in done.stdout


@pytest.mark.parametrize("options", [(), ("--isolate",)], ids=["here", "isolated"])
def test_nothing_stays_behind_when_everybody_who_waits_is_killed(small, options):
    said = small.root / "pid"
    say = f"print(os.getpid(), file=open({str(said)!r}, 'w'), flush=True)"
    small.stub.write_text(FILE.format(f"{say}\n    sum(itertools.repeat(0))"))
    (temporary := small.root / "tmp").mkdir()
    env = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "kata", "run", "05", "--time-limit", "60", *options]
    process = subprocess.Popen(
        command, cwd=small.root, stdout=subprocess.DEVNULL, start_new_session=True, env=env
    )
    wait_until(lambda: said.exists() and said.read_text().strip())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    wait_until(lambda: not alive(int(said.read_text())))
    for path in temporary.iterdir():  # as they are after a while
        os.utime(path, (0, 0))
    run(small, "--time-limit", "1", env=env)
    assert not [*temporary.glob("kata-*")]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path, _: None, "there is no submission"),
        (lambda path, _: path.mkdir(), "is a folder"),
        (lambda path, _: path.write_bytes(b"x = '\xe9'"), "is UTF-8"),
        (lambda path, solution: path.symlink_to(solution), "is a link"),
        (lambda path, _: os.mkfifo(path), "is a pipe"),
        (lambda path, _: path.write_text("#" * 2_000_000), "at most 1,048,576 bytes"),
    ],
    ids=["none", "folder", "latin-1", "link", "pipe", "large"],
)
def test_an_odd_submission_is_one_error_of_usage(small, make, says):
    make(small.root / "mine.py", small.solution)

    done = run(small, "--submission", "mine.py")

    assert done.returncode == 2 and says in " ".join(done.stdout.split())


def test_pytest_refuses_a_link_to_the_solution(small):
    (small.root / "mine.py").symlink_to(small.solution)
    command = [sys.executable, "-m", "pytest", "tests", "--submission", "mine.py"]

    plain = subprocess.run(command, cwd=small.root, capture_output=True, text=True)

    assert plain.returncode == 4 and "is a link" in plain.stderr


def test_a_submission_is_found_from_where_the_user_stands(small):
    (elsewhere := small.root / "mine").mkdir()
    (elsewhere / "double.py").write_text(SOLUTION)
    command = [sys.executable, "-m", "kata", "run", "05", "--submission", "double.py"]

    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert not (small.root / "progress.md").exists()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
