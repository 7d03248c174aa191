"""Which of a spec's attempts was judged, and how it is shown."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from kata.attempt import wire
from kata.attempt.outcome import Attempted
from kata.summary import summary
from kata.testing import Mismatch

MOST = 10_000  # parts of a result that are looked at


def judged_call(given: Sequence[tuple[Attempted, Any]], error: BaseException) -> Attempted | None:
    """The one attempt whose result a mismatch is about, or None where it isn't sure.

    given: the attempts of a spec, each with what it returned

    A result is known again as the same object, or by its memory, which its views share.
    """
    if not isinstance(error, Mismatch):
        return None
    for judged in (error.pair[0], error.actual):
        found = [past for past, result in given if _has(result, judged)]
        if len(found) == 1:
            return found[0]
    return None


def _has(result: Any, judged: Any) -> bool:
    """Whether a value is a result, a part of it, or a view of one."""
    parts = list(islice(_parts(result), MOST))
    if any(judged is part and not _shared(part) for part in parts):
        return True
    mine = [span for part in islice(_parts(judged), MOST) if (span := _memory(part))]
    theirs = [span for part in parts if (span := _memory(part))]
    return any(a < d and c < b for a, b in mine for c, d in theirs)


def _shared(data: Any) -> bool:
    """Whether Python has one object for all values like this, so that it tells nothing."""
    if isinstance(data, (str, bytes, tuple)):
        return len(data) < 2
    if isinstance(data, int):
        return -5 <= data <= 256
    return data is None or isinstance(data, torch.dtype)


def _parts(data: Any) -> Iterator[Any]:
    """A value, and all that is in it."""
    yield data
    if isinstance(data, (list, tuple, dict)):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from _parts(inner)


def _memory(data: Any) -> tuple[int, int] | None:
    """Where the elements of a tensor or an array lie."""
    if isinstance(data, torch.Tensor):
        storage = data.untyped_storage()
        start = storage.data_ptr()
        return (start, start + storage.nbytes()) if start else None
    if isinstance(data, np.ndarray) and data.size:
        return np.lib.array_utils.byte_bounds(data)
    return None


def call_of(spec: Any, past: Attempted) -> str:
    """The attempt as a call: `attend(q: float64[3, 4], mask: None)`.

    spec: the module of the spec file, which has the function
    """
    args, kwargs = wire.decode(past.job.call)
    names = list(inspect.signature(getattr(spec, past.job.run)).parameters)[1:]
    names += [""] * (len(args) - len(names))
    named = [*zip(names, args, strict=False), *kwargs.items()]
    shown = ", ".join(f"{n}: {summary(v, values=False)}" if n else summary(v) for n, v in named)
    ranks = f" on {past.job.ranks} ranks" if past.job.ranks else ""
    return f"{past.job.run}({shown}){ranks}"
