"""Specs for exercise 01: softmax."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

FUNCTIONS = ("softmax", "logsumexp", "log_softmax")

WITHOUT = [
    f"{place}.{name}"
    for place in ("torch", "torch.Tensor", "torch.special", "torch.nn.functional", "scipy.special")
    for name in FUNCTIONS
]


def softmax(ex, x, axis):
    return ex.softmax(x, axis=axis)


def logsumexp(ex, x, axis):
    return ex.logsumexp(x, axis=axis)


def log_softmax(ex, x, axis):
    return ex.log_softmax(x, axis=axis)


def without_axis(ex, function, x):
    return getattr(ex, function)(x)


def all_three(ex, x, axis):
    return {name: getattr(ex, name)(x, axis=axis) for name in FUNCTIONS}


def all_three_of_each(ex, arrays, axis):
    return [all_three(ex, x, axis) for x in arrays]


def of_one_row(ex, x):
    """As arrays: a single number counts as one, in whatever form it comes."""
    return {name: np.asarray(out) for name, out in all_three(ex, x, -1).items()}


def oracle(function, x, axis):
    """Torch's function of that name, in float64."""
    x = torch.from_numpy(x.astype(np.float64))
    return getattr(torch, function)(x, axis).numpy()


def large_scores(np_rng):
    """Rows that lie far apart. In the last one the scores do so too."""
    x = np_rng.normal(size=(4, 3)) + np.array([[0.0], [1e3], [-1e3], [0.0]])
    x[3] = -1000, 2000, 1999
    return x


axes = st.integers(0, 2)
shifts = st.floats(-1e4, 1e4)
seeds = st.integers(0, 999)


def test_softmax_shares_one_in_the_ratio_of_the_exponentials(attempt):
    x = np.log([1.0, 2.0, 3.0])  # so that exp gives 1, 2 and 3, six in all

    out = attempt(softmax, x, 0)

    assert_close(out, np.array([1 / 6, 2 / 6, 3 / 6]))


def test_softmax_works_along_any_axis(attempt, np_rng):
    x = np_rng.normal(size=(2, 3, 4))

    for axis in (0, 1, 2, -1, -2, -3):
        assert_close(attempt(softmax, x, axis), oracle("softmax", x, axis))


def test_softmax_survives_scores_far_too_large_for_exp(attempt, np_rng):
    x = large_scores(np_rng)

    out = attempt(softmax, x, 1)

    assert_close(out, oracle("softmax", x, 1))


def test_softmax_rejects_an_empty_axis(attempt):
    x = np.zeros((3, 0))

    with pytest.raises(ValueError):
        attempt(softmax, x, 1)


@given(axis=axes, shift=shifts, seed=seeds)
def test_softmax_stays_the_same_when_all_scores_shift(attempt, axis, shift, seed):
    x = np.random.default_rng(seed).uniform(-5, 5, size=(2, 1, 3))

    out = attempt(softmax, x + shift, axis)

    assert_close(out, oracle("softmax", x, axis))


def test_logsumexp_works_along_any_axis_and_drops_it(attempt, np_rng):
    x = np_rng.normal(size=(2, 3, 4))

    for axis in (0, 1, 2, -1, -2, -3):
        assert_close(attempt(logsumexp, x, axis), oracle("logsumexp", x, axis))


def test_logsumexp_survives_scores_far_too_large_for_exp(attempt, np_rng):
    x = large_scores(np_rng)

    out = attempt(logsumexp, x, 1)

    assert_close(out, oracle("logsumexp", x, 1))


@given(axis=axes, shift=shifts, seed=seeds)
def test_logsumexp_shifts_with_its_scores(attempt, axis, shift, seed):
    x = np.random.default_rng(seed).uniform(-5, 5, size=(2, 1, 3))

    out = attempt(logsumexp, x + shift, axis)

    assert_close(out, oracle("logsumexp", x, axis) + shift)


def test_log_softmax_works_along_any_axis(attempt, np_rng):
    x = np_rng.normal(size=(2, 3, 4))

    for axis in (0, 1, 2, -1, -2, -3):
        assert_close(attempt(log_softmax, x, axis), oracle("log_softmax", x, axis))


def test_log_softmax_stays_exact_where_the_softmax_rounds_to_zero(attempt, np_rng):
    x = large_scores(np_rng)

    out = attempt(log_softmax, x, 1)

    assert_close(out, oracle("log_softmax", x, 1))


def test_all_three_work_along_the_last_axis_unless_told_otherwise(attempt, np_rng):
    x = np_rng.normal(size=(4, 3, 2)).T[::-1]  # a view, not contiguous

    for function in FUNCTIONS:
        assert_close(attempt(without_axis, function, x), oracle(function, x, -1))


def test_all_three_give_a_score_of_minus_infinity_no_weight(attempt):
    x = np.full((4, 4), -np.inf)
    x[0, 1:3] = 0, math.log(3)
    x[1, ::2] = 5
    x[2:, 3] = -1e5, -1e10  # very low, and yet all that is left

    out = attempt(all_three, x, 1)

    weights = [[0, 0.25, 0.75, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    sums = np.array([math.log(4), 5 + math.log(2), -1e5, -1e10])
    expected = {"softmax": np.array(weights), "logsumexp": sums, "log_softmax": x - sums[:, None]}
    assert_close(out, expected)


def test_all_three_are_exact_to_the_last_digits(attempt, np_rng):
    # From weights around 1 to one of 1e−304, in float64: nothing is cut off, added or rounded.
    x = np_rng.normal(size=(2, 5)) - np.array([0, 0, 20, 90, 700])

    out = attempt(all_three, x, 1)

    # A score has 53 bits. In a weight as small as exp(−700) they are worth 700 · 2⁻⁵³, and that
    # twice. A sum of up to 2 that is 10⁻¹² too large would cost 5 · 10⁻¹³.
    assert_close(out, {name: oracle(name, x, 1) for name in FUNCTIONS}, rtol=3e-13, atol=0)


def test_all_three_take_more_scores_than_float16_can_count(attempt):
    x = np.full((2, 70_000), 3, np.float16)

    out = attempt(all_three, x, 1)

    of_all = math.log(70_000)
    expected = {"softmax": 1 / 70_000, "logsumexp": 3 + of_all, "log_softmax": -of_all}
    for name, value in expected.items():
        shape = (2,) if name == "logsumexp" else x.shape
        assert_close(out[name], np.full(shape, value, np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_three_add_up_very_many_small_shares(attempt, dtype):
    # Added to 1 one by one in float32, shares of exp(−12) are all rounded to 52 · 2⁻²³.
    x = np.zeros((70_000, 2), dtype)
    x[0] = 12

    out = attempt(all_three, x, 0)

    assert_close(out, {name: oracle(name, x, 0).astype(dtype) for name in FUNCTIONS})


def test_log_softmax_stays_exact_for_scores_that_lie_very_far_apart(attempt):
    x = np.array([[0.0, 1e5], [-1e10, 0.0]])

    out = attempt(log_softmax, x, 1)

    assert_close(out, np.array([[-1e5, 0.0], [-1e10, 0.0]]))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1)], ids=str)
def test_all_three_take_one_row_and_a_batch_of_one(attempt, np_rng, shape):
    x = np_rng.normal(size=shape)

    out = attempt(of_one_row, x)

    assert_close(out, {name: oracle(name, x, -1) for name in FUNCTIONS})


def test_all_three_keep_a_result_apart_from_the_next(attempt, np_rng):
    arrays = np_rng.normal(size=(2, 4, 3))

    out = attempt(all_three_of_each, arrays, 1)

    assert_close(out, [{name: oracle(name, x, 1) for name in FUNCTIONS} for x in arrays])


def test_all_three_take_a_batch_of_no_rows(attempt):
    x = np.zeros((0, 3))

    out = attempt(all_three, x, 1)

    assert_close(out, {"softmax": x, "logsumexp": np.zeros(0), "log_softmax": x})


def test_all_three_turn_integers_into_float64(attempt):
    x = np.array([[1, 2, 4, -(2**63)], [2000, 2002, 1999, 2**63 - 1], [2001, 1, 1999, 0]])

    for rows, axis in ((x, 0), (x[:, :1], 1)):
        out = attempt(all_three, rows, axis)

        assert_close(out, {name: oracle(name, rows, axis) for name in FUNCTIONS})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_three_keep_the_dtype_of_floats(attempt, np_rng, dtype):
    # exp overflows float16 from 12 on. Differences of quarters are exact in either dtype.
    x = (12 + np_rng.integers(0, 9, size=(3, 5)) / 4).astype(dtype)

    out = attempt(all_three, x, 1)

    expected = {name: oracle(name, x, 1).astype(dtype) for name in FUNCTIONS}
    # A few roundings, each of at most half an eps of the result or of the sum inside.
    eps = float(np.finfo(dtype).eps)
    assert_close(out, expected, rtol=4 * eps, atol=4 * eps)
