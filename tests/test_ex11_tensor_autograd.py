"""Specs for exercise 11: autograd over arrays."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.tensor", "torch.autograd.grad", "torch.autograd.backward"]

# One rounding to float32 costs 6e-8; another order of the sums, in float64, about 1e-15.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class oracle:
    """Torch's tensors have the operations of this exercise, and their own backward."""

    plain = torch.from_numpy

    @staticmethod
    def Tensor(data):
        return torch.from_numpy(np.array(data, dtype=np.float64)).requires_grad_()


EXPRESSIONS = {
    "x y + x + y": lambda x, y: x * y + (x + y),
    "x @ y": lambda x, y: x @ y,
    "relu": lambda x: x.relu(),
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "x used twice": lambda x: x * x + (x + x),
    "x @ x": lambda x: x @ x @ x,
    "two products of each": lambda x, y: x * y + x * (y * y) + (x * x) * y,
    "two matrix products of each": lambda x, y: x @ y + x @ (y + y) + (x + x) @ y,
    "two sums of x": lambda x: x.sum(axis=0) * x.sum(axis=1) + x.sum(axis=1, keepdims=True),
    "sum inside": lambda x, y: (x * y).sum(axis=1, keepdims=True) * x + x.sum(axis=0) * y,
}

# What stands beside a Tensor c and is none itself, on either side.
PLAIN = {
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "x * c": lambda x, c: x * c,
    "c * x": lambda x, c: c * x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x @ c": lambda x, c: x @ c,
    "c @ x": lambda x, c: c @ x,
}


# Operations that leave the array as it is, for positive x of shape (3, 1).
UNCHANGED = {
    "x + 0": lambda x: x + 0,
    "x * 1": lambda x: x * 1,
    "reshape": lambda x: x.reshape(3, 1),
    "sum": lambda x: x.sum(axis=1, keepdims=True),
    "relu": lambda x: x.relu(),
}


def as_array(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else x


def results(ex, result, leaves, upstream):
    """The result and the gradients of the leaves, given that of the result."""
    result.backward(getattr(ex, "plain", np.asarray)(upstream))
    return {"result": as_array(result.data), "grads": [as_array(leaf.grad) for leaf in leaves]}


def unbroadcast(ex, grad, shape):
    return ex.unbroadcast(grad, shape)


def two_graphs(ex, expression, *pairs):
    """Two results of one shape, made one after the other, and then both walked back."""
    leaves = [ex.Tensor(array) for array, _ in pairs]
    made = [EXPRESSIONS[expression](leaf) for leaf in leaves]
    return [
        results(ex, result, [leaf], upstream)
        for result, leaf, (_, upstream) in zip(made, leaves, pairs, strict=True)
    ]


def number(ex, expression, *arrays):
    """The result alone, before any backward."""
    return as_array(EXPRESSIONS[expression](*map(ex.Tensor, arrays)).data)


def express(ex, expression, arrays, upstream):
    leaves = [ex.Tensor(array) for array in arrays]
    return results(ex, EXPRESSIONS[expression](*leaves), leaves, upstream)


def beside_plain(ex, expression, array, plain, upstream):
    x = ex.Tensor(array)
    plain = getattr(ex, "plain", np.asarray)(plain) if isinstance(plain, np.ndarray) else plain
    return results(ex, PLAIN[expression](x, plain), [x], upstream)


def add_up(ex, array, axis, keepdims, upstream):
    x = ex.Tensor(array)
    return results(ex, x.sum(axis=axis, keepdims=keepdims), [x], upstream)


def add_up_all(ex, array):
    """As it is called most often: without arguments, and then backward without one."""
    x = ex.Tensor(array)
    total = x.sum()
    total.backward()
    return {"result": as_array(total.data), "grads": [as_array(x.grad)]}


def reshape(ex, array, shape, upstream):
    x = ex.Tensor(array)
    return results(ex, x.reshape(*shape), [x], upstream)


def results_of_their_own(ex, array):
    """The gradients of a leaf, and of what an operation makes of it, after two walks."""
    grads = []
    for operation in UNCHANGED.values():
        x = ex.Tensor(array)
        y = operation(x)
        y.backward(np.ones(y.data.shape))
        y.backward(np.ones(y.data.shape))
        grads.append([as_array(x.grad), as_array(y.grad)])
    return grads


def chain(ex, array, scale, upstream):
    """A chain of all element-wise operations: the gradient at each link, and the data after it."""
    x = ex.Tensor(array)
    c = ex.Tensor(scale)
    links = [x]
    links.append(links[-1].exp())
    links.append(links[-1] * c)
    links.append(links[-1].log())
    links.append(links[-1] + c)
    links.append(links[-1].relu())
    links.append(links[-1].reshape(-1))
    links.append(links[-1].sum(axis=0, keepdims=True))
    if hasattr(ex, "plain"):
        for link in links:
            link.retain_grad()
    end = results(ex, links[-1], [c], upstream)
    return [(as_array(link.data), as_array(link.grad)) for link in links], end


def classifier(ex, x, w1, b1, w2, targets):
    """The cross-entropy of a small network, and the gradients of its weights after two walks."""
    weights = [ex.Tensor(w) for w in (w1, b1, w2)]
    w1, b1, w2 = weights
    logits = (ex.Tensor(x) @ w1 + b1).relu() @ w2
    log_probs = logits - logits.exp().sum(axis=-1, keepdims=True).log()
    loss = (log_probs * ex.Tensor(targets)).sum() * (-1 / len(x))
    again = {"retain_graph": True} if ex is oracle else {}  # or torch forgets the graph
    loss.backward(**again)
    loss.backward()
    return {"loss": as_array(loss.data), "grads": [as_array(w.grad) for w in weights]}


def used_elements(shape, broadcast):
    """For each element of the broadcast array, the number of the element that it came from."""
    return np.broadcast_to(np.arange(np.prod(shape, dtype=int)).reshape(shape), broadcast)


def normal(np_rng, *shape):
    return np_rng.normal(size=shape)


def domain(np_rng, expression, *shape):
    """Numbers as small and as large as the operation takes; for relu, some are exactly 0."""
    spread = np_rng.uniform(-1, 1, size=shape)
    if expression == "exp":
        return 700 * spread
    if expression == "log":
        return 10.0 ** (300 * spread)
    if expression == "relu":
        signs = np_rng.permutation(np.arange(spread.size) % 3 - 1.0).reshape(shape)
        return signs * 10.0 ** (300 * spread)
    return normal(np_rng, *shape)


def before_broadcasting(shape, axes, ones):
    """A shape that broadcasts to this one: its last axes, some of them with length 1."""
    kept = shape[len(shape) - min(axes, len(shape)) :]
    return tuple(1 if ones >> i & 1 else size for i, size in enumerate(kept))


sizes = st.lists(st.integers(0, 3), max_size=4)
axes = st.integers(0, 4)
ones = st.integers(0, 15)
seeds = st.integers(0, 999)


@given(shape=sizes, axes=axes, ones=ones, seed=seeds)
@settings(max_examples=15)
def test_unbroadcast_adds_up_the_uses_of_each_element(attempt, shape, axes, ones, seed):
    grad = np.random.default_rng(seed).normal(size=shape)
    shape = before_broadcasting(shape, axes, ones)

    out = attempt(unbroadcast, grad, shape)

    expected = np.zeros(shape)
    for element, g in zip(used_elements(shape, grad.shape).flat, grad.flat, strict=True):
        expected.flat[element] += g
    assert_close(out, expected, **EXACT)


@pytest.mark.parametrize(
    ("of_grad", "shape"),
    [
        ((1, 4), (2, 4)),
        ((1, 4), (4, 1)),
        ((3, 4), (4, 3)),
        ((3, 4), (3, 3, 4)),
        ((3, 4), (1, 3, 4)),
        ((3, 4), (5, 1, 4)),
        ((), (1,)),
    ],
    ids=str,
)
def test_unbroadcast_rejects_a_shape_that_does_not_broadcast_to_the_gradients(
    attempt, of_grad, shape
):
    with pytest.raises(ValueError):
        attempt(unbroadcast, np.ones(of_grad), shape)


@given(shape=sizes, x=st.tuples(axes, ones), y=st.tuples(axes, ones), seed=seeds)
@settings(max_examples=15)
def test_adds_and_multiplies_arrays_that_broadcast(attempt, shape, x, y, seed):
    np_rng = np.random.default_rng(seed)
    arrays = [normal(np_rng, *before_broadcasting(shape, *cut)) for cut in (x, y)]
    upstream = normal(np_rng, *np.broadcast_shapes(arrays[0].shape, arrays[1].shape))

    out = attempt(express, "x y + x + y", arrays, upstream)

    assert_close(out, express(oracle, "x y + x + y", arrays, upstream), **EXACT)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (4, 5)),
        ((1, 4), (4, 1)),
        ((2, 6, 3, 4), (2, 6, 4, 5)),
        ((2, 6, 3, 4), (4, 5)),
        ((3, 4), (6, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((2, 1, 3, 5, 4), (7, 1, 4, 6)),
        ((0, 4), (4, 5)),
        ((2, 3, 0), (0, 5)),
    ],
    ids="{0[0]} @ {0[1]}".format,
)
def test_multiplies_matrices_and_stacks_of_them(attempt, np_rng, shapes):
    arrays = [normal(np_rng, *shape) for shape in shapes]
    upstream = normal(np_rng, *(arrays[0] @ arrays[1]).shape)

    out = attempt(express, "x @ y", arrays, upstream)

    assert_close(out, express(oracle, "x @ y", arrays, upstream), **EXACT)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (4,)), ((3,), (3, 4)), ((3,), (3,)), ((3, 4), ())], ids=str
)
def test_rejects_a_vector_as_a_factor_of_a_matrix_product(attempt, shapes):
    arrays = [np.ones(shape) for shape in shapes]

    with pytest.raises(ValueError, match=".*".join(re.escape(str(s)) for s in shapes)):
        attempt(number, "x @ y", *arrays)


@pytest.mark.parametrize("keepdims", [False, True], ids=["axes go", "axes stay"])
def test_sums_along_any_axes(attempt, np_rng, keepdims):
    x = normal(np_rng, 2, 3, 4, 1)
    for axis in (None, 0, -2, (0, 2), (-1, 1), (2, 0, -1), (0, 1, 2, 3)):
        upstream = normal(np_rng, *x.sum(axis, keepdims=keepdims).shape)

        out = attempt(add_up, x, axis, keepdims, upstream)

        assert_close(out, add_up(oracle, x, axis, keepdims, upstream), **EXACT)


def test_sums_everything_unless_told_otherwise(attempt, np_rng):
    x = normal(np_rng, 2, 3, 1)

    out = attempt(add_up_all, x)

    assert_close(out, {"result": x.sum(), "grads": [np.ones((2, 3, 1))]}, **EXACT)


def test_reshapes_without_changing_the_order(attempt, np_rng):
    columns_first = normal(np_rng, 3, 4, 2).transpose()
    no_layout_of_its_own = normal(np_rng, 4, 3, 2).transpose(2, 0, 1)[:, ::-1]
    for x in (columns_first, no_layout_of_its_own):
        for shape in ((6, 4), (-1,), (3, -1, 2), (2, 4, 3), (1, 24)):
            upstream = normal(np_rng, *x.reshape(shape).shape)

            out = attempt(reshape, x, shape, upstream)

            assert_close(out, reshape(oracle, x, shape, upstream), **EXACT)


def test_finds_the_slopes_of_relu_exp_and_log(attempt, np_rng):
    for expression in ("relu", "exp", "log"):
        x, upstream = domain(np_rng, expression, 5, 4), normal(np_rng, 5, 4)

        out = attempt(express, expression, [x], upstream)

        assert_close(out, express(oracle, expression, [x], upstream), rtol=1e-12, atol=0)


def test_keeps_what_one_call_needs_apart_from_the_next(attempt, np_rng):
    for expression in ("relu", "exp", "log", "x @ x"):
        pairs = [(domain(np_rng, expression, 3, 3), normal(np_rng, 3, 3)) for _ in range(2)]

        out = attempt(two_graphs, expression, *pairs)

        assert_close(out, two_graphs(oracle, expression, *pairs), **EXACT)


def test_takes_numbers_and_arrays_on_either_side(attempt, np_rng):
    x = normal(np_rng, 4, 4)
    for expression in PLAIN:
        for plain in (normal(np_rng, 4, 4), -3)[: 1 if "@" in expression else 2]:
            upstream = normal(np_rng, 4, 4)

            out = attempt(beside_plain, expression, x, plain, upstream)

            assert_close(out, beside_plain(oracle, expression, x, plain, upstream), **EXACT)


def test_adds_up_the_gradients_of_a_tensor_that_is_used_more_than_once(attempt, np_rng):
    x, y, upstream = (normal(np_rng, 3, 3) for _ in range(3))
    of_one = ("x used twice", "x @ x", "two sums of x")
    of_two = ("sum inside", "two products of each", "two matrix products of each")
    for expression in of_one + of_two:
        arrays = [x] if expression in of_one else [x, y]

        out = attempt(express, expression, arrays, upstream)

        assert_close(out, express(oracle, expression, arrays, upstream), **EXACT)


def test_makes_a_new_tensor_where_the_numbers_stay_the_same(attempt, np_rng):
    x = 1 + np_rng.random((3, 1))

    out = attempt(results_of_their_own, x)

    assert_close(out, [[np.full((3, 1), 2.0), np.ones((3, 1))]] * len(UNCHANGED))


def test_leaves_numbers_and_gradients_on_the_way_as_they_are(attempt, np_rng):
    x, scale, upstream = normal(np_rng, 3, 4), abs(normal(np_rng, 4)), normal(np_rng, 1)

    out = attempt(chain, x, scale, upstream)

    assert_close(out, chain(oracle, x, scale, upstream), **EXACT)


def test_finds_the_gradients_of_a_classifier_and_adds_them_up_over_two_calls(attempt, np_rng):
    batch, d_model, d_ff, n_classes = 6, 5, 7, 3
    x, w1, b1 = normal(np_rng, batch, d_model), normal(np_rng, d_model, d_ff), normal(np_rng, d_ff)
    w2 = normal(np_rng, d_ff, n_classes)
    targets = np.eye(n_classes)[np_rng.integers(n_classes, size=batch)]

    out = attempt(classifier, x, w1, b1, w2, targets)

    assert_close(out, classifier(oracle, x, w1, b1, w2, targets), **EXACT)
