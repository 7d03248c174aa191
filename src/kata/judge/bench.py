"""One exercise under judgement: where its code runs, what it did, and what is known of it."""

from __future__ import annotations

import ast
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kata.attempt import forbidden, modules
from kata.attempt.outcome import Attempted, Done
from kata.attempt.places import Here, Place
from kata.attempt.seam import Attempt
from kata.course import cache, catalog, variants
from kata.course.variants import Variant
from kata.judge import naming
from kata.judge.detail import unreadable
from kata.judge.report import Detail, Report

if TYPE_CHECKING:
    from kata.judge.session import Judge

KEEP_FROM = 0.005  # seconds: a replay of an attempt that took longer is kept on disk


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
        self._places: dict[Path, Place] = {}
        self._versions: dict[Variant | None, Path] = {None: exercise.solution}
        modules.use_parts(self.parts)
        forbidden.forbid(getattr(spec, "WITHOUT", ()))
        self.place = self._isolated() if judge.option.isolate else self._here(self.path)
        self.attempt = Attempt(self.place, self.record, f"{judge.option.seed} {exercise.stem}")

    def _here(self, path: Path) -> Place:
        if path not in self._places:
            self._places[path] = Here(self.spec, path, self.parts, self.judge.launch)
        return self._places[path]

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

    def replay(self, variant: Variant | None, past: Attempted) -> list[Done]:
        """The same attempt on a known mistake, or on the reference."""
        if variant not in self._versions:
            self._versions[variant] = variants.write(self.exercise, variant)  # type: ignore[arg-type]
        path = self._versions[variant]
        if max(done.seconds for done in past.done) > KEEP_FROM or past.job.ranks:
            return self._kept(path, past)
        return self._here(path).perform(past.job)

    def _kept(self, path: Path, past: Attempted) -> list[Done]:
        """From disk, if it was there before: a known mistake does the same every time."""
        digest = hashlib.sha256(msgspec.msgpack.encode(past.job))
        for source in (path, self.exercise.spec, *sorted(self.parts.glob("ex*.py"))):
            digest.update(source.read_bytes())
        kept = cache.folder(self.exercise.root, "replays") / digest.hexdigest()[:24]
        if kept.exists():
            return msgspec.msgpack.decode(kept.read_bytes(), type=list[Done])
        done = self._here(path).perform(past.job)
        with suppress(OSError):  # no room: it is replayed again next time
            cache.write(kept, msgspec.msgpack.encode(done))
        return done

    def recognise(self) -> None:
        """Name the known mistake that explains the failures, if there is one."""
        report = self.report
        failed = [spec.name for spec in report.specs if spec.status == "failed"]
        limit = self.judge.option.naming_limit
        if failed and limit > 0 and not report.count("unwritten"):
            forbidden.forbid(getattr(self.spec, "WITHOUT", ()))  # other specs may have come since
            known = variants.load(self.exercise).mistake
            try:
                found = naming.recognise(known, self.record, failed, self.replay, limit)
            except OSError:  # no room to write a known mistake down
                found = []
            for spec in report.specs:
                if spec.status == "failed":
                    spec.mistakes = [variant.says for variant in found]

    def close(self) -> None:
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
