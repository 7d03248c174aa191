"""One pytest session: a bench for each exercise, and the hooks that judge it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from kata.attempt.outcome import Done
from kata.attempt.ranks import Launch, RankServer
from kata.course import cache, catalog
from kata.judge import absent
from kata.judge.bench import Bench
from kata.judge.detail import detail_of
from kata.judge.junit import write_mistakes
from kata.judge.limits import SETTING_UP, alarm, disarm, limit_of
from kata.judge.report import Detail, Report, SpecReport, Starts

OUTPUT_LIMIT = 4000  # characters of what a spec's run printed


class Judge:
    """The plugin's hooks and state for one pytest session.

    `tell`: whoever waits for this process hears which spec starts and how it went; None: nobody
    waits.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.option = config.option
        self.benches: dict[Path, Bench] = {}
        self.broken: list[Report] = []
        self.explain: Callable[[Detail], str] = lambda detail: detail.message
        self.tell: Callable[[Starts | SpecReport], None] | None = None
        self._stderr = os.dup(2)  # pytest captures nothing yet
        self.rank_server: RankServer | None = None
        self._asked: dict[Path, set[str]] = {}
        self._ended: dict[Path, str] = {}  # why the other specs of a file are not tried

    @property
    def reports(self) -> list[Report]:
        return [*self.broken, *(bench.report for bench in self.benches.values())]

    def launch(self, launch: Launch) -> list[Done]:
        """Attempt on ranks."""
        if self.rank_server is None:
            raise RuntimeError("a spec that uses attempt.ranks needs the mark multiprocess")
        return self.rank_server.run(launch)

    def bench(self, module: Any) -> Bench:
        path = Path(module.__file__)
        if path not in self.benches:
            exercise = catalog.of_spec(path)
            if exercise is None:
                raise pytest.UsageError(f"{path.name} is not a spec file (tests/test_exNN_slug.py)")
            self.benches[path] = Bench(self, exercise, module)
            every = {name for name in vars(module) if name.startswith("test_")}
            self.benches[path].report.complete = every <= self._asked.get(path, set())
        return self.benches[path]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        exercise = catalog.of_spec(Path(report.nodeid))
        if report.failed and exercise and "::" not in report.nodeid:
            lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
            message = next((line[2:] for line in lines if line.startswith("E ")), lines[-1]).strip()
            message = absent.plainly(message, exercise.root)
            detail = Detail("error", message, where=report.nodeid)
            self.broken.append(Report(exercise.stem, "", error=detail))

    def pytest_pycollect_makemodule(self, module_path: Path) -> None:
        """Before a spec file is imported, since `@settings` takes the rest from the profile."""
        if catalog.of_spec(module_path) and b"hypothesis" in module_path.read_bytes():
            _settle_hypothesis(self.option.seed, module_path.parent.parent)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._asked.setdefault(item.path, set()).add(getattr(item, "originalname", item.name))
        # The one moment at which ranks can be forked: all is imported, nothing has run.
        if any(item.get_closest_marker("multiprocess") for item in session.items):
            self.rank_server = RankServer.current or RankServer()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if catalog.of_spec(item.path) is None:
            return
        if why := self._ended.get(item.path):
            pytest.skip(why)
        # Models are trained, and real weights read, once all that is quick to judge has passed.
        if any(item.get_closest_marker(mark) for mark in ("train", "weights")):
            report = self.bench(item.module).report  # type: ignore[attr-defined]
            if report.count("failed") + report.count("unwritten"):
                pytest.skip("runs once the other specs pass: it takes seconds")
        if self.tell:
            self.tell(Starts(item.name, SETTING_UP))
        self.bench(item.module).place.prepare()  # type: ignore[attr-defined]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """A spec that runs past its time fails, and ends the run of its file."""
        if catalog.of_spec(item.path) is None:
            return (yield)
        bench, limit = self.bench(item.module), limit_of(item, self.option.time_limit)  # type: ignore[attr-defined]
        if self.tell:
            self.tell(Starts(item.name, limit))
        stderr = None if self.tell else self._stderr
        with alarm(limit, bench.place.computed, stderr), bench.noting_first_failure(item):
            bench.look()
            if bench.report.error:
                pytest.fail(bench.report.error.message, pytrace=False)
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if catalog.of_spec(item.path) is None or (call.when != "call" and report.passed):
            return report
        bench = self.bench(item.module)  # type: ignore[attr-defined]
        if hasattr(report, "wasxfail"):  # no spec of ours is expected to fail
            report.outcome = "failed"
            del report.wasxfail
        spec = SpecReport(item.name, report.outcome, call.duration)
        spec.output = report.capstdout[-OUTPUT_LIMIT:]
        spec.limit = limit_of(item, self.option.time_limit)
        if report.skipped:
            spec.reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            spec.reason = spec.reason.removeprefix("Skipped: ")
            if item.path in self._ended:
                spec.status = "untried"
        elif bench.report.error:
            spec.status = "untried"
            report.longrepr = self.explain(bench.report.error)
            self._ended[item.path] = f"not tried: {bench.path.name} can't be read"
        elif bench.attempt.unwritten:
            spec.status = "unwritten"
            report.outcome, report.longrepr = "failed", bench.attempt.unwritten
        elif call.excinfo is not None:
            spec.detail = detail_of(bench, call.excinfo.value)
            if spec.detail.kind == "time":
                self._ended[item.path] = f"not tried: {spec.sentence} was {spec.detail.message}"
            if getattr(item.config.option, "tbstyle", "") == "auto":
                report.longrepr = self.explain(spec.detail)
        bench.report.specs.append(spec)
        bench.report.seconds += call.duration
        if self.tell:
            self.tell(spec)
        return report

    def pytest_enter_pdb(self) -> None:
        """Whoever looks around may take any time."""
        disarm()
        if self.tell:
            self.tell(Starts("", 0.0))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for bench in self.benches.values():
            start = time.perf_counter()
            bench.recognise()
            if self.option.fill_atlas:
                bench.fill_atlas()
            bench.report.seconds += time.perf_counter() - start
            bench.close()
        write_mistakes(session.config, self.reports)
        if self.rank_server and self.rank_server is not RankServer.current:
            self.rank_server.close()
        os.close(self._stderr)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for report in self.reports:
            for spec in report.specs:
                for says in spec.mistakes:
                    line = f"{report.stem}: {spec.sentence}: known mistake: {says}"
                    terminalreporter.write_line(line, yellow=True)


JUDGE = pytest.StashKey[Judge]()


def _settle_hypothesis(seed: int, root: Path) -> None:
    """The same examples at every run for a learner; others, but repeatable, under another seed."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, configuration, core
    from hypothesis.internal.conjecture import providers

    # Not in the folder where somebody happens to stand.
    configuration.set_hypothesis_home_dir(cache.folder(root, "hypothesis"))
    hypothesis.settings.register_profile(
        "kata",
        database=None,
        deadline=None,
        derandomize=seed == 0,
        max_examples=25,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining costs seconds
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    hypothesis.settings.load_profile("kata")
    core.global_force_seed = seed or None  # type: ignore[assignment]
    # It also draws from the constants of all local modules that happen to be loaded, so that a
    # verdict would hang on which exercises this process has seen, and on the learner's own numbers.
    none = providers.Constants()  # type: ignore[attr-defined]
    providers._get_local_constants = lambda: none
    providers.CONSTANTS_CACHE.cache.clear()  # of what ran before, to warm up
