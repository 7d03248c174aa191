"""Exercise 49: Phi.

Phi-1 and Phi-2 are small models that were trained on chosen texts, and they are built a little
differently from a Llama. Attention and feed-forward part stand side by side: both read the
same norm, and both results are added at once,

    h = layer_norm(x)
    y = x + W_o attention(h) + W_down gelu(W_up h)

so the two do not wait for each other. Only the first features of a head are turned by
its position, the others are compared as they are. And everything has a bias, even the head.

Sources: Gunasekar et al. 2023, "Textbooks Are All You Need", section 2.3,
    https://arxiv.org/abs/2306.11644;
    Wang & Komatsuzaki 2021, GPT-J, https://github.com/kingoflolz/mesh-transformer-jax, where
    both ideas were first tried at this size
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ex40_rope import apply_rope_half, rope_frequencies


@dataclass(frozen=True)
class PhiConfig:
    """The sizes of a Phi."""

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    rotary_dim: int  # how many features of each head are turned: 32 of 64 in Phi-1, of 80 in Phi-2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


def apply_partial_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn the first features of each vector by its position, and leave the others.

    x:           (..., seq_len, head_dim) floating, queries or keys
    positions:   (..., seq_len) integer, as apply_rope_half takes them
    frequencies: (rotary_dim // 2,) float64, radians per position; rotary_dim is from 0 to
                 head_dim
    returns:     like x. The pairs are the two halves of the first rotary_dim features.
    """
    # solution
    rotary_dim = 2 * len(frequencies)
    turned = apply_rope_half(x[..., :rotary_dim], positions, frequencies)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


class Block(nn.Module):
    """One layer. Its parts, each with weight and bias, bear the names of GGUF, as in exercise 44:

    attn_norm                nn.LayerNorm over d_model with norm_eps, the only norm of the layer
    attn_q, attn_k, attn_v   nn.Linear, d_model to d_model; head i owns the i-th head_dim rows
    attn_output              nn.Linear, d_model to d_model
    ffn_up, ffn_down         nn.Linear, d_model to d_ff and back
    """

    def __init__(self, config: PhiConfig) -> None:
        """Make the parts."""
        super().__init__()
        # solution
        d_model = config.d_model
        self.head_dim = config.head_dim
        self.attn_norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        self.attn_q = nn.Linear(d_model, d_model)
        self.attn_k = nn.Linear(d_model, d_model)
        self.attn_v = nn.Linear(d_model, d_model)
        self.attn_output = nn.Linear(d_model, d_model)
        self.ffn_up = nn.Linear(d_model, config.d_ff)
        self.ffn_down = nn.Linear(config.d_ff, d_model)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """Add to x what attention and the feed-forward part make of its norm.

        x:           (batch, seq_len, d_model)
        frequencies: (rotary_dim // 2,) float64, radians per position; positions count from 0
        returns:     (batch, seq_len, d_model)

        Attention is causal, its scores are scaled by 1/√head_dim. GELU is its tanh form.
        """
        # solution
        h = self.attn_norm(x)

        q, k, v = self.attn_q(h), self.attn_k(h), self.attn_v(h)
        # (batch, seq_len, n_heads · head_dim) -> (batch, n_heads, seq_len, head_dim)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        positions = torch.arange(x.shape[1], device=x.device)
        q = apply_partial_rope(q, positions, frequencies)
        k = apply_partial_rope(k, positions, frequencies)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = self.attn_output(heads.transpose(1, 2).flatten(2))

        return x + attended + self.ffn_down(F.gelu(self.ffn_up(h), approximate="tanh"))


class Phi(nn.Module):
    """The language model.

    token_embd    nn.Embedding
    blk.N         a Block each, N from 0 to n_layers − 1
    output_norm   nn.LayerNorm with norm_eps
    output        nn.Linear from d_model to vocab_size, with a bias, and not tied to token_embd
    """

    def __init__(self, config: PhiConfig) -> None:
        """Make the parts.

        Raises ValueError unless d_model is a multiple of n_heads, and rotary_dim even and from 0 to
        head_dim. The message gives the two that do not fit, or the odd or negative one.
        """
        super().__init__()
        # solution
        if config.d_model % config.n_heads:
            raise ValueError(
                f"d_model must be a multiple of n_heads, got {config.d_model} and {config.n_heads}"
            )
        if config.rotary_dim % 2 or not 0 <= config.rotary_dim <= config.head_dim:
            raise ValueError(
                f"rotary_dim must be even and from 0 to head_dim = {config.head_dim}, "
                f"got {config.rotary_dim}"
            )
        self.config = config
        self.token_embd = nn.Embedding(config.vocab_size, config.d_model)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.output_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Score every token of the vocabulary as the successor of each of `ids`.

        ids:     (batch, seq_len) int64
        returns: (batch, seq_len, vocab_size) logits, dtype of the weights

        In a model of float64 all is computed in float64. The angles stay exact when the model is
        cast to bfloat16. The softmax may be taken in the dtype of the weights or in a wider one.
        """
        # solution
        # Made anew each time: a buffer would follow the model into bfloat16.
        frequencies = rope_frequencies(self.config.rotary_dim, self.config.rope_theta)
        frequencies = frequencies.to(ids.device)
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, frequencies)
        return self.output(self.output_norm(x))
