"""What known versions do in an attempt: looked up in the atlas, or done now."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec

from kata.attempt.outcome import Attempted, Done, Job, Problem
from kata.attempt.places import Place
from kata.course import variants
from kata.course.catalog import Exercise
from kata.course.variants import Variant
from kata.judge.atlas import Atlas, digest_of, surroundings
from kata.judge.limits import OutOfTime, alarm

TIMES, MORE = 5.0, 2.0  # a replay may take so many times what the attempt took, and these seconds
MEETING = 60.0  # more for ranks: they may have to be forked first; they end by a limit of their own


class Replays:
    """Call it with a known mistake, or None for the reference, and an attempt.

    `keeps`: what is done here is kept for other runs. `make_place` gives where a version runs.
    """

    def __init__(
        self, exercise: Exercise, parts: Path, make_place: Callable[[Path], Place], keeps: bool
    ) -> None:
        self.exercise, self.make_place, self.keeps = exercise, make_place, keeps
        self.atlas = Atlas.of(exercise.root)
        self._files = [exercise.spec, *(parts / f"{stem}.py" for stem in exercise.parts)]
        self._stamp = _stamp(exercise)
        self._places: dict[Path, Place] = {}
        self._uncertain: dict[bytes, bytes] = {}

    def __call__(self, variant: Variant | None, past: Attempted) -> list[Done]:
        path, source = _version(self.exercise, variant, self._stamp)
        if (done := self.known(source, past.job)) is None:
            done, certain = self._perform(path, past)
            self.keep(source, past.job, done, lasting=self.keeps and certain)
        return done

    def known(self, source: bytes, job: Job) -> list[Done] | None:
        """What the version with this source is known to do."""
        key = self._key(source, job)
        data = self._uncertain.get(key) or self.atlas.get(key)
        return msgspec.msgpack.decode(data, type=list[Done]) if data else None

    def keep(self, source: bytes, job: Job, done: list[Done], lasting: bool = True) -> None:
        """Not lasting: for this verdict alone."""
        put = self.atlas.put if lasting else self._uncertain.__setitem__
        put(self._key(source, job), msgspec.msgpack.encode(done))

    def _perform(self, path: Path, past: Attempted) -> tuple[list[Done], bool]:
        """What comes of it, and whether it always would.

        A mistake may go on for ever. Where the machine had other things to do that is not certain.
        """
        if path not in self._places:
            self._places[path] = self.make_place(path)
        limit = TIMES * max(done.seconds for done in past.done) + MORE
        limit += MEETING if past.job.ranks else 0
        start = time.process_time()
        try:
            with alarm(limit):
                return self._places[path].perform(past.job), True
        except OutOfTime as error:
            busy = time.process_time() - start
            return [Done(problem=Problem(["OutOfTime"], str(error)))], busy > limit / 2

    def _key(self, source: bytes, job: Job) -> bytes:
        asked = _digest_of_job(job.run, job.call, job.seed, job.ranks)
        return digest_of(self.surroundings, _digest_of_source(source), asked)

    @cached_property
    def surroundings(self) -> bytes:
        return surroundings(self._files)


# The same versions are asked for the same attempts many times.
_digest_of_job = lru_cache(maxsize=4096)(digest_of)
_digest_of_source = lru_cache(maxsize=256)(digest_of)


def get_ready(exercise: Exercise) -> None:
    """What a name needs and no learner's code decides, while nobody waits."""
    with suppress(OSError, variants.BadMistakes):  # whoever looks for a name will be told
        for variant in variants.load(exercise).mistake:
            _version(exercise, variant, _stamp(exercise))
        surroundings([exercise.spec])


def _stamp(exercise: Exercise) -> int:
    return exercise.solution.stat().st_mtime_ns


@lru_cache(maxsize=1024)
def _version(exercise: Exercise, variant: Variant | None, stamp: int) -> tuple[Path, bytes]:
    """The file of a version, and its source, as long as the solution stays what it is."""
    path = variants.write(exercise, variant) if variant else exercise.solution
    return path, path.read_bytes()
