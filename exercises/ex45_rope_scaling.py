"""Exercise 45: longer texts by slower rotations (RoPE scaling).

A model with rotary positions has never met angles beyond those of its training texts. Past
original_len tokens it meets them, and falls apart. The cure is to slow the rotations down, by
a factor of about new length / original_len, so that a longer text stays within known angles.
But pairs that turn fast tell neighbours apart, and should keep their pace. With θᵢ =
theta^(−2i / head_dim) as in exercise 40:

    linear       θᵢ / factor
    dynamic NTK  θᵢ with theta · scale^(head_dim / (head_dim − 2)),
                 scale = factor · seq_len / original_len − (factor − 1), but at least 1
    Llama-3      (1 − sᵢ) θᵢ / factor + sᵢ θᵢ    by how often pair i turns in original_len tokens
    YaRN         rᵢ θᵢ / factor + (1 − rᵢ) θᵢ    by its place i among the pairs

YaRN also multiplies queries and keys by 1 + 0.1 ln factor, which sharpens the softmax over
more keys.

From exercise 40 come rope_frequencies(head_dim, theta), the θᵢ as (head_dim // 2,) float64, and
apply_rope_half(x, positions, frequencies), which turns x (..., seq_len, head_dim) by the angles
positions · frequencies, with positions (seq_len,).

Sources: Chen et al. 2023, https://arxiv.org/abs/2306.15595 (linear);
    Peng et al. 2023, "YaRN", sections 3.1 to 3.4, https://arxiv.org/abs/2309.00071;
    Grattafiori et al. 2024, "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ex40_rope import apply_rope_half, rope_frequencies


def linear_frequencies(head_dim: int, theta: float, factor: float) -> Tensor:
    """Slow all pairs down alike.

    head_dim: even, as for rope_frequencies
    theta:    the base
    factor:   how many times longer the text may be; below 1, ValueError, which says what it was
    returns:  (head_dim // 2,) float64, radians per position
    """
    raise NotImplementedError("exercise 45 is not written yet")


def dynamic_ntk_frequencies(
    head_dim: int, theta: float, factor: float, original_len: int, seq_len: int
) -> Tensor:
    """Raise the base with the length of the text: the first pair stays, the last one slows most.

    head_dim:     at least 4
    factor:       how steeply the scale grows with the text: at 1, it is seq_len / original_len;
                  below 1, ValueError, as above
    original_len: the length of the training texts
    seq_len:      the length of this text; up to original_len, nothing changes

    All else as in linear_frequencies.
    """
    raise NotImplementedError("exercise 45 is not written yet")


def llama3_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    original_len: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Tensor:
    """Slow those pairs down that turn too seldom to have been seen all round in training.

    In original_len tokens a pair makes original_len · θᵢ / 2π turns. One that makes
    high_freq_factor or more keeps its pace (sᵢ = 1), one that makes low_freq_factor or fewer
    is slowed by the whole factor (sᵢ = 0), and sᵢ grows evenly with the turns between them.

    All else as in linear_frequencies.
    """
    raise NotImplementedError("exercise 45 is not written yet")


def yarn_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    original_len: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Slow the pairs down by a ramp over their places i.

    A pair that makes b turns in original_len tokens would have the place

        place(b) = head_dim · ln(original_len / 2πb) / (2 ln theta)

    The ramp rᵢ is 0 up to place(beta_fast), rounded down to a whole number and at least 0. It
    is 1 from place(beta_slow) on, rounded up and at most head_dim − 1: not the last place of a
    pair, head_dim / 2 − 1, but so it was published. Between them it grows evenly with i. Where
    the second end is not behind the first, it is 0 up to the first and 1 behind.

    All else as in linear_frequencies.
    """
    raise NotImplementedError("exercise 45 is not written yet")


def yarn_attention_factor(factor: float) -> float:
    """Give what YaRN multiplies queries and keys by: 1 + 0.1 ln factor; factor as above."""
    raise NotImplementedError("exercise 45 is not written yet")


def attend_with_rope(
    q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor, attention_factor: float = 1.0
) -> Tensor:
    """Let every token of a text look at itself and back, with queries and keys turned.

    q, k, v:          (batch, n_heads, seq_len, head_dim), not rotated yet; the pairs of a head
                      are its two halves, and positions count from 0
    frequencies:      (head_dim // 2,) float64, radians per position
    attention_factor: multiplies each turned query and each turned key
    returns:          (batch, n_heads, seq_len, head_dim), dtype of q

    Angles are float64, whatever the dtype of q, as apply_rope_half takes them. Scores of any size
    that q's dtype can hold give finite results. Any scaled dot-product attention may be used,
    torch's too.
    """
    raise NotImplementedError("exercise 45 is not written yet")
