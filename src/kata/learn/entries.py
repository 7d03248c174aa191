"""The lines of the record, and their order.

An entry stands where its time says. But clocks are set wrong, and git puts the lines of two
machines into one file (.gitattributes), each side's in their own order. So two more rules hold:

1. An entry that is written while the record holds a later time names it: `after` is the place of
   the latest entry, and the new one stands right behind that. On one machine the order is thus that
   of writing, whatever its clock does, and stays so when the wrong date has passed.
2. A time that the reader's clock has yet to reach is not believed. An entry that has such a time
   stands where the file has it, right after the line above. In the place of another it is left out,
   so that an entry behind it stands where its own time says, also among another machine's.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, cast

import msgspec

from kata.judge.report import Report

State = Literal["passed", "failed", "begun", "unwritten"]
Time = Annotated[datetime, msgspec.Meta(tz=True)]
BOM = b"\xef\xbb\xbf"  # some editors put it before a text


class Entry(msgspec.Struct, frozen=True):
    """One line of the record. Events other than "run" and "give-up" are kept and not counted."""

    exercise: str
    at: Time  # what the clock said
    state: State
    passed: int
    total: int
    seconds: float
    mistake: str | None = None
    event: str = "run"
    parts: str = "solutions"
    after: tuple[Time, ...] | msgspec.UnsetType = msgspec.UNSET  # in the file only where needed

    @classmethod
    def of(
        cls, report: Report, at: datetime | None = None, parts: str = "solutions"
    ) -> Entry | None:
        """What a report says, or None where it judges too little: some specs, or none at all."""
        if report.state == "skipped" or not (report.complete or report.error):
            return None
        return cls(
            exercise=report.stem,
            at=at or clock(),
            state=cast(State, report.state),
            passed=report.count("passed"),
            total=report.total,
            seconds=round(report.seconds, 3),
            mistake=" ".join(report.mistakes) or None,
            parts=parts,
        )

    @property
    def place(self) -> tuple[datetime, ...]:
        """Where it stands: places compare as tuples, and no part of one is later than its first."""
        return (*(self.after or ()), self.at)

    def behind(self, latest: tuple[datetime, ...]) -> Entry:
        """This entry where the latest of the record has that place."""
        ends = range(len(latest) + 1)
        after = next(latest[:end] for end in ends if (*latest[:end], self.at) > latest)
        return msgspec.structs.replace(self, after=after or msgspec.UNSET)


def clock() -> datetime:
    """Now, with the offset of this machine's clock."""
    return datetime.now().astimezone()


def parsed(record: bytes, name: str) -> tuple[dict[bytes, Entry], list[str]]:
    """The entries by their lines, each line once, and a warning for each damaged line."""
    entries: dict[bytes, Entry] = {}
    warnings = []
    decoder = msgspec.json.Decoder(Entry)
    for number, text in enumerate(record.split(b"\n"), start=1):
        line = text.strip().removeprefix(BOM)
        if not line or line in entries:
            continue
        try:
            entries[line] = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            warnings.append(f"{name}:{number} is damaged and was skipped: {error}")
    return entries, warnings


def in_order(entries: dict[bytes, Entry], now: datetime) -> list[Entry]:
    """The entries of a file in the order that the module's docstring states."""
    believed: tuple[datetime, ...] = ()
    keyed = []
    for line, entry in entries.items():
        place = entry.place
        if place[0] <= now:
            believed = place
        else:
            believed = tuple(time for time in place if time <= now) or believed
        # The line orders two of one place alike, however they were merged.
        keyed.append((believed, place, line, entry))
    return [entry for *_, entry in sorted(keyed)]
