"""Exercise 72: tensor-parallel MLP.

Cut both matrices of an MLP along d_ff and give each of n ranks one piece. A hidden feature
is then computed on one rank alone, nonlinearity included, and the ranks meet only at the end,
where their contributions to the output are added up:

    h_r = gelu(x W_up,rᵀ + b_up,r)          W_up,r:   (d_ff / n, d_model), rows of W_up
    y   = Σ_r h_r W_down,rᵀ + b_down        W_down,r: (d_model, d_ff / n), columns of W_down

Two functions carry all the communication. Each is the other one's backward:

    copy to the region        forward: identity        backward: all-reduce    (f in the paper)
    reduce from the region    forward: all-reduce      backward: identity      (g in the paper)

"Column" and "row" are the paper's words for y = x A, where A is a Linear's weight transposed.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 and figure 3,
    https://arxiv.org/abs/1909.08053
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def copy_to_model_parallel_region(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Let every rank of the group use x, which is the same on all of them.

    x:       any shape and strides
    group:   the ranks that share the work; None stands for all ranks
    returns: x's values; the gradient that reaches x through them is summed over the group

    One all-reduce in backward, none in forward. The incoming gradient is left as it is, and so
    is the gradient that x gets from elsewhere, such as a residual connection.
    """
    raise NotImplementedError("exercise 72 is not written yet")


def reduce_from_model_parallel_region(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Add up what the ranks of the group have computed.

    x:       any shape, the same on every rank; each rank holds other values, and may
             hold them with other strides
    group:   the ranks that share the work; None stands for all ranks
    returns: the sum over the group, on every rank; its gradient goes to x as it comes

    One all-reduce in forward, none in backward. x itself is left as it is.
    """
    raise NotImplementedError("exercise 72 is not written yet")


class ColumnParallelLinear(nn.Module):
    """A Linear whose output features are spread over the ranks.

    weight:  (out_features, in_features), whole, the same on every rank
    bias:    (out_features,), whole, or None
    group:   the ranks that share the work; None stands for all ranks

    Rank r of n keeps the r-th of n equal pieces, as the parameters
        `weight`: (out_features / n, in_features) and `bias`: (out_features / n,) or None
    in the dtype and on the device of what it was given. Both are copies, so the whole weight
    can be freed, and training leaves it as it was. If n does not divide out_features: ValueError,
    which gives out_features.

    forward: x (..., in_features), the same on every rank -> (..., out_features / n), this rank's
    own features. No communication; in backward one all-reduce gives x its whole gradient.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        raise NotImplementedError("exercise 72 is not written yet")

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("exercise 72 is not written yet")


class RowParallelLinear(nn.Module):
    """A Linear whose input features are spread over the ranks.

    weight:  (out_features, in_features), whole, the same on every rank
    bias:    (out_features,), whole, or None
    group:   the ranks that share the work; None stands for all ranks

    Rank r of n keeps the r-th of n equal pieces and the whole bias, as the parameters
        `weight`: (out_features, in_features / n) and `bias`: (out_features,) or None
    in the dtype and on the device of what it was given, both copies. If n does not divide
    in_features: ValueError, which gives in_features.

    forward: x (..., in_features / n), this rank's own features -> (..., out_features), whole, the
    same on every rank. One all-reduce; in backward no communication. Every rank ends up with the
    bias's whole gradient, so that the copies stay equal in training.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        raise NotImplementedError("exercise 72 is not written yet")

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("exercise 72 is not written yet")


class TensorParallelMLP(nn.Module):
    """Linear, exact GELU, Linear, with the d_ff hidden features spread over the ranks.

    up_weight:   (d_ff, d_model), whole         up_bias:   (d_ff,), whole, or None
    down_weight: (d_model, d_ff), whole         down_bias: (d_model,), whole, or None
    group:       the ranks that share the work; None stands for all ranks

    Its parts are `up`, a ColumnParallelLinear, and `down`, a RowParallelLinear. If the number of
    ranks does not divide d_ff: ValueError, which gives d_ff.

    forward: x (..., d_model) -> (..., d_model), both the same on every rank. One all-reduce of an
    output's size in forward, one of an input's size in backward, and nothing else. The latter may
    be left out where x needs no gradient, both where there is one rank. In 16 bits the ranks' sum
    may be taken in these or in more; the result has the dtype of x.
    """

    def __init__(
        self,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        raise NotImplementedError("exercise 72 is not written yet")

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("exercise 72 is not written yet")
