"""What each filter leaves of one distribution, drawn by your own code."""

from types import ModuleType

import torch
from matplotlib.figure import Figure

WORDS = ("mat", "sofa", "floor", "bed", "roof", "table", "moon", "idea", "piano", "tax")
LOGITS = (3.0, 2.6, 2.3, 1.5, 0.9, 0.7, -0.6, -1.2, -1.6, -2.4)
USED = ("mat", "roof", "moon")


def draw(ex: ModuleType) -> Figure:
    """One panel a function; grey is the distribution as it was before."""
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    used = torch.tensor([WORDS.index(word) for word in USED])
    panels = {
        "temperature 0.5": ex.temperature(logits, 0.5),
        "temperature 2": ex.temperature(logits, 2.0),
        "top_k 4": ex.top_k(logits, 4),
        "top_p 0.8": ex.top_p(logits, 0.8),
        "min_p 0.11": ex.min_p(logits, 0.11),
        f"repetition_penalty 2 on {', '.join(USED)}": ex.repetition_penalty(logits, used, 2.0),
    }
    before = torch.softmax(logits, dim=-1)

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle("The cat sat on the …    grey: softmax(logits), coloured: what each one leaves")
    all_axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (title, changed) in zip(all_axes.flat, panels.items(), strict=True):
        after = torch.softmax(changed, dim=-1)
        axes.bar(WORDS, before, 0.86, color="#dddddd")
        bars = axes.bar(WORDS, after, 0.5, color="#3b6ea5")
        gone = [i for i, p in enumerate(after.tolist()) if p == 0]
        axes.plot(gone, [0.025] * len(gone), "x", color="#b5452c", markersize=6)
        axes.bar_label(
            bars, [f"{p:.2f}" if p >= 0.005 else "" for p in after.tolist()], fontsize=7, padding=2
        )
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", rotation=60)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("probability")
    return figure
