"""An attempt: a function of the spec, run on some module, gives plain data.

The arguments travel as bytes even inside one process. So every place behaves alike, the code under
test cannot touch the spec's own data, and an argument that it changed shows as bytes that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kata.attempt import wire
from kata.attempt.outcome import ArgumentChanged, Attempted, Done, Reached, gravest
from kata.attempt.performing import Run

Performer = Callable[[Run, bytes, int, int], tuple[list[Done], BaseException | None]]


class Attempt:
    """What specs call: `attempt(run, *args)` runs `run(ex, *args)` and returns plain data.

    `perform(run, call, seed, ranks)` is the place. Every attempt goes into `record`.
    """

    def __init__(self, perform: Performer, record: list[Attempted], seed: int) -> None:
        self._perform, self.record, self._seed = perform, record, seed
        self.begin("")

    def begin(self, spec: str) -> None:
        """What follows belongs to this spec."""
        self.spec, self.unwritten = spec, ""

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
        call = wire.encode((args, kwargs))
        seed = self._seed + len(self.record)
        done, error = self._perform(run, call, seed, ranks)
        self.record.append(Attempted(self.spec, run.__name__, call, seed, ranks, done))
        if error is not None:
            grave = gravest(done)
            if grave and grave.unwritten:
                self.unwritten = grave.message
            raise error
        if reached := next((d.reached for d in done if d.reached), ""):
            raise Reached(reached)
        changed = sorted({name for d in done for name in d.changed})
        if changed and not may_change:
            raise ArgumentChanged(
                f"{run.__name__} must leave its argument {', '.join(changed)} as it was"
            )
        return [wire.decode(d.result) for d in done]
