"""The singular values of what LoRA learns, beside those of what there was to learn."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

D, RANKS, N_STEPS = 32, (1, 2, 4, 8), 400
COLORS = ("#d9b44a", "#6a9a58", "#3b6ea5", "#7a4f8c")


def draw(ex: Any) -> Figure:
    """Layers of several ranks learn the same change of a weight, whose spectrum falls off."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    wanted = 3 * 0.6 ** torch.arange(D, dtype=torch.float64)
    change = left @ torch.diag(wanted) @ right

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axis = figure.subplots()
    places = torch.arange(1, D + 1)
    axis.plot(places, wanted, "o-", color="0.65", ms=4, label="the change to be learnt")
    for r, color in zip(RANKS, COLORS, strict=True):
        update = _learn(ex, change, r, generator)
        values = torch.linalg.svdvals(update)[:r]
        error = (update - change).norm() / change.norm()
        n_trained = r * 2 * D
        label = f"r = {r}: {n_trained} of {D * D} numbers, {error:.0%} of the change is missed"
        axis.plot(places[:r], values, "o", color=color, ms=9 - r / 2, label=label)
    axis.set(
        title="An update of rank r learns the r largest directions, and no more",
        xlabel="place of the singular value",
        ylabel="singular value of ΔW",
        yscale="log",
        xlim=(0.5, 14.5),
        ylim=(2e-3, 5),
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return figure


def _learn(ex: Any, change: torch.Tensor, r: int, generator: torch.Generator) -> torch.Tensor:
    base = nn.Linear(D, D, bias=False).double()
    before = base.weight.detach().clone()
    layer = ex.LoRALinear(base, r, float(r))
    layer.a.data = torch.randn(r, D, generator=generator, dtype=torch.float64) / D**0.5
    optimizer = torch.optim.Adam([layer.a, layer.b], lr=0.05)
    identity = torch.eye(D, dtype=torch.float64)
    for _ in range(N_STEPS):
        loss = (layer(identity) - identity @ (before + change).T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ex.merge(layer)
    return (layer.base.weight - before).detach()
