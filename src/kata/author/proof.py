"""The proof: specs are tested by known mistakes and by other right versions.

For every exercise: the reference passes; the stub fails, unwritten; every mistake is rejected and
named, it and no other; every accepted version passes.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from kata.attempt.warm import outside
from kata.course import variants
from kata.course.catalog import Exercise
from kata.judge.child import Request, judge_all
from kata.judge.report import Report
from kata.judge.server import warm

Check = Callable[[Report], list[str]]


@dataclass
class Claim:
    """One thing to show. `check` gives what contradicts it in the report of the job."""

    exercise: Exercise
    says: str
    job: Request
    check: Check
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def claims(exercise: Exercise, seed: int, most: int = 99) -> Iterator[Claim]:
    """The reference, the stub, every mistake and every accepted version; at most so many of each.

    Specs that read real weights or train run on the reference alone: the others must do without.
    """
    known = variants.load(exercise)
    seeded = ["--seed", str(seed)]
    light = [*seeded, "-m", "not weights and not train"]

    def claim(says: str, path: object, options: list[str], check: Check) -> Claim:
        job = Request(str(exercise.root), exercise.stem, str(path), options)
        return Claim(exercise, says, job, check)

    yield claim("the reference passes", exercise.solution, seeded, _passes)
    yield claim("the stub is not written yet", exercise.stub, light, _is_unwritten)
    for wrong in known.mistake[:most]:
        path = variants.write(exercise, wrong)
        yield claim(f"rejects: {wrong.says}", path, light, _names(wrong.says))
    for right in known.accept[:most]:
        yield claim(f"accepts: {right.says}", variants.write(exercise, right), light, _passes)


def prove(exercises: list[Exercise], seed: int = 0, most: int = 99) -> Iterator[list[Claim]]:
    """Judge every claim, several at once; yields an exercise's claims when all are judged.

    The verdicts are kept in .cache/kata: a test compares them with those of other places.
    """
    every = [claim for exercise in exercises for claim in claims(exercise, seed, most)]
    warm(sorted({name for exercise in exercises for name in outside(exercise)}))
    torch.set_num_threads(1)  # there are as many children as cores, and more threads only wait
    left = {e.stem: sum(c.exercise.stem == e.stem for c in every) for e in exercises}
    for which, report, seconds in judge_all([c.job for c in every], os.cpu_count() or 1):
        claim = every[which]
        keep(claim.job, report)
        claim.faults = [report.error.message] if report.error else claim.check(report)
        claim.seconds = seconds
        left[claim.exercise.stem] -= 1
        if left[claim.exercise.stem] == 0:
            yield [c for c in every if c.exercise.stem == claim.exercise.stem]


def keep(job: Request, report: Report) -> None:
    """Write a verdict down, by all that it depends on."""
    path = _kept(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(report))


def kept(job: Request) -> Report | None:
    """The verdict of an earlier proof on the same files."""
    path = _kept(job)
    return msgspec.json.decode(path.read_bytes(), type=Report) if path.exists() else None


def _kept(job: Request) -> Path:
    exercise = job.exercise
    parts = [Exercise(exercise.root, stem).solution for stem in exercise.parts]
    runner = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(repr(job).encode())
    for path in (Path(job.submission), exercise.spec, exercise.mistakes, *parts, *runner):
        digest.update(path.read_bytes())
    return exercise.root / ".cache" / "kata" / "verdicts" / f"{digest.hexdigest()[:24]}.json"


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


def main(exercises: list[Exercise], seed: int = 0, most: int = 99) -> int:
    """Print the proof, and a count last; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the children are ended too
    start, every = time.perf_counter(), []
    for proved in prove(exercises, seed, most):
        every += proved
        first = proved[0].exercise
        print(f"{first.number:02d} {first.title}")
        for claim in proved:
            print(f"   {'✗' if claim.faults else '✓'} {claim.says}  {claim.seconds:.1f} s")
            for fault in claim.faults:
                print(f"       {fault}")
        print(end="", flush=True)
    good = sum(not claim.faults for claim in every)
    print(f"{len(exercises)} exercises in {time.perf_counter() - start:.0f} s")
    print(f"{good} passed, {len(every) - good} failed")
    return int(good < len(every))
