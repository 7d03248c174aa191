"""Which drafted tokens stayed, and what a step is worth for each gamma."""

from typing import Any

import torch
from matplotlib.figure import Figure

VOCAB, N_STEPS, GAMMA = 12, 14, 4
COLORS = {"kept": "#3b6ea5", "rejected": "#b5452c", "drawn": "#d9b44a"}
ALPHAS = (0.5, 0.7, 0.8, 0.9)
COST = 0.1  # of a draft's call, in calls of the target


def draw(ex: Any) -> Figure:
    """Steps of a bigram model with a draft that is nearly right, and the law of their lengths."""
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(VOCAB, VOCAB, generator=generator, dtype=torch.float64) ** 4
    q = p + 0.12 * torch.rand(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    p, q = (x / x.sum(dim=-1, keepdim=True) for x in (p, q))

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ids, n_all = torch.tensor([0]), 0
    for step in range(N_STEPS):
        u = torch.rand(2 * GAMMA + 1, generator=generator, dtype=torch.float64)
        new = ex.speculative_step(lambda ids: p[ids], lambda ids: q[ids], ids, GAMMA, u)
        ids, n_kept = torch.cat((ids, new)), len(new) - 1
        n_all += len(new)
        for place in range(GAMMA + 1):
            kind = "kept" if place < n_kept else "drawn" if place == n_kept else "rejected"
            if place < GAMMA or kind == "drawn":
                left.barh(
                    step, 0.92, 0.8, place, color=COLORS[kind], alpha=1 - 0.7 * (place > n_kept)
                )
    for kind, label in (
        ("kept", "drafted, and stays"),
        ("drawn", "drawn by the target's law or the residual"),
        ("rejected", "drafted in vain"),
    ):
        left.barh(0, 0, color=COLORS[kind], label=label)
    left.set(
        title=f"{N_STEPS} calls of the target, {n_all} tokens",
        xlabel="place in the step",
        ylabel="step",
        xticks=[],
        yticks=range(0, N_STEPS, 2),
        ylim=(N_STEPS + 2.6, -0.7),
    )
    left.legend(frameon=False, loc="lower left", fontsize=8, ncols=1)
    gammas = range(1, 13)
    for alpha, color in zip(ALPHAS, ("0.65", "#d9b44a", "#3b6ea5", "#b5452c"), strict=True):
        worth = [ex.expected_tokens(alpha, gamma) / (1 + COST * gamma) for gamma in gammas]
        right.plot(gammas, worth, "o-", color=color, label=f"α = {alpha}")
    right.axhline(1, color="0.3", lw=1, ls="--")
    right.set(
        title=f"Speed-up, if a call of the draft costs {COST:.0%} of the target's",
        xlabel="gamma, the tokens drafted in a step",
        ylabel="tokens a unit of time, against the target alone",
    )
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    return figure
