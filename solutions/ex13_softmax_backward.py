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
        # solution
        y = (x - x.amax(dim, keepdim=True)).exp()
        y = y / y.sum(dim, keepdim=True)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, given that of y, and None for dim."""
        # solution
        (y,) = ctx.saved_tensors
        # Row i of the Jacobian times grad_y: y_i (grad_y_i − Σ_j y_j grad_y_j).
        weighted_mean = (y * grad_y).sum(ctx.dim, keepdim=True)
        return y * (grad_y - weighted_mean), None


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
        # solution
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"targets must have the shape of logits without its last axis, "
                f"{tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
            )
        # Inputs, not something computed here: that would be a constant to a second derivative.
        ctx.save_for_backward(logits, targets)
        logits = logits - logits.amax(-1, keepdim=True)
        log_sum = logits.exp().sum(-1).log()
        return (log_sum - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits, given that of the loss, and None for the targets."""
        # solution
        logits, targets = ctx.saved_tensors
        probs = Softmax.apply(logits, -1)
        index = targets.unsqueeze(-1)
        grad = probs.scatter_add(-1, index, -probs.new_ones(index.shape))  # probs − one-hot
        return grad * grad_loss / targets.numel(), None
