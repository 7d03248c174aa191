"""The picture of exercise 40: the angle of each pair at each position, and what a score sees."""

import math
from types import ModuleType

import torch
from matplotlib.figure import Figure

HEAD_DIM, N_POSITIONS = 64, 256


def draw(ex: ModuleType) -> Figure:
    """Turn the vector whose every pair is (1, 0), and read the angles off the result."""
    n_pairs = HEAD_DIM // 2
    positions = torch.arange(N_POSITIONS)
    frequencies = ex.rope_frequencies(HEAD_DIM)
    start = torch.cat((torch.ones(n_pairs), torch.zeros(n_pairs))).double()
    turned = ex.apply_rope_half(start.expand(N_POSITIONS, HEAD_DIM), positions, frequencies)
    angles = torch.atan2(turned[:, n_pairs:], turned[:, :n_pairs])
    scores = turned @ turned[0] / n_pairs

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    image = top.imshow(
        angles.T,
        cmap="twilight_shifted",
        vmin=-math.pi,
        vmax=math.pi,
        aspect="auto",
        interpolation="nearest",
    )
    top.set_ylabel("pair i")
    turns = 2 * math.pi / frequencies  # positions
    top.set_title(
        "Early pairs spin, late pairs creep: one turn takes "
        f"{turns[0]:.1f} positions at pair 0, {turns[-1]:,.0f} at pair {n_pairs - 1}",
        fontsize=11,
    )
    bar = figure.colorbar(image, ax=top, ticks=[-math.pi, 0, math.pi], pad=0.01)
    bar.ax.set_yticklabels(["−π", "0", "π"])
    bar.set_label("angle (radians)")
    bottom.plot(positions, scores, color="#5b3f8c", linewidth=1.2)
    bottom.axhline(0, color="0.7", linewidth=0.8)
    bottom.set_ylabel("score, 1 at no distance")
    bottom.set_xlabel("position, and so the distance from position 0 (tokens)")
    bottom.set_title(
        "The dot product of the vector with itself some positions on: it falls with the distance",
        fontsize=11,
    )
    return figure
