"""Whether two outcomes of an attempt are alike, and how much it tells that they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kata.attempt import wire
from kata.attempt.outcome import Done, Problem, gravest
from kata.testing import compare

# Of an error's message: paths and addresses vary from run to run, numbers in their last digits.
VARYING = re.compile(r"\S*/\S*|0x[0-9a-f]+|<object object at .*?>")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+)")
# Narrower ones are taken for alike while they are far apart.
PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
PRECISE_NAMES = {str(dtype).removeprefix("torch.") for dtype in PRECISE}
TELLING = 4  # significant digits from which a number is hardly met by chance
ENOUGH = 3  # different such numbers that tell one fault from others


def same(a: list[Done], b: list[Done], in_failed: bool = True) -> bool:
    """Whether two outcomes are alike: results equal up to rounding, or the same error.

    In a failed spec the errors must say the same too, paths aside. In one that passed the error was
    asked for, and everybody has words of their own.
    """
    if len(a) != len(b):
        return False
    if (p := gravest(a)) and (q := gravest(b)):  # the other ranks may have been anywhere by then
        return p.types[0] == q.types[0] and (not in_failed or _say_the_same(p, q))
    for x, y in zip(a, b, strict=True):
        if x.problem or y.problem or x.changed != y.changed or bool(x.reached) != bool(y.reached):
            return False
        if x.result != y.result and compare(
            wire.decode(x.result), wire.decode(y.result), slack=10.0
        ):
            return False
    return True


def _say_the_same(p: Problem, q: Problem) -> bool:
    """The same words and, up to rounding, the same numbers, raised in the same function."""
    said = [VARYING.sub("", problem.message) for problem in (p, q)]
    if NUMBER.sub("", said[0]) != NUMBER.sub("", said[1]):
        return False
    a, b = ([float(n) for n in NUMBER.findall(text)] for text in said)
    return np.allclose(a, b, rtol=1e-3, atol=1e-6) and _place(p) == _place(q)


def _place(problem: Problem) -> str:
    """The function of the learner's file that the spec came into."""
    return problem.frames[0].function if problem.frames else ""


def telling(mine: list[Done], reference: list[Done]) -> int:
    """How many different numbers of many digits `mine` has where the reference has others.

    Tokens, truth values, counts and shapes are no such numbers, nor are errors, zeros, infinities
    and NaN: many faults share those.
    """
    seen: set[str] = set()
    for x, y in zip(mine, reference, strict=False):
        if not x.problem:
            theirs = dict(_leaves(wire.decode(y.result))) if not y.problem else {}
            for path, values in _leaves(wire.decode(x.result)):
                seen |= _digits(values, theirs.get(path))
    return len(seen)


def _digits(values: np.ndarray[Any, Any], others: np.ndarray[Any, Any] | None) -> set[str]:
    off = np.isfinite(values)
    if others is not None and others.shape == values.shape:
        with np.errstate(all="ignore"):
            off &= ~(np.abs(values - others) <= 1e-6 + 1e-4 * np.abs(others))
    written = {f"{v:.5g}" for v in np.abs(values[off]).ravel()[:256]}
    return {text for text in written if len(_significant(text)) >= TELLING}


def _significant(text: str) -> str:
    return text.partition("e")[0].replace(".", "").strip("0")


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The numbers of many digits in plain data, with where they stand."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(data, (list, tuple)):
        for i, value in enumerate(data):
            yield from _leaves(value, f"{path}[{i}]")
    elif isinstance(data, torch.Tensor):
        yield from _leaves(data.detach().numpy() if data.dtype in PRECISE else None, path)
    elif isinstance(data, (np.ndarray, np.generic, float, complex)):
        array = np.asarray(data)
        if array.dtype.name in PRECISE_NAMES:
            yield path, array
