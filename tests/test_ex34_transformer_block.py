"""Specs for exercise 34: the transformer block."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.TransformerEncoderLayer", "torch.nn.TransformerEncoder"]

BATCH, SEQ_LEN, D_MODEL, N_HEADS, D_FF = 2, 5, 12, 3, 7

kinds = pytest.mark.parametrize("kind", ["PostNormBlock", "PreNormBlock"])


def shapes(d_model=D_MODEL, d_ff=D_FF):
    """The names and shapes of a block's parameters."""
    found = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        found |= {f"attn.{name}.weight": (d_model, d_model), f"attn.{name}.bias": (d_model,)}
    found |= {"ff.w_1.weight": (d_ff, d_model), "ff.w_1.bias": (d_ff,)}
    found |= {"ff.w_2.weight": (d_model, d_ff), "ff.w_2.bias": (d_model,)}
    return found | {f"norm_{i}.{kind}": (d_model,) for i in (1, 2) for kind in ("weight", "bias")}


def make_weights(rng):
    """Random weights, large enough that every part of the block matters."""
    return {name: 0.5 * draw(rng, *shape) for name, shape in shapes().items()}


def draw(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def causal_mask(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


# --- run on the code under test ------------------------------------------------------------------


def build(ex, kind, weights, dropout=0.0, causal=False):
    dtype = weights["norm_1.bias"].dtype
    block = getattr(ex, kind)(D_MODEL, N_HEADS, D_FF, dropout, causal).to(dtype)
    own = {name: list(value.shape) for name, value in block.state_dict().items()}
    if own != {name: list(value.shape) for name, value in weights.items()}:
        raise AttributeError(f"the parameters must be {', '.join(weights)}, got {own}")
    block.load_state_dict(weights)
    return block


def output(ex, kind, weights, x, mask=None, causal=False):
    return build(ex, kind, weights, causal=causal)(x, mask)


def output_with_dropout(ex, kind, weights, x, dropout, train):
    return build(ex, kind, weights, dropout).train(train)(x)


def gradients(ex, kind, weights, x, mask, upstream, train):
    block = build(ex, kind, weights).train(train)
    block(x.requires_grad_(), mask).backward(upstream)
    return {name: p.grad for name, p in block.named_parameters()} | {"x": x.grad}


def outputs_with_dropout(ex, kind, weights, x, dropout):
    """Of two calls."""
    block = build(ex, kind, weights, dropout)
    return torch.stack([block(x), block(x)])


def outputs_in_turn(ex, kind, weights, calls):
    """Of one block, for each (x, mask)."""
    block = build(ex, kind, weights)
    return [block(x, mask) for x, mask in calls]


def feed_forward(ex, weights, x, dropout=0.0, n_calls=1):
    d_ff, d_model = weights["w_1.weight"].shape
    ff = ex.FeedForward(d_model, d_ff, dropout).double()
    ff.load_state_dict(weights)
    return torch.stack([ff(x) for _ in range(n_calls)]) if n_calls > 1 else ff(x)


# --- the oracle: torch ---------------------------------------------------------------------------


def oracle(kind, weights):
    """nn.TransformerEncoderLayer with these weights, and its parameters under our names."""
    layer = nn.TransformerEncoderLayer(
        D_MODEL, N_HEADS, D_FF, dropout=0.0, batch_first=True,
        norm_first=kind == "PreNormBlock", dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for name, values in under_our_names(dict(layer.named_parameters())).items():
            values.copy_(weights[name])
    return layer


def under_our_names(theirs):
    """Their parameters, or gradients of them, as views that have our names."""
    ours = {}
    for kind in ("weight", "bias"):
        in_proj = theirs[f"self_attn.in_proj_{kind}"].chunk(3)
        names = ("q_proj", "k_proj", "v_proj")
        ours |= {f"attn.{n}.{kind}": part for n, part in zip(names, in_proj, strict=True)}
        ours[f"attn.o_proj.{kind}"] = theirs[f"self_attn.out_proj.{kind}"]
        for i in (1, 2):
            ours[f"ff.w_{i}.{kind}"] = theirs[f"linear{i}.{kind}"]
            ours[f"norm_{i}.{kind}"] = theirs[f"norm{i}.{kind}"]
    return ours


def expected_from(layer, x, mask=None):
    if mask is not None:  # theirs is True where a key is hidden, with batch and heads in one axis
        mask = ~mask.expand(len(x), N_HEADS, x.shape[1], x.shape[1]).flatten(0, 1)
    return layer(x, src_mask=mask)


# --- the specs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=["one row", "rows", "a batch of rows"])
def test_feed_forward_widens_bends_and_narrows_each_position(attempt, rng, batch):
    weights = {k[3:]: w for k, w in make_weights(rng).items() if k.startswith("ff.")}
    x = 10 * draw(rng, *batch, D_MODEL)

    out = attempt(feed_forward, weights, x)

    hidden = F.relu(F.linear(x, weights["w_1.weight"], weights["w_1.bias"]))
    assert_close(out, F.linear(hidden, weights["w_2.weight"], weights["w_2.bias"]))


@kinds
@pytest.mark.parametrize(("seq_len", "batch"), [(1, 2), (5, 1), (8, 3)])
def test_block_is_the_encoder_layer_of_torch(attempt, rng, kind, seq_len, batch):
    weights, x = make_weights(rng), draw(rng, batch, seq_len, D_MODEL)

    out = attempt(output, kind, weights, x)

    assert_close(out, expected_from(oracle(kind, weights), x))


@kinds
@pytest.mark.parametrize("shape", [(5, 5), (2, 1, 1, 5)], ids=["for all alike", "padding"])
def test_block_hands_its_mask_to_the_attention(attempt, rng, kind, shape):
    weights, x = make_weights(rng), draw(rng, BATCH, SEQ_LEN, D_MODEL)
    mask = torch.rand(shape, generator=rng) < 0.5
    mask[..., 0] = True

    out = attempt(output, kind, weights, x, mask)

    assert_close(out, expected_from(oracle(kind, weights), x, mask))


@kinds
@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with padding"])
def test_block_can_be_causal(attempt, rng, kind, masked):
    weights, x = make_weights(rng), draw(rng, BATCH, SEQ_LEN, D_MODEL)
    mask = torch.rand(BATCH, 1, 1, SEQ_LEN, generator=rng) < 0.5
    mask[..., 0] = True

    out = attempt(output, kind, weights, x, mask if masked else None, causal=True)

    past = causal_mask(SEQ_LEN)
    assert_close(out, expected_from(oracle(kind, weights), x, past & mask if masked else past))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_keeps_the_dtype_of_its_input(attempt, rng, kind, dtype):
    weights = {name: w.to(dtype) for name, w in make_weights(rng).items()}
    x = draw(rng, BATCH, SEQ_LEN, D_MODEL).to(dtype)

    out = attempt(output, kind, weights, x)

    layer = oracle(kind, {name: w.double() for name, w in weights.items()})
    # A dozen sums in a row, of numbers up to 10, each rounded to an eps.
    tolerance = 64 * torch.finfo(dtype).eps
    assert_close(out, expected_from(layer, x.double()).to(dtype), rtol=0.0, atol=tolerance)


@kinds
@pytest.mark.parametrize("train", [True, False], ids=["train mode", "eval mode"])
def test_block_sends_gradients_to_every_weight_and_to_x(attempt, rng, kind, train):
    weights, x, upstream = make_weights(rng), *draw(rng, 2, BATCH, SEQ_LEN, D_MODEL)

    grads = attempt(gradients, kind, weights, x, causal_mask(SEQ_LEN), upstream, train)

    layer = oracle(kind, weights)
    expected_from(layer, x.requires_grad_(), causal_mask(SEQ_LEN)).backward(upstream)
    expected = under_our_names({name: p.grad for name, p in layer.named_parameters()})
    assert_close(grads, expected | {"x": x.grad})


@kinds
def test_block_that_drops_all_that_its_branches_return_keeps_its_input(attempt, rng, kind):
    weights, x = make_weights(rng), draw(rng, BATCH, SEQ_LEN, D_MODEL)

    out = attempt(output_with_dropout, kind, weights, x, 1.0, True)

    norms = [(weights[f"norm_{i}.weight"], weights[f"norm_{i}.bias"]) for i in (1, 2)]
    for weight, bias in norms if kind == "PostNormBlock" else []:
        x = F.layer_norm(x, (D_MODEL,), weight, bias)
    assert_close(out, x)


@kinds
def test_block_drops_nothing_in_eval_mode(attempt, rng, kind):
    weights, x = make_weights(rng), draw(rng, BATCH, SEQ_LEN, D_MODEL)

    out = attempt(output_with_dropout, kind, weights, x, 0.5, False)

    assert_close(out, expected_from(oracle(kind, weights), x))


def test_feed_forward_drops_hidden_numbers_and_none_of_its_result(attempt, rng):
    weights = {k[3:]: w for k, w in make_weights(rng).items() if k.startswith("ff.")}
    x = draw(rng, 4, D_MODEL)

    out = attempt(feed_forward, weights, x, 1.0)

    assert_close(out, weights["w_2.bias"].expand(4, D_MODEL))


# --- what is dropped -----------------------------------------------------------------------------


def check_drawn_one_by_one(kept, p, axes):
    """Each of `kept` is True with probability 1 − p, whatever the others are.

    Next to each other along an axis, two are alike with probability p² + (1 − p)². A right
    version is seven standard deviations off once in 10¹¹ checks.
    """
    alike = p**2 + (1 - p) ** 2
    shares = [("all", kept, 1 - p)]
    shares += [
        (f"neighbours in {name} that are alike", kept == kept.roll(1, axis), alike)
        for axis, name in enumerate(axes)
    ]
    for what, found, share in shares:
        # Neighbours overlap, and so the spread is up to twice that of independent draws.
        off = 7 * 2 * math.sqrt(share * (1 - share) / found.numel())
        mean = float(found.double().mean())
        assert abs(mean - share) <= off, f"kept of {what}: {mean:.1%}, expected {share:.1%}"


@pytest.mark.parametrize("p", [0.3, 0.6])
def test_feed_forward_drops_each_hidden_number_by_itself_and_scales_up_the_others(attempt, p):
    same = {"w_1.weight": torch.eye(10), "w_2.weight": torch.eye(10)}
    weights = {k: w.double() for k, w in same.items()}
    weights |= {f"w_{i}.bias": torch.zeros(10, dtype=torch.float64) for i in (1, 2)}

    out = attempt(feed_forward, weights, torch.ones(10, 50, 10, dtype=torch.float64), p, 3)

    kept = out != 0
    assert_close(out, kept / (1 - torch.tensor(p, dtype=torch.float64)))
    check_drawn_one_by_one(kept, p, ["calls", "the batch", "positions", "features"])


@kinds
@pytest.mark.parametrize("p", [0.3, 0.6])
def test_block_drops_each_number_of_each_branch_by_itself_and_scales_up_the_others(
    attempt, rng, kind, p
):
    # Attention returns 1 and the feed-forward 10 everywhere, but 0 for the last two features.
    weights = {name: torch.zeros_like(w) for name, w in make_weights(rng).items()}
    ones = torch.tensor([1.0] * 10 + [0.0] * 2, dtype=torch.float64)
    weights |= {"attn.o_proj.bias": ones, "ff.w_2.bias": 10 * ones}
    # After norm_1 those two are 0 and 40: by them the last norm is undone.
    weights |= {"norm_1.weight": ones, "norm_2.weight": torch.ones_like(ones)}
    weights["norm_1.bias"] = 40 * torch.eye(D_MODEL, dtype=torch.float64)[-1]
    x = torch.zeros(10, 50, D_MODEL, dtype=torch.float64)

    out = attempt(outputs_with_dropout, kind, weights, x, p)

    post, scale = kind == "PostNormBlock", 1 / (1 - p)
    sums = out
    if post:
        sums = 40 * (out - out[..., -2:-1]) / (out[..., -1:] - out[..., -2:-1])
    second = sums > 5  # the first sum is less, normalised or not
    first = sums - 10 * scale * second > 1e-6
    expected = first * ones * scale
    if post:
        bias = weights["norm_1.bias"]
        expected = F.layer_norm(expected, (D_MODEL,), ones, bias)
    expected = expected + 10 * scale * (second * ones)
    assert_close(out, F.layer_norm(expected, (D_MODEL,)) if post else expected)
    kept = torch.stack([first, second])[..., :10]
    axes = ["the two branches", "calls", "the batch", "positions", "features"]
    check_drawn_one_by_one(kept, p, axes)


# --- more than one call --------------------------------------------------------------------------


@kinds
def test_block_keeps_nothing_from_one_call_to_the_next(attempt, rng, kind):
    weights = make_weights(rng)
    xs = [draw(rng, BATCH, n, D_MODEL) for n in (5, 8, 5)]
    masks = [causal_mask(5), causal_mask(8).mT, None]

    outs = attempt(outputs_in_turn, kind, weights, list(zip(xs, masks, strict=True)))

    layer = oracle(kind, weights)
    assert_close(outs, [expected_from(layer, x, mask) for x, mask in zip(xs, masks, strict=True)])


@settings(max_examples=8)
@given(kind=st.sampled_from(["PostNormBlock", "PreNormBlock"]), seed=st.integers(0, 999))
def test_block_treats_all_positions_alike(attempt, kind, seed):
    rng = torch.Generator().manual_seed(seed)
    weights, x = make_weights(rng), draw(rng, BATCH, SEQ_LEN, D_MODEL)
    order = torch.randperm(SEQ_LEN, generator=rng)

    out = attempt(output, kind, weights, x)

    assert_close(attempt(output, kind, weights, x[:, order]), out[:, order])
