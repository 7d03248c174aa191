"""The graph of a small expression, drawn by your own Values: numbers forward, slopes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

LEAVES = {"a": 2.0, "b": -3.0, "c": 9.0}
STEPS: dict[str, tuple[str, str, Callable[..., Any]]] = {  # name: formula, parents, step
    "m": ("m = a · b", "ab", lambda a, b: a * b),
    "s": ("s = m + c", "mc", lambda m, c: m + c),
    "q": ("q = s²", "s", lambda s: s**2),
    "y": ("y = q + s", "qs", lambda q, s: q + s),
}
PLACES = {"a": (0, 1.9), "b": (0, 0), "m": (3.3, 0.95), "c": (3.3, -1)}
PLACES |= {"s": (6.6, 0), "q": (8.9, 1.45), "y": (11.2, 0)}
WIDTH, HEIGHT = 1.5, 0.9
FORWARD, BACK, GREY = "#3b6ea5", "#b5452c", "#777777"
KEY = (
    ("the number, found from left to right", FORWARD),
    ("the slope of y in it, found from right to left", BACK),
    ("on an arrow: the step's own slope × the slope that comes back = what is sent on", BACK),
    ("in a circle: the turn in which a value sends its slope on to its parents", GREY),
)


def draw(ex: Any) -> Figure:
    """Draw y = s² + s with s = a · b + c, after one backward call."""
    values = {name: ex.Value(number) for name, number in LEAVES.items()}
    for name, (_, parents, step) in STEPS.items():
        values[name] = step(*(values[parent] for parent in parents))
    values["y"].backward()
    order = [id(value) for value in reversed(ex.topological_order(values["y"]))]
    turns = sorted(STEPS, key=lambda name: order.index(id(values[name])))

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(
        "y = s² + s with s = a · b + c: one walk back finds the slope of y in every value"
    )
    axes = figure.subplots()
    axes.set(xlim=(-1.1, 12.3), ylim=(-2.6, 2.7))
    axes.set_axis_off()
    for name, (_, parents, step) in STEPS.items():
        own_slopes = slopes_alone(ex, step, [values[parent].data for parent in parents])
        for parent, slope in zip(parents, own_slopes, strict=True):
            arrow(axes, parent, name, slope, values[name].grad)
    for name, value in values.items():
        box(axes, name, value, turns.index(name) + 1 if name in STEPS else None)

    axes.text(
        6.6, -0.62, "s is used twice:\nwhat comes back\nadds up, 6 + 1", **small(GREY), va="top"
    )
    for i, (text, colour) in enumerate(KEY):
        across, down = divmod(i, 2)
        axes.text(-1 + 5.2 * across, -2.05 - 0.36 * down, text, color=colour, fontsize=10)
    return figure


def slopes_alone(ex: Any, step: Callable[..., Any], numbers: list[float]) -> list[float]:
    """The slopes of one step by itself: the same step on fresh leaves."""
    leaves = [ex.Value(number) for number in numbers]
    step(*leaves).backward()
    return [leaf.grad for leaf in leaves]


def small(colour: str) -> dict[str, Any]:
    return {"color": colour, "fontsize": 9, "ha": "center"}


def box(axes: Axes, name: str, value: Any, turn: int | None) -> None:
    """A value: its formula, its number, its slope, and when it sends the slope on."""
    x, y = PLACES[name]
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="#f7f5f0", edgecolor="#555555",
        )
    )  # fmt: skip
    centred = {"ha": "center", "va": "center"}
    axes.text(x, y + 0.2, STEPS[name][0] if name in STEPS else name, fontsize=12, **centred)
    for place, number, colour in ((-0.36, value.data, FORWARD), (0.36, value.grad, BACK)):
        axes.text(x + place, y - 0.2, signed(number), color=colour, fontsize=14, **centred)
    if turn:
        circle = {"boxstyle": "circle,pad=0.22", "facecolor": "white", "edgecolor": GREY}
        axes.text(x, y + HEIGHT / 2 + 0.26, str(turn), **small(GREY), va="center", bbox=circle)


def arrow(axes: Axes, parent: str, name: str, slope: float, arrived: float) -> None:
    """From a value to one that was made from it; on the arrow, what comes back along it."""
    (x, y), (to_x, to_y) = PLACES[parent], PLACES[name]
    x, to_x = x + WIDTH / 2, to_x - WIDTH / 2
    line = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.2, "shrinkA": 0}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=line)
    text = f"{signed(slope)} × {signed(arrived)} = {signed(slope * arrived)}"
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text((x + to_x) / 2, (y + to_y) / 2, text, **small(BACK), va="center", bbox=ground)


def signed(number: float) -> str:
    return f"{number:g}".replace("-", "−")
