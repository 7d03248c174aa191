"""The server of `kata watch`: a warm process that has a child ready before the save.

It imports, runs one trivial pytest, and freezes the garbage collector's heap: then a fork gives a
verdict in a tenth of a second, where a cold start takes seconds and a fork without the freeze half
of one.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import msgspec
import pytest

from kata.attempt.warm import IMPORTS, import_all, outside, silence
from kata.judge.child import QUIET, Child, Request, judge_all
from kata.judge.report import Report, Starts

__all__ = ["Request", "WarmServer", "judge_all", "outside", "warm"]

TRIVIAL = """
from hypothesis import given, strategies as st
@given(st.integers(), st.floats())
def test_nothing(n, x):
    pass
"""


def warm(imports: Iterable[str] = ()) -> None:
    """Make this process a good one to fork: import, run a trivial pytest, freeze the heap."""
    import_all([*IMPORTS, *imports])
    with tempfile.TemporaryDirectory() as folder:
        trivial, configuration = Path(folder, "test_trivial.py"), Path(folder, "pytest.ini")
        trivial.write_text(TRIVIAL)
        configuration.write_text("[pytest]\naddopts = -p kata.plugin\n")
        with silence():
            pytest.main([*QUIET, str(trivial), "--rootdir", folder, "-c", str(configuration)])
    gc.collect()
    gc.freeze()


class WarmServer:
    """A warm process of its own. `run` answers later: wait for `connection`, then `receive`."""

    def __init__(self, request: Request) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "kata.judge.server", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.prepare(request)

    def prepare(self, request: Request) -> None:
        """Have a child ready for this request."""
        self._send(("prepare", request))

    def run(self, request: Request) -> None:
        """Judge; a run that is under way is cancelled and gives no report."""
        self._send(("run", request))

    def receive(self) -> Starts | Report:
        """Which spec runs, or the next report; EOFError if the server has died.

        With `naming`, what failed is told and another report will follow.
        """
        return msgspec.msgpack.decode(self.connection.recv_bytes(), type=Starts | Report)

    def report(self) -> Report:
        """Wait for the next report."""
        while not isinstance(message := self.receive(), Report):
            pass
        return message

    def judge(self, request: Request) -> Report:
        """Run and wait for the last report."""
        self.run(request)
        while (report := self.report()).naming:
            pass
        return report

    def close(self) -> None:
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        self._process.kill()
        self._process.wait()

    def _send(self, message: tuple[str, Request]) -> None:
        with suppress(OSError):  # receive() will tell
            self.connection.send_bytes(msgspec.msgpack.encode(message))


class _Server:
    """Three children: one that waits for the next save, one that judges, one that fills the atlas.

    The atlas is filled while nobody waits for a verdict, so that a mistake has its name at once.
    """

    def __init__(self, client: Connection) -> None:
        self.client = client
        self.spare: Child | None = None
        self.running: Child | None = None
        self.filling: Child | None = None
        self.request: Request | None = None  # the last one
        self._filled: set[str] = set()

    def step(self) -> None:
        """Wait for whatever comes next."""
        busy = [child for child in (self.running, self.filling) if child]
        limits = [child.left for child in busy if child.left is not None]
        sources = [self.client, *(child.connection for child in busy)]
        ready = wait(sources, timeout=min(limits, default=None))
        if self.client in ready:
            what, request = msgspec.msgpack.decode(
                self.client.recv_bytes(), type=tuple[str, Request]
            )
            self._take(what, request)
            return
        if self.running:
            self._hear(self.running)
        if self.filling and _is_last(self.filling.receive(0.0)):
            self._filled.add(self.filling.request.stem)
            self.filling = None
        if not self.running:
            self._be_idle()

    def _take(self, what: str, request: Request) -> None:
        _end(self.running)
        _end(self.filling)
        self.running = self.filling = None
        if self.spare and not self.spare.fits(request):
            _end(self.spare)
            self.spare = None
        self.request = request
        if what == "prepare":
            import_all(outside(request.exercise))
            self.spare = self.spare or Child(request, ahead=True)
        else:
            self.running, self.spare = self.spare or Child(request), None
            self.running.start()

    def _hear(self, running: Child) -> None:
        message = running.receive(0.0)
        if isinstance(message, (Starts, Report)):
            self.client.send_bytes(msgspec.msgpack.encode(message))
        if _is_last(message):
            self.running = None

    def _be_idle(self) -> None:
        if self.request is None:
            return
        self.spare = self.spare or Child(self.request, ahead=True)
        if self.filling is None and self.request.stem not in self._filled:
            self.filling = Child(self.request.filling)
            self.filling.start()

    def close(self) -> None:
        for child in (self.spare, self.running, self.filling):
            _end(child)


def _is_last(message: object) -> bool:
    return isinstance(message, Report) and not message.naming


def _end(child: Child | None) -> None:
    if child:
        child.end()


def serve(client: Connection) -> None:
    """The server's life; ends when the client closes its side."""
    warm()
    server = _Server(client)
    try:
        while True:
            server.step()
    except (EOFError, OSError):
        pass
    finally:
        server.close()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # an orderly exit has Triton's bindings complain of leaks
