"""From a save to the verdict, as `kata watch` does it: in all, and beyond the specs' own time."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from watchfiles import watch

from kata.author.rows import Row
from kata.course import catalog, variants
from kata.course.catalog import Exercise
from kata.judge.report import Report
from kata.judge.server import Request, WarmServer
from kata.racing import NotMeasured

PAUSE = 1.0  # seconds before a save: a learner types meanwhile, and the next child gets ready
PROMISED = 1.0  # seconds in all, for nine exercises of ten


@dataclass
class Save:
    """Seconds from the save to the verdict, those beyond its specs' own, and to the last report."""

    verdict: float
    beyond: float
    named: float


def saves(exercise: Exercise, texts: dict[str, str], times: int, options: list[str]) -> list[Save]:
    """The medians of each text, by the state that it must have; one server for all of them."""
    job = Request(str(exercise.root), exercise.stem, "", options)
    server = WarmServer(job)
    try:
        with stub_kept(exercise):
            return [
                _medians([_save(server, job, text, n, state) for n in range(times + 1)][1:])
                for state, text in texts.items()
            ]
    finally:
        server.close()


@contextmanager
def stub_kept(exercise: Exercise) -> Iterator[None]:
    """The stub stands there again afterwards."""
    before = exercise.stub.read_bytes()
    try:
        yield
    finally:
        exercise.stub.write_bytes(before)


def right_and_wrong(exercise: Exercise) -> dict[str, str]:
    """The solution, and the first of its known mistakes."""
    mistake = variants.load(exercise).mistake[0]
    return {
        "passed": exercise.solution.read_text("utf-8"),
        "failed": variants.swapped(exercise, mistake),
    }


def _save(server: WarmServer, job: Request, text: str, n: int, state: str) -> Save:
    stub = job.exercise.stub
    before = stub.stat().st_mtime_ns
    saver = threading.Timer(PAUSE, stub.write_text, [f"{text}\n# {n}\n", "utf-8"])
    saver.start()
    noticed = watch(stub.parent, step=1, debounce=20, recursive=False, rust_timeout=0)
    while stub.stat().st_mtime_ns == before:  # an earlier change is told late now and then
        next(noticed)
    server.run(job)
    report = server.report()
    saver.join()
    saved = stub.stat().st_mtime
    verdict = time.time() - saved
    own = sum(spec.seconds for spec in report.specs)
    _must_be(state, report)
    while report.naming:
        report = server.report()
    return Save(verdict, verdict - own, time.time() - saved)


def _must_be(state: str, report: Report) -> None:
    if report.state != state:
        why = f": {report.error.message}" if report.error else ""
        raise NotMeasured(f"{report.stem} is {report.state}, and should have {state}{why}")


def _medians(some: list[Save]) -> Save:
    columns = zip(*((s.verdict, s.beyond, s.named) for s in some), strict=True)
    return Save(*(statistics.median(column) for column in columns))


def attention(root: Path, times: int) -> list[Row]:
    """Exercise 31, whose verdict everybody waits for, and the name of its mistake.

    Here belongs the time to a name when the outcomes of known mistakes are kept already, and when
    they are not.
    """
    exercise = catalog.find(root, 31)
    passing, failing = saves(exercise, right_and_wrong(exercise), times, [])
    rows = [
        Row(f"save to verdict, 31 {word}", _s(s.verdict), "beyond its specs", _s(s.beyond))
        for word, s in (("passing", passing), ("failing", failing))
    ]
    return [*rows, Row("save to the mistake's name, 31", _s(failing.named))]


def every_exercise(root: Path, times: int) -> list[Row]:
    """Passing and failing, the median and the worst of all; each exercise's own go to stderr."""
    found: dict[str, dict[Exercise, Save]] = {"passing": {}, "failing": {}}
    odd = []
    for exercise in catalog.exercises(root):
        texts = right_and_wrong(exercise)
        try:
            pair = saves(exercise, texts, max(3, times // 3), [])
        except NotMeasured as error:
            odd.append(Row(f"save to verdict, {exercise.number:02d}", "not measured", str(error)))
            continue
        for (word, of), save in zip(found.items(), pair, strict=True):
            of[exercise] = save
            told = f"{word} {_s(save.verdict)}, beyond its specs {_s(save.beyond)}"
            print(f"{exercise.number:02d} {told}", file=sys.stderr, flush=True)
    return [*(row for word, of in found.items() for row in _summary(word, of)), *odd]


def _summary(word: str, found: dict[Exercise, Save]) -> list[Row]:
    """The rows of one kind of save."""

    def row(what: str, seconds: dict[Exercise, float]) -> Row:
        worst = max(seconds, key=lambda exercise: seconds[exercise])
        median = statistics.median(seconds.values())
        where = f"the worst, {worst.number:02d}"
        return Row(f"{what}, {word}, median of {len(found)}", _s(median), where, _s(seconds[worst]))

    quick = sum(save.verdict <= PROMISED for save in found.values())
    return [
        row("save to verdict beyond the specs", {e: save.beyond for e, save in found.items()}),
        row("save to verdict in all", {e: save.verdict for e, save in found.items()}),
        Row(f"verdicts within {PROMISED:g} s, {word}", f"{quick} of {len(found)}", "asked for",
            f"{0.9 * len(found):.0f}"),
    ]  # fmt: skip


def _s(seconds: float) -> str:
    return f"{seconds:.3f} s"
