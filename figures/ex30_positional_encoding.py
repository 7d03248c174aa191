"""The waves of the first transformer, drawn by your own code."""

from typing import Any

import torch
from matplotlib.figure import Figure

SEQ_LEN, D_MODEL = 100, 64
PAIRS = (0, 4, 8, 12)
COLOURS = ("#b5452c", "#c58b1b", "#8a9a5b", "#3b6ea5")


def draw(ex: Any) -> Figure:
    """Left: the table, and four of its columns. Right: how alike two positions are."""
    table = ex.sinusoidal(SEQ_LEN, D_MODEL, torch.float64)
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(
        "Each position gets a pattern of its own, and the likeness of two patterns"
        " depends on their distance alone"
    )
    axes = figure.subplot_mosaic([["table", "alike"], ["waves", "distance"]], width_ratios=(3, 2))

    whole = axes["table"]
    image = whole.imshow(table.T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    whole.set(
        title="sinusoidal(100, 64): sine, cosine, sine, cosine …",
        xlabel="position t",
        ylabel="column (feature)",
    )
    figure.colorbar(image, ax=whole, label="value")

    waves = axes["waves"]
    for i, colour in zip(PAIRS, COLOURS, strict=True):
        label = f"columns {2 * i}, {2 * i + 1}"
        waves.plot(table[:, 2 * i], color=colour, linewidth=1.2, label=label)
        waves.plot(table[:, 2 * i + 1], color=colour, linewidth=1.2, linestyle=":")
    waves.set(title="Sines (lines) and cosines (dotted)", xlabel="position t", ylabel="value")
    waves.legend(loc="lower right", fontsize=8, ncols=2)
    waves.margins(x=0)

    # Half of the features are pairs sin, cos: a row times itself gives d_model / 2.
    alike = table @ table.T / (D_MODEL / 2)
    image = axes["alike"].imshow(alike, cmap="magma", vmin=0, vmax=1, aspect="auto")
    axes["alike"].set(title="p[s] · p[t] / 32", xlabel="position t", ylabel="position s")
    figure.colorbar(image, ax=axes["alike"])

    distance = axes["distance"]
    for s, colour in zip((20, 50, 80), COLOURS, strict=False):
        distance.plot(
            torch.arange(SEQ_LEN) - s, alike[s], color=colour, label=f"s = {s}", alpha=0.6
        )
    distance.set(
        title="Three rows of it, moved onto each other",
        xlabel="distance t − s",
        ylabel="p[s] · p[t] / 32",
        ylim=(0, 1.05),
    )
    distance.legend(frameon=False)
    return figure
