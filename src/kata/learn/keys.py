"""Keys of a terminal, each at once, also after Ctrl-Z and `fg`; and the saves of files."""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from watchfiles import watch as changes


class Keyboard:
    """Standard input. `fd` is None where there is none, `continued` true after a stop."""

    def __init__(self) -> None:
        self.fd: int | None = None
        self.continued = False

    @property
    def in_front(self) -> bool:
        """Whether keys come to us. Who reads in the background is stopped."""
        if self.fd is None:
            return False
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError:  # no terminal, or one that has no jobs
            return True


@contextmanager
def keyboard() -> Iterator[Keyboard]:
    """Standard input, where it is a terminal with each key at once."""
    keys = Keyboard()
    try:
        fd = keys.fd = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):
        yield keys
        return
    if not os.isatty(fd):
        yield keys
        return
    before = termios.tcgetattr(fd)

    def stop(*_: object) -> None:
        """Ctrl-Z. Whoever comes next has the terminal as it was."""
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # to this thread: it stops in here
        signal.signal(signal.SIGTSTP, stop)

    def go_on(*_: object) -> None:
        """`fg`, or `bg`: then another has the terminal, and it stays as it is."""
        keys.continued = keys.in_front
        if keys.continued:
            tty.setcbreak(fd)

    tty.setcbreak(fd)
    handlers = {signal.SIGTSTP: stop, signal.SIGCONT: go_on}
    kept = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield keys
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def saves(root: Path) -> Iterator[int]:
    """A file descriptor that can be read when something below the floors was saved."""
    reader, writer = os.pipe()
    ended = threading.Event()
    folders = [root / name for name in ("exercises", "solutions", "tests")]

    def tell() -> None:
        for _ in changes(
            *folders, step=1, debounce=20, stop_event=ended, recursive=False, rust_timeout=200
        ):
            os.write(writer, b"!")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        ended.set()
        thread.join()
        os.close(reader)
        os.close(writer)
