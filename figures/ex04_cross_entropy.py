"""What a prediction costs as the logit of the truth grows, drawn by your own code."""

import numpy as np
from matplotlib.figure import Figure

VOCABULARIES = {2: "#8a9a5b", 100: "#3b6ea5", 50257: "#b5452c"}
SHARES = {0.0: "#3b6ea5", 0.1: "#c58b1b", 0.3: "#b5452c"}


def draw(ex) -> Figure:
    """Left: vocabularies of three sizes. Right: one vocabulary, three shares of smoothing."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle("The loss at one position, while the logit of the truth moves from −10 to 20")
    plain, smoothed = figure.subplots(1, 2)

    z = np.linspace(-10, 20, 121)
    for vocab_size, colour in VOCABULARIES.items():
        start = np.log(vocab_size)
        label = f"vocab_size {vocab_size:,}, log of that {start:.2f}"
        plain.plot(z, losses_at(ex, z, vocab_size), color=colour, label=label)
        plain.plot(0, start, "o", color=colour, markersize=5)
        plain.annotate(
            f"{start:.2f}", (0, start), xytext=(7, 2), textcoords="offset points", color=colour
        )
    plain.set(title="Right is free, wrong costs without limit")
    plain.text(-9.6, 0.4, "wrong: each\nstep down\ncosts one more", fontsize=9, color="#666666")
    plain.text(19.6, 0.4, "right: nothing\nleft to gain", fontsize=9, color="#666666", ha="right")

    for share, colour in SHARES.items():
        losses = losses_at(ex, z, 100, label_smoothing=share)
        label = f"ε = {share:g}"
        if share:
            best = losses.argmin()
            probability = np.exp(-losses_at(ex, z[best : best + 1], 100)[0])
            label += f": least where p = {probability:.2f}"
            smoothed.plot(z[best], losses[best], "v", color=colour, markersize=7)
        smoothed.plot(z, losses, color=colour, label=label)
    smoothed.set(title="Smoothing charges for certainty (vocab_size 100)")
    for axis in (plain, smoothed):
        axis.axvline(0, color="#bbbbbb", linewidth=0.8, linestyle="--")
        axis.set(xlabel="logit of the truth (all others are 0)", ylabel="loss in nats")
        axis.set(xlim=(-10, 20), ylim=(0, 16))
        axis.legend(frameon=False, loc="upper right")
    return figure


def losses_at(ex, z, vocab_size, **options):
    """The loss of single positions whose truth is word 0 and has the logit z."""
    losses = []
    for logit in z:
        logits = np.zeros((1, vocab_size))
        logits[0, 0] = logit
        losses.append(ex.cross_entropy(logits, np.array([0]), **options))
    return np.array(losses)
