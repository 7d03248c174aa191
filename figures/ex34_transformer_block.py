"""What reaches each block of a deep stack, with your own blocks of both kinds."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

D_MODEL, N_HEADS, D_FF, VOCAB_SIZE = 32, 4, 128, 50
DEPTHS = (6, 12, 24)
DRAWS = 8
KINDS = (("PostNormBlock", "post-norm"), ("PreNormBlock", "pre-norm"))
COLOURS = ("#c58b1b", "#3b6ea5", "#b5452c")


def draw(ex: Any) -> Figure:
    """Gradient norms by depth before any training, for stacks of 6, 12 and 24 blocks."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(
        "Fresh stacks: where the norm stands decides what gradient each block gets\n"
        "(your blocks with Xavier weights; a loss on random tokens, averaged over eight draws)"
    )
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (kind, title) in zip(axes, KINDS, strict=True):
        for depth, colour in zip(DEPTHS, COLOURS, strict=True):
            draws = [gradient_norms(ex, kind, depth, seed) for seed in range(DRAWS)]
            axis.plot(
                range(1, depth + 1), torch.stack(draws).mean(0), "o-",
                color=colour, markersize=3.5, label=f"{depth} blocks",
            )  # fmt: skip
        axis.set(title=title, xlabel="block, from the input")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("norm of the gradient of ff.w_2.weight")
    return figure


def gradient_norms(ex: Any, kind: str, depth: int, seed: int) -> torch.Tensor:
    """One number for each block, after one backward pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [getattr(ex, kind)(D_MODEL, N_HEADS, D_FF) for _ in range(depth)]
        for block in blocks:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    nn.init.xavier_normal_(parameter)
        x, head = torch.randn(4, 8, D_MODEL), torch.randn(VOCAB_SIZE, D_MODEL) / D_MODEL**0.5
        targets = torch.randint(VOCAB_SIZE, (4 * 8,))
    for block in blocks:
        x = block(x)
    if kind == "PreNormBlock":  # the sum has grown with every branch: a last norm reads it
        x = F.layer_norm(x, (D_MODEL,))
    F.cross_entropy((x @ head.T).flatten(0, 1), targets).backward()
    return torch.stack([block.ff.w_2.weight.grad.norm() for block in blocks])
