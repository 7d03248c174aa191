"""Exercise 35: the encoder-decoder transformer.

To translate, read the whole source, then write the target a token at a time, looking back at
both. The encoder's blocks see all of the source. The decoder's see the target up to here, then
ask the memory, what the encoder made of the source, by a cross-attention of their own:

    block(x, memory):  x = norm_1(x + drop(self_attn(x)))                causal
                       x = norm_2(x + drop(cross_attn(x, memory)))      x asks, memory answers
                       x = norm_3(x + drop(ff(x)))

    embedded(ids) = drop(√d_model · E[ids] + positions)      logits = x Eᵀ

One table E (vocab_size, d_model) serves the source, the target and the logits.

Source: Vaswani et al. 2017, "Attention Is All You Need", sections 3.1 to 3.5,
    https://arxiv.org/abs/1706.03762; tying: Press and Wolf 2017, "Using the Output Embedding to
    Improve Language Models", https://arxiv.org/abs/1608.05859
"""

import math

import torch
from torch import Tensor, nn

from ex30_positional_encoding import SinusoidalPositions
from ex32_multi_head_attention import MultiHeadAttention
from ex34_transformer_block import FeedForward, PostNormBlock


class DecoderBlock(nn.Module):
    """The three branches of a decoder's block, each added and then normalised; post-norm.

    self_attn, cross_attn: MultiHeadAttention of exercise 32, the first of them causal
    ff:                    FeedForward of exercise 34
    norm_1 … norm_3:       a LayerNorm for each branch, in this order, eps 1e-5
    dropout:               an nn.Dropout for what a branch returns, before it is added; inside, ff
                           drops with the same probability, and the attentions drop nothing
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        raise NotImplementedError("exercise 35 is not written yet")

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Let each position of the target gather from the target, then from the memory.

        x:           (batch, tgt_len, d_model)
        memory:      (batch, src_len, d_model)
        memory_mask: bool, broadcasts to (batch, n_heads, tgt_len, src_len), True where a position
                     may see one of the memory; all is seen without one
        returns:     (batch, tgt_len, d_model)
        """
        raise NotImplementedError("exercise 35 is not written yet")


class Transformer(nn.Module):
    """The model of 2017, for ids of one vocabulary.

    embed:   nn.Embedding(vocab_size, d_model); its weight is E, the only table
    encoder: nn.ModuleList of n_layers PostNormBlock of exercise 34
    decoder: nn.ModuleList of n_layers DecoderBlock

    There are no other parameters: the logits have no bias, no norm follows the last block, and
    the positions are the waves of exercise 30. Token 0 is padding, in source and target. All is
    computed in the dtype of the weights.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        max_len: int = 512,
        dropout: float = 0.0,
    ) -> None:
        """Make the parts, all with the same dropout.

        max_len is that of the positions: a source or target of more tokens raises ValueError,
        which gives both numbers. embed.weight starts normal, with mean 0 and deviation
        1/√d_model, so that an embedding times √d_model is about as large as a position. The
        others start as their modules start them, each by itself.
        """
        super().__init__()
        raise NotImplementedError("exercise 35 is not written yet")

    def encode(self, src: Tensor) -> Tensor:
        """Read the source.

        src:     (batch, src_len) int64, each row with at least one token that is not padding
        returns: (batch, src_len, d_model), the memory; rows of padding hold anything

        No position sees padding, wherever it stands.
        """
        raise NotImplementedError("exercise 35 is not written yet")

    def decode(self, tgt: Tensor, memory: Tensor, src: Tensor) -> Tensor:
        """Score, for each position of the target, every token that could come next.

        tgt:     (batch, tgt_len) int64; padding may stand at its end
        memory:  (batch, src_len, d_model), what encode gave for src
        src:     (batch, src_len) int64, where its padding is
        returns: (batch, tgt_len, vocab_size) logits; those at padding are anything

        Position t sees positions 0 … t of the target, and all of the memory but padding.
        """
        raise NotImplementedError("exercise 35 is not written yet")

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Return the logits for a target that is known, all positions at once."""
        raise NotImplementedError("exercise 35 is not written yet")


@torch.no_grad()
def greedy(model: Transformer, src: Tensor, bos_id: int, eos_id: int, max_new: int) -> Tensor:
    """Write each target by its likeliest token, again and again.

    model:   anything with the methods encode and decode of Transformer; no other is called
    src:     (batch, src_len) int64
    bos_id:  the token that every target begins with; not returned
    eos_id:  the token that ends one; returned, and followed by padding (0). It may be bos_id
    max_new: int ≥ 1, at most so many tokens are written, an eos_id among them
    returns: (batch, n) int64, n ≤ max_new; n is smaller if all targets end before

    The source is read once, no gradient is recorded, and the model is left as it was, in its
    mode too. A 0 that is likeliest is written like any other token: only eos_id ends a target.
    """
    raise NotImplementedError("exercise 35 is not written yet")
