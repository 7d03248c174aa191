"""Exercise 03: einsum.

Most of a model is sums of products along one axis, and moving axes about. Einstein's
notation gives every axis a letter and so says both at once: an index that the result does
not have is summed away, and the letters of the result stand in the order of its axes:

    cᵢₖ = Σⱼ aᵢⱼ bⱼₖ          np.einsum("ij,jk->ik", a, b)

Moving alone is written the same way by einops, where brackets hold axes that lie in one:

    rearrange(x, "(block row) column -> block column row", block=2)

Three dots stand for all further axes, whatever their number.

Here every axis has at least one element. What a function moves may stay in the memory of its
argument, but two calls never give the same memory, and arguments stay as they are.

Source: NumPy's manual of einsum, https://numpy.org/doc/stable/reference/generated/numpy.einsum.html;
    Rogozhnikov 2022, "Einops", https://openreview.net/forum?id=oapKSVM2bcj
"""

import numpy as np
from einops import rearrange


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply matrices: each row of a with each column of b.

    a:       (..., n_rows, n_inner) float or integer
    b:       (..., n_inner, n_columns) of the same dtype
    returns: (..., n_rows, n_columns), dtype of both

    Leading dimensions broadcast. If a has not as many columns as b has rows, ValueError
    gives both numbers, even where one of them is 1: einsum itself would repeat that one.
    """
    # solution
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a must have as many columns as b has rows, got {a.shape}, {b.shape}")
    return np.einsum("...ij,...jk->...ik", a, b)


def attention_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Take the dot product of every query with every key, not scaled by anything.

    q:       (..., n_queries, head_dim) float or integer
    k:       (..., n_keys, head_dim) of the same dtype
    returns: (..., n_queries, n_keys), dtype of both

    Leading dimensions broadcast. Queries and keys of different head_dim raise ValueError,
    as in matmul.
    """
    # solution
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head_dim, got {q.shape[-1]}, {k.shape[-1]}")
    return np.einsum("...qd,...kd->...qk", q, k)


def split_heads(x: np.ndarray, n_heads: int) -> np.ndarray:
    """Part the features of each position among the heads, and put the heads in front.

    x:       (..., seq_len, d_model)
    n_heads: 1 or more
    returns: (..., n_heads, seq_len, head_dim), head_dim being d_model / n_heads

    Head 0 gets the first head_dim features of every position, head 1 the next, and so on. A
    d_model that n_heads does not divide raises ValueError, which gives both numbers.

    >>> split_heads(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), n_heads=2).tolist()
    [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    """
    # solution
    if x.shape[-1] % n_heads:
        raise ValueError(f"d_model must be a multiple of n_heads, got {x.shape[-1]} and {n_heads}")
    return rearrange(x, "... seq (head dim) -> ... head seq dim", head=n_heads)


def merge_heads(x: np.ndarray) -> np.ndarray:
    """Put the features of all heads side by side again: the inverse of split_heads.

    x:       (..., n_heads, seq_len, head_dim)
    returns: (..., seq_len, n_heads * head_dim)
    """
    # solution
    return rearrange(x, "... head seq dim -> ... seq (head dim)")


def interleave(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Take elements of a and b in turn, along the last axis.

    a, b:    (..., n) of the same shape and dtype
    returns: (..., 2 * n)

    >>> interleave(np.array([1, 2, 3]), np.array([10, 20, 30]))
    array([ 1, 10,  2, 20,  3, 30])
    """
    # solution
    return rearrange([a, b], "which ... n -> ... (n which)")
