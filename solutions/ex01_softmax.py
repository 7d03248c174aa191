"""Exercise 01: softmax.

A model answers with scores: one number for each choice, of any size and sign. Softmax
turns them into weights that are positive and sum to one. The choice with the highest
score gets the largest weight. The logarithms of the weights are often wanted as well:

    softmax(x)ᵢ     = exp(xᵢ) / Σⱼ exp(xⱼ)
    logsumexp(x)    = log Σⱼ exp(xⱼ)
    log_softmax(x)ᵢ = log softmax(x)ᵢ = xᵢ − logsumexp(x)

Written down just like that, they break: exp(1000) is too large for any float. The three
functions have to give right answers for such scores too.

Source: Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp and
    softmax functions", eqs. 1.1 and 1.2, https://arxiv.org/abs/1909.03469
"""

import numpy as np


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Turn scores into weights that sum to one along an axis.

    x:       (...) float16, float32, float64 or int64, scores
    axis:    which axis sums to one, counted from the end if negative
    returns: same shape and dtype as x (float64 for int64)

    >>> softmax(np.array([0.0, 0.0, 1000.0, 1000.0]))
    array([0. , 0. , 0.5, 0.5])

    A score may be −inf, which gets the weight 0, but not all of them along the axis.
    Any number of scores, of any size, gives right weights: in float16 the sum of 70,000 ones
    would be inf, and a difference of whole numbers may wrap around in int64, so work in
    float64 and round at the end. An axis of length 0 raises ValueError: there is nothing to
    share the one among. (NumPy's `max` raises it for you.) x itself stays as it is.
    """
    # solution
    # Subtracting one number from all scores changes no weight, since exp(x − c) is
    # exp(x) / exp(c). With the largest one at 0, exp cannot overflow.
    wide = x.astype(np.float64)
    shares = np.exp(wide - wide.max(axis=axis, keepdims=True))
    return (shares / shares.sum(axis=axis, keepdims=True)).astype(_result(x))


def logsumexp(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Sum the exponentials along an axis, and take the logarithm of that.

    x:       (...) as in softmax
    axis:    which axis is summed
    returns: the shape of x without that axis, dtype of x (float64 for int64)

    >>> logsumexp(np.array([[0.0, 0.0], [1000.0, 1000.0]]), axis=0)
    array([1000., 1000.])

    Scores may be −inf, and as many and as large, as in softmax.
    """
    # solution
    wide = x.astype(np.float64)
    largest = wide.max(axis=axis, keepdims=True)
    total = np.exp(wide - largest).sum(axis=axis, keepdims=True)  # 1 or more: log is safe
    return (largest + np.log(total)).squeeze(axis).astype(_result(x))


def log_softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Take the logarithm of the softmax, exact even where the softmax itself rounds to 0.

    x:       (...) as in softmax
    axis:    which axis of the softmax sums to one
    returns: same shape and dtype as x (float64 for int64)

    >>> log_softmax(np.array([0.0, 1000.0]))
    array([-1000.,     0.])

    A score of −inf stays −inf.
    """
    # solution
    wide = x.astype(np.float64)
    shifted = wide - wide.max(axis=axis, keepdims=True)
    total = np.exp(shifted).sum(axis=axis, keepdims=True)
    return (shifted - np.log(total)).astype(_result(x))


def _result(x: np.ndarray) -> np.dtype:
    return x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)
