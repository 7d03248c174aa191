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
    # solution
    if n_stages > len(layers):
        raise ValueError(
            f"each stage needs a layer, got {n_stages} stages for {len(layers)} layers; "
            f"use at most {len(layers)} stages"
        )
    cuts = [stage * len(layers) // n_stages for stage in range(n_stages + 1)]
    return [nn.Sequential(*layers[i:j]) for i, j in pairwise(cuts)]


def gpipe_schedule(n_stages: int, n_micro: int) -> list[list[Action]]:
    """Plan all forwards first, then all backwards.

    returns: for each rank its actions, in order

    An action is ("forward", m) or ("backward", m), with m from 0 to n_micro − 1; each rank
    does each of them once. Sends don't wait, but a receive does: the forward of m for its
    forward on rank − 1, the backward of m for its backward on rank + 1 (the last rank's for
    its own forward). Messages between two ranks stay in order, so neighbours take the
    micro-batches in the same order.
    """
    # solution
    forwards = [("forward", m) for m in range(n_micro)]
    backwards = [("backward", m) for m in range(n_micro)]
    return [forwards + backwards for _ in range(n_stages)]


def one_f_one_b_schedule(n_stages: int, n_micro: int) -> list[list[Action]]:
    """Plan one forward, one backward in turn, as soon as a rank has something to do backward.

    returns: as gpipe_schedule, with the same rules, for any n_stages ≥ 1 and n_micro ≥ 1

    On a rank at most n_stages − rank micro-batches are ever under way, counted from the
    start of their forward to the end of their backward. Nevertheless the whole takes no
    longer than GPipe's: (n_micro + n_stages − 1) forwards and as many backwards.
    """
    # solution
    schedule = []
    for rank in range(n_stages):
        # The first backward reaches this rank after a forward on each later rank. Until
        # then it does forwards, one for each of them.
        n_warmup = min(n_stages - rank - 1, n_micro)
        actions = [("forward", m) for m in range(n_warmup)]
        for m in range(n_warmup, n_micro):
            actions += [("forward", m), ("backward", m - n_warmup)]
        actions += [("backward", m) for m in range(n_micro - n_warmup, n_micro)]
        schedule.append(actions)
    return schedule


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
    # solution
    rank, n_stages = dist.get_rank(), len(schedule)
    n_micro = len(schedule[rank]) // 2
    if len(x) % n_micro:
        raise ValueError(
            f"the batch must be divisible into micro-batches, got {len(x)} rows for {n_micro}"
        )
    first, last = rank == 0, rank == n_stages - 1
    micro_x, micro_targets = x.chunk(n_micro), targets.chunk(n_micro)
    loss = torch.zeros((), dtype=x.dtype, device=x.device)
    under_way: dict[int, tuple[Tensor, Tensor]] = {}
    sends: list[dist.Work] = []

    for kind, m in schedule[rank]:
        if kind == "forward":
            h = micro_x[m] if first else _receive(micro_x[m], rank - 1).requires_grad_()
            out = stage(h)
            if last:
                # The mean over the batch is the mean of its micro-batches' means.
                out = loss_fn(out, micro_targets[m]) / n_micro
                loss += out.detach()
            else:
                sends.append(_send(out, rank + 1))
            under_way[m] = h, out
        else:
            h, out = under_way.pop(m)
            grad = None if last else _receive(out, rank + 1)
            if out.requires_grad:  # on the first rank a stage without parameters has no graph
                out.backward(grad)
            if not first:
                sends.append(_send(h.grad, rank - 1))
    for send in sends:
        send.wait()
    return loss if last else None


def _send(tensor: Tensor, to: int) -> dist.Work:
    # What lies in memory travels, so it must lie there in order. dist.send would wait until
    # the other rank receives, and two ranks that both send would wait for ever.
    return dist.isend(tensor.detach().contiguous(), to)


def _receive(like: Tensor, source: int) -> Tensor:
    tensor = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.recv(tensor, source)
    return tensor
