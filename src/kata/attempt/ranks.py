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
import subprocess
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
from kata.attempt.outcome import Done, Frame, Job, Problem, problem
from kata.attempt.performing import perform
from kata.attempt.scratch import Scratch

LIMIT = 15.0  # seconds for an attempt
POLL = 0.1  # seconds between two looks at the ranks
STILL = 10  # looks without any work on any rank in between: they wait for each other
STILL_AFTER_FAILURE = 2  # the same once a rank has failed
GRACE = 0.5  # seconds for the others once a rank has failed


LATE = "not done after"
JOINED = b""  # what a rank sends before its result


class Launch(msgspec.Struct):
    """A job on ranks: the spec file, and the module's file. No module: on None."""

    job: Job
    spec_file: str
    module: str | None
    parts: str
    limit: float = LIMIT


class RankServer:
    """Forks ranks on request. Start it before this process runs anything in torch or JAX.

    Should it die, the next launch starts another. That one can't be forked any more, and takes
    seconds to import what it needs.
    """

    current: ClassVar[RankServer | None] = None  # for several pytest runs in one process

    def __init__(self) -> None:
        self._scratch = Scratch("ranks")
        self._connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            try:
                _serve(theirs, self._scratch)
            finally:
                os._exit(0)
        theirs.close()

    def run(self, launch: Launch) -> list[Done]:
        """One result a rank."""
        for _ in range(2):
            try:
                self._connection.send_bytes(msgspec.msgpack.encode(launch))
                return msgspec.msgpack.decode(self._connection.recv_bytes(), type=list[Done])
            except (EOFError, OSError, msgspec.MsgspecError):
                self._start_another()
            except BaseException:  # out of time: what it answers later is for nobody
                self._start_another()
                raise
        return [Done(problem=Problem(["RanksDied"], "the server of the ranks died, twice"))]

    def _start_another(self) -> None:
        self.close()
        self._scratch = Scratch("ranks")
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "kata.attempt.ranks", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.pid = subprocess.Popen(
            [*command, str(self._scratch.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        ).pid
        theirs.close()

    def close(self) -> None:
        """End the server, and with it whatever rank is left."""
        self._connection.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._scratch.remove()


def _serve(requests: Connection, scratch: Scratch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches our parent, and we end with it
    signal.setitimer(signal.ITIMER_REAL, 0)
    with suppress(ImportError):  # torch does at the first backward, for a second in every rank
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    gc.freeze()  # else a collection in a rank walks all of torch
    ranks: list[_Rank] = []  # by their number: used again, in new process groups
    try:
        while launch := _receive(requests):
            done = _attempt(ranks, launch, requests, scratch.path)
            if done is None:
                return
            if any(d.problem for d in done):
                _end(ranks)
            requests.send_bytes(msgspec.msgpack.encode(done))
    except OSError:
        pass  # nobody asks any more
    finally:
        _end(ranks)
        scratch.remove()  # our parent does, unless it was killed


def _attempt(
    ranks: list[_Rank], launch: Launch, requests: Connection, folder: Path, again: bool = True
) -> list[Done] | None:
    """What comes of a launch on the first n ranks. None if nobody asks any more."""
    for rank in range(len(ranks), launch.job.ranks):
        ranks.append(_Rank(rank, folder, ranks))
    team, store = ranks[: launch.job.ranks], tempfile.mktemp(dir=folder)
    for each in team:
        each.start(launch, store)
    done = _collect(team, launch, requests)
    if done and not all(each.began for each in team):
        _end(ranks)  # an earlier attempt left something, or one was killed: with fresh ones
        if again:
            return _attempt(ranks, launch, requests, folder, again=False)
    return done


def _receive(connection: Connection) -> Launch | None:
    """What to launch next; None if nobody asks any more."""
    try:
        return msgspec.msgpack.decode(connection.recv_bytes(), type=Launch)
    except (EOFError, OSError):
        return None


def _end(ranks: list[_Rank]) -> None:
    while ranks:
        ranks.pop().end()


class _Rank:
    """A forked rank, seen from its parent."""

    launch: Launch
    began: bool  # whether it has entered the process group, so that the code may have run
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

    def start(self, launch: Launch, store: str) -> None:
        self.launch, self.began, self.done = launch, False, None
        with suppress(OSError):  # receive() will tell
            self.connection.send_bytes(msgspec.msgpack.encode((launch, store)))

    def receive(self) -> None:
        try:
            sent = self.connection.recv_bytes()
            if sent == JOINED:
                self.began = True
            else:
                self.done = msgspec.msgpack.decode(sent, type=Done)
        except (EOFError, OSError, msgspec.MsgspecError):
            self.done = Done(problem=self._died())

    def _died(self) -> Problem:
        """How it ended. One that is still there has sent nonsense, or closed its side."""
        for _ in range(20):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                how = (
                    f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
                    if os.WIFSIGNALED(status)
                    else f"left with status {os.WEXITSTATUS(status)}"
                )
                break
            time.sleep(0.01)
        else:
            how = "went away"
        message = f"rank {self.rank} {how} and gave no result"
        return Problem(["RankDied", "RuntimeError"], message, rank=self.rank)

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
        own = {self.launch.module, self.launch.spec_file}
        at = next((f for f in frames if f.file == self.launch.module), None)
        at = at or next((f for f in frames if f.file in own), None)
        names = [f.function for f in frames if "/torch/distributed/" in f.file]
        names = [n for n in names if not n.startswith("_") and n != "wrapper"]
        where = f" in {names[0]}" if names else ""
        if at is not None:
            where += f", {Path(at.file).name}:{at.line} ({at.function})"
        message = f"rank {self.rank} waits{where}: {why}"
        kind = "RankOutOfTime" if why.startswith(LATE) else "RankWaits"
        types = [kind, "TimeoutError", "OSError", "Exception"]
        return Done(problem=Problem(types, message, [at] if at else [], self.rank))

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.connection.close()


def _collect(ranks: list[_Rank], launch: Launch, requests: Connection) -> list[Done] | None:
    """Wait for all, or until waiting has no sense. None if nobody asks any more."""
    end = time.monotonic() + launch.limit
    seen, still, limit = "", 0, STILL
    why = f"{LATE} {launch.limit:g} s"
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
    # What gloo's C++ says of its end ("terminate called after throwing …") would stand above the
    # verdict, which tells the same in words. What Python prints goes on as before.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    while True:
        launch, store = msgspec.msgpack.decode(parent.recv_bytes(), type=tuple[Launch, str])
        job = launch.job
        try:
            device = _join(job.ranks, rank, store)
            parent.send_bytes(JOINED)
            modules.use_parts(Path(launch.parts))
            spec = modules.load(Path(launch.spec_file), Path(launch.spec_file).stem)
            forbidden.forbid(getattr(spec, "WITHOUT", ()))
            module = modules.load(Path(launch.module)) if launch.module else None
            done, _ = perform(getattr(spec, job.run), module, job.call, job.seed, device)
        except (Exception, SystemExit) as error:
            done = Done(problem=problem(error, {str(launch.module)}, rank))
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


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), Scratch.at(Path(sys.argv[2])))
    os._exit(0)
