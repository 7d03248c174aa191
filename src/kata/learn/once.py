"""`kata run`: one verdict, by a child that this process waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from kata.attempt.warm import ALWAYS, import_all, outside
from kata.judge.child import Child, Request
from kata.judge.report import Report, SpecReport
from kata.learn import verdict
from kata.learn.recorder import write_down

SOON = 0.3  # seconds: a name that comes within them stands in the verdict
LATE = 1.0  # seconds after which we say what is being judged


def run(request: Request, console: Console, next_one: str = "") -> int:
    """Judge, show the verdict, write the run down; 0 if the verdict says passed."""
    import_all([*ALWAYS, *outside(request.exercise)])
    child = Child(request, foreground=True)
    child.start()
    try:
        report = _judged(child, console)
        named = not report.naming
        verdict.show(report, request.exercise, console, next_one)
        if not named:
            console.print(Text(f"  {verdict.LOOKING}", "dim"))
            report = child.report()
            verdict.show_names(report, console)
    except KeyboardInterrupt:
        report = child.sofar
        if not report.naming:  # nothing was judged
            return 130
    finally:
        child.end()
    for warning in write_down(report, request):
        console.print(Text(warning, "yellow"))
    return 0 if report.state == "passed" else 1


def _judged(child: Child, console: Console) -> Report:
    """The last report, or one whose names don't come soon."""
    begun = time.monotonic()
    with _telling(console, child, begun) as tell:
        while True:
            message = child.receive(timeout=SOON)
            tell()
            if isinstance(message, Report):
                if not message.naming or child.request.loud:  # pytest's own report comes first
                    return child.report() if message.naming else message
                last = child.receive(timeout=SOON)
                return last if isinstance(last, Report) else message


@contextmanager
def _telling(console: Console, child: Child, begun: float) -> Iterator[Callable[[], None]]:
    """On a terminal: which spec runs, once that takes longer."""
    if not console.is_terminal or child.request.loud:
        yield lambda: None
        return
    with console.status("") as status:
        status.stop()

        def tell() -> None:
            if child.running and time.monotonic() - begun > LATE:
                status.start()
                status.update(f"judging: {SpecReport(child.running, '').sentence}")

        yield tell
