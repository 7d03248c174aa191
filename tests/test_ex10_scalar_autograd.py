"""Specs for exercise 10: scalar autograd."""

import math
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.autograd.grad", "torch.autograd.backward", "torch.Tensor.backward"]


class oracle:
    """Torch's scalars have the operations of a Value, and their own backward."""

    @staticmethod
    def Value(number):
        return torch.tensor(number, dtype=torch.float64, requires_grad=True)


EXPRESSIONS = {
    "sums and products": lambda a, b, c: a * b + c,
    "powers": lambda a, b, c: a**3 + b**-2 + c**0.5,
    "powers at 0": lambda a: a**2 + a**1,
    "exp": lambda a, b: a.exp() + b.exp(),
    "tanh": lambda a, b, c: a.tanh() + b.tanh() + c.tanh(),
    "relu": lambda a, b, c: a.relu() + b.relu() * 2 + c.relu() * 3,
    "numbers on the right": lambda a, b, c: (a + 2) * 3 + (b - 2) / 4 + c * 5,
    "numbers on the left": lambda a, b, c: 2 + a + (3 - b) + 4 * c + 5 / b,
    "given operations": lambda a, b, c: (a - b) / c + -a,
    "used twice": lambda a, b: a + a + b * b,
    "used early and late": lambda a, b: a * (a * b).tanh() * a.exp(),
    "neuron": lambda x, y, v, w, b: (x * v + y * w + b).tanh(),
}


# Operations that give the number of x again, where it is positive.
UNCHANGED = {
    "x + 0": lambda x: x + 0,
    "x * 1": lambda x: x * 1,
    "x ** 1": lambda x: x**1,
    "relu": lambda x: x.relu(),
}


def result(ex, expression, numbers):
    return float(EXPRESSIONS[expression](*(ex.Value(number) for number in numbers)).data)


def slopes(ex, expression, numbers):
    leaves = [ex.Value(number) for number in numbers]
    y = EXPRESSIONS[expression](*leaves)
    y.backward()
    return {"y": float(y.data), "slopes": [float(leaf.grad) for leaf in leaves]}


def ladder(ex, number):
    """Each rung needs both rungs below it, and is finished when both rungs above it are."""
    x = ex.Value(number)
    rungs = [x, x * 2]
    for _ in range(4):
        rungs.append(rungs[-1] * rungs[-2] + rungs[-2])
    rungs[-1].backward()
    return {"y": float(rungs[-1].data), "slope": float(x.grad)}


def program(ex, numbers, steps):
    """Run steps such as ["*", 0, 2], each on earlier results, and sum up all results."""
    values = [ex.Value(number) for number in numbers]
    leaves = list(values)
    for operation, i, j in steps:
        a, b = values[i % len(values)], values[j % len(values)]
        if operation == "+":
            values.append(a + b)
        elif operation == "*":
            values.append(a * b)
        elif operation == "square":
            values.append(a**2)
        elif operation == "relu":
            values.append(a.relu())
        elif operation == "tanh":
            values.append(a.tanh())
        else:
            values.append(a.tanh().exp())  # the tanh keeps exp from growing too fast
    y = values[0]
    for value in values[1:]:
        y = y + value
    y.backward()
    return {"y": float(y.data), "slopes": [float(leaf.grad) for leaf in leaves]}


def orders(ex):
    """The names of a small graph in the orders of f and then d, "?" for a Value not named."""
    a, b = ex.Value(2.0), ex.Value(2.0)
    c = a * b
    g = b.exp()  # not one of those that d depends on
    d = c + a
    e = d.tanh()
    f = e * c + g
    h = f + b  # made from f, not the other way round
    values = dict(zip("abcdefgh", (a, b, c, d, e, f, g, h), strict=True))
    names = {id(value): name for name, value in values.items()}
    return [[names.get(id(value), "?") for value in ex.topological_order(x)] for x in (f, d)]


def backward_twice(ex, x, w):
    x, w = ex.Value(x), ex.Value(w)
    h = x * w
    y = h * h + h
    y.backward()
    y.backward()
    return {"x": float(x.grad), "w": float(w.grad), "h": float(h.grad), "y": float(y.grad)}


def leaf_alone(ex):
    """The slopes of a leaf in itself after 0 to 2 calls, and whether it is its own order."""
    x = ex.Value(3.0)
    grads = [float(x.grad)]
    for _ in range(2):
        x.backward()
        grads.append(float(x.grad))
    return grads, [value is x for value in ex.topological_order(x)]


def two_results(ex, x, w):
    x, w = ex.Value(x), ex.Value(w)
    h = x * w
    y, z = h**2, h.exp()
    y.backward()
    z.backward()
    return {name: float(value.grad) for name, value in zip("xwhyz", (x, w, h, y, z), strict=True)}


def results_of_their_own(ex, number):
    """The slopes in a leaf and in what is made from it, after two calls."""
    slopes = []
    for operation in UNCHANGED.values():
        x = ex.Value(number)
        y = operation(x)
        y.backward()
        y.backward()
        slopes.append([float(x.grad), float(y.grad)])
    return slopes


@contextmanager
def calls_limited(limit):
    """Raise RuntimeError at the limit-th function call. Counted, since clocks differ."""
    left = limit

    def count(frame, event, argument):
        nonlocal left
        left -= event.endswith("call")
        if left < 0:
            sys.setprofile(None)
            raise RuntimeError(f"more than {limit} function calls in one backward")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def doubled(ex, times):
    """2 to the power of `times` paths lead from y to x, over only so many Values."""
    x = y = ex.Value(3.0)
    for _ in range(times):
        y = y + y
    with calls_limited(100 * times):
        y.backward()
    return float(x.grad)


def chain(ex, length):
    x = y = ex.Value(1.0)
    for _ in range(length):
        y = y + 1.0
    y.backward()
    return [float(y.data), float(x.grad), len(ex.topological_order(y)) > length]


def compared(ex, length):
    """How often Values are compared in a walk through a chain, as `in` does along a list."""
    count, own = 0, vars(ex.Value).get("__eq__")

    def equal(value, other):
        nonlocal count
        count += 1
        return value is other

    ex.Value.__eq__ = equal
    try:
        chain(ex, length)
    finally:
        if own:
            ex.Value.__eq__ = own
        else:
            del ex.Value.__eq__
    return count


def value_as_exponent(ex):
    return (ex.Value(2.0) ** ex.Value(3.0)).data


def test_computes_the_number_itself_before_any_slope(attempt):
    expressions = ("sums and products", "powers", "tanh", "relu", "numbers on the left")
    for arguments in ((expression, [0.5, -0.25, 1.5]) for expression in expressions):
        out = attempt(result, *arguments)

        assert_close(out, result(oracle, *arguments))


@pytest.mark.parametrize(("a", "b"), [(2.0, -3.0), (2.0, 0.0), (0.0, 2.0)])
def test_finds_the_slopes_of_sums_and_products(attempt, a, b):
    out = attempt(slopes, "sums and products", [a, b, 5.0])

    assert_close(out, {"y": a * b + 5, "slopes": [b, a, 1.0]})


def test_finds_the_slopes_of_powers(attempt):
    for arguments in (("powers", [-1.5, -0.7, 3.0]), ("powers at 0", [0.0])):
        out = attempt(slopes, *arguments)

        assert_close(out, slopes(oracle, *arguments))


def test_finds_the_slopes_of_exp_and_tanh(attempt):
    tanhs = ([0.8, -400.0, 400.0], [-0.3, -800.0, 800.0], [0.0, 1e5, -1e300])
    for arguments in (("exp", [0.5, -2.0]), *(("tanh", numbers) for numbers in tanhs)):
        out = attempt(slopes, *arguments)

        assert_close(out, slopes(oracle, *arguments), rtol=1e-12, atol=1e-14)


def test_finds_the_slopes_of_relu(attempt):
    out = attempt(slopes, "relu", [2.0, -3.0, 0.0])

    assert_close(out, {"y": 2.0, "slopes": [1.0, 0.0, 0.0]})


def test_takes_plain_numbers_on_either_side(attempt):
    for expression in ("numbers on the right", "numbers on the left", "given operations"):
        arguments = (expression, [1.5, -2.0, 4.0])

        out = attempt(slopes, *arguments)

        assert_close(out, slopes(oracle, *arguments))


def test_adds_up_the_slopes_of_a_value_that_is_used_more_than_once(attempt):
    for expression in ("used twice", "used early and late"):
        arguments = (expression, [1.2, -0.7])

        out = attempt(slopes, *arguments)

        assert_close(out, slopes(oracle, *arguments))


def test_passes_a_slope_on_only_when_it_is_complete(attempt):
    out = attempt(ladder, 0.3)

    assert_close(out, ladder(oracle, 0.3))


def test_lists_each_value_once_and_after_those_it_was_made_from(attempt):
    of_f, of_d = attempt(orders)

    for out, all_names in ((of_f, "abcdefg"), (of_d, "abcd")):
        names = [name for name in out if name != "?"]
        assert sorted(names) == list(all_names)
        assert out[-1] == all_names.replace("g", "")[-1]
        for later, earlier in ("ca", "cb", "dc", "da", "ed", "fe", "fc", "gb", "fg"):
            if later in all_names:
                assert names.index(later) > names.index(earlier), f"{later} stands before {earlier}"


def test_adds_up_leaves_over_two_backward_calls_and_starts_all_others_afresh(attempt):
    x, w = 1.5, -2.0

    out = attempt(backward_twice, x, w)

    slope = 2 * x * w + 1  # of y = h² + h in h = x w
    assert_close(out, {"x": 2 * w * slope, "w": 2 * x * slope, "h": slope, "y": 1.0})


def test_takes_a_leaf_for_a_result(attempt):
    out = attempt(leaf_alone)

    assert_close(out, ([0.0, 1.0, 2.0], [True]))


def test_makes_a_new_value_where_the_number_stays_the_same(attempt):
    out = attempt(results_of_their_own, 3.0)

    assert_close(out, [[2.0, 1.0]] * len(UNCHANGED))


def test_keeps_apart_the_slopes_of_two_results_that_share_a_value(attempt):
    x, w = 1.5, -2.0

    out = attempt(two_results, x, w)

    slope = math.exp(x * w)
    both = 2 * x * w + slope
    assert_close(out, {"x": w * both, "w": x * both, "h": slope, "y": 1.0, "z": 1.0})


def test_visits_each_value_once_however_many_paths_lead_to_it(attempt):
    out = attempt(doubled, 40)

    assert_close(out, 2.0**40)


def test_follows_a_chain_of_five_thousand_values(attempt):
    out = attempt(chain, 5000)

    assert_close(out, [5001.0, 1.0, True])


def test_looks_a_value_up_without_comparing_it_with_all_others(attempt):
    count = attempt(compared, 800)

    assert count < 20 * 800, f"{count:,} comparisons in a chain of 800 Values"


def test_rejects_a_value_as_exponent(attempt):
    with pytest.raises(TypeError):
        attempt(value_as_exponent)


numbers = st.floats(-2, 2)
steps = st.tuples(
    st.sampled_from(["+", "*", "square", "relu", "tanh", "exp"]),
    st.integers(0, 6),
    st.integers(0, 6),
)


@given(numbers=st.lists(numbers, min_size=1, max_size=3), steps=st.lists(steps, max_size=4))
def test_agrees_with_torch_on_any_graph(attempt, numbers, steps):
    out = attempt(program, numbers, steps)

    assert_close(out, program(oracle, numbers, steps))


@given(numbers=st.tuples(*[numbers] * 5), which=st.integers(0, 4))
def test_predicts_what_a_small_step_does(attempt, numbers, which):
    step = 1e-5
    up, down = list(numbers), list(numbers)
    up[which] += step
    down[which] -= step

    out = attempt(slopes, "neuron", list(numbers))

    rise = slopes(oracle, "neuron", up)["y"] - slopes(oracle, "neuron", down)["y"]
    assert_close(out["slopes"][which], rise / (2 * step))
