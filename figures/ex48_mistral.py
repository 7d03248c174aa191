"""Which token stands in which slot of a rolling cache, call after call."""

from itertools import accumulate
from types import ModuleType

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

WINDOW = 5
CHUNKS = [3, 1, 1, 1, 1, 4, 1, 1, 7, 1, 1, 1]  # how many tokens come with each call
COLOURS = ("#cfe3f5", "#f6d9b8", "#d5ecc8", "#e6d3ee", "#f5cccc")  # one for each lap
EMPTY, GONE = "#ffffff", "#e4e4e4"


def draw(ex: ModuleType) -> Figure:
    """Bring tokens whose keys are their own numbers, and read the slots after each call."""
    held = slots_over_time(ex)
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(WINDOW, 13))
    draw_slots(top, held)
    draw_tokens(bottom, held)
    return figure


def slots_over_time(ex: ModuleType) -> list[list[int]]:
    """After each call, the token in each slot; −1 where none came yet."""
    cache = ex.RollingKVCache(1, 1, WINDOW, 2)
    held, start = [], 0
    for end in accumulate(CHUNKS):
        tokens = torch.arange(start, end).float()[None, None, :, None].expand(-1, -1, -1, 2)
        cache.append(tokens, tokens)
        row = [int(token) for token in cache.keys[0, 0, :, 0]]
        held.append([token if slot < end else -1 for slot, token in enumerate(row)])
        start = end
    return held


def draw_slots(axis: Axes, held: list[list[int]]) -> None:
    """One row for each slot; a heavy frame where a token has just been written."""
    before = [-1] * WINDOW
    for call, row in enumerate(held):
        for slot, token in enumerate(row):
            colour = EMPTY if token < 0 else COLOURS[token // WINDOW % len(COLOURS)]
            cell(axis, call, slot, colour, str(token) if token >= 0 else "")
            if token != before[slot]:
                axis.add_patch(
                    Rectangle((call - 0.44, slot - 0.44), 0.88, 0.88, fill=False, linewidth=1.8)
                )
        before = row
    frame(axis, len(held), WINDOW)
    axis.set_yticks(range(WINDOW))
    axis.set_ylabel("slot")
    axis.set_title(
        f"{WINDOW} slots: token t goes into slot t mod {WINDOW}, a colour for each lap\n"
        "(framed: written by this call)",
        fontsize=11,
    )


def draw_tokens(axis: Axes, held: list[list[int]]) -> None:
    """The same cache by token: what is held is the window of the newest one."""
    for call, (row, end) in enumerate(zip(held, accumulate(CHUNKS), strict=True)):
        for token in range(end):
            kept = token in row
            colour = COLOURS[token // WINDOW % len(COLOURS)] if kept else GONE
            cell(axis, call, token, colour, str(token) if kept else "")
    frame(axis, len(held), sum(CHUNKS))
    axis.set_xticks(range(len(held)), [f"+{n}" for n in CHUNKS])
    axis.set_xlabel("call, and how many tokens it brings")
    axis.set_yticks(range(0, sum(CHUNKS), 5))
    axis.set_ylabel("token")
    axis.set_title(
        "The same, sorted by token: the last ones are there, the grey ones are forgotten",
        fontsize=11,
    )


def cell(axis: Axes, x: int, y: int, colour: str, text: str) -> None:
    """A coloured square with a number in it."""
    axis.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="0.75", linewidth=0.5)
    )
    axis.text(x, y, text, ha="center", va="center", fontsize=8)


def frame(axis: Axes, n_calls: int, n_rows: int) -> None:
    """The first row on top."""
    axis.set_xlim(-0.5, n_calls - 0.5)
    axis.set_ylim(n_rows - 0.5, -0.5)
    axis.tick_params(length=0)
