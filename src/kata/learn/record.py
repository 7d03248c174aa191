"""Progress: the record of all runs, and progress.md, which people read.

`.kata/runs.jsonl` is the record: one line a run, appended whole. progress.md is the learner's own,
with one table in it that is made anew from the record. Writers hold a lock. A kill at any moment
leaves the old progress.md or the new one, and at worst a torn last line in the record, which
readers name and the next append closes.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec
from filelock import BaseFileLock, FileLock

from kata.course import catalog
from kata.judge.report import Report
from kata.learn import page

RECORD = ".kata/runs.jsonl"
PAGE = "progress.md"
LOCK = ".kata/progress.lock"

State = Literal["passed", "failed", "begun", "unwritten"]
WORDS = {"passed": "passed", "failed": "failing", "begun": "begun", "unwritten": "not written yet"}


class Entry(msgspec.Struct, frozen=True):
    """One line of the record. Events other than "run" and "give-up" are kept and not counted."""

    exercise: str
    at: Annotated[datetime, msgspec.Meta(tz=True)]
    state: State
    passed: int
    total: int
    seconds: float
    mistake: str | None = None
    event: str = "run"
    parts: str = "solutions"

    @classmethod
    def of(
        cls, report: Report, at: datetime | None = None, parts: str = "solutions"
    ) -> Entry | None:
        """What a report says, or None where it judges too little: some specs, or none at all."""
        if report.state == "skipped" or not (report.complete or report.error):
            return None
        return cls(
            exercise=report.stem,
            at=at or _now(),
            state=cast(State, report.state),
            passed=report.count("passed"),
            total=report.total,
            seconds=round(report.seconds, 3),
            mistake=" ".join(report.mistakes) or None,
            parts=parts,
        )


class Standing(msgspec.Struct, frozen=True):
    """How an exercise stands. `passed` and `total` are the last run's specs; each run is a try."""

    stem: str
    state: State  # stays "passed" once any run has passed
    now: State  # what the last run says
    passed: int
    total: int
    tries: int
    first: datetime
    last: datetime
    gave_up: bool  # the solution was opened before any run had passed

    @property
    def label(self) -> str:
        """For people: "passed", "passed, now failing", "failing (solution seen)" …"""
        label = WORDS[self.state]
        if self.now != self.state:
            label += f", now {WORDS[self.now]}"
        return label + " (solution seen)" * self.gave_up


def record_run(root: Path, entry: Entry) -> list[str]:
    """Append one line to the record and remake the table; the warnings name damaged lines."""
    line = msgspec.json.encode(entry)
    msgspec.json.decode(line, type=Entry)  # what could not be read back is not written
    with _locked(root):
        _append(root / RECORD, line)
        return _rewrite(root)


def give_up(root: Path, stem: str, when: datetime | None = None) -> list[str]:
    """Record that the solution was opened; the state stays what it was."""
    was = standings(root).get(stem)
    state, passed, total = (was.now, was.passed, was.total) if was else ("unwritten", 0, 0)
    return record_run(
        root, Entry(stem, when or _now(), state, passed, total, seconds=0.0, event="give-up")
    )


def note(root: Path, number: int, text: str, when: datetime | None = None) -> list[str]:
    """Add a dated list item at the end of progress.md, further lines of the text indented in it."""
    first, *more = text.strip().splitlines() or [""]
    if not first:
        raise ValueError(f"a note needs a text, got {text!r}")
    item = [f"- {(when or _now()).date()} · {number:02d}: {first}"]
    item += [f"  {line}".rstrip() for line in more]
    with _locked(root):
        return _rewrite(root, item)


def remake(root: Path) -> list[str]:
    """Make the table of progress.md anew, or the whole page where there is none."""
    with _locked(root):
        return _rewrite(root)


def read(root: Path) -> tuple[list[Entry], list[str]]:
    """The record by time, exact duplicates once, and a warning for each damaged line."""
    entries, warnings = set(), []
    for number, line in enumerate(_bytes(root / RECORD).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.add(msgspec.json.decode(line, type=Entry))
        except (ValueError, RecursionError) as error:
            warnings.append(f"{RECORD}:{number} is damaged and was skipped: {error}")
    # The second key orders two of the same moment alike, however their lines were merged.
    return sorted(entries, key=lambda entry: (entry.at, msgspec.json.encode(entry))), warnings


def standings(root: Path) -> dict[str, Standing]:
    """How each exercise of the record stands, by stem."""
    return _standings(read(root)[0])


def _standings(entries: Sequence[Entry]) -> dict[str, Standing]:
    events = defaultdict(list)
    for entry in entries:
        if entry.event in ("run", "give-up"):
            events[entry.exercise].append(entry)
    return {stem: _standing(events[stem]) for stem in sorted(events)}


def _standing(entries: Sequence[Entry]) -> Standing:
    """The standing after all events of one exercise, in the order of time."""
    runs = [entry for entry in entries if entry.event == "run"]
    last = (runs or entries)[-1]
    won = next((run.at for run in runs if run.state == "passed"), None)
    return Standing(
        stem=last.exercise,
        state="passed" if won else last.state,
        now=last.state,
        passed=last.passed,
        total=last.total,
        tries=len(runs),
        first=entries[0].at,
        last=entries[-1].at,
        gave_up=any(e.event == "give-up" and (not won or e.at < won) for e in entries),
    )


# --- files ---------------------------------------------------------------------------------------


def _now() -> datetime:
    return datetime.now().astimezone()


def _locked(root: Path) -> BaseFileLock:
    (root / LOCK).parent.mkdir(exist_ok=True)
    return FileLock(root / LOCK, timeout=30, poll_interval=0.005)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _append(path: Path, line: bytes) -> None:
    """Put a line on disk, on a line of its own even where a kill has torn the last one."""
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _rewrite(root: Path, item: Sequence[str] = ()) -> list[str]:
    """Replace progress.md by its next state in one step. The caller holds the lock."""
    entries, warnings = read(root)
    rows = _rows(root, _standings(entries))
    path = (root / PAGE).resolve()  # a link stays a link
    fresh = path.with_name(f".{path.name}.new")
    try:
        while (new := page.remade(old := _bytes(path), rows, item)) != old:
            with fresh.open("wb") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            # An editor holds no lock: what was saved meanwhile is taken up first.
            if _bytes(path) == old:
                if path.exists():
                    shutil.copymode(path, fresh)
                os.replace(fresh, path)
                break
    finally:
        fresh.unlink(missing_ok=True)
    return warnings


def _rows(root: Path, found: dict[str, Standing]) -> list[str]:
    """One row for each exercise that was tried, and one of totals. The map of all is `kata`."""
    known = catalog.exercises(root)
    tried = {exercise: found[exercise.stem] for exercise in known if exercise.stem in found}
    rows = []
    for exercise, standing in tried.items():
        link = f"[{exercise.number:02d}](lessons/{exercise.stem}.md)"
        rows.append(_row(f"{link} {_title(exercise)}", standing.label, [standing]))
    passed = sum(standing.state == "passed" for standing in tried.values())
    totals = f"**{len(tried)} of {len(known)} tried**", f"**{passed} passed**"
    return [*rows, _row(*totals, list(tried.values()))]


def _row(name: str, state: str, of: Sequence[Standing]) -> str:
    specs = f"{sum(s.passed for s in of)}/{sum(s.total for s in of)}" if of else "—"
    tries = sum(s.tries for s in of)
    first = min(of, key=lambda s: s.first).first.date() if of else "—"
    last = max(of, key=lambda s: s.last).last.date() if of else "—"
    return f"| {name} | {state} | {specs} | {tries} | {first} | {last} |"


@cache
def _title(exercise: catalog.Exercise) -> str:
    try:
        return exercise.title.replace("|", r"\|")
    except (OSError, SyntaxError, ValueError):
        return exercise.slug.replace("_", " ")
