"""Exercise 52: multi-head latent attention (MLA).

Grouped heads shrink a cache by having fewer keys. MLA keeps all heads, and in the cache one short
vector a token, the latent, from which each head makes its own key and value. A latent can't be
turned by its position, so a few features more carry that: one rotary key for all heads.

    c      = norm(W_dkv x)              kept, kv_rank numbers
    k_rope = rope(W_kr x)               kept, rope_dim numbers
    k_h    = [W_uk_h c ; k_rope]        v_h = W_uv_h c
    q_h    = [W_uq_h c_q ; rope(W_qr_h c_q)]            c_q = norm(W_dq x)
    y      = W_o [softmax(q_h k_hᵀ · scale) v_h]_h      scale = f² / √(nope_dim + rope_dim)

A product may be taken in another order. So W_uk moves to the query, W_uv behind the average, and
one new token attends to the latents themselves; no key or value of a head is ever made:

    q_nope · (W_uk c) = (W_ukᵀ q_nope) · c              Σ wᵢ (W_uv cᵢ) = W_uv (Σ wᵢ cᵢ)

From exercise 40 comes apply_rope_interleaved(x, positions, frequencies), which turns neighbouring
features of x (..., seq_len, rope_dim) by the angles positions · frequencies, positions (seq_len,).

Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1, eqs. 9 to 19 and appendix C,
    https://arxiv.org/abs/2405.04434
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ex40_rope import apply_rope_interleaved


class LatentKVCache:
    """The latents and rotary keys of one layer, in memory that is reserved once.

    length: how many tokens it holds, the same for every sequence; 0 at first
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        kv_rank: int,
        rope_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Reserve room for max_len tokens, of kv_rank + rope_dim numbers each and no more."""
        # solution
        self.length = 0
        self.latents = torch.zeros(batch, max_len, kv_rank, dtype=dtype, device=device)
        self.rope_keys = torch.zeros(batch, max_len, rope_dim, dtype=dtype, device=device)

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Copy what n_new tokens leave behind the earlier ones.

        latent:   (batch, n_new, kv_rank), n_new may be 0
        rope_key: (batch, n_new, rope_dim)
        returns:  all latents (batch, length, kv_rank) and all rotary keys (batch, length, rope_dim)
                  so far, as views of the reserved memory

        Another shape, also one that would broadcast, raises ValueError. So do more tokens than
        there is room for; that message names max_len. The cache then stays as it was.
        """
        # solution
        for given, room in ((latent, self.latents), (rope_key, self.rope_keys)):
            wanted = (room.shape[0], *latent.shape[1:2], room.shape[2])
            if given.shape != wanted:
                raise ValueError(f"expected the shape {wanted}, got {tuple(given.shape)}")
        end, max_len = self.length + latent.shape[1], self.latents.shape[1]
        if end > max_len:
            raise ValueError(f"{end} tokens do not fit: the cache was made for max_len {max_len}")
        self.latents[:, self.length : end] = latent
        self.rope_keys[:, self.length : end] = rope_key
        self.length = end
        return self.latents[:, :end], self.rope_keys[:, :end]

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for the next text."""
        # solution
        self.length = 0


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention over latents. Its only parameters, named as in DeepSeek's checkpoints:

    q_a_proj.weight:           (q_rank, d_model)                            W_dq
    q_a_layernorm.weight:      (q_rank,)                                    of an RMSNorm
    q_b_proj.weight:           (n_heads · (nope_dim + rope_dim), q_rank)    W_uq_h over W_qr_h
    kv_a_proj_with_mqa.weight: (kv_rank + rope_dim, d_model)                W_dkv over W_kr
    kv_a_layernorm.weight:     (kv_rank,)                                   of an RMSNorm
    kv_b_proj.weight:          (n_heads · (nope_dim + v_dim), kv_rank)      W_uk_h over W_uv_h
    o_proj.weight:             (d_model, n_heads · v_dim)                   W_o

    Rows of q_b_proj and kv_b_proj go head by head: all of head 0's, then head 1's.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        q_rank: int,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        attention_factor: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        """Make the projections and norms. How the projections start is up to you; norms are all 1.

        nope_dim, rope_dim: features of a head's query and key that are not turned, and that are;
                            an odd rope_dim raises ValueError, which says what it was
        v_dim:              features of a head's value
        attention_factor:   f, YaRN's (exercise 45): it multiplies whole queries and keys, the
                            features that are not turned too, and so every score by its square
        norm_eps:           added to the mean of the squares in both norms
        """
        super().__init__()
        # solution
        if rope_dim % 2:
            raise ValueError(f"rope_dim must be even, got {rope_dim}: features turn in pairs")
        self.n_heads, self.kv_rank = n_heads, kv_rank
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        # Of the query's own width, also where scores are later taken over kv_rank features.
        self.scale = attention_factor**2 / math.sqrt(nope_dim + rope_dim)
        self.q_a_proj = nn.Linear(d_model, q_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(q_rank, eps=norm_eps)
        self.q_b_proj = nn.Linear(q_rank, n_heads * (nope_dim + rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d_model, kv_rank + rope_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, eps=norm_eps)
        self.kv_b_proj = nn.Linear(kv_rank, n_heads * (nope_dim + v_dim), bias=False)
        self.o_proj = nn.Linear(n_heads * v_dim, d_model, bias=False)

    def forward(self, x: Tensor, frequencies: Tensor, cache: LatentKVCache | None = None) -> Tensor:
        """Let n_new tokens look at the tokens in the cache, at themselves, and back.

        x:           (batch, n_new, d_model), n_new at least 1
        frequencies: (rope_dim // 2,) float64, radians per position, for apply_rope_interleaved:
                     pairs are neighbours, in queries and keys
        cache:       with `length` tokens so far, in the dtype of x; None for a run without
        returns:     (batch, n_new, d_model), dtype of x

        The new tokens join the cache, for each its latent behind the norm, and its rotary key as it
        is turned, at positions length, length + 1, … (from 0 without a cache). Nothing else is
        kept: what stands in the cache decides, whoever wrote it there. Angles are float64, whatever
        the dtype of x; all else may be rounded to that. Scores of any size that it can hold give
        finite results. Without a cache gradients reach x and all parameters.

        Heads have keys and values of their own here, made of the latents: a score and its part of
        the average cost 2·(nope_dim + rope_dim + v_dim) flops a head, for n_new · n_keys of them.
        """
        # solution
        q_nope, q_rope, latents, rope_keys = _compress(self, x, frequencies, cache)
        # (batch, n_keys, n_heads, ...)
        keys_and_values = self.kv_b_proj(latents).unflatten(-1, (self.n_heads, -1))
        k_nope, v = keys_and_values.split((self.nope_dim, self.v_dim), dim=-1)

        scores = torch.einsum("bhqn,bkhn->bhqk", q_nope, k_nope)
        scores = scores + torch.einsum("bhqr,bkr->bhqk", q_rope, rope_keys)
        weights = _causal_softmax(scores * self.scale)
        heads = torch.einsum("bhqk,bkhv->bqhv", weights, v)
        return self.o_proj(heads.flatten(2))


def absorb(
    layer: MultiHeadLatentAttention,
) -> Callable[[Tensor, Tensor, LatentKVCache | None], Tensor]:
    """Make the layer's forward for decoding, which attends to the latents themselves.

    returns: attend(x, frequencies, cache=None), with the arguments, the result and the cache of
             layer.forward, up to rounding; the two may take turns on one cache

    Of what is in the cache no head's keys or values are made: one more token there costs a new one
    n_heads · 2·(kv_rank + rope_dim + kv_rank) flops at most, where forward makes that token's keys
    and values anew. The layer stays as it was. Free: whether W_uk and W_uv are multiplied into
    their neighbours once, or each new token passes through both; whether gradients are recorded;
    whether later changes of the layer's weights are followed.
    """
    # solution
    up = layer.kv_b_proj.weight.unflatten(0, (layer.n_heads, -1))  # (n_heads, ..., kv_rank)
    w_uk, w_uv = up.split((layer.nope_dim, layer.v_dim), dim=1)

    def attend(x: Tensor, frequencies: Tensor, cache: LatentKVCache | None = None) -> Tensor:
        q_nope, q_rope, latents, rope_keys = _compress(layer, x, frequencies, cache)
        q_latent = torch.einsum("bhqn,hnc->bhqc", q_nope, w_uk)

        # As in multi-query attention: one key for all heads, and the latent is also the value.
        scores = torch.einsum("bhqc,bkc->bhqk", q_latent, latents)
        scores = scores + torch.einsum("bhqr,bkr->bhqk", q_rope, rope_keys)
        weights = _causal_softmax(scores * layer.scale)
        mixed = torch.einsum("bhqk,bkc->bhqc", weights, latents)
        heads = torch.einsum("bhqc,hvc->bqhv", mixed, w_uv)
        return layer.o_proj(heads.flatten(2))

    return attend


def _compress(
    layer: MultiHeadLatentAttention, x: Tensor, frequencies: Tensor, cache: LatentKVCache | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The queries of the new tokens, and the latents and rotary keys of all.

    returns: q_nope (batch, n_heads, n_new, nope_dim), q_rope (batch, n_heads, n_new, rope_dim),
             latents (batch, n_keys, kv_rank), rope_keys (batch, n_keys, rope_dim)
    """
    start = 0 if cache is None else cache.length
    positions = torch.arange(start, start + x.shape[1], device=x.device)

    q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    q = q.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
    q_nope, q_rope = q.split((layer.nope_dim, layer.rope_dim), dim=-1)
    q_rope = apply_rope_interleaved(q_rope, positions, frequencies)

    latent, rope_key = layer.kv_a_proj_with_mqa(x).split((layer.kv_rank, layer.rope_dim), dim=-1)
    latent = layer.kv_a_layernorm(latent)  # the latent alone: the rotary key has no norm
    rope_key = apply_rope_interleaved(rope_key, positions, frequencies)
    if cache is None:
        return q_nope, q_rope, latent, rope_key
    return q_nope, q_rope, *cache.append(latent, rope_key)


def _causal_softmax(scores: Tensor) -> Tensor:
    """Weights of (batch, n_heads, n_new, n_keys) scores; the queries are the last of the keys."""
    n_new, n_keys = scores.shape[-2:]
    seen = torch.ones(n_new, n_keys, dtype=torch.bool, device=scores.device).tril(n_keys - n_new)
    return scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
