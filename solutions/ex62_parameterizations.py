"""Exercise 62: what a model predicts, and what an error in it weighs.

From x_t, a mixture, the model has to tell the image and the noise apart. Whichever it predicts,
the rest follows, since x_t is known:

    x_t = √ᾱ x_0 + √(1 − ᾱ) ε
    v   = √ᾱ ε − √(1 − ᾱ) x_0            x_0 and ε turned by an angle, as x_t is
    μ̃   = the mean of the posterior of exercise 61

So a squared error in one is a squared error in any other, times a factor that depends on t alone.
In terms of the signal-to-noise ratio, SNR = ᾱ / (1 − ᾱ):

    |error in x_0|² · SNR = |error in ε|²         |error in x_0|² · (SNR + 1) = |error in v|²

Which is predicted decides how well the numbers are scaled; how much each t counts is a matter of
the weights. Min-SNR-γ gives an error in x_0 the weight min(SNR, γ).

From exercise 61 comes posterior(x_0, x_t, t, betas), the mean and the variance of the image before
step t. Steps count from 0, and ᾱ of t includes betas[t], as there.

Sources: Salimans & Ho 2022, "Progressive distillation", section 4 and appendix D,
    https://arxiv.org/abs/2202.00512; Hang et al. 2023, "Efficient diffusion training via Min-SNR
    weighting", section 3.4, https://arxiv.org/abs/2303.09556
"""

import torch
from torch import Tensor

from ex61_posterior_and_elbo import posterior


def velocity_target(x_0: Tensor, eps: Tensor, t: Tensor, betas: Tensor) -> Tensor:
    """Mix the image and the noise into the v that a model may predict, √ᾱ ε − √(1 − ᾱ) x_0.

    x_0:     (batch, ...) any number of further dimensions; batch may be 0
    eps:     like x_0, the noise
    t:       (batch,) int64, 0 … n_steps − 1, a step for each sample; others raise IndexError
    betas:   (n_steps,) float64, above 0 and at most 1
    returns: like x_0, and in its dtype: worked out in float64 and rounded once. Gradients reach x_0
             and eps
    """
    # solution
    signal, noise = _shares(x_0, t, betas)
    return (signal * eps.double() - noise * x_0.double()).to(x_0.dtype)


def to_x0(kind: str, prediction: Tensor, x_t: Tensor, t: Tensor, betas: Tensor) -> Tensor:
    """Work out the x_0 that a prediction comes to.

    kind:       what is predicted: "x_0", "eps", "v" or "mean", of the image before step t;
                another one raises ValueError, and the message names these four
    prediction: like x_t
    x_t:        (batch, ...) any number of further dimensions; batch may be 0
    t, betas:   as in velocity_target
    returns:    like x_t, and in its dtype: worked out in float64 and rounded once. Gradients reach
                what it is worked out from

    Where no signal is left in x_t (ᾱ = 0), its noise tells nothing of x_0: with "eps" a single such
    t raises ValueError. So it does with "mean" where no signal was left before step t.
    """
    # solution
    signal, noise = _shares(x_t, t, betas)
    out, x = prediction.double(), x_t.double()
    if kind == "x_0":
        found = out
    elif kind == "eps":
        found = (x - noise * out) / _not_zero(signal, kind)
    elif kind == "v":
        found = signal * x - noise * out
    elif kind == "mean":
        # The mean is linear in x_0: its value at 0, and its slope.
        at_0, _ = posterior(torch.zeros_like(x), x, t, betas)
        slope, _ = posterior(torch.ones_like(x), torch.zeros_like(x), t, betas)
        found = (out - at_0) / _not_zero(slope, kind)
    else:
        raise ValueError(f'kind must be "x_0", "eps", "v" or "mean", got {kind!r}')
    return found.to(x_t.dtype)


def to_eps(kind: str, prediction: Tensor, x_t: Tensor, t: Tensor, betas: Tensor) -> Tensor:
    """Work out the noise that a prediction comes to.

    Arguments, result and errors are those of to_x0, but a prediction of "eps" is the result, for
    any t.
    """
    # solution
    signal, noise = _shares(x_t, t, betas)
    if kind == "eps":
        return prediction.to(x_t.dtype)
    x_0 = to_x0(kind, prediction.double(), x_t.double(), t, betas)
    return ((x_t.double() - signal * x_0) / noise).to(x_t.dtype)


def loss_weight(kind: str, snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Weigh the squared error in a prediction so that it is min(SNR, γ) times the one in x_0.

    kind:    "x_0", "eps" or "v"; another one raises ValueError, and the message names these three
    snr:     any shape, 0 or more. With no signal left, at 0, "eps" gets the limit, 1
    gamma:   above 0; infinite: weights as if ε were predicted and all errors weighed alike
    returns: like snr
    """
    # solution
    if kind == "x_0":
        return snr.clamp(max=gamma)
    if kind == "eps":
        return (gamma / snr).clamp(max=1)
    if kind == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    raise ValueError(f'kind must be "x_0", "eps" or "v", got {kind!r}')


def _shares(x: Tensor, t: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 − ᾱ) of each sample, (batch, 1, …, 1)."""
    if ((t < 0) | (t >= len(betas))).any():
        raise IndexError(f"t must lie in 0 … {len(betas) - 1}, got {t.tolist()}")
    left = (1 - betas).cumprod(0)[t].view(-1, *[1] * (x.dim() - 1))
    return left.sqrt(), (1 - left).sqrt()


def _not_zero(factor: Tensor, kind: str) -> Tensor:
    if (factor == 0).any():
        raise ValueError(f'"{kind}" tells nothing of x_0 at a t without signal; predict v or x_0')
    return factor
