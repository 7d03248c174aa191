"""A run in a forked child, and the process that waits for it, keeps its time, and says what came.

A verdict is believed only as data that the child sends. One that ends without, by `os._exit(0)`, a
signal or a patched exit, has failed, whatever its status; one that says nothing for longer than the
running spec may take is ended.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kata.attempt.ranks import RankServer
from kata.attempt.scratch import Scratch
from kata.attempt.warm import processor_time, silence, warm_up
from kata.attempt.worker import ForkServer
from kata.course.catalog import Exercise
from kata.judge import session as sessions
from kata.judge.limits import GRACE, SETTING_UP, is_up
from kata.judge.replays import get_ready
from kata.judge.report import Detail, Plan, Report, SpecReport, Starts
from kata.judge.submission import refusal

NAMING = 600.0  # seconds for the names: what is slow to name is kept for the next time
MESSAGE = 64 << 20  # bytes of a child's message
UNUSED = ("terminal", "cacheprovider", "faulthandler", "logging", "unraisableexception")
QUIET = [option for name in UNUSED for option in ("-p", f"no:{name}")]

Message = Plan | Starts | SpecReport | Report


class Request(msgspec.Struct):
    """Judge one exercise: the learner's file, or `submission`. Loud: pytest's own report too."""

    root: str
    stem: str
    submission: str = ""
    options: list[str] = []
    loud: bool = False

    @property
    def exercise(self) -> Exercise:
        return Exercise(Path(self.root), self.stem)

    @property
    def filling(self) -> Request:
        """The request that fills the atlas, so that what fails in this one is named at once."""
        more = ["-m", "not weights and not train", "--fill-atlas", "mistakes"]
        return Request(self.root, self.stem, str(self.exercise.solution), [*self.options, *more])


def judge(request: Request, client: Connection | None = None, more: bool = False) -> Report:
    """Run the specs of one exercise in this process.

    With a client: read the specs, wait for its word, and tell it what happens: the plan, each spec
    that starts and how it went, and what failed before the mistake has its name. More: other
    versions will be judged here, and use the ranks that this one has started.
    """
    judges: list[sessions.Judge] = []

    def report() -> Report | None:
        return next((r for j in judges for r in j.reports if r.stem == request.stem), None)

    def tell(message: Message) -> None:
        if client:
            client.send_bytes(msgspec.msgpack.encode(message))

    class Keep:
        def pytest_sessionstart(self, session: pytest.Session) -> None:
            judges.append(session.config.stash[sessions.JUDGE])
            if client:
                judges[-1].tell = tell

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtestloop(self, session: pytest.Session) -> None:
            tell(Plan([item.name for item in session.items]))
            if more:
                RankServer.current = judges[-1].rank_server
            if client:
                client.recv_bytes()

        @pytest.hookimpl(wrapper=True)
        def pytest_sessionfinish(self) -> Generator[None, None, None]:
            early = report()
            if early and early.count("failed"):
                tell(msgspec.structs.replace(early, naming=True))
            yield

    if request.submission and (why := refusal(Path(request.submission).absolute())):
        return no_verdict(request, why)
    configuration = Path(request.root, "pyproject.toml")
    options = ["-p", "kata.plugin", *([] if request.loud else QUIET), *request.options]
    options += ["--rootdir", request.root, *(["-c", str(configuration)] * configuration.exists())]
    if request.submission:
        options += ["--submission", request.submission]
    pytest.main([*options, str(request.exercise.spec)], plugins=[Keep()])
    return report() or no_verdict(request, "pytest made no report")


class Child:
    """A forked child, which reads the specs of its request and waits. It is used once.

    It leads a process group, so that all that it starts ends with it, and what it prints goes
    nowhere. In the foreground it has the terminal, for breakpoints, and shares our group. With
    `more` it judges further versions of the exercise, which nobody distrusts, and has to be ended.
    """

    def __init__(
        self, request: Request, ahead: bool = False, foreground: bool = False, more: bool = False
    ) -> None:
        self.foreground, self.more = foreground, more
        self._expect(request)
        self._scratch = Scratch("run")  # for what it would leave behind if it were killed
        if "--isolate" in request.options:
            ForkServer.start()  # one for all children, else each would start its own
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            with suppress(BaseException):
                self._live(theirs, ahead)
            os._exit(1)
        theirs.close()
        if not foreground:
            with suppress(OSError):  # whoever is first
                os.setpgid(self.pid, self.pid)

    def _live(self, client: Connection, ahead: bool) -> None:
        """The child's life: warm up while nobody waits, then judge."""
        tempfile.tempdir = os.environ["TMPDIR"] = str(self._scratch.path)
        if not self.foreground:
            os.setpgid(0, 0)
            if "--fill-atlas" in self.request.options:
                os.nice(10)  # nobody waits for it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with silence(not self.foreground):
            if ahead and "multiprocess" not in self.request.exercise.suites:
                warm_up(self.request.exercise)
                get_ready(self.request.exercise)
            report = judge(self.request, client, self.more)
        with silence():  # what gloo's threads say as they end
            client.send_bytes(msgspec.msgpack.encode(report))
            while self.more:
                request = msgspec.msgpack.decode(client.recv_bytes(), type=Request)
                client.send_bytes(msgspec.msgpack.encode(judge(request, client, self.more)))
            os._exit(0)

    def _expect(self, request: Request) -> None:
        """Nothing is known of this request yet."""
        self.request = request
        self.started, self.running = 0.0, ""
        self.sofar = Report(request.stem, request.submission)
        self._plan: list[str] = []
        self._limit = self._began = self._computed = 0.0  # of the spec that runs
        self._specs = _version(request)
        self._due = time.monotonic() + SETTING_UP

    def another(self, request: Request) -> None:
        """Judge a further version of the exercise."""
        self._expect(request)
        with suppress(OSError):  # receive() will tell
            self.connection.send_bytes(msgspec.msgpack.encode(request))
        self.start()

    @property
    def is_alive(self) -> bool:
        return not self.connection.closed

    def fits(self, request: Request) -> bool:
        """Whether it has read the specs of this request as they are now."""
        return self.request == request and self._specs == _version(request)

    def start(self) -> None:
        self.started = time.perf_counter()
        self._due = time.monotonic() + SETTING_UP
        with suppress(OSError):  # receive() will tell
            self.connection.send_bytes(b"go")

    @property
    def left(self) -> float | None:
        """Seconds until it must have said something more; None: it may take its time."""
        return None if self._due == 0.0 else max(0.0, self._due - time.monotonic())

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None if there is none yet. A Report that isn't `naming` is the last."""
        limits = [seconds for seconds in (timeout, self.left) if seconds is not None]
        if not self.connection.poll(min(limits, default=None)):
            if self.left != 0.0:
                return None
            if self._is_starved():
                self._due += self._limit
                return None
            return self._end_of_time()
        try:
            sent = self.connection.recv_bytes(MESSAGE)
            message: Message = msgspec.msgpack.decode(
                sent, type=Plan | Starts | SpecReport | Report
            )
        except (EOFError, OSError, msgspec.MsgspecError):
            return self._end_of_life()
        if isinstance(message, Plan):
            self._plan = message.specs
        elif isinstance(message, Starts):
            self.running, self._limit = message.spec, message.limit
            self._began, self._computed = time.monotonic(), processor_time(self.pid)
            self._due = self._began + message.limit + GRACE if message.limit > 0 else 0.0
        elif isinstance(message, SpecReport):
            self.sofar.specs.append(message)
            self.running, self._due = "", time.monotonic() + SETTING_UP
        else:
            self.sofar, self.running, self._due = message, "", time.monotonic() + NAMING
            if not message.naming:
                if not self.more:
                    self.end()
                self._complete(message)
        return message

    def _complete(self, report: Report) -> None:
        """A run that was stopped on the way (`pytest.exit`, Ctrl-C) has tried only some specs."""
        tried = {spec.name for spec in report.specs}
        left = [SpecReport(name, "untried") for name in self._plan if name not in tried]
        if left and not report.error and not report.count("failed"):
            report.error = Detail("died", "the run was stopped before its end")
        report.specs += left

    def _is_starved(self) -> bool:
        """Whether its time is only up because the machine is busy."""
        seconds = time.monotonic() - GRACE - self._began
        computed = processor_time(self.pid) - self._computed
        return bool(self.running) and not is_up(self._limit, seconds, computed)

    def report(self) -> Report:
        """Wait for the last report."""
        while not isinstance(last := self.receive(), Report) or last.naming:
            pass
        return last

    def end(self) -> str:
        """End the child and all that it started; how it had ended, if it had."""
        how = ""
        with suppress(ChildProcessError):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            how = _how(status) if pid else ""
            if not self.foreground:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            if not pid:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        self.connection.close()
        self._scratch.remove()
        return how

    def _end_of_time(self) -> Report:
        self.end()
        return self._broken("time", "not done in time: it answered to nothing, and was ended")

    def _end_of_life(self) -> Report:
        for _ in range(50):  # its pipe may close a moment before it ends
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.01)
        how = self.end() or "sent something that is no report"
        return self._broken("died", f"the process {how}")

    def _broken(self, kind: str, why: str) -> Report:
        """What is known of a run that gave no verdict: the running spec is at fault."""
        report = self.sofar
        if report.naming:  # judged, and only the names are missing
            report.naming = False
            return report
        tried = {spec.name for spec in report.specs}
        left = [name for name in self._plan if name not in tried]
        if not left:
            report.error = Detail(kind, f"{why}, and gave no verdict")
        for name in left:
            at_fault = name == (self.running or left[0])
            detail = Detail(kind, why) if at_fault else None
            report.specs.append(SpecReport(name, "failed" if at_fault else "untried", 0.0, detail))
        return report


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"left with status {os.waitstatus_to_exitcode(status)}"


def judge_all(
    requests: list[Request], at_once: int, together: bool = False
) -> Iterator[tuple[int, Report, float]]:
    """Judge many in children of this process: (which, its report, seconds), as they finish.

    Together: a child judges all requests of an exercise, as long as it lives.
    """
    running: dict[Connection, tuple[int, Child]] = {}
    waiting = list(enumerate(requests))

    def take(wanted: Callable[[str], bool]) -> tuple[int, Request] | None:
        found = next((i for i, (_, r) in enumerate(waiting) if wanted(r.stem)), None)
        return None if found is None else waiting.pop(found)

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                busy = {child.request.stem for _, child in running.values() if together}
                which, request = take(lambda stem: stem not in busy) or waiting.pop(0)  # noqa: B023
                child = Child(request, more=together)
                child.start()
                running[child.connection] = which, child
            limits = [c.left for _, c in running.values() if c.left is not None]
            ready = wait(list(running), timeout=min(limits, default=None))
            overdue = [c for c, (_, child) in running.items() if child.left == 0.0]
            for connection in {*ready, *overdue}:
                which, child = running[cast("Connection", connection)]
                report = child.receive(0.0)
                if not isinstance(report, Report) or report.naming:
                    continue
                yield which, report, time.perf_counter() - child.started
                del running[child.connection]
                stem = child.request.stem
                if child.is_alive and (following := take(lambda other: other == stem)):  # noqa: B023
                    child.another(following[1])
                    running[child.connection] = following[0], child
                else:
                    child.end()
    finally:
        for _, child in running.values():
            child.end()


def _version(request: Request) -> int:
    """When the spec file was last written; 0 if it isn't there."""
    with suppress(OSError):
        return request.exercise.spec.stat().st_mtime_ns
    return 0


def no_verdict(request: Request, why: str) -> Report:
    return Report(request.stem, request.submission, error=Detail("error", why))
