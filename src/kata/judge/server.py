"""Quick verdicts: a warm process has imported everything and forks a child for each run.

A process that has only imported (and run one trivial pytest, and frozen the garbage collector's
heap) may be forked safely, and its children need no second import. One that has run torch or JAX
operations must not be forked: its threads do not exist in the child, but their locks do.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import cast

import msgspec

from kata.attempt.warm import IMPORTS, import_all, outside
from kata.course.catalog import Exercise
from kata.judge import session as sessions
from kata.judge.report import Detail, Report

LIMIT = 600.0  # seconds for a whole run
TRIVIAL = """
from hypothesis import given, strategies as st
@given(st.integers(), st.floats())
def test_nothing(n, x):
    pass
"""


class Request(msgspec.Struct):
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


def judge(job: Request, quiet: bool = True, client: Connection | None = None) -> Report:
    """Run the specs of one exercise in this process; quiet: without pytest's own report.

    With a client: read the specs, wait for its word, and send it what failed before the mistake
    has its name.
    """
    import pytest

    judges: list[sessions.Judge] = []

    def report() -> Report | None:
        return next((r for j in judges for r in j.reports if r.stem == job.stem), None)

    class Keep:
        def pytest_sessionstart(self, session: pytest.Session) -> None:
            judges.append(session.config.stash[sessions.JUDGE])

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtestloop(self) -> None:
            if client:
                client.recv_bytes()

        @pytest.hookimpl(wrapper=True)
        def pytest_sessionfinish(self) -> Generator[None, None, None]:
            early = report()
            if client and early and early.count("failed") and not early.count("unwritten"):
                early = msgspec.structs.replace(early, naming=True)
                client.send_bytes(msgspec.msgpack.encode(early))
            yield

    quiet_options = _QUIET if quiet else []
    options = ["-p", "kata.plugin", *quiet_options, *job.options, "--rootdir", job.root]
    if job.submission:
        options += ["--submission", job.submission]
    pytest.main([*options, str(job.exercise.spec)], plugins=[Keep()])
    return report() or _no_verdict(job, "pytest made no report")


class Child:
    """A forked child, which reads the specs of its job and waits. It is used once."""

    def __init__(self, job: Request, warm_up: bool = False) -> None:
        self.job, self.started, self._specs = job, 0.0, _version(job)
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            os.setpgid(0, 0)
            with suppress(BaseException):
                _live(theirs, job, warm_up)
            os._exit(0)
        theirs.close()
        with suppress(OSError):  # whoever is first
            os.setpgid(self.pid, self.pid)

    def fits(self, job: Request) -> bool:
        """Whether it has read the specs of this job as they are now."""
        return self.job == job and self._specs == _version(job)

    def start(self) -> None:
        self.started = time.perf_counter()
        with suppress(BrokenPipeError):  # receive() will tell
            self.connection.send_bytes(b"go")

    def receive(self) -> Report:
        """The next report; without one the run has failed, whatever the exit status."""
        try:
            report = msgspec.msgpack.decode(self.connection.recv_bytes(), type=Report)
        except (EOFError, OSError, msgspec.MsgspecError):
            report = _no_verdict(self.job, "the run ended without a verdict")
        if not report.naming:
            self.end()
        return report

    def end(self) -> None:
        """End the child and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.connection.close()


def judge_all(jobs: list[Request], at_once: int) -> Iterator[tuple[int, Report, float]]:
    """Judge many in children of this process: (which, its report, seconds), as they finish."""
    running: dict[Connection, tuple[int, Child]] = {}
    waiting = list(enumerate(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                which, job = waiting.pop(0)
                child = Child(job)
                child.start()
                running[child.connection] = which, child
            for connection in wait(list(running), timeout=1.0):
                which, child = running[cast("Connection", connection)]
                report = child.receive()
                if not report.naming:
                    del running[child.connection]
                    yield which, report, time.perf_counter() - child.started
            for connection, (which, child) in list(running.items()):
                if time.perf_counter() - child.started > LIMIT:
                    del running[connection]
                    child.end()
                    yield which, _no_verdict(jobs[which], f"not done after {LIMIT:g} s"), LIMIT
    finally:
        for _, child in running.values():
            child.end()


def _live(client: Connection, job: Request, warm_up: bool) -> None:
    """The life of a child: warm up while nobody waits, then judge."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _silence():
        if warm_up and "multiprocess" not in job.exercise.suites:
            _warm_up(job.exercise)
        report = judge(job, client=client)
    client.send_bytes(msgspec.msgpack.encode(report))


def _version(job: Request) -> int:
    """When the spec file was last written; 0 if it isn't there."""
    with suppress(OSError):
        return job.exercise.spec.stat().st_mtime_ns
    return 0


def _warm_up(exercise: Exercise) -> None:
    """What the first operation would pay for: thread pools and backends."""
    import torch

    (torch.ones(256, 256) @ torch.ones(256, 256)).sum()
    if "jax" in exercise.imports:
        import jax.numpy as jnp

        jnp.ones(2).block_until_ready()


def _no_verdict(job: Request, why: str) -> Report:
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

    def __init__(self, job: Request) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "kata.judge.server", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.prepare(job)

    def prepare(self, job: Request) -> None:
        """Have a child ready for this job."""
        self._send(("prepare", job))

    def run(self, job: Request) -> None:
        """Judge; a run that is under way is cancelled and gives no report."""
        self._send(("run", job))

    def receive(self) -> Report:
        """The next report; EOFError if the server has died.

        With `naming`, what failed is told and another report will follow.
        """
        return msgspec.msgpack.decode(self.connection.recv_bytes(), type=Report)

    def judge(self, job: Request) -> Report:
        """Run and wait for the last report."""
        self.run(job)
        while (report := self.receive()).naming:
            pass
        return report

    def close(self) -> None:
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        self._process.kill()
        self._process.wait()

    def _send(self, message: tuple[str, Request]) -> None:
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
                if ready:
                    report = running.receive()
                else:
                    running.end()
                    report = _no_verdict(job, f"not done after {LIMIT:g} s")
                client.send_bytes(msgspec.msgpack.encode(report))
                if not report.naming:
                    running, spare = None, spare or Child(job, warm_up=True)
            if client not in ready:
                continue
            what, job = msgspec.msgpack.decode(client.recv_bytes(), type=tuple[str, Request])
            if running:
                running.end()
                running = None
            if spare and not spare.fits(job):
                spare.end()
                spare = None
            if what == "prepare":
                import_all(outside(job.exercise))
                spare = spare or Child(job, warm_up=True)
            else:
                running, spare = spare or Child(job), None
                running.start()
    except (EOFError, OSError):
        pass
    finally:
        for child in (spare, running):
            if child:
                child.end()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # an orderly exit has Triton's bindings complain of leaks
