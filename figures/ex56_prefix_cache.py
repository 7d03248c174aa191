"""The tree of blocks that some chats make, and how often each block was found again."""

import random
from typing import Any

from matplotlib.figure import Figure

BLOCK, N_CHATS, N_TURNS = 8, 4, 3


def draw(ex: Any) -> Figure:
    """Chats that share a system prompt, in turns: each request repeats what was said so far."""
    rng = random.Random(1)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(49_152) for _ in range(n)]

    system = tokens(3 * BLOCK + 2)
    chats = [list(system) for _ in range(N_CHATS)]
    cache = ex.PrefixCache(1_000, BLOCK)
    hits: dict[bytes, int] = {}
    parents: dict[bytes, bytes | None] = {}
    n_given = n_computed = 0
    for _ in range(N_TURNS):
        for chat in chats:
            chat += tokens(rng.randrange(BLOCK, 3 * BLOCK))  # the question
            found, _data = cache.match(chat)
            for name in found:
                hits[name] += 1
            n_given, n_computed = n_given + len(chat), n_computed + len(chat) - BLOCK * len(found)
            chat += tokens(rng.randrange(2, 2 * BLOCK))  # the answer
            names = ex.block_hashes(chat, BLOCK)
            cache.insert(chat, [None] * len(names))
            cache.release(found)
            for parent, name in zip([None, *names], names, strict=False):
                parents.setdefault(name, parent)
                hits.setdefault(name, 0)

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axis = figure.subplots()
    places = _places(parents)
    for name, parent in parents.items():
        if parent is not None:
            (x0, y0), (x1, y1) = places[parent], places[name]
            axis.plot([x0, x0 + 0.5, x1], [y0, y1, y1], color="0.75", lw=1, zorder=0)
    drawn = axis.scatter(
        [places[name][0] for name in parents],
        [places[name][1] for name in parents],
        c=[hits[name] for name in parents],
        s=330,
        cmap="YlGnBu",
        vmin=0,
        edgecolor="0.4",
        linewidth=0.6,
    )
    for name in parents:
        dark = hits[name] > 0.6 * max(hits.values())
        x, y = places[name]
        color = "white" if dark else "0.2"
        axis.text(x, y, str(hits[name]), ha="center", va="center", fontsize=8, color=color)
    axis.set(
        title=f"{N_CHATS} chats of {N_TURNS} turns: {n_computed} of {n_given} tokens computed, "
        f"the others were there",
        xlabel=f"blocks of {BLOCK} tokens from the start of the text",
        yticks=[],
        ylim=(N_CHATS - 0.4, -0.6),
    )
    figure.colorbar(drawn, ax=axis, label="found again so many times")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return figure


def _places(parents: dict[bytes, bytes | None]) -> dict[bytes, tuple[float, float]]:
    """Depth and row of each block: leaves in order, parents in the middle of their children."""
    children: dict[bytes | None, list[bytes]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    places: dict[bytes, tuple[float, float]] = {}
    n_leaves = 0

    def place(name: bytes, depth: int) -> float:
        nonlocal n_leaves
        below = children.get(name, [])
        if below:
            rows = [place(child, depth + 1) for child in below]
            row = (rows[0] + rows[-1]) / 2
        else:
            row, n_leaves = float(n_leaves), n_leaves + 1
        places[name] = depth, row
        return row

    for root in children.get(None, []):
        place(root, 0)
    return places
