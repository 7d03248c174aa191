"""Exercise 61: the posterior and the ELBO.

Noise can't be taken back: many images lead to the same x_t. But whoever knows x_0 as well knows
where x_t came from, up to a Gaussian. It is the target of a model that doesn't know x_0:

    q(x_{t−1} | x_t, x_0) = N(μ̃_t, β̃_t)
    μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) · x_0 + √(1 − β_t) (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · x_t
    β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · β_t

How far the model's own p(x_{t−1} | x_t) is from it, summed over the steps, bounds how well the
model explains the data (the evidence lower bound, ELBO; here its negative, which is a loss):

    −log p(x_0) ≤ E[ −log p(x_0 | x_1) + Σ KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) ]
                  + KL(q(x_T | x_0) ‖ N(0, 1))

In the papers' count x_t has t steps of noise. Here, as in exercise 60, steps count from 0: step t
uses betas[t] and leads from the image before it to x_t, ᾱ_t includes it, and before step 0 there
is x_0, with ᾱ = 1.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models", eqs. 5 to 7,
    https://arxiv.org/abs/2006.11239; Sohl-Dickstein et al. 2015, https://arxiv.org/abs/1503.03585
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ex60_noise_schedule import q_sample


def posterior(x_0: Tensor, x_t: Tensor, t: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Say where x_t was before step t, for one who knows x_0.

    x_0:     (batch, ...) any number of further dimensions; batch may be 0
    x_t:     like x_0, after step t
    t:       (batch,) int64, 0 … n_steps − 1, a step for each sample; others raise IndexError
    betas:   (n_steps,) float64, above 0 and at most 1
    returns: the mean, like x_0 and in its dtype, and the variance, (batch, 1, …, 1) float64 with
             as many dimensions as x_0. For step 0 these are x_0 itself and 0

    Factors are worked out in float64 and rounded once, when they are finished, or not at all.
    Gradients reach x_0 and x_t.
    """
    raise NotImplementedError("exercise 61 is not written yet")


def kl_normal(mean: Tensor, variance: Tensor, mean_2: Tensor, variance_2: Tensor) -> Tensor:
    """Measure how far a Gaussian is from a second one, KL(N(mean, variance) ‖ N(mean_2, …)).

    mean, variance, mean_2, variance_2: shapes that broadcast; variances above 0
    returns: the shape that they broadcast to, nats, number by number: nothing is summed

    It is log(σ₂ / σ) + (σ² + (mean − mean_2)²) / (2 σ₂²) − 1/2: 0 for equal ones, and not
    symmetric. Gradients reach all four.
    """
    raise NotImplementedError("exercise 61 is not written yet")


def elbo_terms(
    x_0: Tensor,
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    betas: Tensor,
    noise: Tensor,
) -> Tensor:
    """Bound −log p(x_0), a term for each step and a last one for what the noise leaves.

    x_0:     (batch, ...) float64, at least one further dimension
    model:   model(x_t, t) with t (batch,) int64 gives the mean, like x_t, and the variance, of any
             shape that broadcasts with it, of the image before step t. It is called once for each
             step, with the whole batch
    betas:   (n_steps,) float64, above 0 and below 1
    noise:   (n_steps, batch, ...), noise[t] takes x_0 to x_t
    returns: (n_steps + 1, batch) nats, summed over a sample's numbers: first, for step 0, how
             unlikely x_0 is under the model, −log of the density; then the KL of each step
             1 … n_steps − 1; last the KL of the image after all steps, given x_0, to N(0, 1)

    Their sum over the first axis bounds −log p(x_0), on average over the noise. Gradients reach
    what the model computes with.
    """
    raise NotImplementedError("exercise 61 is not written yet")


def bits_per_dim(nats: Tensor, n_dims: int, width: float = 1.0) -> Tensor:
    """Turn a bound on −log p of a sample, a density, into bits for each of its numbers.

    nats:    any shape
    n_dims:  the numbers of a sample, 1 or more
    width:   of the bins into which the numbers were rounded, above 0: 2/255 for bytes scaled to
             −1 … 1. A bin's probability is the density times its width
    returns: like nats

    No numbers, or a width that is not above 0, raise ValueError.
    """
    raise NotImplementedError("exercise 61 is not written yet")
