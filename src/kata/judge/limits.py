"""How long a spec may take, and what happens when it takes longer.

The limit follows from what the reference needs: the proof fails where a reference takes more than
a third of it. Most specs take milliseconds, and get 5 s. A mark says what takes longer.

Whoever waits for the run keeps the limit (see server.py), since code may disarm an alarm, swallow
whatever it raises, or stay in C. The alarm here comes first, and tells on which line.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kata.attempt.warm import is_cold

CHEAP = 5.0
MARKS = {"train": 180.0, "weights": 90.0, "multiprocess": 30.0, "jax": 20.0, "gpu": 20.0}
COLD = 5.0  # more in a process that has not imported all that torch does later
SETTING_UP = 180.0  # for fixtures: they are ours, and some read real weights
BUSY = 4.0  # times the limit, for code that a busy machine lets compute too little
AGAIN = 0.5  # seconds after which the alarm comes once more, if it was swallowed
GRACE = 2.0  # seconds that whoever waits gives the alarm


class OutOfTime(BaseException):
    """The spec's time is up. No Exception: those are caught by Hypothesis, which tries again."""


def limit_of(item: pytest.Item, asked: float) -> float:
    """Seconds for a spec: what was asked for, or what its marks say. 0 is no limit."""
    if asked >= 0:
        return asked
    by_mark = [seconds for mark, seconds in MARKS.items() if item.get_closest_marker(mark)]
    own = item.get_closest_marker("limit")
    limit = float(own.args[0]) if own else max(by_mark, default=CHEAP)
    return limit + COLD * is_cold()


def is_up(limit: float, seconds: float, computed: float) -> bool:
    """Whether a spec's time is up: code that computed half of it, or that waits for too long."""
    return seconds >= limit and (computed >= limit / 2 or seconds >= BUSY * limit)


@contextmanager
def alarm(
    limit: float, clock: Callable[[], float] = time.process_time, stderr: int | None = None
) -> Iterator[None]:
    """Raise OutOfTime in here after so many seconds, and again while it is swallowed.

    `clock` tells how long the code under test has computed. Where nobody waits for this process,
    `stderr` is where it says, as it ends itself, on which line it was: that needs no Python to run.
    """
    if limit <= 0:
        yield
        return

    start, computed = time.monotonic(), clock()

    def out_of_time(*_: object) -> None:
        if is_up(limit, time.monotonic() - start, clock() - computed):
            raise OutOfTime(f"not done after {limit:g} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limit, AGAIN)
    if stderr is not None:
        faulthandler.dump_traceback_later(BUSY * limit + GRACE, exit=True, file=stderr)
    try:
        yield
    finally:
        disarm()
        signal.signal(signal.SIGALRM, before)


def disarm() -> None:
    """Forget the limit."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
