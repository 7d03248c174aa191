"""Specs for exercise 17: optimizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW"]

# name: optimizer, the options of all, those of the second group
CASES = {
    "sgd": ("SGD", {"lr": 0.02, "weight_decay": 0.3}, {"lr": 0.005}),
    "sgd with momentum": ("SGD", {"lr": 0.01, "momentum": 0.9}, {"momentum": 0.5}),
    "nesterov": (
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
        {"momentum": 0.6, "weight_decay": 0.0},
    ),
    "nesterov in one group": (
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        {"momentum": 0.0, "nesterov": False},
    ),
    "adam": ("Adam", {"lr": 0.05}, {"betas": (0.6, 0.95), "lr": 0.02}),
    "adam with decay": (
        "Adam",
        {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.4},
        {"eps": 0.1, "weight_decay": 0.1},
    ),
    "adamw": (  # with so large an eps that it shows where it stands
        "AdamW",
        {"lr": 0.05, "betas": (0.85, 0.97), "eps": 0.3, "weight_decay": 0.4},
        {"lr": 0.02, "eps": 0.1, "weight_decay": 0.0},
    ),
    "adamw by default": ("AdamW", {"lr": 0.05, "weight_decay": 0.4}, {"weight_decay": 0.0}),
}
NAMES = ("SGD", "Adam", "AdamW")


def terrain(params, t):
    """A valley with bumps: Rosenbrock's function through all numbers, and a cosine of each.

    Of the four tensors the third takes part from step 12 on, the fourth in two steps of three.
    """
    a, b, c, d = params
    used = [a, b] + [c] * (t >= 12) + [d] * (t % 3 > 0)
    x = torch.cat([p.flatten() for p in used])
    valley = (4 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    return valley + (3 * x).cos().sum()


def starts(rng):
    """Four tensors; two have the same shape, so that a state they share goes unnoticed."""
    shapes = ((3, 2), (3, 2), (5,), ())
    return [torch.rand(s, generator=rng, dtype=torch.float64) * 2 - 1 for s in shapes]


# --- run on the code under test ------------------------------------------------------------------


def descend(ex, name, options, own, starts, n_steps):
    """All numbers after each step. The second group has options of its own; all fall once."""
    params = [start.clone().requires_grad_() for start in starts]
    groups = [{"params": params[::2]}, {"params": params[1::2], **own}]
    optimizer = getattr(ex, name)(groups, **options)
    path = []
    for t in range(n_steps):
        optimizer.zero_grad()
        terrain(params, t).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in params]))
        if t == 35:
            for group in optimizer.param_groups:
                for option in {"lr", "momentum", "weight_decay", "eps"} & group.keys():
                    group[option] *= 0.5
                if "betas" in group:
                    group["betas"] = tuple(0.9 * beta for beta in group["betas"])
    return torch.stack(path)


def interrupted(ex, name, options, own, starts, stops):
    """All numbers after each step of a run in parts: each part has an optimizer of its own."""
    params = [start.clone().requires_grad_() for start in starts]
    before, path = None, []
    for t in range(stops[-1]):
        if t == 0 or t in stops:
            optimizer = getattr(ex, name)([{"params": params[::2]}, {"params": params[1::2]}], 9.0)
            if before is None:
                for group in optimizer.param_groups:
                    group.update(options)
                optimizer.param_groups[1].update(own)
            elif hasattr(before, "state_dict"):
                optimizer.load_state_dict(before.state_dict())
            else:  # a file from before that was given
                optimizer.state.update(before.state)
                optimizer.param_groups = before.param_groups
            before = optimizer
        optimizer.zero_grad()
        terrain(params, t).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(path)


def steps_on(ex, name, options, start, *grads):
    """Where a step on each gradient leads, and what the last one is after it.

    All gradients stand in the same memory, one after the other.
    """
    param = start.clone().requires_grad_()
    param.grad = torch.zeros_like(grads[0])
    optimizer = getattr(ex, name)([param], **options)
    for grad in grads:
        param.grad.copy_(grad)
        optimizer.step()
    return param, param.grad


def train_a_layer(ex, name, options, weights, x):
    """A layer's output, and what the layer holds, after two steps on model.parameters()."""
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weights)
    parameter = layer.weight
    optimizer = getattr(ex, name)(layer.parameters(), **options)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    return {
        "output": layer(x),
        "same parameter": layer.weight is parameter,
        "a leaf": layer.weight.is_leaf and layer.weight.requires_grad,
        "graphs in the state": sum(
            isinstance(value, torch.Tensor) and value.requires_grad
            for state in optimizer.state.values()
            for value in state.values()
        ),
    }


def gradients_forgotten(ex, name, options, grads):
    """The gradients of parameters in two groups, after zero_grad."""
    params = [torch.zeros_like(g).requires_grad_() for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer = getattr(ex, name)([{"params": params[:1]}, {"params": params[1:]}], **options)
    optimizer.zero_grad()
    return [param.grad for param in params]


def split_linear(ex, bias, trained):
    """How many parameters of a plain linear layer are in each group, and the groups' decay."""
    model = nn.Linear(3, 2, bias=bias).requires_grad_(trained)
    return [(len(g["params"]), g["weight_decay"]) for g in ex.decay_groups(model, 0.5)]


def split(ex, weight_decay):
    """The decay and the parameters' names of each group, for a model of many kinds of them."""
    model = nn.ModuleDict(
        {
            "wte": nn.Embedding(7, 4),
            "conv": nn.Conv1d(4, 4, 3),
            "norm": nn.LayerNorm(4),
            "norm of a table": nn.LayerNorm((3, 1)),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "scale": nn.PReLU(4),
            "head": nn.Linear(4, 7),
        }
    )
    model["head"].weight = model["wte"].weight
    model.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = ex.decay_groups(model, weight_decay)
    return [(g["weight_decay"], sorted(names[id(p)] for p in g["params"])) for g in groups]


# --- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_walks_the_path_that_torch_walks(attempt, rng, case):
    name, options, own = CASES[case]
    start = starts(rng)

    path = attempt(descend, name, options, own, start, 52)

    assert_close(path, descend(torch.optim, name, options, own, start, 52))


@pytest.mark.parametrize("case", ["nesterov", "adam with decay", "adamw"])
def test_remembers_all_it_needs_in_its_state_and_its_groups(attempt, rng, case):
    name, options, own = CASES[case]
    start = starts(rng)

    path = attempt(interrupted, name, options, own, start, [5, 13, 20])

    assert_close(path, interrupted(torch.optim, name, options, own, start, [5, 13, 20]))


@pytest.mark.parametrize("name", NAMES)
def test_leaves_the_gradients_as_they_were(attempt, rng, name):
    options = {"lr": 0.1, "weight_decay": 0.2} | ({"momentum": 0.7} if name == "SGD" else {})
    start, *grads = (torch.randn(4, generator=rng, dtype=torch.float64) for _ in range(4))

    _, after = attempt(steps_on, name, options, start, *grads)

    assert_close(after, grads[-1], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_takes_gradients_from_one_memory_and_parameters_of_any_layout(attempt, rng, name):
    options = {"lr": 0.1, "weight_decay": 0.0} | ({"momentum": 0.7} if name == "SGD" else {})
    start, *grads = (torch.randn(4, 3, generator=rng, dtype=torch.float64) for _ in range(4))
    start, grads = start.mT, [grad.mT for grad in grads]

    param, _ = attempt(steps_on, name, options, start, *grads)

    assert_close(param, steps_on(torch.optim, name, options, start, *grads)[0])


@pytest.mark.parametrize("name", NAMES)
def test_passes_on_gradients_that_are_large_infinite_or_nan(attempt, name):
    start, grad = torch.zeros(4), torch.tensor([1e9, torch.inf, torch.nan, 1.0])

    param, _ = attempt(steps_on, name, {"lr": 0.1}, start, grad)

    assert_close(param, steps_on(torch.optim, name, {"lr": 0.1}, start, grad)[0])


@pytest.mark.parametrize("name", NAMES)
def test_moves_the_parameters_that_the_model_holds(attempt, rng, name):
    weights = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    options = {"lr": 0.01, "weight_decay": 0.0}

    trained = attempt(train_a_layer, name, options, weights, x)

    assert_close(trained, train_a_layer(torch.optim, name, options, weights, x))


@pytest.mark.parametrize("name", NAMES)
def test_forgets_the_gradients_of_all_groups(attempt, rng, name):
    grads = [torch.randn(n, generator=rng) for n in (2, 3, 4)]

    left = attempt(gradients_forgotten, name, {"lr": 0.1}, grads)

    assert left == [None, None, None]


@given(exponent=st.integers(-12, 6), seed=st.integers(0, 999))
@settings(max_examples=10)
def test_adam_begins_with_steps_of_lr_whatever_the_scale_of_the_gradient(attempt, exponent, seed):
    rng = torch.Generator().manual_seed(seed)
    grad = torch.rand(3, generator=rng, dtype=torch.float64) + 0.5
    grad *= torch.tensor([1.0, -1.0, 1e3], dtype=torch.float64) * 10.0**exponent

    param, _ = attempt(steps_on, "Adam", {"lr": 0.25}, torch.zeros_like(grad), grad)

    # m̂ is g and √v̂ is |g|. Only a gradient as small as eps makes a smaller step.
    assert_close(param, -0.25 * grad / (grad.abs() + 1e-8), rtol=1e-9, atol=0)


def test_adamw_decays_at_the_same_rate_whatever_the_gradient(attempt, rng):
    start = torch.randn(4, generator=rng, dtype=torch.float64)
    options = {"lr": 0.1, "weight_decay": 0.3}

    param, _ = attempt(steps_on, "AdamW", options, start, *[torch.zeros_like(start)] * 5)

    assert_close(param, start * (1 - 0.1 * 0.3) ** 5)


def test_lets_matrices_decay_but_no_biases_and_norms(attempt):
    groups = attempt(split, 0.25)

    table = ["norm of a table.bias", "norm of a table.weight"]
    decaying = ["conv.weight", *table, "wte.weight"]
    others = ["conv.bias", "gain", "head.bias", "norm.bias", "norm.weight", "scale.weight"]
    assert_close(groups, [(0.25, decaying), (0.0, others)])


@pytest.mark.parametrize(("bias", "trained"), [(True, False), (False, True)])
def test_gives_two_groups_even_where_one_is_empty(attempt, bias, trained):
    groups = attempt(split_linear, bias, trained)

    assert_close(groups, [(int(trained), 0.5), (0, 0.0)])


@pytest.mark.parametrize("momentum", [0.0, -0.25])
@pytest.mark.parametrize("asks", ["all groups", "one group"])
def test_rejects_nesterov_without_momentum(attempt, rng, asks, momentum):
    options, own = {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum": momentum}
    if asks == "one group":
        options, own = {"lr": 0.1, "momentum": momentum}, {"nesterov": True}

    with pytest.raises(ValueError, match=str(momentum)):
        attempt(descend, "SGD", options, own, starts(rng), 0)
