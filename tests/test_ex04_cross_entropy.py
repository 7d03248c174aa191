"""Specs for exercise 04: cross-entropy."""

import math

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
    for name in ("cross_entropy", "nll_loss", "log_softmax", "softmax", "logsumexp")
]


def cross_entropy(ex, logits, targets, **options):
    return ex.cross_entropy(logits, targets, **options)


def oracle(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """Torch's loss, in float64. It wants the words on axis 1, or all positions in one row."""
    flat = torch.from_numpy(logits.astype(np.float64)).reshape(-1, logits.shape[-1])
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return F.cross_entropy(flat, torch.from_numpy(targets.copy()).flatten(), **options).numpy()


def logits_and_targets(np_rng, batch=(3, 4), vocab_size=7):
    """All sizes differ, so that no two axes can be swapped unnoticed."""
    targets = np_rng.integers(0, vocab_size, size=batch)
    return 2 * np_rng.normal(size=(*batch, vocab_size)), targets


def hide(targets, ignore_index):
    """Mark all but the last position of row 0, one in the middle of row 1, and all of row 2."""
    targets = targets.copy()
    targets[0, :-1] = targets[1, 1] = targets[2] = ignore_index
    return targets


seeds = st.integers(0, 999)
shares = st.sampled_from([0.0, 0.1, 0.75, 1.0])


def test_averages_minus_the_logarithm_of_the_true_words_probability(attempt):
    logits = np.log([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]])  # eight in all, in either row
    targets = np.array([2, 0])

    loss = attempt(cross_entropy, logits, targets)

    assert_close(loss, -(math.log(5 / 8) + math.log(3 / 8)) / 2)


@settings(max_examples=20)
@given(vocab_size=st.integers(1, 300), level=st.floats(-1e4, 1e4), seed=seeds)
def test_costs_the_logarithm_of_vocab_size_while_all_words_are_equal(
    attempt, vocab_size, level, seed
):
    targets = np.random.default_rng(seed).integers(0, vocab_size, size=(2, 3))
    logits = np.full((2, 3, vocab_size), level)

    loss = attempt(cross_entropy, logits, targets)

    assert_close(loss, math.log(vocab_size))


@pytest.mark.parametrize(
    "batch",
    [(), (5,), (3, 4), (2, 3, 4)],
    ids=["one position", "one row", "batch and seq_len", "three axes"],
)
def test_takes_any_leading_axes(attempt, np_rng, batch):
    # Made with the words on the first axis and every second target: views, not contiguous.
    logits = np.moveaxis(2 * np_rng.normal(size=(7, *batch)), 0, -1)
    targets = np_rng.integers(0, 7, size=(*batch, 2))[..., 0]

    loss = attempt(cross_entropy, logits, targets)

    # Tight: float64 throughout, and no small number added before the logarithm.
    assert_close(loss, oracle(logits, targets), rtol=1e-12, atol=1e-14)


def test_stays_exact_for_logits_far_too_large_for_exp(attempt, np_rng):
    logits, targets = logits_and_targets(np_rng)
    logits += np.array([0.0, 1e4, -1e4])[:, None, None]

    loss = attempt(cross_entropy, logits, targets)

    assert_close(loss, oracle(logits, targets))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float64", 1e3), ("float64", 1e10), ("float32", 1e5), ("float32", 1e37), ("float32", 3e38)],
)
def test_stays_exact_where_the_truth_looks_impossible(attempt, dtype, size):
    # In the second row the most likely word comes, and no other has any chance.
    logits = np.array([[0.0, size, size], [size, -size, -size]], dtype)

    losses = [attempt(cross_entropy, logits[i : i + 1], np.array([0])) for i in (0, 1)]

    assert_close(losses, [np.dtype(dtype).type(size + np.log(2)), np.dtype(dtype).type(0)])


def test_a_word_that_cannot_come_costs_nothing_unless_it_is_the_truth(attempt):
    logits = np.array([[-np.inf, 0.0, 0.0, 0.0], [1e5, -np.inf, -np.inf, -np.inf]])

    possible = attempt(cross_entropy, logits, np.array([2, 0]))
    impossible = attempt(cross_entropy, logits, np.array([0, 0]))

    assert_close([possible, impossible], [math.log(3) / 2, math.inf])


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 1000])
def test_leaves_ignored_positions_out_of_the_average(attempt, np_rng, ignore_index):
    logits, targets = logits_and_targets(np_rng)
    targets = hide(np.maximum(targets, 1), ignore_index)

    for share in (0.0, 0.3):
        options = {"ignore_index": ignore_index, "label_smoothing": share}
        loss = attempt(cross_entropy, logits, targets, **options)
        assert_close(loss, oracle(logits, targets, **options))


@settings(max_examples=20)
@given(garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]), share=shares, seed=seeds)
def test_never_looks_at_the_logits_of_ignored_positions(attempt, garbage, share, seed):
    logits, targets = logits_and_targets(np.random.default_rng(seed))
    targets = hide(targets, -100)
    logits[targets == -100] = garbage

    loss = attempt(cross_entropy, logits, targets, label_smoothing=share)

    kept = targets != -100
    assert_close(loss, oracle(logits[kept], targets[kept], label_smoothing=share))


@pytest.mark.parametrize("share", [0.1, 0.75, 1.0])
def test_smoothing_gives_every_word_an_equal_part_of_its_share(attempt, np_rng, share):
    logits, targets = logits_and_targets(np_rng)

    loss = attempt(cross_entropy, logits, targets, label_smoothing=share)

    assert_close(loss, oracle(logits, targets, label_smoothing=share))


def test_keeps_float32(attempt, np_rng):
    logits, targets = logits_and_targets(np_rng)
    logits = logits.astype(np.float32)

    loss = attempt(cross_entropy, logits, targets, label_smoothing=0.3)

    assert_close(loss, oracle(logits, targets, label_smoothing=0.3).astype(np.float32))


@pytest.mark.parametrize(
    ("target", "ignore_index"),
    [(7, -100), (931, -100), (-1, -100), (-100, 0)],
    ids=["one too many", "far too many", "one below zero", "−100 where 0 is ignored"],
)
def test_rejects_a_target_that_is_no_word(attempt, np_rng, target, ignore_index):
    logits, targets = logits_and_targets(np_rng)
    targets[1, 2] = target

    with pytest.raises(IndexError, match=rf"{target}\b"):
        attempt(cross_entropy, logits, targets, ignore_index=ignore_index)
