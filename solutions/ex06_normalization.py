"""Exercise 06: normalization.

Layers feed layers, and what comes out of one may be a thousand times too large for the next.
So between them each vector of features is brought to one size, by numbers that it gives
itself. Other tokens and other sequences have no part in it:

    layer_norm(x) = (x − mean) / √(var + eps) · weight + bias
    rms_norm(x)   = x / √(mean of x² + eps) · weight

mean and var are those of the d_model features of one vector, and var is the mean of
(x − mean)². eps keeps a vector of equal features from being divided by 0.

Sources: Ba et al. 2016, "Layer Normalization", eqs. 3 and 4,
    https://arxiv.org/abs/1607.06450;
    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4,
    https://arxiv.org/abs/1910.07467
"""

import numpy as np


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5
) -> np.ndarray:
    """Give each vector mean 0 and variance 1, then scale and shift its features.

    x:       (..., d_model) float16, float32 or float64; d_model is 1 or more
    weight:  (d_model,) floating, one factor for each feature
    bias:    (d_model,) floating, added to each feature last
    eps:     added to the variance, under the root
    returns: same shape and dtype as x

    A float16 x is computed on in float32 and rounded once, at the end: the square of 300 is
    too large for float16. weight and bias may have another dtype than x. In float64, features
    may lie close together and far from 0, such as 10⁶ and 10⁶ + 1. A weight or bias of another
    shape raises ValueError, which gives that shape, even if it would broadcast.
    """
    # solution
    _check_shape(weight, x.shape[-1], "weight")
    _check_shape(bias, x.shape[-1], "bias")
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return (centred / np.sqrt(variance + eps) * weight + bias).astype(x.dtype)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Divide each vector by the root of the mean of its squares, then scale its features.

    x:       (..., d_model) float16, float32 or float64
    weight:  (d_model,) floating, one factor for each feature
    eps:     added to the mean of the squares, under the root
    returns: same shape and dtype as x

    Nothing is subtracted. float16 and wrong shapes are treated as in layer_norm.
    """
    # solution
    _check_shape(weight, x.shape[-1], "weight")
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    mean_square = (wide**2).mean(axis=-1, keepdims=True)
    return (wide / np.sqrt(mean_square + eps) * weight).astype(x.dtype)


def _check_shape(parameter: np.ndarray, d_model: int, name: str) -> None:
    if parameter.shape != (d_model,):
        raise ValueError(f"{name} must have the shape ({d_model},), got {parameter.shape}")
