"""The same attempt on n ranks of one process group.

A process that has imported torch but run nothing forks the ranks (see `RankServer`): they meet
through a file and are there in a tenth of a second. A rank that dies, or ranks that wait for each
other, end the attempt, and the problem says which rank waited on which line.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import ClassVar, TextIO

import msgspec
import torch
import torch.distributed as dist

from kata.attempt import forbidden, modules
from kata.attempt.outcome import Done, Frame, Problem, problem
from kata.attempt.performing import perform

LIMIT = 30.0  # seconds for an attempt
POLL = 0.1  # seconds between two looks at the ranks
STILL = 10  # looks without any work on any rank in between: they wait for each other
STILL_AFTER_FAILURE = 2  # the same once a rank has failed
GRACE = 0.5  # seconds for the others once a rank has failed


JOINED = b""  # what a rank sends before its result


class Job(msgspec.Struct):
    """`run` of the spec file, on the module of a file, on n ranks. No module: on None."""

    n: int
    spec: str
    module: str | None
    parts: str
    run: str
    call: bytes
    seed: int
    limit: float = LIMIT


class RankServer:
    """Forks ranks on request. Start it before this process runs anything in torch or JAX."""

    current: ClassVar[RankServer | None] = None  # for several pytest runs in one process

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            try:
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def run(self, job: Job) -> list[Done]:
        """One result a rank."""
        self._connection.send_bytes(msgspec.msgpack.encode(job))
        return msgspec.msgpack.decode(self._connection.recv_bytes(), type=list[Done])

    def close(self) -> None:
        """End the server, and with it whatever rank is left."""
        self._connection.close()
        os.waitpid(self.pid, 0)


def _serve(requests: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches our parent, and we end with it
    signal.setitimer(signal.ITIMER_REAL, 0)
    with suppress(ImportError):  # torch does at the first backward, for a second in every rank
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    gc.freeze()  # else a collection in a rank walks all of torch
    ranks: list[_Rank] = []  # by their number: used again, in new process groups
    with tempfile.TemporaryDirectory(prefix="kata-ranks-") as folder:
        try:
            while job := _receive(requests):
                done = _attempt(ranks, job, requests, Path(folder))
                if done is None:
                    return
                if any(d.problem for d in done):
                    _end(ranks)
                requests.send_bytes(msgspec.msgpack.encode(done))
        finally:
            _end(ranks)


def _attempt(ranks: list[_Rank], job: Job, requests: Connection, folder: Path) -> list[Done] | None:
    """What comes of a job on the first n ranks. None if nobody asks any more."""
    used = bool(ranks)
    for rank in range(len(ranks), job.n):
        ranks.append(_Rank(rank, folder, ranks))
    team, store = ranks[: job.n], tempfile.mktemp(dir=folder)
    for each in team:
        each.start(job, store)
    done = _collect(team, job, requests)
    if done and used and not all(each.joined for each in team):
        _end(ranks)  # the attempt before left something: once more with fresh ones
        return _attempt(ranks, job, requests, folder)
    return done


def _receive(connection: Connection) -> Job | None:
    """The next job; None if nobody asks any more."""
    try:
        return msgspec.msgpack.decode(connection.recv_bytes(), type=Job)
    except (EOFError, OSError):
        return None


def _end(ranks: list[_Rank]) -> None:
    while ranks:
        ranks.pop().end()


class _Rank:
    """A forked rank, seen from its parent."""

    job: Job
    joined: bool  # whether it has entered the process group
    done: Done | None

    def __init__(self, rank: int, folder: Path, earlier: list[_Rank]) -> None:
        self.rank, self.stack = rank, Path(tempfile.mktemp(prefix="stack-", dir=folder))
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for each in (self, *earlier):  # else a rank would outlive its parent
                each.connection.close()
            try:
                _be(rank, self.stack, theirs)
            finally:
                os._exit(0)
        theirs.close()

    def start(self, job: Job, store: str) -> None:
        self.job, self.joined, self.done = job, False, None
        with suppress(BrokenPipeError):  # receive() will tell
            self.connection.send_bytes(msgspec.msgpack.encode((job, store)))

    def receive(self) -> None:
        try:
            sent = self.connection.recv_bytes()
            if sent == JOINED:
                self.joined = True
            else:
                self.done = msgspec.msgpack.decode(sent, type=Done)
        except EOFError:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            how = (
                f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
                if os.WIFSIGNALED(status)
                else f"left with status {os.WEXITSTATUS(status)}"
            )
            message = f"rank {self.rank} {how} and gave no result"
            self.done = Done(problem=Problem(["RankDied", "RuntimeError"], message, rank=self.rank))

    def cpu_time(self) -> str:
        """Ticks of work so far; a new value each time while it runs, or where nobody can tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return str(time.monotonic())
        return str(time.monotonic()) if fields[0] in "RD" else f"{fields[11]} {fields[12]}"

    def stuck(self, why: str) -> Done:
        """A problem that says on which line this rank waits."""
        os.kill(self.pid, signal.SIGUSR1)
        frames: list[Frame] = []
        for _ in range(50):
            time.sleep(0.01)
            if self.stack.exists() and (frames := _frames(self.stack.read_text())):
                break
        own = {self.job.module, self.job.spec}
        at = next((f for f in frames if f.file == self.job.module), None)
        at = at or next((f for f in frames if f.file in own), None)
        names = [f.function for f in frames if "/torch/distributed/" in f.file]
        names = [n for n in names if not n.startswith("_") and n != "wrapper"]
        where = f" in {names[0]}" if names else ""
        if at is not None:
            where += f", {Path(at.file).name}:{at.line} ({at.function})"
        message = f"rank {self.rank} waits{where}: {why}"
        types = ["RankWaits", "TimeoutError", "OSError", "Exception"]
        return Done(problem=Problem(types, message, [at] if at else [], self.rank))

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.connection.close()


def _collect(ranks: list[_Rank], job: Job, requests: Connection) -> list[Done] | None:
    """Wait for all, or until waiting has no sense. None if nobody asks any more."""
    end = time.monotonic() + job.limit
    seen, still, limit = "", 0, STILL
    why = f"not done after {job.limit:g} s"
    while waiting := [r for r in ranks if r.done is None]:
        if time.monotonic() > end:
            break
        ready = wait([requests, *(r.connection for r in waiting)], timeout=POLL)
        if requests in ready:
            return None
        for rank in waiting:
            if rank.connection in ready:
                rank.receive()
                if rank.done and rank.done.problem:
                    end, limit = min(end, time.monotonic() + GRACE), STILL_AFTER_FAILURE
                    why = f"rank {rank.rank} failed"
        work = " ".join(r.cpu_time() for r in waiting)
        # Looks are counted, not seconds: the whole machine may have been asleep.
        still = still + 1 if work == seen and not ready else 0
        seen = work
        if still >= limit:
            why = why if limit == STILL_AFTER_FAILURE else "the ranks wait for each other"
            break
    for rank in ranks:
        if rank.done is None:
            rank.done = rank.stuck(why)
    return [r.done for r in ranks if r.done]


def _frames(dump: str) -> list[Frame]:
    """faulthandler's lines, innermost first."""
    pattern = r'File "(.+)", line (\d+) in (.+)'
    return [Frame(m[1], int(m[2]), m[3], "") for m in re.finditer(pattern, dump)]


def _be(rank: int, stack: Path, parent: Connection) -> None:
    """The life of a rank: attempts, until the parent ends it, since others may still need it."""
    file: TextIO = open(stack, "w")  # noqa: SIM115 (open as long as we live)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
    for name in ("stdout", "stderr"):
        getattr(sys, name).flush()
    torch.set_num_threads(1)
    while True:
        job, store = msgspec.msgpack.decode(parent.recv_bytes(), type=tuple[Job, str])
        try:
            device = _join(job.n, rank, store)
            parent.send_bytes(JOINED)
            modules.use_parts(Path(job.parts))
            spec = modules.load(Path(job.spec), Path(job.spec).stem)
            forbidden.forbid(getattr(spec, "WITHOUT", ()))
            module = modules.load(Path(job.module)) if job.module else None
            done, _ = perform(getattr(spec, job.run), module, job.call, job.seed, device)
        except (Exception, SystemExit) as error:
            done = Done(problem=problem(error, {str(job.module)}, rank))
        if done.problem:
            done.problem.rank = rank
        parent.send_bytes(msgspec.msgpack.encode(done))


def _join(n: int, rank: int, store: str) -> str:
    """Enter a new process group; returns the device of this rank."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if dist.is_initialized():
        dist.destroy_process_group()
    meeting = dist.FileStore(store, n)  # type: ignore[attr-defined]
    if torch.cuda.device_count() >= n:
        torch.cuda.set_device(rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=meeting, rank=rank, world_size=n)
        return f"cuda:{rank}"
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=n)
    return "cpu"
