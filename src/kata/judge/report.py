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


class Plan(msgspec.Struct, tag=True):
    """The specs that will be judged, in their order."""

    specs: list[str]


class Starts(msgspec.Struct, tag=True):
    """A spec begins, and may take so many seconds (0: as long as it likes)."""

    spec: str
    limit: float


class SpecReport(msgspec.Struct, tag=True):
    """How one spec went.

    `status` is passed, failed, unwritten, skipped, or untried: the run ended before its turn.
    """

    name: str
    status: str
    seconds: float = 0.0
    detail: Detail | None = None
    reason: str = ""  # of a skip
    output: str = ""  # what the code printed
    limit: float = 0.0  # seconds that it may take; 0: any
    mistakes: list[str] = []  # the known ones that explain this failure

    @property
    def sentence(self) -> str:
        """`test_lets_a_query_see_its_keys[3-float16]` as words."""
        name, bracket, parameters = self.name.removeprefix("test_").partition("[")
        words = name.replace("_", " ")
        return f"{words} ({parameters.rstrip(']')})" if bracket else words


class Report(msgspec.Struct, tag=True):
    """How an exercise went."""

    stem: str
    submission: str
    specs: list[SpecReport] = []
    naming: bool = False  # names are still looked for; another report follows
    seconds: float = 0.0
    complete: bool = True  # every spec of the file was asked for
    error: Detail | None = None  # the submission or its specs could not be read, or the run ended
    warnings: list[str] = []  # of the record

    @property
    def mistakes(self) -> list[str]:
        """All that has a name, once, in the order of the specs."""
        return list(dict.fromkeys(says for spec in self.specs for says in spec.mistakes))

    def count(self, status: str) -> int:
        return sum(spec.status == status for spec in self.specs)

    @property
    def total(self) -> int:
        """Specs that were to be judged: those skipped do not count."""
        return len(self.specs) - self.count("skipped")

    @property
    def state(self) -> str:
        """passed, failed, unwritten (nothing is written yet), begun (something is) or skipped."""
        if self.error:
            return "failed"
        if self.total == 0:
            return "skipped"
        if self.count("passed") == self.total:
            return "passed"
        if unwritten := self.count("unwritten"):
            return "unwritten" if unwritten == self.total else "begun"
        return "failed"
