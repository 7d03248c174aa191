"""A verdict is the same wherever it was made: warm, cold, and in a worker that holds no answers."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import msgspec
import pytest

from kata.author import proof
from kata.course import catalog
from kata.judge.child import Request
from kata.judge.report import Report
from kata.judge.server import WarmServer

ROOT = Path(__file__).parents[2]
EVERY = catalog.exercises(ROOT)

# A fresh process that judges one after the other without a fork; only ranks come from one that it
# began with.
COLD = """
import sys, msgspec
from kata.attempt.ranks import RankServer
from kata.judge.child import Request, judge
RankServer.current = RankServer()
for line in sys.stdin.buffer:
    report = judge(msgspec.json.decode(line, type=Request))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\\n")
    sys.stdout.flush()
"""


def judged_cold(jobs: list[Request]) -> list[Report]:
    lines = b"".join(msgspec.json.encode(job) + b"\n" for job in jobs)
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # two at a time
    command = [sys.executable, "-c", COLD]
    done = subprocess.run(command, input=lines, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answers = [line for line in done.stdout.splitlines() if line.startswith(b'{"type":"Report"')]
    return [msgspec.json.decode(line, type=Report) for line in answers]


def jobs_of(exercise: catalog.Exercise) -> list[Request]:
    """The stub and the mistakes (KATA_MOST of them); the reference is judged in a worker, below."""
    claims = proof.claims(exercise, seed=0, most=int(os.environ.get("KATA_MOST", "1")))
    return [claim.job for claim in claims if claim.says.startswith(("the stub", "rejects"))]


def made_anew(job: Request) -> Request:
    """The same job, for one that recalls nothing of what the proof has judged."""
    return msgspec.structs.replace(job, options=job.options[:2] + job.options[4:])


def in_two_processes(jobs: dict[str, list[Request]]) -> dict[str, list[Report]]:
    """Verdicts by exercise, made in two cold processes, each with every second exercise."""
    halves = [{stem: jobs[stem] for stem in sorted(jobs)[i::2]} for i in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda half: judged_cold([*chain(*half.values())]), halves))
    return {
        stem: [report for report in reports if report.stem == stem]
        for half, reports in zip(halves, told, strict=True)
        for stem in half
    }


@pytest.fixture(scope="module")
def cold():
    """What cold processes say of the stubs and mistakes."""
    return in_two_processes({e.stem: [made_anew(job) for job in jobs_of(e)] for e in EVERY})


@pytest.fixture(scope="module")
def server():
    """The server of watch, which has imported more with every exercise."""
    server = WarmServer(Request(str(ROOT), EVERY[0].stem))
    yield server
    server.close()


@pytest.fixture(scope="module")
def isolated():
    """What is said of the references, judged in workers."""
    options = ["--isolate", "-m", "not train"]  # training is the same anywhere, and takes seconds
    return in_two_processes(
        {e.stem: [Request(str(ROOT), e.stem, str(e.solution), options)] for e in EVERY}
    )


def essence(report: Report) -> object:
    """All of a verdict but the time that it took."""
    specs = [
        (s.name, s.status, s.detail and (s.detail.kind, s.detail.call, s.detail.where))
        for s in report.specs
    ]
    return report.stem, report.state, report.mistakes, specs, report.error


@pytest.mark.parametrize("exercise", EVERY, ids=lambda e: e.stem)
def test_warm_and_cold_verdicts_are_equal(exercise, cold, server):
    """Warm: by the proof's forked children, if it has run on these files; else by a server."""
    warm = [proof.kept(job) or server.judge(made_anew(job)) for job in jobs_of(exercise)]

    assert warm[0].state == "unwritten"
    assert {report.state for report in warm[1:]} == {"failed"}
    assert [essence(r) for r in cold[exercise.stem]] == [essence(r) for r in warm]


@pytest.mark.parametrize("exercise", EVERY, ids=lambda e: e.stem)
def test_every_spec_passes_in_a_worker_that_holds_no_answers(exercise, isolated):
    (report,) = isolated[exercise.stem]

    assert report.state == "passed", [s for s in report.specs if s.status == "failed"]


def test_the_server_of_watch_says_the_same_as_a_cold_process(server, cold):
    exercise = catalog.find(ROOT, 31)
    warm = [server.judge(made_anew(job)) for job in jobs_of(exercise)]

    assert [essence(r) for r in warm] == [essence(r) for r in cold[exercise.stem]]
