"""The pytest plugin that writes a learner's run down."""

from __future__ import annotations

import pytest

from kata.judge.session import Judge
from kata.learn import record
from kata.learn.entries import Entry


class Recorder:
    """The plugin that writes a learner's run into the record and into progress.md."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """What can't be written down (a full disk, a read-only checkout) keeps no verdict back."""
        option = self.judge.option
        if option.on != "exercises" or option.submission:
            return
        benches = self.judge.benches.values()
        root = next((bench.exercise.root for bench in benches), session.config.rootpath)
        for report in self.judge.reports:
            entry = Entry.of(report, parts=option.parts)
            if entry is None:
                continue
            try:
                report.warnings += record.record_run(root, entry)
            except OSError as error:
                why = record.reason(error)
                report.warnings.append(f"the run was not written down: {why} ({record.RECORD})")
