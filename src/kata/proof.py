"""The proof: specs are tested by known mistakes and by other right versions.

For every exercise: the reference passes; the stub fails, unwritten; every mistake is rejected and
named, it and no other; every accepted version passes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kata import catalog, mistakes
from kata.catalog import Exercise
from kata.report import Report

Judge = Callable[[Exercise, Path, list[str]], Report]


@dataclass
class Claim:
    """One thing that the proof shows, or what contradicts it."""

    exercise: Exercise
    says: str
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def claims(exercise: Exercise, judge: Judge, seed: int) -> Iterator[Claim]:
    """Judge the reference, the stub, every mistake and every accepted version."""
    variants = mistakes.load(exercise)
    seeded = ["--seed", str(seed)]
    light = [*seeded, "-m", "not weights and not train", "--naming-limit", "60"]

    def claim(
        says: str, path: Path, options: list[str], check: Callable[[Report], list[str]]
    ) -> Claim:
        start = time.perf_counter()
        report = judge(exercise, path, options)
        faults = [report.error.message] if report.error else check(report)
        return Claim(exercise, says, faults, time.perf_counter() - start)

    def written_for(
        says: str, variant: mistakes.Variant, check: Callable[[Report], list[str]]
    ) -> Claim:
        return claim(says, mistakes.write(exercise, variant), light, check)

    yield claim("the reference passes", exercise.solution, seeded, _passes)
    yield claim("the stub is not written yet", exercise.stub, light, _is_unwritten)
    for mistake in variants.mistake:
        check = _names(mistake.says)
        yield written_for(f"rejects: {mistake.says}", mistake, check)
    for accept in variants.accept:
        yield written_for(f"accepts: {accept.says}", accept, _passes)


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


def _names(says: str) -> Callable[[Report], list[str]]:
    def check(report: Report) -> list[str]:
        if not report.count("failed"):
            return ["every spec passes"]
        if report.mistakes != [says]:
            others = "; ".join(m for m in report.mistakes if m != says)
            return [f"taken for: {others}" if others else "not named"]
        return []

    return check


def judge_in_fork(exercise: Exercise, path: Path, options: list[str]) -> Report:
    """Judge a file in a child of this process, which must have imported things only."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            report = _judge_here(exercise, path, options)
            with os.fdopen(writer, "wb") as out:
                out.write(msgspec.msgpack.encode(report))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        data = answer.read()
    os.waitpid(pid, 0)
    if not data:
        return Report(exercise.stem, str(path))
    return msgspec.msgpack.decode(data, type=Report)


def _judge_here(exercise: Exercise, path: Path, options: list[str]) -> Report:
    import pytest

    from kata import plugin

    keep: list[plugin.Judge] = []

    class Keep:
        def pytest_sessionstart(self, session: pytest.Session) -> None:
            keep.append(session.config.stash[plugin.JUDGE])

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    pytest.main([*quiet, "--submission", str(path), *options, str(exercise.spec)], plugins=[Keep()])
    return next((r for r in keep[0].reports if r.stem == exercise.stem), Report(exercise.stem, ""))


def main(wanted: list[str], seed: int = 0) -> int:
    """Prove the exercises named (all, if none is); prints a line a claim, and a count last."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    root = catalog.find_root(Path.cwd())
    some = [catalog.find(root, word) for word in wanted] or catalog.exercises(root)
    start, every = time.perf_counter(), []
    for exercise in some:
        print(f"{exercise.number:02d} {exercise.title}", flush=True)
        for claim in claims(exercise, judge_in_fork, seed):
            every.append(claim)
            print(
                f"   {'✗' if claim.faults else '✓'} {claim.says}  {claim.seconds:.1f} s", flush=True
            )
            for fault in claim.faults:
                print(f"       {fault}", flush=True)
    good = sum(not claim.faults for claim in every)
    print(f"{len(some)} exercises in {time.perf_counter() - start:.0f} s")
    print(f"{good} passed, {len(every) - good} failed")
    return int(good < len(every))


if __name__ == "__main__":
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import kata.plugin

    kata.plugin.prepare_environment()
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
