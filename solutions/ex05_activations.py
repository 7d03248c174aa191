"""Exercise 05: activations.

Between two linear layers stands a function that bends: without it, they would be one
linear layer. Each of these lets large numbers pass and holds small ones back. They differ
in how softly they do it:

    relu(x)       = max(x, 0)
    gelu(x)       = x Φ(x)      Φ: how much of the normal distribution lies below x
    gelu_tanh(x)  = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))      close to gelu, and cheaper
    silu(x)       = x σ(x)      σ(x) = 1 / (1 + exp(−x)), the sigmoid
    swiglu(x)     = silu(gate) · value      gate and value are the two halves of x

For all of them: any shape of one axis or more, also empty; float32 or float64, and the result
is a new array of the same dtype. NaN gives NaN, so that a fault shows. For numbers as large as
±10⁶ the results are right, and nothing overflows on the way (NumPy would warn of that). Right
means to nearly all digits beside 1: a share that is smaller than the dtype's eps may be 0.

Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2,
    https://arxiv.org/abs/1606.08415; Shazeer 2020, "GLU Variants Improve Transformer",
    eq. 5, https://arxiv.org/abs/2002.05202
"""

import math

import numpy as np


def erf(x: np.ndarray) -> np.ndarray:
    """Given, as NumPy has none: the error function of each element. Φ(x) = ½ (1 + erf(x/√2))."""
    return np.vectorize(math.erf, otypes=[x.dtype])(x)


def relu(x: np.ndarray) -> np.ndarray:
    """Keep what is positive and put 0 for the rest.

    x:       (...) float32 or float64
    returns: same shape and dtype, here and below
    """
    # solution
    return np.maximum(x, 0)


def gelu(x: np.ndarray) -> np.ndarray:
    """Multiply each number by the share of the normal distribution that lies below it."""
    # solution
    return x * _normal_below(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Approximate gelu by a tanh, as GPT-2 does."""
    # solution
    # math.sqrt, not np.sqrt: that gives a float64 of NumPy's, which would widen a float32.
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    """Multiply each number by its sigmoid."""
    # solution
    return x * _sigmoid(x)


def swiglu(x: np.ndarray) -> np.ndarray:
    """Multiply the second half of the features by the silu of the first.

    x:       (..., 2 · d_ff), the gate in the first half of the last axis, the value in the second
    returns: (..., d_ff)

    An odd length of the last axis raises ValueError, and the message holds that length.
    """
    # solution
    if x.shape[-1] % 2:
        raise ValueError(f"the last axis must have two equal halves, got length {x.shape[-1]}")
    gate, value = np.split(x, 2, axis=-1)
    return silu(gate) * value


def gelu_grad(x: np.ndarray) -> np.ndarray:
    """Give the slope of gelu at each number: d gelu(x) / dx.

    The slope of Φ is the density of the normal distribution, exp(−x²/2) / √(2π).
    """
    # solution
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return _normal_below(x) + x * density


def silu_grad(x: np.ndarray) -> np.ndarray:
    """Give the slope of silu at each number: d silu(x) / dx."""
    # solution
    s = _sigmoid(x)
    return s + x * s * (1 - s)  # the sigmoid's own slope is σ (1 − σ)


def _normal_below(x: np.ndarray) -> np.ndarray:
    return (1 + erf(x / math.sqrt(2))) / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # 1 / (1 + exp(−x)) for x ≥ 0, and the same times exp(x) / exp(x) for x < 0. Either way
    # exp sees nothing positive.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)
