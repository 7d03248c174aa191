"""Specs for exercise 31: scaled dot-product attention."""

from functools import partial

import pytest
import torch
import torch.nn.functional as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.functional.scaled_dot_product_attention"]


def attend(ex, q, k, v, mask=None):
    return ex.scaled_dot_product_attention(q, k, v, mask)


def gradients(ex, q, k, v, mask, upstream, asked="qkv"):
    """The gradients of those that are asked for, given that of the result; None for none."""
    named = {"q": q, "k": k, "v": v}
    inputs = [named[name].requires_grad_() for name in asked]
    out = attend(ex, q, k, v, mask)
    return torch.autograd.grad(out, inputs, upstream, allow_unused=True)


def qkv(rng, n_queries=3, n_keys=5, head_dim=4, value_dim=6, batch=()):
    """Random q, k, v. All sizes differ, so no two axes can be swapped unnoticed."""
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    return (
        randn(*batch, n_queries, head_dim),
        randn(*batch, n_keys, head_dim),
        randn(*batch, n_keys, value_dim),
    )


def causal(n_queries=3, n_keys=5):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril()


@pytest.mark.parametrize("n_keys", [5, 300])
def test_averages_the_values_by_the_softmax_of_the_scaled_scores(attempt, rng, n_keys):
    q, k, v = qkv(rng, n_keys=n_keys, batch=(2, 7))

    out = attempt(attend, q, k, v)

    assert_close(out, attend(oracle, q, k, v), rtol=1e-12, atol=1e-12)  # all in float64


def test_lets_a_query_see_only_the_keys_its_mask_allows(attempt, rng):
    q, k, v = qkv(rng)
    mask = causal()

    out = attempt(attend, q, k, v, mask)

    assert_close(out, attend(oracle, q, k, v, mask))


@pytest.mark.parametrize(
    ("queries", "keys", "masks"),
    [((2, 7), (2, 1), (2, 1)), ((7,), (2, 1), (7,)), ((2, 1), (7,), ()), ((), (), (2, 7))],
    ids=["one head of keys", "queries for all rows", "one head of queries", "the mask alone"],
)
def test_broadcasts_the_mask_and_the_leading_dimensions(attempt, rng, queries, keys, masks):
    n_queries, n_keys = 3, 5
    q, _, _ = qkv(rng, batch=queries)
    _, k, v = qkv(rng, batch=keys)
    mask = torch.rand(*masks, 1, n_keys, generator=rng) < 0.5  # what is hidden is padding
    mask[..., 0] = True

    out = attempt(attend, q, k, v, mask)

    q, k, v, mask = (x.expand(2, 7, -1, -1) for x in (q, k, v, mask))
    assert_close(out, attend(oracle, q, k, v, mask.expand(-1, -1, n_queries, -1)))


def test_takes_inputs_of_any_memory_layout(attempt, rng):
    # As a projection leaves them: (batch, seq_len, n_heads, …) in memory, viewed heads first.
    inputs = qkv(rng, head_dim=8, batch=(2, 7))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    mask = causal(5, 3).mT

    out = attempt(attend, q, k, v, mask)

    assert_close(out, attend(oracle, q, k, v, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_to_the_dtype_of_its_inputs_after_the_softmax(attempt, rng, dtype):
    q, k, v = (x.to(dtype) for x in qkv(rng, 20, 20, head_dim=5, batch=(2,)))
    q, v = 6 * q, v / v.abs().amax()  # scores up to 40, which half a precision rounds by 1/16
    if dtype != torch.float32:  # and here beyond 100, of parts that are larger still
        q[..., :3] = torch.tensor([15, 17, 16])
        parts = torch.randint(-8, 8, (2, 20, 1), generator=rng)
        k[..., :3] = torch.tensor([0, 0, 16]) + parts * torch.tensor([17, -15, 0])
    mask = causal(20, 20)

    out = attempt(attend, q, k, v, mask)

    expected = attend(oracle, q.double(), k.double(), v.double(), mask).to(dtype)
    # The weights may be rounded, by half an eps each, and the result is: values are 1 at most.
    # In float32 scores of 40 are rounded too, by 8 eps in all their sums.
    eps = torch.finfo(dtype).eps
    assert_close(out, expected, rtol=0.0, atol=16 * eps if dtype == torch.float32 else 1.5 * eps)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_takes_products_that_are_too_large_for_float16(attempt, rng, dtype, sign):
    _, _, v = (x.to(dtype) for x in qkv(rng))
    q = torch.tensor([300.0, 0.0, 300.0], dtype=dtype)[:, None].expand(3, 4)
    k = sign * torch.tensor([300.0, 300.0, 302.0, 300.0, 302.0], dtype=dtype)[:, None].expand(5, 4)

    out = attempt(attend, q, k, v)

    expected = attend(oracle, q.double(), k.double(), v.double()).to(dtype)
    # Weights and result are rounded by half an eps each, and the values reach 4.
    assert_close(out, expected, rtol=0.0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 1e5), (torch.float64, 1e45), (torch.float32, 1e10), (torch.float16, 6e4)],
)
def test_gives_the_one_key_that_is_seen_all_the_weight_however_low_it_scores(
    attempt, rng, dtype, size
):
    _, _, v = (x.to(dtype) for x in qkv(rng, n_queries=5))
    q, seen = torch.full((5, 4), size, dtype=dtype), torch.randperm(5, generator=rng)
    mask = torch.arange(5) == seen[:, None]
    k = torch.ones(5, 5, 4, dtype=dtype)
    k[mask] = -1.0  # for each query: the visible key scores −2·size, the hidden ones 2·size

    out = attempt(attend, q[:, None], k, v, mask[:, None])

    assert_close(out, v[seen][:, None])


def test_stays_exact_when_the_scores_are_far_too_large_for_exp(attempt, rng):
    q, k, v = qkv(rng)
    signs = torch.tensor([[-1.0], [1.0], [-1.0]])  # scores above 10¹² in row 1, else below −10¹²
    q, k = 1e12 * signs * (q.abs() + 1), k.abs() + 1
    mask = causal()

    out = attempt(attend, q, k, v, mask)

    assert_close(out, attend(oracle, q, k, v, mask))


@pytest.mark.parametrize("asked", ["qkv", "q", "k", "v"])
def test_sends_gradients_to_q_k_and_v(attempt, rng, asked):
    q, k, v = qkv(rng, batch=(2,))
    mask = torch.rand(2, 3, 5, generator=rng) < 0.5
    mask[..., 0] = True
    upstream = torch.randn(2, 3, 6, generator=rng, dtype=torch.float64)

    grads = attempt(gradients, q, k, v, mask, upstream, asked)

    assert_close(grads, gradients(oracle, q, k, v, mask, upstream, asked))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.uint8])
def test_rejects_a_mask_that_is_not_bool(attempt, rng, dtype):
    q, k, v = qkv(rng)

    with pytest.raises(TypeError, match="bool"):
        attempt(attend, q, k, v, causal().to(dtype))


sizes = st.integers(1, 6)
seeds = st.integers(0, 999)


@settings(max_examples=25)
@given(n_queries=sizes, n_keys=sizes, head_dim=sizes, seed=seeds)
def test_averages_equal_values_to_that_value(attempt, n_queries, n_keys, head_dim, seed):
    q, k, _ = qkv(torch.Generator().manual_seed(seed), n_queries, n_keys, head_dim)
    v = torch.full((n_keys, 2), 3.0, dtype=torch.float64)

    out = attempt(attend, q, k, v)

    assert_close(out, torch.full((n_queries, 2), 3.0, dtype=torch.float64))


@settings(max_examples=25)
@given(
    n_queries=st.integers(0, 3), seen=st.lists(st.booleans(), min_size=1, max_size=6), seed=seeds
)
def test_treats_a_hidden_key_as_one_that_is_not_there(attempt, n_queries, seen, seed):
    seen = torch.tensor([True, *seen])
    q, k, v = qkv(torch.Generator().manual_seed(seed), n_queries, len(seen))

    out = attempt(attend, q, k, v, seen.expand(n_queries, -1))

    assert_close(out, attempt(attend, q, k[seen], v[seen]))
