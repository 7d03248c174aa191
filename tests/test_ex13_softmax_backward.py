"""Specs for exercise 13: softmax and cross-entropy, backward."""

from types import FunctionType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    "torch.softmax",
    "torch.Tensor.softmax",
    "torch.nn.functional.softmax",
    "torch.log_softmax",
    "torch.Tensor.log_softmax",
    "torch.nn.functional.log_softmax",
    "torch.nn.functional.cross_entropy",
]


class oracle:
    """PyTorch's own functions under the names of the exercise."""

    class Softmax:
        @staticmethod
        def apply(x, dim):
            return torch.softmax(x, dim)

    class CrossEntropy:
        @staticmethod
        def apply(logits, targets):
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def softmax(ex, x, dim, grad_y):
    """The weights, and the gradient of x."""
    y = ex.Softmax.apply(x.requires_grad_(), dim)
    return y, *grad(y, x, grad_y)


def softmax_twice(ex, x, dim, grad_y, direction):
    """The gradient of x along a direction, differentiated by x and by grad_y."""
    y = ex.Softmax.apply(x.requires_grad_(), dim)
    (grad_x,) = grad(y, x, grad_y.requires_grad_(), create_graph=True)
    return grad(grad_x, [x, grad_y], direction, materialize_grads=True)


def softmax_backward_again(ex, x, dim, grad_y):
    """Two backward passes over one graph, and the weights after them."""
    y = ex.Softmax.apply(x.requires_grad_(), dim)
    return *grad(y, x, grad_y, retain_graph=True), *grad(y, x, grad_y), y


def softmax_keeps(ex, x, dim):
    """The bytes that the graph keeps alive."""
    y, saved, on_ctx = kept_by(ex.Softmax, x.requires_grad_(), dim)
    output = saved.pop(y.untyped_storage().data_ptr(), 0)
    return {"output": output, "others": sum(saved.values()), "on ctx": sum(on_ctx.values())}


def cross_entropy(ex, logits, targets, grad_loss):
    """The loss, and the gradient of the logits."""
    loss = ex.CrossEntropy.apply(logits.requires_grad_(), targets)
    return loss, *grad(loss, logits, grad_loss)


def cross_entropy_twice(ex, logits, targets, direction):
    """The gradient of the squared loss along a direction, differentiated again, or "refused"."""
    loss = ex.CrossEntropy.apply(logits.requires_grad_(), targets)
    (grad_logits,) = grad(loss**2, logits, create_graph=True)
    # With the second term, a gradient that was cut off is no refusal.
    along = (grad_logits * direction).sum() + 0 * logits.sum()
    try:
        along.backward()  # runs into a refusal, where grad would pass it by
    except RuntimeError:
        return "refused"
    return logits.grad


def cross_entropy_keeps(ex, logits, targets):
    """The bytes that the graph keeps alive."""
    _, saved, on_ctx = kept_by(ex.CrossEntropy, logits.requires_grad_(), targets)
    return {"saved": sum(saved.values()), "on ctx": sum(on_ctx.values())}


def kept_by(function, *args):
    """The result, and the size of every memory kept for backward: saved, or put on ctx itself."""
    saved, on_ctx = {}, {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = function.apply(*args)
    for x in tensors_in(list(vars(result.grad_fn).values())):
        on_ctx[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return result, saved, on_ctx


def tensors_in(data):
    """All tensors in lists, tuples and dicts, and those that a function holds on to."""
    if isinstance(data, FunctionType):
        data = [*(cell.cell_contents for cell in data.__closure__ or ()), data.__defaults__]
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [tensor for item in data for tensor in tensors_in(item)]
    return [data] if isinstance(data, torch.Tensor) else []


def softmax_in_turn(ex, first, second):
    """Two softmaxes along other axes, and then the gradients of the first, of the second."""
    ys = [ex.Softmax.apply(x.requires_grad_(), dim) for x, dim, _ in (first, second)]
    return [grad(y, x, grad_y)[0] for y, (x, _, grad_y) in zip(ys, (first, second), strict=True)]


def cross_entropy_in_turn(ex, first, second):
    """Two losses, and then the gradients of the first, of the second."""
    losses = [ex.CrossEntropy.apply(x.requires_grad_(), targets) for x, targets in (first, second)]
    return [grad(loss, x)[0] for loss, (x, _) in zip(losses, (first, second), strict=True)]


def check_softmax(ex, x, dim):
    first = gradcheck(ex.Softmax.apply, (x.requires_grad_(), dim))
    return first, gradgradcheck(ex.Softmax.apply, (x, dim))


def check_cross_entropy(ex, logits, targets):
    return gradcheck(ex.CrossEntropy.apply, (logits.requires_grad_(), targets))


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def logits_and_targets(rng, batch=3, seq_len=4, vocab_size=7):
    targets = torch.randint(vocab_size, (batch, seq_len), generator=rng)
    return randn(rng, batch, seq_len, vocab_size), targets


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    from_end=st.booleans(),
    seed=st.integers(0, 999),
)
def test_softmax_multiplies_the_gradient_by_its_jacobian(attempt, shape, axis, from_end, seed):
    rng = torch.Generator().manual_seed(seed)
    dim = axis % len(shape) - from_end * len(shape)
    shape[dim] += 1  # no weights can sum to one along an empty axis
    x = randn(rng, *shape[::-1]).permute(*range(len(shape) - 1, -1, -1))  # first axis innermost
    grad_y = randn(rng, *shape)

    y, grad_x = attempt(softmax, x, dim, grad_y)

    expected = torch.softmax(x, dim)
    rows = expected.movedim(dim, -1)
    jacobian = torch.diag_embed(rows) - rows[..., :, None] * rows[..., None, :]
    product = (jacobian @ grad_y.movedim(dim, -1)[..., None])[..., 0]
    assert_close((y, grad_x), (expected, product.movedim(-1, dim)), rtol=1e-12, atol=1e-13)


def test_softmax_stays_exact_for_values_far_too_large_for_exp(attempt, rng):
    x = 1e4 + 60 * randn(rng, 3, 40)
    x[1] *= -1
    x[2, -1] = 3e4  # leaves nothing for the others
    grad_y = randn(rng, 3, 40)

    y, grad_x = attempt(softmax, x, 1, grad_y)

    # Weights as small as 1e-90 have their digits too: 1e4 is rounded to 1e-12, not more. So do
    # gradients, each in its own measure, but they are differences.
    expected_y, expected = softmax(oracle, x, 1, grad_y)
    assert_close(y, expected_y, rtol=1e-9, atol=0)
    assert_close(grad_x / expected_y, expected / expected_y, rtol=1e-9, atol=1e-11)


def test_softmax_gives_second_derivatives(attempt, rng):
    x, grad_y, direction = (randn(rng, 3, 5, 2) for _ in range(3))

    seconds = attempt(softmax_twice, x, 1, grad_y, direction)

    assert_close(seconds, softmax_twice(oracle, x, 1, grad_y, direction))


def test_softmax_backward_leaves_gradient_and_weights_as_they_were(attempt, rng):
    x, grad_y = randn(rng, 3, 5), randn(rng, 3, 5)

    first, second, y = attempt(softmax_backward_again, x, -1, grad_y)

    expected_y, expected = softmax(oracle, x, -1, grad_y)
    assert_close((first, second, y), (expected, expected, expected_y))


def test_softmax_keeps_no_memory_alive_but_its_output(attempt, rng):
    x = randn(rng, 40, 30)

    kept = attempt(softmax_keeps, x, 1)

    assert_close({"others": kept["others"], "on ctx": kept["on ctx"]}, {"others": 0, "on ctx": 0})


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_cross_entropy_averages_over_all_targets(attempt, rng, shape):
    logits = randn(rng, 7, *shape).movedim(0, -1)  # not contiguous, nor are the targets
    targets = torch.randint(7, (*shape, 2), generator=rng)[..., 0]
    grad_loss = torch.tensor(-2.5, dtype=torch.float64)

    results = attempt(cross_entropy, logits, targets, grad_loss)

    expected = cross_entropy(oracle, logits, targets, grad_loss)
    assert_close(results, expected, rtol=1e-12, atol=1e-13)


def test_cross_entropy_stays_exact_for_logits_far_too_large_for_exp(attempt, rng):
    logits, targets = logits_and_targets(rng)
    logits = 1e4 + 1e3 * logits
    logits[1] *= -1
    grad_loss = torch.tensor(-2.5, dtype=torch.float64)

    results = attempt(cross_entropy, logits, targets, grad_loss)

    assert_close(results, cross_entropy(oracle, logits, targets, grad_loss))


def test_cross_entropy_gives_no_silently_wrong_second_derivative(attempt, rng):
    logits, targets = logits_and_targets(rng)
    direction = randn(rng, *logits.shape)

    second = attempt(cross_entropy_twice, logits, targets, direction)

    expected = cross_entropy_twice(oracle, logits, targets, direction)
    assert_close(second, "refused" if isinstance(second, str) else expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cross_entropy_keeps_one_tensor_of_the_logits_size(attempt, rng, dtype):
    logits, targets = logits_and_targets(rng, vocab_size=50)
    logits = logits.to(dtype)

    kept = attempt(cross_entropy_keeps, logits, targets)

    bound = logits.nbytes + 4 * targets.nbytes
    assert kept["saved"] <= bound, f"keeps {kept['saved']} bytes, needs no more than {bound}"
    assert kept["on ctx"] <= 64, f"keeps {kept['on ctx']} bytes on ctx, past save_for_backward"


@pytest.mark.parametrize("shape", [(3, 1), (1, 4), (3,), (4, 3), (12,), (4, 7), (3, 4, 1)], ids=str)
def test_cross_entropy_rejects_targets_of_another_shape(attempt, rng, shape):
    logits, _ = logits_and_targets(rng)
    targets = torch.ones(shape, dtype=torch.int64)

    theirs = r"\D+".join(rf"\b{n}\b" for n in shape)
    with pytest.raises(ValueError, match=theirs):
        attempt(cross_entropy, logits, targets, torch.tensor(1.0, dtype=torch.float64))


def test_both_keep_apart_two_calls(attempt, rng):
    first, second = randn(rng, 3, 4, 5), randn(rng, 6, 2)
    weights = attempt(softmax_in_turn, (first, 1, first + 1), (second, 0, second + 1))
    losses = (*logits_and_targets(rng),), (*logits_and_targets(rng, 2, 5, 9),)
    gradients = attempt(cross_entropy_in_turn, *losses)

    expected = softmax_in_turn(oracle, (first, 1, first + 1), (second, 0, second + 1))
    assert_close((weights, gradients), (expected, cross_entropy_in_turn(oracle, *losses)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_keep_the_dtype_of_their_input(attempt, rng, dtype):
    logits, targets = logits_and_targets(rng)
    logits, grad_y = logits.to(dtype), randn(rng, *logits.shape).to(dtype)

    y, grad_x = attempt(softmax, logits, -1, grad_y)
    loss, grad_logits = attempt(cross_entropy, logits, targets, torch.ones((), dtype=dtype))

    wide = logits.double()
    expected = softmax(oracle, wide, -1, grad_y.double())
    expected += cross_entropy(oracle, wide.detach(), targets, torch.ones(()).double())
    # Logits of about 4 carry errors of a few eps into the weights, and gradients reach 4.
    tolerance = 16 * torch.finfo(dtype).eps
    assert_close((y, grad_x, loss, grad_logits), [x.to(dtype) for x in expected], atol=tolerance)


def test_both_agree_with_finite_differences(attempt, rng):
    logits, targets = logits_and_targets(rng, batch=2, seq_len=3, vocab_size=4)

    assert attempt(check_softmax, logits, 1) == (True, True)
    assert attempt(check_cross_entropy, logits, targets) is True
