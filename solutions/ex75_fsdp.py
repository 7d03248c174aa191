"""Exercise 75: fully sharded data parallelism.

In data parallelism every rank works on its own share of the batch, and every rank holds all
parameters. Here it holds an n-th of each layer. A layer is put together only while it is
computed on, and its gradient is cut up again as soon as it is there:

    forward    all-gather the layer, compute, free it
    backward   all-gather the layer, compute, free it; reduce-scatter its gradient

    gradient of shard r = r-th piece of (1 / n) Σ_s gradient on rank s

What a rank holds of a layer is one flat vector: the layer's tensors, row by row, end to end,
padded with zeros until n divides the length, and of that the r-th of n equal pieces. So one
collective moves a whole layer, whatever the shapes of its tensors.

Source: Zhao et al. 2023, "PyTorch FSDP", sections 3.2 and 4.1,
    https://arxiv.org/abs/2304.11277
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def shard_parameters(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Keep this rank's piece of some tensors. Sends nothing.

    tensors: of any shapes, all of one dtype, the same on every rank
    group:   the n ranks that share them; None stands for all ranks
    returns: (⌈elements / n⌉,), rank r's piece: the r-th of n equal pieces of all tensors laid end
             to end in their order, with zeros behind the last. A copy: what it was cut from can
             be freed. Needs no gradient.

    Different dtypes raise TypeError, which names them all: one flat vector has one dtype.
    """
    # solution
    dtypes = sorted({str(t.dtype) for t in tensors})
    if len(dtypes) > 1:
        raise TypeError(
            f"tensors must share one dtype, got {' and '.join(dtypes)}; cast them first"
        )
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    return _flatten_and_pad(tensors, n_ranks).chunk(n_ranks)[rank].clone()


def gather_parameters(
    shard: Tensor, shapes: Sequence[Sequence[int]], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Put the tensors together again from the pieces of all ranks, by one all-gather.

    shard:   this rank's piece, as from `shard_parameters`; need not be contiguous
    shapes:  the shapes of the tensors
    group:   the ranks that share them; None stands for all ranks
    returns: the whole tensors on every rank, without the padding, whatever that holds. They may
             be views of one buffer. Need not be differentiable.
    """
    # solution
    n_ranks = dist.get_world_size(group)
    flat = shard.new_empty(n_ranks * shard.numel())
    dist.all_gather_into_tensor(flat, shard.detach().contiguous(), group=group)
    sizes = [math.prod(shape) for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def reduce_scatter_gradients(
    gradients: Sequence[Tensor], group: dist.ProcessGroup | None = None
) -> Tensor:
    """Average the ranks' gradients and keep this rank's piece, by one reduce-scatter.

    gradients: of a layer's tensors, in their order and shapes, each rank's own; left as they are
    group:     the n ranks that share the layer; None stands for all ranks
    returns:   (⌈elements / n⌉,), the piece of the mean over the ranks that belongs to this rank's
               shard, laid out as in `shard_parameters`; the padding's gradient is zero
    """
    # solution
    n_ranks = dist.get_world_size(group)
    flat = _flatten_and_pad(gradients, n_ranks)
    total = flat.new_empty(flat.numel() // n_ranks)
    dist.reduce_scatter_tensor(total, flat, group=group)
    return total / n_ranks


class FullyShardedMLP(nn.Module):
    """Linear layers with an exact GELU between each two, sharded over the ranks of a group.

    weights: one (out_features, in_features) a layer, whole, the same on every rank
    biases:  one (out_features,) a layer, whole, the same on every rank
    group:   the ranks that share the layers; None stands for all ranks

    The parameters are `shards[i]`, a rank's piece of layer i's weight and bias, in this order,
    as from `shard_parameters`. Nothing else is kept: the whole weights can be freed.

    forward: x (..., in_features), this rank's share of the batch -> (..., out_features), its
    output. Backward gives each shard its piece of the gradient averaged over the ranks, and x the
    gradient of this rank's own loss. Gradients of several backwards add up, as ever in torch.

    x may be one sample, (in_features,), and lie in memory in any order. Several forwards may come
    before one backward.

    In forward one all-gather a layer; in backward one all-gather and one reduce-scatter a layer.
    Of no more than two layers a rank holds the other ranks' parameters at any time (the next
    layer may be fetched ahead), and of none after forward, with or without gradients, or after
    backward. Nor do whole gradients pile up: more layers don't make more of them.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        # solution
        super().__init__()
        self.group = group
        layers = list(zip(weights, biases, strict=True))
        self.shapes = [[weight.shape, bias.shape] for weight, bias in layers]
        self.shards = nn.ParameterList(shard_parameters(layer, group) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        # solution
        for i, (shard, shapes) in enumerate(zip(self.shards, self.shapes, strict=True)):
            if i > 0:
                x = F.gelu(x)
            x = _ShardedLinear.apply(x, shard, shapes, self.group)
        return x


class _ShardedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shard, shapes, group):
        weight, bias = gather_parameters(shard, shapes, group)
        # Saving the weight would keep all layers whole until backward.
        ctx.save_for_backward(x, shard)
        ctx.shapes, ctx.group = shapes, group
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, shard = ctx.saved_tensors
        weight, _ = gather_parameters(shard, ctx.shapes, ctx.group)
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        gradients = [rows.mT @ x_rows, rows.sum(0)]
        return grad @ weight, reduce_scatter_gradients(gradients, ctx.group), None, None


def _flatten_and_pad(tensors: Sequence[Tensor], n_ranks: int) -> Tensor:
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    return F.pad(flat, (0, -flat.numel() % n_ranks))
