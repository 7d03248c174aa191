"""A worker process that holds no answers: it is told the submission, the specs and earlier parts.

The judge talks to it in bounded bytes (see wire.py) and never imports the submission. This keeps a
submission away from the judge's oracle, reference and inputs; it is no sandbox.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import ClassVar

import msgspec

from kata.attempt import forbidden, modules, wire
from kata.attempt.outcome import Done, Problem, problem
from kata.attempt.performing import perform
from kata.attempt.ranks import Job, RankServer
from kata.attempt.warm import IMPORTS, import_all
from kata.course.catalog import STEM, Exercise, imported

LIMIT = 120.0  # seconds for one attempt


class Nursery:
    """A process that has imported what specs import, and forks a worker for each submission."""

    current: ClassVar[tuple[int, Nursery] | None] = None  # of the process with this number

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "kata.attempt.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.pid = self._process.pid
        theirs.close()

    @classmethod
    def of_this_process(cls) -> Nursery:
        if cls.current is None or cls.current[0] != os.getpid():
            cls.current = os.getpid(), cls()
        return cls.current[1]

    def fork(self, told: Path) -> tuple[Connection, int]:
        """A worker that knows what lies in this folder: its connection and its process."""
        ours, theirs = Pipe()
        with suppress(OSError):  # then there is no answer either
            socket.send_fds(self._socket, [bytes(told)], [theirs.fileno()])
        theirs.close()
        try:
            return ours, int(ours.recv_bytes())
        except (EOFError, OSError):
            type(self).current = None
            raise RuntimeError("the worker did not start") from None


class Worker:
    """A process of its own that attempts on one submission."""

    def __init__(self, exercise: Exercise, submission: Path, parts: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kata-worker-")
        told = Path(self._folder.name)
        (told / "parts").mkdir()
        shutil.copy(submission, told / f"{exercise.stem}.py")
        shutil.copy(exercise.spec, told)
        for stem in exercise.parts:
            shutil.copy(parts / f"{stem}.py", told / "parts")
        self._path, self._told = submission, told / f"{exercise.stem}.py"
        self._connection, self._pid = Nursery.of_this_process().fork(told)

    def perform(self, run: str, call: bytes, seed: int, ranks: int) -> list[Done]:
        """Attempt in the worker. A worker that gives no answer has failed the attempt."""
        job = Job(ranks, "", "", "", run, call, seed)
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(job))
            if not self._connection.poll(LIMIT):
                self._kill()
                return [Done(problem=Problem(["TimeoutError"], f"not done after {LIMIT:g} s"))]
            answer = self._connection.recv_bytes(wire.LIMIT)
            done = msgspec.msgpack.decode(answer, type=list[Done])
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            return [Done(problem=Problem(["WorkerDied"], f"the worker gave no answer ({error!r})"))]
        for each in done:
            for frame in each.problem.frames if each.problem else ():
                frame.file = frame.file.replace(str(self._told), str(self._path))
        return done

    def close(self) -> None:
        """End the worker and its ranks."""
        self._kill()
        self._connection.close()
        self._folder.cleanup()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # its ranks see that it is gone
            os.kill(self._pid, signal.SIGKILL)


def main(fd: int) -> None:
    """The nursery's loop; ends when the judge is gone."""
    import_all(IMPORTS)
    nursery = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    while True:
        message, fds, _, _ = socket.recv_fds(nursery, 4096, 1)
        if not message:
            break
        told = Path(os.fsdecode(message))
        (spec_file,) = told.glob("test_*.py")
        import_all(name for name in imported(spec_file) if not STEM.fullmatch(name))
        gc.freeze()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            nursery.close()
            with suppress(BrokenPipeError):
                attempt_all(Connection(fds[0]), told, spec_file)
            os._exit(0)
        os.close(fds[0])


def attempt_all(judge: Connection, told: Path, spec_file: Path) -> None:
    """The worker's own loop; ends when the judge closes its side."""
    judge.send_bytes(str(os.getpid()).encode())
    os.chdir(told)
    exercise, parts = told / spec_file.name.removeprefix("test_"), told / "parts"
    modules.use_parts(parts)
    spec = modules.load(spec_file, spec_file.stem)
    forbidden.forbid(getattr(spec, "WITHOUT", ()))
    rank_server = RankServer()
    module = None
    while True:
        try:
            job = msgspec.msgpack.decode(judge.recv_bytes(), type=Job)
        except EOFError:
            break
        if job.n:
            job.spec, job.module, job.parts = str(spec_file), str(exercise), str(parts)
            done = rank_server.run(job)
        else:
            try:
                module = module or modules.load(exercise)
                one, _ = perform(getattr(spec, job.run), module, job.call, job.seed)
            except (Exception, SystemExit) as error:
                one = Done(problem=problem(error, {str(exercise)}))
            done = [one]
        judge.send_bytes(msgspec.msgpack.encode(done))
    rank_server.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
