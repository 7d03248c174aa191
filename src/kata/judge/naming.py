"""Names a mistake: the known one that explains why a spec failed.

A false name costs a learner an evening, no name costs nothing. So a known mistake explains a failed
spec only if

- in every attempt of that spec it does what the learner's code does, and in one of them the
  reference does something else;
- nothing speaks against it: wherever else it does something else than the reference, in whatever
  spec that ran, the learner's code does that too;
- the agreement tells something: results agree in numbers of many digits that the reference does not
  have. Tokens, truth values, shapes and errors are what many faults share. They tell something
  only if the mistake explains every spec that failed;
- no other known mistake explains it as well.

The rule holds for each spec by itself, so two faults may have two names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kata.attempt.outcome import Attempted, Done
from kata.course.variants import Variant
from kata.judge.likeness import ENOUGH, same, telling

SLOW = 0.5  # seconds: such an attempt is replayed when all others speak for a mistake
Replay = Callable[["Variant | None", Attempted], list[Done]]


def explain(
    known: Sequence[Variant], record: list[Attempted], failed: list[str], replay: Replay
) -> dict[str, Variant]:
    """The known mistake that explains a failed spec, by spec.

    `record` has the attempts of the specs that passed or failed, in their order. `replay` gives
    what comes of an attempt on a mistake, or on the reference (None).
    """
    run = _Run(record, failed, replay)
    explained = {variant: run.explained_by(variant) for variant in known} if run.failed else {}
    best = {spec: run.best(explained, spec) for spec in run.failed}
    return {spec: variant for spec, variant in best.items() if variant}


class _Run:
    """What the learner's code did, beside what others do in the same attempts."""

    def __init__(self, record: list[Attempted], failed: list[str], replay: Replay) -> None:
        self.record, self.replay, self._failed = record, replay, set(failed)
        self._outcomes: dict[tuple[Variant | None, int], list[Done]] = {}
        every = range(len(record))
        strange = [i for i in every if self._in_failed(i) and not self._agrees(None, i)]
        self.failed = list(dict.fromkeys(record[i].spec for i in strange))
        self._tell = {
            record[i].spec
            for i in strange
            if telling(record[i].done, self._outcome(None, i)) >= ENOUGH
        }
        last = {past.spec: i for i, past in enumerate(record)}  # what a spec fell over
        self._order = sorted(
            every,
            key=lambda i: (
                _seconds(record[i]) > SLOW,
                i != last[record[i].spec] or not self._in_failed(i),
                _seconds(record[i]),
            ),
        )

    def explained_by(self, variant: Variant) -> set[str]:
        """The failed specs that a mistake explains; none where something speaks against it."""
        explained = set(self.failed)
        for i in self._order:
            if not self._agrees(variant, i):
                if self._shows(variant, i):
                    return set()
                explained.discard(self.record[i].spec)
            if not explained:
                return set()
        certain = explained & self._tell or len(explained) == len(self.failed)
        return explained if certain else set()

    def best(self, explained: dict[Variant, set[str]], spec: str) -> Variant | None:
        """The mistake that explains a spec and most others; None where two do."""
        found = [v for v, specs in explained.items() if spec in specs]
        for weight in (lambda v: len(explained[v]), self._n_agreeing):
            if len(found) > 1:
                most = max(map(weight, found))
                found = [v for v in found if weight(v) == most]
        return found[0] if len(found) == 1 else None

    def _n_agreeing(self, variant: Variant) -> int:
        return sum(self._agrees(variant, i) for i in range(len(self.record)))

    def _shows(self, variant: Variant, i: int) -> bool:
        """Whether the mistake changes anything in this attempt."""
        return not self._alike(self._outcome(variant, i), self._outcome(None, i), i)

    def _agrees(self, variant: Variant | None, i: int) -> bool:
        return self._alike(self._outcome(variant, i), self.record[i].done, i)

    def _alike(self, a: list[Done], b: list[Done], i: int) -> bool:
        return same(a, b, self._in_failed(i))

    def _in_failed(self, i: int) -> bool:
        return self.record[i].spec in self._failed

    def _outcome(self, variant: Variant | None, i: int) -> list[Done]:
        if (variant, i) not in self._outcomes:
            self._outcomes[variant, i] = self.replay(variant, self.record[i])
        return self._outcomes[variant, i]


def _seconds(past: Attempted) -> float:
    return max(done.seconds for done in past.done)
