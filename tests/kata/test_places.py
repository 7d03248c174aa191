"""A verdict is the same wherever it was made: warm, cold, and in a worker that holds no answers."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kata import catalog, mistakes
from kata.report import Report
from kata.server import Job, WarmServer

ROOT = Path(__file__).parents[2]
EVERY = catalog.exercises(ROOT)
LIGHT = ["-m", "not weights and not train", "--naming-limit", "60"]

# A fresh process which never forks. Ranks must be forked before torch has run anything, so those
# exercises get a fresh process for each job.
COLD = """
import sys, msgspec
from kata.server import Job, judge
for line in sys.stdin.buffer:
    report = judge(msgspec.json.decode(line, type=Job))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\\n")
    sys.stdout.flush()
"""


def judged_cold(jobs: list[Job], together: bool) -> list[Report]:
    reports = []
    for some in [jobs] if together else [[job] for job in jobs]:
        lines = b"".join(msgspec.json.encode(job) + b"\n" for job in some)
        done = subprocess.run([sys.executable, "-c", COLD], input=lines, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        answers = [line for line in done.stdout.splitlines() if line.startswith(b'{"stem"')]
        reports += [msgspec.json.decode(line, type=Report) for line in answers]
    return reports


def essence(report: Report) -> object:
    """All of a verdict but what it took."""
    specs = [
        (
            spec.name,
            spec.status,
            spec.detail and (spec.detail.kind, spec.detail.call, spec.detail.where),
        )
        for spec in report.specs
    ]
    return report.stem, report.state, report.mistakes, specs, report.error


@pytest.fixture(scope="module")
def server():
    warm = WarmServer(EVERY[0])
    yield warm
    warm.close()


@pytest.mark.parametrize("exercise", EVERY, ids=lambda e: e.stem)
def test_warm_and_cold_verdicts_are_equal(exercise, server):
    wrong = mistakes.load(exercise).mistake
    paths = [exercise.solution, exercise.stub, *(mistakes.write(exercise, m) for m in wrong)]
    jobs = [Job(str(ROOT), exercise.stem, str(path), LIGHT) for path in paths]

    server.prepare(exercise)
    warm = []
    for job in jobs:
        server.run(job)
        warm.append(server.receive())
    cold = judged_cold(jobs, together="multiprocess" not in exercise.suites)

    assert [r.state for r in warm[:2]] == ["passed", "unwritten"]
    assert [essence(r) for r in warm] == [essence(r) for r in cold]


@pytest.mark.parametrize("exercise", EVERY, ids=lambda e: e.stem)
def test_every_spec_passes_in_a_worker_that_holds_no_answers(exercise):
    job = Job(str(ROOT), exercise.stem, str(exercise.solution), ["--isolate"])

    (report,) = judged_cold([job], together=True)

    assert report.state == "passed", [s for s in report.specs if s.status == "failed"]
