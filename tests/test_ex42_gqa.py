"""Specs for exercise 42: grouped-query attention."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.functional.scaled_dot_product_attention"]


class oracle:
    """PyTorch's own function under the name of the exercise."""

    @staticmethod
    def grouped_query_attention(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def attend(ex, q, k, v, mask=None):
    return ex.grouped_query_attention(q, k, v, mask)


def gradients(ex, q, k, v, mask, upstream):
    """The gradients of q, k and v, given that of the result."""
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attend(ex, q, k, v, mask), inputs, upstream)


def layer(ex, n_heads, n_kv_heads, weights, x, mask=None):
    """The output of a layer that bears these weights."""
    module = ex.GroupedQueryAttention(x.shape[-1], n_heads, n_kv_heads).to(x.dtype)
    module.load_state_dict(weights)
    return module(x, mask)


def layer_in_turn(ex, n_heads, n_kv_heads, calls):
    """One layer, for each (weights, x, mask) of the calls."""
    module, outs = ex.GroupedQueryAttention(calls[0][1].shape[-1], n_heads, n_kv_heads).double(), []
    for weights, x, mask in calls:
        module.load_state_dict(weights)
        outs.append(module(x, mask))
    return outs


def layer_gradients(ex, n_heads, n_kv_heads, weights, x, mask, upstream):
    module = ex.GroupedQueryAttention(x.shape[-1], n_heads, n_kv_heads).to(x.dtype)
    module.load_state_dict(weights)
    module(x.requires_grad_(), mask).backward(upstream)
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def shapes(ex, d_model, n_heads, n_kv_heads):
    """The parameters of a layer, and whatever else it stores."""
    state = ex.GroupedQueryAttention(d_model, n_heads, n_kv_heads).state_dict()
    return {name: list(value.shape) for name, value in state.items()}


def qkv(rng, n_kv_heads=2, group=3, n_queries=4, n_keys=5, head_dim=8, value_dim=7, batch=9):
    """Random q, k, v. All sizes differ, so no two axes can be swapped unnoticed."""
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    return (
        randn(batch, n_kv_heads * group, n_queries, head_dim),
        randn(batch, n_kv_heads, n_keys, head_dim),
        randn(batch, n_kv_heads, n_keys, value_dim),
    )


def causal(n_queries=4, n_keys=5):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
def test_shares_each_key_and_value_head_among_neighbouring_query_heads(attempt, rng, n_kv_heads):
    q, k, v = qkv(rng, n_kv_heads, group=6 // n_kv_heads)

    out = attempt(attend, q, k, v)

    assert_close(out, attend(oracle, q, k, v))


@pytest.mark.parametrize("batch", [9, 6, 1])  # 6 as the heads: an axis of 6 is theirs
@pytest.mark.parametrize("shape", [(5,), (4, 5), ("batch", 1, 1, 5), (6, 4, 5), ("batch", 6, 1, 5)])
def test_lets_a_query_see_only_the_keys_its_mask_allows(attempt, rng, shape, batch):
    q, k, v = qkv(rng, batch=batch)
    shape = [batch if size == "batch" else size for size in shape]
    mask = torch.rand(shape, generator=rng) < 0.5
    mask[..., 0] = True

    out = attempt(attend, q, k, v, mask)

    assert_close(out, attend(oracle, q, k, v, mask.expand(batch, 6, 4, 5)))


def test_takes_inputs_of_any_memory_layout(attempt, rng):
    # As a projection leaves them: (batch, seq_len, heads, …) in memory, viewed heads first.
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(rng))

    out = attempt(attend, q, k, v, causal())

    assert_close(out, attend(oracle, q, k, v, causal()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_the_dtype_of_its_inputs_after_the_softmax(attempt, rng, dtype):
    q, k, v = (x.to(dtype) for x in qkv(rng))
    q, v = 6 * q, v / v.abs().amax()  # scores up to 40, which half a precision rounds by 1/16

    out = attempt(attend, q, k, v, causal())

    expected = attend(oracle, q.double(), k.double(), v.double(), causal()).to(dtype)
    # The weights may be rounded, by half an eps each, and the result is: values are 1 at most.
    assert_close(out, expected, rtol=0.0, atol=1.5 * torch.finfo(dtype).eps)


def test_takes_float16_whose_products_are_too_large_for_float16(attempt, rng):
    q, k, v = (x.half() for x in qkv(rng))
    q, k = torch.full_like(q, 300.0), torch.full_like(k, 300.0)

    out = attempt(attend, q, k, v)

    expected = v.double().mean(dim=2, keepdim=True).repeat_interleave(3, dim=1)
    # Weights of 1/5 and the result are rounded by half an eps each, and the values reach 5.
    eps = torch.finfo(torch.float16).eps
    assert_close(out, expected.expand(-1, -1, 4, -1).half(), rtol=0.0, atol=5 * eps)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e50), (torch.float16, 6e4)])
def test_gives_the_one_key_that_is_seen_all_the_weight_however_low_it_scores(
    attempt, rng, dtype, size
):
    _, _, v = (x.to(dtype) for x in qkv(rng, batch=5))
    q = torch.full((5, 6, 4, 8), size, dtype=dtype)
    seen = torch.eye(5, dtype=torch.bool)  # in each row of the batch another one
    k = torch.where(seen, -1.0, 1.0).to(dtype)[:, None, :, None].expand(5, 2, 5, 8)

    out = attempt(attend, q, k, v, seen[:, None, None])

    expected = v.transpose(1, 2)[seen].repeat_interleave(3, dim=1)
    assert_close(out, expected[:, :, None].expand(-1, -1, 4, -1))


def test_sends_the_gradients_of_a_whole_group_to_its_keys_and_values(attempt, rng):
    q, k, v = qkv(rng)
    upstream = torch.randn(9, 6, 4, 7, generator=rng, dtype=torch.float64)

    grads = attempt(gradients, q, k, v, causal(), upstream)

    assert_close(grads, gradients(oracle, q, k, v, causal(), upstream))


@pytest.mark.parametrize("n_heads", [6, 2])
def test_rejects_query_heads_that_cannot_be_shared_out_evenly(attempt, rng, n_heads):
    q, k, v = qkv(rng, n_kv_heads=4, group=2)

    with pytest.raises(ValueError, match=rf"{n_heads}\D+4|4\D+{n_heads}"):
        attempt(attend, q[:, :n_heads], k, v)


sizes = st.integers(1, 4)


@settings(max_examples=20)
@given(n_kv_heads=sizes, group=sizes, n_queries=sizes, n_keys=sizes, seed=st.integers(0, 999))
def test_gives_each_query_head_plain_attention(attempt, n_kv_heads, group, n_queries, n_keys, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = qkv(rng, n_kv_heads, group, n_queries, n_keys)

    out = attempt(attend, q, k, v)

    for i in range(n_kv_heads * group):
        weights = torch.softmax(q[:, i] @ k[:, i // group].mT / math.sqrt(8), dim=-1)
        assert_close(out[:, i], weights @ v[:, i // group])


def projections(rng, n_heads, n_kv_heads, head_dim):
    """Random weights of a layer."""
    heads = {"q_proj": n_heads, "k_proj": n_kv_heads, "v_proj": n_kv_heads, "o_proj": n_heads}
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    weights = {
        f"{name}.weight": randn(n * head_dim, n_heads * head_dim) for name, n in heads.items()
    }
    return weights | {"o_proj.weight": weights["o_proj.weight"].mT}


def by_the_definition(weights, x, mask, head_dim):
    """What a layer with these weights gives."""
    q, k, v = (
        torch.stack((x @ weights[f"{name}.weight"].mT).split(head_dim, dim=-1), dim=1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    mask = mask if mask is None else mask.expand(len(x), q.shape[1], x.shape[1], x.shape[1])
    merged = torch.cat(attend(oracle, q, k, v, mask).unbind(dim=1), dim=-1)
    return merged @ weights["o_proj.weight"].mT


@pytest.mark.parametrize("masked", ["not at all", "for all alike", "padding", "each head its own"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
def test_layer_projects_splits_attends_merges_and_projects(attempt, rng, n_kv_heads, masked):
    batch, seq_len, n_heads, head_dim = 2, 5, 6, 3
    weights = projections(rng, n_heads, n_kv_heads, head_dim)
    x = torch.randn(batch, seq_len, 18, generator=rng, dtype=torch.float64)
    shape = {"for all alike": (5, 5), "padding": (2, 1, 1, 5), "each head its own": (6, 5, 5)}
    mask = None
    if masked in shape:
        mask = torch.rand(shape[masked], generator=rng) < 0.5
        mask[..., 2] = True

    out = attempt(layer, n_heads, n_kv_heads, weights, x, mask)

    assert_close(out, by_the_definition(weights, x, mask, head_dim))


def test_layer_learns_through_all_its_projections(attempt, rng):
    randn = partial(torch.randn, 3, 5, 24, generator=rng, dtype=torch.float64)
    weights, x, upstream = projections(rng, 6, 2, 4), randn(), randn()

    found = attempt(layer_gradients, 6, 2, weights, x, causal(5, 5), upstream)

    inputs = {"x": x} | weights
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    by_the_definition(inputs, inputs["x"], causal(5, 5), 4).backward(upstream)
    assert_close(found, {name: tensor.grad for name, tensor in inputs.items()})


def test_layer_has_small_key_and_value_projections_and_no_other_parameters(attempt):
    got = attempt(shapes, 24, 6, 2)

    expected = {"q_proj": [24, 24], "k_proj": [8, 24], "v_proj": [8, 24], "o_proj": [24, 24]}
    assert_close(got, {f"{name}.weight": shape for name, shape in expected.items()})


def test_layer_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    weights, others = projections(rng, 6, 2, 4), projections(rng, 6, 2, 4)
    seen = torch.tensor([[True, False, True, True], [False, True, False, True]])
    calls = [
        (weights, randn(2, 4, 24), causal(4, 4)),
        (weights, randn(2, 9, 24).mT.contiguous().mT, None),
        (weights, randn(2, 4, 24), None),
        (others, randn(2, 4, 24), seen[:, None, None]),
    ]

    outs = attempt(layer_in_turn, 6, 2, calls)

    assert_close(outs, [by_the_definition(*call, 4) for call in calls])


@pytest.mark.parametrize(
    ("d_model", "n_heads", "n_kv_heads", "two"),
    [(24, 5, 1, "24 5"), (24, 6, 4, "6 4"), (24, 2, 4, "2 4"), (24, 48, 1, "24 48")],
)
def test_layer_rejects_sizes_that_do_not_divide(attempt, d_model, n_heads, n_kv_heads, two):
    one, other = two.split()

    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{one}\b).*\b{other}\b"):
        attempt(shapes, d_model, n_heads, n_kv_heads)
