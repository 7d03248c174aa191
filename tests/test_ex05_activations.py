"""Specs for exercise 05: activations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    f"{place}.{name}"
    for place in ("torch", "torch.Tensor", "torch.special", "torch.nn.functional", "scipy.special")
    for name in ("relu", "gelu", "silu", "glu", "sigmoid", "expit", "logsigmoid")
]

CURVES = ("relu", "gelu", "gelu_tanh", "silu")
SLOPES = ("gelu_grad", "silu_grad")


class oracle:
    """PyTorch's functions under the names of the exercise; the slopes are by its autograd."""

    relu, gelu, silu = F.relu, F.gelu, F.silu

    def gelu_tanh(x):
        return F.gelu(x, approximate="tanh")

    def swiglu(x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def gelu_grad(x):
        return torch.autograd.grad(F.gelu(x.requires_grad_()).sum(), x)[0]

    def silu_grad(x):
        return torch.autograd.grad(F.silu(x.requires_grad_()).sum(), x)[0]


def by_torch(function, x):
    """The oracle's answer, in float64."""
    return getattr(oracle, function)(torch.from_numpy(x.astype(np.float64))).numpy()


def activate(ex, function, x):
    return getattr(ex, function)(x)


def all_of_them(ex, x):
    return {name: getattr(ex, name)(x) for name in (*CURVES, "swiglu", *SLOPES)}


def without_overflow(ex, x):
    """Where NumPy would warn of an overflow, there is an error that shows the line."""
    with np.errstate(over="raise"):
        return all_of_them(ex, x)


def one_after_the_other(ex, x, y):
    """What is made of x and then of y; at the end the results for x are overwritten."""
    first, second = all_of_them(ex, x), all_of_them(ex, y)
    given = {name: (first[name].copy(), second[name]) for name in first}
    for result in first.values():
        result[...] = 7
    return given


def from_both_sides(ex, x):
    """What each curve makes of x and of −x, and the slopes there."""
    return {name: (getattr(ex, name)(x), getattr(ex, name)(-x)) for name in (*CURVES, *SLOPES)}


def rise_and_slope(ex, x, step):
    """How steeply each curve rises between x − step and x + step, beside the slope at x."""
    rise = {
        name: (getattr(ex, name)(x + step) - getattr(ex, name)(x - step)) / (2 * step)
        for name in ("gelu", "silu")
    }
    return rise, {name: getattr(ex, f"{name}_grad")(x) for name in ("gelu", "silu")}


def numbers(np_rng, *shape):
    """Between −4 and 4, where the curves differ, and with a 0."""
    x = np_rng.uniform(-4, 4, size=shape)
    x.flat[:1] = 0.0
    return x


@pytest.mark.parametrize("function", CURVES)
def test_bends_as_its_formula_says(attempt, np_rng, function):
    x = numbers(np_rng, 40)

    out = attempt(activate, function, x)

    assert_close(out, by_torch(function, x), rtol=1e-12, atol=1e-12)  # no constant cut short


@pytest.mark.parametrize("function", SLOPES)
def test_gives_the_slope_of_its_curve(attempt, np_rng, function):
    x = numbers(np_rng, 40)

    out = attempt(activate, function, x)

    assert_close(out, by_torch(function, x), rtol=1e-12, atol=1e-12)  # no constant cut short


@pytest.mark.parametrize("shape", [(6,), (3, 10), (2, 3, 4)], ids=str)
def test_swiglu_lets_the_first_half_gate_the_second(attempt, np_rng, shape):
    x = numbers(np_rng, *shape)

    out = attempt(activate, "swiglu", x)

    assert_close(out, by_torch("swiglu", x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7])
def test_swiglu_rejects_features_that_have_no_two_halves(attempt, np_rng, length):
    x = numbers(np_rng, 2, length)

    with pytest.raises(ValueError, match=rf"\b{length}\b"):
        attempt(activate, "swiglu", x)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), scale=st.floats(0, 30))
def test_opposite_numbers_together_lose_nothing(attempt, seed, scale):
    # Φ and σ of x and of −x sum to one. So curve(x) − curve(−x) is x, and the slopes sum to 1.
    x = scale * np.random.default_rng(seed).uniform(-1, 1, size=5)

    out = attempt(from_both_sides, x)

    assert_close({name: out[name][0] - out[name][1] for name in CURVES}, dict.fromkeys(CURVES, x))
    ones = dict.fromkeys(SLOPES, np.ones(5))
    assert_close({name: out[name][0] + out[name][1] for name in SLOPES}, ones)


@settings(max_examples=20)
@given(x=st.floats(-8, 8))
def test_the_slope_is_how_steeply_the_curve_rises(attempt, x):
    rise, slope = attempt(rise_and_slope, np.array([x]), 1e-4)

    # A difference errs by step²/6 times the third derivative, which is below 2: by 4 · 10⁻⁹.
    assert_close(rise, slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sign", [1, -1], ids=["large", "very negative"])
def test_survives_numbers_far_too_large_for_exp(attempt, sign, dtype):
    x = sign * np.array([30.0, 89.0, 710.0, 1e3, 1e6, 750.0], dtype)

    out = attempt(without_overflow, x)

    assert_close(out, {name: by_torch(name, x).astype(dtype) for name in out})


def test_lets_nan_through(attempt):
    x = np.array([np.nan, -2.0, 1.5, np.nan])

    out = attempt(all_of_them, x)

    assert_close(out, {name: by_torch(name, x) for name in out})


@pytest.mark.parametrize("shape", [(2,), (0, 4), (3, 0), (2, 3, 4)], ids=str)
def test_takes_arrays_of_any_shape(attempt, np_rng, shape):
    x = numbers(np_rng, *shape)

    out = attempt(all_of_them, x)

    assert_close(out, {name: by_torch(name, x) for name in out})


def axes_reversed(x):
    return x.T


def with_gaps(x):
    return x[:, ::2, 1:-1]


def one_row_repeated(x):
    return np.broadcast_to(x[1, 1], (3, 6))


@pytest.mark.parametrize("view", [axes_reversed, with_gaps, one_row_repeated])
def test_takes_arrays_of_any_memory_layout(attempt, np_rng, view):
    x = view(numbers(np_rng, 4, 5, 6))

    out = attempt(all_of_them, x)

    assert_close(out, {name: by_torch(name, x) for name in out})


def test_gives_a_new_array_at_each_call(attempt, np_rng):
    x, y = np.abs(numbers(np_rng, 3, 4)), numbers(np_rng, 3, 4)  # relu changes nothing of x

    out = attempt(one_after_the_other, x, y)

    assert_close(out, {name: (by_torch(name, x), by_torch(name, y)) for name in out})


def test_keeps_float32(attempt, np_rng):
    x = numbers(np_rng, 3, 4).astype(np.float32)

    out = attempt(all_of_them, x)

    assert_close(out, {name: by_torch(name, x).astype(np.float32) for name in out})
