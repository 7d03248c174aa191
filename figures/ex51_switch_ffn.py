"""Who goes where, who is dropped, and how a bias evens out the load."""

from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

D_MODEL, N_EXPERTS, N_TOKENS, FACTOR = 8, 6, 48, 1.25
RATE, N_STEPS = 0.004, 150


def draw(ex: Any) -> Figure:
    """Tokens × experts for one batch, and the loads before and after the bias has moved."""
    generator = torch.Generator().manual_seed(4)
    layer = ex.SwitchFFN(D_MODEL, 16, N_EXPERTS, FACTOR)
    router = torch.randn(N_EXPERTS, D_MODEL, generator=generator)
    layer.router.data = router
    # Real tokens have much in common, and the router turns that into favourites.
    x = torch.randn(40 * N_TOKENS, D_MODEL, generator=generator) + 0.2 * router[2] - 0.1 * router[4]
    layer.up_proj.data.fill_(1.0)[:, ::2] = -1.0  # so that any token makes some unit work
    layer.down_proj.data.fill_(1.0)

    with torch.no_grad():
        y, _, choice = layer(x[:N_TOKENS])
        before = layer(x)[2].bincount(minlength=N_EXPERTS)
        for _ in range(N_STEPS):
            counts = layer(x)[2].bincount(minlength=N_EXPERTS)
            layer.router_bias.copy_(ex.update_router_bias(layer.router_bias, counts, RATE))
        after = layer(x)[2].bincount(minlength=N_EXPERTS)

    # The experts here give more than 0 for a token that any of them sees.
    silent = y.abs().sum(dim=-1) == 0
    seen = torch.zeros(N_EXPERTS, N_TOKENS)
    seen[choice, torch.arange(N_TOKENS)] = 1 + silent.float()

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.15])
    top.imshow(seen, cmap=ListedColormap(["#f1efe9", "#3b6ea5", "#b5452c"]), aspect="auto")
    capacity = -(-FACTOR * N_TOKENS // N_EXPERTS)
    top.set(
        title=f"{int(silent.sum())} of {N_TOKENS} tokens are dropped (red): an expert has room "
        f"for {capacity:.0f}, the first that come",
        xlabel="token",
        ylabel="expert",
        yticks=range(N_EXPERTS),
    )
    places = torch.arange(N_EXPERTS)
    bottom.bar(places - 0.2, before, 0.38, color="#b5452c", label="at first")
    bottom.bar(places + 0.2, after, 0.38, color="#3b6ea5", label=f"after {N_STEPS} steps")
    bottom.axhline(len(x) / N_EXPERTS, color="0.3", lw=1, ls="--")
    bottom.text(N_EXPERTS - 0.45, len(x) / N_EXPERTS, "equal\nshares", va="center", fontsize=8)
    bottom.set(
        title="The bias moves choices from the busy experts to the idle ones",
        xlabel="expert",
        ylabel=f"tokens of {len(x)}",
        xlim=(-0.6, N_EXPERTS - 0.1),
    )
    bottom.legend(frameon=False)
    for side in ("top", "right"):
        bottom.spines[side].set_visible(False)
    return figure
