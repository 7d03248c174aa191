"""Names a mistake: the known one that explains why a spec failed.

A false name costs a learner an evening, no name costs nothing. So a known mistake explains a failed
spec only if

- in every attempt of that spec it does what the learner's code does, and in one of them the
  reference does something else;
- nothing speaks against it: in no spec that ran is the learner's code right where the mistake is
  wrong, and hardly anywhere does it do a third thing there;
- the agreement tells something: results agree in numbers of many digits that the reference does not
  have. Tokens, truth values, shapes and errors are what many faults share. They tell something
  only if the mistake explains every spec that failed;
- no other known mistake explains it as well.

The rule holds for each spec by itself, so two faults may have two names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kata.attempt.outcome import Attempted, Done
from kata.course.variants import Variant
from kata.judge.likeness import Stance, refuses_otherwise, same, stance, telling

ENOUGH = 3.0  # different numbers of many digits that tell one fault from others,
MUCH = 20.0  # and where a third thing comes out in more than
FEW = 4  # one failed spec for so many that are explained
RETRIED = 20  # of the attempts after a failure
SLOW = 0.5  # seconds: such an attempt is replayed when all others speak for a mistake
Replay = Callable[["Variant | None", Attempted], list[Done]]


@dataclass
class Case:
    """The failed specs that a mistake explains, and those in which it does so in part."""

    variant: Variant
    explained: set[str] = field(default_factory=set)
    backed: set[str] = field(default_factory=set)


def explain(
    known: Sequence[Variant],
    record: list[Attempted],
    failed: list[str],
    replay: Replay,
    retried: Sequence[Attempted] = (),
) -> dict[str, Variant]:
    """The known mistake that explains a failed spec, by spec.

    `record` has the attempts of the specs that passed or failed, in their order, and `retried`
    those that Hypothesis made on its way from a failure to a smaller one. `replay` gives what comes
    of an attempt on a mistake, or on the reference (None).
    """
    run = _Run(record, failed, replay)
    cases = [run.case(variant) for variant in known] if run.told else []
    found = {}
    for spec in run.told:
        best = run.best(cases, spec)
        if best and run.confirmed(best, [past for past in retried if past.spec == spec]):
            found[spec] = best
    return found


class _Run:
    """What the learner's code did, beside what others do in the same attempts."""

    def __init__(self, record: list[Attempted], failed: list[str], replay: Replay) -> None:
        self.record, self.replay = record, replay
        self._outcomes: dict[tuple[Variant | None, int], list[Done]] = {}
        self._is_failed = [past.spec in failed for past in record]
        self._attempts: dict[str, list[int]] = {}
        for i, past in enumerate(record):
            self._attempts.setdefault(past.spec, []).append(i)
        self.told: dict[str, float] = {}  # by failed spec, where attempts show why
        for i, past in enumerate(record):
            if self._is_failed[i] and not self._agrees(None, i):
                told = telling(past.done, self._outcome(None, i))
                self.told[past.spec] = max(told, self.told.get(past.spec, 0.0))
        self._order = sorted(range(len(record)), key=lambda i: _seconds(record[i]))

    def case(self, variant: Variant) -> Case:
        """What speaks for a mistake; an empty case where anything speaks against it."""
        explained = {spec for spec in self.told if self._explains(variant, spec)}
        if not explained:
            return Case(variant)
        backed: set[str] = set()
        doubtful: set[str] = set()
        for i in self._order:
            if self._agrees(variant, i):
                continue
            spec = self.record[i].spec
            explained.discard(spec)
            says = stance(self._outcome(variant, i), self.record[i].done, self._outcome(None, i))
            if says is Stance.AGAINST:
                return Case(variant)
            if self._is_failed[i] and says is not Stance.NOTHING:
                (doubtful if says is Stance.DOUBT else backed).add(spec)
            if not explained or len(doubtful) >= len(explained):
                return Case(variant)
        told = sum(self.told[spec] for spec in explained)
        few = FEW * len(doubtful) <= len(explained)
        case = Case(variant, explained, backed - doubtful)
        certain = (few and told >= ENOUGH) or told >= MUCH or self._is_everywhere(case)
        return case if certain else Case(variant)

    def _explains(self, variant: Variant, spec: str) -> bool:
        """As far as quick attempts tell. First comes the one over which the spec fell."""
        quick = (i for i in reversed(self._attempts[spec]) if _seconds(self.record[i]) <= SLOW)
        return all(self._agrees(variant, i) for i in quick)

    def _is_everywhere(self, case: Case) -> bool:
        """Whether a mistake accounts for all that failed, and for enough of it in full."""
        whole, part = len(case.explained), len(case.backed)
        return whole + part == len(self.told) and 2 * whole >= part

    def best(self, cases: list[Case], spec: str) -> Variant | None:
        """The mistake that explains a spec and most others; None where two do."""
        found = [case for case in cases if spec in case.explained]
        weights: list[Callable[[Case], int]] = [
            lambda case: len(case.explained),
            lambda case: len(case.backed),
            lambda case: sum(self._agrees(case.variant, i) for i in self._order),
        ]
        for weight in weights:
            if len(found) > 1:
                most = max(map(weight, found))
                found = [case for case in found if weight(case) == most]
        return found[0].variant if len(found) == 1 else None

    def confirmed(self, variant: Variant, retried: list[Attempted]) -> bool:
        """Whether a mistake does what the code does in what was tried after a failure, too.

        Those calls are in no atlas, so only a mistake that is about to be named is replayed.
        """
        return all(same(self.replay(variant, past), past.done) for past in retried[-RETRIED:])

    def _agrees(self, variant: Variant | None, i: int) -> bool:
        theirs, mine = self._outcome(variant, i), self.record[i].done
        if same(theirs, mine, self._is_failed[i]):
            return True
        return variant is not None and refuses_otherwise(theirs, mine, self._outcome(None, i))

    def _outcome(self, variant: Variant | None, i: int) -> list[Done]:
        if (variant, i) not in self._outcomes:
            self._outcomes[variant, i] = self.replay(variant, self.record[i])
        return self._outcomes[variant, i]


def _seconds(past: Attempted) -> float:
    return max(done.seconds for done in past.done)
