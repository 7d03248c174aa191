"""One pytest session: a bench for each exercise, and the hooks that judge it."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest

from kata.attempt import forbidden, modules, outcome
from kata.attempt.outcome import Attempted, Done
from kata.attempt.performing import Run, perform
from kata.attempt.ranks import Job, RankServer
from kata.attempt.seam import Attempt
from kata.course import cache, catalog, variants
from kata.course.variants import Variant
from kata.judge import naming
from kata.judge.detail import detail_of
from kata.judge.report import Detail, Report, SpecReport

KEEP_FROM = 0.005  # seconds: a replay of an attempt that took longer is kept on disk
OUTPUT_LIMIT = 4000  # characters of what a spec's run printed


class Bench:
    """One exercise under judgement: its module, loaded when first attempted, and the record."""

    def __init__(self, judge: Judge, exercise: catalog.Exercise, spec: Any) -> None:
        self.judge, self.exercise, self.spec = judge, exercise, spec
        floor = exercise.stub if judge.option.on == "exercises" else exercise.solution
        submission = judge.option.submission
        self.path = Path(submission).resolve() if submission else floor
        self.parts = exercise.root / judge.option.parts
        self.record: list[Attempted] = []
        self.report = Report(exercise.stem, str(self.path))
        self._modules: dict[Path, Any] = {}
        self._versions: dict[Variant | None, Path] = {None: exercise.solution}
        self._worker: Any = None
        modules.use_parts(self.parts)
        forbidden.forbid(getattr(spec, "WITHOUT", ()))
        seed = crc32(f"{judge.option.seed} {exercise.stem}".encode())
        self.attempt = Attempt(self.perform, self.record, seed)

    def perform(
        self, run: Run, call: bytes, seed: int, ranks: int
    ) -> tuple[list[Done], BaseException | None]:
        """Attempt on the code under test."""
        if self.judge.option.isolate:
            from kata.attempt.worker import Worker

            self._worker = self._worker or Worker(self.exercise, self.path, self.parts)
            done = self._worker.perform(run.__name__, call, seed, ranks)
        elif ranks:
            done = self._on_ranks(self.path, run.__name__, call, seed, ranks)
        else:
            one, error = perform(run, self._module(self.path), call, seed)
            return [one], error
        problem = outcome.gravest(done)
        return done, outcome.rebuilt(problem) if problem else None

    def replay(self, variant: Variant | None, past: Attempted) -> list[Done]:
        """The same attempt on a known mistake, or on the reference."""
        if variant not in self._versions:
            self._versions[variant] = variants.write(self.exercise, variant)  # type: ignore[arg-type]
        path = self._versions[variant]
        if max(done.seconds for done in past.done) > KEEP_FROM or past.ranks:
            return self._kept(path, past)
        return self._again(path, past)

    def _again(self, path: Path, past: Attempted) -> list[Done]:
        if past.ranks:
            return self._on_ranks(path, past.run, past.call, past.seed, past.ranks)
        run = getattr(self.spec, past.run)
        return [perform(run, self._module(path), past.call, past.seed)[0]]

    def _kept(self, path: Path, past: Attempted) -> list[Done]:
        """From disk, if it was there before: a known mistake does the same every time."""
        digest = hashlib.sha256(past.call + repr((past.run, past.seed, past.ranks)).encode())
        for source in (path, self.exercise.spec, *sorted(self.parts.glob("ex*.py"))):
            digest.update(source.read_bytes())
        kept = cache.folder(self.exercise.root, "replays") / digest.hexdigest()[:24]
        if kept.exists():
            return msgspec.msgpack.decode(kept.read_bytes(), type=list[Done])
        done = self._again(path, past)
        with suppress(OSError):  # no room: it is replayed again next time
            cache.write(kept, msgspec.msgpack.encode(done))
        return done

    def recognise(self) -> None:
        """Name the known mistake that explains the failures, if there is one."""
        report = self.report
        failed = [spec.name for spec in report.specs if spec.status == "failed"]
        limit = self.judge.option.naming_limit
        if failed and limit > 0 and not report.count("unwritten"):
            forbidden.forbid(getattr(self.spec, "WITHOUT", ()))  # other specs may have come since
            known = variants.load(self.exercise).mistake
            try:
                found = naming.recognise(known, self.record, failed, self.replay, limit)
            except OSError:  # no room to write a known mistake down
                found = []
            for spec in report.specs:
                if spec.status == "failed":
                    spec.mistakes = [variant.says for variant in found]

    def close(self) -> None:
        if self._worker:
            self._worker.close()

    def _module(self, path: Path) -> Any:
        if path not in self._modules:
            self._modules[path] = modules.load(path)
        return self._modules[path]

    def _on_ranks(self, path: Path, run: str, call: bytes, seed: int, n: int) -> list[Done]:
        spec, parts = str(self.exercise.spec), str(self.parts)
        return self.judge.rank_server.run(Job(n, spec, str(path), parts, run, call, seed))


class Judge:
    """The plugin's hooks and state for one pytest session."""

    def __init__(self, config: pytest.Config) -> None:
        self.option = config.option
        self.benches: dict[Path, Bench] = {}
        self.broken: list[Report] = []
        self.explain: Callable[[Detail], str] = lambda detail: detail.message
        self._rank_server: RankServer | None = None
        self._asked: dict[Path, set[str]] = {}

    @property
    def reports(self) -> list[Report]:
        return [*self.broken, *(bench.report for bench in self.benches.values())]

    @property
    def rank_server(self) -> RankServer:
        if self._rank_server is None:
            raise RuntimeError("a spec that uses attempt.ranks needs the mark multiprocess")
        return self._rank_server

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
            detail = Detail("error", message, where=report.nodeid)
            self.broken.append(Report(exercise.stem, "", error=detail))

    def pytest_pycollect_makemodule(self, module_path: Path) -> None:
        """Before a spec file is imported, since `@settings` takes the rest from the profile."""
        if catalog.of_spec(module_path) and b"hypothesis" in module_path.read_bytes():
            _settle_hypothesis(self.option.seed)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._asked.setdefault(item.path, set()).add(getattr(item, "originalname", item.name))
        # The one moment at which ranks can be forked: all is imported, nothing has run.
        if any(item.get_closest_marker("multiprocess") for item in session.items):
            self._rank_server = RankServer.current or RankServer()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Models are trained, and real weights read, once all that is quick to judge has passed."""
        slow = any(item.get_closest_marker(mark) for mark in ("train", "weights"))
        if slow and catalog.of_spec(item.path):
            report = self.bench(item.module).report  # type: ignore[attr-defined]
            if report.count("failed") + report.count("unwritten"):
                pytest.skip("this takes seconds: once the other specs pass")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """A spec that runs past its time fails, and the others go on."""
        limit = self.option.time_limit * (2 if item.get_closest_marker("train") else 1)
        if catalog.of_spec(item.path) is None or limit <= 0:
            return (yield)

        def out_of_time(*_: Any) -> None:
            raise TimeoutError(f"not done after {limit:g} s")

        before = signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if catalog.of_spec(item.path) is None or (call.when != "call" and report.passed):
            return report
        bench = self.bench(item.module)  # type: ignore[attr-defined]
        spec = SpecReport(item.name, report.outcome, call.duration)
        spec.output = report.capstdout[-OUTPUT_LIMIT:]
        if report.skipped:
            spec.reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            spec.reason = spec.reason.removeprefix("Skipped: ")
        elif bench.attempt.unwritten:
            spec.status = "unwritten"
            report.outcome, report.longrepr = "failed", bench.attempt.unwritten
        elif call.excinfo is not None:
            spec.detail = detail_of(bench, call.excinfo.value)
            if getattr(item.config.option, "tbstyle", "") == "auto":
                report.longrepr = self.explain(spec.detail)
        bench.report.specs.append(spec)
        bench.report.seconds += call.duration
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        for bench in self.benches.values():
            start = time.perf_counter()
            bench.recognise()
            bench.report.seconds += time.perf_counter() - start
            bench.close()
        if self._rank_server and self._rank_server is not RankServer.current:
            self._rank_server.close()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for report in self.reports:
            for says in report.mistakes:
                terminalreporter.write_line(f"{report.stem}: known mistake: {says}", yellow=True)


JUDGE = pytest.StashKey[Judge]()


def _settle_hypothesis(seed: int) -> None:
    """The same examples at every run for a learner; others, but repeatable, under another seed."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, core

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
