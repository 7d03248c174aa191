"""What races/ import, and how a race is run: the code under test beside others, lap by lap.

A file of races/ is a plain module with one function, like a figure's `draw`:

    def race(ex: Any) -> Iterator[Race]:
        yield Race("softmax of 1,000 rows", lambda: ex.softmax(x), {"torch": lambda: x.softmax(-1)})

`ex` is the module under test: the reference for `kata bench`, a learner's file beside it. The file
may import the specs' helpers by name (`from test_ex24_bpe_train import defined`).

A race has a process of its own, so that nobody else's imports and threads are in it. The entrants
run in turn, so that a busy moment of the machine hits them all, and each one's median counts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kata.attempt import modules
from kata.attempt.warm import prepare_environment
from kata.course.catalog import Exercise
from kata.testing import compare

Run = Callable[[], Any]
Measure = Callable[[Run], float]
BUDGET = 120.0  # seconds: after so long a race ends with the laps that it has, three or more
SCALE = {"s": 1.0, "ms": 1000.0, "MB": 1.0}


def seconds(run: Run) -> float:
    """How long it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def megabytes(run: Run) -> float:
    """The most that Python's objects hold at once meanwhile (tensors are not among them)."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@dataclass(frozen=True)
class Race:
    """One thing to do, by `ex` and by others beside it.

    All must give the same, as the specs compare it, or None, which is compared with nothing: the
    speed of wrong code is none.
    """

    what: str
    run: Run  # on `ex`
    beside: Mapping[str, Run]  # a library, another way, the machine's limit
    amount: float = 1.0  # what one run does, in what the unit counts
    unit: str = "s"  # s or ms for one, tokens/s or the like, MB
    measure: Measure = seconds


class Result(msgspec.Struct):
    """The medians of a race: the learner's, if there is one, the reference's, then the others'."""

    what: str
    unit: str
    values: dict[str, float]

    def shown(self, name: str) -> str:
        return f"{self.values[name]:.3g} {self.unit}"

    def ratio(self, name: str, other: str) -> float:
        """How many times better one is than another."""
        ratio = self.values[other] / self.values[name]
        return 1 / ratio if self.unit.endswith("/s") else ratio


class NotMeasured(RuntimeError):
    """A race that could not be run; the message says why."""


def medians(runs: Mapping[str, Run], times: int, measure: Measure = seconds) -> dict[str, float]:
    """Run all in turn, so many laps after one that doesn't count but must give the same."""
    (first, given), *others = [(name, run()) for name, run in runs.items()]
    for name, other in others:
        if given is not None and other is not None and (wrong := compare(given, other)):
            raise NotMeasured(f"{first} and {name} give different things: {wrong.sentence}")
    laps: list[list[float]] = []
    start = time.perf_counter()
    while len(laps) < times and (len(laps) < 3 or time.perf_counter() - start < BUDGET):
        laps.append([measure(run) for run in runs.values()])
    columns = zip(*laps, strict=True)
    return {name: statistics.median(column) for name, column in zip(runs, columns, strict=True)}


def results(exercise: Exercise, times: int, yours: Path | None = None) -> list[Result]:
    """Run an exercise's races in a process of their own."""
    arguments = [str(exercise.root), exercise.stem, str(times), str(yours or "")]
    done = subprocess.run(
        [sys.executable, "-m", "kata.racing", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise NotMeasured(said[-1] if said else f"the race ended with status {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[Result])


def here(exercise: Exercise, times: int, yours: Path | None) -> Iterator[Result]:
    """Run an exercise's races in this process."""
    prepare_environment()
    modules.use_parts(exercise.solution.parent)
    sys.path.insert(0, str(exercise.spec.parent))
    race = modules.load(exercise.race).race
    files = ({"yours": yours} if yours else {}) | {"reference": exercise.solution}
    for races in zip(*(race(modules.load(path)) for path in files.values()), strict=True):
        last = races[-1]  # the reference's, which says what runs beside
        runs = {name: each.run for name, each in zip(files, races, strict=True)} | last.beside
        values = medians(runs, times, last.measure)
        for name, value in values.items():
            if last.unit.endswith("/s"):
                values[name] = last.amount / value
            else:
                values[name] = SCALE[last.unit] * value / last.amount
        yield Result(last.what, last.unit, values)


def main(root: str, stem: str, times: str, yours: str = "") -> None:
    """Print the results as the last line, or end with the reason why there are none."""
    try:
        raced = list(here(Exercise(Path(root), stem), int(times), Path(yours) if yours else None))
    except (NotMeasured, pytest.skip.Exception) as reason:  # real weights that are not installed
        sys.exit(str(reason))
    print(f"\n{msgspec.json.encode(raced).decode()}", flush=True)


if __name__ == "__main__":
    from kata import racing  # the module that races import, not this second copy of it

    racing.main(*sys.argv[1:])
