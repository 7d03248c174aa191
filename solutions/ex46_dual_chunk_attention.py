"""Exercise 46: dual chunk attention.

A model knows the distances of its training, 0 to context_len − 1. In a longer text it meets
others, and fails. So the text is cut into chunks, and every query gets three positions, one for
each kind of key; a key keeps one, its place in its own chunk. With s = chunk_size and
c = context_len, query i and key j are this far apart:

    intra       i − j                              j in the same chunk
    successive  min(s + i mod s, c − 1) − j mod s  j in the chunk before
    inter       c − 1 − j mod s                    j in an earlier one

Nothing is trained. Distances are true within a chunk and, where c ≤ 2s, to the nearest c − s
tokens of all; what is further away is only known to be far. All three kinds share one softmax.

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models",
    section 3, https://arxiv.org/abs/2402.17463
"""

import math

import torch
from torch import Tensor, nn

from ex40_rope import apply_rope_half, rope_frequencies


def query_positions(
    seq_len: int, chunk_size: int, context_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the positions of all queries against keys of each kind.

    chunk_size:  s, how many tokens a chunk has; the last one may have fewer
    context_len: c, how many tokens the model was trained to see
    returns:     intra, successive, inter: (seq_len,) int64 each. A key in place j mod s is
                 behind a query by the query's position minus its own.

    Raises ValueError unless 1 ≤ chunk_size < context_len. The message gives both.
    """
    # solution
    if not 1 <= chunk_size < context_len:
        raise ValueError(
            f"chunk_size must be from 1 to context_len - 1, got {chunk_size} and {context_len}"
        )
    intra = torch.arange(seq_len) % chunk_size
    # The next chunk goes on where the keys of this one end, as far as the model can count.
    successive = (chunk_size + intra).clamp(max=context_len - 1)
    inter = torch.full_like(intra, context_len - 1)
    return intra, successive, inter


def dual_chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor, chunk_size: int, context_len: int
) -> Tensor:
    """Let every token look back at all before it, at distances that the model knows.

    q:           (batch, n_heads, seq_len, head_dim), not rotated yet
    k:           (batch, n_kv_heads, seq_len, head_dim), not rotated yet
    v:           (batch, n_kv_heads, seq_len, value_dim)
                 Query head h reads head h // (n_heads / n_kv_heads), as in exercise 42
    frequencies: (head_dim // 2,) float64, radians per position, for apply_rope_half
    chunk_size, context_len: as query_positions takes them
    returns:     (batch, n_heads, seq_len, value_dim), dtype of q

    A token sees itself. Each query is compared with each key at most once, in the one way that
    counts: three times all scores would be three times the work. seq_len is at least 1.

    Angles are float64 whatever the dtype of q: no coarser one knows all places of a million. In
    float16 and bfloat16 anything else may be rounded on the way; in float32 and float64 scores of
    any size give finite results. Raises ValueError as query_positions does, for any text.
    """
    # solution
    seq_len, scale = q.shape[2], math.sqrt(q.shape[3])
    positions = query_positions(seq_len, chunk_size, context_len)
    intra, successive, inter = (apply_rope_half(q, p.to(q.device), frequencies) for p in positions)
    k = apply_rope_half(k, positions[0].to(q.device), frequencies)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))

    out = []
    for start in range(0, seq_len, chunk_size):
        before, end = max(0, start - chunk_size), min(start + chunk_size, seq_len)
        here = slice(start, end)
        kinds = (
            inter[:, :, here] @ k[:, :, :before].mT,
            successive[:, :, here] @ k[:, :, before:start].mT,
            intra[:, :, here] @ k[:, :, here].mT,
        )
        scores = torch.cat(kinds, dim=-1) / scale  # (batch, n_heads, end - start, end)
        future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        out.append(weights @ v[:, :, :end])
    return torch.cat(out, dim=2)


class DualChunkAttention(nn.Module):
    """Self-attention of Qwen2, for texts longer than the training's.

    Its only parameters are those of four nn.Linear, head_dim = d_model / n_heads:

    q_proj: weight (n_heads · head_dim, d_model), bias (n_heads · head_dim,)
    k_proj: weight (n_kv_heads · head_dim, d_model), bias (n_kv_heads · head_dim,)
    v_proj: weight (n_kv_heads · head_dim, d_model), bias (n_kv_heads · head_dim,)
    o_proj: weight (d_model, n_heads · head_dim), no bias

    Head i owns the head_dim neighbouring rows from i · head_dim on, and in o_proj such columns.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        chunk_size: int,
        context_len: int,
        rope_theta: float = 10_000.0,
    ) -> None:
        """Make the four projections."""
        super().__init__()
        # solution
        self.head_dim = d_model // n_heads
        self.chunk_size, self.context_len = chunk_size, context_len
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Let every position gather from itself and all before it.

        x:       (batch, seq_len, d_model)
        returns: (batch, seq_len, d_model)

        rope_theta is the base of the frequencies, which are float64 in a layer of any dtype. A
        call keeps nothing of its text: the next may be longer, shorter, or of another dtype.
        """
        # solution
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, n_heads or n_kv_heads, seq_len, head_dim)
        frequencies = rope_frequencies(self.head_dim, self.rope_theta).to(x.device)
        out = dual_chunk_attention(q, k, v, frequencies, self.chunk_size, self.context_len)
        return self.o_proj(out.transpose(1, 2).flatten(-2))
