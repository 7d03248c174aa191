"""What a temperature does to a softmax, drawn by your own code."""

import numpy as np
from matplotlib.figure import Figure

WORDS = ("mat", "sofa", "floor", "roof", "moon")
SCORES = np.array([4.0, 3.0, 2.5, 1.0, -1.0])
TEMPERATURES = (0.25, 1.0, 4.0)
COLOURS = ("#b5452c", "#3b6ea5", "#8a9a5b")


def draw(ex) -> Figure:
    """Left: one set of scores at three temperatures. Right: every temperature between."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(
        "softmax(x / T): a low temperature leaves one choice, a high one levels them all"
    )
    bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))

    place = np.arange(len(WORDS))
    for i, (temperature, colour) in enumerate(zip(TEMPERATURES, COLOURS, strict=True)):
        weights = ex.softmax(SCORES / temperature)
        label = f"T = {temperature:g}"
        drawn = bars.bar(place + 0.27 * (i - 1), weights, 0.25, color=colour, label=label)
        bars.bar_label(
            drawn, [f"{w:.2f}" if w > 0.005 else "" for w in weights], fontsize=7, padding=2
        )
    bars.set_xticks(place, [f"{w}\nscore {s:g}" for w, s in zip(WORDS, SCORES, strict=True)])
    bars.set(title="The cat sat on the …", ylabel="weight (all together 1)", ylim=(0, 1.08))
    bars.legend(frameon=False)

    temperatures = np.geomspace(0.05, 100, 200)
    scores = SCORES / temperatures[:, None]  # (temperature, word)
    weights = ex.softmax(scores, axis=1)
    entropy = -(weights * ex.log_softmax(scores, axis=1)).sum(axis=1)
    curves.plot(temperatures, weights.max(axis=1), color="#555555")
    curves.plot(
        temperatures, np.exp(entropy) / len(WORDS), color="#c58b1b", label="choices in play"
    )
    curves.axhline(1 / len(WORDS), color="#bbbbbb", linewidth=0.8, linestyle="--")
    for temperature, colour in zip(TEMPERATURES, COLOURS, strict=True):
        curves.axvline(temperature, color=colour, linewidth=1, linestyle=":")
    curves.set(
        title="The same at every temperature",
        xscale="log",
        xlabel="temperature T",
        ylabel="share",
        ylim=(0, 1.08),
    )
    curves.text(0.055, 1 / len(WORDS) + 0.02, f"1/{len(WORDS)}", fontsize=8, color="#888888")
    curves.text(100, 0.28, "largest weight", color="#555555", ha="right")
    curves.text(
        100, 0.91, "choices in play,\nexp(entropy) / 5", color="#c58b1b", ha="right", va="top"
    )
    return figure
