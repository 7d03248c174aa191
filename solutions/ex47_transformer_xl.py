"""Exercise 47: Transformer-XL, a memory of earlier segments.

A long text is read in segments. What each layer was given in earlier ones is kept, and the same
layer gathers from it again, so the past is neither lost nor read anew. Positions must then mean
the same in every segment, and only distances do: query i scores key j, n = i − j tokens back, by

    score = (q_i·k_j + q_i·r_n + u·k_j + v·r_n) / √head_dim        r_n = W_r R_n

that is content by content, content by distance, and what a key's content (u) and its distance (v)
are worth to any query. R_n is the wave of exercise 30 for position n.

Source: Dai et al. 2019, "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context",
    sections 3.2 and 3.3, appendix B, https://arxiv.org/abs/1901.02860
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ex30_positional_encoding import sinusoidal
from ex34_transformer_block import FeedForward


def relative_shift(x: Tensor) -> Tensor:
    """Move the scores of each query from the column of their distance to that of their key.

    x:       (..., n_queries, n_keys) of any memory layout. Column c holds scores for the distance
             n_keys − 1 − c: the last one is for a token's distance to itself, 0
    returns: (..., n_queries, n_keys), dtype of x. [i, j] is row i's score for the distance
             n_keys − n_queries + i − j. Where that is negative, key j comes after query i, and
             anything may stand there

    The queries are the last n_queries of the n_keys tokens. Either number may be 0. More queries
    than keys raise ValueError, and the message holds both numbers.
    """
    # solution
    n_queries, n_keys = x.shape[-2:]
    if n_keys < n_queries:
        raise ValueError(
            f"n_keys must be at least n_queries, got {n_keys} and {n_queries}: "
            "every query's own token is among the keys"
        )
    # Row i has to move left by n_queries - 1 - i, each row one place less than the row before.
    # Rows that are one number longer than those which are cut afterwards do just that.
    padded = F.pad(x, (1, 0))
    return padded.flatten(-2)[..., n_queries:].reshape(x.shape)


def relative_scores(q: Tensor, k: Tensor, r: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Score every key for every query: the four terms of the equation, and nothing of the future.

    q:       (batch, n_heads, n_queries, head_dim), the last n_queries tokens
    k:       (batch, n_heads, n_keys, head_dim), the memory's tokens and then the queries' own
    r:       (n_heads, n_keys, head_dim), row c for the distance n_keys − 1 − c
    u, v:    (n_heads, head_dim)
    returns: (batch, n_heads, n_queries, n_keys), dtype of q, divided by √head_dim; −∞ where the
             key comes after the query

    A distance is compared with a query once, not once for each key: no tensor on the way has
    n_heads · n_queries · n_keys · head_dim numbers, not even for a batch of one.
    """
    # solution
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    content = (q + u[:, None]) @ k.mT
    distance = relative_shift((q + v[:, None]) @ r.mT)
    scores = (content + distance) / math.sqrt(q.shape[-1])
    future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
    return scores.masked_fill(future.triu(n_keys - n_queries + 1), -math.inf)


class RelativeAttention(nn.Module):
    """Causal self-attention that also gathers from a memory.

    Its only parameters, with head_dim = d_model / n_heads:

    q_proj, k_proj, v_proj, r_proj, o_proj: weight (d_model, d_model), no bias
    u, v:                                   (n_heads, head_dim)

    Head i owns the head_dim neighbouring features from i · head_dim on, of q, k, values and r,
    and of what o_proj reads.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.head_dim = d_model // n_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.u = nn.Parameter(torch.zeros(n_heads, self.head_dim))
        self.v = nn.Parameter(torch.zeros(n_heads, self.head_dim))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Let every position gather from the memory, from those before it, and from itself.

        x:       (batch, n_queries, d_model), dtype of the weights
        memory:  (batch, n_memory, d_model), the tokens right before x, n_memory 0 or more; or None
        returns: (batch, n_queries, d_model), dtype of x. In float32 and float64 scores of any size
                 give finite results; half a precision may round anything on the way

        Keys and values of the memory are made from it here, with today's weights, which learn from
        them. But no gradient reaches the memory itself.
        """
        # solution
        seen = x if memory is None else torch.cat((memory.detach(), x), dim=1)
        waves = sinusoidal(seen.shape[1], x.shape[2], x.dtype).flip(0).to(x.device)
        inputs = (self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen), (self.r_proj, waves)
        q, k, values, r = (
            project(y).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for project, y in inputs
        )  # (batch, n_heads, n_queries or n_keys, head_dim), and r without batch
        weights = torch.softmax(relative_scores(q, k, r, self.u, self.v), dim=-1)
        return self.o_proj((weights @ values).transpose(1, 2).flatten(-2))


def update_memory(memory: Tensor | None, x: Tensor, mem_len: int) -> Tensor:
    """Keep the last mem_len tokens, of older segments and of this one.

    memory:  (batch, n_memory, d_model) or None, what is kept so far
    x:       (batch, n_new, d_model), the tokens after it
    mem_len: int, 0 or more
    returns: (batch, min(mem_len, n_memory + n_new), d_model), in the order of the text, cut from
             the graph: it needs no gradient, and keeps no segment's intermediate results alive. In
             memory of its own: whoever writes into x or memory later doesn't change what was kept
    """
    # solution
    memory = x if memory is None else torch.cat((memory, x), dim=1)
    return memory[:, max(0, memory.shape[1] - mem_len) :].detach().clone()


class Block(nn.Module):
    """Attention with memory and feed-forward, each added and then normalised; here as given."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int) -> None:
        super().__init__()
        self.attn = RelativeAttention(d_model, n_heads)
        self.ff = FeedForward(d_model, d_ff)
        self.norm_1 = nn.LayerNorm(d_model)
        self.norm_2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norm_1(x + self.attn(x, memory))
        return self.norm_2(x + self.ff(x))


class TransformerXL(nn.Module):
    """A stack of blocks, `layers`, each with a memory of its own."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, n_layers: int, mem_len: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(d_model, n_heads, d_ff) for _ in range(n_layers)])
        self.mem_len = mem_len

    def forward(
        self, x: Tensor, memories: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Read a segment, and say what to remember for the next one.

        x:        (batch, seq_len, d_model), embedded tokens
        memories: what the call for the segment before returned, and all that a call knows of it;
                  None for the first segment. They stay as they were: a text may go on in two ways
        returns:  (batch, seq_len, d_model), and one memory for each layer: the last mem_len of all
                  that this layer was given as x so far, as update_memory keeps them

        Another number of memories than of layers raises ValueError; the message holds both numbers.
        """
        # solution
        if memories is not None and len(memories) != len(self.layers):
            raise ValueError(
                f"memories must be one for each of {len(self.layers)} layers, got {len(memories)}"
            )
        updated = []
        for layer, memory in zip(self.layers, memories or [None] * len(self.layers), strict=True):
            updated.append(update_memory(memory, x, self.mem_len))
            x = layer(x, memory)
        return x, updated
