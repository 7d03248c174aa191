"""Specs for exercise 41: SwiGLU and RMSNorm."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.functional.rms_norm", "torch.rms_norm", "torch.nn.RMSNorm"]


def normalise(ex, x, weight, eps):
    """The output of a norm that bears this weight, in the weight's dtype."""
    norm = ex.RMSNorm(len(weight), eps).to(weight.dtype)
    norm.load_state_dict({"weight": weight})
    return norm(x)


def normalise_in_turn(ex, calls):
    """One norm for each (x, weight) of the calls, and its weight after each."""
    norm, results = ex.RMSNorm(len(calls[0][1]), 1e-3), []
    for x, weight in calls:
        norm.load_state_dict({"weight": weight})
        out = norm(x)
        results.append((out, norm.weight.clone()))
    return results


def fresh_norm(ex, x):
    norm = ex.RMSNorm(x.shape[-1])
    ex.RMSNorm(x.shape[-1], 2.0)  # another one, which is none of its business
    return norm.state_dict(), norm(x)


def norm_gradients(ex, x, weight, eps, upstream):
    """The gradients of x and of the weight, given that of the result."""
    norm = ex.RMSNorm(len(weight), eps).to(weight.dtype)
    norm.load_state_dict({"weight": weight})
    return torch.autograd.grad(norm(x.requires_grad_()), [x, norm.weight], upstream)


def feed_forward(ex, x, weights):
    d_ff, d_model = weights["gate_proj.weight"].shape
    module = ex.SwiGLU(d_model, d_ff).to(x.dtype)
    module.load_state_dict(weights)
    return module(x)


def feed_forward_in_turn(ex, calls):
    """One feed-forward part for each (x, weights) of the calls."""
    d_ff, d_model = calls[0][1]["gate_proj.weight"].shape
    module, outs = ex.SwiGLU(d_model, d_ff), []
    for x, weights in calls:
        module.to(x.dtype).load_state_dict(weights)
        outs.append(module(x))
    return outs


def feed_forward_gradients(ex, x, weights, upstream):
    d_ff, d_model = weights["gate_proj.weight"].shape
    module = ex.SwiGLU(d_model, d_ff).to(x.dtype)
    module.load_state_dict(weights)
    module(x.requires_grad_()).backward(upstream)
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def shapes(ex, d_model, d_ff):
    """The parameters of the feed-forward part, and whatever else it stores."""
    state = ex.SwiGLU(d_model, d_ff).state_dict()
    return {name: list(value.shape) for name, value in state.items()}


def randn(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def projections(rng, d_model=6, d_ff=11, dtype=torch.float64):
    """Random weights of SwiGLU."""
    matrix = partial(randn, rng, dtype=dtype)
    return {
        "gate_proj.weight": matrix(d_ff, d_model),
        "up_proj.weight": matrix(d_ff, d_model),
        "down_proj.weight": matrix(d_model, d_ff),
    }


def llama_mlp(weights):
    """The same layer in transformers."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    d_ff, d_model = weights["gate_proj.weight"].shape
    mlp = LlamaMLP(LlamaConfig(hidden_size=d_model, intermediate_size=d_ff, num_attention_heads=1))
    mlp.to(weights["gate_proj.weight"].dtype).load_state_dict(weights)
    return mlp


# --- RMSNorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_norm_divides_each_vector_by_its_root_mean_square(attempt, rng, eps):
    x = randn(rng, 7, 2, 5).transpose(0, 1) * torch.tensor([0.02, 2.0])[:, None, None] + 0.01
    weight = randn(rng, 5)

    out = attempt(normalise, x, weight, eps)

    expected = F.rms_norm(x, (5,), weight, eps)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)  # float64, all the way


@pytest.mark.parametrize("eps", [1e-6, 0.01])
def test_norm_agrees_with_llama_in_transformers(attempt, rng, eps):
    x, weight = 0.1 * randn(rng, 2, 3, 48).float(), randn(rng, 48).float()

    out = attempt(normalise, x, weight, eps)

    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(48, eps)
    norm.load_state_dict({"weight": weight})
    assert_close(out, norm(x).detach())


def test_norm_starts_with_a_weight_of_ones_and_an_eps_of_a_hundred_thousandth(attempt, rng):
    x = 0.003 * randn(rng, 4, 5).float()

    state, out = attempt(fresh_norm, x)

    assert_close(state, {"weight": torch.ones(5)})
    assert_close(out, F.rms_norm(x, (5,), None, 1e-5))


@pytest.mark.parametrize("weights", [torch.float32, "like x"], ids=["weight32", "weight16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_computes_in_float32_and_returns_the_dtype_of_x(attempt, rng, dtype, weights):
    # The squares of 400 are too large for float16, those of 0.0002 too small; bfloat16 has room
    # for both, and keeps two to three digits of each.
    sizes = torch.tensor([400.0, 1.0, 2e-4]).repeat_interleave(20)[:, None]
    x = (sizes * randn(rng, 60, 24)).to(dtype)
    weight = randn(rng, 24).to(dtype if weights == "like x" else weights)

    out = attempt(normalise, x, weight, 1e-9)

    exact = F.rms_norm(x.double(), (24,), None, 1e-9)
    once = (exact * weight.double()).to(dtype)
    twice = (exact.to(dtype).double() * weight.double()).to(dtype)
    assert_close(out, once, rtol=1.6 * torch.finfo(dtype).eps, atol=1e-7)
    # What float32 computes lies next to a tie, and is rounded otherwise, once in some 2¹² numbers;
    # one more rounding to the dtype of x changes every other number.
    share = max(float((out == e).double().mean()) for e in (once, twice))
    assert share > 0.98, f"{1 - share:.0%} of the numbers are rounded more than docstring says"


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=["narrow weight", "wide weight", "wide x"],
)
def test_norm_gives_the_dtype_of_x_whatever_the_weight_has(attempt, rng, x_dtype, weight_dtype):
    x, weight = randn(rng, 3, 5).to(x_dtype), randn(rng, 5).to(weight_dtype)

    out = attempt(normalise, x, weight, 0.1)

    expected = F.rms_norm(x.double(), (5,), weight.double(), 0.1).to(x_dtype)
    eps = 4 * torch.finfo(x_dtype).eps
    assert_close(out, expected, rtol=eps, atol=eps)


def test_norm_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    xs = randn(rng, 3, 5).bfloat16(), randn(rng, 3, 5).float(), randn(rng, 7, 5).float()
    weights = randn(rng, 3, 5).float()

    results = attempt(normalise_in_turn, list(zip(xs, weights, strict=True)))

    for (out, after), x, weight in zip(results[1:], xs[1:], weights[1:], strict=True):
        assert_close((out, after), (F.rms_norm(x, (5,), weight, 1e-3), weight))


def test_norm_computes_in_float64_where_x_is_float64(attempt, rng):
    x, weight = 1e25 * randn(rng, 3, 5), randn(rng, 5)  # the squares are too large for float32

    out = attempt(normalise, x, weight, 1e-5)

    assert_close(out, F.rms_norm(x, (5,), weight, 1e-5))


def test_norm_sends_gradients_to_x_and_to_its_weight(attempt, rng):
    x, weight, upstream = randn(rng, 2, 3, 5), randn(rng, 5), randn(rng, 2, 3, 5)

    found = attempt(norm_gradients, x, weight, 0.1, upstream)

    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = F.rms_norm(inputs[0], (5,), inputs[1], 0.1)
    assert_close(found, torch.autograd.grad(out, inputs, upstream))


@pytest.mark.parametrize(
    ("d_model", "width"), [(5, 1), (5, 4), (5, 6), (5, 10), (1, 4)], ids=lambda size: str(size)
)
def test_norm_rejects_vectors_of_another_width(attempt, d_model, width):
    with pytest.raises(ValueError, match=rf"{d_model}\D+{width}|{width}\D+{d_model}"):
        attempt(normalise, torch.ones(3, width), torch.ones(d_model), 1e-5)


@settings(max_examples=15)
@given(
    scale=st.floats(0.01, 100),
    shape=st.sampled_from([(), (0,), (1,), (2, 3)]),
    d_model=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_norm_gives_a_vector_of_any_size_the_same_result(attempt, scale, shape, d_model, seed):
    rng = torch.Generator().manual_seed(seed)
    x, weight = randn(rng, *shape, d_model), randn(rng, d_model)

    out = attempt(normalise, scale * x, weight, 0.0)

    assert_close(out, F.rms_norm(x, (d_model,), weight, 0.0))


# --- SwiGLU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6)])
def test_feed_forward_agrees_with_llama_in_transformers(attempt, rng, shape):
    x, weights = randn(rng, *shape), projections(rng)

    out = attempt(feed_forward, x, weights)

    assert_close(out, llama_mlp(weights)(x).detach())


def test_feed_forward_opens_and_closes_gates_of_any_size(attempt, rng):
    x, weights = 1e4 * randn(rng, 4, 6), projections(rng)

    out = attempt(feed_forward, x, weights)

    assert_close(out, llama_mlp(weights)(x).detach(), rtol=1e-10)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_feed_forward_learns_as_llama_does(attempt, rng, size):
    x, upstream, weights = size * randn(rng, 3, 4, 6), randn(rng, 3, 4, 6), projections(rng)

    found = attempt(feed_forward_gradients, x, weights, upstream)

    mlp, x = llama_mlp(weights), x.requires_grad_()
    mlp(x).backward(upstream)
    expected = {"x": x.grad} | {name: p.grad for name, p in mlp.named_parameters()}
    assert_close(found, expected)


def test_feed_forward_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    xs = randn(rng, 3, 6).float(), randn(rng, 3, 6), randn(rng, 6, 2, 5).transpose(0, 2)
    calls = [(0.3 * x, projections(rng, dtype=x.dtype)) for x in xs]

    outs = attempt(feed_forward_in_turn, calls)

    assert_close(outs, [llama_mlp(weights)(x).detach() for x, weights in calls])


def test_feed_forward_has_three_matrices_and_nothing_else(attempt):
    found = attempt(shapes, 6, 11)

    expected = {"gate_proj": [11, 6], "up_proj": [11, 6], "down_proj": [6, 11]}
    assert_close(found, {f"{name}.weight": shape for name, shape in expected.items()})
