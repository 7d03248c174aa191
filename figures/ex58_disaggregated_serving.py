"""The figure of exercise 58: what a prefill and a decode rank do, and what each request sees of it.

Each rank is a process that runs this very file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Tokens of the prompt and tokens to write; all arrive at the same time. The sizes of the prompts
# tell whose cache it is.
SIZES = ((300, 60), (80, 60), (500, 25), (160, 70), (700, 30), (240, 35))
N_SLOTS = 3
COLORS = ("#3b6ea5", "#d9b44a", "#b5452c", "#6a9a5b", "#8064a2", "#6b6b6b")

Event = tuple[str, int, float, float]  # kind, request, start, end


def draw(ex: Any) -> Figure:
    """Serve on 1 + 1 ranks, and draw when each was busy with what."""
    events = measured(ex.__file__)
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    ranks, requests = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    draw_ranks(ranks, events)
    draw_requests(requests, events)
    figure.suptitle(
        f"Your two ranks, {len(SIZES)} requests that arrive at once, {N_SLOTS} slots: "
        "when each was busy",
        fontsize=13,
    )
    return figure


def draw_ranks(axis: Axes, events: list[Event]) -> None:
    last = max(end for *_, end in events)
    for kind, i, start, end in events:
        row = 0 if kind == "prefill" else 1
        axis.barh(row, end - start, left=start, height=0.75, color=COLORS[i])
        if kind == "prefill" and end - start > 0.03 * last:  # wide enough for its number
            n_prompt, _ = SIZES[i]
            axis.text(
                (start + end) / 2, row, f"{n_prompt}", ha="center", va="center", color="white",
                fontsize=9,
            )  # fmt: skip
    for i in range(len(SIZES)):
        axis.annotate(
            "", (begins(events, "decode", i), 0.6), (ends(events, "prefill", i), 0.4),
            arrowprops={"arrowstyle": "->", "color": COLORS[i], "lw": 1.4},
        )  # fmt: skip
    axis.set_yticks([0, 1], ["prefill rank", "decode rank"])
    axis.set_ylim(1.5, -0.5)
    axis.set_title(
        "What the ranks do: a prompt's tokens at once, then a token of each text in turn; "
        "arrows: a cache that was sent, until it is used",
        fontsize=10, loc="left",
    )  # fmt: skip
    bare(axis)


def draw_requests(axis: Axes, events: list[Event]) -> None:
    last = max(end for *_, end in events)
    for i, (_, n_new) in enumerate(SIZES):
        read, read_end = begins(events, "prefill", i), ends(events, "prefill", i)
        write, write_end = begins(events, "decode", i), ends(events, "decode", i)
        axis.barh(i, read, height=0.6, color="0.9")
        axis.barh(i, read_end - read, left=read, height=0.6, color=COLORS[i])
        axis.barh(i, write - read_end, left=read_end, height=0.6, color="0.9", hatch="////",
                  edgecolor="0.7", lw=0)  # fmt: skip
        axis.barh(i, write_end - write, left=write, height=0.6, color=COLORS[i], alpha=0.3)
        tokens = [end for kind, which, _, end in events if (kind, which) == ("decode", i)]
        axis.vlines(tokens, i - 0.3, i + 0.3, color=COLORS[i], lw=0.9)
        tpot = (write_end - read_end) / (n_new - 1)
        axis.text(
            last * 1.01, i, f"TTFT {read_end:.0f} ms, TPOT {tpot:.1f} ms", va="center", fontsize=9
        )
    axis.set_yticks(range(len(SIZES)), [f"request {i}" for i in range(len(SIZES))])
    axis.set(ylim=(len(SIZES) - 0.4, -0.6), xlim=(0, last * 1.21), xlabel="milliseconds")
    axis.set_title("What the requests see", fontsize=10, loc="left")
    axis.legend(
        handles=[
            Patch(color="0.9", label="waits to be read"),
            Patch(color="0.4", label="prompt is read; its end is the first token"),
            Patch(facecolor="0.9", edgecolor="0.7", hatch="////", label="cache waits for a slot"),
            Patch(color="0.7", label="written, each line a token"),
        ],
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9,
    )  # fmt: skip
    bare(axis)


def bare(axis: Axes) -> None:
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)


def begins(events: list[Event], kind: str, i: int) -> float:
    return min(start for k, which, start, _ in events if (k, which) == (kind, i))


def ends(events: list[Event], kind: str, i: int) -> float:
    return max(end for k, which, _, end in events if (k, which) == (kind, i))


# --- the measurement -----------------------------------------------------------------------------


def measured(path: str) -> list[Event]:
    """Serve on two processes. Times in milliseconds from when both were ready."""
    store = tempfile.mktemp()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, path, store, str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        out = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, said) in zip(ranks, out, strict=True):
        if unwritten := re.search(r"exercise \d\d is not written yet", said):
            raise NotImplementedError(unwritten[0])
        if rank.returncode:
            raise RuntimeError((said.strip() or "a rank died").splitlines()[-1])
    events = [tuple(event) for printed, _ in out for event in json.loads(printed)]
    start = min(event[2] for event in events)
    return [(kind, i, 1e3 * (a - start), 1e3 * (b - start)) for kind, i, a, b in events]


def serve_and_watch(path: str, store: str, rank: int) -> list[Event]:
    import torch
    import torch.distributed as dist

    from kata.attempt import modules

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    modules.use_parts(Path(__file__).parents[1] / "solutions")
    ex = modules.load(Path(path))
    from ex44_llama import Llama, LlamaConfig

    torch.manual_seed(0)
    model = Llama(LlamaConfig(2000, 512, 1024, 6, 8, 4, 10_000.0, 1e-5, True))
    requests = [(torch.randint(2000, (n_prompt,)), n_new) for n_prompt, n_new in SIZES]
    events: list[Event] = []
    begun: list[Any] = []

    def enter(_: Any, args: Any) -> None:
        begun[:] = [args[2].length, args[0].shape[1], time.monotonic()]

    def leave(*_: Any) -> None:
        length, n_new, start = begun
        n_read = length or n_new
        which = next(i for i, (n, more) in enumerate(SIZES) if n <= n_read < n + more)
        kind = "decode" if length else "prefill"
        events.append((kind, which, start, time.monotonic()))

    with torch.no_grad():
        for _ in range(5):
            model(requests[0][0][None])
    dist.barrier()
    hooks = [model.blk[0].register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    ex.serve(model, requests, 1, N_SLOTS)
    for hook in hooks:
        hook.remove()
    dist.barrier()
    return events


if __name__ == "__main__":
    print(json.dumps(serve_and_watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
