"""Exercise 40: rotary positions (RoPE).

A query and a key should know how far apart they are, and nothing else of where they stand.
So each pair of features is a point in the plane, turned by an angle that grows with the
position. A dot product of two turned points depends on the difference of their angles:

    (a, b) → (a cos mθᵢ − b sin mθᵢ,  a sin mθᵢ + b cos mθᵢ),    θᵢ = theta^(−2i / head_dim)

for pair i = 0 … head_dim/2 − 1 at position m. Two layouts say which features are a pair:

    interleaved  (x₀, x₁), (x₂, x₃), …             the paper, and the weights in GGUF files
    half         (x₀, x_d/2), (x₁, x_d/2+1), …     Llama as in transformers

Everything here takes NumPy arrays and PyTorch tensors alike.

Source: Su et al. 2021, "RoFormer", eqs. 13-15 and 34, https://arxiv.org/abs/2104.09864
"""

from types import ModuleType

import numpy as np
import torch

Array = np.ndarray | torch.Tensor


def rope_frequencies(head_dim: int, theta: float = 10_000.0, xp: ModuleType = torch) -> Array:
    """Give the angle by which each pair of features turns from one position to the next.

    head_dim: even; an odd one raises ValueError, which says what it was
    theta:    the base; the larger it is, the slower the last pairs turn
    xp:       the library to make the array with: torch or numpy
    returns:  (head_dim // 2,) float64, radians per position
    """
    # solution
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}: features turn in pairs")
    return theta ** (-xp.arange(0, head_dim, 2, dtype=xp.float64) / head_dim)


def apply_rope_interleaved(x: Array, positions: Array, frequencies: Array) -> Array:
    """Turn the pairs (x₀, x₁), (x₂, x₃), … of each vector by its position.

    x:           (..., seq_len, head_dim) floating, queries or keys
    positions:   (..., seq_len) integer, of any size and sign; the leading dimensions broadcast
                 to x's: (seq_len,) for all alike, (batch, 1, seq_len) for each sequence its own
    frequencies: (head_dim // 2,) radians per position
    returns:     like x, which stays as it was

    x, positions and frequencies are all tensors or all arrays. The angles are made in the
    dtype of frequencies or a wider one, whatever that of x is: in bfloat16, position 1001
    would be 1000. From the cosine and sine on, you may round to the dtype of x at each step.
    """
    # solution
    cos, sin = _cos_sin(x, positions, frequencies)
    a, b = x[..., 0::2], x[..., 1::2]
    xp = _library(x)
    pairs = xp.stack((a * cos - b * sin, a * sin + b * cos), axis=-1)
    return pairs.reshape(x.shape)  # (..., head_dim / 2, 2) -> (..., head_dim)


def apply_rope_half(x: Array, positions: Array, frequencies: Array) -> Array:
    """Turn the pairs (x₀, x_d/2), (x₁, x_d/2+1), … of each vector by its position.

    All else as in apply_rope_interleaved.
    """
    # solution
    cos, sin = _cos_sin(x, positions, frequencies)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    xp = _library(x)
    return xp.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1)


def interleaved_to_half(weight: Array, head_dim: int) -> Array:
    """Reorder the rows of a query or key projection, so that the half layout fits it.

    weight:   (n_heads * head_dim, ...) rows are output features, head by head;
              a bias (n_heads * head_dim,) as well. Each head's are interleaved pairs.
    returns:  the same shape and dtype, the pairs of each head in the half layout

    Queries and keys that are reordered alike keep their dot products, so a model whose
    weights are reordered once, as it is loaded, attends as before with apply_rope_half.
    """
    # solution
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _library(x: Array) -> ModuleType:
    return torch if isinstance(x, torch.Tensor) else np


def _cos_sin(x: Array, positions: Array, frequencies: Array) -> tuple[Array, Array]:
    xp = _library(x)
    angles = positions[..., None] * frequencies  # (..., seq_len, head_dim / 2)
    return xp.asarray(xp.cos(angles), dtype=x.dtype), xp.asarray(xp.sin(angles), dtype=x.dtype)
