"""Exercise 53: quantised weights, as files hold them.

A weight matrix is cut into blocks of 32 numbers that lie side by side in a row. Each block keeps
one scale and 32 small integers, so that most of what is read from memory is a byte a number, or
half of one. Three formats, byte by byte (all in little-endian order):

    Q8_0   34 bytes   d: float16 | q: 32 × int8                            x ≈ d · q
    Q4_1   20 bytes   d: float16 | m: float16 | 16 bytes of two nibbles    x ≈ d · q + m
    MXFP4  17 bytes   e: uint8 | 16 bytes of two nibbles                   x ≈ 2^(e − 127) · v[q]

    a nibble's place:  byte j holds number j in its low half, and number j + 16 in its high half
    v[q]:              0, ½, 1, 1½, 2, 3, 4, 6 for q = 0 … 7; for q = 8 … 15 the same, negative

Source: ggml's block formats, https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c;
    OCP Microscaling Formats (MX) v1.0, sections 5.3 and 5.4,
    https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

import numpy as np
from numpy import ndarray

BLOCK = 32
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)  # v[q]


def quantize_q8_0(x: ndarray) -> ndarray:
    """Pack each 32 numbers of a row into 34 bytes.

    x:       (..., n) float32, finite, none beyond 8·10⁶; n is a multiple of 32
    returns: (..., n / 32 · 34) uint8

    For each block, in float32: d = amax / 127, where amax is its largest absolute value, and
    q = x · (1 / d), rounded to the nearest integer, halves away from 0. Only then is d rounded to
    float16. A block of zeros has d = 0 and q = 0. Another n raises ValueError, which gives it.
    """
    # solution
    blocks = _blocks(x, BLOCK)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    scaled = np.abs(blocks * inverse)
    q = np.floor(scaled) + (scaled - np.floor(scaled) >= 0.5)  # np.round takes halves to even
    q = np.copysign(q, blocks).astype(np.int8)
    return _rows(np.concatenate((_bytes(d.astype("<f2")), q.view(np.uint8)), axis=-1))


def dequantize_q8_0(data: ndarray) -> ndarray:
    """Unpack what quantize_q8_0 has packed.

    data:    (..., n / 32 · 34) uint8
    returns: (..., n) float32, d · q with both widened to float32 first

    A last axis that is no multiple of 34 raises ValueError, which gives its length.
    """
    # solution
    blocks = _blocks(data, 34)
    return _rows(_numbers(blocks[..., :2], "<f2") * _numbers(blocks[..., 2:], "i1"))


def dequantize_q4_1(data: ndarray) -> ndarray:
    """Unpack blocks of 20 bytes: a scale, a minimum, and 32 nibbles from 0 to 15.

    data:    (..., n / 32 · 20) uint8
    returns: (..., n) float32, d · q + m, with two roundings, in this order

    A last axis that is no multiple of 20 raises ValueError, which gives its length.
    """
    # solution
    blocks = _blocks(data, 20)
    d, m = _numbers(blocks[..., :2], "<f2"), _numbers(blocks[..., 2:4], "<f2")
    return _rows(d * _nibbles(blocks[..., 4:]).astype(np.float32) + m)


def quantize_mxfp4(x: ndarray) -> ndarray:
    """Pack each 32 numbers of a row into 17 bytes.

    x:       (..., n) float32, 0 or between 10⁻³⁰ and 10³⁰ in absolute value; n a multiple of 32
    returns: (..., n / 32 · 17) uint8

    e − 127 = ⌊log₂ amax⌋ − 2, so that the largest number lies between 4 and 8 times the scale; at
    amax just below a power of two, by 10⁻⁶ of it, either of two exponents is right. q is that of
    the nearest value, of two equally near ones the one closer to 0; what lies beyond 6 becomes
    6. What becomes 0 has q = 0, not 8. A block of zeros has e = 0. Another n raises ValueError.
    """
    # solution
    blocks = _blocks(x, BLOCK)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    exponent = np.frexp(amax)[1] - 1 - 2  # frexp gives amax = f · 2ⁿ with f from ½ up to 1
    scaled = np.abs(np.ldexp(blocks, -exponent))
    middles = (FP4[1:] + FP4[:-1]) / 2
    q = np.searchsorted(middles, scaled, side="left").astype(np.uint8)
    q += 8 * ((blocks < 0) & (q > 0)).astype(np.uint8)
    e = np.where(amax > 0, exponent + 127, 0).astype(np.uint8)
    return _rows(np.concatenate((e, q[..., :16] | q[..., 16:] << 4), axis=-1))


def dequantize_mxfp4(data: ndarray) -> ndarray:
    """Unpack what quantize_mxfp4 has packed.

    data:    (..., n / 32 · 17) uint8, e below 255
    returns: (..., n) float32, exact: 2^(e − 127) · v[q]

    q = 8 is 0, of either sign. A last axis that is no multiple of 17 raises ValueError, which gives
    its length.
    """
    # solution
    blocks = _blocks(data, 17)
    values = np.concatenate((FP4, -FP4))[_nibbles(blocks[..., 1:])]
    return _rows(np.ldexp(values, blocks[..., :1].astype(np.int32) - 127))


def _blocks(x: ndarray, size: int) -> ndarray:
    """(..., n) to (..., n / size, size)."""
    if x.shape[-1] % size:
        raise ValueError(f"the last axis must be a multiple of {size}, got {x.shape[-1]}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _rows(blocks: ndarray) -> ndarray:
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def _bytes(numbers: ndarray) -> ndarray:
    return np.ascontiguousarray(numbers).view(np.uint8)


def _numbers(data: ndarray, dtype: str) -> ndarray:
    return np.ascontiguousarray(data).view(dtype).astype(np.float32)


def _nibbles(data: ndarray) -> ndarray:
    """(..., 16) bytes to (..., 32): first all low halves, then all high ones."""
    return np.concatenate((data & 15, data >> 4), axis=-1)
