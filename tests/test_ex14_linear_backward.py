"""Specs for exercise 14: a linear layer, backward."""

from types import FunctionType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.functional.linear", "torch.nn.functional.bilinear"]

NAMES = ("x", "weight", "bias")

# One rounding to float32 costs 6e-8; another order of the sums, in float64, about 1e-15.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class oracle:
    """PyTorch's own function under the name of the exercise."""

    class Linear:
        @staticmethod
        def apply(x, weight, bias):
            return F.linear(x, weight, bias)


def linear(ex, x, weight, bias, grad_y, wanted=NAMES):
    """The result, and the gradients that are wanted."""
    inputs = require(x, weight, bias, wanted)
    y = ex.Linear.apply(*inputs.values())
    return y, *grad(y, [inputs[name] for name in wanted], grad_y)


def linear_summed(ex, x, weight, bias):
    """The gradients of the plain sum of the result: all incoming ones are one number in memory."""
    inputs = require(x, weight, bias, NAMES)
    return grad(ex.Linear.apply(*inputs.values()).sum(), list(inputs.values()))


def linear_stacked(ex, x, first, second, grad_y):
    """The gradients through two layers, each of a weight and a bias; the last bias is frozen."""
    inputs = [t.requires_grad_() for t in (x, *first, second[0])]
    y = ex.Linear.apply(ex.Linear.apply(x, *first), *second)
    return grad(y, inputs, grad_y)


def linear_twice(ex, x, weight, bias, grad_y, directions):
    """All gradients along directions, differentiated by x, weight and grad_y."""
    inputs = require(x, weight, bias, NAMES)
    y = ex.Linear.apply(*inputs.values())
    grads = grad(y, list(inputs.values()), grad_y.requires_grad_(), create_graph=True)
    return grad(grads, [x, weight, grad_y], directions, materialize_grads=True)


def linear_keeps(ex, x, weight, bias, wanted):
    """The bytes that the graph keeps alive, by what they are."""
    inputs = require(x, weight, bias, wanted)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ex.Linear.apply(*inputs.values())
    for tensor in tensors_in(vars(y.grad_fn)):
        pack(tensor)
    of = {name: saved.pop(t.untyped_storage().data_ptr(), 0) for name, t in inputs.items()}
    return of | {"others": sum(saved.values())}


def tensors_in(data):
    """All tensors in a container of containers, and those that a function holds on to."""
    if isinstance(data, FunctionType):
        data = [cell.cell_contents for cell in data.__closure__ or ()]
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [tensor for part in data for tensor in tensors_in(part)]
    return [data] if isinstance(data, torch.Tensor) else []


def linear_costs(ex, x, weight, bias, grad_y, wanted):
    """The floating point operations of backward."""
    inputs = require(x, weight, bias, wanted)
    y = ex.Linear.apply(*inputs.values())
    with FlopCounterMode(display=False) as counter:
        grad(y, [inputs[name] for name in wanted], grad_y)
    return counter.get_total_flops()


class Largest(TorchDispatchMode):
    """The size of the largest memory that any operation made, and how many of them there were."""

    def __init__(self):
        super().__init__()
        self.nbytes = self.n_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.n_operations += 1
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def linear_makes(ex, x, weight, bias, grad_y):
    """The bytes of the largest tensor that forward or backward makes."""
    inputs = require(x, weight, bias, NAMES)
    with Largest() as largest:
        y = ex.Linear.apply(*inputs.values())
        grad(y, list(inputs.values()), grad_y)
    return largest.nbytes


def linear_operations(ex, x, weight, bias, grad_y):
    """How many operations backward takes for the gradients of x and weight."""
    inputs = require(x, weight, bias, ("x", "weight"))
    y = ex.Linear.apply(*inputs.values())
    with Largest() as made:
        grad(y, [x, weight], grad_y)
    return made.n_operations


def changed_on_the_way(ex, x, weight, bias, grad_y, name):
    """The gradients after one input was changed between forward and backward, or "refused"."""
    inputs = require(x, weight, bias, NAMES)
    y = ex.Linear.apply(*inputs.values())
    with torch.no_grad():
        inputs[name].mul_(2)
    try:
        return grad(y, list(inputs.values()), grad_y)
    except RuntimeError:
        return "refused"


def check(ex, x, weight, bias):
    inputs = tuple(require(x, weight, bias, NAMES).values())
    return gradcheck(ex.Linear.apply, inputs), gradgradcheck(ex.Linear.apply, inputs)


def require(x, weight, bias, wanted):
    inputs = dict(zip(NAMES, (x, weight, bias), strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    return inputs


def transposed(tensor):
    """The same numbers, stored column by column."""
    return tensor.mT.contiguous().mT


def layer(rng, *leading, d_in=5, d_out=4):
    """Random x, weight, bias, and a gradient of y. All sizes differ."""
    shapes = (*leading, d_in), (d_out, d_in), (d_out,), (*leading, d_out)
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]


@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 999),
)
@example(leading=[3, 50], sizes=(5, 4), seed=0)
@example(leading=[2], sizes=(5, 1), seed=0)
@example(leading=[2], sizes=(1, 4), seed=0)
@settings(max_examples=15)
def test_finds_all_gradients_for_any_leading_dimensions(attempt, leading, sizes, seed):
    rng = torch.Generator().manual_seed(seed)
    d_in, d_out = sizes
    x, weight, bias, grad_y = layer(rng, *leading, d_in=d_in, d_out=d_out)

    out = attempt(linear, x, weight, bias, grad_y)

    assert_close(out, linear(oracle, x, weight, bias, grad_y), **EXACT)


@given(exponent=st.integers(-200, 200), seed=st.integers(0, 999))
@example(exponent=-200, seed=0)
@example(exponent=200, seed=0)
@settings(max_examples=5)
def test_scales_the_gradients_with_the_one_that_arrives(attempt, exponent, seed):
    x, weight, bias, grad_y = layer(torch.Generator().manual_seed(seed), 2, 3)
    scale = 10.0**exponent

    _, *grads = attempt(linear, x, weight, bias, scale * grad_y)

    _, *expected = linear(oracle, x, weight, bias, grad_y)
    assert_close([g / scale for g in grads], expected, **EXACT)


def test_finds_the_wanted_gradients_through_two_layers(attempt, rng):
    x, *first, _ = layer(rng, 2, 3, d_in=5, d_out=4)
    _, *second, grad_y = layer(rng, 2, 3, d_in=4, d_out=7)

    grads = attempt(linear_stacked, x, first, second, grad_y)

    assert_close(grads, linear_stacked(oracle, x, first, second, grad_y), **EXACT)


def test_agrees_with_finite_differences_twice(attempt, rng):
    x, weight, bias, _ = layer(rng, 2, 3, d_in=3, d_out=2)

    assert attempt(check, x, weight, bias) == (True, True)


def test_works_without_a_bias(attempt, rng):
    x, weight, _, grad_y = layer(rng, 2, 3)

    out = attempt(linear, x, weight, None, grad_y, ("x", "weight"))

    assert_close(out, linear(oracle, x, weight, None, grad_y, ("x", "weight")), **EXACT)


def test_takes_inputs_and_gradients_of_any_memory_layout(attempt, rng):
    x, weight, bias, grad_y = layer(rng, 2, 3)
    x, grad_y = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, grad_y))
    weight = transposed(weight)

    out = attempt(linear, x, weight, bias, grad_y)
    summed = attempt(linear_summed, x, weight, bias)

    assert_close(out, linear(oracle, x, weight, bias, grad_y), **EXACT)
    assert_close(summed, linear_summed(oracle, x, weight, bias), **EXACT)


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), NAMES], ids=", ".join
)
def test_keeps_only_what_the_wanted_gradients_need(attempt, rng, wanted):
    x, weight, bias, _ = layer(rng, 2, 3)
    x, weight = transposed(x), transposed(weight)  # a contiguous copy would be one more

    kept = attempt(linear_keeps, x, weight, bias, wanted)

    needed = {"x": x.nbytes * ("weight" in wanted), "weight": weight.nbytes * ("x" in wanted)}
    assert_close(kept, needed | {"bias": 0, "others": 0})


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("x", "weight"), NAMES], ids=", ".join
)
def test_pays_one_matrix_product_for_each_gradient_that_is_wanted(attempt, rng, wanted):
    x, weight, bias, grad_y = layer(rng, 2, 3)

    flops = attempt(linear_costs, x, weight, bias, grad_y, wanted)

    product = 2 * x.numel() * len(weight)  # one multiplication and one addition for each term
    allowed = product * (("x" in wanted) + ("weight" in wanted))
    allowed += 2 * grad_y.numel() * ("bias" in wanted)  # its sum may be a product with ones
    assert flops <= allowed, f"{flops} operations where {allowed} are enough"


def test_pays_nothing_for_a_frozen_bias(attempt, rng):
    x, weight, bias, grad_y = layer(rng, 2, 3)

    frozen = attempt(linear_operations, x, weight, bias, grad_y)
    none = attempt(linear_operations, x, weight, None, grad_y)

    assert frozen == none, f"{frozen} operations with a frozen bias, {none} without a bias"


def test_passes_on_what_is_infinite_or_nan(attempt, rng):
    x, weight, bias, grad_y = layer(rng, 2, 3)
    grad_y[0, 1, 2], grad_y[1, 0, 3] = torch.inf, torch.nan

    out = attempt(linear, x, weight, bias, grad_y)

    assert_close(out, linear(oracle, x, weight, bias, grad_y), **EXACT)


def test_makes_no_tensor_larger_than_the_largest_it_was_given(attempt, rng):
    x, weight, bias, grad_y = layer(rng, 6, 2)

    largest = attempt(linear_makes, x, weight, bias, grad_y)

    allowed = max(x.nbytes, weight.nbytes, grad_y.nbytes)
    assert largest <= allowed, f"makes a tensor of {largest} bytes where {allowed} are enough"


def test_gives_second_derivatives(attempt, rng):
    x, weight, bias, grad_y = layer(rng, 2, 3)
    directions = [torch.randn(t.shape, generator=rng, dtype=t.dtype) for t in (x, weight, bias)]

    seconds = attempt(linear_twice, x, weight, bias, grad_y, directions)

    assert_close(seconds, linear_twice(oracle, x, weight, bias, grad_y, directions), **EXACT)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_refuses_backward_after_what_it_kept_was_changed(attempt, rng, name):
    x, weight, bias, grad_y = layer(rng, 2, 3)

    out = attempt(changed_on_the_way, x, weight, bias, grad_y, name, may_change=True)

    assert_close(out, "refused")


@pytest.mark.parametrize("width", [1, 4, 6, 10])
def test_rejects_an_input_of_another_width(attempt, rng, width):
    _, weight, bias, grad_y = layer(rng, 2, 3)
    x = torch.ones(2, 3, width, dtype=torch.float64)

    # Both shapes, in whichever order.
    with pytest.raises(ValueError, match=rf"(?s)(?=.*2, 3, {width}\b)(?=.*\b4, 5\b)"):
        attempt(linear, x, weight, bias, grad_y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype):
    x, weight, bias, grad_y = (t.to(dtype) for t in layer(rng, 2, 3))

    out = attempt(linear, x, weight, bias, grad_y)

    wide = [t.double() for t in (x, weight, bias, grad_y)]
    # Sums of up to seven products of about 3 × 3, rounded at each step at worst.
    tolerance = 32 * torch.finfo(dtype).eps
    assert_close(out, [t.to(dtype) for t in linear(oracle, *wide)], atol=tolerance)
