"""The picture of exercise 40: the two layouts, the angle of each pair, and what a score sees."""

import math
from types import ModuleType

import torch
from matplotlib.figure import Figure

from ex30_positional_encoding import sinusoidal

HEAD_DIM, N_POSITIONS = 64, 256


def draw(ex: ModuleType) -> Figure:
    """Turn the vector whose every pair is (1, 0), and read the angles off the result."""
    n_pairs = HEAD_DIM // 2
    positions = torch.arange(N_POSITIONS)
    frequencies = ex.rope_frequencies(HEAD_DIM)
    ones, zeros = torch.ones(n_pairs).double(), torch.zeros(n_pairs).double()
    starts = {
        ex.apply_rope_interleaved: torch.stack((ones, zeros), dim=1).flatten(),
        ex.apply_rope_half: torch.cat((ones, zeros)),
    }
    interleaved, half = (
        rotate(start.expand(N_POSITIONS, HEAD_DIM), positions, frequencies)
        for rotate, start in starts.items()
    )
    angles = torch.atan2(half[:, n_pairs:], half[:, :n_pairs])
    scores = half @ half[0] / n_pairs

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(1, 1))
    tables = {
        "exercise 30: added to the vector\nsin, cos, sin, cos …": sinusoidal(
            N_POSITIONS, HEAD_DIM, torch.float64
        ),
        "interleaved: (1, 0), (1, 0) … turned\ncos, sin, cos, sin …": interleaved,
        "half: the same pairs, apart\ncos, cos … sin, sin …": half,
    }
    axes = rows[0].subplots(1, 3, sharey=True)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table.T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("position")
    axes[0].set_ylabel("feature")
    rows[0].colorbar(image, ax=axes, pad=0.01, ticks=[-1, 0, 1])

    left, right = rows[1].subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(
        angles.T,
        cmap="twilight_shifted",
        vmin=-math.pi,
        vmax=math.pi,
        aspect="auto",
        interpolation="nearest",
    )
    left.set(ylabel="pair i", xlabel="position")
    turns = 2 * math.pi / frequencies  # positions
    left.set_title(
        "Early pairs spin, late pairs creep: one turn takes\n"
        f"{turns[0]:.1f} positions at pair 0, {turns[-1]:,.0f} at pair {n_pairs - 1}",
        fontsize=10,
    )
    bar = rows[1].colorbar(image, ax=left, ticks=[-math.pi, 0, math.pi], pad=0.01)
    bar.ax.set_yticklabels(["−π", "0", "π"])
    bar.set_label("angle (radians)")
    right.plot(positions, scores, color="#5b3f8c", linewidth=1.2)
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set_ylabel("score, 1 at no distance")
    right.set_xlabel("distance (tokens)")
    right.set_title(
        "The vector's dot product with itself\nsome positions on: it falls with the distance",
        fontsize=10,
    )
    return figure
