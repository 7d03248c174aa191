"""Specs for exercise 07: linear layers, embeddings and dropout."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    f"torch.nn.{name}"
    for name in (
        "functional.linear",
        "functional.embedding",
        "functional.dropout",
        "Linear",
        "Embedding",
        "Dropout",
    )
]


def linear(ex, x, weight, bias=None):
    return ex.linear(x, weight, bias)


def embedding(ex, tokens, weight):
    return ex.embedding(tokens, weight)


def tied_logits(ex, x, weight):
    return ex.tied_logits(x, weight)


def fresh(ex, seed, rows, width):
    """A layer of `width` inputs, and a table of rows of that width."""
    rng = np.random.default_rng(seed)
    weight, bias = ex.init_linear(width, rows, rng)
    return {"weight": weight, "bias": bias, "table": ex.init_embedding(rows, width, rng)}


def drawn(ex, seed):
    """Two of each in a row, from one generator."""
    rng = np.random.default_rng(seed)
    x = np.ones((3, 20))
    return {
        "weights": [ex.init_linear(4, 3, rng)[0] for _ in range(2)],
        "tables": [ex.init_embedding(3, 4, rng) for _ in range(2)],
        "masks": [ex.dropout(x, 0.5, rng) for _ in range(2)],
    }


def dropout(ex, x, p, seed):
    return ex.dropout(x, p, np.random.default_rng(seed))


def many_small(ex, seed, n):
    """Layers of two inputs and one output, and tables of one row of width 2."""
    rng = np.random.default_rng(seed)
    return {
        "weight": np.concatenate([ex.init_linear(2, 1, rng)[0] for _ in range(n)]),
        "table": np.concatenate([ex.init_embedding(1, 2, rng) for _ in range(n)]),
    }


def dropped_in_turn(ex, x, p, seed):
    """How many numbers each of ten calls drops."""
    rng = np.random.default_rng(seed)
    return [int((ex.dropout(x, p, rng) == 0).sum()) for _ in range(10)]


def dropout_outside_training(ex, x, p, seed):
    """The result, and what the generator gives next."""
    rng = np.random.default_rng(seed)
    return ex.dropout(x, p, rng, training=False), rng.random()


def by_name(ex, function, *arrays):
    return getattr(ex, function)(*arrays)


def of_each(ex, function, xs, weight):
    return [getattr(ex, function)(x, weight) for x in xs]


def by_torch(function, *arrays):
    return function(*(None if a is None else torch.from_numpy(a.copy()) for a in arrays)).numpy()


def is_normal(weight, spread):
    """Whether the weights may well come from a normal distribution with mean 0 and this spread.

    Each tolerance is five standard deviations of what is measured in so many draws, or more.
    """
    n, z = weight.size, np.sort(weight.flatten().astype(np.float64)) / spread
    assert_close(z.mean(), 0.0, atol=5 / math.sqrt(n))
    assert_close(z.std(), 1.0, rtol=5 / math.sqrt(2 * n))
    below = torch.special.ndtr(torch.from_numpy(z)).numpy()
    # The share that was drawn below a point, less the true one: rarely (10⁻⁷) more than 3/√n.
    assert_close(np.abs(below - np.arange(n) / n).max(), 0.0, atol=3 / math.sqrt(n))
    # One in 380 lies so far out that, of 6000, none does so with a chance of 10⁻⁷.
    assert np.abs(z).max() > 3.01, f"none of {n} weights lies beyond three standard deviations"


def is_unrelated(x):
    """Whether no number goes with another one, whichever distance there is between the two.

    The correlations at all distances at once, by way of the spectrum. Each is a mean of n products
    with a spread of 1/√n; that one of 60 000 lies beyond seven times that has a chance of 10⁻⁷.
    """
    z = x.flatten() - x.mean()
    correlations = np.fft.irfft(np.abs(np.fft.rfft(z)) ** 2, z.size)
    correlations = correlations[1:] / correlations[0]
    assert_close(np.abs(correlations).max(), 0.0, atol=7 / math.sqrt(z.size))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=["one", "batch", "batch and seq_len"])
@pytest.mark.parametrize("biased", [True, False], ids=["with bias", "without"])
def test_linear_sums_the_inputs_by_the_weights_of_each_row(attempt, np_rng, batch, biased):
    x = np_rng.normal(size=(4, *batch)).T  # (…, in_features), not contiguous
    weight = np_rng.normal(size=(6, 4))
    bias = np_rng.normal(size=6) if biased else None

    y = attempt(linear, x, weight, bias)

    assert_close(y, by_torch(F.linear, x, weight, bias))


@settings(max_examples=20)
@example(shape=[], vocab_size=3, seed=0)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    vocab_size=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_embedding_looks_up_the_row_of_each_token(attempt, shape, vocab_size, seed):
    rng = np.random.default_rng(seed)
    tokens, weight = rng.integers(0, vocab_size, shape), rng.normal(size=(vocab_size, 5))

    rows = attempt(embedding, tokens, weight)

    assert_close(rows, by_torch(F.embedding, tokens, weight))


@pytest.mark.parametrize(
    "token", [7, 931, -1], ids=["one too many", "far too many", "one below zero"]
)
def test_embedding_rejects_a_token_that_has_no_row(attempt, np_rng, token):
    tokens, weight = np.array([[3, 0, 6], [1, token, 5]]), np_rng.normal(size=(7, 4))

    with pytest.raises(IndexError, match=rf"{token}\b"):
        attempt(embedding, tokens, weight)


def test_tied_logits_compare_with_every_row_of_the_table(attempt, np_rng):
    weight = np_rng.normal(size=(7, 4))
    for batch in ((), (2, 3)):
        x = np_rng.normal(size=(*batch, 4))

        logits = attempt(tied_logits, x, weight)

        assert_close(logits, by_torch(F.linear, x, weight))


@pytest.mark.parametrize("function", ["linear", "embedding", "tied_logits"])
def test_a_float32_table_gives_float32(attempt, np_rng, function):
    weight, bias = (np_rng.normal(size=s).astype("float32") for s in ((7, 4), 7))
    embeds = function == "embedding"
    x = np_rng.integers(0, 7, (2, 3)) if embeds else np_rng.normal(size=(2, 3, 4)).astype("float32")
    arrays = (x, weight, bias) if function == "linear" else (x, weight)

    out = attempt(by_name, function, *arrays)

    assert_close(out, by_torch(F.embedding if embeds else F.linear, *arrays))


@pytest.mark.parametrize("function", ["linear", "embedding", "tied_logits"])
def test_a_result_is_kept_apart_from_the_next(attempt, np_rng, function):
    weight, embeds = np_rng.normal(size=(7, 4)), function == "embedding"
    xs = [np_rng.integers(0, 7, 5) if embeds else np_rng.normal(size=(5, 4)) for _ in range(2)]

    out = attempt(of_each, function, xs, weight)

    assert_close(out, [by_torch(F.embedding if embeds else F.linear, x, weight) for x in xs])


@pytest.mark.parametrize(("rows", "width"), [(400, 50), (50, 400)], ids=["long", "wide"])
def test_fresh_weights_give_sums_of_the_spread_of_what_goes_in(attempt, np_rng, rows, width):
    seed = int(np_rng.integers(1 << 30))

    out = attempt(fresh, seed, rows, width)

    assert_close(out["bias"], np.zeros(rows, np.float32), rtol=0, atol=0)
    for name in ("weight", "table"):
        shape, dtype = out[name].shape, out[name].dtype
        assert shape == (rows, width), f"the {name} has shape {shape}, not {(rows, width)}"
        assert dtype == np.float32, f"the {name} is {dtype}, not float32"
        is_normal(out[name], 1 / math.sqrt(width))
        is_unrelated(out[name])
        for axis in (0, 1):  # no row or column of its own size: seven standard deviations
            spread = math.sqrt(width) * out[name].astype(np.float64).std(axis)
            assert_close(spread, np.ones(spread.size), atol=7 / math.sqrt(2 * shape[axis]))


def test_layers_too_small_to_be_balanced_have_that_spread_too(attempt, np_rng):
    out = attempt(many_small, int(np_rng.integers(1 << 30)), 3000)

    for name in ("weight", "table"):
        is_normal(out[name], 1 / math.sqrt(2))


def test_all_chance_comes_from_the_generator(attempt, np_rng):
    seed = int(np_rng.integers(1 << 30))

    out, again = attempt(drawn, seed), attempt(drawn, seed)

    assert_close(again, out)
    for name, (one, two) in out.items():
        assert (one != two).any(), f"two {name} in a row are the same"


@settings(max_examples=20)
@given(p=st.floats(0, 0.95), seed=st.integers(0, 999))
def test_dropout_leaves_each_element_zero_or_scaled_up(attempt, p, seed):
    x = np.random.default_rng(seed).uniform(1, 2, size=(5, 4, 3)).T  # not contiguous

    out = attempt(dropout, x, p, seed)

    assert_close(out, np.where(out == 0, 0, x / (1 - p)))


@pytest.mark.parametrize("p", [0.0, 0.37, 0.92])
def test_dropout_draws_for_every_element_by_itself(attempt, np_rng, p):
    x, seed = np.ones((60, 40, 50), np.float32), int(np_rng.integers(1 << 30))

    out = attempt(dropout, x, p, seed)

    assert out.dtype == np.float32, f"float32 went in, {out.dtype} came out"
    dropped = out == 0
    # Over all elements, and then over the two others of each axis: six standard deviations.
    for axes in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):
        share = dropped.mean(axis=axes)
        spread = math.sqrt(p * (1 - p) * share.size / x.size)
        assert_close(share, np.full(share.shape, p), rtol=0, atol=6 * spread)
    if p:
        is_unrelated(dropped)


def test_dropout_drops_as_rarely_as_it_is_told(attempt, np_rng):
    x = np.ones((400, 500))

    out = attempt(dropout, x, 0.002, int(np_rng.integers(1 << 30)))

    # A tolerance of seven standard deviations. One in 256 would be 0.0039.
    assert_close((out == 0).mean(), 0.002, rtol=0, atol=7 * math.sqrt(0.002 / x.size))


def test_dropout_drops_no_fixed_number_of_elements(attempt, np_rng):
    counts = attempt(dropped_in_turn, np.ones((20, 30)), 0.3, int(np_rng.integers(1 << 30)))

    # Independent draws give the same number ten times once in 10¹⁴ runs.
    assert len(set(counts)) > 1, f"each of ten calls dropped {counts[0]} of 600 elements"


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_dropout_drops_what_is_not_finite(attempt, np_rng, number):
    x = np.full((20, 30), number)

    out = attempt(dropout, x, 0.5, int(np_rng.integers(1 << 30)))

    dropped = out == 0
    assert dropped.any(), f"none of 600 times {number} became 0"
    assert_close(out, np.where(dropped, 0.0, number))


def test_dropout_does_nothing_outside_training(attempt, np_rng):
    x = np_rng.normal(size=(3, 4))

    out, drawn_next = attempt(dropout_outside_training, x, 0.4, 5)

    assert_close(out, x)
    assert_close(drawn_next, np.random.default_rng(5).random())


@pytest.mark.parametrize("run", [dropout, dropout_outside_training], ids=["training", "not"])
@pytest.mark.parametrize("p", [1.0, 1.5, -0.25])
def test_dropout_rejects_a_p_that_is_no_probability_below_one(attempt, run, p):
    with pytest.raises(ValueError, match=str(p)):
        attempt(run, np.ones((2, 3)), p, 0)
