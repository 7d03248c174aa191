"""Exercise 43: attention with a cache of keys and values.

When a model writes a text token by token, nothing about the earlier tokens changes: each
looks only back. So their keys and values are computed once and kept. A decode step then
costs one row of scores, over n_keys tokens, where a run without a cache does all n_keys²:

    out_t = softmax(q_t K_≤tᵀ / √head_dim) V_≤t

The first call (prefill) brings the whole prompt, later ones a token each (decode) or several
(a chunk). All of them are one thing: n_new tokens join the length tokens already there.

Source: Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need",
    section 2.4, https://arxiv.org/abs/1911.02150
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ex40_rope import apply_rope_half


class KVCache:
    """The keys and values of one attention layer, in memory that is reserved once.

    length: how many tokens it holds, the same for every sequence; 0 at first
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Reserve room for max_len tokens."""
        raise NotImplementedError("exercise 43 is not written yet")

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the keys and values of n_new tokens behind the earlier ones.

        k, v:    (batch, n_kv_heads, n_new, head_dim)
        returns: all keys and all values so far, each (batch, n_kv_heads, length, head_dim),
                 as views of the reserved memory

        More tokens than there is room for raise ValueError, which names max_len, and the
        cache stays as it was.
        """
        raise NotImplementedError("exercise 43 is not written yet")

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for the next text."""
        raise NotImplementedError("exercise 43 is not written yet")


def attend_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache | None,
    frequencies: Tensor,
    n_pad: Tensor | None = None,
) -> Tensor:
    """Let n_new tokens look at the tokens in the cache, at themselves, and back among themselves.

    q:           (batch, n_heads, n_new, head_dim), not rotated yet
    k, v:        (batch, n_kv_heads, n_new, head_dim), not rotated yet; they join the cache.
                 Query head h reads head h // (n_heads / n_kv_heads), as in exercise 42
    cache:       with `length` tokens so far; None for a run without, whose n_new tokens are all
    frequencies: (head_dim // 2,) float64, radians per position, for apply_rope_half
    n_pad:       (batch,) int64, how many of each sequence's first tokens are padding
    returns:     (batch, n_heads, n_new, head_dim), dtype of q

    Tokens stand in the order they came, the first one at position 0, and angles are float64,
    whatever the dtype of q. Scores of any size that q's dtype can hold give finite results. No
    query sees padding, where anything finite may stand. The result of a query that is padding
    itself means nothing, but must be finite, and so must the gradients: a NaN would reach every
    token through the next layer, since 0 · NaN is NaN.
    """
    raise NotImplementedError("exercise 43 is not written yet")
