"""Where four heads look, read off the output of your own layer."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

WORDS = ["the", "cat", "sees", "the", "dog", "and", "it", "runs"]
NOUNS = ("cat", "dog")
N = len(WORDS)  # also head_dim, so that a value has room for one number per position
HEADS = (
    "head 0: the word before",
    "head 1: the same word",
    "head 2: nouns",
    "head 3: no preference",
)
D_MODEL = len(HEADS) * N
SHARP = 5.0  # the score, after scaling, of a key that a head looks for; all others have 0


def draw(ex: Any) -> Figure:
    """Plain heads above, causal ones below. The weights of the layer are set by hand."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    figure.suptitle(
        "One layer, four heads: each has a pattern of its own, and they all look at once\n"
        "(the value of a word is its place and o_proj changes nothing,"
        " so the output of your layer is the attention weights)",
        fontsize=12,
    )
    axes = figure.subplots(2, len(HEADS), sharex=True, sharey=True)
    for row, causal in zip(axes, (False, True), strict=True):
        weights = attention_weights(ex, causal)
        for head, axis in enumerate(row):
            image = axis.imshow(weights[head], vmin=0, vmax=1, cmap="magma_r")
            axis.set_xticks(range(N), WORDS, rotation=60)
            axis.set_yticks(range(N), WORDS)
            if causal:
                axis.set_xlabel("word looked at (key)")
            else:
                axis.set_title(HEADS[head], fontsize=11)
        row[0].set_ylabel(f"{'causal' if causal else 'plain'}\nword that looks (query)")
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    return figure


def attention_weights(ex: Any, causal: bool) -> Tensor:
    """What the layer gives for WORDS, cut into heads: (n_heads, query, key)."""
    layer = ex.MultiHeadAttention(D_MODEL, len(HEADS), causal).double()
    layer.load_state_dict(weights_by_hand())
    with torch.no_grad():
        out = layer(features()[None])
    return out[0].unflatten(-1, (len(HEADS), N)).transpose(0, 1)


def features() -> Tensor:
    """A word as d_model numbers: where it stands (N), which it is (N), whether it is a noun."""
    numbers = [WORDS.index(word) for word in WORDS]
    place, word = torch.eye(N), F.one_hot(torch.tensor(numbers), N)
    rest = torch.zeros(N, D_MODEL - 2 * N)
    rest[:, 0] = torch.tensor([word in NOUNS for word in WORDS])
    rest[:, 1] = 1.0  # always there, so that every query can ask for nouns
    return torch.cat([place, word, rest], dim=1).double()


def weights_by_hand() -> dict[str, Tensor]:
    """A projection's row says which features of a word make one number of q, k or v."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {f"{name}.weight": torch.zeros(D_MODEL, D_MODEL).double() for name in names}
    weights |= {f"{name}.bias": torch.zeros(D_MODEL).double() for name in names}
    q, k, v = (weights[f"{name}.weight"].view(len(HEADS), N, D_MODEL) for name in names[:3])
    place, word, noun, always = slice(0, N), slice(N, 2 * N), 2 * N, 2 * N + 1
    q[0, :, place], k[0, :, place] = torch.eye(N).roll(-1, 0), torch.eye(N)
    q[0, -1] = 0  # before the first word there is none
    q[1, :, word] = k[1, :, word] = torch.eye(N)
    q[2, 0, always] = k[2, 0, noun] = 1.0
    q *= SHARP * N**0.5  # the layer divides the scores by √head_dim
    v[:, :, place] = torch.eye(N)
    weights["o_proj.weight"] += torch.eye(D_MODEL)
    return weights
