"""What an attempt leaves changed in global state fails it, in every exercise and in every place."""

import time
import types

import numpy as np
import pytest
import torch

from kata.attempt import invariants, wire
from kata.attempt.performing import perform


def call(ex):
    return ex()


def attempt(code):
    """An attempt on this code, which stands in another module than the spec."""
    elsewhere = types.FunctionType(code.__code__, dict(globals()))
    done, _ = perform(call, elsewhere, wire.encode(((), {})), 7)
    return done


LEAVES = {
    "gradient mode changed": lambda: torch.set_grad_enabled(False) and None,
    "the default dtype changed": lambda: torch.set_default_dtype(torch.float64),
    "the number of threads changed": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic algorithms changed": lambda: torch.use_deterministic_algorithms(True),
    "the limit of nested calls changed": lambda: invariants.sys.setrecursionlimit(9999),
    "autocast on the CPU changed": lambda: torch.set_autocast_enabled("cpu", True),
    "the precision of float32 products changed": lambda: torch.set_float32_matmul_precision(
        "medium"
    ),
    "np.seterr changed": lambda: np.seterr(all="raise") and None,
    "the global generator of torch seeded": lambda: torch.manual_seed(0) and None,
    "the global generator of NumPy seeded": lambda: np.random.seed(0),
    "the global generator of Python's random seeded": lambda: invariants.random.seed(0),
}


@pytest.mark.parametrize("what", LEAVES)
def test_what_is_left_changed_is_told_and_put_back(what):
    before = [read() for _, read, _ in invariants.STATES]

    assert attempt(LEAVES[what]).left == [what]
    assert [read() for _, read, _ in invariants.STATES] == before
    assert attempt(lambda: None).left == []


def test_it_is_told_of_an_attempt_that_raises_too():
    def code():
        torch.set_grad_enabled(False)
        raise ValueError("wrong")

    assert attempt(code).left == ["gradient mode changed"]


def uses():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), np.errstate(all="ignore"):
        torch.rand(2), np.random.rand(2000), invariants.random.random()
    with torch.random.fork_rng():
        torch.rand(3)
    torch.set_rng_state(torch.Generator().manual_seed(9).get_state())  # as a checkpoint does
    torch.Generator().manual_seed(3), np.random.default_rng(3), invariants.random.Random(3)


def test_drawing_and_what_is_put_back_is_no_fault():
    assert attempt(uses).left == []


def seeds(ex):
    torch.manual_seed(1), np.random.seed(1)
    return torch.rand(1)


def test_a_spec_may_seed_in_its_own_functions():
    done, _ = perform(seeds, None, wire.encode(((), {})), 7)

    assert done.left == []


def test_the_generators_are_as_they_were():
    torch.manual_seed(5), np.random.seed(5), invariants.random.seed(5)
    expected = torch.rand(1), np.random.rand(1), invariants.random.random()
    torch.manual_seed(5), np.random.seed(5), invariants.random.seed(5)

    attempt(LEAVES["the global generator of torch seeded"])
    attempt(LEAVES["the global generator of NumPy seeded"])

    assert (torch.rand(1), np.random.rand(1), invariants.random.random()) == expected


def test_it_costs_next_to_nothing():
    """Less than 0.2 ms an attempt; the best of many, as other work may run beside."""
    best = 1.0
    for _ in range(200):
        start = time.perf_counter()
        with invariants.kept(3, {}):
            pass
        best = min(best, time.perf_counter() - start)
    assert best < 0.0004
