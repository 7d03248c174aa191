"""The masks as pictures, and the weights that are left under one, drawn by your own code."""

from types import ModuleType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

SEQ_LEN = 8
SEEN = ListedColormap(["#eceae4", "#3b6ea5"])  # hidden, seen


def draw(ex: ModuleType) -> Figure:
    """Five masks, and a softmax under the fifth."""
    n = SEQ_LEN
    documents = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    causal = ex.causal_mask(n, n)
    own_document = causal & ex.document_mask(documents)
    scores = np.random.default_rng(2).normal(size=(n, n))

    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle("Who may see whom: a row is a query, a column a key, and blue is seen")
    axes = figure.subplots(2, 3)
    _grid(axes[0, 0], causal, "causal_mask(8, 8)")
    _grid(axes[0, 1], ex.causal_mask(3, n), "causal_mask(3, 8): three new tokens")
    _grid(axes[0, 2], ex.sliding_window_mask(n, n, 3), "sliding_window_mask(8, 8, 3)")
    padding = ex.padding_mask(np.array([5]), n)[0]
    _grid(axes[1, 0], causal & padding, "causal & padding, 5 real tokens")
    _grid(axes[1, 1], own_document, "causal & document, 3 documents")
    weights = ex.masked_softmax(scores, own_document)
    image = _grid(axes[1, 2], weights, "masked_softmax under the mask at left")
    figure.colorbar(image, ax=axes[1, 2], label="weight (each row together 1)", shrink=0.8)
    return figure


def _grid(ax: Axes, values: np.ndarray, title: str):
    """Draw one cell for each query and key; queries are labelled by their positions."""
    n_queries, n_keys = values.shape
    is_mask = values.dtype == bool
    image = ax.imshow(
        values, cmap=SEEN if is_mask else "Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    if not is_mask:
        for query, key in zip(*np.nonzero(values > 0.005), strict=True):
            weight = values[query, key]
            colour = "white" if weight > 0.5 else "black"
            text = f"{weight:.2f}".lstrip("0")
            ax.text(key, query, text, ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(n_keys))
    ax.set_yticks(range(n_queries), range(n_keys - n_queries, n_keys))
    ax.set_xticks(np.arange(-0.5, n_keys), minor=True)
    ax.set_yticks(np.arange(-0.5, n_queries), minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("key's position", fontsize=9)
    ax.set_ylabel("query's position", fontsize=9)
    return image
