"""Exercise 34: the transformer block.

A block lets positions gather from each other, then thinks at each position alone. Each of
these two branches is added to what it was given, so that a path leads straight through.
Where the norm stands decides whether that path stays free:

    post-norm:  x = norm_1(x + drop(attn(x)))       pre-norm:  x = x + drop(attn(norm_1(x)))
                x = norm_2(x + drop(ff(x)))                    x = x + drop(ff(norm_2(x)))

    ff(x) = W_2 drop(relu(W_1 x + b_1)) + b_2

Source: Vaswani et al. 2017, "Attention Is All You Need", sections 3.1, 3.3 and 5.4,
    https://arxiv.org/abs/1706.03762; Xiong et al. 2020, "On Layer Normalization in the
    Transformer Architecture", table 1, https://arxiv.org/abs/2002.04745
"""

import torch
from torch import Tensor, nn

from ex32_multi_head_attention import MultiHeadAttention


class FeedForward(nn.Module):
    """Two linear layers with ReLU between them, at each position alone.

    Its only parameters are those of two nn.Linear with bias: w_1, d_model to d_ff wide, and
    w_2, d_ff to d_model wide. How they start is up to you.
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0) -> None:
        """Make the parts. dropout: the probability, in train mode, for each number to go."""
        super().__init__()
        # solution
        self.w_1 = nn.Linear(d_model, d_ff)
        self.w_2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, bend, drop, narrow. x, returns: (..., d_model).

        Numbers are dropped between ReLU and w_2, by torch's dropout, each by itself and anew at
        every call; none from the result.
        """
        # solution
        return self.w_2(self.dropout(torch.relu(self.w_1(x))))


class Block(nn.Module):
    """What both kinds of block are made of; here as given.

    attn and ff:     the two branches; attn has no dropout inside
    norm_1, norm_2:  a LayerNorm for each, eps 1e-5
    dropout:         for what a branch returns, before it is added; each number of each branch is
                     drawn by itself, anew at every call
    """

    def __init__(
        self, d_model: int, n_heads: int, d_ff: int, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(d_model, n_heads, causal)
        self.ff = FeedForward(d_model, d_ff, dropout)
        self.norm_1 = nn.LayerNorm(d_model)
        self.norm_2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)


class PostNormBlock(Block):
    """The block of 2017: the sum is normalised."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply attention, then feed-forward.

        x:       (batch, seq_len, d_model)
        mask:    bool, as exercise 32 takes it, for the attention
        returns: (batch, seq_len, d_model)
        """
        # solution
        x = self.norm_1(x + self.dropout(self.attn(x, mask=mask)))
        return self.norm_2(x + self.dropout(self.ff(x)))


class PreNormBlock(Block):
    """The block of today: only what a branch reads is normalised."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply attention, then feed-forward.

        x:       (batch, seq_len, d_model)
        mask:    bool, as exercise 32 takes it, for the attention
        returns: (batch, seq_len, d_model)
        """
        # solution
        x = x + self.dropout(self.attn(self.norm_1(x), mask=mask))
        return x + self.dropout(self.ff(self.norm_2(x)))
