"""A learner's run is written down: by a plugin, or by whoever waited for the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.judge.child import Request
from kata.judge.report import Report
from kata.judge.session import Judge
from kata.learn import record
from kata.learn.entries import Entry


class Recorder:
    """The plugin that writes a learner's run into the record and into progress.md."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        option = self.judge.option
        if option.on != "exercises" or option.submission or self.judge.tell:
            return  # whoever waits for the run writes it down: it may yet be ended
        benches = self.judge.benches.values()
        root = next((bench.exercise.root for bench in benches), session.config.rootpath)
        for report in self.judge.reports:
            report.warnings += _write_down(root, report, option.parts)


def write_down(report: Report, request: Request) -> list[str]:
    """A run that this process waited for; the warnings say what was not written."""
    options = {option.partition("=")[0] for option in request.options}
    if request.submission or "--on" in options:
        return []
    parts = "exercises" if "exercises" in request.options else "solutions"
    return _write_down(Path(request.root), report, parts)


def _write_down(root: Path, report: Report, parts: str) -> list[str]:
    """What can't be written down (a full disk, a read-only checkout) keeps no verdict back."""
    entry = Entry.of(report, parts=parts)
    if entry is None:
        return []
    try:
        return record.record_run(root, entry)
    except OSError as error:
        return [f"the run was not written down: {record.reason(error)} ({record.RECORD})"]
