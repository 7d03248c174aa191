"""What a process does before it is forked: imports, and nothing in torch or JAX."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from contextlib import suppress

import torch

from kata.course.catalog import STEM, Exercise

# What torch imports at the first backward, mode or optimizer step is named too.
IMPORTS = (
    "numpy", "torch", "torch.distributed.tensor", "torch.utils.flop_counter", "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes", "einops", "pytest", "hypothesis", "kata.learn.verdict",
)  # fmt: skip


def prepare_environment() -> None:
    """What must be set before JAX or Triton is imported, wherever the specs are started from."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    # Counting GPUs through NVML leaves CUDA untouched, so that children may still be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX's katas shard over eight CPU devices


def import_all(names: Iterable[str]) -> None:
    """Import what is there; a child will complain of what is not."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    prepare_environment()  # before torch._dynamo imports triton
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


def outside(exercise: Exercise) -> list[str]:
    """The modules of other packages that an exercise and its parts import."""
    stems = (exercise.stem, *exercise.parts)
    names = {name for stem in stems for name in Exercise(exercise.root, stem).modules}
    return sorted(name for name in names if not STEM.fullmatch(name))
