"""Where noisy digits came from, and what each step of two models costs, by your own code."""

import math

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

BETAS = torch.linspace(1e-3, 0.1, 100, dtype=torch.float64)
SHOWN = (0, 4, 14, 29, 49, 99)
RED, BLUE, GREY = "#b5452c", "#3b6ea5", "#777777"


def draw(ex) -> Figure:
    """Left: x_t, the mean of where it came from, and its factors. Right: what each step costs."""
    digits = torch.tensor(load_digits().images, dtype=torch.float64) / 8 - 1
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2)
    pictures, plot = left.subfigures(2, 1, height_ratios=(5, 4))
    _draw_posterior(ex, digits[[3]], pictures, plot)
    _draw_terms(ex, digits, right)
    figure.suptitle("Whoever knows x_0 can say where x_t came from; a model pays for its guess")
    return figure


def _draw_posterior(ex, x_0, pictures, plot):
    left = (1 - BETAS).cumprod(0)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).double()
    axes = pictures.subplots(2, len(SHOWN), gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for column, step in enumerate(SHOWN):
        x_t = left[step].sqrt() * x_0 + (1 - left[step]).sqrt() * noise
        mean, _ = ex.posterior(x_0, x_t, torch.tensor([step]), BETAS)
        for ax, image in zip(axes[:, column], (x_t, mean), strict=True):
            ax.imshow(image[0], cmap="gray_r", vmin=-2.5, vmax=2.5)
            ax.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"t = {step}", fontsize=9)
    axes[0, 0].set_ylabel("x_t")
    axes[1, 0].set_ylabel("mean\nbefore t")

    # An image of one, beside one of zero, shows a factor as it is.
    every = torch.arange(len(BETAS))
    ones, zeros = torch.ones(len(BETAS)).double(), torch.zeros(len(BETAS)).double()
    of_x_0, variance = ex.posterior(ones, zeros, every, BETAS)
    of_x_t, _ = ex.posterior(zeros, ones, every, BETAS)
    ax = plot.subplots()
    ax.plot(every, of_x_0, color=RED, label="factor of x_0")
    ax.plot(every, of_x_t, color=BLUE, label="factor of x_t")
    ax.plot(every, variance.sqrt(), color=GREY, label="σ of the posterior")
    ax.plot(every, BETAS.sqrt(), color=GREY, linestyle=":", label="√β, of the step forth")
    ax.set(xlabel="step t", ylim=(0, 1.03))
    ax.legend(frameon=False, fontsize=8)


def _draw_terms(ex, digits, right):
    left = (1 - BETAS).cumprod(0)
    known, new = digits[:1500].flatten(1), digits[1500:1564].flatten(1)
    mean, covariance = known.mean(0), known.T.cov()

    def mean_digit(x_t, t):
        return mean.expand_as(x_t)

    def as_gaussian(x_t, t):
        """The best guess of x_0 if digits were Gaussian, like the known ones."""
        share, apart = left[t[0]], x_t - left[t[0]].sqrt() * mean
        whole = share * covariance + (1 - share) * torch.eye(len(mean)).double()
        return mean + share.sqrt() * torch.linalg.solve(whole, apart.T).T @ covariance

    def model_of(guess):
        def model(x_t, t):
            mean, _ = ex.posterior(guess(x_t, t), x_t, t, BETAS)
            return mean, BETAS[t][:, None]

        return model

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(BETAS), *new.shape, generator=generator, dtype=torch.float64)
    ax = right.subplots()
    for guess, colour, says in (
        (mean_digit, RED, "guesses the mean digit"),
        (as_gaussian, BLUE, "takes digits for Gaussian"),
    ):
        terms = ex.elbo_terms(new, model_of(guess), BETAS, noise).mean(1)
        # The pixels of digits are rounded to multiples of 1/8.
        bits = ex.bits_per_dim(terms.sum(), new.shape[1], width=1 / 8)
        ax.plot(range(1, len(BETAS)), terms[1:-1], color=colour, label=f"{says}: {bits:.2f}")
    ax.axhline(terms[-1], color=GREY, linewidth=0.8, linestyle="--")
    ax.annotate(
        f"what the noise leaves: {terms[-1]:.2f} nats",
        (0, terms[-1]),
        textcoords="offset points",
        xytext=(0, 4),
        fontsize=9,
        color=GREY,
    )
    ax.set(yscale="log", xlabel="step t", ylabel="KL of the step (nats a digit)")
    title = f"bits a pixel, in all (17 levels, all alike: {math.log2(17):.2f})"
    ax.legend(frameon=False, title=title)
