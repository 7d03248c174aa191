"""Exercise 29: sampling.

A language model gives a score to each token that might come next. Taking the best one every
time makes dull, repetitive text; drawing from all of them lets nonsense in, for a long tail of
unlikely tokens is likely as a whole. So the scores are changed first, and then one token is
drawn from p = softmax(logits):

    temperature          logits / T
    top_k                only the k most likely tokens stay
    top_p                only the most likely tokens stay that together reach p
    min_p                only tokens stay with pᵢ ≥ min_p · max p
    repetition_penalty   tokens that were used lose some of their score

A token that does not stay gets the score −∞, and the softmax shares its part out. Scores keep
their dtype; the probabilities that top_p and sample add up are float64, whatever it is.

Sources: top_p: Holtzman et al. 2019, eq. 2 and 3, https://arxiv.org/abs/1904.09751.
    min_p: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    repetition penalty: Keskar et al. 2019, section 4.1, https://arxiv.org/abs/1909.05858.
"""

import math

import torch
from torch import Tensor


def temperature(logits: Tensor, t: float) -> Tensor:
    """Make the likely tokens likelier (t < 1) or all tokens more alike (t > 1).

    logits:  (..., vocab_size) floating point; −inf is allowed, here and below
    t:       0 or more
    returns: (..., vocab_size) dtype of logits, here and below

    At t = 0 the largest logit stays as it is, the first of several, and all others become −inf.
    """
    raise NotImplementedError("exercise 29 is not written yet")


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row and all that equal the smallest of them.

    logits:  (..., vocab_size)
    k:       1 or more; above vocab_size everything stays
    returns: (..., vocab_size), −inf for all others
    """
    raise NotImplementedError("exercise 29 is not written yet")


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens of each row, as few as have together the probability p.

    logits:  (..., vocab_size)
    p:       0 < p ≤ 1, or ValueError, which gives it; 1 keeps everything, however unlikely
    returns: (..., vocab_size), −inf for all others

    The token that crosses p stays. So a token stays if the tokens that are likelier
    have together less than p; tokens of equal probability stay or go together. The sums are
    float64.
    """
    raise NotImplementedError("exercise 29 is not written yet")


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens that are at least p times as likely as the likeliest of their row.

    logits:  (..., vocab_size)
    p:       0 ≤ p ≤ 1
    returns: (..., vocab_size), −inf for all others

    Tokens as likely as the likeliest stay for every p; what lies at p times its probability but
    for the rounding of the logits' dtype may stay or go.
    """
    raise NotImplementedError("exercise 29 is not written yet")


def repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Lower the logits of the tokens that were used: divide positive ones, multiply negative ones.

    logits:  (..., vocab_size)
    tokens:  (..., seq_len) int64, the tokens so far of each row; seq_len may be 0
    penalty: above 0; more than 1 discourages repetition
    returns: (..., vocab_size)

    A token that was used several times is penalised once.
    """
    raise NotImplementedError("exercise 29 is not written yet")


def sample(logits: Tensor, u: Tensor) -> Tensor:
    """Draw one token of each row from softmax(logits), by a number from 0 up to 1.

    logits:  (..., vocab_size)
    u:       (...) float64, 0 ≤ u < 1; torch.rand draws it, and here it is given
    returns: (...) int64, the smallest id i with  p₀ + … + pᵢ > u

    The probabilities and their sums are float64. A sum of all of them may round to a little less
    than 1, and u may lie above that; a token of probability 0 is never drawn, whatever u is.
    """
    raise NotImplementedError("exercise 29 is not written yet")
