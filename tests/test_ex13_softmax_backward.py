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
