"""`nox -s bench`: what is promised of speed, measured; medians, and ratios in one run.

The runner's own rows stand here and in saves.py, those of single exercises in races/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kata import racing
from kata.author import rows, saves
from kata.author.rows import Row
from kata.course import catalog

Measure = Callable[[Path, int], list[Row]]


def front_door(root: Path, times: int) -> list[Row]:
    """`nox -s exercise-31` beside plain pytest with its defaults on the same file."""
    exercise = catalog.find(root, 31)
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_DISABLE_PLUGIN_AUTOLOAD"}
    env["VIRTUAL_ENV"] = sys.prefix  # used as it is, and not installed into from a copy

    def quietly(*command: str) -> Callable[[], None]:
        def run() -> None:
            done = subprocess.run(command, cwd=root, env=env, capture_output=True)
            done.check_returncode()

        return run

    runs = {
        "nox": quietly(str(Path(sys.executable).with_name("nox")), "-s", "exercise-31"),
        "plain pytest": quietly(sys.executable, "-m", "pytest", str(exercise.spec)),
    }
    with saves.stub_kept(exercise):
        shutil.copy(exercise.solution, exercise.stub)
        values = racing.medians(runs, times)
    return rows.of(racing.Result("`nox -s exercise-31`, the solution", "s", values))


def races(root: Path, times: int) -> list[Row]:
    """All files of races/."""
    raced = [exercise for exercise in catalog.exercises(root) if exercise.race.exists()]
    return [row for exercise in raced for row in race(root, times, exercise.number)]


def race(root: Path, times: int, number: int) -> list[Row]:
    """One of them, on the reference."""
    try:
        results = racing.results(catalog.find(root, number), times)
    except racing.NotMeasured as error:
        return [Row(f"the race of {number:02d}", "not measured", str(error))]
    return [row for result in results for row in rows.of(result, number)]


def proof(root: Path, times: int) -> list[Row]:
    """The whole proof, once and with nothing kept: seconds, for an exercise and for a claim."""
    del times
    shutil.rmtree(root / ".cache", ignore_errors=True)
    command = [sys.executable, "-m", "kata", "proof"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    claims = max(1, sum(line.startswith("   ✓") for line in done.stdout.splitlines()))
    n = len(catalog.exercises(root))
    what = f"the proof, {n} exercises, {claims} claims"
    if done.returncode:
        what += ", NOT ALL TRUE"
        print(done.stdout, done.stderr, file=sys.stderr)
    each = f"{seconds / n:.1f} s, {seconds / claims:.2f} s"
    return [Row(what, f"{seconds:.0f} s", "an exercise, a claim", each)]


MEASURES: dict[str, Measure] = {
    "front-door": front_door,
    "attention": saves.attention,
    "saves": saves.every_exercise,
    "races": races,
    "proof": proof,
}


def measure(root: Path, times: int, wanted: list[str]) -> Iterator[Row]:
    """The rows of these measures or races, in a copy, so that nobody's record grows."""
    for word in wanted:
        if word not in MEASURES and not catalog.find(root, word).race.exists():
            known = ", ".join(MEASURES)
            raise ValueError(f"{word} has no file in races/; there are also {known}")
    with _copy(root) as copy:
        for word in wanted:
            if word in MEASURES:
                yield from MEASURES[word](copy, times)
            else:
                yield from race(copy, times, catalog.find(copy, word).number)


@contextmanager
def _copy(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        leave = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", ".kata")
        yield Path(shutil.copytree(root, Path(folder, "project"), ignore=leave))


def main(root: Path, times: int, wanted: list[str]) -> None:
    """Print what is wanted; without a wish measure all, and write it down as well."""
    measured = []
    for row in measure(root, times, wanted or list(MEASURES)):
        print(row, flush=True)
        measured.append(row)
    if not wanted:
        rows.write(root, measured)
