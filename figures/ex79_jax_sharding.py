"""The figure of exercise 79: which device holds which block, under three ways to share the work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.sharding import PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BATCH, D_MODEL, D_FF = 16, 8, 24
ARRAYS = {"x": "x, a batch of 16 rows", "w_up": "w_up, 8 × 24", "w_down": "w_down, 24 × 8"}


def draw(ex: Any) -> Figure:
    """Compile the learner's three ways for 8 devices and draw the blocks that each one asks for."""
    params = {
        "w_up": np.ones((D_MODEL, D_FF), np.float32),
        "b_up": np.zeros(D_FF, np.float32),
        "w_down": np.ones((D_FF, D_MODEL), np.float32),
        "b_down": np.zeros(D_MODEL, np.float32),
    }
    x = np.ones((BATCH, D_MODEL), np.float32)
    tall, wide = ex.make_mesh(8, 1), ex.make_mesh(2, 4)
    plain = ex.data_parallel_step(tall, loss, 0.1, P())
    fsdp = ex.data_parallel_step(tall, loss, 0.1, ex.fsdp_specs(tall, params))
    ways = {
        "Data parallel\nmesh 8 × 1": plain,
        "FSDP\nmesh 8 × 1": fsdp,
        "Data × tensor parallel\nmesh 2 × 4": lambda p, x: ex.tensor_parallel_mlp(wide, p, x),
    }

    figure = Figure(figsize=(10, 8.6), layout="constrained")
    axes = figure.subplots(3, 3, height_ratios=(16, 9, 24))
    for column, (title, function) in enumerate(ways.items()):
        (param_shardings, x_sharding), _ = (
            jax.jit(function).lower(params, x).compile().input_shardings
        )
        held = {"x": (x, x_sharding)}
        held |= {name: (params[name], param_shardings[name]) for name in ("w_up", "w_down")}
        for row, (name, label) in enumerate(ARRAYS.items()):
            share = draw_blocks(axes[row, column], *held[name])
            axes[row, column].set_xlabel(f"{label}: {share}", fontsize=10)
        axes[0, column].set_title(title, fontsize=12)
    figure.suptitle(
        "Who holds what: your shardings on eight devices\n"
        "the numbers in a block are the devices that hold it",
        fontsize=13,
    )
    return figure


def loss(params: Any, x: Any) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w_up"] + params["b_up"])
    return jnp.mean((hidden @ params["w_down"] + params["b_down"] - x) ** 2)


def draw_blocks(axis: Axes, array: np.ndarray, sharding: Any) -> str:
    """Draw an array as a rectangle of blocks; returns what one device holds of it, in words."""
    rows, columns = array.shape
    holders: dict[tuple[int, int, int, int], list[int]] = {}
    for device, index in sharding.devices_indices_map(array.shape).items():
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(index, array.shape, strict=True)
        )
        holders.setdefault((top, bottom, left, right), []).append(device.id)
    colours = matplotlib.colormaps["Set2"].colors
    for (top, bottom, left, right), devices in sorted(holders.items()):
        everywhere = len(devices) == 8
        axis.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top,
                facecolor="0.9" if everywhere else colours[min(devices) % len(colours)],
                edgecolor="white", linewidth=1.5,
            )
        )  # fmt: skip
        text = "on all eight" if everywhere else " ".join(map(str, sorted(devices)))
        upright = right - left < 4 and bottom - top > 4 and len(devices) > 1
        axis.text(
            (left + right) / 2, (top + bottom) / 2, text,
            ha="center", va="center", fontsize=9, rotation=90 if upright else 0,
        )  # fmt: skip
    axis.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)
    part = array.size // int(np.prod(sharding.shard_shape(array.shape)))
    return "whole on each device" if part == 1 else f"1/{part} on each device"
