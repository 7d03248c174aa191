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


def all_five(ex, x, y):
    """Every function on arrays (seq_len, 6) and (seq_len, 6)."""
    heads = ex.split_heads(x, 2)
    return {
        "matmul": ex.matmul(x, y.T),
        "attention_scores": ex.attention_scores(x, y),
        "split_heads": heads,
        "merge_heads": ex.merge_heads(heads),
        "interleave": ex.interleave(x, y),
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


def test_matmul_sums_the_products_of_a_row_and_a_column(attempt, np_rng):
    a, b = np_rng.normal(size=(2, 3)), np_rng.normal(size=(3, 4))

    out = attempt(multiply, a, b)

    expected = np.zeros((2, 4))
    for i, j, k in np.ndindex(2, 3, 4):
        expected[i, k] += a[i, j] * b[j, k]
    assert_close(out, expected)


def test_matmul_broadcasts_leading_dimensions(attempt, np_rng):
    a, b = np_rng.normal(size=(2, 1, 3, 4)), np_rng.normal(size=(6, 5, 4)).swapaxes(1, 2)

    out = attempt(multiply, a, b)

    assert_close(out, (torch.from_numpy(a) @ torch.from_numpy(b)).numpy())


@pytest.mark.parametrize("n_rows", [1, 3])
def test_matmul_rejects_inner_sizes_that_differ(attempt, n_rows):
    with pytest.raises(ValueError, match="4"):
        attempt(multiply, np.ones((2, 4)), np.ones((n_rows, 5)))


def test_attention_scores_are_dot_products_of_queries_and_keys(attempt, np_rng):
    q, k = np_rng.normal(size=(2, 7, 3, 4)), np_rng.normal(size=(2, 7, 5, 4))

    out = attempt(score, q, k)

    expected = np.zeros((2, 7, 3, 5))
    for b, h, i, j in np.ndindex(expected.shape):
        expected[b, h, i, j] = sum(q[b, h, i] * k[b, h, j])
    assert_close(out, expected)


def test_attention_scores_broadcast_keys_that_heads_share(attempt, np_rng):
    q, k = np_rng.normal(size=(2, 7, 3, 4)), np_rng.normal(size=(2, 1, 5, 4))

    out = attempt(score, q, k)

    assert_close(out, (torch.from_numpy(q) @ torch.from_numpy(k).mT).numpy())


@pytest.mark.parametrize("head_dim", [1, 3])
def test_attention_scores_reject_keys_of_another_head_dim(attempt, head_dim):
    with pytest.raises(ValueError, match="4"):
        attempt(score, np.ones((2, 4)), np.ones((5, head_dim)))


def test_split_heads_gives_each_head_its_features_of_every_position(attempt, np_rng):
    x = np_rng.normal(size=(2, 7, 5, 12))  # (..., seq_len, d_model)

    out = attempt(split, x, 3)

    assert_close(out, split_by_loop(x, 3))


def test_split_heads_rejects_a_d_model_that_heads_cannot_share(attempt):
    with pytest.raises(ValueError, match=r"10\b.*\b4|4\b.*\b10"):
        attempt(split, np.ones((3, 10)), 4)


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

    expected = np.empty((*leading, 8))
    for i in range(4):
        expected[..., 2 * i], expected[..., 2 * i + 1] = a[..., i], b[..., i]
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_all_five_keep_the_dtype_of_their_inputs(attempt, np_rng, dtype):
    x, y = np_rng.integers(-9, 10, size=(2, 3, 6)).astype(dtype)

    out = attempt(all_five, x, y)

    products = (torch.from_numpy(x) @ torch.from_numpy(y).T).numpy()
    pairs = [
        [n for pair in zip(*rows, strict=True) for n in pair] for rows in zip(x, y, strict=True)
    ]
    assert_close(
        out,
        {
            "matmul": products,
            "attention_scores": products,
            "split_heads": split_by_loop(x, 2),
            "merge_heads": x,
            "interleave": np.array(pairs, dtype),
        },
    )
