"""Exercise 13: softmax and cross-entropy, backward.

The gradient of a softmax is a product with its Jacobian, which nobody has to build:

    y = softmax(x)              ∂y_i/∂x_j = y_i (δ_ij − y_j)
    loss = −log softmax(logits)[target], averaged over all targets

Source: Goodfellow, Bengio, Courville 2016, "Deep Learning", section 6.2.2.3,
    https://www.deeplearningbook.org/contents/mlp.html
"""

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class Softmax(Function):
    """Weights that sum to one along an axis: `y = Softmax.apply(x, dim)`.

    x:   any shape, floating point
    dim: int, the axis of the weights; may be negative
    y:   shape and dtype of x

    Values of any size give finite results. Forward keeps its output for backward and no
    other tensor, through ctx.save_for_backward. Second derivatives are right as well.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dim: int) -> Tensor:
        """Return y; keep on ctx what backward needs."""
        raise NotImplementedError("exercise 13 is not written yet")

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, given that of y, and None for dim."""
        raise NotImplementedError("exercise 13 is not written yet")


class CrossEntropy(Function):
    """Mean negative log probability of the targets: `loss = CrossEntropy.apply(logits, targets)`.

    logits:  (..., vocab_size) floating point, with at least one leading dimension
    targets: (...) int64, in 0 … vocab_size − 1
    loss:    () dtype of logits, the mean over all targets

    Logits of any size give finite results. Targets of another shape raise ValueError,
    which gives it.
    Kept for backward through ctx.save_for_backward: one tensor of as many numbers and bytes
    as the logits, and at most four int64 for each target. A second derivative is right, or
    refused with a RuntimeError (`once_differentiable` of torch.autograd.function does that);
    it is never silently wrong.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; keep on ctx what backward needs."""
        raise NotImplementedError("exercise 13 is not written yet")

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits, given that of the loss, and None for the targets."""
        raise NotImplementedError("exercise 13 is not written yet")
