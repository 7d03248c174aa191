"""Exercise 76: pipeline parallelism.

A model too deep for one rank is cut into stages, one a rank, and a batch into micro-batches
that follow each other through the stages: forward to the last one, and their gradients back
to the first. What a schedule decides is the order in which each rank does its n_micro
forwards and n_micro backwards:

    GPipe    all forwards, then all backwards    up to n_micro micro-batches are under way
    1F1B     as early as possible a backward     up to n_stages − rank are under way
    bubble   (n_stages − 1) / (n_micro + n_stages − 1) of the time, in both

Under way means: gone forward but not yet back, so that the rank keeps its activations.

Source: Huang et al. 2019, "GPipe", section 2, https://arxiv.org/abs/1811.06965;
    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters",
    section 2.2 and figure 4, https://arxiv.org/abs/2104.04473
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

Action = tuple[str, int]  # ("forward", m) or ("backward", m), m the number of a micro-batch


def split_stages(layers: Sequence[nn.Module], n_stages: int) -> list[nn.Sequential]:
    """Cut a model's layers into n_stages pieces that follow each other.

    returns: the stages, each an nn.Sequential of the layers themselves, not copies

    The lengths of the stages differ by one layer at most. More stages than layers raise
    ValueError, which gives both numbers.
    """
    raise NotImplementedError("exercise 76 is not written yet")


def gpipe_schedule(n_stages: int, n_micro: int) -> list[list[Action]]:
    """Plan all forwards first, then all backwards.

    returns: for each rank its actions, in order

    An action is ("forward", m) or ("backward", m), with m from 0 to n_micro − 1; each rank
    does each of them once. Sends don't wait, but a receive does: the forward of m for its
    forward on rank − 1, the backward of m for its backward on rank + 1 (the last rank's for
    its own forward). Messages between two ranks stay in order, so neighbours take the
    micro-batches in the same order.
    """
    raise NotImplementedError("exercise 76 is not written yet")


def one_f_one_b_schedule(n_stages: int, n_micro: int) -> list[list[Action]]:
    """Plan one forward, one backward in turn, as soon as a rank has something to do backward.

    returns: as gpipe_schedule, with the same rules, for any n_stages ≥ 1 and n_micro ≥ 1

    On a rank at most n_stages − rank micro-batches are ever under way, counted from the
    start of their forward to the end of their backward. Nevertheless the whole takes no
    longer than GPipe's: (n_micro + n_stages − 1) forwards and as many backwards.
    """
    raise NotImplementedError("exercise 76 is not written yet")


def run_pipeline(
    stage: nn.Module,
    schedule: list[list[Action]],
    x: Tensor,
    targets: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Tensor | None:
    """Do this rank's part of one forward and backward pass over a batch.

    stage:    this rank's stage; its output has the shape and dtype of its input
    schedule: for each rank of the default process group its actions, in order
    x:        (batch, …), the first stage's input; elsewhere only its shape and dtype count
    targets:  (batch, …) of any dtype, used on the last rank; elsewhere only its shape may count
    loss_fn:  loss_fn(output, targets) is the mean loss over the rows it is given
    returns:  the mean loss over the batch (a scalar) on the last rank, None on the others

    Micro-batch m is the m-th of n_micro equal pieces of the batch's rows. The gradients of
    the batch's mean loss are added to the .grad of the stage's parameters. What a backward
    needs is kept until then and no longer; messages may be kept until the end. Any schedule
    that follows the rules in gpipe_schedule must run, so a send must not wait for its
    receiver. There may be one stage alone, and stages without parameters or with frozen ones.
    x, targets and outputs need not be contiguous. Rows that n_micro does not divide raise
    ValueError on every rank.
    """
    raise NotImplementedError("exercise 76 is not written yet")
