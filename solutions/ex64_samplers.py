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
    # solution
    if not (1 + (spacing == "linspace")) <= n <= n_steps:
        raise ValueError(f"can't take n = {n} of {n_steps} steps by {spacing}")
    if spacing == "leading":
        chosen = [k * (n_steps // n) for k in range(n)]
    elif spacing == "trailing":
        chosen = [round(k * n_steps / n) - 1 for k in range(1, n + 1)]
    elif spacing == "linspace":
        chosen = [round(k * (n_steps - 1) / (n - 1)) for k in range(n)]
    else:
        raise ValueError(f'spacing must be "leading", "trailing" or "linspace", got {spacing!r}')
    return chosen[::-1]


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
    # solution
    if not 0 <= eta <= 1 or (eta and noise is None):
        raise ValueError(f"eta must be 0 … 1, above 0 with noise, got {eta}")
    after, before = _left(t, prev, betas)
    sigma = eta * ((1 - before) / (1 - after) * (1 - after / before)).sqrt()
    x_0 = (x - (1 - after).sqrt() * eps) / after.sqrt()
    # Rounding may take the root of −10⁻¹⁷.
    x_prev = before.sqrt() * x_0 + (1 - before - sigma**2).clamp(min=0).sqrt() * eps
    if noise is not None:
        x_prev = x_prev + sigma * noise
    return x_prev.to(x.dtype)


def ddpm_step(x: Tensor, eps: Tensor, t: int, prev: int, betas: Tensor, noise: Tensor) -> Tensor:
    """Draw from the posterior of x after step prev, with the guess of x_0 in the place of x_0.

    Arguments, result and errors are those of ddim_step. For prev = t − 1 the variance is β̃ of
    exercise 61, the smaller of the two in use.
    """
    # solution
    after, before = _left(t, prev, betas)
    beta = 1 - after / before  # of all steps from prev + 1 to t
    x_0 = (x - (1 - after).sqrt() * eps) / after.sqrt()
    mean = before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x
    variance = (1 - before) / (1 - after) * beta
    return (mean / (1 - after) + variance.sqrt() * noise).to(x.dtype)


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
    # solution
    with torch.no_grad():
        for i, (t, prev) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
            eps = model(x, torch.full((len(x),), t))
            x = ddim_step(x, eps, t, prev, betas, eta, None if noise is None else noise[i])
    return x


def _left(t: int, prev: int, betas: Tensor) -> tuple[Tensor, Tensor]:
    """ᾱ after step t and after step prev."""
    if not -1 <= prev < t < len(betas):
        raise ValueError(f"−1 ≤ prev < t < {len(betas)} must hold, got t = {t} and prev = {prev}")
    left = torch.cat(((1 - betas).cumprod(0), torch.ones(1, dtype=torch.float64)))
    return left[t], left[prev]  # −1 is the last one: 1
