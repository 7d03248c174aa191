"""Learning rates over a run, and gradients before and after clipping, by your own code."""

import math

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

N_STEPS = 1000
SCHEDULES = {
    # label: max_lr, min_lr, n_warmup, colour
    "no warm-up": (1.0, 0.1, 0, "#8a9a5b"),
    "100 steps of warm-up": (1.0, 0.1, 100, "#b5452c"),
    "300 steps, down to 0": (1.0, 0.0, 300, "#3b6ea5"),
}
MAX_NORM = 1.0


def draw(ex) -> Figure:
    """Left: three schedules. Right: two-dimensional gradients, cut back to a circle."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    curves, plane = figure.subplots(1, 2, width_ratios=(3, 2))

    steps = range(N_STEPS + 150)
    for label, (max_lr, min_lr, n_warmup, colour) in SCHEDULES.items():
        rates = [ex.warmup_cosine(s, max_lr, min_lr, n_warmup, N_STEPS) for s in steps]
        curves.plot(steps, rates, color=colour, label=label)
    curves.axvline(N_STEPS - 1, color="#bbbbbb", linewidth=0.8, linestyle="--")
    curves.annotate("last step", (N_STEPS - 1, 0.9), (5, 0), textcoords="offset points")
    curves.set(xlabel="step", ylabel="learning rate / highest", ylim=(-0.03, 1.08))
    curves.set_title("The schedule: up in a line, down along a cosine")
    curves.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.81, 1.0))

    plane.add_patch(Circle((0, 0), MAX_NORM, facecolor="#3b6ea5", alpha=0.12, edgecolor="none"))
    for i, length in enumerate((0.6, 2.3, 1.5, 0.85, 2.0, 1.3, 2.4, 0.4, 1.8)):
        angle = 2 * math.pi * (i + 0.3) / 9
        before = length * torch.tensor([math.cos(angle), math.sin(angle)])
        param = torch.zeros(2, requires_grad=True)
        param.grad = before.clone()
        norm = ex.clip_grad_norm([param], MAX_NORM)
        x, y = before.tolist()
        plane.plot([0, x], [0, y], color="#b5452c", linewidth=1, linestyle=":")
        plane.plot(x, y, ".", color="#b5452c", label="before" if i == 0 else None)
        x, y = param.grad.tolist()
        arrow = {"arrowstyle": "->", "color": "#3b6ea5", "shrinkA": 0, "shrinkB": 0}
        plane.annotate("", (x, y), (0, 0), arrowprops=arrow)
        if norm <= MAX_NORM:
            plane.annotate(f"{norm:.2f}", (x, y), (4, 4), textcoords="offset points", fontsize=8)
    plane.plot([], [], color="#3b6ea5", marker=">", label="after")
    plane.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    plane.set_title(f"Clipping to a norm of {MAX_NORM:g}: shorter ones stay")
    plane.legend(frameon=False, loc="upper left")
    return figure
