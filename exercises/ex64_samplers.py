"""Exercise 64: samplers, DDPM and DDIM.

A model that tells the noise in x_t makes images: begin with noise, and step back. Each step guesses
x_0 and mixes it with what is there, so that the result is as noisy as it should be after an
earlier step, which need not be the one before:

    x̂_0    = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t
    x_prev = √ᾱ_prev x̂_0 + √(1 − ᾱ_prev − σ²) ε + σ · fresh noise
    σ      = η √((1 − ᾱ_prev) / (1 − ᾱ_t)) √(1 − ᾱ_t / ᾱ_prev)

With η = 0 nothing is drawn, and the same noise always becomes the same image (DDIM). With η = 1
it is a draw from the posterior of exercise 61 with x̂_0 for x_0, and β of all steps that are
skipped taken together, 1 − ᾱ_t / ᾱ_prev (DDPM).

Steps count from 0, ᾱ_t includes betas[t]. The data stand before step 0: prev = −1, where ᾱ = 1.

Sources: Song et al. 2021, "Denoising diffusion implicit models", eqs. 12 and 16,
    https://arxiv.org/abs/2010.02502; Ho et al. 2020, algorithm 2, https://arxiv.org/abs/2006.11239;
    Lin et al. 2023, table 2 (spacings), https://arxiv.org/abs/2305.08891
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def timesteps(n_steps: int, n: int, spacing: str = "trailing") -> list[int]:
    """Choose n of the steps 0 … n_steps − 1, from the latest to the earliest.

    n:       1 … n_steps
    spacing: "leading"   k · (n_steps // n) for k = 0 … n − 1, so the last step may never be met
             "trailing"  k · n_steps / n − 1 for k = 1 … n, rounded: n_steps − 1 is among them
             "linspace"  n even steps from 0 to n_steps − 1, both ends included, rounded; n ≥ 2
    returns: n different numbers, falling

    Halves are rounded to the even neighbour, in "trailing" before 1 is subtracted. Another n or
    spacing raises ValueError.
    """
    raise NotImplementedError("exercise 64 is not written yet")


def ddim_step(
    x: Tensor,
    eps: Tensor,
    t: int,
    prev: int,
    betas: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Step back from after step t to after step prev, with as much fresh noise as η says.

    x:       any shape, after step t
    eps:     like x, the noise that the model sees in it
    t:       0 … n_steps − 1, for the whole batch
    prev:    −1 … t − 1; −1 leads to the data. Another t or prev raises ValueError
    betas:   (n_steps,) float64, above 0 and below 1
    eta:     0 … 1, else ValueError
    noise:   like x, drawn from N(0, 1); may be missing where η = 0, else that raises ValueError
    returns: like x, and in its dtype. Factors are worked out in float64

    Into the data (prev = −1) no noise goes, whatever η is: the result is x̂_0.
    """
    raise NotImplementedError("exercise 64 is not written yet")


def ddpm_step(x: Tensor, eps: Tensor, t: int, prev: int, betas: Tensor, noise: Tensor) -> Tensor:
    """Draw from the posterior of x after step prev, with the guess of x_0 in the place of x_0.

    Arguments, result and errors are those of ddim_step. For prev = t − 1 the variance is β̃ of
    exercise 61, the smaller of the two in use.
    """
    raise NotImplementedError("exercise 64 is not written yet")


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[int],
    betas: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Make images from noise.

    model:   model(x, t) with t (batch,) int64 gives the noise in x, like x. It is called once for
             each step
    x:       (batch, ...) noise, drawn from N(0, 1); batch may be 0
    steps:   falling, as from `timesteps`; the last one leads to the data
    betas, eta: as in ddim_step
    noise:   (len(steps), batch, ...), noise[i] for the i-th step; may be missing where η = 0
    returns: like x. No graph is recorded, and x stays as it is
    """
    raise NotImplementedError("exercise 64 is not written yet")
