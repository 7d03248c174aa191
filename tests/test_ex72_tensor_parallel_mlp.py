"""Specs for exercise 72: tensor-parallel MLP."""

import weakref
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
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


def run_mlp_on_its_own_tensors(ex, weights, xs, upstreams):
    return run_mlp(ex, weights, xs[dist.get_rank()], upstreams[dist.get_rank()])


def run_mlps_in_rows_and_columns(ex, weights, xs, upstreams):
    """Two MLPs on ranks 0 1 / 2 3: one shared with the neighbour in the row, one in the column.

    Row and column n work on the n-th input.
    """
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    row, column = divmod(dist.get_rank(), 2)
    mlps = [ex.TensorParallelMLP(*weights, group) for group in (rows[row], columns[column])]
    inputs = [xs[n].clone().requires_grad_() for n in (row, column)]
    ys = [mlp(x) for mlp, x in zip(mlps, inputs, strict=True)]
    for y, n in zip(ys, (row, column), strict=True):
        y.backward(upstreams[n])
    return [
        {"y": y, "x": x.grad} | {name: p.grad for name, p in mlp.named_parameters()}
        for mlp, x, y in zip(mlps, inputs, ys, strict=True)
    ]


def learn(ex, weights, xs, upstreams):
    return train(ex.TensorParallelMLP(*weights), xs, upstreams)


def train(mlp, xs, upstreams):
    """A step of SGD on each x, then one more x in evaluation: the outputs and the parameters."""
    found = {}
    for n, (x, upstream) in enumerate(zip(xs, upstreams, strict=True)):
        found[f"y {n}"] = mlp(x)
        found[f"y {n}"].backward(upstream)
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter -= 0.1 * parameter.grad
        mlp.zero_grad()
    with torch.no_grad():
        found["y at last"] = mlp.eval()(xs[0])
    return found | dict(mlp.named_parameters())


def dtypes(ex, weights, x):
    """Of all that there is, for an MLP in float32 and then one in bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = x.to(dtype), torch.ones_like(x, dtype=dtype)
        out = run_mlp(ex, [w.to(dtype) for w in weights], *inputs)
        found.append({name: str(tensor.dtype) for name, tensor in out.items()})
    return found


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
    y.backward(upstreams[dist.get_rank()])
    return {"y": y, "x": x.grad, "other": other.grad}


def run_reduce(ex, xs, other, upstream):
    x = xs[dist.get_rank()].requires_grad_()
    other.requires_grad_()
    y, of_other = (ex.reduce_from_model_parallel_region(z) for z in (x, other))
    (y + of_other).backward(upstream)
    return {"y": y, "of other": of_other, "x": x.grad, "other": other.grad, "x afterwards": x}


def count_collectives(ex, weights, x, upstream, of_x):
    mlp = ex.TensorParallelMLP(*weights)
    x.requires_grad_(of_x)
    with Collectives() as forward:
        y = mlp(x)
    with Collectives() as backward:
        (y * upstream).sum().backward()
    return {"forward": forward.seen, "backward": backward.seen}


def keep_a_piece(ex, weights):
    """The shapes of the parameters, and which whole matrices cannot be freed."""
    whole = [nn.Parameter(w.clone()) for w in weights]  # as another module has them
    memory = {"up": whole[0].untyped_storage(), "down": whole[2].untyped_storage()}
    memory = {name: weakref.ref(storage) for name, storage in memory.items()}
    mlp = ex.TensorParallelMLP(*whole)
    del whole
    shapes = {name: list(p.shape) for name, p in mlp.named_parameters()}
    return {"shapes": shapes, "still whole": [n for n, m in memory.items() if m() is not None]}


def build(ex, name, *weights):
    getattr(ex, name)(*weights)


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


def whole_training(weights, xs, upstreams):
    """What training the unsharded MLP gives, under the names that `learn` uses."""
    d_ff, d_model = weights[0].shape
    up, down = (nn.Linear(*n, dtype=torch.float64) for n in ((d_model, d_ff), (d_ff, d_model)))
    mlp = nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))
    names = ["up.weight", "up.bias", "down.weight", "down.bias"]
    mlp.load_state_dict(dict(zip(names, weights, strict=True)))
    return {name: t.detach() for name, t in train(mlp, xs, upstreams).items()}


def layouts(xs):
    """The same numbers, (2, 2, n) each; in memory the second has other strides, and gaps."""
    first, second = xs[0], xs[1].transpose(0, 1)
    return first.contiguous(), torch.cat((second, second), 1)[:, :2].transpose(0, 1)


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
    x, upstream = torch.randn(2, 2, 2, 5, generator=rng, dtype=torch.float64)
    of_ranks = layouts([x, x]), layouts([upstream, upstream])

    out = attempt.ranks(2)(run_mlp_on_its_own_tensors, weights, *of_ranks)

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
    x = torch.randn(2, 2, 12, generator=rng, dtype=torch.float64)
    upstream = torch.randn(2, 2, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(run_row, weight, bias, layouts(x.chunk(2, -1)), upstream)

    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = F.linear(x, weight, bias)
    (y * upstream).sum().backward()
    assert_close([r["y"] for r in out], [y.detach()] * 2)
    assert_close([r["bias"] for r in out], [bias.grad] * 2)
    assert_close(torch.cat([r["x"] for r in out], -1), x.grad)
    assert_close(torch.cat([r["weight"] for r in out], -1), weight.grad)


def test_copying_in_sums_the_gradients_of_the_ranks_and_touches_nothing_else(attempt, rng):
    x, other = torch.randn(2, 2, 2, 4, generator=rng, dtype=torch.float64)
    upstreams = layouts(torch.randn(2, 2, 2, 4, generator=rng, dtype=torch.float64))

    out = attempt.ranks(2)(run_copy, x, other, upstreams)

    total = upstreams[0] + upstreams[1]
    expected = [{"y": 3 * other + x + x, "x": total + u, "other": 3 * u} for u in upstreams]
    assert_close(out, expected)


def test_reducing_out_sums_the_ranks_and_passes_the_gradient_on(attempt, rng):
    xs = layouts(torch.randn(2, 2, 2, 4, generator=rng, dtype=torch.float64))
    other, upstream = torch.randn(2, 2, 2, 4, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(run_reduce, xs, other, upstream)

    same = {"y": xs[0] + xs[1], "of other": 2 * other, "x": upstream, "other": upstream}
    assert_close(out, [same | {"x afterwards": x} for x in xs])


def test_sends_one_all_reduce_in_forward_and_one_in_backward(attempt, rng):
    weights = mlp_weights(rng)
    x, upstream = torch.randn(2, 7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(count_collectives, weights, x, upstream, True)

    once = [["all_reduce", x.numel()]]
    assert_close(out, [{"forward": once, "backward": once}] * 2)


def test_sends_one_all_reduce_in_forward_when_x_needs_no_gradient(attempt, rng):
    weights = mlp_weights(rng)
    x, upstream = torch.randn(2, 7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(count_collectives, weights, x, upstream, False)

    assert_close([r["forward"] for r in out], [[["all_reduce", x.numel()]]] * 2)


def test_shares_the_work_within_its_group_only(attempt, rng):
    weights = mlp_weights(rng, d_ff=6)  # which all four ranks could not share
    xs, upstreams = torch.randn(2, 2, 7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(4)(run_mlps_in_rows_and_columns, weights, xs, upstreams)

    wholes = [whole_mlp(weights, x, u) for x, u in zip(xs, upstreams, strict=True)]
    places = [divmod(rank, 2) for rank in range(4)]
    expected = [[piece(wholes[r], c, 2), piece(wholes[c], r, 2)] for r, c in places]
    assert_close(out, expected)


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_learns_as_the_unsharded_mlp_does(attempt, rng, n_ranks):
    weights, shapes = mlp_weights(rng), [(4, 5), (2, 7, 5), (4, 5), (5,)]
    xs, upstreams = (
        [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
        for _ in range(2)
    )

    out = attempt.ranks(n_ranks)(learn, weights, xs, upstreams)

    whole = whole_training(weights, xs, upstreams)
    assert_close(out, [piece(whole, rank, n_ranks) for rank in range(n_ranks)])


def test_computes_in_the_dtype_of_its_weights(attempt, rng):
    weights, x = mlp_weights(rng), torch.randn(7, 5, generator=rng, dtype=torch.float64)

    out = attempt.ranks(2)(dtypes, weights, x)

    names = ["y", "x", "up.weight", "up.bias", "down.weight", "down.bias"]
    expected = [dict.fromkeys(names, dtype) for dtype in ("torch.float32", "torch.bfloat16")]
    assert_close(out, [expected] * 2)


def test_keeps_only_its_own_piece_of_each_matrix_in_memory(attempt, rng):
    weights = mlp_weights(rng)

    out = attempt.ranks(2)(keep_a_piece, weights)

    shapes = {"up.weight": [6, 5], "up.bias": [6], "down.weight": [5, 6], "down.bias": [5]}
    assert_close(out, [{"shapes": shapes, "still whole": []}] * 2)


@pytest.mark.parametrize(
    ("name", "d_ff", "shapes"),
    [
        ("ColumnParallelLinear", 7, [(7, 6)]),
        ("ColumnParallelLinear", 1, [(1, 6)]),
        ("RowParallelLinear", 7, [(6, 7)]),
        ("TensorParallelMLP", 7, [(7, 6), (7,), (6, 7), (6,)]),
    ],
    ids=["column", "fewer than ranks", "row", "mlp"],
)
def test_rejects_features_that_the_ranks_cannot_share_equally(attempt, name, d_ff, shapes):
    with pytest.raises(ValueError, match=rf"\b{d_ff}\b"):
        attempt.ranks(2)(build, name, *(torch.zeros(shape) for shape in shapes))
