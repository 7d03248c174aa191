"""Exercise 23: additive attention.

A translator that must pour a whole sentence into one vector forgets the beginning of it. Attention
lets the decoder look back instead, at each step, at every state of the encoder: a query is scored
against each of these keys, a softmax makes weights of the scores, and the context is the average
of the keys under them:

    score_j = w · tanh(W_q query + W_k key_j)      additive (Bahdanau)
    score_j = query · key_j                        dot product (Luong)
    context = Σ_j α_j key_j,    α = softmax over j of score

Source: Bahdanau, Cho, Bengio 2014, "Neural Machine Translation by Jointly Learning to Align and
    Translate", section 3.1 and appendix A.1.2, https://arxiv.org/abs/1409.0473; Luong, Pham,
    Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation", section 3.1,
    https://arxiv.org/abs/1508.04025; the decoder: Wu et al. 2016, "Google's Neural Machine
    Translation System", figure 1, https://arxiv.org/abs/1609.08144
"""

import math

import torch
from torch import Tensor, nn

from ex22_gru import GRUCell


class AdditiveAttention(nn.Module):
    """Scores by a small network. Its only parameters are those of three nn.Linear without bias:

    q_proj: weight (d_attn, query_dim), W_q of the equation
    k_proj: weight (d_attn, key_dim), W_k
    score:  weight (1, d_attn), w
    """

    def __init__(self, query_dim: int, key_dim: int, d_attn: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(query_dim, d_attn, bias=False)
        self.k_proj = nn.Linear(key_dim, d_attn, bias=False)
        self.score = nn.Linear(d_attn, 1, bias=False)

    def forward(
        self, query: Tensor, keys: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Average each row's keys by their scores.

        query:   (batch, query_dim) dtype of the parameters
        keys:    (batch, n_keys, key_dim) the same, n_keys ≥ 1
        lengths: (batch) int64, 1 … n_keys: the keys from there on are padding; None: there is none
        returns: context (batch, key_dim) and weights (batch, n_keys), 0 for padding

        Padding may hold anything, NaN too: results and gradients are the same, and the gradient of
        the padding is 0. However large the scores are, results are finite. A length outside
        1 … n_keys raises ValueError, which gives both.
        """
        # solution
        padding = _padding(keys, lengths)
        keys = keys.masked_fill(padding[..., None], 0)
        hidden = torch.tanh(self.q_proj(query)[:, None] + self.k_proj(keys))
        return _average(self.score(hidden).squeeze(-1), keys, padding)


class DotAttention(nn.Module):
    """Scores by a dot product. It has no parameters, and query and keys are equally wide."""

    def forward(
        self, query: Tensor, keys: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Average each row's keys by their scores, which are not scaled.

        query:   (batch, key_dim) floating point
        keys:    (batch, n_keys, key_dim) the same, n_keys ≥ 1
        lengths: (batch) int64, 1 … n_keys: the keys from there on are padding; None: there is none
        returns: context (batch, key_dim) and weights (batch, n_keys), 0 for padding

        However large the scores are, results are finite, as long as the scores themselves are: a
        float16 ends at 65,504. Padding is as for AdditiveAttention, lengths too.
        A query of another width than the keys raises ValueError, which gives both.
        """
        # solution
        if query.shape[-1] != keys.shape[-1]:
            raise ValueError(
                f"query and keys must be equally wide, got {query.shape[-1]} and {keys.shape[-1]}"
            )
        padding = _padding(keys, lengths)
        keys = keys.masked_fill(padding[..., None], 0)
        return _average((keys @ query[..., None]).squeeze(-1), keys, padding)


class DecoderStep(nn.Module):
    """A stack of GRU cells, the first of which looks for what the others are told.

    cells:     nn.ModuleList of n_layers GRUCell of exercise 22, all of hidden_size; the first
               reads input_size numbers, each other one hidden_size + key_dim
    attention: AdditiveAttention(hidden_size, key_dim, hidden_size)
    """

    def __init__(self, input_size: int, hidden_size: int, key_dim: int, n_layers: int) -> None:
        """Make the parts. n_layers is 1 or more."""
        super().__init__()
        # solution
        inputs = [input_size] + [hidden_size + key_dim] * (n_layers - 1)
        self.cells = nn.ModuleList(GRUCell(size, hidden_size) for size in inputs)
        self.attention = AdditiveAttention(hidden_size, key_dim, hidden_size)

    def forward(
        self, x: Tensor, states: Tensor, keys: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step of the target.

        The first cell reads x. Its new state, that of this step, is the query. Every later cell
        reads the new state of the cell below it, followed by the context.

        x:       (batch, input_size) dtype of the parameters
        states:  (n_layers, batch, hidden_size), of the cells before this step, the first one first
        keys:    (batch, n_keys, key_dim) and lengths (batch): as AdditiveAttention takes them
        returns: the states after the step, (n_layers, batch, hidden_size); the context
                 (batch, key_dim); and the weights (batch, n_keys)
        """
        # solution
        h = self.cells[0](x, states[0])
        context, weights = self.attention(h, keys, lengths)
        new = [h]
        for cell, state in zip(self.cells[1:], states[1:], strict=True):
            h = cell(torch.cat([h, context], dim=-1), state)
            new.append(h)
        return torch.stack(new), context, weights


def _padding(keys: Tensor, lengths: Tensor | None) -> Tensor:
    batch, n_keys, _ = keys.shape
    if lengths is None:
        return torch.zeros(batch, n_keys, dtype=torch.bool, device=keys.device)
    if ((lengths < 1) | (lengths > n_keys)).any():
        raise ValueError(f"lengths must be 1 … n_keys = {n_keys}, got {lengths.tolist()}")
    return torch.arange(n_keys, device=keys.device) >= lengths[:, None]


def _average(scores: Tensor, keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(scores.masked_fill(padding, -math.inf), dim=-1)
    return (weights[:, None] @ keys).squeeze(1), weights
