"""The figure of exercise 36: where the heads of a small GPT look, before and after it learns."""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

PERIOD, REPEATS, VOCAB_SIZE, HEADS, STEPS = 8, 3, 16, 2, 200


def draw(ex: Any) -> Figure:
    """Train the GPT for two seconds to go on with rows of 8 random letters, said 3 times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(36)
        model = ex.GPT(ex.GPTConfig(VOCAB_SIZE, PERIOD * REPEATS, 1, HEADS, d_model=32))
        tokens = torch.randperm(VOCAB_SIZE)[:PERIOD].repeat(REPEATS)[:-1]
        fresh = attention_maps(model, tokens[None])
        loss = train(model)
        learned = attention_maps(model, tokens[None])

    letters = [string.ascii_uppercase[i] for i in tokens]
    ticks = range(len(letters))
    marked = [
        (t, s) for t in ticks for s in ticks if s <= t - PERIOD + 1 and (t + 1 - s) % PERIOD == 0
    ]
    figure = Figure(figsize=(9, 9.6), layout="constrained")
    axes = figure.subplots(HEADS, 2, sharex=True, sharey=True)
    for head in range(HEADS):
        for axis, maps, when in (
            (axes[head, 0], fresh, "fresh"),
            (axes[head, 1], learned, "trained"),
        ):
            image = axis.imshow(maps[head], vmin=0, vmax=1, cmap="magma_r")
            axis.scatter(
                [s for _, s in marked], [t for t, _ in marked],
                s=80, marker="s", facecolors="none", edgecolors="tab:cyan",
                label="the letter that comes next",
            )  # fmt: skip
            share = sum(float(maps[head][cell]) for cell in marked) / (len(letters) - PERIOD + 1)
            axis.set_title(f"head {head}, {when}: {share:.0%} on the marked letters", fontsize=11)
            axis.set_xticks(ticks, letters, fontsize=8)
            axis.set_yticks(ticks, letters, fontsize=8)
    axes[0, 1].legend(loc="upper right", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("letter looked at (key)")
    for axis in axes[:, 0]:
        axis.set_ylabel("letter that looks (query)")
    figure.colorbar(image, ax=axes, shrink=0.5, label="attention weight")
    figure.suptitle(
        f"To say {PERIOD} random letters again, a head learns to look where the next one stood\n"
        f"(your GPT with one block, trained just now for {STEPS} steps:"
        f" loss on the repeats {loss:.2f}, by guessing {torch.tensor(VOCAB_SIZE).log():.2f})",
        fontsize=12,
    )
    return figure


def train(model: Any) -> float:
    """Teach the model to repeat; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB_SIZE, (32, PERIOD)).repeat(1, REPEATS)
        logits = model(tokens[:, :-1])[:, PERIOD - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, PERIOD:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def attention_maps(model: Any, tokens: Tensor) -> Tensor:
    """The causal softmax of q kᵀ / √head_dim in the first block: (n_heads, seq_len, seq_len).

    A hook on `h.0.attn.c_attn`, a name that the exercise fixes, sees q and k go by. So this
    works with any way to write attention.
    """
    seen: list[Tensor] = []
    layer = model.get_submodule("h.0.attn.c_attn")
    hook = layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        model(tokens)
    hook.remove()

    q, k, _ = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2)[0] for part in seen[0].chunk(3, -1))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)
