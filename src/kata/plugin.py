"""What pytest loads: options, fixtures, and the wings that act on a run of spec files.

It acts on spec files (tests/test_exNN_slug.py) alone. Whoever wants the outcome as data (the
verdict, the warm server, proof) reads `config.stash[JUDGE].reports`: one Report an exercise.

PYTEST_DONT_REWRITE: a process that judges has imported this module before pytest asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch

from kata.attempt import modules
from kata.attempt.seam import Attempt
from kata.attempt.warm import prepare_environment
from kata.course import catalog
from kata.judge.recall import Recall
from kata.judge.session import JUDGE, Judge
from kata.judge.submission import refusal
from kata.learn.explain import plain
from kata.learn.recorder import Recorder


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
    option("--time-limit", "seconds for one spec, 0: none", type=float, default=-1.0)
    kept = ("run", "mistakes")
    option("--fill-atlas", "keep what this run did, or all known mistakes", choices=kept)


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


def pytest_configure(config: pytest.Config) -> None:
    prepare_environment()
    submission = config.option.submission
    if submission and (why := refusal(Path(submission).absolute())):
        raise pytest.UsageError(why)
    if not hasattr(config.option, "tbstyle"):  # nobody reads them then
        config.option.tbstyle = "native"
    config.stash[JUDGE] = Judge(config)
    config.stash[JUDGE].explain = plain
    config.pluginmanager.register(config.stash[JUDGE], "kata-judge")
    if config.option.fill_atlas:
        config.pluginmanager.register(Recall(config.stash[JUDGE]), "kata-recall")
    config.pluginmanager.register(Recorder(config.stash[JUDGE]), "kata-recorder")


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
    return modules.load(request.config.stash[JUDGE].bench(request.module).exercise.solution)


def _seed(request: pytest.FixtureRequest) -> int:
    return crc32(f"{request.config.option.seed} {request.node.name}".encode())


@pytest.fixture(autouse=True)
def _mark_attempts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attempts made from here on belong to this spec."""
    if catalog.of_spec(request.path) is not None:
        request.config.stash[JUDGE].bench(request.module).attempt.begin(request.node.name)
    yield
