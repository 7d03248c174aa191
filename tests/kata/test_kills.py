"""Killed at any moment: ranks, their server, workers, the fork server. Nobody pays for it.

KATA_KILLS says how many of each kind; a few in CI.
"""

import os
import subprocess
import sys

KILLS = int(os.environ.get("KATA_KILLS", "6"))

SPEC = """
import torch, torch.distributed as dist

def add(ex, x):
    dist.all_reduce(x)
    return x

def double(ex, x):
    return 2 * x
"""

# A process of its own, since ranks are forked from one that has run nothing.
RANKS = """
import os, random, signal, sys, threading, time, torch
from pathlib import Path
from kata.attempt import outcome, wire
from kata.attempt.outcome import Job
from kata.attempt.ranks import Launch, RankServer

spec, kills, whom = sys.argv[1], int(sys.argv[2]), sys.argv[3]
server, choose = RankServer(), random.Random(0)
job = Job("", "add", wire.encode(((torch.ones(3),), {})), 0, 2)

def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

for n in range(kills):
    launch = Launch(job, spec, None, "/", limit=20.0)
    assert outcome.gravest(server.run(launch)) is None  # whoever was killed before, it goes on
    victims = children(server.pid) if whom == "rank" else [server.pid]
    os.kill(choose.choice(victims), signal.SIGKILL)
    time.sleep(choose.choice([0.0, 0.0, 0.001, 0.01]))
assert outcome.gravest(server.run(launch)) is None
server.close()
"""


def left(marker):
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if marker in line]


def kill(tmp_path, whom, kills):
    spec = tmp_path / "test_ex98_spec.py"
    spec.write_text(SPEC)
    (temporary := tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(spec), str(kills), whom],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [*temporary.glob("kata-*")]
    assert not left(str(spec))


def test_a_rank_that_is_killed_between_two_attempts_costs_nobody_anything(tmp_path):
    kill(tmp_path, "rank", KILLS)


def test_a_server_of_ranks_that_is_killed_is_started_anew(tmp_path):
    kill(tmp_path, "server", max(1, KILLS // 6))  # each takes seconds


WORKERS = """
import os, random, signal, sys, torch
from pathlib import Path
from kata.attempt import wire
from kata.attempt.outcome import Job
from kata.attempt.worker import ForkServer, Worker
from kata.course import catalog

root, kills = Path(sys.argv[1]), int(sys.argv[2])
exercise, choose = catalog.find(root, 5), random.Random(0)
job = Job("", "double", wire.encode(((torch.ones(3),), {})), 0)
for n in range(kills):
    worker = Worker(exercise, exercise.solution, root / "solutions")
    assert worker.perform(job)[0].problem is None
    server = ForkServer.start()
    if choose.random() < 0.2:
        os.kill(server.pid, signal.SIGKILL)
    else:
        os.kill(worker._forked.pid, signal.SIGKILL)
        done = worker.perform(job)[0]  # a worker that died has failed its attempt, and no other
        assert done.problem is None or done.problem.types == ["WorkerDied"]
    assert worker.perform(job)[0].problem is None
    worker.close()
"""


def test_workers_and_their_fork_server_may_be_killed(tmp_path):
    from small import make_project

    make_project(tmp_path)
    (temporary := tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert not [*temporary.glob("kata-*")]
