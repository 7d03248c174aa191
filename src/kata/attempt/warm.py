"""What a process does before it is forked: imports, and nothing in torch or JAX.

One that has only imported may be forked safely, and its children need no second import. One that
has run torch or JAX operations must not: its threads do not exist in a child, but their locks do.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from kata.course.catalog import STEM, Exercise

ALWAYS = ("numpy", "torch", "einops", "pytest", "hypothesis", "kata.plugin")
# What torch imports at the first backward, mode or optimizer step: more than a second.
LATER = (
    "torch.distributed.tensor", "torch.utils.flop_counter", "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
)  # fmt: skip
IMPORTS = (*ALWAYS, *LATER)


def is_cold() -> bool:
    """Whether an operation here may still have to import what takes seconds."""
    return LATER[-1] not in sys.modules


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


def processor_time(pid: int) -> float:
    """Seconds that a process has computed; endless where nobody can tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def warm_up(exercise: Exercise) -> None:
    """In a child, and ahead: what the first operation would pay for, thread pools and backends."""
    (torch.ones(256, 256) @ torch.ones(256, 256)).sum()
    if "jax" in exercise.imports:
        import jax.numpy as jnp

        jnp.ones(2).block_until_ready()


@contextmanager
def silence(really: bool = True) -> Iterator[None]:
    """What is printed by anybody goes nowhere (a spec's own output is captured by pytest)."""
    if not really:
        yield
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(fd) for fd in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for fd in (1, 2):
            os.dup2(nowhere.fileno(), fd)
    try:
        yield
    finally:
        for fd, old in zip((1, 2), kept, strict=True):
            os.dup2(old, fd)
            os.close(old)
