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
        raise NotImplementedError("exercise 52 is not written yet")

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Copy what n_new tokens leave behind the earlier ones.

        latent:   (batch, n_new, kv_rank), n_new may be 0
        rope_key: (batch, n_new, rope_dim)
        returns:  all latents (batch, length, kv_rank) and all rotary keys (batch, length, rope_dim)
                  so far, as views of the reserved memory

        Another shape, also one that would broadcast, raises ValueError. So do more tokens than
        there is room for; that message names max_len. The cache then stays as it was.
        """
        raise NotImplementedError("exercise 52 is not written yet")

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for the next text."""
        raise NotImplementedError("exercise 52 is not written yet")


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
        raise NotImplementedError("exercise 52 is not written yet")

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
        raise NotImplementedError("exercise 52 is not written yet")


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
    raise NotImplementedError("exercise 52 is not written yet")
