"""The picture of exercise 45: how long each pair takes for one turn, under each scaling."""

import math
from types import ModuleType

from matplotlib.figure import Figure

# Llama 3.1: trained on 8192 tokens, stretched to 8 times as many.
HEAD_DIM, THETA, FACTOR, ORIGINAL_LEN = 128, 500_000.0, 8.0, 8192


def draw(ex: ModuleType) -> Figure:
    """Left: the wavelength of each pair. Right: by how much each scaling slows it down."""
    sizes = HEAD_DIM, THETA, FACTOR
    before = ex.linear_frequencies(HEAD_DIM, THETA, 1.0)
    lines = {
        "linear": (ex.linear_frequencies(*sizes), "#3b6ea5"),
        "dynamic NTK": (
            ex.dynamic_ntk_frequencies(
                HEAD_DIM, THETA, 1.0, ORIGINAL_LEN, int(FACTOR * ORIGINAL_LEN)
            ),
            "#c58b1b",
        ),
        "YaRN": (ex.yarn_frequencies(*sizes, ORIGINAL_LEN), "#5b3f8c"),
        "Llama-3": (ex.llama3_frequencies(*sizes, ORIGINAL_LEN), "#b5452c"),
    }
    pairs = range(HEAD_DIM // 2)

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(
        f"Llama 3.1's pairs, stretched from {ORIGINAL_LEN:,} to {FACTOR * ORIGINAL_LEN:,.0f} "
        "tokens: the slow ones give way, the fast ones must not"
    )
    waves, slowing = figure.subplots(1, 2)
    waves.plot(pairs, 2 * math.pi / before, color="0.6", linestyle="--", label="as trained")
    for name, (frequencies, colour) in lines.items():
        waves.plot(pairs, 2 * math.pi / frequencies, color=colour, linewidth=1.5, label=name)
        slowing.plot(pairs, before / frequencies, color=colour, linewidth=1.8)
    for length in (ORIGINAL_LEN, FACTOR * ORIGINAL_LEN):
        waves.axhline(length, color="0.8", linewidth=0.8, zorder=0)
        waves.text(0, 1.12 * length, f"{length:,.0f} tokens", fontsize=8, color="0.4")
    waves.set(
        yscale="log",
        xlabel="pair i, from the fastest to the slowest",
        ylabel="tokens for one turn",
        title="Above a line, no whole turn in so many tokens",
    )
    waves.legend(frameon=False, loc="lower right")

    slowing.set(
        xlabel="pair i, from the fastest to the slowest",
        ylabel="times slower than trained",
        title="The same, measured by what it was",
        yticks=range(1, int(FACTOR) + 1),
    )
    # Each name where its curve lies apart from the others.
    places = {
        "linear": (3, 7.7, "left"),
        "dynamic NTK": (50, 4.6, "left"),
        "YaRN": (23.2, 1.53, "right"),
        "Llama-3": (32, 1.5, "left"),
    }
    for name, (i, height, side) in places.items():
        slowing.text(i, height, name, color=lines[name][1], ha=side, va="center")
    return figure
