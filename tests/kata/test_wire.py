"""Tests of kata.wire: what goes in comes out, and no bytes whatever do harm."""

from __future__ import annotations

import collections
import enum
import fractions
import math
import random
import tracemalloc
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kata.attempt import wire
from kata.attempt.wire import BadMessage, NotPlainData

quick = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

NUMPY_DTYPES = [np.dtype(name) for name in sorted(wire.NUMBERS)]
TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


# --- data ----------------------------------------------------------------------------------------


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...], negative: bool) -> tuple[slice, ...]:
    steps = st.sampled_from([1, 2, 3, -1, -2] if negative else [1, 2, 3])
    return tuple(slice(draw(st.sampled_from([None, 1, -2])), None, draw(steps)) for _ in shape)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Arrays of all dtypes, with strides that are negative, zero or in any order, and scalars."""
    dtype = draw(st.sampled_from(NUMPY_DTYPES))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    raw = rng.integers(0, 2 if dtype.kind == "b" else 120, shape)
    array = np.asarray(raw).astype(dtype)
    if array.ndim:
        array = array.transpose(draw(st.permutations(range(array.ndim))))
        array = array[draw(slices(array.shape, negative=True))]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (2, *array.shape))
    return array[()] if array.ndim == 0 and draw(st.booleans()) else array


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
    if tensor.ndim:
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
        tensor = tensor[draw(slices(tuple(tensor.shape), negative=False))]
    return tensor.expand(2, *tensor.shape) if draw(st.booleans()) else tensor


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=9),
    st.binary(max_size=9),
    st.sampled_from(sorted(wire.DTYPES.values(), key=str)),
)
keys = st.one_of(st.integers(), st.text(max_size=5), st.tuples(st.integers(), st.text(max_size=3)))
data = st.recursive(
    st.one_of(scalars, arrays(), tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape, strides (where there are elements) and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        if not a.numel():  # an empty one keeps odd strides, and has no bits
            return True
        bits = [x.clone(memory_format=torch.contiguous_format).reshape(-1) for x in (a, b)]
        bits = [x.view(torch.uint8) for x in bits]
        return a.stride() == b.stride() and torch.equal(*bits)
    if isinstance(a, (np.ndarray, np.generic)):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and (not a.size or a.strides == b.strides) and a.tobytes() == b.tobytes()
    if isinstance(a, (float, complex)):
        return repr(a) == repr(b)
    return bool(a == b)


# --- there and back ------------------------------------------------------------------------------


@quick
@given(data)
def test_what_goes_in_comes_out(x: Any) -> None:
    assert same(wire.decode(wire.encode(x)), x)


@quick
@given(data)
def test_equal_data_give_equal_bytes(x: Any) -> None:
    """Also when they have been through it: so equal bytes afterwards mean that nothing changed."""
    message = wire.encode(x)

    assert wire.encode(x) == message
    assert wire.encode(wire.decode(message)) == message


@pytest.mark.parametrize("name", [n for n in sorted(wire.DTYPES) if not n.startswith("q")])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_tensor_of_any_dtype_travels_or_is_refused(name: str) -> None:
    x = torch.empty(3, 2, dtype=wire.DTYPES[name]).T

    try:
        y = wire.decode(wire.encode(x))
    except NotPlainData:
        assert x.dtype not in TORCH_DTYPES
    else:
        assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())


def test_the_numbers_of_jax_travel() -> None:
    for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
        x = np.arange(6).astype(kind).reshape(2, 3)[:, ::-1]
        y = wire.decode(wire.encode([x, x[1, 2], np.zeros((0, 2), kind)]))
        assert same(y, [x, x[1, 2], np.zeros((0, 2), kind)])


def test_views_keep_what_lies_between_their_elements() -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    message = wire.encode(wide[:, :2])
    other = wide.clone()
    other[1, 3] = -1.0  # beside the view, between two of its rows

    assert wire.encode(other[:, :2]) != message
    back = wire.decode(message)
    assert back.as_strided((10,), (1,)).tolist() == list(range(10))


def test_of_a_small_view_of_much_only_the_elements_travel() -> None:
    tensor, array = torch.zeros(1000, 1000)[:, 0], np.zeros((1000, 1000))[::-1, 0]

    assert len(wire.encode([tensor, array])) < 20_000
    assert wire.decode(wire.encode(tensor)).equal(tensor)
    assert wire.decode(wire.encode(array)).shape == (1000,)


def test_what_comes_out_shares_no_memory_and_can_be_written() -> None:
    x = torch.zeros(3)
    message = wire.encode([x, x, x.numpy()])
    a, b, c = wire.decode(message)
    a += 1
    c += 2

    assert (x.sum(), b.sum()) == (0, 0)
    assert wire.encode([x, x, x.numpy()]) == message


def test_gradients_conjugates_and_parameters_travel_as_plain_tensors() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    conjugate = torch.tensor([1 + 2j]).conj()
    back = wire.decode(wire.encode([parameter, parameter * 2, conjugate]))

    assert [type(x) for x in back] == [torch.Tensor] * 3
    assert not back[1].requires_grad and back[2].tolist() == [1 - 2j]


def test_tuples_and_dicts_of_a_kind_of_their_own_become_plain_ones() -> None:
    Pair = collections.namedtuple("Pair", "a b")

    back = wire.decode(wire.encode([Pair(1, 2), collections.OrderedDict(a=1), torch.Size([2])]))

    assert same(back, [(1, 2), {"a": 1}, (2,)])


def test_arrays_in_the_other_byte_order_become_native() -> None:
    x = np.arange(6, dtype=np.dtype("f4").newbyteorder())[::2]

    y = wire.decode(wire.encode(x))

    assert y.dtype == np.float32 and y.tolist() == x.tolist()


def test_strings_that_utf8_does_not_have_travel() -> None:
    assert wire.decode(wire.encode(["\ud800", "ä\udfff", "ä"])) == ["\ud800", "ä\udfff", "ä"]


def test_numbers_of_any_size_travel() -> None:
    large = [10**5000, -(10**5000), 2**63, -(2**63) - 1, 2**64 - 1]

    assert wire.decode(wire.encode(large)) == large


# --- what does not travel ------------------------------------------------------------------------


class Colour(enum.StrEnum):
    RED = "red"


class Thing:
    pass


REFUSED: dict[str, Any] = {
    "an object": Thing(),
    "a class": Thing,
    "a function": same,
    "a module": np,
    "a set": {1, 2},
    "an iterator": iter([1]),
    "a range": range(3),
    "an enum": Colour.RED,
    "a fraction": fractions.Fraction(1, 3),
    "a bytearray": bytearray(b"a"),
    "a generator": torch.Generator(),
    "a network": torch.nn.Linear(2, 2),
    "text in an array": np.array(["a"]),
    "a NumPy string": np.str_("a"),
    "objects in an array": np.array([None]),
    "dates": np.array(["2020-01-01"], "M8[D]"),
    "a date": np.datetime64("2020-01-01"),
    "records": np.zeros(2, [("a", "i4")]),
    "extended precision": np.zeros(2, np.longdouble),
    "a masked array": np.ma.masked_array([1, 2], [True, False]),
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a tensor without data": torch.empty(2, device="meta"),
    "a tensor of a class of its own": torch.ones(2).as_subclass(type("Mine", (torch.Tensor,), {})),
    "as many elements as a stride of 0 makes": torch.ones(1).expand(10**12),
    "as many in an array": np.broadcast_to(np.ones(1), (10**12,)),
    "too many dimensions": torch.ones([1] * 65),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_is_not_plain_data(name: str) -> None:
    for x in (REFUSED[name], [REFUSED[name]], {"a": (1, REFUSED[name])}):
        with pytest.raises(NotPlainData):
            wire.encode(x)


def test_refuses_what_is_nested_too_deep_or_in_itself() -> None:
    x: list[Any] = []
    for _ in range(wire.DEPTH - 2):
        x = [x]
    assert wire.decode(wire.encode(x)) == x
    with pytest.raises(NotPlainData, match="deep"):
        wire.encode([[x]])
    x.append(x)
    with pytest.raises(NotPlainData, match="deep"):
        wire.encode(x)


def test_sizes_are_bounded_both_ways() -> None:
    message = wire.encode(torch.zeros(1000))

    with pytest.raises(NotPlainData, match=r"4,\d\d\d bytes"):
        wire.encode(torch.zeros(1000), limit=4000)
    with pytest.raises(BadMessage, match=r"4,\d\d\d bytes"):
        wire.decode(message, limit=4000)
    assert wire.decode(message, limit=len(message)).shape == (1000,)


# --- bytes that are no message -------------------------------------------------------------------


def decodes_or_is_bad(message: bytes) -> bool:
    """Whether it decodes; anything but a BadMessage comes through. What decodes can be encoded."""
    try:
        back = wire.decode(message)
    except BadMessage:
        return False
    wire.encode(back)
    return True


@quick
@given(data, st.randoms(use_true_random=False))
def test_a_damaged_message_decodes_to_data_or_is_bad(x: Any, rng: random.Random) -> None:
    message = wire.encode(x)

    for _ in range(10):
        assert not decodes_or_is_bad(message[: rng.randrange(len(message))])
        assert not decodes_or_is_bad(message + rng.randbytes(1))
        damaged = bytearray(message)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        decodes_or_is_bad(bytes(damaged))


def test_every_flip_of_a_bit_and_every_truncation_of_one_message() -> None:
    x = [{"a": np.arange(4)[::-1], (1, "b"): torch.ones(2, 1).T}, 2**70, 1j, torch.int8, np.True_]
    message = wire.encode(x)

    for i in range(len(message)):
        assert not decodes_or_is_bad(message[:i])
        for bit in range(8):
            damaged = bytearray(message)
            damaged[i] ^= 1 << bit
            decodes_or_is_bad(bytes(damaged))


@quick
@given(st.binary(max_size=60))
def test_any_bytes_decode_to_data_or_are_bad(message: bytes) -> None:
    decodes_or_is_bad(message)


def forged(tree: Any, **named: torch.Tensor) -> bytes:
    tensors = {name.removeprefix("t"): x for name, x in named.items()}
    packed = msgspec.msgpack.encode(tree)
    return msgspec.msgpack.encode([packed, safetensors.torch.save(tensors) if tensors else b""])


def claim(kind: str, **changes: Any) -> bytes:
    """A message that claims something of the eight numbers it holds."""
    fields: dict[str, Any] = {"index": 0, "shape": [2, 4], "stride": [4, 1]}
    if kind == "array":
        fields |= {"first": 0, "dtype": "float64", "scalar": False}
    else:
        fields |= {"device": "cpu", "is_complex": False}
    tree = [kind, *(fields | changes).values()]
    return forged(tree, t000000=torch.arange(8.0, dtype=torch.float64))


CLAIMS: list[dict[str, Any]] = [
    {"shape": [10**12], "stride": [0]},
    {"shape": [10**12], "stride": [1]},
    {"shape": [2**62, 4], "stride": [0, 0]},
    {"shape": [2**63, 2**63], "stride": [0, 0]},
    {"shape": [2**64 - 1], "stride": [0]},
    {"shape": [2**40, 2**40, 0], "stride": [2**63, 1, 1]},
    {"shape": [9], "stride": [1]},
    {"shape": [2, 4], "stride": [5, 1]},
    {"shape": [2], "stride": [2**62]},
    {"shape": [2], "stride": [2**63 - 1]},
    {"shape": [3], "stride": [-1]},
    {"shape": [-1, -8], "stride": [1, 1]},
    {"shape": [-1], "stride": [1]},
    {"shape": [2.0, 4], "stride": [4, 1]},
    {"shape": [True, 4], "stride": [4, 1]},
    {"shape": [2, 4], "stride": [4, 0.5]},
    {"shape": [2, 4], "stride": [4]},
    {"shape": [2], "stride": [4, 1]},
    {"shape": 8, "stride": 1},
    {"shape": "ab", "stride": "ab"},
    {"shape": None},
    {"shape": [[2], [4]]},
    {"shape": [1] * 70, "stride": [1] * 70},
    {"index": 1},
    {"index": -1},
    {"index": "000000"},
    {"index": None},
]


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("changes", CLAIMS, ids=str)
def test_a_claim_that_the_bytes_do_not_bear_out_is_bad(kind: str, changes: dict[str, Any]) -> None:
    assert wire.decode(claim(kind)).shape == (2, 4)
    with pytest.raises(BadMessage):
        wire.decode(claim(kind, **changes))


STRANGE = ["object", "O", "S8", "U2", "M8[s]", "V8", "i4,i4", "i4,O", "float128", "float64 ", ""]
STRANGE += ["(", "finfo", "iinfo", "__name__", "__doc__", None, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {"first": 1},
        {"first": -1},
        {"first": 8, "shape": [], "stride": []},
        {"first": 1.0},
        {"first": 2**63},
        {"first": 3, "shape": [5], "stride": [-1]},
        *[{"dtype": name} for name in STRANGE],
        {"dtype": "int4", "shape": [65], "stride": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_an_array_claims_no_strange_dtype_and_no_strange_place(changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        wire.decode(claim("array", **changes))


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99", "xpu", "", "nonsense", None, 0, []])
def test_a_tensor_travels_to_no_strange_device(device: Any) -> None:
    with pytest.raises(BadMessage):
        wire.decode(claim("tensor", device=device))


def test_an_array_of_rows_reaches_no_further_than_its_bytes() -> None:
    """The base is meant to be flat; a slice of one that is not would start beyond its end."""
    base = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)

    for dtype in ("float64", "int64", "complex64"):
        with pytest.raises(BadMessage):
            wire.decode(forged(["array", 0, [8], [1], 1, dtype, False], t000000=base))
    inside = wire.decode(forged(["array", 0, [2], [1], 5, "float64", False], t000000=base))
    assert inside.tolist() == [5.0, 6.0]


@pytest.mark.parametrize(
    "tree",
    [
        [],
        ["nonsense"],
        [1, 2],
        ["int"],
        ["int", 5],
        ["int", "x"],
        ["int", math.inf],
        ["complex", 1, 2, 3],
        ["complex", "x"],
        ["str", "a"],
        ["str", b"\xff"],
        ["dict", 1],
        ["dict", [["list", 1], 2]],
        ["dtype", "nn"],
        ["dtype", "_dynamo"],
        ["dtype", []],
        ["tensor"],
        ["list", {"a": 1}],
        {"a": 1},
        msgspec.msgpack.Ext(5, b"abc"),
        ["list", msgspec.msgpack.Ext(-1, b"\0\0\0\0")],
    ],
    ids=str,
)
def test_a_tree_that_is_none_of_ours_is_bad(tree: Any) -> None:
    with pytest.raises(BadMessage):
        wire.decode(forged(tree))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x00",
        b"\x93\x01\xc4\x00\x01",
        b"\x92\x01\xa0",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode([b"\1", b"\xff" * 8]),
        msgspec.msgpack.encode([b"\1", b"\0" * 7]),
        msgspec.msgpack.encode([b"\x91\xa4list", b"\x02" + b"\0" * 6 + b"\1{}"]),
    ],
    ids=lambda m: m[:8].hex(),
)  # fmt: skip
def test_bytes_that_claim_more_than_they_are_are_bad(message: bytes) -> None:
    with pytest.raises(BadMessage):
        wire.decode(message)


def test_a_small_message_cannot_ask_for_much_memory() -> None:
    """One tensor, named a thousand times, would be copied a thousand times."""
    once = ["tensor", 0, [10**5], [1], "cpu", False]
    message = forged(["list", *[once] * 1000], t000000=torch.zeros(10**5))
    array = ["array", 0, [10**5], [1], 0, "float32", False]
    messages = [message, forged(["list", *[array] * 1000], t000000=torch.zeros(10**5))]
    messages += [claim("tensor", **c) for c in CLAIMS] + [claim("array", **c) for c in CLAIMS]

    tracemalloc.start()
    try:
        for message in messages:
            with pytest.raises(BadMessage):
                wire.decode(message)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_all_tensors_together_expand_to_no_more_than_the_limit(monkeypatch):
    """Each for itself is small enough."""
    monkeypatch.setattr(wire, "LIMIT", 10_000)
    views = [torch.ones(1).expand(1_000) for _ in range(3)]
    with pytest.raises(NotPlainData, match="too large"):
        wire.encode(views)
    wire.encode(views[:2])

    monkeypatch.setattr(wire, "LIMIT", 100_000)
    message = wire.encode(views)
    monkeypatch.setattr(wire, "LIMIT", 10_000)
    with pytest.raises(BadMessage, match="too large"):
        wire.decode(message, limit=100_000)


def test_what_is_no_tensor_is_bounded_before_it_is_read(monkeypatch):
    message = wire.encode([0] * 10_000)
    monkeypatch.setattr(wire, "TREE", 5_000)
    with pytest.raises(NotPlainData, match="the limit is 5,000"):
        wire.encode([0] * 10_000)
    with pytest.raises(BadMessage, match="the limit is 5,000"):
        wire.decode(message)
