"""The figure of exercise 36: what the heads of a small GPT look at once it has learned to copy."""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

PERIOD, REPEATS, VOCAB_SIZE, STEPS = 8, 3, 16, 150
LAYERS, HEADS = 2, 2


def draw(ex: Any) -> Figure:
    """Train the GPT for two seconds to go on with rows of 8 random letters, said 3 times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(36)
        model = ex.GPT(ex.GPTConfig(VOCAB_SIZE, PERIOD * REPEATS, LAYERS, HEADS, d_model=32))
        loss = train(model)
        tokens = repeated(1)
    maps = attention_maps(model, tokens)
    letters = [string.ascii_uppercase[i] for i in tokens[0]]

    figure = Figure(figsize=(9.2, 9.4), layout="constrained")
    axes = figure.subplots(LAYERS, HEADS, sharex=True, sharey=True)
    for layer in range(LAYERS):
        for head in range(HEADS):
            axis = axes[layer, head]
            image = axis.imshow(maps[layer][head], vmin=0, vmax=1, cmap="magma_r")
            axis.plot(
                range(1, len(letters) - PERIOD + 1), range(PERIOD, len(letters)),
                color="tab:cyan", lw=7, alpha=0.3, solid_capstyle="round",
                label=f"the token that followed last time: position t − {PERIOD - 1}",
            )  # fmt: skip
            for at in range(PERIOD, len(letters), PERIOD):
                axis.axhline(at - 0.5, color="0.75", lw=0.6)
                axis.axvline(at - 0.5, color="0.75", lw=0.6)
            axis.set_xticks(range(len(letters)), letters, fontsize=8)
            axis.set_yticks(range(len(letters)), letters, fontsize=8)
            axis.set_title(f"block {layer}, head {head}", fontsize=11)
            if layer == LAYERS - 1:
                axis.set_xlabel("token looked at (key)")
            if head == 0:
                axis.set_ylabel("token that looks, at position t (query)")
    axes[0, 0].legend(loc="upper right", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.5, label="attention weight")
    figure.suptitle(
        f"To repeat {PERIOD} random letters, a head learns to look {PERIOD - 1} tokens back\n"
        f"(your GPT after {STEPS} training steps; loss on the repeats {loss:.2f},"
        " at the start ln 16 = 2.77)",
        fontsize=12,
    )
    return figure


def repeated(batch: int) -> Tensor:
    """Rows of PERIOD random tokens, repeated: (batch, PERIOD · REPEATS)."""
    return torch.randint(VOCAB_SIZE, (batch, PERIOD)).repeat(1, REPEATS)


def train(model: Any) -> float:
    """Teach the model the repeats; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        tokens = repeated(32)
        logits = model(tokens[:, :-1])[:, PERIOD - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, PERIOD:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def attention_maps(model: Any, tokens: Tensor) -> list[Tensor]:
    """The causal softmax of each block's q kᵀ / √head_dim: (n_heads, seq_len, seq_len) a block.

    A hook on `h.{i}.attn.c_attn`, a name that the exercise fixes, sees q and k go by. So this
    works with any way to write attention.
    """
    seen: list[Tensor] = []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda _module, _args, out: seen.append(out))
        for block in model.h
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()

    maps = []
    for qkv in seen:
        q, k, _ = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2)[0] for part in qkv.chunk(3, -1))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        maps.append(scores.masked_fill(future, float("-inf")).softmax(dim=-1))
    return maps
