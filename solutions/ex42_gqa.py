"""Exercise 42: grouped-query attention.

A model that writes reads the keys and values of all earlier tokens for each new one.
Fewer heads of keys and values mean less to keep and to read. So the query heads share
them, each group of neighbours one key and value head:

    head_i = attention(q_i, k_j, v_j)    j = ⌊i / group⌋,  group = n_heads / n_kv_heads

With n_kv_heads = n_heads this is multi-head attention, with 1 multi-query attention.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models
    from Multi-Head Checkpoints", section 2.2, https://arxiv.org/abs/2305.13245
"""

from torch import Tensor, nn

from ex31_scaled_dot_product_attention import scaled_dot_product_attention


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with n_heads heads of queries to n_kv_heads heads of keys and values.

    q:       (batch, n_heads, n_queries, head_dim) floating point
    k:       (batch, n_kv_heads, n_keys, head_dim)
    v:       (batch, n_kv_heads, n_keys, value_dim)
    mask:    bool, broadcasts to (batch, n_heads, n_queries, n_keys); True where a query
             may see a key, as in exercise 31
    returns: (batch, n_heads, n_queries, value_dim), dtype of q

    Scores and softmax are computed in float32 at least, as in exercise 31, so that scores of any
    size give finite results. Raises ValueError unless n_heads is a multiple of n_kv_heads. The
    message gives both.
    """
    # solution
    n_heads, n_kv_heads = q.shape[1], k.shape[1]
    _check_heads(n_heads, n_kv_heads)

    # Neighbours share: heads 0 0 0 1 1 1, not 0 1 0 1 0 1. Pretrained weights count on it.
    k = k.repeat_interleave(n_heads // n_kv_heads, dim=1)
    v = v.repeat_interleave(n_heads // n_kv_heads, dim=1)
    return scaled_dot_product_attention(q, k, v, mask)


def _check_heads(n_heads: int, n_kv_heads: int) -> None:
    if n_heads % n_kv_heads != 0:
        raise ValueError(
            f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}"
        )


class GroupedQueryAttention(nn.Module):
    """Self-attention with shared key and value heads.

    Its only parameters are those of four nn.Linear without bias, head_dim = d_model / n_heads:

    q_proj.weight: (n_heads · head_dim, d_model)
    k_proj.weight: (n_kv_heads · head_dim, d_model)
    v_proj.weight: (n_kv_heads · head_dim, d_model)
    o_proj.weight: (d_model, n_heads · head_dim)

    Head i owns the head_dim neighbouring rows from i · head_dim on, and in o_proj such columns.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        """Make the four projections. How they start is up to you.

        Raises ValueError unless d_model is a multiple of n_heads, and n_heads of n_kv_heads. The
        message gives the two that do not fit.
        """
        super().__init__()
        # solution
        if d_model % n_heads != 0:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        _check_heads(n_heads, n_kv_heads)
        self.head_dim = d_model // n_heads
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let every position gather from those that it may see.

        x:       (batch, seq_len, d_model)
        mask:    bool, broadcasts to (batch, n_heads, seq_len, seq_len); all is seen without one
        returns: (batch, seq_len, d_model)
        """
        # solution
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, n_heads or n_kv_heads, seq_len, head_dim)
        out = grouped_query_attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(-2))
