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
        # solution
        _check(x, weight)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        x_hat, _ = _rms_normalise(_widen(x), eps)
        return (x_hat * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and weight, None for one not wanted, and None for eps."""
        # solution
        x, weight = ctx.saved_tensors
        # Again: a kept r would be a constant to a second derivative.
        x_hat, r = _rms_normalise(_widen(x), ctx.eps)
        grad_y = _widen(grad_y)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            h = grad_y * weight
            # Along x̂ itself h has no effect: a longer x gives the same x̂.
            grad_x = r * (h - x_hat * (h * x_hat).mean(-1, keepdim=True))
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_rows(grad_y * x_hat).to(weight.dtype)
        return grad_x, grad_weight, None


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
        # solution
        _check(x, weight)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = _widen(x)
        x_hat, _ = _rms_normalise(wide - wide.mean(-1, keepdim=True), eps)
        return (x_hat * weight + bias).to(x.dtype)

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, weight and bias, None for one not wanted, and for eps."""
        # solution
        x, weight = ctx.saved_tensors
        grad_y = _widen(grad_y)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:  # the bias alone needs no x̂
            wide = _widen(x)
            x_hat, r = _rms_normalise(wide - wide.mean(-1, keepdim=True), ctx.eps)
        if ctx.needs_input_grad[0]:
            h = grad_y * weight
            without_effect = h.mean(-1, keepdim=True) + x_hat * (h * x_hat).mean(-1, keepdim=True)
            grad_x = (r * (h - without_effect)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_rows(grad_y * x_hat).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _sum_rows(grad_y).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have the shape of a row of x, {tuple(x.shape[-1:])}, "
            f"got {tuple(weight.shape)}"
        )


def _widen(x: Tensor) -> Tensor:
    """float16 ends at 65,504, and the square of 256 is beyond that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_normalise(wide: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()  # (..., 1)
    return wide * r, r


def _sum_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)
