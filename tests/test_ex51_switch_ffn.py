"""Specs for exercise 51: a Switch layer."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

D_MODEL, D_FF, N_EXPERTS = 6, 9, 4
PARAMETERS = ("router", "up_proj", "down_proj")


def make_weights(rng, dtype=torch.float64, d_model=D_MODEL, d_ff=D_FF, n_experts=N_EXPERTS):
    """Random weights, by the names that the docstring of SwitchFFN promises."""
    shapes = ((n_experts, d_model), (n_experts, d_ff, d_model), (n_experts, d_model, d_ff))
    pairs = zip(PARAMETERS, shapes, strict=True)
    return {k: torch.randn(v, generator=rng, dtype=torch.float64).to(dtype) / 2 for k, v in pairs}


def make_x(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def straight(rng, choice):
    """Weights whose router is the identity, and an x whose tokens choose these experts."""
    n_experts = 1 + max(choice)
    weights = make_weights(rng, d_model=n_experts, n_experts=n_experts)
    weights["router"] = torch.eye(n_experts, dtype=torch.float64)
    noise = torch.rand(len(choice), n_experts, generator=rng, dtype=torch.float64)
    return weights, noise + 2 * torch.eye(n_experts, dtype=torch.float64)[choice]


# --- run on the code under test ------------------------------------------------------------------


def build(ex, weights, factor, bias=None):
    n_experts, d_ff, d_model = weights["up_proj"].shape
    layer = ex.SwitchFFN(d_model, d_ff, n_experts, factor)
    for name in PARAMETERS:
        getattr(layer, name).data = weights[name].clone()
    if bias is not None:
        layer.router_bias.copy_(bias)
    return layer


def switch(ex, weights, factor, *several, bias=None):
    """The result for each x, from one layer."""
    layer = build(ex, weights, factor, bias)
    results = [layer(x) for x in several]
    return [{"y": y, "logits": logits, "choice": choice} for y, logits, choice in results]


def switch_in_both_modes(ex, weights, factor, x):
    layer = build(ex, weights, factor)
    results = {"training": layer.train()(x)[0], "evaluation": layer.eval()(x)[0]}
    return results | {"bias": layer.router_bias}


def switch_and_differentiate(ex, weights, factor, x, grad, grad_logits):
    layer = build(ex, weights, factor)
    x.requires_grad_()
    y, logits, _ = layer(x)
    torch.autograd.backward([y, logits], [grad, grad_logits])
    return {"y": y, "x": x.grad} | {name: getattr(layer, name).grad for name in PARAMETERS}


def begin(ex, d_model, d_ff, n_experts, factor):
    """A fresh layer: its parameters and what a state dict holds besides."""
    layer = ex.SwitchFFN(d_model, d_ff, n_experts, factor)
    shapes = {name: list(p.shape) for name, p in layer.named_parameters()}
    others = {name: b for name, b in layer.state_dict().items() if name not in shapes}
    return {"parameters": shapes, "others": others}


def count_flops(ex, weights, factor, x):
    layer = build(ex, weights, factor)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


def balance(ex, probs, choice, mask=None):
    return ex.load_balancing_loss(probs, choice, *([] if mask is None else [mask]))


def balance_gradient(ex, probs, choice, mask=None):
    probs.requires_grad_()
    balance(ex, probs, choice, mask).backward()
    return probs.grad


def z_loss(ex, logits, mask=None):
    return ex.router_z_loss(logits, *([] if mask is None else [mask]))


def z_gradient(ex, logits, mask=None):
    logits.requires_grad_()
    z_loss(ex, logits, mask).backward()
    return logits.grad


def settle(ex, weights, x, rate, n_steps):
    """How many tokens choose each expert, before and after so many steps of the bias."""
    layer, counts = build(ex, weights, 8.0), []
    for _ in range(n_steps):
        counts.append(layer(x)[2].bincount(minlength=len(weights["router"])))
        layer.router_bias.copy_(ex.update_router_bias(layer.router_bias, counts[-1], rate))
    return {"before": counts[0], "after": counts[-1]}


def next_bias(ex, bias, counts, rate):
    return ex.update_router_bias(bias, counts, rate)


# --- the definition, token by token --------------------------------------------------------------


def by_tokens(weights, factor, x, bias=None):
    """Each token in turn: it is kept as long as its expert has kept fewer than it may."""
    n_experts = len(weights["router"])
    tokens = x.reshape(-1, x.shape[-1])
    capacity, kept, rows, choices = factor * len(tokens) / n_experts, [0] * n_experts, [], []
    for token in tokens:
        shares = torch.exp(weights["router"] @ token)
        shares = shares / shares.sum()
        e = int((shares if bias is None else shares + bias).argmax())
        hidden = (weights["up_proj"][e] @ token).clamp(min=0)
        row = shares[e] * (weights["down_proj"][e] @ hidden)
        rows.append(row if kept[e] < capacity else 0 * token)
        kept[e] += 1
        choices.append(e)
    y = torch.stack(rows) if rows else tokens
    return {
        "y": y.reshape(x.shape),
        "logits": x @ weights["router"].T,
        "choice": torch.tensor(choices, dtype=torch.int64).reshape(x.shape[:-1]),
    }


# --- the layer -----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    n_experts=st.integers(1, 5),
    factor=st.sampled_from([0.01, 0.25, 0.5, 1.0, 1.25, 2.0, 8.0]),
    seed=st.integers(0, 999),
)
@example(leading=[7], n_experts=3, factor=1.0, seed=0)
@example(leading=[1], n_experts=1, factor=0.01, seed=1)
@example(leading=[], n_experts=3, factor=1.0, seed=2)
def test_sends_each_token_to_one_expert_as_long_as_that_has_room(
    attempt, leading, n_experts, factor, seed
):
    rng = torch.Generator().manual_seed(seed)
    weights, x = make_weights(rng, n_experts=n_experts), make_x(rng, *leading, D_MODEL)

    (out,) = attempt(switch, weights, factor, x)

    assert_close(out, by_tokens(weights, factor, x))


@pytest.mark.parametrize("factor", [0.25, 0.75, 1.0, 1.25, 1.5, 3.0])
def test_keeps_the_first_tokens_of_an_expert_up_to_its_capacity_rounded_up(attempt, rng, factor):
    weights, x = straight(rng, [0, 2, 0, 0, 1, 0, 0, 2, 0, 0])

    (out,) = attempt(switch, weights, factor, x)

    assert_close(out, by_tokens(weights, factor, x))


def test_counts_capacity_over_all_sequences_of_the_batch(attempt, rng):
    # The first sequence asks for expert 0 alone, the second for expert 1: one sequence by itself
    # would have room for two tokens of each.
    weights, x = straight(rng, [0, 0, 0, 0, 1, 1, 1, 0])

    (out,) = attempt(switch, weights, 1.0, x.reshape(2, 4, 2))

    assert_close(out, by_tokens(weights, 1.0, x.reshape(2, 4, 2)))


def test_gives_what_switch_transformers_gives(attempt, rng):
    from transformers.models.switch_transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    weights, x = make_weights(rng, torch.float32), make_x(rng, 1, 12, D_MODEL, dtype=torch.float32)

    (out,) = attempt(switch, weights, 1.0, x)

    config = SwitchTransformersConfig(
        d_model=D_MODEL, d_ff=D_FF, num_experts=N_EXPERTS, expert_capacity=3, dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    theirs.router.classifier.weight.data = weights["router"]
    for e in range(N_EXPERTS):
        theirs.experts[f"expert_{e}"].wi.weight.data = weights["up_proj"][e]
        theirs.experts[f"expert_{e}"].wo.weight.data = weights["down_proj"][e]
    with torch.no_grad():
        assert_close(out["y"], theirs(x))


def test_keeps_nothing_from_one_batch_to_the_next(attempt, rng):
    weights = make_weights(rng)
    batches = [make_x(rng, *shape, D_MODEL) for shape in ((3,), (2, 5), (1, 1), (2, 5))]

    out = attempt(switch, weights, 1.0, *batches)

    assert_close(out, [by_tokens(weights, 1.0, x) for x in batches])


def test_training_and_evaluation_do_the_same_and_leave_the_bias_alone(attempt, rng):
    weights, x = straight(rng, [0, 2, 0, 0, 1, 0, 0])

    out = attempt(switch_in_both_modes, weights, 0.75, x)

    y = by_tokens(weights, 0.75, x)["y"]
    assert_close(out, {"training": y, "evaluation": y, "bias": torch.zeros(3)})


@pytest.mark.parametrize("layout", ["every second", "columns first"])
def test_takes_an_x_of_any_layout(attempt, rng, layout):
    weights = make_weights(rng)
    x = make_x(rng, 2, 8, D_MODEL)[:, ::2]
    x = x if layout == "every second" else make_x(rng, 2, D_MODEL, 5).mT

    (out,) = attempt(switch, weights, 1.0, x)

    assert_close(out, by_tokens(weights, 1.0, x))


def test_the_bias_moves_choices_and_no_weights(attempt, rng):
    weights, x = make_weights(rng), make_x(rng, 11, D_MODEL)
    bias = torch.tensor([0.0, 0.5, -1.0, 0.25])

    (out,) = attempt(switch, weights, 8.0, x, bias=bias)

    assert_close(out, by_tokens(weights, 8.0, x, bias))


def test_gradients_reach_x_the_router_and_the_experts(attempt, rng):
    weights, x = make_weights(rng), make_x(rng, 2, 7, D_MODEL)
    grad, grad_logits = make_x(rng, 2, 7, D_MODEL), make_x(rng, 2, 7, N_EXPERTS)

    out = attempt(switch_and_differentiate, weights, 0.75, x, grad, grad_logits)

    mine = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    x = x.clone().requires_grad_()
    expected = by_tokens(mine, 0.75, x)
    torch.autograd.backward([expected["y"], expected["logits"]], [grad, grad_logits])
    gradients = {name: weight.grad for name, weight in mine.items()}
    assert_close(out, {"y": expected["y"], "x": x.grad} | gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_works_in_float32_at_least(attempt, rng, dtype):
    weights = make_weights(rng, dtype)
    x = make_x(rng, 5, D_MODEL, dtype=dtype)

    (out,) = attempt(switch, weights, 8.0, x)

    wide = {name: weight.float() for name, weight in weights.items()}
    logits = x.float() @ wide["router"].T
    assert_close(out["logits"], logits)
    assert_close(out["choice"], logits.argmax(dim=-1))
    assert_close(out["y"], by_tokens(wide, 8.0, x.float())["y"].to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_differences_decide_in_half_precision_too(attempt, rng, dtype):
    weights = make_weights(rng, dtype, d_model=2, n_experts=3)
    weights["router"] = torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=dtype)
    x = torch.tensor([[1, 2**-13], [1, -(2**-13)]], dtype=dtype)  # logits 1 and 1 ± 2⁻¹³
    bias = torch.tensor([0, 1e-5, 0])

    (plain,) = attempt(switch, weights, 8.0, x)
    (moved,) = attempt(switch, weights, 8.0, torch.zeros_like(x), bias=bias)

    assert_close([plain["choice"], moved["choice"]], [torch.tensor([1, 0]), torch.tensor([1, 1])])


def test_begins_with_a_bias_of_zeros_that_gradients_do_not_train(attempt):
    out = attempt(begin, 6, 9, 4, 1.25)

    shapes = {"router": [4, 6], "up_proj": [4, 9, 6], "down_proj": [4, 6, 9]}
    assert_close(out, {"parameters": shapes, "others": {"router_bias": torch.zeros(4)}})


def test_works_on_the_tokens_that_are_kept_and_no_others(attempt, rng):
    d_model, d_ff, n_experts = 8, 16, 5
    weights, x = (
        make_weights(rng, d_model=d_model, d_ff=d_ff, n_experts=n_experts),
        make_x(rng, 40, d_model),
    )

    flops = attempt(count_flops, weights, 0.5, x)

    counts = by_tokens(weights, 0.5, x)["choice"].bincount(minlength=n_experts)
    kept = int(counts.clamp(max=4).sum())
    most = 2 * 40 * d_model * n_experts + 4 * d_model * d_ff * kept
    assert 0 < flops <= most, f"{flops} flops, where {kept} tokens of 40 are kept: {most}"


@pytest.mark.parametrize("factor", [0, -1.0])
def test_refuses_a_capacity_factor_that_leaves_no_room(attempt, factor):
    with pytest.raises(ValueError):
        attempt(begin, 6, 9, 4, factor)


# --- the losses ----------------------------------------------------------------------------------


def routed(rng, *leading, n_experts=N_EXPERTS, dtype=torch.float64):
    """Probabilities, and choices that a bias may have moved away from the likeliest."""
    logits = make_x(rng, *leading, n_experts)
    choice = torch.randint(n_experts, leading, generator=rng)
    return torch.softmax(logits, dim=-1).to(dtype), choice


def test_the_balance_loss_is_that_of_switch_transformers(attempt, rng):
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func,
    )

    probs, choice = routed(rng, 1, 7, dtype=torch.float32)

    out = attempt(balance, probs, choice)

    assert_close(out, load_balancing_loss_func(probs, choice))


def test_the_balance_loss_is_one_for_equal_shares_and_the_number_of_experts_for_one(attempt):
    probs = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 2]]

    equal = attempt(balance, probs.reshape(2, 3, 3), torch.tensor([[0, 1, 2], [0, 1, 2]]))
    one = attempt(balance, probs[:1], torch.tensor([0]))

    assert_close([equal, one], [torch.tensor(1.0).double(), torch.tensor(3.0).double()])


def test_the_balance_loss_sends_gradients_through_the_probabilities_alone(attempt, rng):
    probs, choice = routed(rng, 3, 5)

    out = attempt(balance_gradient, probs, choice)

    share = choice.flatten().bincount(minlength=N_EXPERTS).double() / 15
    assert_close(out, (N_EXPERTS * share / 15).expand(3, 5, N_EXPERTS))


@pytest.mark.parametrize("what", [math.nan, math.inf, 9e9])
def test_padding_counts_in_neither_loss(attempt, rng, what):
    probs, choice = routed(rng, 3, 5)
    logits = make_x(rng, 3, 5, N_EXPERTS)
    mask = torch.arange(5) < torch.tensor([4, 1, 3])[:, None]
    probs[~mask], logits[~mask] = what, what

    losses = [attempt(balance, probs, choice, mask), attempt(z_loss, logits, mask)]

    share = choice[mask].bincount(minlength=N_EXPERTS).double() / 8
    expected = N_EXPERTS * (share * probs[mask].mean(dim=0)).sum()
    assert_close(losses, [expected, logits[mask].exp().sum(dim=-1).log().square().mean()])


@pytest.mark.parametrize("loss", [balance_gradient, z_gradient], ids=["balance", "z"])
def test_padding_gets_a_gradient_of_zero(attempt, rng, loss):
    values, choice = routed(rng, 3, 5)
    mask = torch.arange(5) < torch.tensor([4, 1, 3])[:, None]
    values[~mask], choice[~mask] = math.nan, -1

    grad = (
        attempt(loss, values, choice, mask)
        if loss is balance_gradient
        else attempt(loss, values, mask)
    )

    assert_close(grad[~mask], torch.zeros(7, N_EXPERTS, dtype=torch.float64))
    assert grad[mask].isfinite().all() and (grad[mask] != 0).any()


def test_the_z_loss_is_that_of_switch_transformers(attempt, rng):
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        router_z_loss_func,
    )

    logits = 3 * make_x(rng, 3, 5, N_EXPERTS)

    out = attempt(z_loss, logits)

    assert_close(out, router_z_loss_func(logits))


def test_the_z_loss_takes_logits_of_any_size_and_sends_their_gradients(attempt):
    logits = torch.tensor([[2e6, 0, 0], [-2e6, -2e6, -3e6], [1, 2, 3]]).double()

    grad = attempt(z_gradient, logits)

    z = torch.logsumexp(logits, dim=-1, keepdim=True)
    assert_close(grad, 2 * z / 3 * torch.softmax(logits, dim=-1))


# --- the bias ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bias_goes_one_step_up_for_the_idle_and_down_for_the_busy(attempt, rng, dtype):
    bias, counts = make_x(rng, 4, dtype=dtype), torch.tensor([7, 0, 90, 31])

    out = attempt(next_bias, bias, counts, 0.125)

    assert_close(out, bias + 0.125 * torch.tensor([1, 1, -1, 1], dtype=dtype))


@pytest.mark.parametrize("counts", [[4, 3, 5], [6_000_001, 6_000_000, 6_000_002]])
def test_the_bias_stays_where_an_expert_has_its_share(attempt, counts):
    bias = torch.tensor([0.5, -0.25, 0.0])

    out = attempt(next_bias, bias, torch.tensor(counts), 0.25)

    assert_close(out, torch.tensor([0.5, 0.0, -0.25]))


def test_the_bias_brings_equal_shares_to_a_router_that_has_none(attempt, rng):
    weights, x = make_weights(rng), make_x(rng, 400, D_MODEL)

    out = attempt(settle, weights, x, 0.02, 60)

    before, after = out["before"], out["after"]
    assert after.max() < before.max() and after.max() <= 140, (
        f"{before.tolist()}, then {after.tolist()}"
    )
