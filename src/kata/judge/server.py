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


def serve(client: Connection) -> None:
    """The server's loop; ends when the client closes its side."""
    warm()
    spare: Child | None = None
    running: Child | None = None
    try:
        while True:
            sources = [client, *([running.connection] if running else [])]
            ready = wait(sources, timeout=running.left if running else None)
            if running and client not in ready:
                message = running.receive(0.0)
                if isinstance(message, (Starts, Report)):
                    client.send_bytes(msgspec.msgpack.encode(message))
                if isinstance(message, Report) and not message.naming:
                    request, running = running.request, None
                    spare = spare or Child(request, ahead=True)
                continue
            what, request = msgspec.msgpack.decode(client.recv_bytes(), type=tuple[str, Request])
            if running:
                running.end()
                running = None
            if spare and not spare.fits(request):
                spare.end()
                spare = None
            if what == "prepare":
                import_all(outside(request.exercise))
                spare = spare or Child(request, ahead=True)
            else:
                running, spare = spare or Child(request), None
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
