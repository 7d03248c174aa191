"""Exercise 41: SwiGLU and RMSNorm.

Between its attention layers a Llama does two small things to each token alone. It brings the
vector to one size, and it sends it through a feed-forward part with a gate: one projection
decides how much of the other gets through. This is exercise 06's norm and exercise 05's gate
as layers with weights of their own, in the precision that a large model runs in:

    rms_norm(x) = x / √(mean of x² + eps) ⊙ weight
    swiglu(x)   = W_down (silu(W_gate x) ⊙ W_up x),    silu(z) = z / (1 + exp(−z))

Sources: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4,
    https://arxiv.org/abs/1910.07467;
    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6, https://arxiv.org/abs/2002.05202
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Brings each vector to one size. Its only parameter is weight: (d_model,), at first all 1."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        """Make the weight, and keep eps, which is added to the mean of the squares."""
        super().__init__()
        # solution
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Divide each vector by the root of the mean of its squares, and scale its features.

        x:       (..., d_model) floating point of any precision
        returns: same shape and dtype as x, whatever the dtype of weight

        Squares, mean, root and quotient are taken in float32, or in float64 where x is. The
        rounding to a narrower x comes behind them, before the weight or after it: both are in
        use. The weight itself is not rounded. An x of another width raises ValueError, which
        gives that width and d_model, even if it would broadcast.
        """
        # solution
        d_model = len(self.weight)
        if x.shape[-1] != d_model:
            raise ValueError(f"x must have d_model = {d_model} features, got {x.shape[-1]}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        return (wide / torch.sqrt(mean_square + self.eps) * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """The feed-forward part. Its only parameters are those of three nn.Linear without bias:

    gate_proj.weight: (d_ff, d_model)
    up_proj.weight:   (d_ff, d_model)
    down_proj.weight: (d_model, d_ff)
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        """Make the three projections. How they start is up to you."""
        super().__init__()
        # solution
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Widen each vector twice, let one half gate the other, and narrow the product.

        x:       (..., d_model), in the dtype of the weights
        returns: same shape and dtype

        Gates of any size give finite results and gradients: exp(−z) may overflow on the way.
        """
        # solution
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
