"""The outcome of a run, as data: what the plugin makes, and all others read."""

from __future__ import annotations

from typing import Any

import msgspec

from kata.attempt.outcome import Frame


class Detail(msgspec.Struct):
    """Why a spec failed.

    `kind`: mismatch, raised, no-raise, assertion, changed, reached, time or error.
    """

    kind: str
    message: str
    where: str = ""  # path:line in the specs
    call: str = ""
    frames: list[Frame] = []  # the learner's
    mismatch: dict[str, Any] = {}


class SpecReport(msgspec.Struct):
    """How one spec went. `status` is passed, failed, unwritten or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    detail: Detail | None = None
    reason: str = ""  # of a skip
    output: str = ""  # what the code printed

    @property
    def sentence(self) -> str:
        """`test_lets_a_query_see_its_keys[3-float16]` as words."""
        name, bracket, parameters = self.name.removeprefix("test_").partition("[")
        words = name.replace("_", " ")
        return f"{words} ({parameters.rstrip(']')})" if bracket else words


class Report(msgspec.Struct):
    """How an exercise went. `mistakes` are the known ones that the code behaves like."""

    stem: str
    submission: str
    specs: list[SpecReport] = []
    mistakes: list[str] = []
    naming: bool = False  # they are still looked for; another report follows
    seconds: float = 0.0
    complete: bool = True  # every spec of the file was asked for
    error: Detail | None = None  # the specs could not be read
    warnings: list[str] = []  # of the record

    def count(self, status: str) -> int:
        return sum(spec.status == status for spec in self.specs)

    @property
    def total(self) -> int:
        """Specs that were judged: those skipped do not count."""
        return len(self.specs) - self.count("skipped")

    @property
    def state(self) -> str:
        """passed, failed, unwritten (nothing is written yet) or skipped."""
        if self.error:
            return "failed"
        if self.count("unwritten") and self.count("unwritten") + self.count("passed") == self.total:
            return "unwritten"
        if self.total == 0:
            return "skipped"
        return "passed" if self.count("passed") == self.total else "failed"
