"""Specs for exercise 09: online softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    f"{place}.{name}"
    for place in ("torch", "torch.Tensor", "torch.special", "torch.nn.functional", "scipy.special")
    for name in ("softmax", "logsumexp", "log_softmax", "scaled_dot_product_attention")
]


def pieces(scores, values, cuts):
    """The blocks between the cuts; two cuts at one place have an empty block between them."""
    return zip(np.split(scores, cuts, axis=-1), np.split(values, cuts, axis=-2), strict=True)


def empty(ex, scores, values):
    return ex.start(scores.shape[:-1], values.shape[-1])


def finished(ex, state):
    average, logsumexp = ex.finish(state)
    return {"average": average, "logsumexp": logsumexp}


def block_by_block(ex, scores, values, cuts):
    """Update one state with the blocks from left to right."""
    state = empty(ex, scores, values)
    for block in pieces(scores, values, cuts):
        state = ex.update(state, *block)
    return finished(ex, state)


def merged(ex, scores, values, cuts, order):
    """A state for each block; then merge the states at two places until one is left."""
    fresh = empty(ex, scores, values)
    states = [ex.update(fresh, *block) for block in pieces(scores, values, cuts)]
    for i, j in order:
        a = states.pop(i % len(states))
        b = states.pop(j % len(states))
        states.append(ex.merge(a, b))
    return finished(ex, *states)


def in_one_memory(ex, scores, values, n_keys):
    """Blocks of so many keys, each written over the one before."""
    state = empty(ex, scores, values)
    block = [np.empty_like(scores[..., :n_keys]), np.empty_like(values[..., :n_keys, :])]
    for new in pieces(scores, values, range(n_keys, scores.shape[-1], n_keys)):
        for memory, part in zip(block, new, strict=True):
            memory[...] = part
        state = ex.update(state, *block)
    return finished(ex, state)


def before_any_key(ex, shape, value_dim):
    """The result of a start, alone and merged with another one."""
    fresh = ex.start(shape, value_dim)
    return [finished(ex, fresh), finished(ex, ex.merge(fresh, ex.start(shape, value_dim)))]


def two_ways_on(ex, scores, values, others, their_values):
    """Go on from one state, first in two ways, then by merging it with itself; last, finish it."""
    state = ex.update(empty(ex, scores, values), scores, values)
    first = ex.update(state, others, their_values)
    second = ex.update(state, -others, their_values)
    both = ex.merge(state, first)
    turned = ex.merge(second, state)
    return [finished(ex, s) for s in (first, second, both, turned, state)]


def finished_on_the_way(ex, scores, values, cuts):
    """The result after every block; the first one is that of no key."""
    state = empty(ex, scores, values)
    results = [finished(ex, state)]
    for block in pieces(scores, values, cuts):
        state = ex.update(state, *block)
        results.append(finished(ex, state))
    return results


def numbers_kept(ex, scores, values, cuts):
    """How many numbers the state holds after each block."""
    state = empty(ex, scores, values)
    counts = []
    for block in pieces(scores, values, cuts):
        state = ex.update(state, *block)
        counts.append(sum(np.size(part) for part in state))
    return counts


def oracle(scores, values):
    """Torch's softmax and logsumexp of all scores at once, in float64."""
    scores, values = (torch.from_numpy(x.astype(np.float64)) for x in (scores, values))
    hidden = torch.isinf(scores).all(-1)
    average = torch.softmax(scores, -1).masked_fill(hidden[..., None], 0.0) @ values
    return {"average": average.numpy(), "logsumexp": torch.logsumexp(scores, -1).numpy()}


def inputs(np_rng, n_queries=3, n_keys=7, value_dim=4, batch=()):
    """Random scores and values. All sizes differ, so no two axes can be swapped unnoticed."""
    scores = 3 * np_rng.normal(size=(*batch, n_queries, n_keys)) - 5
    return scores, np_rng.normal(size=(*batch, n_keys, value_dim))


def some_hidden(seed, n_keys):
    """Scores of which about every third one is −inf, and values."""
    np_rng = np.random.default_rng(seed)
    scores, values = inputs(np_rng, n_queries=2, n_keys=n_keys, value_dim=3)
    scores[np_rng.random(scores.shape) < 0.3] = -np.inf
    return scores, values


def test_one_block_gives_the_softmax_weighted_average(attempt, np_rng):
    scores, values = inputs(np_rng, batch=(2, 5))

    out = attempt(block_by_block, scores, values, [])

    # Tight: in float64 throughout, and no small number added to the total.
    assert_close(out, oracle(scores, values), rtol=2e-14, atol=2e-14)


def test_update_gives_the_same_wherever_the_row_is_split(attempt, np_rng):
    scores, values = inputs(np_rng)

    for place in range(8):
        assert_close(attempt(block_by_block, scores, values, [place]), oracle(scores, values))


def test_merge_gives_the_same_wherever_the_row_is_split(attempt, np_rng):
    scores, values = inputs(np_rng)

    for place in range(8):
        out = attempt(merged, scores, values, [place], [(0, 0)])
        assert_close(out, oracle(scores, values))


def test_merge_does_not_care_which_state_comes_first(attempt, np_rng):
    scores, values = inputs(np_rng, batch=(2, 5))
    scores[..., 3:] += 2000 * np_rng.choice([-1, 1], size=(2, 5, 3, 1))  # beyond what exp takes

    one = attempt(merged, scores, values, [3], [(0, 0)])
    other = attempt(merged, scores, values, [3], [(1, 0)])

    assert_close([one, other], [oracle(scores, values)] * 2)


@pytest.mark.parametrize("slope", [1000, -1000], ids=["rising", "falling"])
@pytest.mark.parametrize("level", [0, -1e5], ids=["around 0", "far below 0"])
def test_update_survives_scores_far_too_large_for_exp(attempt, np_rng, slope, level):
    scores, values = inputs(np_rng)
    scores += slope * (np.arange(7) // 2) + level  # in steps, so that neighbours share the weight
    scores[1] = scores[1, ::-1]

    out = attempt(block_by_block, scores, values, [1, 2, 4, 5])

    assert_close(out, oracle(scores, values))


def test_hidden_keys_count_for_nothing_in_any_block(attempt, np_rng):
    scores, values = inputs(np_rng, n_queries=5, n_keys=6)
    scores[0, :2] = -np.inf  # the first block
    scores[1, 2:4] = -np.inf  # the second
    scores[2, 4:] = -np.inf  # the last
    scores[3, :5] = -np.inf  # all but one
    scores[4] = -np.inf

    assert_close(attempt(block_by_block, scores, values, [2, 4]), oracle(scores, values))
    out = attempt(merged, scores, values, [2, 4], [(0, 1), (0, 0)])
    assert_close(out, oracle(scores, values))


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf, 1e300])
def test_a_key_hidden_from_every_query_may_have_any_value(attempt, np_rng, padding):
    scores, values = inputs(np_rng, n_keys=6, batch=(2,))
    padded = values.copy()
    for row, key in ((0, 1), (0, 4), (0, 5), (1, 0)):  # not the same ones in both rows
        scores[row, :, key], values[row, key], padded[row, key] = -np.inf, 0, padding
    scores[1, 0, 3] = -np.inf  # hidden from one query, and visible to others

    assert_close(attempt(block_by_block, scores, padded, [2, 4]), oracle(scores, values))
    out = attempt(merged, scores, padded, [2, 4], [(0, 1), (0, 0)])
    assert_close(out, oracle(scores, values))


@pytest.mark.parametrize("low", [-1e5, -1e10, -1e300])
def test_a_very_low_score_is_no_hidden_one(attempt, np_rng, low):
    scores, values = inputs(np_rng, n_keys=6)
    scores[0], scores[1] = -np.inf, 2 * low  # all hidden, or far lower still, but for one
    scores[0, 2] = scores[1, 4] = low
    scores[2, :3] = low  # nothing beside what comes later

    for cuts in ([], [1, 3, 5]):
        assert_close(attempt(block_by_block, scores, values, cuts), oracle(scores, values))
    out = attempt(merged, scores, values, [1, 3, 5], [(0, 1), (0, 1), (0, 0)])
    assert_close(out, oracle(scores, values))


@pytest.mark.parametrize("run", [block_by_block, merged], ids=["update", "merge"])
def test_equal_scores_count_alike_in_whatever_blocks_they_stand(attempt, np_rng, run):
    scores, values = np.full((2, 7), 3.0), np_rng.normal(size=(7, 1))
    order = [[(0, 1), (0, 0)]] if run is merged else []

    out = attempt(run, scores, values, [2, 3], *order)

    assert_close(out, oracle(scores, values), rtol=1e-12, atol=1e-12)


def test_a_query_that_has_met_no_key_gets_zeros(attempt):
    out = attempt(before_any_key, (2, 3), 4)

    nothing = {"average": np.zeros((2, 3, 4)), "logsumexp": np.full((2, 3), -np.inf)}
    assert_close(out, [nothing, nothing])


def test_a_state_can_be_continued_more_than_once(attempt, np_rng):
    scores, values = inputs(np_rng)
    others, their_values = inputs(np_rng, n_keys=6)
    # Of these no score is the largest so far; of their negatives one is.
    others += scores.max(-1, keepdims=True) - others.max(-1, keepdims=True) - 1

    out = attempt(two_ways_on, scores, values, others, their_values)

    first = np.concatenate([scores, others], -1), np.concatenate([values, their_values])
    second = np.concatenate([scores, -others], -1), first[1]
    both = np.concatenate([scores, first[0]], -1), np.concatenate([values, first[1]])
    turned = np.concatenate([scores, second[0]], -1), both[1]
    assert_close(out, [oracle(*x) for x in (first, second, both, turned, (scores, values))])


def test_a_state_can_be_finished_on_the_way(attempt, np_rng):
    scores, values = inputs(np_rng)
    scores[:, :2] = -np.inf  # the first block

    out = attempt(finished_on_the_way, scores, values, [2, 5])

    assert_close(out, [oracle(scores[:, :n], values[:n]) for n in (0, 2, 5, 7)])


@pytest.mark.parametrize("n_keys", [1, 3])
def test_a_block_may_be_written_over_when_it_has_been_taken_in(attempt, np_rng, n_keys):
    scores, values = inputs(np_rng, n_keys=6)

    out = attempt(in_one_memory, scores, values, n_keys)

    assert_close(out, oracle(scores, values))


def test_a_state_does_not_grow_with_the_keys(attempt, np_rng):
    scores, values = inputs(np_rng, n_keys=60)

    counts = attempt(numbers_kept, scores, values, list(range(5, 60, 5)))

    assert_close(counts, [counts[0]] * 12)


@pytest.mark.parametrize(
    ("of_scores", "of_values"),
    [("float16", "float16"), ("float32", "float64"), ("float64", "float32")],
)
def test_a_state_is_float64_whatever_its_blocks_are(attempt, np_rng, of_scores, of_values):
    # Beside a score of 8, the 3000 others are too small for float16 to add one by one.
    scores = np.concatenate([[8.0], np_rng.normal(size=3000)])[None].astype(of_scores)
    values = np_rng.normal(size=(3001, 2)).astype(of_values)

    out = attempt(block_by_block, scores, values, list(range(500, 3000, 500)))

    assert_close(out, oracle(scores, values))


@pytest.mark.parametrize(("n_scores", "n_values"), [(5, 4), (4, 5), (7, 1), (1, 7), (0, 3), (3, 0)])
def test_update_rejects_unequal_numbers_of_scores_and_values(attempt, n_scores, n_values):
    scores, values = np.zeros((3, n_scores)), np.zeros((n_values, 2))

    with pytest.raises(ValueError, match=rf"{n_scores}.*{n_values}|{n_values}.*{n_scores}"):
        attempt(block_by_block, scores, values, [])


cuts = st.lists(st.integers(0, 8), max_size=4).map(sorted)
seeds = st.integers(0, 999)


@given(n_keys=st.integers(1, 8), cuts=cuts, seed=seeds)
@settings(max_examples=15)
def test_any_blocks_of_a_row_give_what_the_whole_gives(attempt, n_keys, cuts, seed):
    scores, values = some_hidden(seed, n_keys)

    out = attempt(block_by_block, scores, values, cuts)

    assert_close(out, oracle(scores, values))


@given(
    cuts=cuts,
    order=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=4),
    seed=seeds,
)
@settings(max_examples=15)
def test_states_may_be_merged_in_any_order(attempt, cuts, order, seed):
    scores, values = some_hidden(seed, 7)

    out = attempt(merged, scores, values, cuts, order[: len(cuts)])

    assert_close(out, oracle(scores, values))
