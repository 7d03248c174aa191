"""Specs for exercise 15: a two-layer MLP, backward."""

import math
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.utils.checkpoint.checkpoint"]

NAMES = ("x", "w1", "b1", "w2", "b2")
D_MODEL, D_FF = 4, 7

# One rounding to float32 costs 6e-8; another order of the sums, in float64, about 1e-15.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class oracle:
    """PyTorch's own functions and autograd, under the name of the exercise."""

    class MLP:
        @staticmethod
        def apply(x, w1, b1, w2, b2):
            return x + F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


# --- run on the code under test ------------------------------------------------------------------


def forward(ex, inputs):
    return ex.MLP.apply(*inputs)


def gradients(ex, inputs, grad_y, wanted=NAMES):
    """The gradients of the inputs that are wanted, by name; the others need none."""
    for name, tensor in zip(NAMES, inputs, strict=True):
        tensor.requires_grad_(name in wanted)
    y = ex.MLP.apply(*inputs)
    of = [t for t in inputs if t.requires_grad]
    return dict(zip(wanted, grad(y, of, grad_y), strict=True))


def gradients_in_turn(ex, *calls):
    return [gradients(ex, *call) for call in calls]


def two_backward_passes(ex, inputs, grad_y):
    """The gradients of a first and of a second pass over one graph."""
    y = ex.MLP.apply(*(t.requires_grad_() for t in inputs))
    return grad(y, inputs, grad_y, retain_graph=True), grad(y, inputs, grad_y)


def gradients_of_two(ex, x, first, second, grad_y):
    """The gradients through two MLPs, one after the other."""
    inputs = [t.requires_grad_() for t in (x, *first, *second)]
    return grad(ex.MLP.apply(ex.MLP.apply(x, *first), *second), inputs, grad_y)


def check(ex, inputs):
    return gradcheck(ex.MLP.apply, [t.requires_grad_() for t in inputs])


def second_derivatives(ex, inputs, grad_y, directions):
    """The gradients along a direction, differentiated by all inputs and grad_y, or "refused"."""
    leaves = [t.requires_grad_() for t in (*inputs, grad_y)]
    first = grad(ex.MLP.apply(*inputs), inputs, grad_y, create_graph=True)
    try:
        # In one sum, a gradient that was cut off goes missing; backward runs into a refusal.
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        (along + 0 * inputs[0].sum()).backward()  # not refused where all are cut off
    except RuntimeError:
        return "refused"
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def kept(ex, inputs, wanted):
    """Which inputs the graph keeps alive, and the bytes of what else it keeps."""
    names = {t.untyped_storage().data_ptr(): n for n, t in zip(NAMES, inputs, strict=True)}
    saved, others = set(), {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() in names:
            saved.add(names[memory.data_ptr()])
        else:
            others[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ex.MLP.apply(
            *(t.requires_grad_(n in wanted) for n, t in zip(NAMES, inputs, strict=True))
        )
    on_ctx = sum(t.untyped_storage().nbytes() for t in tensors_in(vars(y.grad_fn)))
    return {"inputs": sorted(saved), "others": sum(others.values()), "on ctx": on_ctx}


def tensors_in(data):
    """All tensors in a container of containers, and those that a function holds on to."""
    if isinstance(data, FunctionType):
        data = [cell.cell_contents for cell in data.__closure__ or ()]
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [tensor for part in data for tensor in tensors_in(part)]
    return [data] if isinstance(data, torch.Tensor) else []


def flops(ex, inputs, grad_y):
    """The operations of all matrix products, forward and backward."""
    with FlopCounterMode(display=False) as of_forward:
        y = ex.MLP.apply(*(t.requires_grad_() for t in inputs))
    with FlopCounterMode(display=False) as of_backward:
        grad(y, inputs, grad_y)
    return of_forward.get_total_flops(), of_backward.get_total_flops()


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def largest_tensor(ex, inputs, grad_y):
    with Largest() as largest:
        y = ex.MLP.apply(*(t.requires_grad_() for t in inputs))
        grad(y, inputs, grad_y)
    return largest.numel


# --- specs ---------------------------------------------------------------------------------------


def make(rng, *batch, d_model=D_MODEL, d_ff=D_FF, dtype=torch.float64):
    """The inputs, and a gradient of y. Both biases matter, and h reaches both sides of 0."""
    shapes = ((*batch, d_model), (d_ff, d_model), (d_ff,), (d_model, d_ff), (d_model,))
    *inputs, grad_y = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for shape in (*shapes, shapes[0])
    )
    return inputs, grad_y


LEADING = {"two dimensions": (2, 3), "many rows": (3, 50), "none": (), "no rows": (0,)}


# Before all others, so that nothing was kept from a call in float64.
def test_is_as_exact_after_a_call_in_half_precision(attempt, rng):
    coarse, fine = make(rng, 5, dtype=torch.bfloat16), make(rng, 5)

    _, grads = attempt(gradients_in_turn, coarse, fine)

    assert_close(grads, gradients(oracle, *fine), **EXACT)


@pytest.mark.parametrize("batch", LEADING.values(), ids=LEADING)
def test_adds_the_mlp_to_its_input(attempt, rng, batch):
    inputs, _ = make(rng, *batch)

    y = attempt(forward, inputs)

    assert_close(y, forward(oracle, inputs), **EXACT)


@pytest.mark.parametrize("batch", LEADING.values(), ids=LEADING)
def test_gives_the_gradients_of_all_inputs(attempt, rng, batch):
    inputs, grad_y = make(rng, *batch)

    grads = attempt(gradients, inputs, grad_y)

    assert_close(grads, gradients(oracle, inputs, grad_y), **EXACT)


@pytest.mark.parametrize(("d_model", "d_ff"), [(5, 5), (6, 2), (3, 1), (1, 4)])
def test_takes_hidden_layers_of_any_width(attempt, rng, d_model, d_ff):
    inputs, grad_y = make(rng, 7, d_model=d_model, d_ff=d_ff)

    grads = attempt(gradients, inputs, grad_y)

    assert_close(grads, gradients(oracle, inputs, grad_y), **EXACT)


def test_passes_on_gradients_that_are_infinite_or_nan(attempt, rng):
    inputs, grad_y = make(rng, 5)
    grad_y[1, 2], grad_y[3, 0] = math.inf, math.nan

    grads = attempt(gradients, inputs, grad_y)

    assert_close(grads, gradients(oracle, inputs, grad_y), **EXACT)


def test_takes_inputs_and_gradients_of_any_memory_layout(attempt, rng):
    inputs, grad_y = make(rng, 2, 3)
    inputs = [t.mT.contiguous().mT if t.ndim > 1 else t.repeat_interleave(2)[::2] for t in inputs]
    grad_y = grad_y[:, :, :1].expand(-1, -1, D_MODEL)  # as y.sum(-1) would send it

    grads = attempt(gradients, inputs, grad_y)

    assert_close(grads, gradients(oracle, inputs, grad_y), **EXACT)


def test_stays_exact_where_hidden_layer_and_gradient_are_large(attempt, rng):
    (x, *weights), grad_y = make(rng, 5)
    inputs = [1e4 * x, *weights]

    grads = attempt(gradients, inputs, 1e100 * grad_y)

    small = {name: g / 1e100 for name, g in grads.items()}
    assert_close(small, gradients(oracle, inputs, grad_y), rtol=1e-12, atol=1e-8)


def test_gives_the_gradients_through_two_mlps(attempt, rng):
    (x, *first), _ = make(rng, 5)
    (_, *second), grad_y = make(rng, 5, d_ff=6)

    grads = attempt(gradients_of_two, x, first, second, grad_y)

    expected = gradients_of_two(oracle, x, first, second, grad_y)
    assert_close(grads, expected, rtol=1e-12, atol=1e-10)  # two MLPs' sums reach some hundreds


def test_agrees_with_finite_differences(attempt, rng):
    inputs, _ = make(rng, 2, d_model=2, d_ff=3)

    assert attempt(check, inputs) is True


@pytest.mark.parametrize(
    "wanted",
    [["x"], ["w1"], ["b1"], ["w2"], ["b2"], ["w1", "b1"], ["x", "w2"]],
    ids=" and ".join,
)
def test_gives_the_gradients_of_some_inputs_while_others_are_frozen(attempt, rng, wanted):
    inputs, grad_y = make(rng, 5)

    grads = attempt(gradients, inputs, grad_y, wanted)

    assert_close(grads, gradients(oracle, inputs, grad_y, wanted), **EXACT)


def test_leaves_the_gradient_and_the_inputs_as_they_were(attempt, rng):
    inputs, grad_y = make(rng, 5)

    first, second = attempt(two_backward_passes, inputs, grad_y)

    expected = list(gradients(oracle, inputs, grad_y).values())
    assert_close((first, second), (expected, expected))


@pytest.mark.parametrize("wanted", [NAMES, ("x",), ("w1", "b2")], ids=" and ".join)
def test_keeps_nothing_alive_but_inputs(attempt, rng, wanted):
    inputs, _ = make(rng, 20, d_ff=50)
    # Stored column by column, so that a contiguous copy would be one more.
    inputs = [t.mT.contiguous().mT if t.ndim > 1 else t for t in inputs]

    found = attempt(kept, inputs, wanted)

    assert "x" in found["inputs"], f"keeps only {found['inputs']} through save_for_backward"
    assert found["others"] == 0, f"keeps {found['others']} bytes that are no input"
    assert found["on ctx"] == 0, f"keeps {found['on ctx']} bytes on ctx, past save_for_backward"


def test_makes_two_products_forward_and_five_backward(attempt, rng):
    n_rows = 6
    inputs, grad_y = make(rng, n_rows)

    of_forward, of_backward = attempt(flops, inputs, grad_y)

    product = 2 * n_rows * D_MODEL * D_FF
    assert of_forward <= 2 * product, f"{of_forward / product:g} products forward, needs 2"
    assert of_backward <= 5 * product, f"{of_backward / product:g} products backward, needs 5"


def test_makes_no_tensor_larger_than_the_hidden_layer_or_a_weight(attempt, rng):
    n_rows = 6
    inputs, grad_y = make(rng, n_rows)

    largest = attempt(largest_tensor, inputs, grad_y)

    allowed = D_FF * max(n_rows, D_MODEL)
    assert largest <= allowed, f"makes a tensor of {largest} numbers where {allowed} are enough"


def test_gives_no_silently_wrong_second_derivative(attempt, rng):
    inputs, grad_y = make(rng, 3)
    directions, _ = make(rng, 3)

    second = attempt(second_derivatives, inputs, grad_y, directions)

    expected = second_derivatives(oracle, inputs, grad_y, directions)
    assert_close(second, "refused" if isinstance(second, str) else expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype):
    inputs, grad_y = make(rng, 5, dtype=dtype)

    y = attempt(forward, inputs)
    grads = attempt(gradients, inputs, grad_y)

    wide, grad_wide = [t.double() for t in inputs], grad_y.double()
    expected = {"y": forward(oracle, wide), **gradients(oracle, wide, grad_wide)}
    largest = max(t.abs().max().item() for t in expected.values())
    # Sums of up to 7 products, each of a few roundings, some of which cancel.
    tolerance = 8 * torch.finfo(dtype).eps * largest
    expected = {name: t.detach().to(dtype) for name, t in expected.items()}
    assert_close({"y": y, **grads}, expected, atol=tolerance)


# What does not fit: the name in the message, and the shapes of w1 and of w2.
MISFITS = {
    "w2 as w1": ("w2", (7, 4), (7, 4)),
    "both the wrong way round": ("w1", (4, 7), (7, 4)),
    "w1 narrower than x": ("w1", (7, 3), (3, 7)),
    "w1 wider than x": ("w1", (7, 5), (5, 7)),
    "w1 of width 1": ("w1", (7, 1), (1, 7)),
    "w2 with one row": ("w2", (7, 4), (1, 7)),
    "w2 with too many rows": ("w2", (7, 4), (5, 7)),
    "w2 for another d_ff": ("w2", (7, 4), (4, 6)),
    "w2 of as many numbers": ("w2", (7, 4), (2, 14)),
}


@pytest.mark.parametrize(("name", "of_w1", "of_w2"), MISFITS.values(), ids=MISFITS)
def test_rejects_weights_that_do_not_fit(attempt, rng, name, of_w1, of_w2):
    (x, _, _, _, b2), _ = make(rng, 5)
    w1, w2 = (torch.ones(shape, dtype=torch.float64) for shape in (of_w1, of_w2))

    with pytest.raises(ValueError, match=name):
        attempt(forward, [x, w1, torch.ones(of_w1[0], dtype=torch.float64), w2, b2])
