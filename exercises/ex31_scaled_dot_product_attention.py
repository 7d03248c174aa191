"""Exercise 31: scaled dot-product attention.

A query asks every key how well they match. The answers become weights that sum
to one, and the result is the average of the values under those weights:

    attention(q, k, v) = softmax(q kᵀ / √head_dim) v

Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1,
    https://arxiv.org/abs/1706.03762
"""

import math

import torch
from torch import Tensor


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Average the values, weighted by how well each key matches each query.

    q:       (..., n_queries, head_dim) floating point of any precision
    k:       (..., n_keys, head_dim), dtype of q
    v:       (..., n_keys, value_dim), dtype of q
    mask:    (..., n_queries, n_keys) bool, True where a query may see a key
    returns: (..., n_queries, value_dim), dtype of q

    Leading dimensions broadcast, and a mask may have 1 in the place of n_queries. Scores and
    softmax are computed in float32, or in float64 where q is, so that scores of any size give
    finite results: in float16 the product of 300 and 300 is infinite already. The weights may
    be rounded to the dtype of q before they meet the values. What comes in is finite, and every
    query may see at least one key. A mask that is not bool raises TypeError, which says that
    it must be: float masks follow another convention, and confusing the two fails silently.
    """
    raise NotImplementedError("exercise 31 is not written yet")
