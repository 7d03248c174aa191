"""Ranks that fail, die or wait for each other, and what is said of them."""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kata.course import catalog

ROOT = Path(__file__).parents[2]

SPEC = """
import os
import torch
import torch.distributed as dist

def total(ex, x):
    mine = x * (dist.get_rank() + 1)
    dist.all_reduce(mine)
    return mine

def in_halves(ex, x):
    n, rank = dist.get_world_size(), dist.get_rank()
    halves = [dist.new_group(range(n // 2)), dist.new_group(range(n // 2, n))]
    mine = x * (rank + 1)
    dist.all_reduce(mine, group=halves[rank >= n // 2])
    return mine[0]

def one_hangs(ex, x):
    if dist.get_rank() == 1:
        dist.all_reduce(x)
    else:
        dist.recv(x, 1)

def one_dies(ex, x):
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(x)

def one_raises(ex, x):
    if dist.get_rank() == 1:
        raise ValueError("a bad shard")
    dist.all_reduce(x)

def all_raise(ex, x):
    raise KeyError("everywhere")

def pids(ex, x):
    return os.getpid(), os.getppid()
"""

# Ranks are forked from a process that has run nothing, so each of these needs a fresh one.
SCRIPT = """
import sys, torch
from kata.attempt import outcome, wire
from kata.attempt.outcome import Job
from kata.attempt.ranks import Launch, RankServer
server = RankServer()
call = wire.encode(((torch.ones(3),), {}))
for each in sys.argv[2:]:
    run, n = each.split(":")
    done = server.run(Launch(Job("", run, call, 0, int(n)), sys.argv[1], None, "/", limit=20.0))
    problem = outcome.gravest(done)
    if problem is None:
        print(each, [wire.decode(d.result) for d in done])
    else:
        print(each, problem.types[0], problem.rank, problem.message)
server.close()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What is said of each run, by name and number of ranks if it isn't 3."""
    spec = tmp_path_factory.mktemp("ranks") / "test_ex72_ranks.py"
    spec.write_text(SPEC)
    runs = [f"in_halves:{n}" for n in (2, 4, 3, 2, 4)]  # by ranks that were in other groups
    runs += [f"{name}:3" for name in re.findall(r"def (\w+)\(ex", SPEC)]
    command = [sys.executable, "-c", SCRIPT, str(spec), *runs]
    start = time.monotonic()
    out = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    told = dict(line.replace(":3 ", " ", 1).split(" ", 1) for line in out.splitlines())
    return told | {"seconds": time.monotonic() - start}


def test_each_rank_gives_its_result(told):
    assert told["total"].count("tensor([6., 6., 6.])") == 3


def test_teams_of_any_size_share_their_ranks(told):
    assert told["in_halves:2"] == "[tensor(1.), tensor(2.)]"
    assert told["in_halves:4"] == "[tensor(3.), tensor(3.), tensor(7.), tensor(7.)]"
    assert told["in_halves"] == "[tensor(1.), tensor(5.), tensor(5.)]"


def test_ranks_that_wait_for_each_other_are_ended_and_their_lines_named(told):
    assert told["one_hangs"].startswith("RankWaits")
    assert re.search(
        r"rank \d waits in (recv|all_reduce), test_ex72_ranks.py:\d+", told["one_hangs"]
    )
    assert "the ranks wait for each other" in told["one_hangs"]
    assert told["seconds"] < 60


def test_a_rank_that_dies_is_named(told):
    assert told["one_dies"].startswith("RankDied 1 rank 1 left with status 3")


def test_a_rank_that_raises_is_the_problem_and_not_those_that_wait_for_it(told):
    assert told["one_raises"] == "ValueError 1 a bad shard"


def test_an_error_on_all_ranks_is_that_error(told):
    assert told["all_raise"].startswith("KeyError")


def test_no_rank_is_left_behind(told):
    for pid in re.findall(r"\d+", told["pids"]):
        assert not os.path.exists(f"/proc/{pid}"), f"process {pid} is still there"


@pytest.mark.parametrize("number", [58, 72, 75, 76])
def test_the_lessons_script_runs_under_torchrun(number, tmp_path):
    lesson = catalog.find(ROOT, number).lesson.read_text("utf-8")
    script = re.search(r"```python\n(# run\.py.*?)```", lesson, re.S)
    (tmp_path / "run.py").write_text(textwrap.dedent(script[1]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "run.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "solutions"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
