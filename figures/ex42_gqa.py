"""Which head of queries reads which head of keys and values, found out by your own code."""

from typing import Any

import torch
from matplotlib.figure import Figure

N_HEADS, HEAD_DIM = 8, 64


def draw(ex: Any) -> Figure:
    """Each key and value head gets values that name it: what a query head brings back tells."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(
        "Fewer heads of keys and values: neighbouring query heads share one, and the cache shrinks"
    )
    axes = figure.subplots(1, 4, width_ratios=(8, 5, 4, 4))
    names = ("multi-head", "grouped", "grouped", "multi-query")
    for axis, n_kv_heads, name in zip(axes, (8, 4, 2, 1), names, strict=True):
        q, k = torch.randn(1, N_HEADS, 1, 4), torch.randn(1, n_kv_heads, 3, 4)
        v = torch.eye(n_kv_heads).view(1, n_kv_heads, 1, n_kv_heads).expand(-1, -1, 3, -1)
        reads = ex.grouped_query_attention(q, k, v)[0, :, 0]  # (n_heads, n_kv_heads)
        axis.imshow(reads, cmap="Purples", vmin=0, vmax=1.4)
        axis.set_xticks(range(n_kv_heads))
        axis.set_yticks(range(N_HEADS))
        axis.set_xticks([j + 0.5 for j in range(n_kv_heads - 1)], minor=True)
        axis.set_yticks([i + 0.5 for i in range(N_HEADS - 1)], minor=True)
        axis.grid(which="minor", color="0.85")
        axis.tick_params(which="both", length=0)
        kilobytes = 2 * n_kv_heads * HEAD_DIM * 2 / 1024
        axis.set_title(f"{name}\nn_kv_heads {n_kv_heads}", fontsize=10)
        axis.set_xlabel(f"{kilobytes:g} kB\na token", fontsize=9)
    axes[0].set_ylabel("query head")
    figure.supxlabel(
        "key and value head; below, what one layer's cache holds for a token"
        f" (head_dim {HEAD_DIM}, bfloat16)",
        fontsize=10,
    )
    return figure
