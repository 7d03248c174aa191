"""Exercise 10: scalar autograd.

A computation is a graph: every number is made from earlier ones. If each step keeps the
slopes of its result in its inputs, one walk from the end to the start gives the slope of
the final number in all the others (the chain rule):

    ∂y/∂p = Σ over all v that were made from p:  ∂v/∂p · ∂y/∂v

Source: Baydin et al. 2018, "Automatic differentiation in machine learning: a survey",
    section 3.2, https://arxiv.org/abs/1502.05767
"""

from __future__ import annotations

import math


class Value:
    """A number that remembers what it was made from.

    data:    float, the number
    grad:    float, the slope of some y in this number, after y.backward(); before that 0.0
    parents: pairs (parent, slope), one for each Value that this one was made from, where
             slope is the derivative of this number with respect to that parent alone

    A leaf is made by hand and has no parents: Value(2.0). All others come from operations,
    and an operation always makes a new Value, also for x * 1 or the relu of a positive number.
    The specs use Value(number), data, grad, the operations, `backward` and
    `topological_order`; what a Value keeps besides is up to you.

    >>> x = Value(3.0)
    >>> y = x * x + 2 * x
    >>> y.backward()
    >>> y.data, x.grad
    (15.0, 8.0)
    """

    def __init__(self, data: float, parents: tuple[tuple[Value, float], ...] = ()) -> None:
        self.data = float(data)
        self.grad = 0.0
        self.parents = parents

    def __add__(self, other: Value | float) -> Value:
        """self + other. A plain number counts as a leaf, here and in all operations."""
        raise NotImplementedError("exercise 10 is not written yet")

    def __mul__(self, other: Value | float) -> Value:
        """self · other."""
        raise NotImplementedError("exercise 10 is not written yet")

    def __pow__(self, exponent: float) -> Value:
        """self to the power of a plain number, whole or not, positive or negative.

        Where self is 0 the exponent is 1 or more, and where self is negative it is whole.
        A Value as exponent raises TypeError.
        """
        raise NotImplementedError("exercise 10 is not written yet")

    def exp(self) -> Value:
        """e to the power of self."""
        raise NotImplementedError("exercise 10 is not written yet")

    def tanh(self) -> Value:
        """The hyperbolic tangent of self, for numbers of any size."""
        raise NotImplementedError("exercise 10 is not written yet")

    def relu(self) -> Value:
        """self where it is positive, else 0. At 0 itself the slope counts as 0."""
        raise NotImplementedError("exercise 10 is not written yet")

    def backward(self) -> None:
        """Find the slope of this number in every Value that it depends on.

        Afterwards, for every such Value v:
        - a leaf's grad has grown by ∂self/∂v: leaves add up over several backward calls;
        - any other v.grad is ∂self/∂v of this call alone (so self.grad is 1), whatever
          was there before.
        Values that this number does not depend on keep their grad.

        Takes one visit to each Value, however many paths lead to it.
        """
        raise NotImplementedError("exercise 10 is not written yet")

    # Given: the other operations follow from those above.

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Value:
        return self * -1

    def __sub__(self, other: Value | float) -> Value:
        return self + other * -1

    def __rsub__(self, other: float) -> Value:
        return self * -1 + other

    def __truediv__(self, other: Value | float) -> Value:
        return self * other**-1

    def __rtruediv__(self, other: float) -> Value:
        return self**-1 * other


def topological_order(root: Value) -> list[Value]:
    """List all Values that root depends on, and root, each after those it was made from.

    Each stands in the list once (the same object, not an equal one), root last. Chains of
    many thousand Values are in order: Python gives up on functions nested 1000 deep, and
    looking through a list of all that was seen, for each Value anew, takes far too long.
    """
    raise NotImplementedError("exercise 10 is not written yet")
