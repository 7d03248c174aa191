"""Exercise 72 on four ranks: an attempt on ranks that are there, beside `torchrun`.

`torchrun` runs this very file, on the same module and the same numbers.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kata.attempt import modules, wire
from kata.attempt.outcome import Job
from kata.attempt.ranks import Launch, RankServer
from kata.racing import Race

N_RANKS, N_LAYERS = 4, 4
D_MODEL, D_FF = 64, 256


def forward(ex: Any) -> None:
    """Through the MLP a few times, each of which takes one all-reduce."""
    x, up, down = torch.ones(8, D_MODEL), torch.ones(D_FF, D_MODEL), torch.ones(D_MODEL, D_FF)
    mlp = ex.TensorParallelMLP(up / D_MODEL, None, down / D_FF, None)
    with torch.no_grad():
        for _ in range(N_LAYERS):
            x = mlp(x)


def race(ex: Any) -> Iterator[Race]:
    """The ranks' server is forked first: nothing has run in torch yet."""
    server = RankServer()
    parts = str(Path(ex.__file__).parent)
    job = Job("", "forward", wire.encode(((), {})), 0, N_RANKS)
    launch = Launch(job, __file__, ex.__file__, parts)

    def attempt() -> None:
        problems = [done.problem for done in server.run(launch) if done.problem]
        if problems:
            raise RuntimeError(problems[0].message)

    def torchrun() -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(N_RANKS)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, __file__, ex.__file__], env=env, capture_output=True)
        done.check_returncode()

    try:
        yield Race("an attempt on four ranks", attempt, {"`torchrun`": torchrun})
    finally:
        server.close()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    forward(modules.load(Path(sys.argv[1])))
    dist.destroy_process_group()
