"""Exercise 12: forward mode.

Reverse mode (exercises 10 and 11) walks back from one result to all inputs. Forward mode
goes the other way: each number carries along how fast it changes while the inputs move in
one direction. No graph is kept, and one run gives one number more for every number:

    (v, v̇)  with  v̇ = dv/dt  while  x = x₀ + t · direction

    (u, u̇) · (v, v̇) = (u v, u̇ v + u v̇)

So one run gives one column of a Jacobian, where one walk back gives one row. Run the walk
back itself in forward mode, and out comes a product with the Hessian.

Source: Baydin et al. 2018, "Automatic differentiation in machine learning: a survey",
    section 3.1, https://arxiv.org/abs/1502.05767
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Dual:
    """A number and how fast it changes.

    value:   float
    tangent: float, the derivative of value along the direction in which the inputs move

    Inputs are made by hand: Dual(3.0, 1.0) moves, Dual(3.0) does not. A plain number beside
    a Dual counts as one that does not move.

    >>> x = Dual(3.0, 1.0)
    >>> y = x * x + 2 * x
    >>> y.value, y.tangent
    (15.0, 8.0)
    """

    def __init__(self, value: float, tangent: float = 0.0) -> None:
        self.value = float(value)
        self.tangent = float(tangent)

    def __add__(self, other: Dual | float) -> Dual:
        """self + other."""
        raise NotImplementedError("exercise 12 is not written yet")

    def __mul__(self, other: Dual | float) -> Dual:
        """self · other."""
        raise NotImplementedError("exercise 12 is not written yet")

    def __pow__(self, exponent: float) -> Dual:
        """self to the power of a plain number, whole or not, positive or negative.

        Where self is 0 the exponent is 1 or more, and where self is negative it is whole.
        """
        raise NotImplementedError("exercise 12 is not written yet")

    def exp(self) -> Dual:
        """e to the power of self."""
        raise NotImplementedError("exercise 12 is not written yet")

    def tanh(self) -> Dual:
        """The hyperbolic tangent of self, for numbers of any size."""
        raise NotImplementedError("exercise 12 is not written yet")

    def __lt__(self, other: Dual | float) -> bool:
        """Whether self is less than other.

        Comparisons see values only: a program takes the same branches as with plain numbers.
        """
        raise NotImplementedError("exercise 12 is not written yet")

    def __eq__(self, other: object) -> bool:
        """Whether the values of self and other (a Dual or a number) are equal."""
        raise NotImplementedError("exercise 12 is not written yet")

    # Given: the other operations follow from those above.

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Dual:
        return self * -1

    def __sub__(self, other: Dual | float) -> Dual:
        return self + other * -1

    def __rsub__(self, other: float) -> Dual:
        return self * -1 + other

    def __truediv__(self, other: Dual | float) -> Dual:
        return self * other**-1

    def __rtruediv__(self, other: float) -> Dual:
        return self**-1 * other

    def __le__(self, other: Dual | float) -> bool:
        return self < other or self == other

    def __gt__(self, other: Dual | float) -> bool:
        return not self <= other

    def __ge__(self, other: Dual | float) -> bool:
        return not self < other

    def __abs__(self) -> Dual:
        return -self if self < 0 else self


def jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Run f once, and find how fast its result changes when x moves along v.

    f:       a function of one tensor, made of torch's operations. It may branch on values, so
             it can't be traced beforehand (as torch.func.linearize does)
    x:       (...) floating point, where
    v:       shape and dtype of x, the direction
    returns: f(x), and the Jacobian of f at x times v, which has the shape of f(x)

    f is called once, in forward mode: each step computes its tangent along with its value, and
    nothing walks back. torch.func has what it takes. A v of another shape than x raises
    ValueError with both shapes.
    """
    raise NotImplementedError("exercise 12 is not written yet")


def hvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Multiply the Hessian of f by v, without ever having the Hessian.

    f:       a function of one tensor that gives one number: shape ()
    x, v:    as in jvp, but nobody need check their shapes again
    returns: shape and dtype of x, the Hessian of f at x times v

    It is how fast the gradient of f changes when x moves along v: forward over reverse. f is
    called once, and all together costs no more than eight times f(x), however long x is.
    Where the gradient doesn't change, as for an f in which x stands only linearly, that is 0.
    The caller's x keeps its requires_grad and its .grad.
    """
    raise NotImplementedError("exercise 12 is not written yet")


def jacobian_forward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Find all slopes of f, in one forward run for each number in x.

    f, x:    as in jvp; x has at least one number
    returns: (shape of f(x), then shape of x): the slope of each result in each input

    Right where x is small and f(x) large: it costs x.numel() calls of jvp at most, whatever
    the size of f(x), and nothing walks back.
    """
    raise NotImplementedError("exercise 12 is not written yet")
