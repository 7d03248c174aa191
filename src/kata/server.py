"""Quick verdicts: a warm process has imported everything and forks a child for each run.

A process that has only imported (and run one trivial pytest, and frozen the garbage collector's
heap) may be forked safely, and its children need no second import. One that has run torch or JAX
operations must not be forked: its threads do not exist in the child, but their locks do.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import cast

import msgspec

from kata.catalog import STEM, Exercise
from kata.report import Detail, Report

# What torch imports at the first backward, mode or optimizer step is named too.
IMPORTS = (
    "numpy", "torch", "torch.distributed.tensor", "torch.utils.flop_counter", "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes", "einops", "pytest", "hypothesis", "kata.verdict",
)  # fmt: skip
LIMIT = 600.0  # seconds for a whole run
TRIVIAL = """
from hypothesis import given, strategies as st
@given(st.integers(), st.floats())
def test_nothing(n, x):
    pass
"""


class Job(msgspec.Struct):
    """Judge one exercise: the learner's file, or `submission`."""

    root: str
    stem: str
    submission: str = ""
    options: list[str] = []

    @property
    def exercise(self) -> Exercise:
        return Exercise(Path(self.root), self.stem)


def warm(imports: Iterable[str] = ()) -> None:
    """Make this process a good one to fork: import, run a trivial pytest, freeze the heap."""
    import_all([*IMPORTS, *imports])
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        trivial = Path(folder, "test_trivial.py")
        trivial.write_text(TRIVIAL)
        (Path(folder) / "pytest.ini").write_text("[pytest]\naddopts = -p kata.plugin\n")
        with _silence():
            pytest.main([*_QUIET, str(trivial), "--rootdir", folder, "-c", f"{folder}/pytest.ini"])
    gc.collect()
    gc.freeze()


def import_all(names: Iterable[str]) -> None:
    """Import what is there; a child will complain of what is not."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    from kata.plugin import prepare_environment

    prepare_environment()  # before torch._dynamo imports triton
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


def outside(exercise: Exercise) -> list[str]:
    """The modules of other packages that an exercise and its parts import."""
    stems = (exercise.stem, *exercise.parts)
    names = {name for stem in stems for name in Exercise(exercise.root, stem).modules}
    return sorted(name for name in names if not STEM.fullmatch(name))


def judge(job: Job, quiet: bool = True) -> Report:
    """Run the specs of one exercise in this process; quiet: without pytest's own report."""
    import pytest

    from kata import plugin

    judges: list[plugin.Judge] = []

    class Keep:
        def pytest_sessionstart(self, session: pytest.Session) -> None:
            judges.append(session.config.stash[plugin.JUDGE])

    quiet_options = _QUIET if quiet else []
    options = ["-p", "kata.plugin", *quiet_options, *job.options, "--rootdir", job.root]
    if job.submission:
        options += ["--submission", job.submission]
    pytest.main([*options, str(job.exercise.spec)], plugins=[Keep()])
    reports = [r for r in judges[0].reports if r.stem == job.stem] if judges else []
    return reports[0] if reports else _no_verdict(job, "pytest made no report")


class Child:
    """A forked child, ready to judge. It lives in a process group of its own and is used once."""

    def __init__(self, spare_for: Exercise | None = None) -> None:
        self.connection, theirs = Pipe()
        self.job: Job | None = None
        self.started = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            os.setpgid(0, 0)
            with suppress(BaseException):
                _live(theirs, spare_for)
            os._exit(0)
        theirs.close()
        with suppress(OSError):  # whoever is first
            os.setpgid(self.pid, self.pid)

    def start(self, job: Job) -> None:
        self.job, self.started = job, time.perf_counter()
        self.connection.send_bytes(msgspec.msgpack.encode(job))

    def result(self) -> Report:
        """The verdict; without one the run has failed, whatever the exit status."""
        assert self.job is not None
        try:
            report = msgspec.msgpack.decode(self.connection.recv_bytes(), type=Report)
        except (EOFError, OSError, msgspec.MsgspecError):
            report = _no_verdict(self.job, "the run ended without a verdict")
        self.end()
        return report

    def end(self) -> None:
        """End the child and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.connection.close()


def judge_all(jobs: list[Job], at_once: int) -> Iterator[tuple[int, Report, float]]:
    """Judge many in children of this process: (which, its report, seconds), as they finish."""
    running: dict[Connection, tuple[int, Child]] = {}
    waiting = list(enumerate(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                which, job = waiting.pop(0)
                child = Child()
                child.start(job)
                running[child.connection] = which, child
            for connection in wait(list(running), timeout=1.0):
                which, child = running.pop(cast("Connection", connection))
                report = child.result()
                yield which, report, time.perf_counter() - child.started
            for connection, (which, child) in list(running.items()):
                if time.perf_counter() - child.started > LIMIT:
                    del running[connection]
                    child.end()
                    yield which, _no_verdict(jobs[which], f"not done after {LIMIT:g} s"), LIMIT
    finally:
        for _, child in running.values():
            child.end()


def _live(parent: Connection, spare_for: Exercise | None) -> None:
    """The life of a child: warm up while nobody waits, then judge."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _silence():
        if spare_for is not None and "multiprocess" not in spare_for.suites:
            _warm_up(spare_for)
        job = msgspec.msgpack.decode(parent.recv_bytes(), type=Job)
        report = judge(job)
    parent.send_bytes(msgspec.msgpack.encode(report))


def _warm_up(exercise: Exercise) -> None:
    """What the first operation would pay for: thread pools and backends."""
    import torch

    (torch.ones(256, 256) @ torch.ones(256, 256)).sum()
    if "jax" in exercise.imports:
        import jax.numpy as jnp

        jnp.ones(2).block_until_ready()


def _no_verdict(job: Job, why: str) -> Report:
    return Report(job.stem, job.submission, error=Detail("error", why))


_QUIET = [
    "-p",
    "no:terminal",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:faulthandler",
    "-p",
    "no:logging",
]


class _silence:
    """What is printed by anybody goes nowhere (a spec's own output is captured by pytest)."""

    def __enter__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._kept = [os.dup(fd) for fd in (1, 2)]
        with open(os.devnull, "w") as nowhere:
            for fd in (1, 2):
                os.dup2(nowhere.fileno(), fd)

    def __exit__(self, *_: object) -> None:
        for fd, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, fd)
            os.close(kept)


# --- the server of `kata watch` ------------------------------------------------------------------


class WarmServer:
    """A warm process of its own. `run` answers later: wait for `connection`, then `receive`."""

    def __init__(self, exercise: Exercise) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "kata.server", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.prepare(exercise)

    def prepare(self, exercise: Exercise) -> None:
        """Have a spare child ready for this exercise."""
        self._send(("prepare", Job(str(exercise.root), exercise.stem)))

    def run(self, job: Job) -> None:
        """Judge; a run that is under way is cancelled and gives no report."""
        self._send(("run", job))

    def receive(self) -> Report:
        """The next report; EOFError if the server has died."""
        return msgspec.msgpack.decode(self.connection.recv_bytes(), type=Report)

    def close(self) -> None:
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        self._process.kill()
        self._process.wait()

    def _send(self, message: tuple[str, Job]) -> None:
        with suppress(BrokenPipeError):  # receive() will tell
            self.connection.send_bytes(msgspec.msgpack.encode(message))


def serve(client: Connection) -> None:
    """The server's loop; ends when the client closes its side."""
    warm()
    spare: Child | None = None
    running: Child | None = None
    try:
        while True:
            due = None
            if running:
                due = max(0.0, running.started + LIMIT - time.perf_counter())
            ready = wait([client, *([running.connection] if running else [])], timeout=due)
            if running and (running.connection in ready or not ready):
                job = running.job
                assert job is not None
                if ready:
                    report = running.result()
                else:
                    running.end()
                    report = _no_verdict(job, f"not done after {LIMIT:g} s")
                running = None
                client.send_bytes(msgspec.msgpack.encode(report))
                spare = spare or Child(job.exercise)
            if client not in ready:
                continue
            what, job = msgspec.msgpack.decode(client.recv_bytes(), type=tuple[str, Job])
            if running:
                running.end()
                running = None
            if what == "prepare":
                if spare:
                    spare.end()
                import_all(outside(job.exercise))
                spare = Child(job.exercise)
            else:
                running, spare = spare or Child(), None
                running.start(job)
    except (EOFError, OSError):
        pass
    finally:
        for child in (spare, running):
            if child:
                child.end()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # an orderly exit has Triton's bindings complain of leaks
