"""A worker process that holds no answers: it is told the submission, the specs and earlier parts.

The judge talks to it in bounded bytes (see wire.py) and never imports the submission. This keeps a
submission away from the judge's oracle, reference and inputs; it is no sandbox.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import msgspec

from kata import attempt as attempts
from kata import wire
from kata.attempt import Done, Problem
from kata.catalog import Exercise
from kata.ranks import Job, RankServer

LIMIT = 120.0  # seconds for one attempt


class Worker:
    """A fresh Python that attempts on one submission."""

    def __init__(self, exercise: Exercise, submission: Path, parts: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kata-worker-")
        told = Path(self._folder.name)
        (told / "parts").mkdir()
        shutil.copy(submission, told / f"{exercise.stem}.py")
        shutil.copy(exercise.spec, told)
        for stem in exercise.parts:
            shutil.copy(parts / f"{stem}.py", told / "parts")
        self._path, self._told = submission, told / f"{exercise.stem}.py"
        self._connection, theirs = Pipe()
        fd = theirs.fileno()
        command = [sys.executable, "-m", "kata.worker", str(fd), exercise.stem]
        self._process = subprocess.Popen(
            command, cwd=told, pass_fds=[fd], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()

    def perform(self, run: str, call: bytes, seed: int, ranks: int) -> list[Done]:
        """Attempt in the worker. A worker that gives no answer has failed the attempt."""
        job = Job(ranks, "", "", "", run, call, seed)
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(job))
            if not self._connection.poll(LIMIT):
                self._process.kill()
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
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def main(fd: int, stem: str) -> None:
    """The worker's own loop; ends when the judge closes its side."""
    from kata.plugin import prepare_environment

    prepare_environment()
    judge, told = Connection(fd), Path.cwd()
    os.set_inheritable(fd, False)
    exercise, spec_file, parts = told / f"{stem}.py", told / f"test_{stem}.py", told / "parts"
    attempts.use_parts(parts)
    spec = attempts.load(spec_file, spec_file.stem)
    attempts.forbid(getattr(spec, "WITHOUT", ()))
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
                module = module or attempts.load(exercise)
                one, _ = attempts.perform(getattr(spec, job.run), module, job.call, job.seed)
            except (Exception, SystemExit) as error:
                one = Done(problem=attempts.problem(error, {str(exercise)}))
            done = [one]
        judge.send_bytes(msgspec.msgpack.encode(done))
    rank_server.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
