"""Specs for exercise 15: a two-layer MLP, backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import backward, grad, gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.utils.checkpoint.checkpoint"]

NAMES = ("x", "w1", "b1", "w2", "b2")
D_MODEL, D_FF = 4, 7


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


def two_backward_passes(ex, inputs, grad_y):
    """The gradients of a first and of a second pass over one graph."""
    y = ex.MLP.apply(*(t.requires_grad_() for t in inputs))
    return grad(y, inputs, grad_y, retain_graph=True), grad(y, inputs, grad_y)


def check(ex, inputs):
    return gradcheck(ex.MLP.apply, [t.requires_grad_() for t in inputs])


def second_derivatives(ex, inputs, grad_y, directions):
    """The gradients along a direction, differentiated by all inputs and grad_y, or "refused"."""
    leaves = [t.requires_grad_() for t in (*inputs, grad_y)]
    first = grad(ex.MLP.apply(*inputs), inputs, grad_y, create_graph=True)
    try:
        backward(first, directions)  # runs into a refusal that grad would pass by
    except RuntimeError:
        return "refused"
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def kept(ex, inputs):
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
        y = ex.MLP.apply(*(t.requires_grad_() for t in inputs))
    on_ctx = sum(t.untyped_storage().nbytes() for t in tensors_in(vars(y.grad_fn)))
    return {"inputs": sorted(saved), "others": sum(others.values()), "on ctx": on_ctx}


def tensors_in(data):
    """All tensors in a container of containers."""
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


# --- specs ---------------------------------------------------------------------------------------


def make(rng, *batch, d_model=D_MODEL, d_ff=D_FF, dtype=torch.float64):
    """The inputs, and a gradient of y. Both biases matter, and h reaches both sides of 0."""
    shapes = ((*batch, d_model), (d_ff, d_model), (d_ff,), (d_model, d_ff), (d_model,))
    *inputs, grad_y = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for shape in (*shapes, shapes[0])
    )
    return inputs, grad_y


LEADING = {"a batch": (5,), "two dimensions": (2, 3), "none": (), "no rows": (0,)}


@pytest.mark.parametrize("batch", LEADING.values(), ids=LEADING)
def test_adds_the_mlp_to_its_input(attempt, rng, batch):
    inputs, _ = make(rng, *batch)

    y = attempt(forward, inputs)

    assert_close(y, forward(oracle, inputs))


@pytest.mark.parametrize("batch", LEADING.values(), ids=LEADING)
def test_gives_the_gradients_of_all_inputs(attempt, rng, batch):
    inputs, grad_y = make(rng, *batch)

    grads = attempt(gradients, inputs, grad_y)

    assert_close(grads, gradients(oracle, inputs, grad_y))


def test_takes_inputs_and_gradients_of_any_memory_layout(attempt, rng):
    inputs, grad_y = make(rng, 2, 3)
    inputs = [t.mT.contiguous().mT if t.ndim > 1 else t.repeat_interleave(2)[::2] for t in inputs]
    grad_y = grad_y[:, :, :1].expand(-1, -1, D_MODEL)  # as y.sum(-1) would send it

    grads = attempt(gradients, inputs, grad_y)

    assert_close(grads, gradients(oracle, inputs, grad_y))


def test_agrees_with_finite_differences(attempt, rng):
    inputs, _ = make(rng, 2, d_model=2, d_ff=3)

    assert attempt(check, inputs) is True


@pytest.mark.parametrize("wanted", [["x"], ["w1", "b1"], ["w2"]], ids=" and ".join)
def test_gives_the_gradients_of_some_inputs_while_others_are_frozen(attempt, rng, wanted):
    inputs, grad_y = make(rng, 5)

    grads = attempt(gradients, inputs, grad_y, wanted)

    assert_close(grads, gradients(oracle, inputs, grad_y, wanted))


def test_leaves_the_gradient_and_the_inputs_as_they_were(attempt, rng):
    inputs, grad_y = make(rng, 5)

    first, second = attempt(two_backward_passes, inputs, grad_y)

    expected = list(gradients(oracle, inputs, grad_y).values())
    assert_close((first, second), (expected, expected))


def test_keeps_nothing_alive_but_inputs(attempt, rng):
    inputs, _ = make(rng, 20, d_ff=50)

    found = attempt(kept, inputs)

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


def test_rejects_weights_that_do_not_fit(attempt, rng):
    (x, w1, b1, w2, b2), _ = make(rng, 5)

    with pytest.raises(ValueError, match="w2"):
        attempt(forward, [x, w1, b1, w2.T, b2])
    with pytest.raises(ValueError, match="w1"):
        attempt(forward, [x, w1.T, b1, w2.T, b2])
