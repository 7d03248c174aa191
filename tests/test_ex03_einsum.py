"""Specs for exercise 03: einsum."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    f"{place}.{name}"
    for place in ("numpy", "numpy.linalg", "torch")
    for name in ("matmul", "dot", "inner", "tensordot", "multi_dot")
]


def multiply(ex, a, b):
    return ex.matmul(a, b)


def score(ex, q, k):
    return ex.attention_scores(q, k)


def split(ex, x, n_heads):
    return ex.split_heads(x, n_heads)


def merge(ex, x):
    return ex.merge_heads(x)


def split_and_merge(ex, x, n_heads):
    heads = ex.split_heads(x, n_heads)
    return {"heads": heads, "merged": ex.merge_heads(heads)}


def take_in_turn(ex, a, b):
    return ex.interleave(a, b)


def all_five(ex, x, y, heads):
    """All, of x and y (..., seq_len, d_model), heads (..., n_heads, seq_len, head_dim)."""
    return {
        "matmul": ex.matmul(x, y.swapaxes(-1, -2)),
        "attention_scores": ex.attention_scores(x, y),
        "split_heads": ex.split_heads(x, 2),
        "merge_heads": ex.merge_heads(heads),
        "interleave": ex.interleave(x, y),
    }


def all_five_twice(ex, first, second):
    """What the two calls have given, after both."""
    return all_five(ex, *first), all_five(ex, *second)


def by_hand(x, y, heads):
    """What all_five should give: products by torch, moves by loops."""
    products = (torch.from_numpy(x.copy()) @ torch.from_numpy(y.copy()).mT).numpy()
    return {
        "matmul": products,
        "attention_scores": products,
        "split_heads": split_by_loop(x, 2),
        "merge_heads": np.concatenate(list(np.moveaxis(heads, -3, 0)), axis=-1),
        "interleave": in_turn_by_loop(x, y),
    }


def split_by_loop(x, n_heads):
    """Feature h * head_dim + d of a position is feature d of head h."""
    *leading, seq_len, d_model = x.shape
    head_dim = d_model // n_heads
    heads = np.empty((*leading, n_heads, seq_len, head_dim), x.dtype)
    for h in range(n_heads):
        for d in range(head_dim):
            heads[..., h, :, d] = x[..., h * head_dim + d]
    return heads


def in_turn_by_loop(a, b):
    both = np.empty((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    for i in range(a.shape[-1]):
        both[..., 2 * i], both[..., 2 * i + 1] = a[..., i], b[..., i]
    return both


def holds(*numbers):
    """A pattern for a message that holds all these numbers, in any order."""
    return "(?s)" + "".join(rf"(?=.*\b{number}\b)" for number in numbers)


def test_matmul_sums_the_products_of_a_row_and_a_column(attempt, np_rng):
    a, b = np_rng.normal(size=(2, 3)), np_rng.normal(size=(3, 4))

    out = attempt(multiply, a, b)

    expected = np.zeros((2, 4))
    for i, j, k in np.ndindex(2, 3, 4):
        expected[i, k] += a[i, j] * b[j, k]
    assert_close(out, expected)


@pytest.mark.parametrize(
    "a_shape, b_shape",
    [
        ((2, 1, 3, 4), (6, 4, 5)),
        ((6, 3, 4), (2, 1, 4, 5)),
        ((3, 4), (2, 6, 4, 5)),
        ((2, 6, 3, 4), (4, 5)),
    ],
)
def test_matmul_broadcasts_leading_dimensions(attempt, np_rng, a_shape, b_shape):
    a, b = np_rng.normal(size=a_shape), np_rng.normal(size=b_shape)

    out = attempt(multiply, a, b)

    assert_close(out, (torch.from_numpy(a) @ torch.from_numpy(b)).numpy())


@pytest.mark.parametrize("n_columns, n_rows", [(4, 1), (4, 3), (3, 4), (1, 4)])
def test_matmul_rejects_inner_sizes_that_differ(attempt, n_columns, n_rows):
    with pytest.raises(ValueError, match=holds(n_columns, n_rows)):
        attempt(multiply, np.ones((2, n_columns)), np.ones((n_rows, 5)))


def test_attention_scores_are_dot_products_of_queries_and_keys(attempt, np_rng):
    q, k = np_rng.normal(size=(2, 7, 3, 4)), np_rng.normal(size=(2, 7, 5, 4))

    out = attempt(score, q, k)

    expected = np.zeros((2, 7, 3, 5))
    for b, h, i, j in np.ndindex(expected.shape):
        expected[b, h, i, j] = sum(q[b, h, i] * k[b, h, j])
    assert_close(out, expected)


@pytest.mark.parametrize(
    "q_shape, k_shape",
    [
        ((2, 7, 3, 4), (2, 1, 5, 4)),  # keys that all heads share
        ((2, 1, 3, 4), (2, 7, 5, 4)),
        ((2, 7, 3, 4), (5, 4)),
        ((3, 4), (2, 7, 5, 4)),
    ],
)
def test_attention_scores_broadcast_leading_dimensions(attempt, np_rng, q_shape, k_shape):
    q, k = np_rng.normal(size=q_shape), np_rng.normal(size=k_shape)

    out = attempt(score, q, k)

    assert_close(out, (torch.from_numpy(q) @ torch.from_numpy(k).mT).numpy())


@pytest.mark.parametrize("q_dim, k_dim", [(4, 1), (4, 3), (3, 4), (1, 4)])
def test_attention_scores_reject_keys_of_another_head_dim(attempt, q_dim, k_dim):
    with pytest.raises(ValueError, match=holds(q_dim, k_dim)):
        attempt(score, np.ones((2, q_dim)), np.ones((5, k_dim)))


def test_split_heads_gives_each_head_its_features_of_every_position(attempt, np_rng):
    x = np_rng.normal(size=(2, 7, 5, 12))  # (..., seq_len, d_model)

    out = attempt(split, x, 3)

    assert_close(out, split_by_loop(x, 3))


@pytest.mark.parametrize("d_model, n_heads", [(10, 4), (3, 6), (9, 2)])
def test_split_heads_rejects_a_d_model_that_heads_cannot_share(attempt, d_model, n_heads):
    with pytest.raises(ValueError, match=holds(d_model, n_heads)):
        attempt(split, np.ones((5, d_model)), n_heads)


def test_merge_heads_puts_the_heads_of_a_position_side_by_side(attempt, np_rng):
    x = np_rng.normal(size=(2, 7, 3, 5, 4))  # (..., n_heads, seq_len, head_dim)

    out = attempt(merge, x)

    expected = np.concatenate([x[:, :, h] for h in range(3)], axis=-1)
    assert_close(out, expected)


sizes = st.integers(1, 4)


@given(n_heads=sizes, head_dim=sizes, seq_len=sizes, seed=st.integers(0, 999))
@settings(max_examples=20)
def test_merge_heads_undoes_split_heads(attempt, n_heads, head_dim, seq_len, seed):
    x = np.random.default_rng(seed).normal(size=(n_heads * head_dim, seq_len)).T

    out = attempt(split_and_merge, x, n_heads)

    assert_close(out, {"heads": split_by_loop(x, n_heads), "merged": x})


@pytest.mark.parametrize("leading", [(), (3,), (3, 2)], ids=str)
def test_interleave_takes_elements_in_turn(attempt, np_rng, leading):
    a, b = np_rng.normal(size=(2, *leading, 4))

    out = attempt(take_in_turn, a, b)

    assert_close(out, in_turn_by_loop(a, b))


# Sums of six products with a digit are exact, and the next narrower dtype could not hold them:
# 2⁵⁷ has more bits than a float64 keeps, 2²⁵ more than a float32, 2¹⁷ more than a float16.
@pytest.mark.parametrize(
    "dtype, largest", [("float16", 9), ("float32", 2**17), ("int32", 2**25), ("int64", 2**57)]
)
def test_all_five_keep_the_dtype_of_their_inputs(attempt, np_rng, dtype, largest):
    x, heads = np_rng.integers(-largest, largest, size=(2, 3, 6)).astype(dtype)
    y, heads = np_rng.integers(-9, 10, size=(3, 6)).astype(dtype), heads.reshape(3, 2, 3)

    out = attempt(all_five, x, y, heads)

    assert_close(out, by_hand(x, y, heads))


def axes_reversed(x):
    return np.asfortranarray(x)


def positions_last(x):
    return np.asfortranarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)


def with_gaps(x):
    return np.repeat(x, 2, axis=-2)[..., ::2, :]


@pytest.mark.parametrize("layout", [axes_reversed, positions_last, with_gaps])
def test_all_five_take_arrays_of_any_memory_layout(attempt, np_rng, layout):
    x, y = (layout(part) for part in np_rng.normal(size=(2, 7, 5, 6)))
    heads = layout(np_rng.normal(size=(7, 2, 5, 3)))

    out = attempt(all_five, x, y, heads)

    assert_close(out, by_hand(x, y, heads))


def test_a_result_stays_when_the_function_is_called_again(attempt, np_rng):
    first, second = (
        (*np_rng.normal(size=(2, 5, 6)), np_rng.normal(size=(2, 5, 3))) for _ in range(2)
    )

    out = attempt(all_five_twice, first, second)

    assert_close(out, (by_hand(*first), by_hand(*second)))
