"""An attempt: a function of the spec, run on some module, gives plain data.

The arguments travel as bytes even inside one process. So every place behaves alike, the code under
test cannot touch the spec's own data, and an argument that it changed shows as bytes that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

from kata.attempt import wire
from kata.attempt.outcome import (
    ArgumentChanged,
    Attempted,
    Job,
    Reached,
    StateLeft,
    gravest,
    rebuilt,
)
from kata.attempt.performing import Run
from kata.attempt.places import Place


class Attempt:
    """What specs call: `attempt(run, *args)` runs `run(ex, *args)` and returns plain data.

    Every attempt goes into `record`; `given` has those of this spec, with the results as objects.
    """

    def __init__(self, place: Place, record: list[Attempted], seed: str) -> None:
        self.place, self.record, self._seed = place, record, seed
        self.begin("")

    def begin(self, spec: str) -> None:
        """What follows belongs to this spec."""
        self.spec, self.unwritten = spec, ""
        self.given: list[tuple[Attempted, list[Any]]] = []

    def __call__(self, run: Run, /, *args: Any, may_change: bool = False, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return self._attempt(run, args, kwargs, 0, may_change)[0]

    def ranks(self, n: int) -> Callable[..., list[Any]]:
        """Run on n ranks of one process group; returns a list, one result a rank."""

        def attempt_on_ranks(
            run: Run, /, *args: Any, may_change: bool = False, **kwargs: Any
        ) -> list[Any]:
            __tracebackhide__ = True
            return self._attempt(run, args, kwargs, n, may_change)

        return attempt_on_ranks

    def _attempt(self, run: Run, args: Any, kwargs: Any, ranks: int, may_change: bool) -> list[Any]:
        __tracebackhide__ = True
        if "<" in run.__qualname__ or "." in run.__qualname__:
            raise TypeError(
                f"attempt takes a function of the spec's module, got {run.__qualname__}"
            )
        # The seed follows from the spec and the attempt's place in it, so that an attempt stays the
        # same whatever the specs before it did.
        seed = crc32(f"{self._seed} {self.spec} {len(self.given)}".encode())
        job = Job(self.spec, run.__name__, wire.encode((args, kwargs)), seed, ranks)
        attempted = Attempted(job, self.place.perform(job))
        self.record.append(attempted)
        results: list[Any] = []
        self.given.append((attempted, results))
        grave = gravest(attempted.done)
        if grave and grave.unwritten:
            self.unwritten = grave.message
        elif left := sorted({what for d in attempted.done for what in d.left}):
            # Before the error, which a spec may be waiting for.
            raise StateLeft(f"the code leaves {', '.join(left)}: what runs after it relies on that")
        if grave:
            raise self.place.error or rebuilt(grave)
        if reached := next((d.reached for d in attempted.done if d.reached), ""):
            raise Reached(reached)
        changed = sorted({name for d in attempted.done for name in d.changed})
        if changed and not may_change:
            raise ArgumentChanged(
                f"{run.__name__} must leave its argument {', '.join(changed)} as it was"
            )
        results += [wire.decode(d.result) for d in attempted.done]
        return list(results)
