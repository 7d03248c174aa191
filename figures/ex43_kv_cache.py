"""The time of a token with and without a cache, measured on your own code."""

import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

N_HEADS, N_KV_HEADS, HEAD_DIM, LONGEST = 8, 2, 64, 768
EVERY = 48  # tokens


def draw(ex: Any) -> Figure:
    """One attention layer writes a text; the same again with everything computed anew."""
    q, k, v = (torch.randn(1, n, LONGEST, HEAD_DIM) for n in (N_HEADS, N_KV_HEADS, N_KV_HEADS))
    frequencies = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    cache = ex.KVCache(1, N_KV_HEADS, LONGEST, HEAD_DIM)
    lengths, cached, anew = [], [], []

    def attend(first: int, n: int, cache: Any) -> Tensor:
        rows = slice(first, n)
        return ex.attend_with_cache(q[:, :, rows], k[:, :, rows], v[:, :, rows], cache, frequencies)

    with torch.no_grad():
        for n in range(1, LONGEST + 1):
            if n % EVERY:
                attend(n - 1, n, cache)
                continue
            lengths.append(n)

            def decode(n: int = n) -> None:
                cache.length = n - 1
                attend(n - 1, n, cache)

            cached.append(_milliseconds(decode))
            anew.append(_milliseconds(lambda n=n: attend(0, n, None)))

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(lengths, anew, "o-", color="#b5452c", label="everything again (no cache)")
    axis.plot(lengths, cached, "o-", color="#3b6ea5", label="one new token (cache)")
    axis.set(
        title=f"With a cache, token {LONGEST} takes {cached[-1]:.2f} ms instead of {anew[-1]:.1f}",
        xlabel="tokens so far",
        ylabel="time for the next token (ms)",
        yscale="log",
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    axis.text(
        0.99,
        0.02,
        f"one layer of attention, {N_HEADS} query heads on {N_KV_HEADS}, float32, your machine",
        transform=axis.transAxes,
        ha="right",
        fontsize=8,
        color="0.4",
    )
    return figure


def _milliseconds(run: Callable[[], object], times: int = 5) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)  # what else runs on the machine only adds
