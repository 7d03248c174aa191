"""Exercise 15: a two-layer MLP, backward.

The hidden layer of an MLP is its largest tensor, usually four times as wide as its input.
Autograd keeps it twice, before and after the GELU, until the backward pass. One node that
keeps its inputs alone, and computes the hidden layer again when it is needed, spends one more
matrix product and saves all of that:

    h = x W₁ᵀ + b₁          a = gelu(h) = h Φ(h)          y = x + a W₂ᵀ + b₂
    gelu′(h) = Φ(h) + h φ(h)

Φ(h) = (1 + erf(h/√2)) / 2 is the normal distribution function, φ(h) = exp(−h²/2) / √(2π) its
density.

Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
    https://arxiv.org/abs/1604.06174
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class MLP(Function):
    """The MLP with its residual, as one node: `y = MLP.apply(x, w1, b1, w2, b2)`.

    x, y: (..., d_model) floating point; any number of leading dimensions, or none
    w1:   (d_ff, d_model)
    b1:   (d_ff,)
    w2:   (d_model, d_ff)
    b2:   (d_model,)

    Kept for backward are inputs alone, through ctx.save_for_backward. Forward makes two
    matrix products and backward five, of d_model · d_ff multiplications for each row, and
    neither makes a tensor larger than the largest of y, h, w1 and w2. A second derivative
    is right, or refused with a RuntimeError (`once_differentiable` of torch.autograd.function
    does that); it is never silently wrong.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        """Return y; keep on ctx what backward needs.

        Weights that do not fit x and each other raise ValueError, which names w1 or w2.
        """
        # solution
        if w1.shape[1:] != x.shape[-1:] or w2.shape != w1.shape[::-1]:
            raise ValueError(
                f"w1 must be (d_ff, d_model) and w2 (d_model, d_ff) for x (..., d_model), got w1 "
                f"{tuple(w1.shape)}, w2 {tuple(w2.shape)} and x {tuple(x.shape)}"
            )
        ctx.save_for_backward(x, w1, b1, w2)
        return x + F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x, w1, b1, w2 and b2, given that of y."""
        # solution
        x, w1, b1, w2 = ctx.saved_tensors
        h = x @ w1.T + b1
        cdf = (1 + torch.erf(h / math.sqrt(2))) / 2
        density = torch.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)

        grad_a = grad_y @ w2
        grad_h = grad_a * (cdf + h * density)
        # A weight serves every row: its gradient sums over all leading dimensions.
        rows_x, rows_a, rows_h, rows_y = (
            t.reshape(-1, t.shape[-1]) for t in (x, h * cdf, grad_h, grad_y)
        )
        return (
            grad_y + grad_h @ w1,  # past the MLP, and through it
            rows_h.T @ rows_x,
            rows_h.sum(0),
            rows_y.T @ rows_a,
            rows_y.sum(0),
        )
