"""Specs for exercise 12: forward mode."""

import math
from contextlib import suppress
from warnings import catch_warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import functional as oracle
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

# What torch imports at the first tangent, for half a second.
with suppress(ImportError), catch_warnings(action="ignore"):
    import torch._decomp.decompositions_for_jvp

pytestmark = pytest.mark.cpu

WITHOUT = [
    *(f"torch.func.{name}" for name in ("jacfwd", "jacrev", "hessian")),
    *(f"torch.autograd.functional.{name}" for name in ("jvp", "hvp", "vhp", "jacobian", "hessian")),
]

# --- Dual ---------------------------------------------------------------------------------------

EXPRESSIONS = {
    "sums": lambda a, b: a + b + 2 + a,
    "products": lambda a, b: a * b * 3 + b * b,
    "powers": lambda a, b: a**3 + b**-2 + a**1 + (b * b) ** 0.5,
    "powers at 0": lambda a, b: (a - a) ** 2 + (b - b) ** 1,
    "exp and tanh": lambda a, b: (a * b).exp() + a.tanh() * b.tanh(),
    "numbers on the left": lambda a, b: 2 + a + (3 - b) + 4 * a + 5 / b,
    "given operations": lambda a, b: (a - b) / b + -a,
}


def carry(ex, expression, numbers, tangents):
    """What an expression gives for two Duals."""
    pairs = zip(numbers, tangents, strict=True)
    y = EXPRESSIONS[expression](*(ex.Dual(number, tangent) for number, tangent in pairs))
    return [y.value, y.tangent]


def saturate(ex, number):
    y = ex.Dual(number, 1.0).tanh()
    return [y.value, y.tangent]


def power(ex, number, tangent, exponent):
    y = ex.Dual(number, tangent) ** exponent
    return [y.value, y.tangent]


def still(ex, number):
    """A Dual made of one number, and what comes of it."""
    x = ex.Dual(number)
    y = x.exp() * x + 3
    return [y.value, y.tangent]


def compare(ex, a, b):
    """All comparisons of a Dual with a Dual (or with a number), as a row of 0 and 1."""
    a = ex.Dual(*a)
    b = ex.Dual(*b) if isinstance(b, tuple) else b
    return "".join(str(int(x)) for x in (a < b, a <= b, a == b, a != b, a >= b, a > b))


def branches(ex, number):
    """A program with branches and a loop: Newton's way to a root, and its slope."""
    x = ex.Dual(number, 1.0)
    root = x if x > 1 else x * 0 + 1
    while abs(root * root - x) > 1e-13:
        root = (root + x / root) * 0.5
    largest = max(root, ex.Dual(1.5, 100.0))
    return [root.value, root.tangent, largest.value, largest.tangent]


def by_torch(expression, numbers, tangents):
    """The same in torch: the slopes by a walk back, times the tangents."""
    leaves = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in numbers]
    y = EXPRESSIONS[expression](*leaves)
    slopes = torch.autograd.grad(y, leaves, materialize_grads=True)
    tangent = sum(s * t for s, t in zip(slopes, tangents, strict=True))
    return [y.item(), tangent.item()]


numbers = st.tuples(st.floats(-2, 2), st.sampled_from([-1.5, -0.4, 0.7, 2.0]))
tangents = st.tuples(st.floats(-3, 3), st.floats(-3, 3))


@given(expression=st.sampled_from(list(EXPRESSIONS)), numbers=numbers, tangents=tangents)
@settings(max_examples=40)
def test_dual_carries_the_slope_along_any_direction(attempt, expression, numbers, tangents):
    out = attempt(carry, expression, numbers, tangents)

    assert_close(out, by_torch(expression, numbers, tangents), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("number", "exponent", "slope"),
    [
        *[(0.0, 1, 1.0), (0.0, 1.5, 0.0), (0.0, 2.0, 0.0), (0.0, 3, 0.0), (1.5, 0, 0.0)],
        *[(-2.0, 3.0, 12.0), (-2.0, -1.0, -0.25), (-2.0, 2, -4.0)],
    ],
)
def test_dual_takes_powers_of_zero_and_of_negative_numbers(attempt, number, exponent, slope):
    out = attempt(power, number, 3.0, exponent)

    assert_close(out, [number**exponent, 3.0 * slope])


@pytest.mark.parametrize(("a", "b"), [(2.0, 5.0), (0.0, 5.0), (2.0, 0.0)])
def test_dual_multiplies_by_the_product_rule(attempt, a, b):
    out = attempt(carry, "products", (a, b), (1.0, 10.0))

    assert_close(out, [3 * a * b + b * b, 3 * (b * 1.0 + a * 10.0) + 2 * b * 10.0])


def test_dual_takes_tanh_of_large_and_small_numbers(attempt):
    for number in (-400.0, 400.0, -800.0, 800.0, 1e300, 1e-9):
        out = attempt(saturate, number)

        slope = 0.0 if abs(number) > 1 else 1.0
        assert_close(out, [math.tanh(number), slope], rtol=1e-12, atol=1e-20)


def test_dual_does_not_move_unless_told_to(attempt):
    out = attempt(still, 20.0)

    assert_close(out, [20 * math.exp(20) + 3, 0.0])


OTHERS = [(1.0, 5.0), (2.0, 3.0), (2.0, 9.0), (3.0, 0.0), 2.0, 2.5, math.nextafter(2, 3)]


@pytest.mark.parametrize("b", OTHERS, ids=str)
def test_dual_compares_by_value_alone(attempt, b):
    out = attempt(compare, (2.0, 5.0), b)

    value = b[0] if isinstance(b, tuple) else b
    expected = {-1: "000111", 0: "011010", 1: "110100"}[(value > 2.0) - (value < 2.0)]
    assert out == expected, f"<, <=, ==, !=, >=, > gave {out}, expected {expected}"


def test_dual_follows_a_program_with_branches_and_a_loop(attempt):
    for number in (0.25, 5.0):
        root = math.sqrt(number)

        out = attempt(branches, number)

        largest = [root, 0.5 / root] if root > 1.5 else [1.5, 100.0]
        assert_close(out, [root, 0.5 / root, *largest])


# --- tensors ------------------------------------------------------------------------------------


class network:
    """tanh(x w₁) w₂, which counts its calls. With `ends_in_a_number`, the sum of the squares."""

    def __init__(self, w1, w2, ends_in_a_number=False):
        self.w1, self.w2, self.ends_in_a_number, self.calls = w1, w2, ends_in_a_number, 0

    def __call__(self, x):
        self.calls += 1
        y = Watched.apply(x @ self.w1).tanh() @ self.w2
        return y.square().sum() if self.ends_in_a_number else y


class Watched(torch.autograd.Function):
    """Changes nothing, and counts how often something walks back through it."""

    generate_vmap_rule = True
    walks_back = 0

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()

    @staticmethod
    def backward(ctx, grad):
        Watched.walks_back += 1
        return grad.clone()


def bent(x):
    """Takes another branch for other values, and no matrix product."""
    return torch.cat([x.flatten() ** 3, x.exp().sum(0)]) if x.sum() > 0 else x.sin().sum(1)


def hilly(x):
    """One number, by another rule for other values."""
    return (x**4).sum() if x.sum() > 0 else (x.sin() * x.cos()).prod()


def jvp(ex, x, v, *weights):
    return ex.jvp(network(*weights) if weights else bent, x, v)


def jvp_costs(ex, x, v, *weights):
    f, before = network(*weights), Watched.walks_back
    ex.jvp(f, x, v)
    return {"calls": f.calls, "walks back": Watched.walks_back - before}


def hvp(ex, x, v, *weights):
    return ex.hvp(network(*weights, ends_in_a_number=True), x, v)


def hvp_of_a_line(ex, x, v, slopes):
    return ex.hvp(lambda x: (slopes * x).sum(), x, v)


def hvp_of_a_branch(ex, x, v):
    return ex.hvp(hilly, x, v)


def jvp_of_a_constant(ex, x, v):
    return ex.jvp(lambda x: torch.full_like(x[0], 2.5), x, v)


def hvp_costs(ex, x, v, *weights):
    f = network(*weights, ends_in_a_number=True)
    with FlopCounterMode(display=False) as counter:
        ex.hvp(f, x, v)
    return {"calls": f.calls, "flops": counter.get_total_flops()}


def marks_left(ex, x, v, *weights):
    """What each of the three leaves on x: whether it wants a gradient, and which it has."""
    f = network(*weights, ends_in_a_number=True)
    left = []
    for run in (
        lambda: ex.jvp(f, x, v),
        lambda: ex.hvp(f, x, v),
        lambda: ex.jacobian_forward(f, x),
    ):
        run()
        left.append((x.requires_grad, x.grad))
    return left


def jacobian(ex, x, *weights):
    return ex.jacobian_forward(network(*weights), x)


def jacobians(ex, *xs):
    return [ex.jacobian_forward(bent, x) for x in xs]


def jacobians_of_one_number(ex, *xs):
    return [ex.jacobian_forward(lambda x: (x**3).sum(), x) for x in xs]


def jacobian_costs(ex, x, *weights):
    f, before = network(*weights), Watched.walks_back
    with FlopCounterMode(display=False) as counter:
        ex.jacobian_forward(f, x)
    flops = counter.get_total_flops()
    return {"calls": f.calls, "flops": flops, "walks back": Watched.walks_back - before}


def randn(rng, *shapes):
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]


def contract(jacobian, v):
    return (jacobian * v).flatten(jacobian.dim() - v.dim()).sum(-1)


def test_jvp_gives_the_result_and_the_jacobian_times_v(attempt, rng):
    x, v, *weights = randn(rng, (2, 3), (2, 3), (3, 5), (5, 4))
    for x, v in ((x, v), (x.mT.contiguous().mT + 1, v), (x, 0 * v)):  # noqa: B020
        out = attempt(jvp, x, v, *weights)

        f = network(*weights)
        assert_close(out, (f(x), contract(oracle.jacobian(f, x), v)), rtol=1e-10, atol=1e-12)


def test_jvp_follows_the_branch_of_the_values(attempt, rng):
    x, v = randn(rng, (2, 3), (2, 3))
    for x in (x.abs(), -x.abs()):  # noqa: B020
        out = attempt(jvp, x, v)

        assert_close(out, (bent(x), contract(oracle.jacobian(bent, x), v)))


def test_jvp_is_zero_where_nothing_depends_on_x(attempt, rng):
    x, v = randn(rng, (2, 3), (2, 3))

    out = attempt(jvp_of_a_constant, x, v)

    assert_close(out, (torch.full((3,), 2.5, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)))


def test_jvp_costs_one_forward_run_and_no_walk_back(attempt, rng):
    costs = attempt(jvp_costs, *randn(rng, (2, 3), (2, 3), (3, 5), (5, 4)))

    assert_close(costs, {"calls": 1, "walks back": 0})


def test_jvp_rejects_a_direction_of_another_shape(attempt, rng):
    x, *weights = randn(rng, (2, 3), (3, 5), (5, 4))

    for shape in ((3,), (7,), (2, 1), (3, 2), ()):
        theirs = r"\D+".join(rf"\b{n}\b" for n in shape)
        with pytest.raises(ValueError, match=rf"(?s)(?=.*\b2\D+3\b)(?=.*{theirs})"):
            attempt(jvp, x, torch.ones(shape, dtype=x.dtype), *weights)


def test_hvp_multiplies_the_hessian_by_v(attempt, rng):
    x, v, *weights = randn(rng, (2, 3), (2, 3), (3, 5), (5, 4))

    out = attempt(hvp, x, v, *weights)

    f = network(*weights, ends_in_a_number=True)
    assert_close(out, contract(oracle.hessian(f, x), v), rtol=1e-10, atol=1e-12)


def test_hvp_follows_the_branch_of_the_values(attempt, rng):
    x, v = randn(rng, (2, 3), (2, 3))
    for x, v in ((x.abs(), v), (-x.abs().float(), v.float())):  # noqa: B020
        out = attempt(hvp_of_a_branch, x, v)

        assert_close(out, contract(oracle.hessian(hilly, x), v))


def test_hvp_is_zero_where_the_gradient_is_a_constant(attempt, rng):
    x, v, slopes = randn(rng, (2, 3), (2, 3), (2, 3))

    out = attempt(hvp_of_a_line, x, v, slopes)

    assert_close(out, torch.zeros_like(x))


def test_hvp_never_pays_for_the_whole_hessian(attempt, rng):
    x, v, *weights = randn(rng, (4, 5), (4, 5), (5, 6), (6, 3))

    costs = attempt(hvp_costs, x, v, *weights)

    forward = 2 * 4 * (5 * 6 + 6 * 3)  # floating point operations of f(x)
    assert costs["calls"] == 1, f"f is called {costs['calls']} times"
    assert costs["flops"] <= 8 * forward, f"costs {costs['flops'] / forward:g} × f(x)"


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (4, 3)], ids=str)
def test_jacobian_has_the_axes_of_the_result_and_then_those_of_x(attempt, rng, shape):
    x, *weights = randn(rng, shape, (3, 5), (5, 2))

    out = attempt(jacobian, x, *weights)

    assert_close(out, oracle.jacobian(network(*weights), x), rtol=1e-10, atol=1e-12)


def test_jacobian_takes_any_function_and_any_precision(attempt, rng):
    (x,) = randn(rng, (2, 3))
    xs = x.abs(), -x.abs().float()

    out = attempt(jacobians, *xs)

    assert_close(out, [oracle.jacobian(bent, x) for x in xs])


def test_jacobian_takes_x_of_any_shape_and_results_of_one_number(attempt, rng):
    xs = randn(rng, (), (1,), (2, 1, 3))

    out = attempt(jacobians_of_one_number, *xs)

    assert_close(out, [3 * x**2 for x in xs])


def test_all_leave_x_without_a_gradient(attempt, rng):
    left = attempt(marks_left, *randn(rng, (2, 3), (2, 3), (3, 5), (5, 4)))

    assert left == [(False, None)] * 3, f"x.requires_grad and x.grad are {left}"


def test_jacobian_costs_one_forward_run_for_each_input_and_no_walk_back(attempt, rng):
    x, *weights = randn(rng, (1, 3), (3, 5), (5, 20))  # 3 inputs, 20 results

    costs = attempt(jacobian_costs, x, *weights)

    forward = 2 * (3 * 5 + 5 * 20)  # floating point operations of f(x)
    assert costs["calls"] <= 3, f"f is called {costs['calls']} times for 3 inputs"
    # The counter takes a tangent for two products, the one with the weight's zero tangent too.
    assert costs["flops"] <= 3 * 3 * forward, f"costs {costs['flops'] / forward:g} × f(x)"
    assert costs["walks back"] == 0, f"walks back {costs['walks back']} times"
