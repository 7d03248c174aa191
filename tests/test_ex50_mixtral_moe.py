"""Specs for exercise 50: a sparse mixture of experts, as in Mixtral."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

D_MODEL, D_FF, N_EXPERTS = 6, 9, 5


def make_weights(rng, dtype=torch.float64, d_model=D_MODEL, d_ff=D_FF, n_experts=N_EXPERTS):
    """Random weights, by the names that the docstring of SparseMoE promises."""
    shapes = {
        "router": (n_experts, d_model),
        "gate_proj": (n_experts, d_ff, d_model),
        "up_proj": (n_experts, d_ff, d_model),
        "down_proj": (n_experts, d_model, d_ff),
    }
    return {k: torch.randn(v, generator=rng, dtype=dtype) / 2 for k, v in shapes.items()}


def make_x(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


# --- run on the code under test ------------------------------------------------------------------


def route(ex, logits, k, renormalize=None):
    how = {} if renormalize is None else {"renormalize": renormalize}
    weights, experts = ex.route(logits, k, **how)
    return {"weights": weights, "experts": experts}


def route_gradient(ex, logits, k, renormalize, grad):
    weights, _ = ex.route(logits.requires_grad_(), k, renormalize)
    return torch.autograd.grad(weights, logits, grad)[0]


def build(ex, weights, k):
    n_experts, d_ff, d_model = weights["gate_proj"].shape
    moe = ex.SparseMoE(d_model, d_ff, n_experts, k)
    for name, weight in weights.items():
        getattr(moe, name).data = weight.clone()
    return moe


def mix(ex, weights, k, x):
    return build(ex, weights, k)(x)


def mix_by_the_way(ex, weights, k, inputs):
    """Of one model: what it makes of the inputs, a step and a mode between, and other dtypes."""
    moe, found = build(ex, weights, k), []
    for x in inputs:
        found.append(moe(x))
        found[-1].square().sum().backward()
        take_a_step([getattr(moe, name) for name in weights])
        moe.train(not moe.training)
    dtypes = (torch.bfloat16, torch.float32)
    return found, [str(moe.to(dtype)(inputs[0].to(dtype)).dtype) for dtype in dtypes]


def take_a_step(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.01 * parameter.grad
            parameter.grad = None


def mix_and_differentiate(ex, weights, k, x, grad):
    moe = build(ex, weights, k)
    x.requires_grad_()
    out = moe(x)
    out.backward(grad)
    return {"out": out, "x": x.grad} | {name: getattr(moe, name).grad for name in weights}


def count_flops(ex, weights, k, x):
    moe = build(ex, weights, k)
    with FlopCounterMode(display=False) as counter:
        moe(x)
    return counter.get_total_flops()


# --- the definition, token by token --------------------------------------------------------------


def mixture(weights, k, x):
    rows = [one_token(weights, k, token) for token in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape)


def one_token(weights, k, token):
    shares = torch.exp(weights["router"] @ token)
    chosen = shares.argsort(descending=True)[:k]
    total = sum(shares[e] for e in chosen)
    return sum(shares[e] / total * expert(weights, e, token) for e in chosen)


def expert(weights, e, token):
    gate, up = weights["gate_proj"][e] @ token, weights["up_proj"][e] @ token
    return weights["down_proj"][e] @ (gate * torch.sigmoid(gate) * up)


# --- route ---------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    n_experts=st.integers(1, 6),
    data=st.data(),
    renormalize=st.sampled_from([None, True, False]),
    seed=st.integers(0, 999),
)
def test_weighs_the_k_likeliest_experts(attempt, batch, n_experts, data, renormalize, seed):
    k = data.draw(st.integers(1, n_experts), label="k")
    rng = torch.Generator().manual_seed(seed)
    axes = range(len(batch), -1, -1)
    logits = 3 * make_x(rng, n_experts, *reversed(batch)).permute(*axes)  # not contiguous

    found = attempt(route, logits, k, renormalize)

    ordered, experts = logits.sort(dim=-1, descending=True)
    over_all = ordered.exp()[..., :k] / logits.exp().sum(dim=-1, keepdim=True)
    over_chosen = ordered.exp()[..., :k] / ordered.exp()[..., :k].sum(dim=-1, keepdim=True)
    expected = over_all if renormalize is False else over_chosen
    assert_close(found, {"weights": expected, "experts": experts[..., :k]})


def test_chooses_no_expert_twice_when_logits_are_equal(attempt):
    logits = torch.tensor([[2.0, 2, 2, 2, 2], [1, 4, 1, 4, 1], [0, 0, 9, 0, 0]]).double()

    found = attempt(route, logits, 3)

    chosen = found["experts"].sort(dim=-1).values
    assert (chosen.diff(dim=-1) > 0).all(), f"each row must hold 3 experts, got {chosen.tolist()}"
    assert {1, 3} <= set(chosen[1].tolist()) and 2 in chosen[2].tolist()
    shares = logits.gather(-1, found["experts"]).exp()
    assert_close(found["weights"], shares / shares.sum(dim=-1, keepdim=True))
    assert (found["weights"].diff(dim=-1) <= 0).all(), "the largest weight must come first"


# Beyond these sizes a log-sum-exp over all experts is too coarse for a share: finite, no more.
@pytest.mark.parametrize(
    ("dtype", "size", "renormalize"),
    [
        (torch.float64, 1e4, True), (torch.float64, 1e4, False),
        (torch.float64, 1e300, True), (torch.bfloat16, 1e37, True),
    ],
)  # fmt: skip
def test_takes_logits_of_any_size(attempt, dtype, size, renormalize):
    logits = size * torch.tensor([[-3, 3, 0, 3], [-3, -3, -5, -9]], dtype=dtype)

    found = attempt(route, logits, 2, renormalize)

    wide = torch.promote_types(dtype, torch.float32)
    assert_close(found["weights"], torch.full((2, 2), 0.5, dtype=wide))
    assert_close(found["experts"].sort(dim=-1).values, torch.tensor([[1, 3], [0, 1]]))


@pytest.mark.parametrize(
    ("dtype", "inch"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-3)]
)
def test_chooses_the_likelier_expert_be_it_by_an_inch(attempt, rng, dtype, inch):
    n_experts, n_tokens = 64, 40
    best = torch.randint(n_experts, (n_tokens, 1), generator=rng)
    logits = torch.zeros(n_tokens, n_experts, dtype=dtype).scatter(1, best, inch)

    found = attempt(route, logits, 1)

    wide = torch.promote_types(dtype, torch.float32)
    assert_close(found, {"weights": torch.ones(n_tokens, 1, dtype=wide), "experts": best})


@pytest.mark.parametrize("renormalize", [True, False])
def test_passes_gradients_to_the_logits(attempt, rng, renormalize):
    logits, grad = make_x(rng, 7, N_EXPERTS), make_x(rng, 7, 3)

    found = attempt(route_gradient, logits, 3, renormalize, grad, may_change=True)

    leaf = logits.clone().requires_grad_()
    shares = leaf.exp() / leaf.exp().sum(dim=-1, keepdim=True)
    shares = shares.gather(-1, logits.argsort(dim=-1, descending=True)[:, :3])
    shares = shares / shares.sum(dim=-1, keepdim=True) if renormalize else shares
    assert_close(found, torch.autograd.grad(shares, leaf, grad)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weighs_in_float32_at_least(attempt, rng, dtype, renormalize):
    logits = torch.randn(7, N_EXPERTS, generator=rng).to(dtype)

    found = attempt(route, logits, 3, renormalize)

    shares = torch.softmax(logits.double(), dim=-1).gather(-1, found["experts"])
    shares = shares / shares.sum(dim=-1, keepdim=True) if renormalize else shares
    assert_close(found["weights"], shares.float())


@pytest.mark.parametrize("k", [0, 6, -1])
def test_rejects_a_k_that_is_no_number_of_experts(attempt, rng, k):
    with pytest.raises(ValueError, match=rf"{k}\b"):
        attempt(route, make_x(rng, 3, N_EXPERTS), k)


# --- SparseMoE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_gives_what_mixtral_gives(attempt, rng, k):
    # In float32, because Mixtral's own router rounds to float32 even in a float64 model.
    weights = make_weights(rng, torch.float32)
    x = make_x(rng, 2, 7, D_MODEL, dtype=torch.float32)

    out = attempt(mix, weights, k, x)

    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=N_EXPERTS,
        num_experts_per_tok=k,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config)
    gate_up = torch.cat([weights["gate_proj"], weights["up_proj"]], dim=1)
    block.load_state_dict(
        {"gate.weight": weights["router"], "experts.gate_up_proj": gate_up}
        | {"experts.down_proj": weights["down_proj"]}
    )
    assert_close(out, block(x))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_passes_gradients_to_the_router_the_experts_and_x(attempt, rng, k):
    weights, x = make_weights(rng), make_x(rng, 2, 7, D_MODEL)
    grad = make_x(rng, 2, 7, D_MODEL)

    found = attempt(mix_and_differentiate, weights, k, x, grad, may_change=True)

    leaves = {name: w.clone().requires_grad_() for name, w in {"x": x, **weights}.items()}
    out = mixture(leaves, k, leaves["x"])
    out.backward(grad)
    assert_close(found, {"out": out} | {name: leaf.grad for name, leaf in leaves.items()})


def test_mixes_by_the_weights_that_it_has_now_and_in_their_dtype(attempt, rng):
    weights = make_weights(rng)
    inputs = [make_x(rng, *shape, D_MODEL) for shape in [(5,), (5,), (2, 7), (3,)]]

    found, dtypes = attempt(mix_by_the_way, weights, 2, inputs)

    leaves, expected = {name: w.clone().requires_grad_() for name, w in weights.items()}, []
    for x in inputs:
        expected.append(mixture(leaves, 2, x))
        expected[-1].square().sum().backward()
        take_a_step(leaves.values())
    assert_close(found, expected)
    assert_close(dtypes, ["torch.bfloat16", "torch.float32"])


def test_leaves_an_expert_without_tokens_at_rest(attempt, rng):
    # So many tokens that an expert with room for twice its even share would drop some.
    weights, x, grad = make_weights(rng), make_x(rng, 40, D_MODEL), make_x(rng, 40, D_MODEL)
    x[:, 0] = 1.0
    weights["router"][:, 0] = torch.tensor([-30.0, 0, 30, -30, 0])  # 2 always, 0 and 3 never

    found = attempt(mix_and_differentiate, weights, 2, x, grad, may_change=True)

    assert_close(found["out"], mixture(weights, 2, x))
    for name in ("gate_proj", "up_proj", "down_proj"):
        for e in (0, 3):
            assert_close(found[name][e], torch.zeros_like(weights[name][e]))


@settings(max_examples=12)
@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    n_experts=st.integers(1, 6),
    seed=st.integers(0, 999),
)
@example(batch=[2, 3], n_experts=4, seed=0)
@example(batch=[2, 3], n_experts=1, seed=0)
@example(batch=[1], n_experts=3, seed=0)
@example(batch=[], n_experts=3, seed=0)
@example(batch=[2, 0], n_experts=3, seed=0)
@example(batch=[3, 20], n_experts=17, seed=0)
def test_treats_every_token_by_itself_in_any_batch(attempt, batch, n_experts, seed):
    rng = torch.Generator().manual_seed(seed)
    weights = make_weights(rng, n_experts=n_experts)
    axes = range(len(batch), -1, -1)
    x = make_x(rng, D_MODEL, *reversed(batch)).permute(*axes)  # no two axes can be joined by a view
    k = min(2, n_experts)

    out = attempt(mix, weights, k, x)

    assert_close(out, mixture(weights, k, x) if x.numel() else torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_half_precision(attempt, rng, dtype):
    weights, x = make_weights(rng, dtype), make_x(rng, 7, D_MODEL, dtype=dtype)

    out = attempt(mix, weights, N_EXPERTS, x)

    # All experts take part, so that rounding cannot change the choice. Some ten roundings lie
    # between x and a result, of terms up to 4 that may cancel in it: hence the wider tolerance.
    precise = mixture({name: w.double() for name, w in weights.items()}, N_EXPERTS, x.double())
    assert_close(out, precise.to(dtype), atol=4 * 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("k", "n_experts", "n_tokens"), [(1, 64, 30), (3, 12, 7), (3, 4, 30)])
def test_works_for_k_experts_however_many_there_are(attempt, rng, k, n_experts, n_tokens):
    d_model, d_ff = 12, 40
    weights = make_weights(rng, d_model=d_model, d_ff=d_ff, n_experts=n_experts)
    x = make_x(rng, n_tokens, d_model)

    flops = attempt(count_flops, weights, k, x)

    needed = n_tokens * (k * 6 * d_model * d_ff + 2 * d_model * n_experts)
    # A tenth to spare, for those who write the weighted sum as a product of matrices.
    assert flops <= 1.1 * needed, f"{flops:,} flops, where {needed:,} are enough"
