"""Exercise 33: attention, backward.

A query has as many weights as there are keys, so what autograd keeps of attention for its backward
pass grows with the square of seq_len. Nothing else is that large, and even the weights need not be
kept: q, k and one number a query, the log-sum-exp of its scores, are enough to make them again.

    s = q kᵀ / √head_dim      p = softmax(s) = exp(s − lse)      lse = log Σ exp(s)      out = p v

    dv = pᵀ dout              dp = dout vᵀ
    ds = p ⊙ (dp − rowsum(p ⊙ dp))
    dq = ds k / √head_dim     dk = dsᵀ q / √head_dim

Source: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with
    IO-Awareness", appendix B.2, https://arxiv.org/abs/2205.14135
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of the result.

    q:        (..., n_queries, head_dim) floating point
    k:        (..., n_keys, head_dim)
    v:        (..., n_keys, value_dim)
    p:        (..., n_queries, n_keys), the weights; 0 where a key is hidden
    grad_out: (..., n_queries, value_dim)
    returns:  dq, dk, dv, of the shapes of q, k and v

    The leading dimensions are the same everywhere. Four matrix products are enough.
    """
    # solution
    scale = 1 / math.sqrt(q.shape[-1])
    dv = p.mT @ grad_out
    dp = grad_out @ v.mT
    # The softmax of a row does not change if all its scores rise: their gradients sum to zero.
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return ds @ k * scale, ds.mT @ q * scale, dv


class Attention(Function):
    """Attention that keeps its weights: `out = Attention.apply(q, k, v, causal)`.

    q:      (..., n_queries, head_dim) floating point
    k:      (..., n_keys, head_dim)
    v:      (..., n_keys, value_dim)
    causal: bool; query i sees keys 0 … i then, and all keys otherwise
    out:    (..., n_queries, value_dim) dtype of q

    The leading dimensions are the same everywhere. Scores and softmax are computed in float32, or
    in float64 where q is, so that scores of any size give finite results. The weights may be
    rounded to the dtype of q before they meet anything else. With causal, n_keys other than
    n_queries raises ValueError, which gives both.
    Kept for backward through ctx.save_for_backward: q, k, v, one tensor of as many numbers as
    there are weights, and no more than the result besides, all in a dtype that occurs above; on
    ctx itself nothing but plain values. Backward computes four matrix products. A second
    derivative is right, or refused with a RuntimeError, as `once_differentiable` does; it is
    never silently wrong.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Return out; keep on ctx what backward needs."""
        # solution
        p = torch.softmax(_scores(q, k, causal), dim=-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of q, k and v, given that of out, and None for causal."""
        # solution
        return *attention_gradients(*ctx.saved_tensors, grad_out), None


class RecomputingAttention(Function):
    """The same, but the weights are computed again in backward: `RecomputingAttention.apply(…)`.

    Arguments, result and errors are those of Attention. Kept for backward through
    ctx.save_for_backward: q, k, v, and no more than the result and four numbers a query besides,
    so that it grows with n_queries + n_keys and never with their product. Backward computes five
    matrix products. The log-sum-exp of a row must be as exact as float32, whatever the dtype of q.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Return out; keep on ctx what backward needs."""
        # solution
        scores = _scores(q, k, causal)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)  # (..., n_queries, 1)
        ctx.save_for_backward(q, k, v, lse)
        ctx.causal = causal
        return (scores - lse).exp().to(q.dtype) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of q, k and v, given that of out, and None for causal."""
        # solution
        q, k, v, lse = ctx.saved_tensors
        p = (_scores(q, k, ctx.causal) - lse).exp().to(q.dtype)
        return *attention_gradients(q, k, v, p, grad_out), None


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if causal and n_queries != n_keys:
        raise ValueError(f"causal needs as many keys as queries, got {n_keys} and {n_queries}")
    # In bfloat16 a log-sum-exp of 20 is off by up to 1/16, and all weights with it; in float16
    # the product of 300 and 300 is infinite.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores
