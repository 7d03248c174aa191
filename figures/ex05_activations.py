"""The activations, their slopes, and how near the tanh formula comes to gelu, by your own code."""

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"relu": "#999999", "gelu": "#3b6ea5", "silu": "#b5452c"}


def draw(ex) -> Figure:
    """Left: the curves. Middle: their slopes. Right: gelu_tanh less gelu."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    curves, slopes, error = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    x = np.linspace(-5, 4, 901)

    for name, colour in COLOURS.items():
        curves.plot(x, getattr(ex, name)(x), color=colour, label=name)
    for name in ("gelu", "silu"):
        y = getattr(ex, name)(x)
        least = y.argmin()
        curves.plot(x[least], y[least], "v", color=COLOURS[name], markersize=5)
        curves.annotate(
            f"{y[least]:.2f} at {x[least]:.2f}", (x[least], y[least]), xytext=(0, -13),
            textcoords="offset points", color=COLOURS[name], fontsize=8,
            ha="right" if name == "silu" else "left",
        )  # fmt: skip
    curves.set(title="The curves", ylim=(-0.7, 4), xlabel="x")

    # relu's slope by differences, so that the corner shows as the jump that it is.
    slopes.plot(x[1:], np.diff(ex.relu(x)) / np.diff(x), color=COLOURS["relu"], label="relu")
    for name in ("gelu", "silu"):
        y = getattr(ex, f"{name}_grad")(x)
        steepest = y.argmax()
        slopes.plot(x, y, color=COLOURS[name], label=name)
        slopes.plot(x[steepest], y[steepest], "^", color=COLOURS[name], markersize=5)
    slopes.text(
        4, 1.16, "above 1, before it settles there", fontsize=8, color="#666666", ha="right"
    )
    slopes.text(-4.9, -0.24, "below 0: a larger x gives less", fontsize=8, color="#666666")
    slopes.set(title="Their slopes", ylim=(-0.3, 1.3), xlabel="x")

    both = np.linspace(-5, 5, 801)
    error.plot(both, 1e4 * (ex.gelu_tanh(both) - ex.gelu(both)), color="#c58b1b")
    error.set(title="gelu_tanh − gelu, in units of 0.0001", xlabel="x")

    for axis in (curves, slopes, error):
        axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        axis.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    curves.legend(frameon=False, loc="upper left")
    slopes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))
    return figure
