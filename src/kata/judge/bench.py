"""One exercise under judgement: where its code runs, what it did, and what is known of it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kata.attempt import forbidden, modules
from kata.attempt.outcome import Attempted
from kata.attempt.places import Here, Place
from kata.attempt.seam import Attempt
from kata.course import catalog, variants
from kata.judge import naming, recall
from kata.judge.detail import unreadable
from kata.judge.replays import Replays
from kata.judge.report import Detail, Report

if TYPE_CHECKING:
    from kata.judge.session import Judge


class Bench:
    """`place` has the code under test; `record` every attempt on it, in order."""

    def __init__(self, judge: Judge, exercise: catalog.Exercise, spec: Any) -> None:
        self.judge, self.exercise, self.spec = judge, exercise, spec
        floor = exercise.stub if judge.option.on == "exercises" else exercise.solution
        self.path = Path(judge.option.submission).absolute() if judge.option.submission else floor
        self.parts = exercise.root / judge.option.parts
        self.record: list[Attempted] = []
        self.report = Report(exercise.stem, str(self.path))
        self.looked = False  # whether the code has been read
        self._first_failure: dict[str, int] = {}  # of a spec: the attempts made by then
        modules.use_parts(self.parts)
        forbidden.forbid(getattr(spec, "WITHOUT", ()))
        self.place = self._isolated() if judge.option.isolate else self._here(self.path)
        # What is replayed beside code that may have changed the process is for this verdict alone.
        fills = bool(judge.option.fill_atlas)
        clean = fills or judge.option.isolate
        self.replays = Replays(exercise, self.parts, self._here, keeps=clean)
        if fills and self.path.exists():
            self.place = recall.Recalled(self.place, self.replays, self.path.read_bytes())
        self.attempt = Attempt(self.place, self.record, f"{judge.option.seed} {exercise.stem}")

    def _here(self, path: Path) -> Place:
        return Here(self.spec, path, self.parts, self.judge.launch)

    def _isolated(self) -> Place:
        from kata.attempt.worker import Worker

        return Worker(self.exercise, self.path, self.parts)

    def look(self) -> None:
        """Read the code, once; what can't be read fails as a whole."""
        if self.looked:
            return
        self.looked = True
        detail = _absent(self.path)
        # Code for ranks may ask for its rank as it is read, and is only read there.
        alone = "multiprocess" not in self.exercise.suites
        if detail is None and (problem := self.place.load(alone)) and not problem.unwritten:
            detail = unreadable(problem, self.path, self.exercise.root)
        self.report.error = detail

    @contextmanager
    def noting_first_failure(self, item: pytest.Item) -> Iterator[None]:
        """While a spec runs: where Hypothesis tries on after a failure, note how far it had come.

        What it tries on its way to a smaller example is another call each time, in no atlas.
        """
        handle = getattr(getattr(item, "obj", None), "hypothesis", None)
        if handle is None:
            yield
            return
        inner = handle.inner_test

        @functools.wraps(inner)
        def noting(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except BaseException as error:
                if not type(error).__module__.startswith("hypothesis"):  # an assumption, or its end
                    self._first_failure.setdefault(item.name, len(self.record))
                raise

        handle.inner_test = noting
        try:
            yield
        finally:
            handle.inner_test = inner

    def recognise(self) -> None:
        """Name the known mistakes that explain what failed."""
        status = {spec.name: spec.status for spec in self.report.specs}
        failed = [
            spec.name
            for spec in self.report.specs
            if spec.status == "failed" and not (spec.detail and spec.detail.kind == "time")
        ]
        judged = {name for name, how in status.items() if how == "passed"}.union(failed)
        if not failed:
            return
        forbidden.forbid(getattr(self.spec, "WITHOUT", ()))  # other specs may have come since
        record, retried = self._first_and_retried()
        record = [past for past in record if past.spec in judged]
        known = variants.load(self.exercise).mistake
        found = naming.explain(known, record, failed, self.replays, retried)
        for spec in self.report.specs:
            if spec.name in found:
                spec.mistakes = [found[spec.name].says]

    def _first_and_retried(self) -> tuple[list[Attempted], list[Attempted]]:
        """The attempts up to the first failure of each spec, and those after it."""
        first: list[Attempted] = []
        retried: list[Attempted] = []
        for i, past in enumerate(self.record):
            (first if i < self._first_failure.get(past.spec, i + 1) else retried).append(past)
        return first, retried

    def fill_atlas(self) -> None:
        """Keep what this run did, and what all known mistakes do in its attempts."""
        recall.keep_ways(self)
        self.replays.atlas.flush()
        if self.judge.option.fill_atlas == "mistakes":
            for variant in variants.load(self.exercise).mistake:
                for past in self.record:
                    self.replays(variant, past)
                self.replays.atlas.flush()

    def close(self) -> None:
        self.replays.atlas.flush()
        self.place.close()


def _absent(path: Path) -> Detail | None:
    """A file that isn't there, or in which nothing stands."""
    if not path.exists():
        return Detail("absent", f"there is no file {path.name}", where=str(path))
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return None  # reading it as a module tells more
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) or _is_text(node) for node in body):
        return Detail("absent", f"nothing is defined in {path.name}", where=str(path))
    return None


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
