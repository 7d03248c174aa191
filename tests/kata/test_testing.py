"""Tests of kata.testing: mutated results, judged by torch.testing too, and mutants of its code."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from kata import summary, testing
from kata.attempt import modules
from kata.testing import Mismatch, assert_close, compare

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
WHOLE = [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (1,), (5,), (2, 3), (3, 1, 4), (0,), (2, 0)]


# --- generated cases, with torch.testing as the oracle -------------------------------------------


def values(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype in WHOLE:
        return torch.from_numpy(np.asarray(rng.integers(0, 100, shape))).to(dtype)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 4, shape)
    y = 1j * rng.normal(size=shape) if dtype.is_complex else 0
    return torch.from_numpy(np.asarray(x + y)).to(dtype)


def moved(rng: np.random.Generator, x: torch.Tensor, factor: float) -> torch.Tensor:
    """One element moved by a multiple of what torch tolerates there."""
    where = tuple(int(rng.integers(n)) for n in x.shape)
    other = x.clone()
    rtol, atol = testing.TOLERANCES[str(x.dtype).removeprefix("torch.")]
    step = factor * (atol + rtol * abs(complex(x[where])))
    if x.dtype.is_complex:
        other[where] = complex(x[where]) + step * (0.6 + 0.8j)
    else:
        other[where] = float(x[where]) + step
    return other


def with_value(rng: np.random.Generator, x: torch.Tensor, value: float) -> torch.Tensor:
    other = x.clone()
    other[tuple(int(rng.integers(n)) for n in x.shape)] = value
    return other


def generated(n: int, seed: int) -> Iterator[tuple[str, Any, Any]]:
    """Pairs (actual, expected) that differ in one way or in none, and the name of that way."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        dtype = [*FLOATS, *COMPLEX, *WHOLE][rng.integers(11)]
        shape = SHAPES[rng.integers(len(SHAPES))]
        e = values(rng, dtype, shape)
        ways = ["equal", "shape", "dtype", "list", "dict", "keys", "length", "numpy"]
        if e.numel():
            ways += ["value"] * 3
        if e.numel() and not dtype.is_complex and dtype not in WHOLE:
            ways += ["nan", "both nan", "inf", "both inf", "inf sign"]
        if e.numel() and dtype not in WHOLE:
            ways += ["within", "within", "beyond", "beyond", "far beyond"]
        way = ways[rng.integers(len(ways))]
        a = e.clone()
        if way == "shape":
            a = a.reshape(-1) if a.ndim != 1 else a[None]
        elif way == "dtype":
            a = torch.real(a).to(
                [t for t in [*FLOATS, *COMPLEX, *WHOLE] if t != dtype][rng.integers(10)]
            )
        elif way == "value":
            a = with_value(rng, a, 1) if dtype is torch.bool else with_value(rng, a, 101)
        elif way in ("within", "beyond", "far beyond"):
            a = moved(rng, a, {"within": 0.3, "beyond": 3.0, "far beyond": 1e3}[way])
        elif way == "nan":
            a = with_value(rng, a, math.nan)
        elif way == "both nan":
            a = e = with_value(rng, a, math.nan)
        elif way == "inf":
            a = with_value(rng, a, math.inf)
        elif way == "both inf":
            a = e = with_value(rng, a, -math.inf)
        elif way == "inf sign":
            e = with_value(rng, a, math.inf)
            a = torch.where(e == math.inf, -e, e)
        first, second = values(rng, torch.float64, (2,)), values(rng, torch.int64, ())
        if way == "numpy" and dtype is not torch.bfloat16:
            a, e = np.array(a.numpy()), np.array(e.numpy())
            if a.size and rng.integers(2):
                a.flat[int(rng.integers(a.size))] += 1
            if a.ndim == 0:
                a, e = a[None], e[None]
            yield way, a, e
        elif way == "list":
            changed = second + int(rng.integers(2))
            yield way, [first, (a, changed)], [first, (e, second)]
        elif way == "dict":
            changed = second + int(rng.integers(2))
            yield way, {"a": first, "b": [a, changed]}, {"b": [e, second], "a": first}
        elif way == "keys":
            yield way, {"a": a, "b": first}, {"a": e, "c": first}
        elif way == "length":
            yield way, [a, first], [e]
        else:
            yield way, a, e


def torch_agrees(actual: Any, expected: Any) -> bool:
    """Torch's opinion, NaN being equal to NaN."""
    try:
        torch.testing.assert_close(actual, expected, equal_nan=True)
    except AssertionError:
        return False
    return True


GENERATED = [case for seed in range(3) for case in generated(250, seed)]


def test_agrees_with_torch_on_hundreds_of_mutated_results(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.complex128):  # torch's own tolerance is wider
        ours = testing.TOLERANCES[str(dtype).removeprefix("torch.")]
        monkeypatch.setitem(torch.testing._comparison._DTYPE_PRECISIONS, dtype, ours)
    opinions = {(way, True): 0 for way, _, _ in GENERATED}

    for way, actual, expected in GENERATED:
        mismatch = compare(actual, expected)
        agrees = torch_agrees(actual, expected)
        assert (mismatch is None) == agrees, f"{way}: {actual} and {expected}: {mismatch}"
        opinions[way, agrees] = opinions.get((way, agrees), 0) + 1

    assert sum(n for (_, agrees), n in opinions.items() if agrees) > 150
    assert sum(n for (_, agrees), n in opinions.items() if not agrees) > 150


def test_has_torchs_default_tolerances_but_for_doubles_which_see_a_rounding_to_float32() -> None:
    from torch.testing._comparison import default_tolerances

    for name, tolerances in testing.TOLERANCES.items():
        if name in ("float64", "complex128"):
            assert tolerances == (1e-10, 1e-10)
        else:
            assert default_tolerances(getattr(torch, name)) == tolerances
    for dtype in WHOLE:
        assert default_tolerances(dtype) == (0.0, 0.0)
        assert str(dtype).removeprefix("torch.") not in testing.TOLERANCES


# --- cases of which torch has no opinion, or another one -----------------------------------------

Case = tuple[Any, Any, str | None]
tensor = torch.tensor
CASES: dict[str, Case] = {
    # kind
    "an array for a tensor": (np.ones(2), torch.ones(2), "kind"),
    "a tensor for an array": (torch.ones(2), np.ones(2), "kind"),
    "a number for a tensor": (1.0, torch.ones(()), "kind"),
    "a tensor for a number": (torch.ones(()), 1.0, "kind"),
    "a number for an array": (1.0, np.ones(1), "kind"),
    "a list for an array": ([1.0], np.ones(1), "kind"),
    "nothing for a tensor": (None, torch.ones(2), "kind"),
    "nothing for zero": (None, 0, "kind"),
    "text for a number": ("1", 1, "kind"),
    "truth for a number": (True, 1, "kind"),
    "a number for truth": (1, True, "kind"),
    "NumPy's truth for a number": (np.True_, 1, "kind"),
    "a dict for a list": ({0: 1}, [1], "kind"),
    "a list for a dict": ([1], {0: 1}, "kind"),
    "NumPy's truth": (np.True_, True, None),
    "an array of no dimensions for a scalar": (np.array(1.5), np.float64(1.5), None),
    "truth of no dimensions": (np.array(True), True, None),
    "a tuple for a list": ((1, 2), [1, 2], None),
    # shape and length
    "one dimension too many": (torch.ones(1, 2), torch.ones(2), "shape"),
    "an empty one of another shape": (torch.ones(0, 3), torch.ones(3, 0), "shape"),
    "empty": (np.ones((2, 0)), np.ones((2, 0)), None),
    "one element": (torch.ones(1), torch.ones(()), "shape"),
    "a shorter list": ([1], [1, 2], "shape"),
    "an empty list": ([], [], None),
    # dtype
    "float32 for float64": (torch.ones(2), torch.ones(2, dtype=torch.float64), "dtype"),
    "an empty one of another dtype": (torch.ones(0), torch.ones(0, dtype=torch.int64), "dtype"),
    "whole for float": (np.ones(2, np.int64), np.ones(2), "dtype"),
    "truth for whole": (tensor([True]), tensor([1]), "dtype"),
    "scalars of two dtypes": (np.float32(1), np.float64(1), "dtype"),
    "a plain number for a scalar": (1.0, np.float32(1), None),
    "a scalar for a plain number": (np.int64(3), 3, None),
    "shape before dtype": (np.ones(2, np.int64), np.ones(3), "shape"),
    "dtype before values": (torch.zeros(2), torch.ones(2, dtype=torch.float64), "dtype"),
    # tolerances
    "a plain number within": (1 + 0.9e-10, 1.0, None),
    "a plain number beyond": (1 + 3e-10, 1.0, "values"),
    "a plain number, by the scalar's dtype": (0.1, np.float32(0.1), None),
    "a plain number, by the scalar's rtol": (1e5 + 0.1, np.float32(1e5), None),
    "a plain number, by the scalar's atol": (5e-6, np.float32(0), None),
    "plain numbers, large": (1e9 + 0.05, 1e9, None),
    "plain numbers, small": (1e-11, -1e-11, None),
    "whole numbers are exact": (1_000_000_001, 1_000_000_000, "values"),
    "the tolerance is relative to expected": (tensor([1e5]), tensor([1e5 + 0.11]), None),
    "float8": (tensor([1.0]).to(torch.float8_e4m3fn), tensor([1.0]).to(torch.float8_e4m3fn), None),
    "float8 is exact": (
        tensor([1.0]).to(torch.float8_e5m2),
        tensor([1.25]).to(torch.float8_e5m2),
        "values",
    ),
    "bfloat16 of NumPy": (np.ones(3, ml_dtypes.bfloat16), np.ones(3, ml_dtypes.bfloat16), None),
    "bfloat16 of NumPy within": (
        np.array([1.0078125, 1], ml_dtypes.bfloat16),
        np.ones(2, ml_dtypes.bfloat16),
        None,
    ),
    "bfloat16 of NumPy beyond": (
        np.array([1.03125, 1], ml_dtypes.bfloat16),
        np.ones(2, ml_dtypes.bfloat16),
        "values",
    ),
    "a scalar bfloat16 within": (ml_dtypes.bfloat16(1.0078125), ml_dtypes.bfloat16(1), None),
    # whole numbers that float64 cannot tell apart
    "beyond 2⁵³": (tensor([2**53 + 1]), tensor([2**53]), "values"),
    "beyond 2⁵³, equal": (tensor([-(2**53) - 1]), tensor([-(2**53) - 1]), None),
    "the largest unsigned": (
        np.array([2**64 - 1], np.uint64),
        np.array([2**64 - 2], np.uint64),
        "values",
    ),
    "plain and beyond 2⁵³": (2**53, 2**53 + 1, "values"),
    "plain and beyond 2⁶⁴": (2**70, 2**70 + 1, "values"),
    "plain and beyond 2⁶⁴, equal": (2**70, 2**70, None),
    "the smallest int8": (np.array([-128], np.int8), np.array([127], np.int8), "values"),
    # not finite
    "NaN in place": (tensor([math.nan, 1]), tensor([math.nan, 1]), None),
    "NaN out of place": (tensor([1, math.nan]), tensor([math.nan, 1]), "finite"),
    "NaN for infinity": (np.array([math.nan]), np.array([math.inf]), "finite"),
    "infinity for NaN": (np.array([math.inf]), np.array([math.nan]), "finite"),
    "a number for NaN": (1.0, math.nan, "finite"),
    "a number for infinity": (np.array([1.0]), np.array([math.inf]), "finite"),
    "infinity for a large number": (np.array([math.inf]), np.array([1.7e308]), "finite"),
    "minus infinity": (-math.inf, math.inf, "values"),
    "infinite in place": (np.array([-math.inf, 2]), np.array([-math.inf, 2]), None),
    "huge, of other signs": (np.array([1.7e308]), np.array([-1.7e308]), "values"),
    "NaN before values": (tensor([5.0, math.nan]), tensor([1.0, 1.0]), "finite"),
    # complex
    "complex within": (tensor([1 + 1j]), tensor([1 + (1 + 1e-6) * 1j]), None),
    "complex beyond": (tensor([1 + 1j]), tensor([1 + 1.001j]), "values"),
    "complex conjugate": (tensor([1 + 2j]).conj(), tensor([1 - 2j]), None),
    "complex infinite": (np.array([complex(math.inf, 1)]), np.array([complex(1, 1)]), "finite"),
    "plain complex": (1 + 2j, 1 - 2j, "values"),
    # tensors of all sorts
    "with a gradient": (torch.ones(2, requires_grad=True), torch.ones(2), None),
    "with gaps": (torch.arange(6.0)[::2], tensor([0.0, 2.0, 4.0]), None),
    "transposed": (torch.arange(6).reshape(2, 3).T, tensor([[0, 3], [1, 4], [2, 5]]), None),
    "expanded": (torch.ones(1).expand(3), torch.ones(3), None),
    # everything else
    "text": ("abc", "abd", "values"),
    "bytes": (b"ab", b"ab", None),
    "a torch dtype": (torch.float32, torch.float64, "values"),
    "a truth value": (True, False, "values"),
    "other keys": ({"a": 1}, {"b": 1}, "keys"),
    "a key too many": ({"a": 1, 2: 1}, {"a": 1}, "keys"),
    "keys in another order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
    "deep within": ([{"x": (1, [torch.ones(2)])}], [{"x": (1, [torch.zeros(2)])}], "values"),
    "the second of two": ([torch.ones(2), 1.0], [torch.ones(2), 2.0], "values"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_names_the_cause(name: str) -> None:
    actual, expected, cause = CASES[name]

    mismatch = compare(actual, expected)

    assert (mismatch.cause if mismatch else None) == cause


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_compares_complex_numbers_in_half_precision() -> None:
    one, other = (tensor([1 + 2j, x]).to(torch.complex32) for x in (1 + 1j, 1 + 1.1j))

    assert compare(one, one.clone()) is None
    assert_mismatch(one, other, "values")


@pytest.mark.filterwarnings("error")
def test_warns_of_nothing() -> None:
    extreme = np.array([1.7e308, -1.7e308, math.nan, math.inf, 0.0] * 3)

    assert compare(extreme, extreme.copy()) is None
    assert_mismatch(extreme, extreme[::-1].copy(), "finite")


# --- arguments -----------------------------------------------------------------------------------


def test_takes_wider_tolerances() -> None:
    assert compare(tensor([1.0]), tensor([1.1]), rtol=0.1) is None
    assert compare(tensor([1.0]), tensor([1.1]), atol=0.11) is None
    assert_mismatch(tensor([1.0]), tensor([1.1]), "values", rtol=0.05)
    assert compare(tensor([10]), tensor([12]), atol=2) is None
    assert compare(tensor([1.0]), tensor([1.5]), rtol=0.0, atol=0.5) is None
    assert compare([1.0, {"a": 1.0}], [1.1, {"a": 1.1}], atol=0.11) is None


def test_takes_tighter_tolerances() -> None:
    assert_mismatch(tensor([1.0]), tensor([1.0 + 1e-6]), "values", rtol=0.0, atol=0.0)
    assert compare(tensor([1.0]), tensor([1.0]), rtol=0.0, atol=0.0) is None


def test_the_slack_multiplies_the_default_tolerances() -> None:
    pair = [tensor([1.0])], [tensor([1.0 + 1e-4])]

    assert_mismatch(*pair, "values", slack=5.0)
    assert compare(*pair, slack=10.0) is None
    assert_mismatch(*pair, "values", slack=10.0, rtol=0.0, atol=0.0)
    assert_mismatch([tensor([1])], [tensor([2])], "values", slack=1e9)


def test_assert_close_raises_what_compare_finds() -> None:
    assert_close([tensor([1.0])], [tensor([1.0])])
    with pytest.raises(AssertionError, match="1 of 2 elements differ"):
        assert_close(tensor([1.0, 2.0]), tensor([1.0, 3.0]))
    with pytest.raises(Mismatch):
        assert_close(1.0, 1.1, rtol=0.01, atol=0.0)
    assert_close(1.0, 1.1, rtol=0.1, atol=0.0)


def assert_mismatch(actual: Any, expected: Any, cause: str, **options: Any) -> Mismatch:
    mismatch = compare(actual, expected, **options)
    assert mismatch is not None and mismatch.cause == cause
    return mismatch


# --- messages ------------------------------------------------------------------------------------


def test_shows_the_first_wrong_element_and_how_many_there_are() -> None:
    actual, expected = torch.zeros(3, 4), torch.zeros(3, 4)
    expected[1, 2], expected[2, 0], expected[2, 3] = 0.5, -0.25, 1.0

    mismatch = assert_mismatch(actual, expected, "values")

    assert (
        mismatch.detail
        | {
            "index": [1, 2],
            "n_wrong": 3,
            "n_all": 12,
            "yours_there": "0",
            "expected_there": "0.5",
            "largest": 1.0,
        }
        == mismatch.detail
    )
    assert str(mismatch).splitlines()[:2] == [
        "3 of 12 elements differ",
        "  first at [1, 2]: yours 0, expected 0.5",
    ]
    assert "float32[3, 4]" in mismatch.detail["yours"]


def test_counts_only_what_is_not_finite_where_something_is_not() -> None:
    actual = tensor([1.0, math.nan, 3.0, math.nan])

    mismatch = assert_mismatch(actual, tensor([2.0, 2.0, 3.0, math.nan]), "finite")

    assert str(mismatch).startswith("1 of 4 elements are NaN where they should not be")
    assert mismatch.detail["index"] == [1]


@pytest.mark.parametrize(
    ("actual", "expected", "what"),
    [
        (math.nan, 1.0, "NaN"),
        (math.inf, 1.0, "infinite"),
        (math.inf, math.nan, "infinite"),
        (1.0, math.inf, "finite"),
    ],
)
def test_says_what_a_number_is_that_it_should_not_be(
    actual: float, expected: float, what: str
) -> None:
    mismatch = assert_mismatch(actual, expected, "finite")

    assert str(mismatch).startswith(f"the result is {what} where it should not be")
    assert "the number itself" in str(mismatch)


def test_says_where_in_a_container_it_is() -> None:
    nested = {"loss": [1.0, (2.0, tensor([1, 2, 3]))]}
    wrong = {"loss": [1.0, (2.0, tensor([1, 2, 4]))]}

    mismatch = assert_mismatch(wrong, nested, "values")

    assert mismatch.sentence == "in the result['loss'][1][1], 1 of 3 elements differ"
    assert assert_mismatch([1, "a"], [1, "b"], "values").sentence == "the result[1] differs"


def test_shows_enough_digits_to_tell_two_numbers_apart() -> None:
    for yours, expected in [(1.0 + 3e-7, 1.0), (2**53 + 1, 2**53), (np.float32(1.00002), 1.0)]:
        mismatch = assert_mismatch(yours, expected, "values")
        assert mismatch.detail["yours_there"] != mismatch.detail["expected_there"]


def test_says_both_shapes_dtypes_and_kinds() -> None:
    shape = assert_mismatch(torch.ones(2, 3), torch.ones(3, 2), "shape")
    dtype = assert_mismatch(torch.ones(2), torch.ones(2, dtype=torch.float16), "dtype")
    kind = assert_mismatch(None, np.ones(2), "kind")

    assert shape.sentence == "the result has shape (2, 3), expected (3, 2)"
    assert dtype.sentence == "the result has dtype float32, expected float16"
    assert kind.sentence == "the result is None, not an array"


def test_sums_up_data_in_one_line() -> None:
    many = torch.arange(1000.0)

    assert summary.summary(many) == "float32[1000] in [0, 999] μ 499.5 σ 288.67"
    assert summary.summary(many[:3]) == "float32[3] [0., 1., 2.]"
    assert summary.summary(torch.ones(2, 0)) == "float32[2, 0] (empty)"
    assert summary.summary(many > 900) == "bool[1000] 99 of 1000 true"
    assert summary.summary(many / 0).endswith(", 1000 not finite")
    assert summary.summary([1, 2.5, None, True, "x"]) == "[1, 2.5, None, True, …]"
    assert summary.summary({"a": many[:1]}) == "{'a': float32[1] [0.]}"
    for data in [c for case in CASES.values() for c in case[:2]]:
        assert "\n" not in summary.summary(data)


# --- whatever a learner's code may give -----------------------------------------------------------

nested: list[Any] = []
for _ in range(60):
    nested = [nested]
many = torch.ones(1, dtype=torch.float32).expand(10**9)
ODD: dict[str, tuple[Any, str]] = {
    "a very long int": (10**10_000, "an int of 10,001 digits"),
    "a long int": (10**40 - 1, "9" * 40),
    "a longer int": (-(10**40), "an int of 41 digits"),
    "an int that takes minutes to print": (1 << 5_000_000, "an int of about 1,505,150 digits"),
    "nested deep": (nested, "[[[[[…]]]]]"),
    "much out of little": (many, "float32[1000000000]"),
    "an array of the same": (np.broadcast_to(np.float64(1), (10**9,)), "float64[1000000000]"),
    "a complex NaN": (complex(math.nan, 1), "nan+1j"),
    "objects": (np.array([object()] * 3), "object[3]"),
    "dates": (np.array(["2020"], "M8[Y]"), "datetime64[Y][1]"),
    "records": (np.zeros(9, "i4,f4"), "[('f0', '<i4'), ('f1', '<f4')][9]"),
    "a long text": ("x" * 10**6, f"'{'x' * 60}'… (1,000,000 characters)"),
    "long bytes": (b"x" * 10**6, f"b'{'x' * 60}'… (1,000,000 bytes)"),
    "a key that is too long": ({10**10_000: 1}, "{an int of 10,001 digits: 1}"),
    "a tensor without memory": (torch.ones(3, device="meta"), "a tensor"),
}


@pytest.mark.parametrize("name", ODD)
def test_sums_up_whatever_there_is_at_once(name: str) -> None:
    data, line = ODD[name]
    start = time.perf_counter()

    assert summary.summary(data) == line
    assert summary.summary([data] * 9, values=False)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("expected", [1.0, 1, "x", None, [1.0], {"a": 1}, torch.ones(2), 1j])
@pytest.mark.parametrize("name", ODD)
def test_whatever_is_judged_differs_at_once_and_nothing_else_is_raised(
    name: str, expected: Any
) -> None:
    start = time.perf_counter()
    for actual, of in (ODD[name][0], expected), ([ODD[name][0]], [expected]):
        with pytest.raises(Mismatch) as raised:
            assert_close(actual, of)
        assert str(raised.value)
    assert time.perf_counter() - start < 0.2


def test_very_long_ints_are_told_apart() -> None:
    assert compare(10**10_000, 10**10_000) is None
    assert_mismatch(10**10_000, 10**10_000 + 1, "values")
    assert_mismatch(-(10**400), -1.0, "values")


def test_arrays_of_objects_dates_and_text_are_equal_or_not() -> None:
    for one, other in (["a", "b"], ["a", "c"]), ([None, 1], [None, 2]):
        for kind in (object, str):
            x, y = np.array(one, kind), np.array(other, kind)
            assert compare(x, x.copy()) is None
            assert_mismatch(x, y, "values")


# --- a plain slip gets a plain answer ------------------------------------------------------------


def hint_of(actual: Any, expected: Any) -> str:
    with pytest.raises(Mismatch) as raised:
        assert_close(actual, expected)
    assert raised.value.actual is actual
    hint = raised.value.detail.get("hint", "")
    assert hint in str(raised.value)
    return str(hint)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_two_axes_that_are_swapped_are_named(kind: Any) -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    square = np.arange(18.0).reshape(2, 3, 3)

    assert hint_of(kind(x.swapaxes(0, 2).copy()), kind(x)) == (
        "yours, with axes 0 and 2 swapped, is what was expected"
    )
    assert hint_of([1, kind(square.swapaxes(1, 2).copy())], [1, kind(square)]) == (
        "yours, with axes 1 and 2 swapped, is what was expected"
    )
    assert hint_of(kind(x.swapaxes(0, 1) + 1), kind(x)) == (
        "swapping your axes 0 and 1 would give this shape"
    )


def test_no_axes_are_named_where_swapping_two_does_not_help() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    square = torch.arange(9.0).reshape(3, 3)

    assert hint_of(x.permute(1, 2, 0), x) == ""
    assert hint_of(square + 1, square) == ""
    assert hint_of(square.T + torch.eye(3)[0], square) == ""
    assert hint_of(x[0], x) == "" and hint_of(1.0, 2.0) == "" and hint_of(None, x) == ""
    assert hint_of(torch.zeros(2, 1, 1, 1, 3), torch.zeros(3, 1, 1, 1, 2)) == ""
    huge = torch.zeros(1).expand(2000, 1000)
    assert hint_of(huge.T, huge) == ""


# --- mutants of the code: for each, one of the cases above tells it from the original ------------

MUTANTS = [
    ("actual.keys() != expected.keys()", "not actual.keys() >= expected.keys()"),
    ("len(actual) != len(expected)", "len(actual) < len(expected)"),
    ("kind_of(actual) != kind_of(expected)", "False"),
    ("elif actual != expected:", "elif False:"),
    ("of(actual) != of(expected)", "cause == \"dtype\" and of(actual) != of(expected)"),
    ("of(actual) != of(expected)", "cause == \"shape\" and of(actual) != of(expected)"),
    ("(\"shape\", shape_of)", "(\"dtype\", dtype_of), (\"shape\", shape_of)"),
    ("not (untyped and cause == \"dtype\")", "True"),
    ("& {int, float, complex}", "& {int, complex}"),
    ("max(d[0] for d in default)", "min(d[0] for d in default)"),
    ("max(d[1] for d in default)", "min(d[1] for d in default)"),
    ("slack * max(d[0]", "max(d[0]"),
    ("slack * max(d[1]", "max(d[1]"),
    ("if rtol is None else rtol", ""),
    ("if atol is None else atol", ""),
    ("(yours == theirs) |", "(a == e) |"),
    ("(yours == theirs) |", ""),
    ("np.isnan(a) & np.isnan(e)", "np.isnan(a) | np.isnan(e)"),
    ("| (np.isnan(a) & np.isnan(e))", ""),
    ("if rtol or atol:", "if True:"),
    ("if rtol or atol:", "if rtol and atol:"),
    ("error <= atol +", "error < atol +"),
    ("np.isfinite(e) & (error", "(error"),
    ("error <= atol + rtol * np.abs(e)", "error <= atol * rtol * np.abs(e)"),
    ("error <= atol + rtol * np.abs(e)", "error <= atol + rtol * np.abs(e).max(initial=0)"),
    ("error <= atol + rtol * np.abs(e)", "error <= atol + rtol * e"),
    ("error <= atol + rtol * np.abs(e)", "error <= rtol * np.abs(e)"),
    ("error <= atol + rtol * np.abs(e)", "error <= atol"),
    ("error = np.abs(a - e)", "error = a - e"),
    ("good.all()", "good.any()"),
    ("np.isfinite(a) != np.isfinite(e)", "np.isnan(a) != np.isnan(e)"),
    ("bad_kind |= np.isnan(a) != np.isnan(e)", "pass"),
    ("np.complex128 if array.dtype.kind == \"c\" else np.float64", "np.float64"),
    ("np.complex128 if array.dtype.kind == \"c\" else np.float64", "np.float32"),
    (".resolve_conj()", ""),
    ("\"bfloat16\": (1.6e-2, 1e-5)", "\"bfloat16\": (1e-3, 1e-5)"),
    ("\"float16\": (1e-3, 1e-5)", "\"float16\": (1.6e-2, 1e-5)"),
]  # fmt: skip


def mutant(old: str, new: str) -> ModuleType:
    """testing.py, or summary.py below it, with a few words changed."""
    below, above = (Path(module.__file__ or "") for module in (summary, testing))
    texts = {path: path.read_text("utf-8") for path in (below, above)}
    assert sum(text.count(old) for text in texts.values()) == 1, f"{old!r} stands there otherwise"
    below_it, module = ModuleType("below"), ModuleType("mutant")
    exec(compile(texts[below].replace(old, new), str(below), "exec"), below_it.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kata.summary", below_it)
        exec(compile(texts[above].replace(old, new), str(above), "exec"), module.__dict__)
    return module


def verdict(module: Any, actual: Any, expected: Any, **options: Any) -> Any:
    try:
        mismatch = module.compare(actual, expected, **options)
    except Exception as error:
        return type(error).__name__
    return mismatch and (mismatch.cause, mismatch.detail)


OPTIONS: list[tuple[Any, Any, dict[str, float]]] = [
    (tensor([1.0]), tensor([1.1]), {"rtol": 0.1}),
    (tensor([1.0]), tensor([1.1]), {"atol": 0.11}),
    (tensor([1.0]), tensor([1.1]), {"rtol": 0.1, "atol": 0.0}),
    (tensor([1.0]), tensor([1.5]), {"rtol": 0.0, "atol": 0.5}),
    (tensor([1.0]), tensor([1.0 + 1e-4]), {"slack": 10.0}),
    (tensor([1.0]), tensor([1.0 + 1e-6]), {"slack": 10.0, "rtol": 0.0, "atol": 0.0}),
    (tensor([1e5]), tensor([1e5 + 1]), {"slack": 10.0}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_the_cases_find_every_mutant(old: str, new: str) -> None:
    module = mutant(old, new)
    every = [(a, e, {}) for a, e, _ in CASES.values()] + OPTIONS
    every += [(a, e, {}) for _, a, e in GENERATED]

    with np.errstate(all="ignore"):
        assert any(
            verdict(module, a, e, **options) != verdict(testing, a, e, **options)
            for a, e, options in every
        )


# --- kept ----------------------------------------------------------------------------------------

ORACLE = """
from pathlib import Path
import torch

def read(path):
    with path.with_name("calls").open("a") as calls:
        calls.write("x")
    return {"sum": torch.tensor([len(path.read_text()) * FACTOR]), "text": "abc"}
"""


def test_an_oracle_is_kept_until_its_spec_or_the_weights_change(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    spec, weights = tmp_path / "tests" / "test_ex01_oracle.py", tmp_path / "weights"

    def sums_and_calls(text: str, factor: int) -> tuple[float, int]:
        for path, content in (weights, text), (spec, ORACLE.replace("FACTOR", str(factor))):
            if not path.exists() or path.read_text() != content:
                path.write_text(content)
        made = testing.kept(modules.load(spec, "oracle").read, weights)
        assert made["text"] == "abc"
        return made["sum"].item(), len((tmp_path / "calls").read_text())

    assert sums_and_calls("12", 3) == (6, 1)
    assert sums_and_calls("12", 3) == (6, 1)
    assert sums_and_calls("123", 3) == (9, 2)
    assert sums_and_calls("123", 4) == (12, 3)
    assert sums_and_calls("123", 3) == (9, 3)
