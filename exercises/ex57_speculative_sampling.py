"""Exercise 57: speculative sampling.

A large model reads eight tokens in nearly the time of one: what it waits for is its weights. So a
small model drafts gamma tokens, the large one scores all of them in one call, and a rule decides
how many may stay. The text has exactly the law that the large model alone would give it:

    token x ~ q stays with probability min(1, p(x) / q(x)), else one is drawn from
    residual(x) = max(p(x) − q(x), 0) / Σ max(p − q, 0)

    P(x comes out) = min(p(x), q(x)) + P(rejected) · residual(x) = p(x)
    E[tokens of a step] = 1 + α + … + α^gamma = (1 − α^(gamma + 1)) / (1 − α)

Source: Leviathan, Kalman & Matias 2023, "Fast Inference from Transformers via Speculative
    Decoding", algorithm 1 and eq. 1, https://arxiv.org/abs/2211.17192; Chen et al. 2023,
    "Accelerating Large Language Model Decoding with Speculative Sampling",
    https://arxiv.org/abs/2302.01318
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Gives the probabilities of the token after each of some ids: (n,) int64 to (n, vocab_size).
Model = Callable[[Tensor], Tensor]


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Draw one token with a given uniform number. (This one is written for you.)

    p: (vocab_size,) probabilities; u: () uniform in [0, 1); returns: () int64

    The first token up to which the probabilities add up to more than u: of probability 0, none.
    """
    cdf = p.double().cumsum(dim=0)
    return torch.searchsorted(cdf, u.double() * cdf[-1], right=True).clamp(max=len(p) - 1)


def accept(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> int:
    """Tell how many of the drafted tokens stay: all before the first that is rejected.

    p:       (gamma, vocab_size), the target's probabilities at the place of each
    q:       (gamma, vocab_size), the probabilities that each was drawn from, above 0 for it
    drafted: (gamma,) int64
    u:       (gamma,) uniform in [0, 1): token i is rejected where uᵢ ≥ pᵢ(x) / qᵢ(x)
    returns: from 0 to gamma
    """
    raise NotImplementedError("exercise 57 is not written yet")


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Give the law of the token that comes in place of a rejected one.

    p, q:    (..., vocab_size) probabilities
    returns: (..., vocab_size), max(p − q, 0), made to sum to 1; p itself where p = q, for then
             nothing is ever rejected
    """
    raise NotImplementedError("exercise 57 is not written yet")


def speculative_step(target: Model, draft: Model, ids: Tensor, gamma: int, u: Tensor) -> Tensor:
    """Continue a text by 1 to gamma + 1 tokens, with one call of the target.

    target, draft: models with the same vocabulary; what they return is what is drawn from
    ids:     (n,) int64, n at least 1, left as it is
    gamma:   how many tokens are drafted, at least 1, else ValueError
    u:       (2·gamma + 1,) uniform in [0, 1): the first gamma draw the drafted tokens, in order, by
             `draw`; the next gamma accept or reject them; the last draws the token at the end
    returns: (n_new,) int64: the drafted tokens that stay, and one more: where one was rejected a
             token in its place, from the residual there; where all stay a token after them, from
             the target

    The draft is called gamma times, the target once, each time with ids and all tokens drafted so
    far.
    """
    raise NotImplementedError("exercise 57 is not written yet")


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tell how many tokens a step gives on average.

    alpha: from 0 to 1, the chance that a drafted token stays, the same at each place and
           independent of the others
    gamma: how many are drafted, 0 or more
    """
    raise NotImplementedError("exercise 57 is not written yet")
