"""One attempt in this process: arguments from bytes, random states set and put back."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from kata.attempt import wire
from kata.attempt.forbidden import forbidding
from kata.attempt.invariants import kept
from kata.attempt.outcome import Done, problem

Run = Callable[..., Any]


def perform(
    run: Run, module: Any, call: bytes, seed: int, device: str = "cpu"
) -> tuple[Done, BaseException | None]:
    """Run once on a module. The random states are set from the seed, and put back afterwards."""
    args, kwargs = wire.decode(call)
    if device != "cpu":
        args, kwargs = _on(device, (args, kwargs))
        call = wire.encode((args, kwargs))
    left: list[str] = []
    start = time.perf_counter()
    try:
        without = run.__globals__.get("WITHOUT", ())
        with kept(seed, run.__globals__) as left, forbidding(without) as reached:
            result = run(module, *args, **kwargs)
        done = Done(wire.encode(result), seconds=time.perf_counter() - start)
    except (Exception, SystemExit) as error:
        files = {str(getattr(module, "__file__", ""))}
        done = Done(problem=problem(error, files), left=left, seconds=time.perf_counter() - start)
        return done, error
    done.changed = _changed(run, call, args, kwargs)
    done.reached, done.left = next(iter(reached), ""), left
    return done, None


def _on(device: str, data: Any) -> Any:
    """The same data with every tensor on a device."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, (list, tuple)):
        return type(data)(_on(device, x) for x in data)
    if isinstance(data, dict):
        return {key: _on(device, value) for key, value in data.items()}
    return data


def _changed(run: Run, call: bytes, args: Any, kwargs: Any) -> list[str]:
    if wire.encode((args, kwargs)) == call:
        return []
    names = list(inspect.signature(run).parameters)[1:]
    old_args, old_kwargs = wire.decode(call)
    names += [f"argument {i}" for i in range(len(names), len(args))]
    new = dict(zip(names, args, strict=False)) | kwargs
    old = dict(zip(names, old_args, strict=False)) | old_kwargs
    return [name for name in old if wire.encode(old[name]) != wire.encode(new[name])]
