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
        # solution
        self.length = 0
        self.keys = torch.zeros(batch, n_kv_heads, max_len, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the keys and values of n_new tokens behind the earlier ones.

        k, v:    (batch, n_kv_heads, n_new, head_dim)
        returns: all keys and all values so far, each (batch, n_kv_heads, length, head_dim),
                 as views of the reserved memory

        More tokens than there is room for raise ValueError, which names max_len, and the
        cache stays as it was.
        """
        # solution
        max_len, end = self.keys.shape[-2], self.length + k.shape[-2]
        if end > max_len:
            raise ValueError(f"{end} tokens do not fit: the cache was made for max_len {max_len}")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for the next text."""
        # solution
        self.length = 0


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
    # solution
    start = cache.length if cache is not None else 0
    slots = torch.arange(start + k.shape[-2], device=q.device)

    # Keys are turned once, as they come: a later query's distance is in its own angle. Padding
    # shifts all positions of a sequence alike, and the distances stay.
    q = apply_rope_half(q, slots[start:], frequencies)
    k = apply_rope_half(k, slots[start:], frequencies)
    if cache is not None:
        k, v = cache.append(k, v)  # (batch, n_kv_heads, n_keys, head_dim)

    # The queries are the last n_new of n_keys tokens, so a square mask would not do.
    mask = slots <= slots[start:, None]  # (n_new, n_keys)
    if n_pad is not None:
        itself = slots == slots[start:, None]  # a softmax over nothing would be NaN
        mask = (mask & (slots >= n_pad[:, None, None, None])) | itself  # (batch, 1, n_new, n_keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
