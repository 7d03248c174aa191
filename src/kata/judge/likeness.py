"""Whether two outcomes of an attempt are alike, and how much it tells that they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kata.attempt import wire
from kata.attempt.outcome import Done, Problem, gravest
from kata.testing import TOLERANCES

# Of an error's message: paths, lines and addresses vary, and numbers in their last digits.
VARYING = re.compile(r"\S*/\S*|\w+\.py:\d+|0x[0-9a-f]+")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+)")
# Narrower ones are taken for alike while they are far apart.
PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
PRECISE_NAMES = {str(dtype).removeprefix("torch.") for dtype in PRECISE}
DIGITS = 4  # significant digits from which a number is hardly met by chance
WORD = 0.25  # what a word tells, beside such a number
FIRST = 64  # numbers of an array that are compared before the rest
SLACK = 10.0  # times the tolerance of specs: other ways to compute round otherwise


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
        if x.result != y.result and not _close(_read(x.result), _read(y.result)):
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


def refuses_otherwise(a: list[Done], b: list[Done], reference: list[Done]) -> bool:
    """Whether both raise an error of one type where the reference raises another.

    A check is missing then, and what comes instead says whatever the line says that trips over it.
    """
    p, q, asked = gravest(a), gravest(b), gravest(reference)
    return bool(p and q and asked and p.types[0] == q.types[0] != asked.types[0])


class Stance(IntEnum):
    """What an attempt says of a mistake: the later, the graver."""

    NOTHING = 0  # the mistake changes nothing there
    FOR = 1  # the learner's code does what the mistake does
    DOUBT = 2  # it does a third thing
    AGAINST = 3  # it is right where the mistake is wrong


def stance(mistake: list[Done], mine: list[Done], reference: list[Done]) -> Stance:
    """What my outcome says of a mistake: the gravest of what its parts say.

    Tuples, lists and dicts have parts. Of errors the type counts, since others use other words.
    """
    if any(done.problem for done in (*mistake, *mine, *reference)):
        if same(mistake, reference, in_failed=False):
            return Stance.NOTHING
        if same(mine, reference, in_failed=False):
            return Stance.AGAINST
        return Stance.FOR if same(mine, mistake, in_failed=False) else Stance.DOUBT
    found = Stance.NOTHING
    for wrong, own, right in zip(mistake, mine, reference, strict=True):
        changed = set(wrong.changed) - set(right.changed)
        if changed:
            found = max(found, Stance.FOR if changed <= set(own.changed) else Stance.AGAINST)
        if wrong.result != right.result:
            found = max(found, _stance(*(_read(done.result) for done in (wrong, own, right))))
    return found


def _stance(wrong: Any, mine: Any, right: Any) -> Stance:
    parts = [_parts(data) for data in (wrong, mine, right)]
    if parts[0] and parts[0].keys() == parts[1].keys() == parts[2].keys():
        return max(_stance(*(part[key] for part in parts)) for key in parts[0])
    if _close(wrong, right):
        return Stance.NOTHING
    if _close(mine, wrong) or _is_nearer(mine, wrong, right):
        return Stance.FOR
    return Stance.AGAINST if _close(mine, right) else Stance.DOUBT


@lru_cache(maxsize=1024)
def _read(result: bytes) -> Any:
    """Plain data; nobody writes into it. The same results are compared many times."""
    return wire.decode(result)


def _close(a: Any, b: Any) -> bool:
    """What `compare` of kata.testing finds equal, with more slack and without words for it."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    x, y = _array(a), _array(b)
    if x is None or y is None:
        return type(a) is type(b) and bool(a == b)
    untyped = {type(a), type(b)} & {int, float, complex}
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor) or x.shape != y.shape:
        return False
    if (x.dtype.kind == "b") != (y.dtype.kind == "b") or not (untyped or _dtype(a) == _dtype(b)):
        return False
    if x.dtype.kind not in "fc" and y.dtype.kind not in "fc":
        return bool((x == y).all())
    tolerances = [TOLERANCES.get(name, (0.0, 0.0)) for name in (_dtype(a), _dtype(b))]
    rtol, atol = (SLACK * max(both) for both in zip(*tolerances, strict=True))
    # Most that differ do so in the first few numbers.
    parts = [(x, y)] if x.size <= FIRST else [(x.flat[:FIRST], y.flat[:FIRST]), (x, y)]
    return all(np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True).all() for a, b in parts)


def _array(data: Any) -> np.ndarray[Any, Any] | None:
    """Numbers and truth values as an array NumPy can compute with."""
    if isinstance(data, torch.Tensor):
        if data.dtype not in PRECISE and (data.is_floating_point() or data.is_complex()):
            data = data.to(torch.complex128 if data.is_complex() else torch.float64)
        return np.asarray(data.detach().numpy())
    if isinstance(data, (np.ndarray, np.generic, bool, int, float, complex)):
        array = np.asarray(data)
        return array.astype(np.float64) if array.dtype.kind == "V" else array
    return None


def _dtype(data: Any) -> str:
    return str(data.dtype if hasattr(data, "dtype") else np.asarray(data).dtype).split(".")[-1]


def _parts(data: Any) -> dict[Any, Any]:
    """What a result is made of, by name or number; nothing if it is one piece."""
    if isinstance(data, dict):
        return data
    return dict(enumerate(data)) if isinstance(data, (list, tuple)) else {}


def _is_nearer(mine: Any, wrong: Any, right: Any) -> bool:
    """Whether mine lies with the wrong one: in narrow dtypes all three may pass for alike."""
    if not all(isinstance(x, torch.Tensor) and x.dtype.itemsize < 4 for x in (mine, wrong, right)):
        return False
    if not mine.shape == wrong.shape == right.shape:
        return False
    far = [(mine.double() - x.double()).abs().sum() for x in (wrong, right)]
    return bool(3 * far[0] < far[1])


def telling(mine: list[Done], reference: list[Done]) -> float:
    """How much it tells that somebody else also gives `mine`, where the reference gives other data.

    1 for each different number of many digits, and less for each word or id in a list. Truth
    values, counts, shapes and tokens in tensors tell nothing, nor do errors, zeros, infinities and
    NaN: many faults share those.
    """
    numbers: set[str] = set()
    words: set[Any] = set()
    for x, y in zip(mine, reference, strict=False):
        if not x.problem:
            theirs = dict(_leaves(_read(y.result))) if not y.problem else {}
            for path, value in _leaves(_read(x.result)):
                if isinstance(value, np.ndarray):
                    numbers |= _digits(value, theirs.get(path))
                elif path not in theirs or theirs[path] != value:
                    words.add(value)
    return len(numbers) + len(words) * WORD


def _digits(values: np.ndarray[Any, Any], others: Any) -> set[str]:
    off = np.isfinite(values)
    if isinstance(others, np.ndarray) and others.shape == values.shape:
        with np.errstate(all="ignore"):
            off &= ~(np.abs(values - others) <= 1e-6 + 1e-4 * np.abs(others))
    written = {f"{v:.5g}" for v in np.abs(values[off]).ravel()[:256]}
    return {text for text in written if len(_significant(text)) >= DIGITS}


def _significant(text: str) -> str:
    return text.partition("e")[0].replace(".", "").strip("0")


def _leaves(data: Any, path: str = "", inside: bool = False) -> Iterator[tuple[str, Any]]:
    """Arrays of precise numbers, words, and ids in lists, each with where it stands."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(data, (list, tuple)):
        for i, value in enumerate(data):
            yield from _leaves(value, f"{path}[{i}]", inside=True)
    elif isinstance(data, torch.Tensor):
        if data.dtype in PRECISE:
            yield path, data.detach().numpy()
    elif isinstance(data, (np.ndarray, np.generic, float, complex)):
        array = np.asarray(data)
        if array.dtype.name in PRECISE_NAMES:
            yield path, array
    elif isinstance(data, (str, bytes)) or (inside and type(data) is int):
        yield path, data
