"""Exercise 18: learning rate schedule and gradient clipping.

Two guards of a training run. The schedule keeps the first steps small, while an optimizer's
averages are still young, and the last ones too, so that the weights come to rest. Clipping
bounds the length of a gradient and keeps its direction, so that one odd batch cannot throw
the weights away:

    lr(s) = max_lr · (s + 1) / (n_warmup + 1)                             s < n_warmup
    lr(s) = min_lr + (max_lr − min_lr) · (1 + cos(π · progress)) / 2      from there on

    progress = (s − n_warmup) / (n_steps − 1 − n_warmup), and 1 after the last step

    norm = √(Σ g²) over all numbers of all gradients together
    g ← g · min(1, max_norm / (norm + 1e-6))

Source: Loshchilov and Hutter 2017, "SGDR", eq. 5, https://arxiv.org/abs/1608.03983
    Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural
    networks", algorithm 1, https://arxiv.org/abs/1211.5063
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def warmup_cosine(step: int, max_lr: float, min_lr: float, n_warmup: int, n_steps: int) -> float:
    """Give the learning rate of one step: up in a straight line, down along a cosine.

    step:     int, the first one is 0 and the last one n_steps − 1
    max_lr:   the rate of step n_warmup
    min_lr:   the rate of step n_steps − 1, and of any step after it
    n_warmup: number of steps before the peak; may be 0
    n_steps:  number of all steps

    Warming up begins above 0, at max_lr / (n_warmup + 1), whatever min_lr is. Fewer than
    n_warmup + 2 steps, which leave no room for the peak and the end, raise ValueError,
    which says what n_steps was.
    """
    raise NotImplementedError("exercise 18 is not written yet")


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Shorten all gradients by one factor, in place, if together they are longer than max_norm.

    parameters: tensors, each with a .grad of any shape and floating dtype, or None; such as
                model.parameters(), which can be read only once
    max_norm:   the longest norm that is allowed
    returns:    () the norm before clipping, float32, or float64 where a gradient is

    The norm is summed up in that dtype: the square of 300 is more than float16 holds. Each
    gradient keeps its own dtype. Without any gradient the norm is 0. A norm that is inf or
    NaN raises RuntimeError and leaves the gradients as they were: a factor made from it would
    spread NaN to all of them. A finite norm beyond 1e19, whose square no float32 holds, may
    be refused in the same way: such a step is lost in any case.
    """
    raise NotImplementedError("exercise 18 is not written yet")
