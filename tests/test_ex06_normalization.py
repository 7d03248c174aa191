"""Specs for exercise 06: normalization."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    f"{place}.{name}"
    for place in ("torch", "torch.nn.functional")
    for name in ("layer_norm", "rms_norm", "native_layer_norm", "batch_norm")
]


def layer_norm(ex, x, weight, bias, *eps):
    return ex.layer_norm(x, weight, bias, *eps)


def rms_norm(ex, x, weight, *eps):
    return ex.rms_norm(x, weight, *eps)


def both(ex, x, weight, bias, eps):
    return {
        "layer_norm": ex.layer_norm(x, weight, bias, eps),
        "rms_norm": ex.rms_norm(x, weight, eps),
    }


def both_without_weights(ex, x, eps):
    """With weights of one and no bias."""
    ones = np.ones(x.shape[-1])
    return both(ex, x, ones, 0 * ones, eps)


def both_of_each(ex, arrays, weight, bias, eps):
    return [both(ex, x, weight, bias, eps) for x in arrays]


def oracle(x, weight, bias, eps):
    """Torch's own versions, in float64."""
    x, weight, bias = (torch.from_numpy(t.astype(np.float64)) for t in (x, weight, bias))
    return {
        "layer_norm": F.layer_norm(x, x.shape[-1:], weight, bias, eps).numpy(),
        "rms_norm": F.rms_norm(x, x.shape[-1:], weight, eps).numpy(),
    }


def parameters(np_rng, d_model=5):
    return np_rng.normal(size=d_model), np_rng.normal(size=d_model)


def test_layer_norm_brings_each_vector_to_mean_0_and_variance_1(attempt, np_rng):
    x = 3 * np_rng.normal(size=(2, 7, 5)) + 2
    weight, bias = parameters(np_rng)

    out = attempt(layer_norm, x, weight, bias)

    assert_close(out, oracle(x, weight, bias, 1e-5)["layer_norm"], rtol=1e-12, atol=1e-12)


def test_layer_norm_keeps_its_digits_far_from_zero(attempt, np_rng):
    x = np_rng.normal(size=(3, 5)) + 1e6
    weight, bias = parameters(np_rng)

    out = attempt(layer_norm, x, weight, bias)

    # Such a difference is exact, and layer_norm does not see by what all features are moved; but
    # the mean of numbers around 10⁶ is rounded to some 10⁻¹⁰.
    assert_close(out, oracle(x - 1e6, weight, bias, 1e-5)["layer_norm"], rtol=1e-8, atol=1e-8)


def test_rms_norm_divides_each_vector_by_its_root_mean_square(attempt, np_rng):
    x = 3 * np_rng.normal(size=(2, 7, 5)) + 2
    weight, bias = parameters(np_rng)

    out = attempt(rms_norm, x, weight)

    assert_close(out, oracle(x, weight, bias, 1e-5)["rms_norm"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 3.0])
def test_both_add_eps_under_the_root(attempt, np_rng, eps):
    x = 0.01 * np_rng.normal(size=(4, 5)) + 0.02  # so small that eps is felt
    weight, bias = parameters(np_rng)

    out = attempt(both, x, weight, bias, eps)

    assert_close(out, oracle(x, weight, bias, eps))


def test_both_add_a_hundred_thousandth_unless_told_otherwise(attempt, np_rng):
    x = 0.01 * np_rng.normal(size=(4, 5)) + 0.02
    weight, bias = parameters(np_rng)

    expected = oracle(x, weight, bias, 1e-5)
    assert_close(attempt(layer_norm, x, weight, bias), expected["layer_norm"])
    assert_close(attempt(rms_norm, x, weight), expected["rms_norm"])


@pytest.mark.parametrize("eps", [1e-5, 1e-8])  # float16 has no number as small as 1e-8
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_both_survive_vectors_of_equal_features(attempt, np_rng, dtype, eps):
    x = np.array([[0.0] * 5, [-2.5] * 5], dtype)
    weight, bias = parameters(np_rng)

    out = attempt(both, x, weight, bias, eps)

    scaled = np.array([0 * weight, -2.5 / (6.25 + eps) ** 0.5 * weight]).astype(dtype)
    assert_close(out, {"layer_norm": np.array([bias, bias]).astype(dtype), "rms_norm": scaled})


@pytest.mark.parametrize("shape", [(5,), (0, 5), (4, 1)], ids=str)
def test_both_take_one_vector_none_and_vectors_of_one_feature(attempt, np_rng, shape):
    x = np_rng.normal(size=shape).astype(np.float32)
    weight, bias = parameters(np_rng, shape[-1])

    out = attempt(both, x, weight, bias, 1e-3)

    expected = oracle(x, weight, bias, 1e-3)
    assert_close(out, {name: exact.astype(np.float32) for name, exact in expected.items()})


def test_both_keep_a_result_apart_from_the_next(attempt, np_rng):
    arrays = np_rng.normal(size=(2, 4, 5))
    weight, bias = parameters(np_rng)

    out = attempt(both_of_each, arrays, weight, bias, 1e-5)

    assert_close(out, [oracle(x, weight, bias, 1e-5) for x in arrays])


@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [
        ("float16", "float16"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("float32", "float64"),
        ("float64", "float32"),
    ],
)
def test_both_compute_in_float32_at_least_and_round_once(attempt, np_rng, dtype, of_weight):
    # float16 ends at 65504, and the square of 256 is beyond. Not contiguous.
    x = (1000 * np_rng.normal(size=(5, 30)).T + 500).astype(dtype)
    weight, bias = (t.astype(of_weight) for t in parameters(np_rng))

    out = attempt(both, x, weight, bias, 1e-5)

    for name, exact in oracle(x, weight, bias, 1e-5).items():
        assert out[name].dtype == dtype, f"{name} is {out[name].dtype}, and x is {dtype}"
        # The last rounding moves a number by half an eps of x's dtype; those of what it is
        # computed in, float32 at least, by a few of its eps.
        inside = np.finfo(np.promote_types(dtype, np.float32)).eps
        fine = 64 * float(inside) * np.abs(exact).max()
        half = 0.5001 * float(np.finfo(dtype).eps)
        assert_close(out[name].astype(np.float64), exact, rtol=half, atol=fine)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (4,), (1, 5), (5, 1), (7,)], ids=str)
@pytest.mark.parametrize("which", ["layer_norm's weight", "layer_norm's bias", "rms_norm's weight"])
def test_both_reject_parameters_of_another_shape(attempt, which, shape):
    x, right, wrong = np.ones((3, 5)), np.ones(5), np.ones(shape)

    theirs = r"\D+".join(rf"\b{n}\b" for n in shape)
    with pytest.raises(ValueError, match=theirs or None):
        if which == "rms_norm's weight":
            attempt(rms_norm, x, wrong)
        else:
            weight, bias = (wrong, right) if which.endswith("weight") else (right, wrong)
            attempt(layer_norm, x, weight, bias)


@given(scale=st.floats(0.01, 100), shift=st.floats(-100, 100), seed=st.integers(0, 999))
@settings(max_examples=20)
def test_both_give_a_vector_of_any_size_the_same_result(attempt, scale, shift, seed):
    x = np.random.default_rng(seed).normal(size=(2, 5))

    scaled = attempt(both_without_weights, scale * x, 0.0)
    moved = attempt(both_without_weights, scale * x + shift, 0.0)

    expected = oracle(x, np.ones(5), np.zeros(5), 0.0)
    assert_close(scaled, expected)
    assert_close(moved["layer_norm"], expected["layer_norm"])
