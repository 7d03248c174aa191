"""Specs for exercise 32: multi-head attention."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    "torch.nn.MultiheadAttention",
    "torch.nn.functional.multi_head_attention_forward",
]

BATCH, N_QUERIES, N_KEYS, D_MODEL = 2, 5, 7, 24
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_weights(rng, d_model=D_MODEL):
    """Random weights, large enough that every part of the layer matters."""
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    weights = {f"{name}.weight": 0.4 * randn(d_model, d_model) for name in PROJECTIONS}
    return weights | {f"{name}.bias": 0.5 * randn(d_model) for name in PROJECTIONS}


def make_rows(rng, length, d_model=D_MODEL, batch=BATCH):
    return torch.randn(batch, length, d_model, generator=rng, dtype=torch.float64)


def make_mask(rng, *shape):
    """Each query sees about half of the keys, and the first one always."""
    mask = torch.rand(shape, generator=rng) < 0.5
    mask[..., 0] = True
    return mask


# --- run on the code under test ------------------------------------------------------------------


def build(ex, n_heads, causal, weights):
    d_model = len(weights["q_proj.bias"])
    layer = ex.MultiHeadAttention(d_model, n_heads, causal).to(weights["q_proj.bias"].dtype)
    own = {name: value.shape for name, value in layer.state_dict().items()}
    if own != {name: value.shape for name, value in weights.items()}:
        # Not load_state_dict's RuntimeError, which a wrong reshape raises as well.
        raise AttributeError(f"the parameters must be {', '.join(weights)}, got {own}")
    layer.load_state_dict(weights)
    return layer


def attend(ex, n_heads, weights, x, context=None, mask=None):
    """The output of a plain layer that bears these weights."""
    return build(ex, n_heads, False, weights)(x, context, mask)


def attend_causally(ex, n_heads, weights, x, context=None, mask=None):
    return build(ex, n_heads, True, weights)(x, context, mask)


def attend_in_eval_mode(ex, n_heads, causal, weights, x, mask):
    return build(ex, n_heads, causal, weights).eval()(x, None, mask)


def attend_in_turn(ex, n_heads, causal, weights, calls):
    """One layer, for each (x, context, mask) of the calls."""
    layer = build(ex, n_heads, causal, weights)
    return [layer(*call) for call in calls]


def two_fresh(ex, d_model):
    return [ex.MultiHeadAttention(d_model, 3).state_dict() for _ in range(2)]


def gradients(ex, n_heads, causal, train, weights, x, context, mask, upstream):
    """The gradients of all weights and of what comes in, given that of the result."""
    layer = build(ex, n_heads, causal, weights).train(train)
    inputs = {"x": x.requires_grad_()}
    if context is not None:
        inputs["context"] = context.requires_grad_()
    layer(x, context, mask).backward(upstream)
    return {name: i.grad for name, i in (dict(layer.named_parameters()) | inputs).items()}


def shapes(ex, d_model, n_heads):
    """The parameters of a layer, and whatever else it stores."""
    state = ex.MultiHeadAttention(d_model, n_heads).state_dict()
    return {name: list(value.shape) for name, value in state.items()}


# --- the oracle: torch ---------------------------------------------------------------------------


def oracle(n_heads, weights):
    """nn.MultiheadAttention with these weights; it keeps those of q, k and v in one."""
    layer = nn.MultiheadAttention(
        len(weights["q_proj.bias"]), n_heads, batch_first=True, dtype=torch.float64
    )
    theirs = {
        f"in_proj_{kind}": torch.cat([weights[f"{name}.{kind}"] for name in PROJECTIONS[:3]])
        for kind in ("weight", "bias")
    }
    theirs |= {f"out_proj.{kind}": weights[f"o_proj.{kind}"] for kind in ("weight", "bias")}
    layer.load_state_dict(theirs)
    return layer


def expected_from(layer, x, context=None, mask=None):
    context = x if context is None else context
    if mask is not None:  # theirs is True where a key is hidden, with batch and heads in one axis
        sizes = (len(x), layer.num_heads, x.shape[1], context.shape[1])
        mask = ~mask.expand(sizes).flatten(0, 1)
    return layer(x, context, context, attn_mask=mask, need_weights=False)[0]


# --- the specs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_heads", [1, 3, 8, 24])
def test_lets_each_head_attend_with_its_own_slice_of_the_features(attempt, rng, n_heads):
    weights, x = make_weights(rng), make_rows(rng, N_QUERIES)

    out = attempt(attend, n_heads, weights, x)

    assert_close(out, expected_from(oracle(n_heads, weights), x))


@pytest.mark.parametrize(("n_queries", "batch"), [(1, 3), (5, 1), (11, 4)])
def test_takes_keys_and_values_from_the_context(attempt, rng, n_queries, batch):
    weights, x = make_weights(rng), make_rows(rng, n_queries, batch=batch)
    context = make_rows(rng, N_KEYS, batch=batch)

    out = attempt(attend, 3, weights, x, context)

    assert_close(out, expected_from(oracle(3, weights), x, context))


@pytest.mark.parametrize(
    "shape",
    [(5, 7), (2, 1, 1, 7), (3, 5, 7), (2, 1, 5, 7), (1, 3, 1, 7), (2, 3, 5, 7)],
    ids=["for all", "padding", "of each head", "of each row", "padding of each head", "in full"],
)
def test_lets_a_query_see_only_the_keys_its_mask_allows(attempt, rng, shape):
    weights, x, context = make_weights(rng), make_rows(rng, N_QUERIES), make_rows(rng, N_KEYS)
    mask = make_mask(rng, *shape)

    out = attempt(attend, 3, weights, x, context, mask)

    assert_close(out, expected_from(oracle(3, weights), x, context, mask))


@pytest.mark.parametrize("seq_len", [1, 5, 24, 31])
def test_lets_a_causal_position_see_itself_and_those_before_it(attempt, rng, seq_len):
    weights, x = make_weights(rng), make_rows(rng, seq_len)

    out = attempt(attend_causally, 3, weights, x)

    past = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    assert_close(out, expected_from(oracle(3, weights), x, mask=past))


@pytest.mark.parametrize(
    "shape", [(5, 5), (2, 1, 1, 5), (2, 3, 5, 5)], ids=["for all alike", "padding", "in full"]
)
def test_hides_what_the_mask_hides_in_a_causal_layer_too(attempt, rng, shape):
    weights, x = make_weights(rng), make_rows(rng, N_QUERIES)
    mask = make_mask(rng, *shape)

    out = attempt(attend_causally, 3, weights, x, mask=mask)

    past = torch.ones(N_QUERIES, N_QUERIES, dtype=torch.bool).tril()
    assert_close(out, expected_from(oracle(3, weights), x, mask=mask & past))


def by_level(weights, size):
    """Weights with which each key scores ±`size` times the first feature of its row, or more."""
    first = torch.zeros(D_MODEL, D_MODEL, dtype=torch.float64)
    first[:, 0] = 1.0
    return weights | {
        "q_proj.weight": torch.zeros_like(first),
        "q_proj.bias": torch.full((D_MODEL,), size, dtype=torch.float64),
        "k_proj.weight": first,
        "k_proj.bias": torch.zeros(D_MODEL, dtype=torch.float64),
    }


def test_gives_the_one_key_that_is_seen_all_the_weight_however_low_it_scores(attempt, rng):
    weights, x, context = make_weights(rng), make_rows(rng, 3, batch=5), make_rows(rng, 5, batch=5)
    seen = torch.eye(5, dtype=torch.bool)  # in each row of the batch another one
    context[..., 0] = torch.where(seen, -1.0, 1.0)

    out = attempt(attend, 3, by_level(weights, 1e12), x, context, seen[:, None, None])

    v = context[seen] @ weights["v_proj.weight"].mT + weights["v_proj.bias"]
    expected = v @ weights["o_proj.weight"].mT + weights["o_proj.bias"]
    assert_close(out, expected[:, None].expand(-1, 3, -1))


def test_sees_nothing_of_the_future_however_low_the_past_scores(attempt, rng):
    weights, x = make_weights(rng), make_rows(rng, 5)
    x[..., 0] = torch.tensor([-4.0, -3.0, -2.0, 1.0, 2.0])

    out = attempt(attend_causally, 3, by_level(weights, 1e12), x)

    # Scores grow with the key: a query's own position has all the weight.
    v = x @ weights["v_proj.weight"].mT + weights["v_proj.bias"]
    assert_close(out, v @ weights["o_proj.weight"].mT + weights["o_proj.bias"])


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_keeps_nothing_from_one_call_to_the_next(attempt, rng, causal):
    weights, xs = make_weights(rng), [make_rows(rng, n) for n in (4, 9, 4, 4)]
    xs[1] = xs[1].mT.contiguous().mT  # another layout, too
    masks = [make_mask(rng, 4, 4), None, None, None]
    contexts = [None, None, *([None, None] if causal else [make_rows(rng, n) for n in (6, 6)])]
    calls = list(zip(xs, contexts, masks, strict=True))

    outs = attempt(attend_in_turn, 3, causal, weights, calls)

    layer = oracle(3, weights)
    for out, (x, context, mask) in zip(outs, calls, strict=True):
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = (past if mask is None else past & mask) if causal else mask
        assert_close(out, expected_from(layer, x, context, seen))


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_sees_in_eval_mode_what_it_sees_in_train_mode(attempt, rng, causal):
    weights, x, mask = make_weights(rng), make_rows(rng, N_QUERIES), make_mask(rng, 2, 1, 1, 5)

    out = attempt(attend_in_eval_mode, 3, causal, weights, x, mask)

    past = torch.ones(N_QUERIES, N_QUERIES, dtype=torch.bool).tril()
    assert_close(out, expected_from(oracle(3, weights), x, mask=mask & past if causal else mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype, causal):
    weights = {name: w.to(dtype) for name, w in make_weights(rng).items()}
    x, mask = make_rows(rng, N_QUERIES).to(dtype), make_mask(rng, 2, 1, 1, 5)

    out = attempt(attend_causally if causal else attend, 3, weights, x, mask=mask)

    past = torch.ones(N_QUERIES, N_QUERIES, dtype=torch.bool).tril()
    layer = oracle(3, {name: w.double() for name, w in weights.items()})
    expected = expected_from(layer, x.double(), mask=mask & past if causal else mask)
    # Scores of about 10 carry errors of a few eps into the weights, and results reach 10.
    assert_close(out, expected.to(dtype), rtol=0.0, atol=64 * torch.finfo(dtype).eps)


def test_starts_as_linear_layers_start(attempt):
    d_model = 96

    states = attempt(two_fresh, d_model)

    # Uniform between ±1/√d_model, each number by itself. Of 9216 numbers seven spreads of the mean
    # square are 7 · √(4/45) / 96 of the bound's square, and 9216 numbers leave no gap of 0.01.
    # Seven spreads of the mean are 7 · √(1/3) / 96 of the bound.
    bound = 1 / d_model**0.5
    for name in PROJECTIONS:
        weight, bias = (states[0][f"{name}.{kind}"].double() / bound for kind in ("weight", "bias"))
        square, mean = float(weight.square().mean()), float(weight.mean())
        assert 0.99 < weight.abs().max() <= 1.0, f"{name}.weight must reach ±1/√d_model, no more"
        assert abs(square - 1 / 3) < 0.022 and abs(mean) < 0.042, (
            f"{name}.weight must be uniform, got a mean of {mean:.3f}, a square of {square:.3f}"
        )
        assert 0.5 < bias.abs().max() <= 1.0, f"{name}.bias must reach ±1/√d_model, no more"
    for part in ("weight", "bias"):
        starts = [s[f"{name}.{part}"].flatten()[:96] for s in states for name in PROJECTIONS]
        assert len(torch.stack(starts).unique(dim=0)) == 8, f"two {part}s start alike"


@pytest.mark.parametrize("how", ["with a context", "of x alone", "causal", "in eval mode"])
def test_sends_gradients_to_every_weight_and_to_all_inputs(attempt, rng, how):
    weights, x, upstream = make_weights(rng), *(make_rows(rng, N_QUERIES) for _ in range(2))
    context = make_rows(rng, N_KEYS) if how == "with a context" else None
    mask = make_mask(rng, N_QUERIES, N_QUERIES if context is None else N_KEYS)
    modes = how == "causal", how != "in eval mode"

    grads = attempt(gradients, 3, *modes, weights, x, context, mask, upstream)

    layer, inputs = oracle(3, weights), {"x": x.requires_grad_()}
    if context is not None:
        inputs["context"] = context.requires_grad_()
    seen = mask.tril() if how == "causal" else mask
    expected_from(layer, x, context, seen).backward(upstream)
    expected = {name: i.grad for name, i in inputs.items()}
    for kind in ("weight", "bias"):
        parts = getattr(layer, f"in_proj_{kind}").grad.chunk(3)
        parts = (*parts, getattr(layer.out_proj, kind).grad)
        names = [f"{name}.{kind}" for name in PROJECTIONS]
        expected |= dict(zip(names, parts, strict=True))
    assert_close(grads, expected)


def test_has_four_square_projections_with_bias_and_no_other_parameters(attempt):
    got = attempt(shapes, 24, 3)

    expected = {f"{name}.weight": [24, 24] for name in PROJECTIONS}
    assert_close(got, expected | {f"{name}.bias": [24] for name in PROJECTIONS})


@pytest.mark.parametrize("n_heads", [5, 48])
def test_rejects_a_d_model_that_does_not_split_into_equal_heads(attempt, n_heads):
    with pytest.raises(ValueError, match=rf"24.*{n_heads}|{n_heads}.*24"):
        attempt(shapes, 24, n_heads)


def test_rejects_a_context_for_a_causal_layer(attempt, rng):
    weights, x, context = make_weights(rng), make_rows(rng, N_QUERIES), make_rows(rng, N_QUERIES)

    with pytest.raises(ValueError):
        attempt(attend_causally, 3, weights, x, context)


@settings(max_examples=20)
@given(
    n_heads=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    n_keys=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_does_not_care_in_which_order_the_context_comes(attempt, n_heads, head_dim, n_keys, seed):
    rng = torch.Generator().manual_seed(seed)
    d_model = n_heads * head_dim
    weights, x = make_weights(rng, d_model), make_rows(rng, 3, d_model)
    context, mask = make_rows(rng, n_keys, d_model), make_mask(rng, n_heads, 3, n_keys)
    order = torch.randperm(n_keys, generator=rng)

    out = attempt(attend, n_heads, weights, x, context, mask)

    shuffled = attempt(attend, n_heads, weights, x, context[:, order], mask[..., order])
    assert_close(shuffled, out)
