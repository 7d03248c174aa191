"""Specs for exercise 02: masking."""

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
    for name in ("softmax", "log_softmax", "logsumexp")
]


def causal(ex, n_queries, n_keys):
    return ex.causal_mask(n_queries, n_keys)


def padding(ex, lengths, n_keys):
    return ex.padding_mask(lengths, n_keys)


def sliding_window(ex, n_queries, n_keys, window):
    return ex.sliding_window_mask(n_queries, n_keys, window)


def document(ex, documents):
    return ex.document_mask(documents)


def all_masks(ex, lengths, documents, window):
    """What a query may see if every mask must allow it."""
    seq_len = documents.shape[-1]
    causal = ex.causal_mask(seq_len, seq_len)
    window = ex.sliding_window_mask(seq_len, seq_len, window)
    return causal & window & ex.padding_mask(lengths, seq_len) & ex.document_mask(documents)


def soften(ex, scores, mask):
    return ex.masked_softmax(scores, mask)


def overwritten(ex, calls):
    """What the functions give in turn, when the caller changes each mask before the next call."""
    given = []
    for function, *args in calls:
        mask = getattr(ex, function)(*args)
        given.append(mask.copy())
        mask[...] = ~mask
    return given


def by_loop(n_queries, n_keys, sees):
    """The mask of a rule on positions, where the last query stands at the last key."""
    mask = np.zeros((n_queries, n_keys), dtype=bool)
    for i in range(n_queries):
        for j in range(n_keys):
            mask[i, j] = sees(n_keys - n_queries + i, j)
    return mask


def oracle(scores, mask):
    """Torch's softmax of scores that are −inf where hidden, in float64; 0 where it gives NaN."""
    scores = torch.from_numpy(scores.astype(np.float64))
    hidden = torch.from_numpy(~np.broadcast_to(mask, scores.shape))
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).nan_to_num(0).numpy()


@pytest.mark.parametrize(
    "n_queries, n_keys", [(4, 4), (2, 300), (1, 6), (5, 2), (0, 3), (3, 0)], ids=str
)
def test_causal_mask_shows_what_is_not_after_a_query(attempt, n_queries, n_keys):
    out = attempt(causal, n_queries, n_keys)

    assert_close(out, by_loop(n_queries, n_keys, lambda query, key: key <= query))


@pytest.mark.parametrize("n_keys", [5, 7])
def test_padding_mask_hides_the_keys_behind_each_sequence(attempt, n_keys):
    lengths = np.array([3, 0, 5, 1])

    out = attempt(padding, lengths, n_keys)

    expected = [[[j < length for j in range(n_keys)]] for length in lengths]
    assert_close(out, np.array(expected))


@pytest.mark.parametrize(
    "n_queries, n_keys, window",
    [(5, 5, 2), (3, 7, 3), (1, 4, 1), (6, 3, 2), (4, 5, 9), (0, 3, 1), (2, 0, 1)],
)
def test_sliding_window_mask_shows_so_many_positions(attempt, n_queries, n_keys, window):
    out = attempt(sliding_window, n_queries, n_keys, window)

    expected = by_loop(n_queries, n_keys, lambda query, key: 0 <= query - key < window)
    assert_close(out, expected)


@pytest.mark.parametrize("window", [0, -3])
def test_sliding_window_mask_rejects_a_window_of_no_position(attempt, window):
    with pytest.raises(ValueError, match=str(window)):
        attempt(sliding_window, 3, 5, window)


def test_document_mask_keeps_the_documents_of_a_row_apart(attempt):
    near, far = 2**60 + 1, 4 + 2**32  # as float64 the same as 2⁶⁰, as int32 the same as 4
    documents = np.array([[[4, far, 9, 4, 9], [-1, near, 2**60, 0, -1]]])  # (1, 2, seq_len)

    out = attempt(document, documents)

    expected = np.zeros((1, 2, 5, 5), dtype=bool)
    for index in np.ndindex(expected.shape):
        *row, query, key = index
        expected[index] = documents[*row, query] == documents[*row, key]
    assert_close(out, expected)


def test_masks_can_be_combined_into_one_for_each_sequence(attempt):
    lengths, window = np.array([6, 2, 4]), 3
    documents = np.array([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 2]])

    out = attempt(all_masks, lengths, documents, window)

    expected = np.zeros((3, 6, 6), dtype=bool)
    for b, query, key in np.ndindex(expected.shape):
        same = documents[b, query] == documents[b, key]
        expected[b, query, key] = same and key < lengths[b] and query - window < key <= query
    assert_close(out, expected)


def test_each_call_gives_a_new_mask_for_its_own_numbers(attempt):
    sizes = [(3, 5), (3, 6), (2, 6), (3, 5)]
    windows = [(3, 5, 2), (3, 5, 3), (3, 6, 3), (3, 5, 2)]
    rows = [np.array([3, 1, 2]), np.array([1, 3, 1]), np.array([3, 1, 2])]  # lengths, or documents
    calls = [("causal_mask", *args) for args in sizes]
    calls += [("sliding_window_mask", *args) for args in windows]
    calls += [("padding_mask", row, n_keys) for row in rows for n_keys in (3, 4)]
    calls += [("document_mask", row) for row in rows]

    out = attempt(overwritten, calls)

    expected = [by_loop(*args, lambda query, key: key <= query) for args in sizes]
    for n_queries, n_keys, window in windows:
        rule = range(window)
        expected += [by_loop(n_queries, n_keys, lambda q, k, rule=rule: q - k in rule)]
    for row in rows:
        expected += [np.arange(n)[None, None] < row[:, None, None] for n in (3, 4)]
    expected += [row[:, None] == row for row in rows]
    assert_close(out, expected)


@pytest.mark.parametrize(
    "shape, mask_shape",
    [
        ((2, 7, 3, 5), (2, 1, 3, 5)),  # for all heads alike
        ((2, 3, 5), (5,)),
        ((4, 3, 5), (3, 1)),
        ((2, 0, 5), (1, 5)),
    ],
)
def test_masked_softmax_shares_one_among_the_visible_keys(attempt, np_rng, shape, mask_shape):
    scores = np_rng.normal(size=shape)
    mask = np_rng.random(mask_shape) < 0.5
    mask[..., -1] = True

    out = attempt(soften, scores, mask)

    assert_close(out, oracle(scores, mask))


def test_masked_softmax_gives_hidden_keys_nothing_whatever_the_scores(attempt, np_rng):
    # Each row of visible scores lies elsewhere. The hidden ones lie far above or far below.
    scores = np_rng.normal(size=(5, 6)) + np.array([[0.0], [-1e5], [1e5], [-1e12], [-1e300]])
    mask = np.array([True, False, True, True, False, True])
    scores[:, 1], scores[:, 4] = 1e308, -1e308

    out = attempt(soften, scores, mask)

    assert_close(out, oracle(scores, mask))
    assert (out[:, ~mask] == 0).all(), "a hidden key has a weight that is not 0"


def test_masked_softmax_gives_zeros_to_a_query_that_sees_nothing(attempt, np_rng):
    scores = np_rng.normal(size=(2, 3, 4)) - 1e5  # which exp would turn into 0
    mask = np.array([[True, False, True, True], [False] * 4, [False, False, False, True]])

    out = attempt(soften, scores, mask)

    assert_close(out, oracle(scores, mask))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_masked_softmax_keeps_the_dtype_of_its_scores(attempt, np_rng, dtype):
    # exp overflows float16 from 12 on. Differences of quarters are exact in either dtype.
    scores = (20 + np_rng.integers(0, 9, size=(3, 5)) / 4).astype(dtype)
    mask = np.array([[True] * 5, [False, True, True, False, True], [False] * 5])

    out = attempt(soften, scores, mask)

    expected = oracle(scores, mask).astype(dtype)
    # A few roundings, each of at most half an eps of the weight or of the sum inside.
    eps = float(np.finfo(dtype).eps)
    assert_close(out, expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float64"])
def test_masked_softmax_rejects_a_mask_that_is_not_bool(attempt, dtype):
    with pytest.raises(TypeError, match=dtype):
        attempt(soften, np.zeros((3, 5)), np.ones((3, 5), dtype))


@given(seen=st.lists(st.booleans(), max_size=6), seed=st.integers(0, 999))
@settings(max_examples=20)
def test_masked_softmax_treats_a_hidden_key_as_one_that_is_not_there(attempt, seen, seed):
    mask = np.array([True, *seen])
    scores = 10 * np.random.default_rng(seed).normal(size=(len(mask), 2)).T  # not contiguous

    out = attempt(soften, scores, mask)

    assert_close(out[:, mask], attempt(soften, scores[:, mask], np.ones((1, 1), dtype=bool)))
