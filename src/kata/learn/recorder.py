"""The pytest plugin that writes a learner's run down."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.judge.child import Request
from kata.judge.report import Report
from kata.judge.session import Judge
from kata.learn.record import Entry, record_run


class Recorder:
    """The plugin that writes a learner's run into the record and into progress.md."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        option = self.judge.option
        if option.on != "exercises" or option.submission or self.judge.tell:
            return  # whoever waits for the run writes it down: it may yet be ended
        for report in self.judge.reports:
            root = next((b.exercise.root for b in self.judge.benches.values()), Path.cwd())
            report.warnings = _write_down(root, report, option.parts)


def write_down(report: Report, request: Request) -> list[str]:
    """A learner's run goes into the record and into progress.md; the warnings say what did not."""
    if request.submission or {"--submission", "--on"} & {
        o.partition("=")[0] for o in request.options
    }:
        return []
    parts = "exercises" if "exercises" in request.options else "solutions"
    return _write_down(Path(request.root), report, parts)


def _write_down(root: Path, report: Report, parts: str) -> list[str]:
    entry = Entry.of(report, parts=parts)
    return record_run(root, entry) if entry else []
