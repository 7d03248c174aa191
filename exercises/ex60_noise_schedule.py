"""Exercise 60: noise schedule.

Diffusion wears data away in many small steps. Each step shrinks what is there a little
and adds a little noise, so that the variance stays one. Many small steps of Gaussian
noise are one large step of Gaussian noise, so any x_t comes from x_0 at once:

    q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t)
    q(x_t | x_0)     = N(√ᾱ_t x_0, 1 − ᾱ_t),         ᾱ_t = (1 − β_0)(1 − β_1) … (1 − β_t)

Steps are counted from 0, as the entries of a tensor are: step t uses β_t = betas[t],
step 0 takes x_0 to the first noisy image, and step n_steps − 1 is the last.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models", eqs. 2 and 4,
    https://arxiv.org/abs/2006.11239;
    Nichol & Dhariwal 2021, "Improved denoising diffusion probabilistic models", eq. 17,
    https://arxiv.org/abs/2102.09672
"""

import math

import torch
from torch import Tensor


def linear_betas(n_steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Space the variances of the noise evenly, both ends included.

    returns: (n_steps,) float64, β of each step, from first to last, which may be the smaller one

    One step alone has β = first. Every call makes a tensor of its own.
    """
    raise NotImplementedError("exercise 60 is not written yet")


def cosine_betas(n_steps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """Choose the variances so that the signal left, ᾱ, falls like a squared cosine.

    offset:  keeps the first β from being too small to matter
    largest: no β exceeds it
    returns: (n_steps,) float64, β of each step; every call makes a tensor of its own

    With f(u) = cos²((u + offset) / (1 + offset) · π/2), the share of the signal's variance
    that is left after k of n_steps steps is f(k / n_steps) / f(0), as long as no β is cut:
    the last one always is, since f(1) = 0.
    """
    raise NotImplementedError("exercise 60 is not written yet")


def q_step(x: Tensor, t: Tensor, betas: Tensor, noise: Tensor) -> Tensor:
    """Add the noise of one step: from the image before step t to the one after it.

    x:       (batch, ...) any number of further dimensions, before step t; batch may be 0
    t:       (batch,) int64, 0 … n_steps − 1, a step for each sample
    betas:   (n_steps,) float64, each from 0 to 1
    noise:   like x, drawn from N(0, 1)
    returns: like x, and in its dtype. Each factor is worked out in float64 and rounded once, when
             it is finished, or not at all. Gradients reach x and noise

    A t outside 0 … n_steps − 1 raises IndexError. (A tensor takes −1 for its last entry: a
    mistake that would not show.)
    """
    raise NotImplementedError("exercise 60 is not written yet")


def q_sample(x_0: Tensor, t: Tensor, betas: Tensor, noise: Tensor) -> Tensor:
    """Add the noise of all steps from 0 to t, step t included, at once.

    x_0:     (batch, ...) any number of further dimensions, data without noise
    t:       (batch,) int64, 0 … n_steps − 1, a last step for each sample
    betas:   (n_steps,) float64, each from 0 to 1
    noise:   like x_0, drawn from N(0, 1)
    returns: like x_0; dtype, factors, gradients and errors as in q_step
    """
    raise NotImplementedError("exercise 60 is not written yet")
