"""The pytest plugin that writes a learner's run down."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.judge.session import Judge
from kata.learn.record import Entry, record_run


class Recorder:
    """The plugin that writes a learner's run into the record and into progress.md."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        option = self.judge.option
        if option.on != "exercises" or option.submission:
            return
        benches = self.judge.benches.values()
        root = next((bench.exercise.root for bench in benches), Path.cwd())
        for report in self.judge.reports:
            entry = Entry.of(report, parts=option.parts)
            if entry is not None:
                report.warnings = record_run(root, entry)
