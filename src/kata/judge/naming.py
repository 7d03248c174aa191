"""Names a mistake: a known one that gives what the learner's code gave."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

from kata.attempt import wire
from kata.attempt.outcome import Attempted, Done, gravest
from kata.course.variants import Variant
from kata.testing import compare

VARYING = re.compile(r"\S*/\S*|\d+")  # of an error's message: paths and numbers
Replay = Callable[["Variant | None", Attempted], list[Done]]


def recognise(
    variants: Iterable[Variant],
    record: list[Attempted],
    failed: list[str],
    replay: Replay,
    seconds: float = 10.0,
) -> list[Variant]:
    """The known mistakes that give what the learner's code gave.

    A mistake is it if it gives the same results in every attempt of the run, where the reference
    does not; failing that, in every attempt of a failed spec: of several such the ones that agree
    with most attempts of the run. `replay(None, …)` is the reference.
    Gives up, with nothing, after `seconds`.
    """
    end = time.monotonic() + seconds
    done: dict[tuple[Variant | None, int], bool] = {}

    def agrees(variant: Variant | None, which: list[int]) -> bool:
        for i in which:
            if (variant, i) not in done:
                if time.monotonic() > end:
                    raise TimeoutError
                done[variant, i] = same(
                    replay(variant, record[i]), record[i].done, record[i].spec in failed
                )
            if not done[variant, i]:
                return False
        return True

    last = {past.spec: i for i, past in enumerate(record)}  # of a failed spec: what it fell over

    def cost(i: int) -> tuple[bool, bool, float]:
        spec = record[i].spec
        return spec not in failed, i != last[spec], max(d.seconds for d in record[i].done)

    every = sorted(range(len(record)), key=cost)
    variants = list(variants)
    try:
        differs = every and not agrees(None, every)
        if differs and (found := [v for v in variants if agrees(v, every)]):
            return found
        specs = [[i for i in every if record[i].spec == name] for name in failed]
        specs = [spec for spec in specs if spec and not agrees(None, spec)]
        likely = [v for v in variants if any(agrees(v, spec) for spec in specs)]
        agreeing = {v: sum(agrees(v, [i]) for i in every) for v in likely}
        return [v for v in likely if agreeing[v] == max(agreeing.values())]
    except TimeoutError:
        return []


def same(a: list[Done], b: list[Done], in_failed: bool = True) -> bool:
    """Whether two outcomes are alike: the same kind of error, or results equal up to rounding.

    In a failed spec the errors must say the same too, numbers and paths aside. In one that passed
    the error was asked for, and everybody has words of their own.
    """
    if len(a) != len(b):
        return False
    if (p := gravest(a)) and (q := gravest(b)):  # the other ranks may have been anywhere by then
        said = [VARYING.sub("", problem.message) for problem in (p, q)]
        return p.types[0] == q.types[0] and (not in_failed or said[0] == said[1])
    for x, y in zip(a, b, strict=True):
        if x.problem or y.problem or x.changed != y.changed:
            return False
        if compare(wire.decode(x.result), wire.decode(y.result), slack=10.0):
            return False
    return True
