"""How the exercises stand, and the summary that spares a run from reading the whole record.

`.kata/summary.json` is made from the record and is in no repository. It counts while the record is
the one that it covers, as far as size, time of change and both ends can tell, and while no time in
it is later than the clock: the order of the entries would then depend on when they are read. Where
it is missing, stale or damaged, the record is read in full.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from kata.learn.entries import Entry, State, Time

WORDS = {"passed": "passed", "failed": "failing", "begun": "begun", "unwritten": "not written yet"}
FORMAT = 1  # of the summary: one of another format is not read
ENDS = 4096  # bytes of the record's beginning and of its end that are compared


class Standing(msgspec.Struct, frozen=True):
    """How an exercise stands. `passed` and `total` are the last run's specs; each run is a try."""

    stem: str
    state: State  # stays "passed" once any run has passed
    now: State  # what the last run says
    passed: int
    total: int
    tries: int = 0
    first: Time | None = None  # None: every time in its entries was later than the clock
    last: Time | None = None
    gave_up: bool = False  # the solution was opened before any run had passed

    @property
    def label(self) -> str:
        """For people: "passed", "passed, now failing", "failing (solution seen)" …"""
        label = WORDS[self.state]
        if self.now != self.state:
            label += f", now {WORDS[self.now]}"
        return label + " (solution seen)" * self.gave_up

    def then(self, entry: Entry, now: datetime) -> Standing:
        """The standing after one entry more."""
        run = entry.event == "run"
        won = self.tries > 0 and self.state == "passed"
        # Runs say how it stands; before the first, whatever else there is.
        says = entry if run or not self.tries else None
        first = last = entry.at if entry.at <= now else None
        if self.first and self.last:
            first = min(self.first, first or self.first)
            last = max(self.last, last or self.last)
        return Standing(
            self.stem,
            state="passed" if won else says.state if says else self.state,
            now=says.state if says else self.now,
            passed=says.passed if says else self.passed,
            total=says.total if says else self.total,
            tries=self.tries + run,
            first=first,
            last=last,
            gave_up=self.gave_up or not (run or won),
        )


class Summary(msgspec.Struct):
    """What the entries of a record say together."""

    covers: str = ""
    latest: tuple[Time, ...] = ()  # the place of the latest entry
    standings: dict[str, Standing] = {}
    warnings: list[str] = []
    format: int = FORMAT

    @classmethod
    def of(cls, entries: Sequence[Entry], warnings: list[str], now: datetime) -> Summary:
        """The summary of these entries, which are in order."""
        summary = cls(warnings=warnings)
        for entry in entries:
            summary.add(entry, now)
        summary.latest = max((entry.place for entry in entries), default=())
        summary.standings = dict(sorted(summary.standings.items()))
        return summary

    def add(self, entry: Entry, now: datetime) -> None:
        """Take up one entry more, which stands behind all others."""
        self.latest = entry.place
        if entry.event in ("run", "give-up"):
            stem = entry.exercise
            standing = self.standings.get(stem) or Standing(stem, entry.state, entry.state, 0, 0)
            self.standings[stem] = standing.then(entry, now)

    def is_settled(self, now: datetime) -> bool:
        """Whether no time in the record is later than that."""
        return not self.latest or self.latest[0] <= now


def load(path: Path, record: BinaryIO, now: datetime) -> Summary | None:
    """The summary, if it covers this record and counts by now."""
    with suppress(OSError, ValueError, RecursionError):
        summary = msgspec.json.decode(path.read_bytes(), type=Summary)
        if summary.format == FORMAT and summary.covers == fingerprint(record):
            return summary if summary.is_settled(now) else None
    return None


def save(path: Path, summary: Summary) -> None:
    """Keep the summary, if that can be done: it is lost for nothing but time."""
    fresh = path.with_name(f".{path.name}.new")
    with suppress(OSError):
        try:
            fresh.write_bytes(msgspec.json.encode(summary))
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


def fingerprint(record: BinaryIO) -> str:
    """What changes when a record is written, merged or edited."""
    state = os.fstat(record.fileno())
    digest = hashlib.sha256()
    for start in (0, max(0, state.st_size - ENDS)):
        record.seek(start)
        digest.update(record.read(ENDS))
    return f"{state.st_size} {state.st_mtime_ns} {digest.hexdigest()}"
