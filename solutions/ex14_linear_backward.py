"""Exercise 14: a linear layer, backward.

Nearly all the work of a transformer is this one step and its two gradients, each of them a
matrix product as large as the step itself:

    y = x Wᵀ + b        ∂L/∂x = ∂L/∂y W        ∂L/∂W = (∂L/∂y)ᵀ x        ∂L/∂b = Σ ∂L/∂y

where the rows of x are all positions of all sequences. Which of the products are needed
decides what forward has to keep and what backward has to pay.

Source: Goodfellow, Bengio, Courville 2016, "Deep Learning", section 6.5.6,
    https://www.deeplearningbook.org/contents/mlp.html
"""

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class Linear(Function):
    """A linear layer: `y = Linear.apply(x, weight, bias)`.

    x:      (..., d_in) floating point, with any number of leading dimensions, also none
    weight: (d_out, d_in) dtype of x
    bias:   (d_out) dtype of x, or None
    y:      (..., d_out) dtype of x

    x of another width than the weight raises ValueError with both shapes.

    ctx.needs_input_grad, in forward and in backward, tells for each argument whether its
    gradient is wanted. For one that is not, backward computes nothing. Forward keeps x only
    if the gradient of the weight is wanted, the weight only if that of x is, and nothing
    else; it keeps them through ctx.save_for_backward, which notices when they are changed
    before backward. A copy of them would be something else, too. Neither forward nor backward
    makes a tensor larger than the largest of x, weight and y. Second derivatives are right as
    well.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y; keep on ctx what backward needs."""
        # solution
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"the last axis of x must be d_in = {weight.shape[-1]}, as in a weight of shape "
                f"{tuple(weight.shape)}, got x of shape {tuple(x.shape)}"
            )
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        y = x @ weight.mT
        return y if bias is None else y + bias

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias; None for each one that is not wanted."""
        # solution
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        rows = grad_y.reshape(-1, grad_y.shape[-1])  # one row for each position of each sequence
        if needs_x:
            grad_x = grad_y @ weight
        if needs_weight:
            grad_weight = rows.mT @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias
