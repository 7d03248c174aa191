"""The record of all runs, and progress.md, which people read.

`.kata/runs.jsonl` is the record: one line a run, appended whole; entries.py tells their order.
progress.md is the learner's own, with one table in it that is made anew from the record. Writers
hold a lock. A kill at any moment leaves the old progress.md or the new one, and at worst a torn
last line in the record, which readers name and the next append closes. Readers hold no lock and
write nothing, so that a checkout may be read-only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
from filelock import FileLock, Timeout

from kata.learn import entries, page, standing
from kata.learn.entries import Entry
from kata.learn.standing import Standing, Summary

RECORD = ".kata/runs.jsonl"
SUMMARY = ".kata/summary.json"
LOCK = ".kata/progress.lock"
PAGE = "progress.md"
PATIENCE = 5.0  # seconds for the lock: a write takes milliseconds, and a verdict waits for it


def record_run(root: Path, entry: Entry) -> list[str]:
    """Append one line to the record and remake the table; the warnings name damaged lines.

    OSError: nothing was written. That the table alone could not be is a warning.
    """
    msgspec.json.decode(msgspec.json.encode(entry), type=Entry)  # else it could not be read back
    with _locked(root), (root / RECORD).open("a+b", buffering=0) as record:
        now = entries.clock()
        summary = _summary(root, record, now)
        settled = summary.is_settled(now) and entry.at <= now
        entry = entry.behind(summary.latest)
        _append(record, msgspec.json.encode(entry))
        if settled:
            summary.add(entry, now)
            _keep(root, record, summary)
        else:
            summary = _in_full(record, now)
        try:
            _rewrite(root, summary)
        except OSError as error:
            return [*summary.warnings, f"{PAGE} stays as it was: {reason(error)}"]
        return summary.warnings


def give_up(root: Path, stem: str, when: datetime | None = None) -> list[str]:
    """Record that the solution was opened; the state stays what it was."""
    was = standings(root).get(stem)
    state, passed, total = (was.now, was.passed, was.total) if was else ("unwritten", 0, 0)
    at = when or entries.clock()
    return record_run(root, Entry(stem, at, state, passed, total, seconds=0.0, event="give-up"))


def note(root: Path, number: int, text: str, when: datetime | None = None) -> list[str]:
    """Add a dated list item at the end of progress.md, further lines of the text indented in it."""
    first, *more = text.strip().splitlines() or [""]
    if not first:
        raise ValueError(f"a note needs a text, got {text!r}")
    item = [f"- {(when or entries.clock()).date()} · {number:02d}: {first}"]
    item += [f"  {line}".rstrip() for line in more]
    return remake(root, item)


def remake(root: Path, item: Sequence[str] = ()) -> list[str]:
    """Make the table of progress.md anew, or the whole page where there is none."""
    with _locked(root):
        summary = _now_known(root, keep=True)
        _rewrite(root, summary, item)
        return summary.warnings


def read(root: Path) -> tuple[list[Entry], list[str]]:
    """The record in its order, exact duplicates once, and a warning for each damaged line."""
    found, warnings = entries.parsed(_bytes(root / RECORD), RECORD)
    return entries.in_order(found, entries.clock()), warnings


def standings(root: Path) -> dict[str, Standing]:
    """How each exercise of the record stands, by stem."""
    return _now_known(root).standings


def reason(error: OSError) -> str:
    """Why something was not written, in a few words."""
    if isinstance(error, Timeout):
        return f"another process holds {LOCK}"
    return error.strerror or str(error)


# --- the record ----------------------------------------------------------------------------------


def _now_known(root: Path, keep: bool = False) -> Summary:
    """What the record says now, with its summary kept for the next reader where that is asked."""
    try:
        with (root / RECORD).open("rb", buffering=0) as record:
            summary = _summary(root, record, entries.clock())
            if keep and not summary.covers:
                _keep(root, record, summary)
            return summary
    except FileNotFoundError:
        return Summary()


def _summary(root: Path, record: BinaryIO, now: datetime) -> Summary:
    """What an open record says: from the summary, if that covers it, else read in full."""
    return standing.load(root / SUMMARY, record, now) or _in_full(record, now)


def _in_full(record: BinaryIO, now: datetime) -> Summary:
    record.seek(0)
    found, warnings = entries.parsed(record.read(), RECORD)
    return Summary.of(entries.in_order(found, now), warnings, now)


def _keep(root: Path, record: BinaryIO, summary: Summary) -> None:
    summary.covers = standing.fingerprint(record)
    standing.save(root / SUMMARY, summary)


def _append(record: BinaryIO, line: bytes) -> None:
    """Put a line on disk, on a line of its own even where a kill has torn the last one.

    Where there is no room for it, nothing of it stays.
    """
    end = record.seek(0, os.SEEK_END)
    if end:
        record.seek(-1, os.SEEK_END)
        if record.read(1) != b"\n":
            line = b"\n" + line
    rest = line + b"\n"
    try:
        while rest:  # a disk that fills up takes a part
            rest = rest[record.write(rest) :]
        os.fsync(record.fileno())
    except OSError:
        record.truncate(end)
        raise


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    (root / LOCK).parent.mkdir(exist_ok=True)
    with FileLock(root / LOCK, timeout=PATIENCE, poll_interval=0.005):
        yield


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _rewrite(root: Path, summary: Summary, item: Sequence[str] = ()) -> None:
    """Replace progress.md by its next state in one step. The caller holds the lock."""
    rows = page.rows(root, summary.standings)
    path = Path(os.path.realpath(root / PAGE))  # a link stays a link
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
