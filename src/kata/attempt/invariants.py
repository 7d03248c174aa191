"""What an attempt must leave as it found it: modes and settings that everybody shares.

A learner's code that switches gradients off for good, or seeds the global generators, works in its
own specs and breaks whatever runs after it. All katas are checked for that; what was left changed
fails the attempt, and is put back.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# What it is called, how it is read, how it is put back. All together take some ten microseconds.
STATES: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...] = (
    ("gradient mode", torch.is_grad_enabled, lambda on: torch.set_grad_enabled(on)),
    ("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("the number of threads", torch.get_num_threads, torch.set_num_threads),
    (
        "deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    (
        "autocast on the CPU",
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    (
        "the precision of float32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    ("np.seterr", np.geterr, lambda kept: np.seterr(**kept)),
    ("the current folder", os.getcwd, os.chdir),
    ("the limit of nested calls", sys.getrecursionlimit, sys.setrecursionlimit),
)

_numbers = np.random.MT19937(0)  # lent to np.random: quicker than to copy its state twice


class _Seeding:
    """Who seeds a global generator while an attempt runs: drawing from one is fine, this isn't.

    A spec may, in its own functions, and a state that was saved may be set again. So the calls are
    noted with their callers; torch's own generator also tells, since `initial_seed` changes.
    """

    def __init__(self) -> None:
        self.spec: dict[str, Any] | None = None  # globals of the spec whose attempt runs
        self.by_code: list[str] = []
        self.torch = 0
        self.random = self._noting("Python's random", random, "seed")
        self.numpy = self._noting("NumPy", np.random, "seed")
        for module in (torch, torch.random):
            self._noting("", module, "manual_seed")
            self._noting("", module, "set_rng_state", to_go_on=True)

    def _noting(
        self, name: str, module: Any, attribute: str, to_go_on: bool = False
    ) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(module, attribute)

        @functools.wraps(original)
        def seed(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if to_go_on or sys._getframe(1).f_globals is self.spec:
                self.torch = torch.initial_seed()
            elif name and self.spec is not None:
                self.by_code.append(name)
            return result

        setattr(module, attribute, seed)
        return original


_seeding = _Seeding()


@contextmanager
def kept(seed: int, spec: dict[str, Any]) -> Iterator[list[str]]:
    """Seed the global generators, and put all back; the list says what had been left changed.

    `spec`: the globals of the function that runs.
    """
    left: list[str] = []
    settings = [read() for _, read, _ in STATES]
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
    _seed(seed)
    outer, _seeding.spec = _seeding.spec, spec
    _seeding.by_code, _seeding.torch = [], torch.initial_seed()
    try:
        yield left
    finally:
        _seeding.spec = outer
        for (name, read, write), old in zip(STATES, settings, strict=True):
            if read() != old:
                left.append(f"{name} changed")
                write(old)
        seeded = _seeding.by_code + ["torch"] * (torch.initial_seed() != _seeding.torch)
        left += [f"the global generator of {name} seeded" for name in dict.fromkeys(seeded)]
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])  # type: ignore[attr-defined]
        torch.set_rng_state(states[2])


def _seed(seed: int) -> None:
    _seeding.random(seed)
    np.random.set_bit_generator(_numbers)  # type: ignore[attr-defined]
    _seeding.numpy(seed)
    # Not torch.manual_seed: without CUDA it formats a traceback at every call, for 1 ms.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
