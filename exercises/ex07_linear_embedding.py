"""Exercise 07: linear layers, embeddings and dropout.

What goes into a transformer, but for attention and norms, is little more than this:

    linear(x)     = x Wᵀ + b       every output feature is a weighted sum of the inputs
    embedding(t)  = W[t]           token t stands for row t of a table
    tied_logits   = x Wᵀ           the same table again, to score every token at the end
    dropout(x)    = x · mask / (1 − p)       each number is dropped with probability p

A sum of n products of numbers around 1 is around √n. So that a fresh layer neither blows
up nor shrinks what it gets, its weights start at random with a spread of 1 / √n, where n
is how many products are summed.

Source: LeCun et al. 1998, "Efficient BackProp", section 4.6 (spread),
    http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf; Srivastava et al. 2014, "Dropout",
    https://jmlr.org/papers/v15/srivastava14a.html; Press & Wolf 2017, "Using the Output
    Embedding to Improve Language Models" (tying), https://arxiv.org/abs/1608.05859
"""

import math

import numpy as np


def init_linear(
    in_features: int, out_features: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the weight of a linear layer, and make its bias.

    rng:     the only source of chance, here and below: who seeds it gets the same again
    returns: weight (out_features, in_features) float32, from a normal distribution with
             mean 0 and standard deviation 1 / √in_features;
             bias (out_features,) float32, zeros
    """
    raise NotImplementedError("exercise 07 is not written yet")


def init_embedding(vocab_size: int, d_model: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the table of an embedding.

    returns: weight (vocab_size, d_model) float32, from a normal distribution with mean 0 and
             standard deviation 1 / √d_model, which suits the sums of tied_logits
    """
    raise NotImplementedError("exercise 07 is not written yet")


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Make every output feature a weighted sum of the input features.

    x:       (..., in_features) float32 or float64
    weight:  (out_features, in_features) same dtype: row i has the weights of output i
    bias:    (out_features,) same dtype, added at the end, or None
    returns: (..., out_features) same dtype
    """
    raise NotImplementedError("exercise 07 is not written yet")


def embedding(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Look up the row of each token.

    tokens:  (...) int64, in 0 … vocab_size − 1
    weight:  (vocab_size, d_model)
    returns: (..., d_model) dtype of weight

    Any other token, a negative one too, raises IndexError, and the message holds that token.
    """
    raise NotImplementedError("exercise 07 is not written yet")


def tied_logits(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Score every token by how well its row of the embedding fits x.

    x:       (..., d_model) float32 or float64
    weight:  (vocab_size, d_model) same dtype, the very table of `embedding`
    returns: (..., vocab_size) same dtype, logits
    """
    raise NotImplementedError("exercise 07 is not written yet")


def dropout(x: np.ndarray, p: float, rng: np.random.Generator, training: bool = True) -> np.ndarray:
    """Replace each number by 0 with probability p, and scale up the others.

    x:       (...) float32 or float64
    p:       float from 0 up to, but not including, 1
    returns: same shape and dtype as x. In training each element is 0 or x / (1 − p), so that
             its mean over many draws is x. Every element at every call has its own draw.

    A dropped element is 0 whatever it was, inf and NaN too. Without training, x comes out as
    it is, and nothing is drawn from rng. A p below 0, or of 1 or more, raises ValueError, in
    training and without, and the message holds p.
    """
    raise NotImplementedError("exercise 07 is not written yet")
