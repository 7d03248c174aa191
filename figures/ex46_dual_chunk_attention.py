"""How far each key is behind each query, read off the weights of your own attention."""

import math
from types import ModuleType

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

SEQ_LEN, CHUNK, CONTEXT = 20, 6, 10
KINDS = {"intra": "Blues", "successive": "Oranges", "inter": "Greens"}  # and their colours
UNSEEN = "#b2182b"  # a distance that the model never met in training


def draw(ex: ModuleType) -> Figure:
    """Plain positions, in one chunk that holds the whole text, beside three kinds of them."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_distances(left, distances(ex, SEQ_LEN, SEQ_LEN + 1), SEQ_LEN)
    left.set_title(f"One chunk: distances up to {SEQ_LEN - 1}", fontsize=11)
    left.set_ylabel("query i")
    draw_distances(right, distances(ex, CHUNK, CONTEXT), CHUNK)
    right.set_title(
        f"Chunks of {CHUNK}, trained on {CONTEXT}: no distance above {CONTEXT - 1}", fontsize=11
    )
    handles = [
        Patch(color=matplotlib.colormaps[name](0.5), label=kind) for kind, name in KINDS.items()
    ]
    handles.append(Patch(color=UNSEEN, label=f"unknown: above {CONTEXT - 1}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle(
        f"How far each key is behind each query, for a model that knows 0 to {CONTEXT - 1}"
    )
    return figure


def distances(ex: ModuleType, chunk_size: int, context_len: int) -> Tensor:
    """What the attention takes for the distance of query and key: (query, key).

    All queries and keys are the same vector, so a score is the cosine of the angle between them.
    The values are unit vectors, so the result of a query is its weights. And a weight over that of
    the query's own token, at distance 0, is exp(score − 1).
    """
    angle = math.pi / (2 * SEQ_LEN)  # per position
    q = torch.tensor([2**0.25, 0.0]).double().expand(1, 1, SEQ_LEN, 2)  # √2 / √head_dim = 1
    v = torch.eye(SEQ_LEN).double()[None, None]
    frequencies = torch.tensor([angle]).double()
    weights = ex.dual_chunk_attention(q, q, v, frequencies, chunk_size, context_len)[0, 0]
    cosines = 1 + torch.log(weights / weights.diagonal()[:, None])
    return torch.acos(cosines.nan_to_num().clamp(-1, 1)) / angle


def draw_distances(axis: Axes, found: Tensor, chunk_size: int) -> None:
    """A coloured square with its number for each pair, and lines between the chunks."""
    kinds = list(KINDS)
    for i in range(SEQ_LEN):
        for j in range(i + 1):
            distance = round(float(found[i, j]))
            kind = kinds[min(i // chunk_size - j // chunk_size, 2)]
            shade = matplotlib.colormaps[KINDS[kind]](0.12 + 0.58 * distance / CONTEXT)
            unseen = distance >= CONTEXT
            axis.add_patch(
                Rectangle(
                    (j - 0.5, i - 0.5),
                    1,
                    1,
                    facecolor=UNSEEN if unseen else shade,
                    edgecolor="white",
                )
            )
            colour = "white" if unseen else "black"
            axis.text(j, i, str(distance), ha="center", va="center", fontsize=8, color=colour)
    for border in range(chunk_size, SEQ_LEN, chunk_size):
        axis.plot([-0.5, border - 0.5], [border - 0.5] * 2, color="black", linewidth=1)
        axis.plot([border - 0.5] * 2, [border - 0.5, SEQ_LEN - 0.5], color="black", linewidth=1)
    axis.set_xlim(-0.5, SEQ_LEN - 0.5)
    axis.set_ylim(SEQ_LEN - 0.5, -0.5)
    axis.set_aspect("equal")
    axis.set_xticks(range(0, SEQ_LEN, 2))
    axis.set_yticks(range(0, SEQ_LEN, 2))
    axis.set_xlabel("key j")
