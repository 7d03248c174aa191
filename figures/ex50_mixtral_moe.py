"""Which experts work on each token, with what weight, and how uneven their loads are."""

from typing import Any

import torch
from matplotlib.figure import Figure

D_MODEL, N_EXPERTS, K, N_TOKENS, MANY = 8, 6, 2, 32, 1920


def draw(ex: Any) -> Figure:
    """The weights of a few tokens as a map, and every expert's share of many tokens."""
    generator = torch.Generator().manual_seed(4)
    router = torch.randn(N_EXPERTS, D_MODEL, generator=generator)
    # Real tokens have much in common, and the router turns that into favourites.
    x = torch.randn(MANY, D_MODEL, generator=generator) + 0.2 * router[2] - 0.1 * router[4]
    weights, experts = ex.route(x @ router.T, K)
    grid = torch.zeros(N_TOKENS, N_EXPERTS).scatter(1, experts[:N_TOKENS], weights[:N_TOKENS])
    first, both = (experts[:, :n].flatten().bincount(minlength=N_EXPERTS) for n in (1, K))

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.15])
    image = top.imshow(grid.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=top, label="weight", pad=0.01)
    top.set(
        title=f"Each token has {K} experts of {N_EXPERTS}, whose weights add up to 1",
        xlabel="token",
        ylabel="expert",
        yticks=range(N_EXPERTS),
    )
    places = torch.arange(N_EXPERTS)
    bottom.bar(places, both, 0.6, color="#a9c3de", label="as the second choice")
    bottom.bar(places, first, 0.6, color="#3b6ea5", label="as the first choice")
    equal = K * MANY / N_EXPERTS
    bottom.axhline(equal, color="0.3", lw=1, ls="--")
    bottom.text(N_EXPERTS - 0.6, equal, "equal\nshares", va="center", fontsize=8)
    bottom.set(
        title=f"No token is dropped: the busiest expert works {both.max() / both.min():.1f} "
        "times as much as the idlest",
        xlabel="expert",
        ylabel=f"tokens of {MANY:,}",
        xlim=(-0.6, N_EXPERTS - 0.2),
    )
    bottom.legend(frameon=False, loc="upper right", ncols=2)
    for side in ("top", "right"):
        bottom.spines[side].set_visible(False)
    return figure
