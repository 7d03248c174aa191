"""A worker process that holds no answers: it is told the submission, the specs and earlier parts.

The judge talks to it in bounded bytes (see wire.py) and never imports the submission. This keeps a
submission away from the judge's oracle, reference and inputs; it is no sandbox.
"""

from __future__ import annotations

import gc
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec

from kata.attempt import forbidden, modules, wire
from kata.attempt.outcome import Done, Job, Problem, problem
from kata.attempt.performing import perform
from kata.attempt.ranks import Launch, RankServer
from kata.attempt.scratch import Scratch
from kata.attempt.warm import IMPORTS, import_all, processor_time
from kata.course.catalog import STEM, Exercise, imported

LIMIT = 600.0  # seconds for one attempt; the spec's own limit comes first
CPU_LIMIT = 1800  # seconds that a worker may compute, should everybody who waits for it be killed
OUTPUT_LIMIT = 4000  # bytes of what an attempt prints that are kept
LOAD = ""  # the run that only reads the submission


class Question(msgspec.Struct):
    """A job, with what its answer must repeat: one made in advance, or late, is no answer."""

    number: int
    nonce: bytes
    job: Job


class Answer(msgspec.Struct):
    number: int
    nonce: bytes
    done: list[Done]


class Nothing(Exception):
    """A worker gave no answer that can be read."""


class ForkServer:
    """A process that has imported what specs import, and forks a worker for each submission."""

    current: ClassVar[ForkServer | None] = None  # also for the children of this process

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "kata.attempt.worker", str(theirs.fileno())]
        self.pid = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        ).pid
        theirs.close()

    @classmethod
    def start(cls) -> ForkServer:
        """The one that is there, or a new one."""
        cls.current = cls.current or cls()
        return cls.current

    @classmethod
    def fork(cls, told: Path) -> Forked:
        """A worker that knows what lies in this folder. A server that died is replaced, once."""
        for last in (False, True):
            forked = Forked()
            try:
                forked.ask(cls.start()._socket, told)
                return forked
            except (EOFError, OSError) as error:
                forked.end()
                cls.current = None
                if last:
                    raise RuntimeError("no worker could be started") from error
        raise AssertionError


class Forked:
    """A worker, seen by its judge: a connection, what it prints, and a line that ends it.

    The fork server ends the worker when that line is cut, so that none outlives its judge.
    """

    pid = 0

    def __init__(self) -> None:
        self.connection, self._theirs = Pipe()
        self.output, self._printing = os.pipe()
        self._cut, self._line = os.pipe()

    def ask(self, server: socket.socket, told: Path) -> None:
        fds = [self._theirs.fileno(), self._printing, self._cut]
        try:
            socket.send_fds(server, [bytes(told)], fds)
        finally:
            self._theirs.close()
            os.close(self._printing)
            os.close(self._cut)
        if not self.connection.poll(LIMIT):
            raise EOFError
        self.pid = int(self.connection.recv_bytes(32))

    def printed(self) -> bytes:
        """What it has printed since; nothing if it has closed its side."""
        return os.read(self.output, 1 << 16)

    def end(self) -> None:
        """End the worker and all that it started."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.pid = 0
        self.connection.close()
        for fd in (self.output, self._line):
            with suppress(OSError):
                os.close(fd)


class Worker:
    """The place of an attempt on a submission that nobody trusts.

    A worker that dies, answers nonsense, or is still at it when the spec's time is up (an exception
    comes out of `perform`) is ended; the next attempt gets another.
    """

    error: BaseException | None = None

    def __init__(self, exercise: Exercise, submission: Path, parts: Path) -> None:
        self._scratch = Scratch("worker")
        told = self._scratch.path
        for name in ("parts", "tmp"):
            (told / name).mkdir()
        self._path, self._told = submission, told / f"{exercise.stem}.py"
        with suppress(OSError):  # `load` says what is missing
            shutil.copy(submission, self._told)
        shutil.copy(exercise.spec, told)
        for stem in exercise.parts:
            shutil.copy(parts / f"{stem}.py", told / "parts")
        self._forked: Forked | None = None
        self._number = 0

    def prepare(self) -> None:
        self._forked = self._forked or ForkServer.fork(self._scratch.path)

    def load(self, run: bool = True) -> Problem | None:
        if run:
            return self.perform(Job("", LOAD, b"", 0))[0].problem
        try:
            modules.compiled(self._told)
        except Exception as error:
            return problem(error, {str(self._told)})
        return None

    def perform(self, job: Job) -> list[Done]:
        """Attempt in the worker. A worker that gives no answer has failed the attempt."""
        self._number += 1
        question = Question(self._number, secrets.token_bytes(16), job)
        start = time.perf_counter()
        try:
            self.prepare()
            assert self._forked
            done = self._checked(question, self._ask(self._forked, question))
        except (EOFError, OSError, Nothing, msgspec.MsgspecError) as error:
            self._drop()
            return [Done(problem=Problem(["WorkerDied"], f"the worker gave no answer: {error}"))]
        except BaseException:  # out of time: what it says later is for nobody
            self._drop()
            raise
        for each in done:
            each.seconds = time.perf_counter() - start  # ours: its clock may stand still
            for frame in each.problem.frames if each.problem else ():
                frame.file = frame.file.replace(str(self._told), str(self._path))
        return done

    def _ask(self, forked: Forked, question: Question) -> bytes:
        """The answer's bytes. What is printed meanwhile is read, and its beginning kept."""
        forked.connection.send_bytes(msgspec.msgpack.encode(question))
        sources: list[Any] = [forked.connection, forked.output]
        kept = 0
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            ready = wait(sources, timeout=1.0)
            if forked.output in ready:
                text = forked.printed()
                if not text:
                    sources.remove(forked.output)
                sys.stdout.write(text[: OUTPUT_LIMIT - kept].decode(errors="replace"))
                kept = min(OUTPUT_LIMIT, kept + len(text))
            elif forked.connection in ready:
                return forked.connection.recv_bytes(wire.LIMIT)
        raise Nothing(f"not done after {LIMIT:g} s")

    def _checked(self, question: Question, message: bytes) -> list[Done]:
        answer = msgspec.msgpack.decode(message, type=Answer)
        if (answer.number, answer.nonce) != (question.number, question.nonce):
            raise Nothing("it answered what was not asked")
        if len(answer.done) != max(1, question.job.ranks):
            raise Nothing(f"{len(answer.done)} results")
        for done in answer.done:
            if done.problem is None and question.job.run != LOAD:
                try:
                    wire.decode(done.result)
                except wire.BadMessage as error:
                    raise Nothing(str(error)) from error
        return answer.done

    def _drop(self) -> None:
        if self._forked:
            self._forked.end()
        self._forked = None

    def computed(self) -> float:
        return processor_time(self._forked.pid) if self._forked else 0.0

    def close(self) -> None:
        """End the worker and its ranks."""
        self._drop()
        self._scratch.remove()


# --- the other side ------------------------------------------------------------------------------


def main(fd: int) -> None:
    """The fork server's loop; ends when no judge is left."""
    import_all(IMPORTS)
    judges = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    workers: dict[int, int] = {}  # by the line that ends them
    while True:
        for ready in cast("list[int]", wait([judges.fileno(), *workers])):
            if ready == judges.fileno():
                message, fds, _, _ = socket.recv_fds(judges, 4096, 3)
                if not message:
                    for pid in workers.values():
                        _kill(pid)
                    return
                connection, printing, line = fds
                workers[line] = _fork(Path(os.fsdecode(message)), connection, printing)
            else:
                _kill(workers.pop(ready))
                os.close(ready)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork(told: Path, connection: int, printing: int) -> int:
    """A worker that attempts on what lies in this folder."""
    (spec_file,) = told.glob("test_*.py")
    import_all(name for name in imported(spec_file) if not STEM.fullmatch(name))
    gc.freeze()
    if pid := os.fork():
        os.close(connection)
        os.close(printing)
        return pid
    with suppress(BaseException):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
        for fd in (1, 2):
            os.dup2(printing, fd)
        sys.stdout = open(1, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
        _attempt_all(Connection(connection), told, spec_file)
    os._exit(0)


def _attempt_all(judge: Connection, told: Path, spec_file: Path) -> None:
    """The worker's own loop; ends when the judge closes its side."""
    judge.send_bytes(str(os.getpid()).encode())
    os.chdir(told)
    tempfile.tempdir = os.environ["TMPDIR"] = str(
        told / "tmp"
    )  # goes when the worker's folder does
    exercise, parts = told / spec_file.name.removeprefix("test_"), told / "parts"
    modules.use_parts(parts)
    spec = modules.load(spec_file, spec_file.stem)
    forbidden.forbid(getattr(spec, "WITHOUT", ()))
    rank_server = RankServer() if b"multiprocess" in spec_file.read_bytes() else None
    module = None
    while True:
        try:
            question = msgspec.msgpack.decode(judge.recv_bytes(), type=Question)
        except EOFError:
            break
        job = question.job
        if job.ranks and rank_server:
            done = rank_server.run(Launch(job, str(spec_file), str(exercise), str(parts)))
        else:
            try:
                module = module or modules.load(exercise)
                one = Done()
                if job.run != LOAD:
                    one, _ = perform(getattr(spec, job.run), module, job.call, job.seed)
            except (Exception, SystemExit) as error:
                one = Done(problem=problem(error, {str(exercise)}))
            done = [one]
        sys.stdout.flush()
        judge.send_bytes(msgspec.msgpack.encode(Answer(question.number, question.nonce, done)))
    if rank_server:
        rank_server.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # an orderly exit has Triton's bindings complain of leaks
