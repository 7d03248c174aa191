"""Exercise 09: online softmax.

A softmax needs the largest score before it can begin, and all scores before it can divide.
Yet the average of values under softmax weights can be had in one pass, from blocks that
come one after the other and are then forgotten. Three things are kept of what was seen:

    largest  = max sⱼ       total = Σⱼ exp(sⱼ − largest)       weighted = Σⱼ exp(sⱼ − largest) vⱼ

When a larger score comes, everything so far is relative to the wrong number, and one factor
puts it right: exp(old largest − new largest). At the end,

    Σⱼ softmax(s)ⱼ vⱼ = weighted / total          logsumexp(s) = largest + log total

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3
    and eq. 4, https://arxiv.org/abs/1805.02867
"""

from typing import NamedTuple

import numpy as np


class State(NamedTuple):
    """What is kept of the keys that each query has met so far. All three are float64.

    largest:  (..., n_queries) the largest score, −inf before there is one
    total:    (..., n_queries) the sum of exp(score − largest)
    weighted: (..., n_queries, value_dim) the sum of exp(score − largest) · value
    """

    largest: np.ndarray
    total: np.ndarray
    weighted: np.ndarray


def start(shape: tuple[int, ...], value_dim: int) -> State:
    """Make the state of queries that have met no key.

    shape:     (..., n_queries) as a tuple of numbers
    value_dim: how many features a value has
    """
    raise NotImplementedError("exercise 09 is not written yet")


def update(state: State, scores: np.ndarray, values: np.ndarray) -> State:
    """Take in one more block of keys.

    scores:  (..., n_queries, n_keys) floating of any precision and size
    values:  (..., n_keys, value_dim) floating
    returns: a new state, float64 whatever the block is; the old one stays as it was

    Of the block nothing is kept: its memory may hold the next one when update is called again.
    A score may be −inf: that key is hidden from the query and counts for nothing. All scores
    of a block, or all that a query has met so far, may be so, and a block may have no keys at
    all. A key that is hidden from every query may have any value, NaN and ±inf too, since
    padding does; the values of all others are finite. Unequal numbers of scores and values
    raise ValueError with both numbers.
    """
    raise NotImplementedError("exercise 09 is not written yet")


def merge(a: State, b: State) -> State:
    """Join two states of the same queries, that have met different keys.

    returns: the state that has met the keys of both; a and b stay as they were

    Either state, or both, may have met no key or hidden ones alone.
    """
    raise NotImplementedError("exercise 09 is not written yet")


def finish(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Give the average of the values under the softmax weights, and the scores' logsumexp.

    returns: (..., n_queries, value_dim) and (..., n_queries), both float64

    A query that has met no key, or only hidden ones, gets zeros and −inf. The state stays as it
    was, so that more keys may follow.
    """
    raise NotImplementedError("exercise 09 is not written yet")
