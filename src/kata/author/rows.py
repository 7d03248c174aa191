"""The table of speeds: its rows, and where it is written."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path
from typing import NamedTuple

from kata.racing import Result

BEGIN, END = "<!-- bench -->\n", "<!-- bench: end -->"
HEAD = "| what | ours | beside | that | ratio |\n|:--|--:|:--|--:|--:|"


class Row(NamedTuple):
    """A line of the table. `ratio`: how many times better ours is."""

    what: str
    ours: str
    beside: str = ""
    that: str = ""
    ratio: float | None = None

    def __str__(self) -> str:
        ratio = f"{self.ratio:.2f} ×" if self.ratio else ""
        return f"| {self.what} | {self.ours} | {self.beside} | {self.that} | {ratio} |"


def of(result: Result, number: int | None = None) -> list[Row]:
    """A race: its first entrant beside each of the others."""
    ours, *others = result.values
    what = result.what if number is None else f"{result.what}, {number:02d}"
    return [
        Row(what, result.shown(ours), other, result.shown(other), result.ratio(ours, other))
        for other in others
    ]


def write(root: Path, rows: list[Row]) -> None:
    """Into benchmarks.md, and quoted between two markers of README.md."""
    torch = importlib.metadata.version("torch")
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch}"
    text = (
        f"Measured {date.today()} on {os.cpu_count()} cores ({machine}) by `nox -s bench`: "
        "medians, and ratios in one run.\n\n" + "\n".join([HEAD, *map(str, rows)])
    )
    (root / "benchmarks.md").write_text(f"# Benchmarks\n\n{text}\n", "utf-8")
    readme = root / "README.md"
    head, begin, rest = readme.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md needs the markers {BEGIN.strip()} and {END}, in this order")
    readme.write_text(f"{head}{begin}{text}\n{end}{tail}", "utf-8")
