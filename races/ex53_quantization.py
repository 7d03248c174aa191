"""Exercise 53 decoding the weights of a large layer: float32 bytes a second, beside gguf."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gguf
import numpy as np

from kata.racing import Race

ROWS, COLUMNS = 4096, 4096
KINDS = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
}


def race(ex: Any) -> Iterator[Race]:
    """All of them in one thread, as NumPy works."""
    x = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    for name, kind in KINDS.items():
        packed = gguf.quantize(x, kind)
        yield Race(
            name,
            partial(getattr(ex, f"dequantize_{name}"), packed),
            {
                "gguf": partial(gguf.dequantize, packed, kind),
                "a copy of the result": partial(copied, x),
            },
            amount=x.nbytes / 1e9,
            unit="GB/s",
        )


def copied(x: np.ndarray[Any, Any]) -> None:
    """What memory allows: nothing is computed."""
    x.copy()
