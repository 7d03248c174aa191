"""Specs for exercise 16: RMSNorm and LayerNorm, backward."""

from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    f"{place}.{name}"
    for place in ("torch", "torch.nn.functional")
    for name in ("layer_norm", "rms_norm", "native_layer_norm", "batch_norm", "group_norm")
]

NAMES = {"RMSNorm": ["x", "weight"], "LayerNorm": ["x", "weight", "bias"]}

both = pytest.mark.parametrize("norm", NAMES)


class oracle:
    """PyTorch's own functions under the names of the exercise."""

    class RMSNorm:
        @staticmethod
        def apply(x, weight, eps):
            return F.rms_norm(x, x.shape[-1:], weight, eps)

    class LayerNorm:
        @staticmethod
        def apply(x, weight, bias, eps):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def gradients(ex, norm, inputs, grad_y, eps=1e-5):
    """The result and the gradients of all inputs."""
    inputs = [x.requires_grad_() for x in inputs]
    y = getattr(ex, norm).apply(*inputs, eps)
    return y, *grad(y, inputs, grad_y)


def tensors_in(data):
    """All tensors in lists, tuples and dicts, and those that a function holds on to."""
    if isinstance(data, FunctionType):
        data = [*(cell.cell_contents for cell in data.__closure__ or ()), data.__defaults__]
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [tensor for item in data for tensor in tensors_in(item)]
    return [data] if isinstance(data, torch.Tensor) else []


def keeps(ex, norm, inputs):
    """The bytes that the graph keeps alive, besides x and weight."""
    inputs = [x.requires_grad_() for x in inputs]
    saved, on_ctx = {}, {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = getattr(ex, norm).apply(*inputs, 1e-5)
    for kept in tensors_in(list(vars(y.grad_fn).values())):
        on_ctx[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
    for tensor in inputs[:2]:
        saved.pop(tensor.untyped_storage().data_ptr(), 0)
    return {"saved": sum(saved.values()), "on ctx": sum(on_ctx.values())}


class Made(TorchDispatchMode):
    """How many numbers all operations made together."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info and not r.alias_info.is_write for r in returns)
        self.numbers += result.numel() if isinstance(result, torch.Tensor) and not is_view else 0
        return result


def costs(ex, norm, inputs, grad_y, wanted):
    """How many numbers backward makes for the gradients that are wanted."""
    wanted = [inputs[i].requires_grad_() for i in wanted]
    y = getattr(ex, norm).apply(*inputs, 1e-5)
    with Made() as made:
        grad(y, wanted, grad_y)
    return made.numbers


def twice(ex, norm, inputs, directions):
    """All gradients of the squared result along directions, differentiated, or "refused"."""
    inputs = [x.requires_grad_() for x in inputs]
    y = getattr(ex, norm).apply(*inputs, 1e-5)
    first = grad(y.square().sum(), inputs, create_graph=True)
    # With the last term, gradients that were cut off are no refusal.
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    along = along + 0 * sum(x.sum() for x in inputs)
    try:
        along.backward()  # runs into a refusal, where grad would pass it by
    except RuntimeError:
        return "refused"
    return [x.grad for x in inputs]


def in_turn(ex, norm, first, second):
    """Two results, and then the gradients of the first, of the second, of the first once more."""
    calls = [([x.requires_grad_() for x in inputs], grad_y) for inputs, grad_y in (first, second)]
    ys = [getattr(ex, norm).apply(*inputs, 10.0**-i) for i, (inputs, _) in enumerate(calls)]
    return [
        grad(ys[i], inputs, grad_y, retain_graph=True)
        for i, (inputs, grad_y) in ((i, calls[i]) for i in (0, 1, 0))
    ]


def check(ex, norm, inputs, eps):
    return gradcheck(getattr(ex, norm).apply, (*(x.requires_grad_() for x in inputs), eps))


def layer(rng, norm, *leading, d_model=5):
    """Random inputs, and a gradient of y. All sizes differ."""
    shapes = [(*leading, d_model), (d_model,), (d_model,)][: len(NAMES[norm])]
    inputs = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    return inputs, torch.randn(*leading, d_model, generator=rng, dtype=torch.float64)


@given(
    norm=st.sampled_from(list(NAMES)),
    leading=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 999),
)
@settings(max_examples=20)
def test_find_all_gradients_for_any_leading_dimensions(attempt, norm, leading, seed):
    rng = torch.Generator().manual_seed(seed)
    inputs, grad_y = layer(rng, norm, *leading, d_model=1 + seed % 5)

    out = attempt(gradients, norm, inputs, grad_y)

    # Tight: with a row of variance 0 a rounding grows by 1/√eps, about 300, and no more.
    assert_close(out, gradients(oracle, norm, inputs, grad_y), rtol=1e-10, atol=1e-10)


@both
def test_keep_apart_two_calls_and_two_walks_back(attempt, rng, norm):
    first, second = layer(rng, norm, 2), layer(rng, norm, 3, 40, d_model=7)

    out = attempt(in_turn, norm, first, second)

    assert_close(out, in_turn(oracle, norm, first, second))


@both
def test_agree_with_finite_differences(attempt, rng, norm):
    inputs, _ = layer(rng, norm, 2, 3)

    assert attempt(check, norm, inputs, 0.1) is True


@both
@pytest.mark.parametrize("eps", [0.5, 1e-6])
def test_add_eps_under_the_root(attempt, rng, norm, eps):
    inputs, grad_y = layer(rng, norm, 4)
    inputs[0][1] = 0  # here eps is all there is
    inputs[0][2] *= 1e-3

    out = attempt(gradients, norm, inputs, grad_y, eps)

    assert_close(out, gradients(oracle, norm, inputs, grad_y, eps))


def test_layer_norm_loses_no_digits_on_rows_far_from_zero(attempt, rng):
    inputs, grad_y = layer(rng, "LayerNorm", 4)
    near = [x.clone() for x in inputs]
    near[0] = (near[0] * 2**20).round() / 2**20  # so that nothing is rounded when it moves
    far = [near[0] + 2.0**20, *near[1:]]

    out = attempt(gradients, "LayerNorm", far, grad_y)

    # The mean itself is rounded to about 2⁻³³, a share of 10⁻¹⁰ of the numbers around it.
    assert_close(out, gradients(oracle, "LayerNorm", near, grad_y), rtol=1e-8, atol=1e-8)


@both
def test_take_inputs_and_gradients_of_any_memory_layout(attempt, rng, norm):
    inputs, grad_y = layer(rng, norm, 2, 3)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    grad_y = grad_y[:1, :1].expand(2, 3, 5)

    out = attempt(gradients, norm, inputs, grad_y)

    assert_close(out, gradients(oracle, norm, inputs, grad_y))


@both
def test_pass_on_gradients_of_any_size_and_nan(attempt, rng, norm):
    inputs, grad_y = layer(rng, norm, 2, 3)
    grad_y[1, 0, 2] = torch.nan

    _, *grads = attempt(gradients, norm, inputs, 1e100 * grad_y)

    _, *expected = gradients(oracle, norm, inputs, grad_y)
    assert_close([g / 1e100 for g in grads], expected)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_compute_in_float32_and_round_once(attempt, rng, norm, dtype):
    inputs, grad_y = layer(rng, norm, 1, 3, d_model=7)
    scales = (300.0, 8.0, 8.0)  # float16 holds no square of x and no product of grad_y and weight
    inputs = [
        (scale * (x.sign() + x / 4)).to(dtype) for x, scale in zip(inputs, scales, strict=False)
    ]
    inputs[0] += 2000  # a mean that is no number of float16
    grad_y = (9e3 * grad_y.sign() * (1 + grad_y.abs().clamp(max=3) / 9)).to(dtype)

    out = attempt(gradients, norm, inputs, grad_y)

    expected = gradients(oracle, norm, [x.double() for x in inputs], grad_y.double())
    assert_close([x.dtype for x in out], [dtype] * len(expected))
    for rounded, exact in zip(out, expected, strict=True):
        # The last rounding moves a number by half a step. Those of float32 before it are a few
        # parts in 10⁷ of the terms of a sum, which are about as large as its largest result.
        fine = 64 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_close(rounded.double(), exact, rtol=0.5001 * torch.finfo(dtype).eps, atol=fine)


@both
def test_keep_x_and_weight_and_two_numbers_a_row(attempt, rng, norm):
    (x, *others), _ = layer(rng, norm, 6, d_model=40)
    x = x.half().mT.contiguous().mT  # a contiguous copy would be one more

    kept = attempt(keeps, norm, [x, *(t.half() for t in others)])

    assert kept["saved"] <= 2 * 6 * 8, f"keeps {kept['saved']} bytes besides x and weight"
    assert kept["on ctx"] <= 64, f"keeps {kept['on ctx']} bytes on ctx, past save_for_backward"


@both
def test_do_no_work_for_gradients_that_are_not_wanted(attempt, rng, norm):
    inputs, grad_y = layer(rng, norm, 6, d_model=40)
    every = list(range(len(inputs)))

    of_all = attempt(costs, norm, inputs, grad_y, every)

    for left_out in every:
        fewer = [i for i in every if i != left_out]
        name = NAMES[norm][left_out]
        of_fewer = attempt(costs, norm, inputs, grad_y, fewer)
        assert of_fewer < of_all, f"makes {of_fewer} numbers with or without the gradient of {name}"


def test_layer_norms_bias_alone_costs_no_look_at_x(attempt, rng):
    inputs, grad_y = layer(rng, "LayerNorm", 6, d_model=40)

    made = attempt(costs, "LayerNorm", inputs, grad_y, [2])

    # A copy of grad_y and its sum are allowed.
    assert made <= 2 * grad_y.numel(), f"makes {made} numbers for a bias of 40"


@both
def test_give_no_silently_wrong_second_derivative(attempt, rng, norm):
    inputs, _ = layer(rng, norm, 2, 3)
    directions, _ = layer(rng, norm, 2, 3)

    seconds = attempt(twice, norm, inputs, directions)

    expected = twice(oracle, norm, inputs, directions)
    assert_close(seconds, "refused" if isinstance(seconds, str) else expected)


@both
@pytest.mark.parametrize("shape", [(1,), (4,), (3, 5), (1, 5), (5, 1), ()], ids=str)
def test_reject_a_weight_that_is_not_of_a_rows_shape(attempt, rng, norm, shape):
    inputs, grad_y = layer(rng, norm, 3)
    inputs[1] = torch.ones(shape, dtype=torch.float64)

    numbers = r"\D+".join(str(n) for n in shape)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b5\b).*{numbers}"):
        attempt(gradients, norm, inputs, grad_y)
