"""Exercise 48: Mistral's sliding window and its rolling cache.

A token looks at the last `window` tokens alone, itself among them. What lies further back still
reaches it: each layer carries it up to window − 1 tokens on. So the cost of a token stops growing,
and so does the cache, whose slots are used again and again:

    out_i = attention(q_i, k_j, v_j)    over the j with i − window < j ≤ i
    token t stands in slot t mod window, until token t + window takes it

A long prompt is read in chunks, each of which looks at the cache and at itself.

Source: Jiang et al. 2023, "Mistral 7B", section 2, https://arxiv.org/abs/2310.06825
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ex40_rope import apply_rope_half, rope_frequencies
from ex42_gqa import GroupedQueryAttention, grouped_query_attention


def window_mask(q_positions: Tensor, k_positions: Tensor, window: int) -> Tensor:
    """Tell which keys a query has in its window.

    q_positions: (n_queries,) int64, in any order
    k_positions: (n_keys,) int64, in any order
    returns:     (n_queries, n_keys) bool, True where i − window < j ≤ i, for a query at
                 position i and a key at position j
    """
    raise NotImplementedError("exercise 48 is not written yet")


class RollingKVCache:
    """The keys and values of the last `window` tokens, in memory that is reserved once.

    window:       how many slots it has
    length:       how many tokens came so far, the forgotten ones too; 0 at first
    keys, values: (batch, n_kv_heads, window, head_dim), token t in slot t mod window, always
                  the same memory
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        window: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Reserve the slots."""
        raise NotImplementedError("exercise 48 is not written yet")

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put n_new tokens into their slots, and give all that these tokens may look at.

        k, v:    (batch, n_kv_heads, n_new, head_dim), n_new from 1 to more than window, dtype of
                 the cache
        returns: keys, values, each (batch, n_kv_heads, n_keys, head_dim), and their positions,
                 (n_keys,) int64. They hold whatever a new token has in its window, each token
                 once, in any order; further tokens may be among them, but n_keys is at most
                 window + n_new. Of more than window new tokens the last ones stay. The results
                 may be views of the slots, which the next call writes to.
        """
        raise NotImplementedError("exercise 48 is not written yet")

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for the next text."""
        raise NotImplementedError("exercise 48 is not written yet")


class SlidingWindowAttention(GroupedQueryAttention):
    """Self-attention as in Mistral: grouped queries, rotary positions, a window.

    Its parameters are those of exercise 42: q_proj, k_proj, v_proj and o_proj, without bias.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        window: int,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads)
        self.head_dim = d_model // n_heads
        self.window = window
        self.rope_theta = rope_theta

    def forward(self, x: Tensor, cache: RollingKVCache | None = None) -> Tensor:
        """Let n_new tokens look back, each at the last `window` tokens up to itself.

        x:       (batch, n_new, d_model)
        cache:   the tokens before, which x joins; None: x is the whole text, nothing is kept
        returns: (batch, n_new, d_model), dtype of x

        Tokens stand in the order they came, the first one at position 0. Queries and keys are
        turned by apply_rope_half, with the base rope_theta and angles in float64, whatever the
        dtype of x. A cache whose window is not that of the layer raises ValueError, which names
        both, and stays as it was: it would forget too early, or too late. Gradients need not flow
        through a cache.
        """
        raise NotImplementedError("exercise 48 is not written yet")


def prefill(
    layer: Callable[[Tensor, RollingKVCache], Tensor],
    x: Tensor,
    cache: RollingKVCache,
    chunk_size: int,
) -> Tensor:
    """Bring a prompt through a layer in chunks, so that the scores of one chunk fit in memory.

    layer:      maps a chunk (batch, n_new, d_model) and the cache to (batch, n_new, d_model)
    x:          (batch, seq_len, d_model), the tokens after those that are in the cache
    chunk_size: how many tokens the layer gets at once; only the last chunk may be shorter
    returns:    (batch, seq_len, d_model), what one call for all would give
    """
    raise NotImplementedError("exercise 48 is not written yet")
