"""Exercise 16: RMSNorm and LayerNorm, backward.

A norm divides a row by its own size, so every number of the row depends on all others.
With x̂ the normalised row, r what it was multiplied by, and h = w · ∂L/∂y:

    RMSNorm:    r = 1/√(mean(x²) + ε)      x̂ = r x          y = w x̂
                ∂L/∂x = r (h − x̂ mean(h x̂))
    LayerNorm:  r = 1/√(var(x) + ε)        x̂ = r (x − μ)    y = w x̂ + b
                ∂L/∂x = r (h − mean(h) − x̂ mean(h x̂))

Sources: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 4,
    https://arxiv.org/abs/1910.07467; Ba, Kiros & Hinton 2016, "Layer Normalization",
    section 3, https://arxiv.org/abs/1607.06450
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class RMSNorm(Function):
    """Rows of root mean square 1, times a weight: `y = RMSNorm.apply(x, weight, eps)`.

    x:      (..., d_model) float16, bfloat16, float32 or float64
    weight: (d_model) dtype of x
    eps:    float, added to the mean square before the root
    y:      (..., d_model) dtype of x

    A weight of any other shape raises ValueError with both shapes. These rules hold for
    LayerNorm as well:
    - float16 and bfloat16 are computed in float32. Only y and the gradients are rounded, each
      once, at the end.
    - Forward keeps x and weight themselves, as they came, and besides them at most two
      numbers for each row, all through ctx.save_for_backward.
    - Backward does no work for a gradient that is not wanted (ctx.needs_input_grad).
    - A second derivative is right, or refused with a RuntimeError (`once_differentiable` of
      torch.autograd.function does that); it is never silently wrong.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return y; keep on ctx what backward needs."""
        raise NotImplementedError("exercise 16 is not written yet")

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and weight, None for one not wanted, and None for eps."""
        raise NotImplementedError("exercise 16 is not written yet")


class LayerNorm(Function):
    """Rows of mean 0 and variance 1, scaled and shifted: `LayerNorm.apply(x, weight, bias, eps)`.

    x:      (..., d_model) float16, bfloat16, float32 or float64
    weight: (d_model) dtype of x
    bias:   (d_model) dtype of x
    eps:    float, added to the variance before the root
    y:      (..., d_model) dtype of x

    The variance is the mean squared distance from the mean (divided by d_model, not by
    d_model − 1), and rows that lie far from 0 lose no digits to it. The rules of RMSNorm
    hold here too.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return y; keep on ctx what backward needs."""
        raise NotImplementedError("exercise 16 is not written yet")

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, weight and bias, None for one not wanted, and for eps."""
        raise NotImplementedError("exercise 16 is not written yet")
