"""A spec's verdict follows from what its attempts gave, so it need not be judged twice.

The proof judges some forty versions of an exercise, and each does in most specs, byte for byte,
what another did before. The atlas keeps the way through a spec as steps: after these outcomes comes
this attempt, or this verdict. A version whose outcomes lead along such a way to its end has the
verdict that stands there; only its attempts are made. Where the way is lost the spec is judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from kata.attempt.outcome import Attempted, Done, Job
from kata.attempt.places import Place
from kata.course import catalog
from kata.judge.atlas import digest_of
from kata.judge.replays import Replays
from kata.judge.report import SpecReport

if TYPE_CHECKING:
    from kata.judge.bench import Bench
    from kata.judge.session import Judge

LONGEST = 500  # attempts of a way that is kept: Hypothesis makes hundreds once one fails


class Step(msgspec.Struct):
    """What comes next in a spec: an attempt, or its verdict."""

    job: Job | None = None
    verdict: SpecReport | None = None


class Recalled:
    """A place that looks up what the version under judgement is known to do."""

    def __init__(self, place: Place, replays: Replays, source: bytes) -> None:
        self.place, self.replays, self.source = place, replays, source
        self.error: BaseException | None = None
        self.prepare, self.load = place.prepare, place.load
        self.computed, self.close = place.computed, place.close

    def perform(self, job: Job) -> list[Done]:
        self.error = None
        done = self.replays.known(self.source, job)
        # An error is met again: Hypothesis tells errors apart by the lines that they come from.
        if done is None or any(d.problem for d in done):
            done = self.place.perform(job)
            self.error = self.place.error
            self.replays.keep(self.source, job, done)
        return done


class Recall:
    """The plugin's hook: before a spec is run, look whether its verdict is known."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if catalog.of_spec(item.path) is None:
            return None
        bench = self.judge.bench(item.module)  # type: ignore[attr-defined]
        bench.look()
        if bench.report.error or not (verdict := _walk(bench, item.name)):
            return None
        bench.report.specs.append(verdict)
        bench.report.seconds += verdict.seconds
        if self.judge.tell:
            self.judge.tell(verdict)
        return True


def _walk(bench: Bench, spec: str) -> SpecReport | None:
    """Follow what is known of a spec, with the outcomes of the version under judgement."""
    made: list[Attempted] = []
    key, atlas = _start(bench, spec), bench.replays.atlas
    while data := atlas.get(key):
        step = msgspec.msgpack.decode(data, type=Step)
        if step.verdict:
            bench.record += made
            return step.verdict
        assert step.job
        made.append(Attempted(step.job, bench.place.perform(step.job)))
        key = _next(key, made[-1])
    return None


def keep_ways(bench: Bench) -> None:
    """Keep how this run went through each spec that passed or failed."""
    ways: dict[str, list[Attempted]] = {}
    for past in bench.record:
        ways.setdefault(past.spec, []).append(past)
    for verdict in bench.report.specs:
        way = ways.get(verdict.name, [])
        in_time = not (verdict.detail and verdict.detail.kind in ("time", "died"))
        in_time &= not (verdict.limit and verdict.seconds > verdict.limit / 3)  # a busy machine
        if verdict.status not in ("passed", "failed") or len(way) > LONGEST or not in_time:
            continue
        key, atlas = _start(bench, verdict.name), bench.replays.atlas
        for past in way:
            atlas.put(key, msgspec.msgpack.encode(Step(job=past.job)))
            key = _next(key, past)
        bare = msgspec.structs.replace(verdict, mistakes=[])
        atlas.put(key, msgspec.msgpack.encode(Step(verdict=bare)))


def _start(bench: Bench, spec: str) -> bytes:
    """Specs may ask the reference too, and are judged by this package."""
    return digest_of(
        bench.replays.surroundings,
        bench.exercise.solution.read_bytes(),
        bench.judge.option.seed,
        spec,
    )


def _next(key: bytes, past: Attempted) -> bytes:
    """After what came of an attempt. Of an error no spec sees the lines."""
    came = [
        (d.result, d.changed, d.reached, d.left, (p.types, p.message) if (p := d.problem) else None)
        for d in past.done
    ]
    return digest_of(key, msgspec.msgpack.encode(came))
