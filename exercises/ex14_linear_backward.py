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
        raise NotImplementedError("exercise 14 is not written yet")

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias; None for each one that is not wanted."""
        raise NotImplementedError("exercise 14 is not written yet")
