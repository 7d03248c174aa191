"""Memory while sequences come and go: a place for the longest each, against blocks."""

import random
from typing import Any

import torch
from matplotlib.figure import Figure

BLOCK, N_BLOCKS, LONGEST, N_STEPS = 4, 48, 48, 60
COLORS = ("#3b6ea5", "#b5452c", "#d9b44a", "#6a9a58", "#7a4f8c", "#4f8c8a", "#c77b9b", "#8a6d4b")


def draw(ex: Any) -> Figure:
    """Who has which block at each step, and how much of what is reserved holds a token."""
    rng = random.Random(5)
    cache = ex.PagedKVCache(N_BLOCKS, BLOCK, 1, 1)
    one = torch.zeros(1, 1, 1)
    running: dict[int, int] = {}  # number to the length at which it ends
    owners = torch.full((N_BLOCKS, N_STEPS), -1)
    used, blocks, reserved = [], [], []
    for step in range(N_STEPS):
        if len(running) < 6 and (step % 4 == 0 or not running):
            number = cache.add()
            n_prompt = rng.randrange(2, 14)
            cache.append(number, one.expand(1, n_prompt, 1), one.expand(1, n_prompt, 1))
            running[number] = n_prompt + rng.randrange(6, LONGEST - 14)
        for number, end in list(running.items()):
            if cache.lengths[number] >= end:
                cache.remove(number)
                del running[number]
            elif cache.allocator.n_free:
                cache.append(number, one, one)
        for number in running:
            owners[cache.tables[number], step] = number % len(COLORS)
        used.append(sum(cache.lengths[number] for number in running))
        blocks.append(BLOCK * (N_BLOCKS - cache.allocator.n_free))
        reserved.append(LONGEST * len(running))

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for index, color in enumerate(COLORS):
        mine = (owners == index).nonzero()
        left.scatter(mine[:, 1], mine[:, 0], marker="s", s=12, color=color, linewidths=0)
    left.set(
        title="A color is a sequence; its blocks lie anywhere, and serve again",
        xlabel="step",
        ylabel="block",
        ylim=(-1, N_BLOCKS),
    )
    left.title.set_fontsize(10)
    steps = range(N_STEPS)
    right.fill_between(steps, reserved, color="0.88", label=f"a place of {LONGEST} for each")
    right.fill_between(steps, blocks, color="#d9b44a", label=f"blocks of {BLOCK}")
    right.fill_between(steps, used, color="#3b6ea5", label="tokens that are there")
    share = sum(used) / sum(blocks)
    right.set(
        title=f"Blocks are {share:.0%} full, places {sum(used) / sum(reserved):.0%}",
        xlabel="step",
        ylabel="tokens of memory",
    )
    right.title.set_fontsize(10)
    right.legend(frameon=False, loc="upper left")
    right.set_ylim(0, 1.25 * max(reserved))
    return figure
