"""Specs for exercise 72: tensor-parallel MLP."""

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kata.testing import assert_close

pytestmark = pytest.mark.multiprocess


class Collectives(TorchDispatchMode):
    """Lists [name, elements] of all that goes over the wire, whichever API it is called by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch would import torch.compile first, in seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.replace("_", "")
        helper = "wait" in name or "wrap" in name  # of the functional API, sends nothing
        if "c10d" in func.namespace and not helper:
            name = "all_reduce" if "allreduce" in name else func._schema.name.split("::")[1]
            sent = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.seen.append([name, sum(x.numel() for x in sent if isinstance(x, torch.Tensor))])
        return func(*args, **(kwargs or {}))


# --- what runs on every rank -------------------------------------------------------------------


def run_mlp(ex, weights, x, upstream, group=None):
    """The output, and the gradients of x and of the parameters by name."""
    mlp = ex.TensorParallelMLP(*weights, group)
    x.requires_grad_()
    y = mlp(x)
    (y * upstream).sum().backward()
    return {"y": y, "x": x.grad} | {name: p.grad for name, p in mlp.named_parameters()}


def run_mlp_in_two_groups(ex, weights, xs, upstreams):
    """Ranks 0 and 2 work on the first input, ranks 1 and 3 on the second."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    return run_mlp(ex, weights, xs[mine], upstreams[mine], groups[mine])


def run_column(ex, weight, bias, x, upstreams):
    layer = ex.ColumnParallelLinear(weight, bias)
    x.requires_grad_()
    y = layer(x)
    (y * upstreams[dist.get_rank()]).sum().backward()
    return {"y": y, "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def run_row(ex, weight, bias, xs, upstream):
    layer = ex.RowParallelLinear(weight, bias)
    x = xs[dist.get_rank()].requires_grad_()
    y = layer(x)
    (y * upstream).sum().backward()
    return {"y": y, "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def run_copy(ex, x, other, upstreams):
    """3 other + copy(x) + x, so that one gradient goes three ways."""
    x.requires_grad_(), other.requires_grad_()
    y = 3 * other + ex.copy_to_model_parallel_region(x) + x
    (y * upstreams[dist.get_rank()]).sum().backward()
    return {"y": y, "x": x.grad, "other": other.grad}


def run_reduce(ex, xs, other, upstream):
    x = xs[dist.get_rank()].requires_grad_()
    other.requires_grad_()
    y = ex.reduce_from_model_parallel_region(x) + other
    (y * upstream).sum().backward()
    return {"y": y, "x": x.grad, "other": other.grad, "x afterwards": x}


def count_collectives(ex, weights, x, upstream):
    mlp = ex.TensorParallelMLP(*weights)
    x.requires_grad_()
    with Collectives() as forward:
        y = mlp(x)
    with Collectives() as backward:
        (y * upstream).sum().backward()
    return {"forward": forward.seen, "backward": backward.seen}


def keep_a_piece(ex, weights):
    """The shapes of the parameters, and which whole matrices cannot be freed."""
    whole = [w.clone() for w in weights]
    memory = {"up": whole[0].untyped_storage(), "down": whole[2].untyped_storage()}
    memory = {name: weakref.ref(storage) for name, storage in memory.items()}
    mlp = ex.TensorParallelMLP(*whole)
    del whole
    shapes = {name: list(p.shape) for name, p in mlp.named_parameters()}
    return {"shapes": shapes, "still whole": [n for n, m in memory.items() if m() is not None]}


def build(ex, layer, weight):
    getattr(ex, layer)(weight)


# --- inputs and the unsharded MLP --------------------------------------------------------------


def mlp_weights(rng, d_model=5, d_ff=12):
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    return [randn(d_ff, d_model), randn(d_ff), randn(d_model, d_ff), randn(d_model)]


def whole_mlp(weights, x, upstream):
    """What the unsharded MLP gives, under the names that `run_mlp` uses."""
    x, *weights = (None if t is None else t.clone().requires_grad_() for t in (x, *weights))
    up_weight, up_bias, down_weight, down_bias = weights
    y = F.linear(F.gelu(F.linear(x, up_weight, up_bias)), down_weight, down_bias)
    (y * upstream).sum().backward()
    names = ["up.weight", "up.bias", "down.weight", "down.bias"]
    grads = {n: w.grad for n, w in zip(names, weights, strict=True) if w is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def piece(whole, rank, n_ranks):
    """What of the unsharded result one rank should hold."""
    cut = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    return {
        name: t.chunk(n_ranks, cut[name])[rank] if name in cut else t for name, t in whole.items()
    }


# --- specs -------------------------------------------------------------------------------------


def test_gives_the_output_and_all_gradients_of_the_unsharded_mlp(attempt, rng):
    weights = mlp_weights(rng)
    x, upstream = torch.randn(2, 2, 3, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(3)(run_mlp, weights, x, upstream)

    whole = whole_mlp(weights, x, upstream)
    assert_close(out, [piece(whole, rank, 3) for rank in range(3)])


def test_does_without_biases_and_takes_inputs_of_any_memory_layout(attempt, rng):
    up_weight, _, down_weight, _ = mlp_weights(rng)
    weights = [up_weight.mT.contiguous().mT, None, down_weight.mT.contiguous().mT, None]
    x = torch.randn(5, 7, generator=rng, dtype=torch.float64).mT
    upstream = torch.randn(5, 1, generator=rng, dtype=torch.float64).mT.expand(7, 5)

    out = attempt.ranks(2)(run_mlp, weights, x, upstream)

    whole = whole_mlp(weights, x, upstream)
    assert_close(out, [piece(whole, rank, 2) for rank in range(2)])


def test_a_column_parallel_linear_gives_each_rank_its_own_features(attempt, rng):
    weight, bias, *_ = mlp_weights(rng)
    x = torch.randn(2, 7, 5, generator=rng, dtype=torch.float64)
    upstreams = torch.randn(2, 2, 7, 6, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(run_column, weight, bias, x, upstreams)

    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = F.linear(x, weight, bias)
    (y * torch.cat(list(upstreams), -1)).sum().backward()
    assert_close([r["x"] for r in out], [x.grad] * 2)
    assert_close(torch.cat([r["y"] for r in out], -1), y.detach())
    assert_close(torch.cat([r["weight"] for r in out]), weight.grad)
    assert_close(torch.cat([r["bias"] for r in out]), bias.grad)


def test_a_row_parallel_linear_adds_up_the_ranks_and_the_bias_once(attempt, rng):
    _, _, weight, bias = mlp_weights(rng)
    x = torch.randn(2, 7, 12, generator=rng, dtype=torch.float64)
    upstream = torch.randn(2, 7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(run_row, weight, bias, x.chunk(2, -1), upstream)

    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = F.linear(x, weight, bias)
    (y * upstream).sum().backward()
    assert_close([r["y"] for r in out], [y.detach()] * 2)
    assert_close([r["bias"] for r in out], [bias.grad] * 2)
    assert_close(torch.cat([r["x"] for r in out], -1), x.grad)
    assert_close(torch.cat([r["weight"] for r in out], -1), weight.grad)


def test_copying_in_sums_the_gradients_of_the_ranks_and_touches_nothing_else(attempt, rng):
    x, other = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    upstreams = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(run_copy, x, other, upstreams)

    total = upstreams.sum(0)
    expected = [{"y": 3 * other + x + x, "x": total + u, "other": 3 * u} for u in upstreams]
    assert_close(out, expected)


def test_reducing_out_sums_the_ranks_and_passes_the_gradient_on(attempt, rng):
    xs = torch.randn(2, 3, 8, generator=rng, dtype=torch.float64)[..., ::2]
    xs = [xs[0].contiguous(), xs[1]]  # the second one has gaps in memory
    other, upstream = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(run_reduce, xs, other, upstream)

    y = xs[0] + xs[1] + other
    expected = [{"y": y, "x": upstream, "other": upstream, "x afterwards": x} for x in xs]
    assert_close(out, expected)


def test_sends_one_all_reduce_in_forward_and_one_in_backward(attempt, rng):
    weights = mlp_weights(rng)
    x, upstream = torch.randn(2, 7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(count_collectives, weights, x, upstream)

    once = [["all_reduce", x.numel()]]
    assert_close(out, [{"forward": once, "backward": once}] * 2)


def test_shares_the_work_within_its_group_only(attempt, rng):
    weights = mlp_weights(rng)
    xs, upstreams = torch.randn(2, 2, 7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(4)(run_mlp_in_two_groups, weights, xs, upstreams)

    wholes = [whole_mlp(weights, x, u) for x, u in zip(xs, upstreams, strict=True)]
    assert_close(out, [piece(wholes[rank % 2], rank // 2, 2) for rank in range(4)])


def test_keeps_only_its_own_piece_of_each_matrix_in_memory(attempt, rng):
    weights = mlp_weights(rng)

    out = attempt.ranks(2)(keep_a_piece, weights)

    shapes = {"up.weight": [6, 5], "up.bias": [6], "down.weight": [5, 6], "down.bias": [5]}
    assert_close(out, [{"shapes": shapes, "still whole": []}] * 2)


@pytest.mark.parametrize(
    "layer, shape",
    [("ColumnParallelLinear", (7, 6)), ("RowParallelLinear", (6, 7))],
    ids=["column", "row"],
)
def test_rejects_features_that_the_ranks_cannot_share_equally(attempt, layer, shape):
    with pytest.raises(ValueError, match=r"\b7\b"):
        attempt.ranks(2)(build, layer, torch.zeros(shape))
