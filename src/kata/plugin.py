"""The pytest plugin: options, fixtures, and the record of attempts.

It acts on spec files (tests/test_exNN_slug.py) alone. Whoever wants the outcome as data (the
verdict, the warm server, proof) reads `config.stash[JUDGE].reports`: one Report an exercise.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import pytest
import torch

from kata import attempt as attempts
from kata import catalog, mistakes, progress, wire
from kata.attempt import Attempt, Attempted, Done, Run
from kata.mistakes import Variant
from kata.ranks import Job, RankServer
from kata.report import Detail, Report, SpecReport
from kata.testing import Mismatch, summary

KEEP_FROM = 0.005  # seconds: a replay of an attempt that took longer is kept on disk
WANTED = re.compile(
    r"Regex pattern did not match\.\s+Expected regex: (.*)\n\s+Actual message: (.*)"
)
OUTPUT_LIMIT = 4000  # characters of what a spec's run printed


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kata", "tensor-kata")

    def option(name: str, help: str, **more: Any) -> None:
        group.addoption(name, help=help, **more)

    floors = ("exercises", "solutions")
    option("--on", "which floor the specs judge", choices=floors, default="exercises")
    option("--submission", "judge this file instead", metavar="FILE")
    option("--parts", "whose earlier exercises are imported", choices=floors, default="solutions")
    option("--seed", "draw other inputs", type=int, default=0)
    option("--isolate", "run attempts in a worker process", action="store_true")
    option("--time-limit", "seconds for one spec", type=float, default=60.0)
    option("--naming-limit", "seconds to find the known mistake", type=float, default=10.0)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """What a sentence says of a parameter: `float32`, `2x3`, `n_heads=4`."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, (tuple, list)) and val and all(isinstance(n, int) for n in val):
        return "x".join(map(str, val))
    if isinstance(val, bytes):  # pytest leaves bytes as they are where ids are not escaped
        return ascii(val)[2:-1]
    if val is None or isinstance(val, (bool, int, float)):
        return f"{argname}={val}"
    return None


def prepare_environment() -> None:
    """What must be set before JAX or Triton is imported, wherever the specs are started from."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    # Counting GPUs through NVML leaves CUDA untouched, so that children may still be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX's katas shard over eight CPU devices


def pytest_configure(config: pytest.Config) -> None:
    prepare_environment()
    if not hasattr(config.option, "tbstyle"):  # nobody reads them then
        config.option.tbstyle = "native"
    config.stash[JUDGE] = Judge(config)
    config.pluginmanager.register(config.stash[JUDGE], "kata-judge")


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
        attempts.use_parts(self.parts)
        attempts.forbid(getattr(spec, "WITHOUT", ()))
        seed = crc32(f"{judge.option.seed} {exercise.stem}".encode())
        self.attempt = Attempt(self.perform, self.record, seed)

    def perform(
        self, run: Run, call: bytes, seed: int, ranks: int
    ) -> tuple[list[Done], BaseException | None]:
        """Attempt on the code under test."""
        if self.judge.option.isolate:
            from kata.worker import Worker

            self._worker = self._worker or Worker(self.exercise, self.path, self.parts)
            done = self._worker.perform(run.__name__, call, seed, ranks)
        elif ranks:
            done = self._on_ranks(self.path, run.__name__, call, seed, ranks)
        else:
            one, error = attempts.perform(run, self._module(self.path), call, seed)
            return [one], error
        problem = attempts.gravest(done)
        return done, attempts.rebuilt(problem) if problem else None

    def replay(self, variant: Variant | None, past: Attempted) -> list[Done]:
        """The same attempt on a known mistake, or on the reference."""
        if variant not in self._versions:
            self._versions[variant] = mistakes.write(self.exercise, variant)  # type: ignore[arg-type]
        path = self._versions[variant]
        if max(done.seconds for done in past.done) > KEEP_FROM or past.ranks:
            return self._kept(path, past)
        return self._again(path, past)

    def _again(self, path: Path, past: Attempted) -> list[Done]:
        if past.ranks:
            return self._on_ranks(path, past.run, past.call, past.seed, past.ranks)
        run = getattr(self.spec, past.run)
        return [attempts.perform(run, self._module(path), past.call, past.seed)[0]]

    def _kept(self, path: Path, past: Attempted) -> list[Done]:
        """From disk, if it was there before: a known mistake does the same every time."""
        digest = hashlib.sha256(past.call + repr((past.run, past.seed, past.ranks)).encode())
        for source in (path, self.exercise.spec, *sorted(self.parts.glob("ex*.py"))):
            digest.update(source.read_bytes())
        kept = self.exercise.root / ".cache" / "kata" / "replays" / digest.hexdigest()[:24]
        if kept.exists():
            return msgspec.msgpack.decode(kept.read_bytes(), type=list[Done])
        done = self._again(path, past)
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(msgspec.msgpack.encode(done))
        fresh.replace(kept)
        return done

    def recognise(self) -> None:
        """Name the known mistake that explains the failures, if there is one."""
        report = self.report
        failed = [spec.name for spec in report.specs if spec.status == "failed"]
        limit = self.judge.option.naming_limit
        if failed and limit > 0 and not report.count("unwritten"):
            attempts.forbid(getattr(self.spec, "WITHOUT", ()))  # other specs may have come since
            known = mistakes.load(self.exercise).mistake
            found = mistakes.recognise(known, self.record, failed, self.replay, limit)
            report.mistakes = [variant.says for variant in found]

    def close(self) -> None:
        if self._worker:
            self._worker.close()

    def _module(self, path: Path) -> Any:
        if path not in self._modules:
            self._modules[path] = attempts.load(path)
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
            spec.detail = _detail(bench, call.excinfo.value)
            if getattr(item.config.option, "tbstyle", "") == "auto":
                from kata.verdict import plain

                report.longrepr = plain(spec.detail)
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
        if self.option.on == "exercises" and not self.option.submission:
            for report in self.reports:
                self._record(report)

    def _record(self, report: Report) -> None:
        """A learner's run goes into the record and into progress.md."""
        root = next(iter(self.benches.values())).exercise.root if self.benches else Path.cwd()
        entry = progress.Entry.of(report, parts=self.option.parts)
        if entry is not None:
            report.warnings = progress.record_run(root, entry)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for report in self.reports:
            for says in report.mistakes:
                terminalreporter.write_line(f"{report.stem}: known mistake: {says}", yellow=True)


JUDGE = pytest.StashKey[Judge]()


def _detail(bench: Bench, error: BaseException) -> Detail:
    """Why a spec failed, out of what it raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    spec_file = str(bench.exercise.spec)
    problem = attempts.problem(error, {str(bench.path)})
    at = [f for f in attempts.frames(error) if f.file == spec_file]
    detail = Detail("raised", problem.message, frames=problem.frames)
    detail.where = f"{spec_file}:{at[-1].line}" if at else spec_file
    own = [past for past in bench.record if past.spec == bench.attempt.spec]
    if own:
        detail.call = _call(bench, own[-1])
        if len(own) > 1:  # which of them the judgement is about is not known
            detail.call += f", the last of {len(own)} calls"
    if isinstance(error, Mismatch):
        detail.kind, detail.message, detail.mismatch = "mismatch", error.sentence, error.detail
        detail.mismatch["cause"] = error.cause
    elif isinstance(error, pytest.fail.Exception):
        detail.kind = "no-raise" if "DID NOT RAISE" in problem.message else "assertion"
        detail.message = problem.message.replace("DID NOT RAISE", "expected an error:")
    elif wanted := WANTED.match(problem.message):
        detail.kind = "assertion"
        detail.message = f"the error should say {wanted[1]}, and says: {wanted[2]}"
    elif isinstance(error, attempts.Reached):
        detail.kind = "reached"
    elif isinstance(error, attempts.ArgumentChanged):
        detail.kind = "changed"
    elif isinstance(error, AssertionError) and not problem.frames:
        detail.kind = "assertion"
    elif isinstance(error, TimeoutError) and not isinstance(error, attempts.Elsewhere):
        detail.kind = "time"
    elif isinstance(error, wire.NotPlainData):
        detail.message = f"the result: {problem.message}"
    else:
        detail.message = f"{problem.types[0]}: {problem.message}"
    return detail


def _call(bench: Bench, past: Attempted) -> str:
    """The attempt as a call: `attend(q: float64[3, 4], mask: None)`."""
    import inspect

    args, kwargs = wire.decode(past.call)
    names = list(inspect.signature(getattr(bench.spec, past.run)).parameters)[1:]
    names += [""] * (len(args) - len(names))
    named = [*zip(names, args, strict=False), *kwargs.items()]
    shown = ", ".join(f"{n}: {summary(v, values=False)}" if n else summary(v) for n, v in named)
    ranks = f" on {past.ranks} ranks" if past.ranks else ""
    return f"{past.run}({shown}){ranks}"


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


# --- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attempt(request: pytest.FixtureRequest) -> Attempt:
    """Runs a function of the spec on the code under test: `attempt(run, *args)`."""
    return request.config.stash[JUDGE].bench(request.module).attempt


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch.Generator, fixed by the seed and the spec's name."""
    return torch.Generator().manual_seed(_seed(request))


@pytest.fixture
def np_rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A numpy.random.Generator, fixed by the seed and the spec's name."""
    return np.random.default_rng(_seed(request))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the specs of a kernel run: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> Any:
    """The solution's module, for what has no other oracle."""
    return attempts.load(request.config.stash[JUDGE].bench(request.module).exercise.solution)


def _seed(request: pytest.FixtureRequest) -> int:
    return crc32(f"{request.config.option.seed} {request.node.name}".encode())


@pytest.fixture(autouse=True)
def _mark_attempts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attempts made from here on belong to this spec."""
    if catalog.of_spec(request.path) is not None:
        request.config.stash[JUDGE].bench(request.module).attempt.begin(request.node.name)
    yield
