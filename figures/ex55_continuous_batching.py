"""Who runs when: a static batch that waits for its longest, against places that are filled anew."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

PLACES, MOST = 3, 8  # requests at once, tokens a step
LENGTHS = ((3, 14), (12, 4), (2, 6), (5, 20), (20, 5), (4, 9), (3, 15), (8, 3))
READS, WRITES, HOLDS, WAITS = "#b5452c", "#3b6ea5", "#e6dcc3", "0.85"

Bars = list[tuple[int, int, str]]  # (request, step, color)


def draw(ex: Any) -> Figure:
    """Eight requests, which all come at once, in both ways."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    static, continuous = static_batches(), continuous_batch(ex)
    n_steps = 1 + max(step for _, step, _ in static)
    for axes, bars, name in ((upper, static, "Static"), (lower, continuous, "Continuous")):
        show(axes, bars, name)
        axes.set_xlim(-0.5, n_steps + 0.5)
    lower.set_xlabel("step: one pass through the model")
    labels = {
        "waits for a place": WAITS,
        "reads its prompt": READS,
        "writes a token": WRITES,
        "has ended, and keeps the place": HOLDS,
    }
    handles = [Patch(color=color, label=label) for label, color in labels.items()]
    lower.legend(handles=handles, frameon=False, loc="center right", fontsize=9)
    return figure


def static_batches() -> Bars:
    """Prompts are read at once, and the next batch begins when the longest text has ended."""
    bars: Bars = []
    start = 0
    for first in range(0, len(LENGTHS), PLACES):
        batch = LENGTHS[first : first + PLACES]
        end = start + max(n_new for _, n_new in batch)
        for i, (_, n_new) in enumerate(batch, first):
            bars += [(i, step, WAITS) for step in range(start)]
            bars.append((i, start, READS))
            bars += [(i, step, WRITES) for step in range(start + 1, start + n_new)]
            bars += [(i, step, HOLDS) for step in range(start + n_new, end)]
        start = end
    return bars


def continuous_batch(ex: Any) -> Bars:
    """By the exercise's scheduler."""
    scheduler = ex.Scheduler(PLACES, MOST)
    names = {scheduler.admit(n_prompt): i for i, (n_prompt, _) in enumerate(LENGTHS)}
    unread = [n_prompt for n_prompt, _ in LENGTHS]
    left = [n_new for _, n_new in LENGTHS]
    bars: Bars = []
    step = 0
    while scheduler.busy:
        shares = scheduler.step()
        for number, i in names.items():
            if number in shares:
                bars.append((i, step, READS if unread[i] else WRITES))
                unread[i] = max(0, unread[i] - shares[number])
                left[i] -= unread[i] == 0
                if left[i] == 0:
                    scheduler.finish(number)
            elif left[i]:
                bars.append((i, step, WAITS))
        step += 1
    return bars


def show(axes: Axes, bars: Bars, name: str) -> None:
    for color in (WAITS, HOLDS, WRITES, READS):
        mine = [(i, step) for i, step, c in bars if c == color]
        thin = color == WAITS
        axes.barh(
            [i for i, _ in mine],
            0.92,
            left=[step + 0.04 for _, step in mine],
            height=0.14 if thin else 0.74,
            color=color,
        )
    n_steps = 1 + max(step for _, step, _ in bars)
    used = sum(color in (READS, WRITES) for *_, color in bars)
    axes.set_title(
        f"{name}: {n_steps} steps, {used / (PLACES * n_steps):.0%} of the {PLACES} places in use",
        fontsize=10,
        loc="left",
    )
    axes.set(ylabel="request", yticks=range(len(LENGTHS)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
