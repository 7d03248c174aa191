"""Digits on their way to noise under both schedules, by your own code."""

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

N_STEPS = 1000
SHOWN = (None, 49, 124, 249, 499, 749, 999)  # None: before the first step
DIGITS = (0, 1, 2)  # the first three pictures of the set show a 0, a 1 and a 2
COLOURS = {"linear": "#b5452c", "cosine": "#3b6ea5"}


def draw(ex) -> Figure:
    """Left: three digits after more and more steps. Right: how much of the signal is left."""
    schedules = {"linear": ex.linear_betas(N_STEPS), "cosine": ex.cosine_betas(N_STEPS)}
    digits = torch.tensor(load_digits().images[list(DIGITS)], dtype=torch.float32) / 8 - 1
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(7, 5))
    figure.suptitle(
        "The same digits and the same noise: the linear schedule loses the digit long before "
        "the end, the cosine schedule uses all its steps"
    )
    bands = left.subfigures(len(schedules), 1)
    for band, (name, betas) in zip(bands, schedules.items(), strict=True):
        band.supylabel(f"{name} schedule", color=COLOURS[name])
        axes = band.subplots(len(DIGITS), len(SHOWN), gridspec_kw={"wspace": 0.04, "hspace": 0.04})
        for column, t in enumerate(SHOWN):
            if t is None:
                images = digits
            else:
                images = ex.q_sample(digits, torch.full((len(digits),), t), betas, noise)
            axes[0, column].set_title("data" if t is None else f"t = {t}", fontsize=9)
            for ax, image in zip(axes[:, column], images, strict=True):
                ax.imshow(image, cmap="gray_r", vmin=-2, vmax=2)
                ax.set(xticks=[], yticks=[])

    signal, beta = right.subplots(2, 1, sharex=True)
    # A picture of ones without noise shows the factor of the signal, √ᾱ.
    every = torch.arange(N_STEPS)
    ones = torch.ones(N_STEPS, dtype=torch.float64)
    for name, betas in schedules.items():
        left_over = ex.q_sample(ones, every, betas, torch.zeros_like(ones)) ** 2
        signal.plot(every, left_over, color=COLOURS[name], label=name)
        beta.plot(every, betas, color=COLOURS[name], label=name)
    for t in SHOWN[1:]:
        signal.axvline(t, color="#cccccc", linewidth=0.8, zorder=0)
    signal.set(ylabel="signal left, ᾱ\n(share of the variance)", ylim=(0, 1.02))
    signal.legend(frameon=False)
    beta.set(yscale="log", ylabel="noise added in one step, β", xlabel="step t")
    return figure
