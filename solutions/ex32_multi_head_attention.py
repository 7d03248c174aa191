"""Exercise 32: multi-head attention.

One attention has one softmax per query: it blends all it looks for into a single average.
Several heads each look in a space of their own, narrow enough that all together cost
as much as one wide head, and a last projection mixes what they found:

    head_i = attention(q_i, k_i, v_i)    q = x W_qᵀ + b_q,  k = c W_kᵀ + b_k,  v = c W_vᵀ + b_v
    out    = [head_0 … head_(n_heads−1)] W_oᵀ + b_o

q_i is the i-th of n_heads equal slices of q's features, and so for k and v. The context c
is x itself in self-attention, another sequence in cross-attention.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2,
    https://arxiv.org/abs/1706.03762; the biases are those of torch's nn.MultiheadAttention
"""

import torch
from torch import Tensor, nn

from ex31_scaled_dot_product_attention import scaled_dot_product_attention


class MultiHeadAttention(nn.Module):
    """Self-attention or cross-attention, plain or causal.

    Its only parameters are those of four nn.Linear(d_model, d_model) with bias:

    q_proj, k_proj, v_proj: weight (d_model, d_model), bias (d_model,)
    o_proj:                 weight (d_model, d_model), bias (d_model,)

    With head_dim = d_model / n_heads, head i owns the head_dim neighbouring features from
    i · head_dim on, of q, k and v, and of what o_proj reads.
    """

    def __init__(self, d_model: int, n_heads: int, causal: bool = False) -> None:
        """Make the four projections, started as nn.Linear starts.

        Raises ValueError with both unless d_model is a multiple of n_heads.
        """
        super().__init__()
        # solution
        if d_model % n_heads != 0:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        self.causal = causal
        self.head_dim = d_model // n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Let every position of x gather from those of the context that it may see.

        x:       (batch, n_queries, d_model)
        context: (batch, n_keys, d_model) gives keys and values; x itself if None
        mask:    bool, of two axes or more, broadcasts to (batch, n_heads, n_queries, n_keys), True
                 where a query may see a key; all is seen without one
        returns: (batch, n_queries, d_model), dtype of x, which is that of the weights

        A causal layer lets position t see positions 0 … t and, of these, only what a mask
        allows as well. Every query may see at least one key, and scores of any size give finite
        results. Any scaled dot-product attention may be used, your own of exercise 31 or torch's.
        A context given to a causal layer raises ValueError: positions of two sequences have no
        common order.
        """
        # solution
        if self.causal and context is not None:
            raise ValueError("a causal layer must have no context, got one: use causal=False")
        context = x if context is None else context
        # Each row's features are cut where they stand; only then do heads come before positions.
        q, k, v = (
            features.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for features in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )  # (batch, n_heads, n_queries or n_keys, head_dim)
        if self.causal:
            past = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=x.device).tril()
            mask = past if mask is None else mask & past
        out = scaled_dot_product_attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(-2))
