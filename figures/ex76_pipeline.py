"""The figure of exercise 76: what each rank does when, under GPipe and under 1F1B."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

N_STAGES, N_MICRO = 4, 8
TIME = {"forward": 1, "backward": 2}
COLOURS = {"forward": ("#9ecae1", "#c6dbef"), "backward": ("#fdae6b", "#fdd0a2")}

Bar = tuple[int, str, int, int]  # rank, kind, micro-batch, start


def draw(ex: Any) -> Figure:
    """Draw the learner's two schedules on one clock."""
    plans = {
        "GPipe": ex.gpipe_schedule(N_STAGES, N_MICRO),
        "1F1B": ex.one_f_one_b_schedule(N_STAGES, N_MICRO),
    }
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (name, schedule) in zip(axes, plans.items(), strict=True):
        draw_plan(axis, name, schedule)
    axes[1].set_xlabel("time, in forwards of one micro-batch")
    figure.legend(
        handles=[
            Patch(color=COLOURS["forward"][0], label="forward of a micro-batch (takes 1)"),
            Patch(color=COLOURS["backward"][0], label="backward (takes 2)"),
            Patch(facecolor="white", edgecolor="0.7", label="idle: the bubble"),
        ],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"Your schedules for {N_STAGES} stages and {N_MICRO} micro-batches: "
        "the bubble is the same, what is kept is not",
        fontsize=13,
    )
    return figure


def draw_plan(axis: Axes, name: str, schedule: list[list[tuple[str, int]]]) -> None:
    bars = on_a_clock(schedule)
    end = max(start + TIME[kind] for _, kind, _, start in bars)
    axis.broken_barh([(0, end)], (-0.5, len(schedule)), facecolor="white", edgecolor="0.7")
    for rank, kind, m, start in bars:
        axis.barh(
            rank, TIME[kind], left=start, height=0.84, edgecolor="white",
            color=COLOURS[kind][m % 2],
        )  # fmt: skip
        axis.text(start + TIME[kind] / 2, rank, str(m), ha="center", va="center", fontsize=9)
    for rank, actions in enumerate(schedule):
        axis.text(end + 0.3, rank, str(most_under_way(actions)), va="center", fontsize=11)
    axis.text(end + 0.45, -0.75, "most kept", ha="center", va="center", fontsize=10)
    work = N_MICRO * sum(TIME.values())
    axis.set_title(f"{name}: idle for {1 - work / end:.1%} of {end}", fontsize=11, loc="left")
    axis.set_yticks(range(len(schedule)), [f"rank {rank}" for rank in range(len(schedule))])
    axis.set(ylim=(len(schedule) - 0.5, -0.5), xlim=(0, end))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)


def on_a_clock(schedule: list[list[tuple[str, int]]]) -> list[Bar]:
    """When each action starts, if messages take no time. Ranks that wait for ever just stop."""
    ended: dict[tuple[str, int, int], int] = {}
    bars: list[Bar] = []
    queues = [list(actions) for actions in schedule]
    clocks = [0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            if not queue:
                continue
            kind, m = queue[0]
            other = rank - 1 if kind == "forward" else rank + 1
            if 0 <= other < len(schedule) and (kind, other, m) not in ended:
                continue
            start = max(clocks[rank], ended.get((kind, other, m), 0))
            clocks[rank] = ended[kind, rank, m] = start + TIME[kind]
            bars.append((rank, kind, m, start))
            queue.pop(0)
            moved = True
    return bars


def most_under_way(actions: list[tuple[str, int]]) -> int:
    """The most micro-batches that have gone forward and not yet back."""
    most = now = 0
    for kind, _ in actions:
        now += 1 if kind == "forward" else -1
        most = max(most, now)
    return most
