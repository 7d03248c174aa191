"""The signal-to-noise ratio, what an error comes to in x_0, and the weights, by your own code."""

import math

import torch
from matplotlib.figure import Figure

N_STEPS = 1000
LINEAR = torch.linspace(1e-4, 0.02, N_STEPS, dtype=torch.float64)
COLOURS = {"x_0": "#777777", "eps": "#b5452c", "v": "#3b6ea5", "mean": "#5a8f4d"}
NAMES = {"x_0": "x_0", "eps": "ε", "v": "v", "mean": "mean"}


def draw(ex) -> Figure:
    """Left: SNR over t. Middle: an error of 1 in each prediction, seen in x_0. Right: weights."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle("The same error weighs more or less, depending on what is predicted and when")
    snr_axes, error_axes, weight_axes = figure.subplots(1, 3)
    every = torch.arange(N_STEPS)

    u = (torch.arange(N_STEPS + 1, dtype=torch.float64) / N_STEPS + 0.008) / 1.008
    shares = torch.cos(u * math.pi / 2) ** 2
    cosine = (1 - shares[1:] / shares[:-1]).clamp(max=0.999)
    for betas, name, style in ((LINEAR, "linear", "-"), (cosine, "cosine", "--")):
        left = (1 - betas).cumprod(0)
        snr_axes.plot(every, left / (1 - left), "k", linestyle=style, label=f"{name} schedule")
    snr_axes.axhline(5, color="#999999", linewidth=0.8)
    snr_axes.annotate("γ = 5", (N_STEPS, 5), xytext=(0, 3), textcoords="offset points", ha="right")
    snr_axes.set(yscale="log", xlabel="step t", title="SNR = ᾱ / (1 − ᾱ)", ylim=(1e-5, 1e5))
    snr_axes.legend(frameon=False)

    zeros, ones = torch.zeros(N_STEPS).double(), torch.ones(N_STEPS).double()
    for kind, colour in COLOURS.items():
        error = ex.to_x0(kind, ones, zeros, every, LINEAR) - ex.to_x0(
            kind, zeros, zeros, every, LINEAR
        )
        error_axes.plot(every, error.abs(), color=colour, label=NAMES[kind])
    error_axes.set(
        yscale="log", xlabel="step t", title="error in x_0 for an error of 1 in", ylim=(3e-3, 1e3)
    )
    error_axes.legend(frameon=False)

    left = (1 - LINEAR).cumprod(0)
    for kind in ("x_0", "eps", "v"):
        weight = ex.loss_weight(kind, left / (1 - left))
        weight_axes.plot(every, weight, color=COLOURS[kind], label=NAMES[kind])
    weight_axes.set(
        yscale="log",
        xlabel="step t",
        title="weight by min(SNR, 5) of the error in",
        ylim=(3e-5, 10),
    )
    weight_axes.legend(frameon=False)
    return figure
