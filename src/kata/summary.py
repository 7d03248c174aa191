"""Any value in one short line, for verdicts.

A learner's result may be anything: an int of ten thousand digits, which Python refuses to print; a
list nested sixty deep; a view of stride 0 that would fill the memory. So nothing here depends on
the size of a value, and what cannot be shown is told by its kind.
"""

from __future__ import annotations

import math
import numbers
from itertools import islice
from typing import Any

import numpy as np
import torch

LARGE = 1_000_000  # elements: of more than this, only dtype and shape are told
ITEMS, DEPTH, TEXT = 4, 4, 80  # of a container, inside of each other, of a string
LINE = 400  # characters of all
BRACKETS = {list: "[]", tuple: "()", dict: "{}"}
DIGITS = 40  # of a whole number that is written out


def summary(data: Any, values: bool = True) -> str:
    """One line: dtype, shape, range, mean and spread; small values in full.

    Without `values`, tensors and arrays show their dtype and shape alone.
    """
    try:
        text = _summary(data, values, DEPTH)
    except Exception:  # an array of who knows what: its kind is better than no verdict
        text = kind_of(data)
    return text if len(text) <= LINE else text[: LINE - 1] + "…"


def _summary(data: Any, values: bool, depth: int) -> str:
    kind = kind_of(data)
    if kind in ("a tensor", "an array"):
        return _of_array(data, values)
    if type(data) in BRACKETS:
        opening, closing = (
            "{}" if isinstance(data, dict) else "[]" if isinstance(data, list) else "()"
        )
        if depth == 0:
            return f"{opening}…{closing}" if data else opening + closing
        shown = [_summary(x, values, depth - 1) for x in islice(data, ITEMS)]
        if isinstance(data, dict):
            values_shown = (_summary(x, values, depth - 1) for x in islice(data.values(), ITEMS))
            shown = [f"{key}: {value}" for key, value in zip(shown, values_shown, strict=True)]
        return opening + ", ".join(shown + ["…"] * (len(data) > ITEMS)) + closing
    if kind == "a number":
        return number(data)
    if isinstance(data, (str, bytes)) and len(data) > TEXT:
        unit = "characters" if isinstance(data, str) else "bytes"
        return f"{data[: TEXT - 20]!r}… ({len(data):,} {unit})"
    text = repr(data)
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _of_array(data: Any, values: bool) -> str:
    shape = shape_of(data)
    head = f"{dtype_of(data)}{list(shape)}" if shape else dtype_of(data)
    if not values:
        return head
    size = math.prod(shape)
    if size == 0:
        return f"{head} (empty)"
    if size > LARGE or not numeric(data):
        return head
    array = as_numpy(data)
    if size <= 8:
        text = np.array2string(array, precision=4, separator=", ", threshold=8, max_line_width=400)
        return f"{head} {' '.join(text.split())}"
    if array.dtype == bool:
        return f"{head} {int(array.sum())} of {size} true"
    if array.dtype.kind == "c":
        return head
    finite = array[np.isfinite(array)].astype(np.float64)
    text = head
    if finite.size:
        text += f" in [{number(finite.min())}, {number(finite.max())}]"
        with np.errstate(over="ignore", invalid="ignore"):
            text += f" μ {number(finite.mean())} σ {number(finite.std())}"
    odd = size - finite.size
    return text + (f", {odd} not finite" if odd else "")


def number(value: Any, digits: int = 5) -> str:
    """A number, a float with so many digits; a very long whole one by its length."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, numbers.Integral):
        return _whole(int(value))
    return f"{value:.{digits}g}"


def _whole(value: int) -> str:
    if abs(value) < 10**DIGITS:
        return str(value)
    length = 1 + int((abs(value).bit_length() - 1) * math.log10(2))  # or one digit more
    if length > 50_000:
        return f"an int of about {length:,} digits"
    return f"an int of {length + (abs(value) >= 10**length):,} digits"


def kind_of(data: Any) -> str:
    """What a value is, in words, whatever its shape and dtype."""
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


def shape_of(data: Any) -> tuple[int, ...]:
    """The shape; of plain numbers ()."""
    return tuple(data.shape) if hasattr(data, "shape") else ()


def dtype_of(data: Any) -> str:
    """The dtype's name; of a plain number the one that it becomes."""
    if hasattr(data, "dtype"):
        return str(data.dtype).removeprefix("torch.")
    for kind, name in ((bool, "bool"), (int, "int64"), (complex, "complex128")):
        if isinstance(data, kind):
            return name
    return "float64"


def numeric(data: Any) -> bool:
    """Whether it is numbers, and no array of objects, text, dates or records."""
    if isinstance(data, (torch.Tensor, numbers.Number)):
        return True
    return data.dtype.kind in "biufc" or data.dtype.type.__module__ == "ml_dtypes"


def as_numpy(data: Any) -> np.ndarray[Any, Any]:
    """A tensor, array or number as an array, of the same dtype where NumPy has it."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().resolve_conj().resolve_neg()
        try:
            data = data.numpy()
        except TypeError:  # bfloat16, float8 and complex32, which NumPy does not have
            data = data.to(torch.complex128 if data.is_complex() else torch.float64).numpy()
    return np.asarray(data)
