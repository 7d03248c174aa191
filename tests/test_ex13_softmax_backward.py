"""Specs for exercise 13: softmax and cross-entropy, backward."""

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
    return grad(grad_x, [x, grad_y], direction)


def softmax_backward_again(ex, x, dim, grad_y):
    """Two backward passes over one graph, and the weights after them."""
    y = ex.Softmax.apply(x.requires_grad_(), dim)
    return *grad(y, x, grad_y, retain_graph=True), *grad(y, x, grad_y), y


def softmax_keeps(ex, x, dim):
    """The bytes that the graph keeps alive besides the output."""
    y, kept = kept_by(ex.Softmax, x.requires_grad_(), dim)
    kept["saved"].pop(y.untyped_storage().data_ptr(), None)
    return {how: sum(sizes.values()) for how, sizes in kept.items()}


def cross_entropy(ex, logits, targets, grad_loss):
    """The loss, and the gradient of the logits."""
    loss = ex.CrossEntropy.apply(logits.requires_grad_(), targets)
    return loss, *grad(loss, logits, grad_loss)


def cross_entropy_twice(ex, logits, targets, direction):
    """The gradient of the squared loss along a direction, differentiated again, or "refused"."""
    loss = ex.CrossEntropy.apply(logits.requires_grad_(), targets)
    (grad_logits,) = grad(loss**2, logits, create_graph=True)
    try:
        return grad(grad_logits, logits, direction)[0]
    except RuntimeError:
        return "refused"


def cross_entropy_keeps(ex, logits, targets):
    """The bytes that the graph keeps alive."""
    _, kept = kept_by(ex.CrossEntropy, logits.requires_grad_(), targets)
    return {how: sum(sizes.values()) for how, sizes in kept.items()}


def kept_by(function, *args):
    """The result, and the size of each memory kept for backward: saved, or put on ctx itself."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = function.apply(*args)
    on_ctx = [x for x in vars(result.grad_fn).values() if isinstance(x, torch.Tensor)]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in on_ctx}
    return result, {"saved": saved, "on ctx": sizes}


def check_softmax(ex, x, dim):
    first = gradcheck(ex.Softmax.apply, (x.requires_grad_(), dim))
    return first, gradgradcheck(ex.Softmax.apply, (x, dim))


def check_cross_entropy(ex, logits, targets):
    return gradcheck(ex.CrossEntropy.apply, (logits.requires_grad_(), targets))


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def logits_and_targets(rng, batch=3, seq_len=4, vocab_size=7):
    targets = torch.randint(vocab_size, (batch, seq_len), generator=rng)
    return randn(rng, batch, seq_len, vocab_size), targets


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    from_end=st.booleans(),
    seed=st.integers(0, 999),
)
def test_softmax_multiplies_the_gradient_by_its_jacobian(attempt, shape, axis, from_end, seed):
    rng = torch.Generator().manual_seed(seed)
    x, grad_y = randn(rng, *shape), randn(rng, *shape)
    dim = axis % len(shape) - from_end * len(shape)

    y, grad_x = attempt(softmax, x, dim, grad_y)

    expected = torch.softmax(x, dim)
    rows = expected.movedim(dim, -1)
    jacobian = torch.diag_embed(rows) - rows[..., :, None] * rows[..., None, :]
    product = (jacobian @ grad_y.movedim(dim, -1)[..., None])[..., 0]
    assert_close((y, grad_x), (expected, product.movedim(-1, dim)))


def test_softmax_takes_any_memory_layout(attempt, rng):
    x = randn(rng, 5, 2, 3).permute(1, 2, 0)
    grad_y = randn(rng, 3, 1).expand(2, 3, 5)

    results = attempt(softmax, x, 1, grad_y)

    assert_close(results, softmax(oracle, x, 1, grad_y))


def test_softmax_stays_exact_for_values_far_too_large_for_exp(attempt, rng):
    x = 1e4 + 10 * randn(rng, 3, 5)
    x[1] *= -1
    grad_y = randn(rng, 3, 5)

    results = attempt(softmax, x, 1, grad_y)

    assert_close(results, softmax(oracle, x, 1, grad_y))


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

    assert_close(kept, {"saved": 0, "on ctx": 0})


def test_cross_entropy_averages_over_all_targets(attempt, rng):
    logits, targets = logits_and_targets(rng)
    grad_loss = randn(rng)

    results = attempt(cross_entropy, logits, targets, grad_loss)

    assert_close(results, cross_entropy(oracle, logits, targets, grad_loss))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
def test_cross_entropy_takes_any_leading_dimensions_and_memory_layout(attempt, rng, shape):
    vocab_size = 7
    logits = randn(rng, vocab_size, *shape).movedim(0, -1)
    targets = torch.randint(vocab_size, shape[::-1], generator=rng).permute(
        *range(len(shape) - 1, -1, -1)
    )
    grad_loss = randn(rng)

    results = attempt(cross_entropy, logits, targets, grad_loss)

    assert_close(results, cross_entropy(oracle, logits, targets, grad_loss))
