"""What a token leaves in the cache, and what a new one then costs, by your own code."""

import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure

# Published sizes: layers, heads, and what an MLA layer keeps. The heads have 128 features.
MODELS = {"DeepSeek-V2-Lite": (27, 16), "Kimi K2": (61, 64), "DeepSeek-V3": (61, 128)}
KV_RANK, ROPE_DIM, HEAD_DIM = 512, 64, 128
KINDS = {"MHA": "0.6", "GQA, 8 key heads": "#d9b44a", "MQA": "#6a9a58", "MLA": "#3b6ea5"}
SIZES = {
    "d_model": 512,
    "n_heads": 16,
    "q_rank": 192,
    "kv_rank": 128,
    "nope_dim": 32,
    "rope_dim": 16,
    "v_dim": 32,
}
LENGTHS = (64, 128, 256, 512, 1024, 2048)


def draw(ex: Any) -> Figure:
    """Bytes a token in all layers, and the time of the next token in both ways."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    a_token = _kept_for_a_token(ex)
    for place, (n_layers, n_heads) in enumerate(MODELS.values()):
        numbers = [2 * n_heads * HEAD_DIM, 2 * 8 * HEAD_DIM, 2 * HEAD_DIM, a_token]
        for row, ((kind, color), number) in enumerate(zip(KINDS.items(), numbers, strict=True)):
            y, kilobytes = place + 0.2 * (row - 1.5), 2 * n_layers * number / 1024
            label = kind if place == 0 else None
            left.barh(y, kilobytes, 0.18, color=color, label=label)
            left.text(1.08 * kilobytes, y, f"{kilobytes:,.0f}", va="center", fontsize=8)
    left.set(
        title=f"MLA keeps {a_token:g} numbers a token and layer, for any number of heads",
        xlabel="kilobytes of cache a token, all layers, 16 bits (log scale)",
        xscale="log",
        xlim=(8, 12_000),
        yticks=range(len(MODELS)),
        yticklabels=[f"{name}\n{n_heads} heads" for name, (_, n_heads) in MODELS.items()],
        ylim=(len(MODELS) - 0.5, -0.5),
    )
    left.legend(frameon=False, loc="upper right", fontsize=8)

    layer = ex.MultiHeadLatentAttention(**SIZES)
    ways = {
        "forward: keys and values of all tokens, anew": (layer, "#b5452c"),
        "absorbed: the latents themselves": (ex.absorb(layer), "#3b6ea5"),
    }
    for name, (run, color) in ways.items():
        times = [_milliseconds_of_a_token(ex, run, length) for length in LENGTHS]
        right.plot(LENGTHS, times, "o-", color=color, label=name)
    right.set(
        title="The next token, measured on your code",
        xlabel="tokens in the cache",
        ylabel="ms, one layer of 16 heads, float32",
        xscale="log",
        yscale="log",
        xticks=LENGTHS,
        xticklabels=LENGTHS,
    )
    right.minorticks_off()
    right.yaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, loc="upper left", fontsize=8)
    right.grid(alpha=0.3)
    for axis in (left, right):
        axis.title.set_fontsize(10)
    return figure


def _kept_for_a_token(ex: Any) -> float:
    """Numbers of reserved memory for each token, found from the memory itself."""
    max_len = 10
    cache = ex.LatentKVCache(1, max_len, KV_RANK, ROPE_DIM)
    held = cache.append(torch.zeros(1, 1, KV_RANK), torch.zeros(1, 1, ROPE_DIM))
    reserved = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    return sum(reserved.values()) / 4 / max_len


def _milliseconds_of_a_token(ex: Any, run: Callable[..., object], length: int) -> float:
    frequencies = 0.5 ** torch.arange(SIZES["rope_dim"] // 2, dtype=torch.float64)
    kv_rank, rope_dim, times = SIZES["kv_rank"], SIZES["rope_dim"], 10
    cache = ex.LatentKVCache(1, length + times, kv_rank, rope_dim)
    seconds = []
    with torch.no_grad():
        cache.append(torch.randn(1, length, kv_rank), torch.randn(1, length, rope_dim))
        for _ in range(times):
            x = torch.randn(1, 1, SIZES["d_model"])
            start = time.perf_counter()
            run(x, frequencies, cache)
            seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)  # what else runs on the machine only adds
