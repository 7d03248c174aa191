"""The proof: specs are tested by known mistakes and by other right versions.

For every exercise: the reference passes, in a third of the time that its specs have; the stub
fails, unwritten; every mistake is rejected and named, it and no other; every accepted version
passes; and a mistake that somebody makes who writes otherwise, on top of an accepted version, is
named as well, 95 times in 100. Of the latter an exercise has up to sixty: the seed draws a few.

Verdicts are kept by all that they depend on, so that a second proof judges what has changed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from kata.attempt.warm import outside
from kata.course import variants
from kata.course.catalog import Exercise
from kata.course.variants import Variant
from kata.judge.atlas import Atlas, digest_of, surroundings
from kata.judge.child import Request, judge_all
from kata.judge.report import Report
from kata.judge.server import warm

Check = Callable[[Report], list[str]]
NAMED_ON_TOP = 0.95
WHOLE = 99  # mistakes of an exercise: more than any has
ON_TOP = 12  # mistakes on top of accepted versions, an exercise
MANY = 100  # such mistakes, from which the share that is named is judged


@dataclass
class Claim:
    """One thing to show. `check` gives what contradicts it in the report of the job.

    `alone`: of a mistake on top of another version, the claim for the mistake itself. Of the claims
    on top a few may miss, see NAMED_ON_TOP.
    """

    exercise: Exercise
    says: str
    job: Request
    check: Check
    alone: Claim | None = None
    faults: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)  # specs
    named: bool | None = None  # on top: whether it is; None where it is not the same mistake
    seconds: float = 0.0


def claims(exercise: Exercise, seed: int, most: int = 99) -> Iterator[Claim]:
    """The reference, the stub, every mistake and every accepted version; at most so many of each.

    Specs that read real weights or train run on the reference alone: the others must do without.
    """
    known = variants.load(exercise)
    seeded = ["--seed", str(seed), "--fill-atlas", "run"]
    light = [*seeded, "-m", "not weights and not train"]

    def claim(says: str, path: object, options: list[str], check: Check) -> Claim:
        job = Request(str(exercise.root), exercise.stem, str(path), options)
        return Claim(exercise, says, job, check)

    yield claim("the reference passes", exercise.solution, seeded, _passes_in_time)
    yield claim("the stub is not written yet", exercise.stub, light, _is_unwritten)
    alone = []
    for wrong in known.mistake[:most]:
        path = variants.write(exercise, wrong)
        alone.append(claim(f"rejects: {wrong.says}", path, light, _names(wrong.says)))
    yield from alone
    for right in known.accept[:most]:
        yield claim(f"accepts: {right.says}", variants.write(exercise, right), light, _passes)
    on_top = [
        (both, wrong.says, itself)
        for wrong, itself in zip(known.mistake, alone, strict=False)
        if (both := _on_top(exercise, known.accept, wrong))
    ]
    draw = random.Random(f"{exercise.stem} {seed}")
    for both, says, itself in draw.sample(on_top, min(ON_TOP, len(on_top))):
        said, path = f"on top of another version: {says}", variants.write(exercise, both)
        yield replace(claim(said, path, light, _names_no_other(says)), alone=itself)


def _on_top(exercise: Exercise, accepted: Iterable[Variant], wrong: Variant) -> Variant | None:
    """The mistake made in the first accepted version that it fits."""
    text = exercise.solution.read_text("utf-8")
    for right in accepted:
        source = variants.swapped(exercise, right)
        for old, new in wrong.swap:
            source = source.replace(old, new) if source.count(old) == 1 else ""
        with suppress(SyntaxError):
            if source and compile(source, exercise.stem, "exec"):
                return Variant(wrong.says, ((text, source),))
    return None


def prove(
    exercises: list[Exercise], seed: int = 0, most: int = 99, fresh: bool = False
) -> Iterator[list[Claim]]:
    """Judge every claim, several at once; yields an exercise's claims when all are judged.

    The verdicts are kept in .cache/kata; a test compares them with those of other places.
    """
    every = [claim for exercise in exercises for claim in claims(exercise, seed, most)]
    known = [None if fresh else kept(claim.job) for claim in every]
    open_ones = [which for which, report in enumerate(known) if report is None]
    left = Counter(claim.exercise for claim in every)

    def judged() -> Iterator[tuple[Claim, Report, float]]:
        for which, report in enumerate(known):
            if report:
                yield every[which], report, 0.0
        if not open_ones:
            return
        warm(sorted({name for which in open_ones for name in outside(every[which].exercise)}))
        torch.set_num_threads(1)  # there are as many children as cores, and more threads only wait
        jobs = [every[which].job for which in open_ones]
        for number, report, seconds in judge_all(jobs, os.cpu_count() or 1, together=True):
            claim = every[open_ones[number]]
            if not claim.check(report):  # what contradicts a claim is looked at again
                keep(claim.job, report)
            yield claim, report, seconds

    for claim, report, seconds in judged():
        claim.faults = [report.error.message] if report.error else claim.check(report)
        claim.failed = {spec.name for spec in report.specs if spec.status == "failed"}
        claim.named = bool(report.mistakes)
        claim.seconds = seconds
        left[claim.exercise] -= 1
        if left[claim.exercise] == 0:
            proved = [c for c in every if c.exercise == claim.exercise]
            for c in proved:
                # Where a version makes right what the mistake alone makes wrong, it is another one.
                if c.alone is None or not c.failed or not c.alone.failed <= c.failed:
                    c.named = None
            yield proved


def keep(job: Request, report: Report) -> None:
    """Write a verdict down, by all that it depends on."""
    path = _kept(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_bytes(msgspec.json.encode(report))
    whole.replace(path)


def kept(job: Request) -> Report | None:
    """The verdict of an earlier proof on the same files."""
    path = _kept(job)
    return msgspec.json.decode(path.read_bytes(), type=Report) if path.exists() else None


def _kept(job: Request) -> Path:
    """Where the verdict of a job is, by the files, the runner and the libraries."""
    exercise, package = job.exercise, Path(__file__).parents[1]
    parts = [Exercise(exercise.root, stem).solution for stem in exercise.parts]
    runner = [package / "plugin.py"]
    for wing in ("course", "attempt", "judge"):
        runner += sorted((package / wing).glob("*.py"))
    around = surroundings([exercise.spec, exercise.solution, exercise.mistakes, *parts, *runner])
    name = digest_of(around, repr(job), Path(job.submission).read_bytes()).hex()
    return exercise.root / ".cache" / "kata" / "verdicts" / f"{name}.json"


def _passes_in_time(report: Report) -> list[str]:
    """Passes, and leaves time: who writes otherwise, or on a slower machine, may take longer."""
    return _passes(report) + [
        f"{s.sentence} took {s.seconds:.1f} s, more than a third of its {s.limit:g} s"
        for s in report.specs
        if s.status == "passed" and s.limit and s.seconds > s.limit / 3
    ]


def _passes(report: Report) -> list[str]:
    faults = [
        f"{s.status}: {s.sentence}: {s.detail.message if s.detail else s.reason}"
        for s in report.specs
        if s.status not in ("passed", "skipped")
    ]
    return faults or ([] if report.count("passed") else ["no spec passed"])


def _is_unwritten(report: Report) -> list[str]:
    judged = [s for s in report.specs if s.status != "skipped"]
    faults = [f"{s.status}, not unwritten: {s.sentence}" for s in judged if s.status != "unwritten"]
    return faults or ([] if judged else ["no spec ran"])


def _names(says: str) -> Check:
    def check(report: Report) -> list[str]:
        if not report.count("failed"):
            return ["every spec passes"]
        if report.mistakes != [says]:
            others = "; ".join(m for m in report.mistakes if m != says)
            return [f"taken for: {others}" if others else "not named"]
        return []

    return check


def _names_no_other(says: str) -> Check:
    def check(report: Report) -> list[str]:
        if report.mistakes and says not in report.mistakes:
            return [f"taken for: {'; '.join(report.mistakes)}"]
        return []

    return check


def _show(claim: Claim) -> None:
    missed = claim.named is False
    print(
        f"   {'✗' if claim.faults else '–' if missed else '✓'} {claim.says}  {claim.seconds:.1f} s"
    )
    for fault in [*claim.faults, *(["not named"] * missed)]:
        print(f"       {fault}")


def main(exercises: list[Exercise], seed: int = 0, most: int = 99, fresh: bool = False) -> int:
    """Print the proof, and a count last; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the children are ended too
    start, every = time.perf_counter(), []
    if fresh:
        Atlas.of(exercises[0].root).remove()
    for proved in prove(exercises, seed, most, fresh):
        every += proved
        first = proved[0].exercise
        print(f"{first.number:02d} {first.title}")
        for claim in proved:
            _show(claim)
        print(end="", flush=True)
    good = sum(not claim.faults for claim in every)
    named = [claim.named for claim in every if claim.named is not None]
    # Of a sample (`--most`) the share says little: the whole proof holds it.
    few = most >= WHOLE and len(named) >= MANY and sum(named) < NAMED_ON_TOP * len(named)
    print(f"{len(exercises)} exercises in {time.perf_counter() - start:.0f} s")
    print(f"{sum(named)} of {len(named)} mistakes named on top of accepted versions")
    if few:
        print(f"   ✗ that is less than {NAMED_ON_TOP:.0%}")
    print(f"{good} passed, {len(every) - good} failed")
    return int(few or good < len(every))
