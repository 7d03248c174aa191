"""Exercise 11: autograd over arrays.

Exercise 10 kept one slope for each pair of numbers. With arrays that would be a table of
slopes, far too large to keep. What a step needs is only the product of that table with the
gradient that arrives, and each operation has a short formula for it. For y = x w:

    ∂L/∂x = ∂L/∂y wᵀ        ∂L/∂w = xᵀ ∂L/∂y

A gradient always has the shape of its array. Where broadcasting used an element several
times, its uses add up: `unbroadcast`.

Source: Baydin et al. 2018, "Automatic differentiation in machine learning: a survey",
    section 3.2, https://arxiv.org/abs/1502.05767
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring the gradient of a broadcast array back to the shape from before the broadcasting.

    grad:    (...) float64, one gradient for each use of an element
    shape:   the shape of the array before it was broadcast to that of grad
    returns: (shape) float64, for each element the sum over its uses

    >>> unbroadcast(np.ones((4, 2, 3)), (2, 1))  # each element was used 4 · 3 times
    array([[12.],
           [12.]])

    A shape that does not broadcast to that of grad raises ValueError. grad stays as it is.
    """
    raise NotImplementedError("exercise 11 is not written yet")


class Tensor:
    """An array that remembers what it was made from.

    data:    (...) float64, the numbers
    grad:    same shape, the slope of some L in each number, after a backward call; before
             that zeros
    parents: pairs (parent, back), one for each Tensor that this one was made from, where
             back(gradient of this one) is what that adds to the parent's gradient

    A leaf is made by hand and has no parents: Tensor([[1.0, 2.0]]). All others come from
    operations. An operation always makes a new Tensor, also where no number changes, and
    changes no array that exists, neither data nor grad; neither does a `back`.

    >>> x = Tensor([1.0, 2.0, 3.0])
    >>> y = (x * x).sum()
    >>> y.backward()
    >>> float(y.data), x.grad
    (14.0, array([2., 4., 6.]))
    """

    __array_ufunc__ = None  # so that array * Tensor comes to Tensor.__rmul__

    def __init__(self, data, parents: tuple[tuple[Tensor, Callable], ...] = ()) -> None:
        self.data = np.asarray(data, dtype=np.float64)
        self.grad = np.zeros_like(self.data)
        self.parents = parents

    def __add__(self, other: Tensor | np.ndarray | float) -> Tensor:
        """self + other, of shapes that broadcast.

        A number or an array counts as a leaf, here and in `*` and `@`.
        """
        raise NotImplementedError("exercise 11 is not written yet")

    def __mul__(self, other: Tensor | np.ndarray | float) -> Tensor:
        """self · other, element by element, of shapes that broadcast."""
        raise NotImplementedError("exercise 11 is not written yet")

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """The matrix product over the last two axes; leading axes broadcast.

        self:    (..., n, k)
        other:   (..., k, m)
        returns: (..., n, m)

        A vector, with one axis only, raises ValueError with both shapes: reshape it first. So
        does an array with no axis.
        """
        raise NotImplementedError("exercise 11 is not written yet")

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The sum over one axis, several, or all (None). They go, or stay with length 1."""
        raise NotImplementedError("exercise 11 is not written yet")

    def reshape(self, *shape: int) -> Tensor:
        """The same numbers in the same order in another shape. One size may be −1."""
        raise NotImplementedError("exercise 11 is not written yet")

    def relu(self) -> Tensor:
        """Each number where it is positive, else 0. At 0 itself the slope counts as 0."""
        raise NotImplementedError("exercise 11 is not written yet")

    def exp(self) -> Tensor:
        """e to the power of each number."""
        raise NotImplementedError("exercise 11 is not written yet")

    def log(self) -> Tensor:
        """The natural logarithm of each number; all are positive."""
        raise NotImplementedError("exercise 11 is not written yet")

    # Given: the walk back of exercise 10, and what follows from the operations above.

    def backward(self, grad: np.ndarray | None = None) -> None:
        """Find the slopes of L in every Tensor that this one was made from.

        grad: same shape as self, the slope of L in each number of self. Without it, self is
              L itself and holds one number.

        Leaves add up over several calls. All others start afresh.
        """
        if grad is None and self.data.size != 1:
            raise ValueError(f"backward() starts from one number, got shape {self.data.shape}")
        order = _topological_order(self)
        for tensor in order:
            if tensor.parents:
                tensor.grad = np.zeros_like(tensor.data)
        self.grad += 1.0 if grad is None else grad
        for tensor in reversed(order):
            for parent, back in tensor.parents:
                more = back(tensor.grad)
                if more.shape != parent.grad.shape:
                    raise ValueError(
                        f"an array of shape {parent.grad.shape} got a gradient of {more.shape}"
                    )
                parent.grad += more

    __radd__ = __add__
    __rmul__ = __mul__

    def __rmatmul__(self, other: np.ndarray) -> Tensor:
        return Tensor(other) @ self

    def __neg__(self) -> Tensor:
        return self * -1

    def __sub__(self, other: Tensor | np.ndarray | float) -> Tensor:
        return self + other * -1

    def __rsub__(self, other: np.ndarray | float) -> Tensor:
        return self * -1 + other


def _topological_order(root: Tensor) -> list[Tensor]:
    order, seen, waiting = [], set(), [(root, False)]
    while waiting:
        tensor, parents_done = waiting.pop()
        if parents_done:
            order.append(tensor)
        elif tensor not in seen:
            seen.add(tensor)
            waiting += [(tensor, True), *((parent, False) for parent, _ in tensor.parents)]
    return order
