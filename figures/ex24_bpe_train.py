"""A sentence in the tokens that your own code learns, with more and more merges."""

import heapq
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

SENTENCE = "Iterating over a dictionary’s keys is straightforward; café menus aren't."
N_MERGES = (0, 20, 100, 400, 1600)
COLOURS = ("#c9dcec", "#f1d3a8", "#cfdcae", "#e9c0b4", "#d8cbe6")


def draw(ex: ModuleType) -> Figure:
    """Top: the sentence cut into tokens. Bottom: how many bytes a token stands for."""
    manual = list(topics.values())  # Python's own manual
    seen, unseen = "\n".join(manual[::2]), "\n".join(manual[1::2])[:20_000]
    _, merges = ex.train_bpe(seen, 256 + N_MERGES[-1])

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(5, 4))
    for row, n in enumerate(N_MERGES):
        tokens = encode(ex, SENTENCE, merges[:n])
        write(top, tokens, -row)
        top.text(-1, -row, f"{n} merges", ha="right", va="center", fontsize=9)
        top.text(len(SENTENCE) + 1.4, -row, f"{len(tokens)} tokens", va="center", fontsize=9)
    top.set(xlim=(-10, len(SENTENCE) + 10), ylim=(0.6 - len(N_MERGES), 0.6))
    top.set_title("One sentence: each box is a token; a grey one is part of a letter")
    top.axis("off")

    steps = [0, 5, 10, 20, 50, 100, 200, 400, 800, N_MERGES[-1]]
    source = Path(heapq.__file__).read_text("utf-8")
    for text, label, colour in (
        (unseen, "other pages of the manual that it learnt from", "#3b6ea5"),
        (source, "Python source code, heapq.py", "#b5452c"),
    ):
        length = len(text.encode())
        per_token = [length / len(encode(ex, text, merges[:n])) for n in steps]
        bottom.plot(steps, per_token, "o-", color=colour, markersize=4, label=label)
    bottom.set_xscale("symlog", linthresh=10)
    bottom.set_xticks(steps, [str(n) for n in steps])
    bottom.minorticks_off()
    bottom.set(xlabel="merges", ylabel="bytes a token", ylim=(0.8, None))
    bottom.set_title("Texts like the one that it learnt from gain most")
    bottom.grid(axis="y", color="#e5e5e5")
    bottom.legend(frameon=False)
    return figure


def encode(ex: ModuleType, text: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The tokens of a text: in each word the earliest merge first (exercise 25)."""
    rank = {pair: i for i, pair in enumerate(merges)}
    known: dict[str, list[bytes]] = {}
    for word in set(ex.PRETOKEN.findall(text)):
        tokens = [bytes([byte]) for byte in word.encode()]
        while pairs := [pair for pair in pairwise(tokens) if pair in rank]:
            i = list(pairwise(tokens)).index(min(pairs, key=rank.__getitem__))
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
        known[word] = tokens
    return [token for word in ex.PRETOKEN.findall(text) for token in known[word]]


def write(axes, tokens: list[bytes], y: float) -> None:
    """Draw each token as a box around its letters. A letter of several bytes may span boxes."""
    x = 0.0
    for i, token in enumerate(tokens):
        letters = token.decode(errors="replace")
        part = "\N{REPLACEMENT CHARACTER}" in letters
        width = len(token) / 3 if part else len(letters)
        box = FancyBboxPatch(
            (x + 0.06, y - 0.34),
            width - 0.12,
            0.68,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="#bbbbbb" if part else COLOURS[i % len(COLOURS)],
            edgecolor="none",
        )
        axes.add_patch(box)
        for j, letter in enumerate("" if part else letters):
            axes.text(
                x + j + 0.5, y, letter, ha="center", va="center", fontsize=10, family="monospace"
            )
        x += width
