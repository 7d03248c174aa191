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
    raise NotImplementedError("exercise 53 is not written yet")


def dequantize_q8_0(data: ndarray) -> ndarray:
    """Unpack what quantize_q8_0 has packed.

    data:    (..., n / 32 · 34) uint8
    returns: (..., n) float32, d · q with both widened to float32 first

    A last axis that is no multiple of 34 raises ValueError, which gives its length.
    """
    raise NotImplementedError("exercise 53 is not written yet")


def dequantize_q4_1(data: ndarray) -> ndarray:
    """Unpack blocks of 20 bytes: a scale, a minimum, and 32 nibbles from 0 to 15.

    data:    (..., n / 32 · 20) uint8
    returns: (..., n) float32, d · q + m, with two roundings, in this order

    A last axis that is no multiple of 20 raises ValueError, which gives its length.
    """
    raise NotImplementedError("exercise 53 is not written yet")


def quantize_mxfp4(x: ndarray) -> ndarray:
    """Pack each 32 numbers of a row into 17 bytes.

    x:       (..., n) float32, 0 or between 10⁻³⁰ and 10³⁰ in absolute value; n a multiple of 32
    returns: (..., n / 32 · 17) uint8

    e − 127 = ⌊log₂ amax⌋ − 2, so that the largest number lies between 4 and 8 times the scale; at
    amax just below a power of two, by 10⁻⁶ of it, either of two exponents is right. q is that of
    the nearest value, of two equally near ones the one closer to 0; what lies beyond 6 becomes
    6. What becomes 0 has q = 0, not 8. A block of zeros has e = 0. Another n raises ValueError.
    """
    raise NotImplementedError("exercise 53 is not written yet")


def dequantize_mxfp4(data: ndarray) -> ndarray:
    """Unpack what quantize_mxfp4 has packed.

    data:    (..., n / 32 · 17) uint8, e below 255
    returns: (..., n) float32, exact: 2^(e − 127) · v[q]

    q = 8 is 0, of either sign. A last axis that is no multiple of 17 raises ValueError, which gives
    its length.
    """
    raise NotImplementedError("exercise 53 is not written yet")
