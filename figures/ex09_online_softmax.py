"""The running maximum and sum along a row, and the average that is known so far, by your code."""

from types import ModuleType

import numpy as np
from matplotlib.figure import Figure

N_KEYS = 40
SCORES = np.random.default_rng(406).normal(size=N_KEYS) * 1.2 + np.linspace(-1.0, 3.0, N_KEYS)
VALUES = np.cumsum(np.random.default_rng(4).normal(size=N_KEYS))
MAXIMUM, SUM, AVERAGE, GREY = "#b5452c", "#3b6ea5", "#6d7f3c", "#999999"


def draw(ex: ModuleType) -> Figure:
    """Feed one key at a time to a state, and look at it after each."""
    state = ex.start((1,), 1)
    largest, total, average = [], [], []
    for score, value in zip(SCORES, VALUES, strict=True):
        state = ex.update(state, np.array([[score]]), np.array([[value]]))
        largest.append(state.largest[0])
        total.append(state.total[0])
        average.append(ex.finish(state)[0][0, 0])
    keys = np.arange(1, N_KEYS + 1)
    records = [0, *(np.flatnonzero(np.diff(largest)) + 1)]

    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle("One pass along a row: each new maximum shrinks what was summed before")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    for ax in (top, middle, bottom):
        for record in records:
            ax.axvline(keys[record], color=MAXIMUM, linewidth=0.8, alpha=0.3)

    top.vlines(keys, SCORES.min() - 0.3, SCORES, color=GREY, linewidth=0.8)
    top.plot(keys, SCORES, "o", color="#555555", markersize=4, label="score")
    top.step(keys, largest, where="post", color=MAXIMUM, label="largest so far")
    top.set(ylabel="score", ylim=(SCORES.min() - 0.3, None))
    top.legend(frameon=False, loc="upper left")

    # A key adds exp(score − largest) to what is left of the sum.
    added = np.exp(SCORES - largest)
    middle.bar(keys, np.array(total) - added, color=SUM, alpha=0.55, label="from earlier keys")
    middle.bar(
        keys,
        added,
        bottom=np.array(total) - added,
        color=SUM,
        label="from this key (1 at a new maximum)",
    )
    for record in records[1:]:
        factor = np.exp(largest[record - 1] - largest[record])
        middle.annotate(
            f"× {factor:.2f}",
            (keys[record], max(total[record - 1 : record + 2])),
            xytext=(0, 4),
            textcoords="offset points",
            color=MAXIMUM,
            ha="center",
            va="bottom",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
        )
    middle.set(ylabel="total = Σ exp(score − largest)", ylim=(0, 1.45 * max(total)))
    middle.legend(frameon=False, loc="upper left", ncols=2)

    bottom.plot(keys, VALUES, ".", color=GREY, label="value")
    bottom.plot(keys, average, color=AVERAGE, label="weighted / total: the average so far")
    bottom.set(ylabel="value", xlabel="keys met so far")
    bottom.legend(frameon=False, loc="best")
    return figure
