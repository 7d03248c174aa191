"""Paths down Rosenbrock's valley, walked by your own optimizers."""

import numpy as np
import torch
from matplotlib.figure import Figure

START = (-0.5, 1.9)
N_STEPS = 400
WALKERS = {
    # label: optimizer, options, colour
    "SGD": ("SGD", {"lr": 6e-4}, "#555555"),
    "SGD, momentum 0.9": ("SGD", {"lr": 6e-4, "momentum": 0.9}, "#b5452c"),
    "Nesterov, momentum 0.9": ("SGD", {"lr": 6e-4, "momentum": 0.9, "nesterov": True}, "#c58b1b"),
    "Adam": ("Adam", {"lr": 0.1}, "#3b6ea5"),
}


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def walk(ex, name, options):
    """The points from START on, (N_STEPS + 1, 2)."""
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = getattr(ex, name)([point], **options)
    path = [point.detach().clone()]
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        rosenbrock(*point).backward()
        optimizer.step()
        path.append(point.detach().clone())
    return torch.stack(path).numpy()


def draw(ex) -> Figure:
    """Left: the paths over the valley's contour lines. Right: the height after each step."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(
        f"{N_STEPS} steps from one start. At the minimum the valley's walls curve 2500 times as "
        "much as its floor"
    )
    valley, heights = figure.subplots(1, 2, width_ratios=(3, 2))

    x, y = np.meshgrid(np.linspace(-1.7, 1.5, 400), np.linspace(-0.4, 2.2, 400))
    levels = np.geomspace(0.1, 1500, 14)
    valley.contourf(
        x, y, np.log10(rosenbrock(x, y) + 1e-3), np.log10(levels), cmap="Greys", alpha=0.35,
        extend="both",
    )  # fmt: skip
    paths = {label: walk(ex, name, options) for label, (name, options, _) in WALKERS.items()}
    for label, path in paths.items():
        colour = WALKERS[label][2]
        valley.plot(*path.T, color=colour, linewidth=1.1, marker=".", markersize=2.5, label=label)
        valley.plot(*path[-1], color=colour, marker="o", markersize=7, markeredgecolor="white")
        heights.plot(rosenbrock(*path.T), color=colour, label=label)
    valley.plot(*START, "k+", markersize=10)
    valley.plot(1, 1, "k*", markersize=12)
    valley.annotate("start", START, (8, 6), textcoords="offset points")
    valley.annotate("minimum", (1, 1), (8, -14), textcoords="offset points")
    valley.set(title="f(x, y) = (1 − x)² + 100 (y − x²)²", xlabel="x", ylabel="y")
    valley.set(xlim=(-1.7, 1.5), ylim=(-0.4, 2.2))
    heights.set(title="Height", xlabel="step", ylabel="f", yscale="log")
    heights.legend(frameon=False)
    return figure
