"""Exercise 02: masking.

Not every position may look at every other: not at the future, not at padding, not at the
text that happens to stand in the same row. A mask says so, one truth value for each query
and key: True where the query may see the key. Masks are combined by `&`, and each call makes a new
one, which is the caller's to change.

A softmax under a mask shares one among the keys that are seen, and gives the others 0:

    masked_softmax(s, mask)ᵢⱼ = maskᵢⱼ exp(sᵢⱼ) / Σₖ maskᵢₖ exp(sᵢₖ)

Where fewer queries than keys are given, they are the last ones: with a cache of keys, the
newest token alone asks, and all tokens answer. So query i of n_queries stands at position
n_keys − n_queries + i.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3,
    https://arxiv.org/abs/1706.03762; for the window Beltagy et al. 2020, "Longformer",
    section 3.1, https://arxiv.org/abs/2004.05150
"""

import numpy as np


def causal_mask(n_queries: int, n_keys: int) -> np.ndarray:
    """Let each query see its own position and all before it.

    returns: (n_queries, n_keys) bool, True where the query may see the key

    >>> causal_mask(2, 3)
    array([[ True,  True, False],
           [ True,  True,  True]])

    The last query stands at the last key. With more queries than keys, the first ones
    stand before all keys and see nothing. Either number may be 0.
    """
    raise NotImplementedError("exercise 02 is not written yet")


def padding_mask(lengths: np.ndarray, n_keys: int) -> np.ndarray:
    """Hide the keys behind the end of each sequence.

    lengths: (batch,) int64, how many keys of each sequence are real, 0 to n_keys
    returns: (batch, 1, n_keys) bool, the 1 in place of the queries, who all see the same

    >>> padding_mask(np.array([2, 3]), 3)[:, 0]
    array([[ True,  True, False],
           [ True,  True,  True]])
    """
    raise NotImplementedError("exercise 02 is not written yet")


def sliding_window_mask(n_queries: int, n_keys: int, window: int) -> np.ndarray:
    """Let each query see the last `window` positions, of which its own is one.

    window:  1 or more; less raises ValueError, which says what it got
    returns: (n_queries, n_keys) bool

    >>> sliding_window_mask(2, 4, 2)
    array([[False,  True,  True, False],
           [False, False,  True,  True]])

    Queries stand where they do in causal_mask, and see no later position either.
    """
    raise NotImplementedError("exercise 02 is not written yet")


def document_mask(documents: np.ndarray) -> np.ndarray:
    """Let each position see the positions of its own document, earlier and later ones.

    documents: (..., seq_len) int64, which document each position belongs to, in any order
    returns:   (..., seq_len, seq_len) bool, queries first, then keys

    >>> document_mask(np.array([7, 7, 5]))
    array([[ True,  True, False],
           [ True,  True, False],
           [False, False,  True]])
    """
    raise NotImplementedError("exercise 02 is not written yet")


def masked_softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Turn the scores of the visible keys into weights that sum to one.

    scores:  (..., n_queries, n_keys) float16, float32 or float64, finite, of any size
    mask:    bool, True where a query may see a key; broadcasts to the shape of scores
    returns: same shape and dtype as scores; exactly 0 at hidden keys

    There is at least one key. A query that sees none of them has the weight 0 everywhere,
    not NaN. What a hidden score is has no effect. A mask that is not bool raises TypeError,
    which says what it got. scores and mask stay as they are.
    """
    raise NotImplementedError("exercise 02 is not written yet")
