"""Specs for exercise 75: fully sharded data parallelism."""

import time
import weakref
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kata.testing import assert_close

pytestmark = pytest.mark.multiprocess

WIDTH = 24  # of the layers whose memory is watched
LARGE = 8 * WIDTH * WIDTH  # bytes of a weight


def has_memory(storage):
    """Whether there is any behind it. A tensor that only wraps another, as those of the functional
    API do until they are waited for, has a storage with a size and no memory: reading it ends the
    rank. The tensor inside is seen by itself.
    """
    try:
        return storage.data_ptr() != 0
    except RuntimeError:
        return False


class Watch(TorchDispatchMode):
    """Sees every operation: counts collectives, whichever API they are called by, and layers
    whose parameters, as far as other ranks keep them, lie in memory allocated under the watch.
    """

    def __init__(self, foreign=()):
        super().__init__()
        self.collectives = Counter()
        self.foreign = foreign  # for each layer some values that only other ranks keep
        self.storages = []
        self.most_layers = 2  # or fewer: fetching the next layer ahead is right
        self.most_large = 0  # pieces of memory that could hold a whole layer

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch would import torch.compile first, in seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count(func)
        result = func(*args, **(kwargs or {}))
        if "empty" in func._schema.name:
            result.zero_()  # what was freed there must not be taken for living
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor):
                self.storages.append(weakref.ref(x.untyped_storage()))
        self.most_layers = max(self.most_layers, self.layers(self.most_layers))
        large = [s for s in self.living() if s.nbytes() >= LARGE]
        self.most_large = max(self.most_large, len(large))
        return result

    def count(self, func):
        name = func._schema.name.split("::")[1].replace("_", "")
        helper = "wait" in name or "wrap" in name  # of the functional API, sends nothing
        if "c10d" in func.namespace and not helper:
            known = {"allgather": "all_gather", "reducescatter": "reduce_scatter"}
            prefix = next((p for p in known if name.startswith(p)), None)
            self.collectives[known.get(prefix, func._schema.name)] += 1

    def layers(self, expected):
        """Of how many layers other ranks' parameters are in memory now.

        A thread of gloo's may hold a buffer for a moment after its collective is done, so that
        more than expected are counted again.
        """
        for _ in range(20):
            if (found := self.count_layers()) <= expected:
                break
            time.sleep(0.005)
        return found

    def living(self):
        """What is still in memory."""
        refs = [ref for ref in self.storages if (s := ref()) is not None and has_memory(s)]
        live = {id(s): s for ref in refs if (s := ref()) is not None}
        self.storages = [weakref.ref(s) for s in live.values()]
        return list(live.values())

    def count_layers(self):
        if not len(self.foreign):
            return 0
        found = torch.zeros(len(self.foreign), dtype=torch.bool)
        for storage in self.living():
            if storage.nbytes() >= 8 * 200:  # smaller ones hold activations
                values = torch.empty(0, dtype=torch.float64, device=storage.device)
                values.set_(storage, 0, (storage.nbytes() // 8,))
                found |= (self.foreign[..., None] == values).any(-1).any(-1).cpu()
        return int(found.sum())


# --- what runs on every rank -------------------------------------------------------------------


def mine(whole, group=None):
    """This rank's share of the batch."""
    return whole.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def turned(x):
    """The same numbers, in another order in memory if x has rows and columns."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


def run_shard(ex, tensors):
    return ex.shard_parameters(tensors)


def run_shard_of_parameters(ex, tensors):
    """What a piece of nn.Parameters has in common with them."""
    parameters = [torch.nn.Parameter(t) for t in tensors]
    shard = ex.shard_parameters(parameters)
    memory = {p.untyped_storage().data_ptr() for p in parameters}
    return {
        "shares memory": shard.untyped_storage().data_ptr() in memory,
        "bytes": shard.untyped_storage().nbytes(),
        "needs a gradient": shard.requires_grad,
    }


def run_gather(ex, shards, shapes):
    shard = shards[dist.get_rank()]
    strided = torch.stack([shard, shard], -1)[:, 0]
    return [t.clone() for t in ex.gather_parameters(strided, shapes)]  # waits, if need be


def run_reduce_scatter(ex, gradients):
    return ex.reduce_scatter_gradients(gradients[dist.get_rank()]).clone()


def run_all(ex, tensors, x):
    """Everything once, in the dtype of what comes in."""
    shard = ex.shard_parameters(tensors)
    gathered = [t.clone() for t in ex.gather_parameters(shard, [t.shape for t in tensors])]
    mlp = ex.FullyShardedMLP([tensors[0]], [tensors[1]])
    y = mlp(x)
    y.sum().backward()
    return {
        "shard": shard,
        "gathered": gathered,
        "reduced": ex.reduce_scatter_gradients(tensors).clone(),
        "y": y,
        "gradient": mlp.shards[0].grad,
    }


def run_mlp(ex, weights, biases, x, target, group=None, one_sample=False):
    """This rank's output, and the gradients of its share of the batch and of its shards."""
    mlp = ex.FullyShardedMLP(weights, biases, group)
    x, target = mine(x, group), mine(target, group)
    x, target = (x[0], target[0]) if one_sample else (turned(x), target)
    y = mlp(x.requires_grad_())
    (y - target).square().mean().backward()
    return {"y": y, "x": x.grad, "shards": [shard.grad for shard in mlp.shards]}


def run_two_forwards(ex, weights, biases, xs, upstreams):
    """The shards' gradients, given those of two outputs."""
    mlp = ex.FullyShardedMLP(weights, biases)
    ys = [mlp(mine(x)) for x in xs]
    upstreams = [turned(mine(upstream)) for upstream in upstreams]
    return torch.autograd.grad(ys, list(mlp.shards), upstreams)


def run_mlp_in_two_groups(ex, weights, biases, xs, targets):
    """Ranks 0 and 2 share the first batch, ranks 1 and 3 the second."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    i = dist.get_rank() % 2
    return run_mlp(ex, weights, biases, xs[i], targets[i], groups[i])


def train(ex, weights, biases, xs, targets, rate):
    """Steps of gradient descent, each on two micro-batches. Returns the shards."""
    mlp = ex.FullyShardedMLP(weights, biases)
    for batch in zip(xs, targets, strict=True):
        for x, target in zip(*batch, strict=True):
            (mlp(mine(x)) - mine(target)).square().mean().backward()
        with torch.no_grad():
            for shard in mlp.parameters():
                shard -= rate * shard.grad
                shard.grad = None
    return list(mlp.shards)


def count_collectives(ex, weights, biases, x):
    mlp = ex.FullyShardedMLP(weights, biases)
    x = mine(x).requires_grad_()
    with Watch() as forward:
        y = mlp(x)
    with Watch() as backward:
        y.square().mean().backward()
    return {"forward": dict(forward.collectives), "backward": dict(backward.collectives)}


def watch_large_memory(ex, weights, biases, x):
    """The most pieces of memory at once that could hold a whole layer."""
    mlp = ex.FullyShardedMLP(weights, biases)
    with Watch() as watch:
        mlp(mine(x)).square().mean().backward()
    return watch.most_large


def watch_memory(ex, weights, biases, x):
    """Of how many layers this rank holds what others keep, at most and afterwards."""
    whole = [w.clone() for w in weights]
    memory = [weakref.ref(w.untyped_storage()) for w in whole]
    mlp = ex.FullyShardedMLP(whole, biases)
    del whole
    seen = {"whole after construction": sum(m() is not None for m in memory)}
    seen["parameter bytes"] = sum(p.untyped_storage().nbytes() for p in mlp.parameters())

    flat = torch.stack([w.flatten() for w in weights]).chunk(dist.get_world_size(), -1)
    foreign = [part[:, -3:] for r, part in enumerate(flat) if r != dist.get_rank()]
    x = mine(x).requires_grad_()
    with Watch(torch.cat(foreign, -1).contiguous()) as watch:
        y = mlp(x)
        seen |= {"most in forward": watch.most_layers, "after forward": watch.layers(0)}
        watch.most_layers = 2
        y.square().mean().backward()
        seen |= {"most in backward": watch.most_layers, "after backward": watch.layers(0)}
        with torch.no_grad():
            mlp(x)
        seen["after forward without gradients"] = watch.layers(0)
    return seen


# --- inputs and the unsharded run --------------------------------------------------------------


def randn_of(rng):
    return partial(torch.randn, generator=rng, dtype=torch.float64)


def layers(rng, *widths):
    randn = randn_of(rng)
    weights = [randn(n_out, n_in) for n_in, n_out in pairwise(widths)]
    return weights, [randn(n_out) for n_out in widths[1:]]


def pieces(tensors, n_ranks):
    """The shards of all ranks: row by row, end to end, zeros behind the last."""
    flat = [value for t in tensors for value in t.flatten().tolist()]
    size = -(-len(flat) // n_ranks)
    flat += [0.0] * (n_ranks * size - len(flat))
    return list(torch.tensor(flat, dtype=torch.float64).reshape(n_ranks, size))


def whole_mlp(weights, biases, x):
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.gelu(x) if i else x, weight, bias)
    return x


def whole_run(weights, biases, x, target, n_ranks):
    """What the unsharded MLP gives on the whole batch, under the names that `run_mlp` uses."""
    x, *params = (t.clone().requires_grad_() for t in (x, *weights, *biases))
    weights, biases = params[: len(weights)], params[len(weights) :]
    y = whole_mlp(weights, biases, x)
    (y - target).square().mean().backward()
    shards = [pieces([w.grad, b.grad], n_ranks) for w, b in zip(weights, biases, strict=True)]
    # The mean over the whole batch has a factor 1 / n that the mean over one share does not have.
    y, x_grad = y.detach().chunk(n_ranks), (n_ranks * x.grad).chunk(n_ranks)
    return [{"y": y[r], "x": x_grad[r], "shards": [s[r] for s in shards]} for r in range(n_ranks)]


# --- specs -------------------------------------------------------------------------------------


def test_cuts_the_tensors_laid_end_to_end_into_equal_pieces(attempt, rng):
    randn = randn_of(rng)
    tensors = [randn(2, 3).mT, randn(1), randn(3)]  # ten elements, the first ones transposed

    out = attempt.ranks(3)(run_shard, tensors)

    assert_close(out, pieces(tensors, 3))


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_cuts_a_copy_that_needs_no_gradient(attempt, rng, n_ranks):
    out = attempt.ranks(n_ranks)(run_shard_of_parameters, [randn_of(rng)(2, 5)])

    size = 8 * 10 // n_ranks
    alone = {"shares memory": False, "bytes": size, "needs a gradient": False}
    assert_close(out, [alone] * n_ranks)


def test_puts_the_tensors_together_again_without_the_padding(attempt, rng):
    tensors = [randn_of(rng)(2, 3), randn_of(rng)(4), torch.ones((), dtype=torch.float64)]
    shards = pieces(tensors, 3)
    shards[-1][-1] = torch.nan  # whatever the padding holds must not matter

    out = attempt.ranks(3)(run_gather, shards, [tuple(t.shape) for t in tensors])

    assert_close(out, [tensors] * 3)


@pytest.mark.parametrize(
    ("n_ranks", "shapes"),
    [(3, [(4, 2), (2,)]), (2, [(6,)]), (1, [(3, 2)])],
    ids=["two tensors", "one tensor, no padding", "one rank"],
)
def test_gives_each_rank_its_piece_of_the_averaged_gradients(attempt, rng, n_ranks, shapes):
    gradients = [[turned(randn_of(rng)(*shape)) for shape in shapes] for _ in range(n_ranks)]

    out = attempt.ranks(n_ranks)(run_reduce_scatter, gradients)

    mean = [sum(g) / n_ranks for g in zip(*gradients, strict=True)]
    assert_close(out, pieces(mean, n_ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_everything_in_the_dtype_of_its_inputs(attempt, rng, dtype):
    # Small whole numbers, so that no dtype has to round.
    weight, bias, x = (
        torch.randint(-4, 5, shape, generator=rng).double() for shape in [(3, 2), (3,), (4, 2)]
    )

    out = attempt.ranks(2)(run_all, [weight.to(dtype), bias.to(dtype)], x.to(dtype))

    shards = pieces([weight, bias], 2)
    gradients = pieces([x.sum(0).expand(3, 2), torch.full((3,), 4.0)], 2)
    for rank, result in enumerate(out):
        assert_close(result["gathered"], [weight.to(dtype), bias.to(dtype)])
        assert_close(result["shard"], shards[rank].to(dtype))
        assert_close(result["reduced"], shards[rank].to(dtype))  # of all ranks' the same
        assert_close(result["y"], F.linear(x, weight, bias).to(dtype))
        assert_close(result["gradient"], gradients[rank].to(dtype))


def test_gives_the_outputs_and_gradients_of_an_unsharded_run_on_the_whole_batch(attempt, rng):
    # 42, 16 and 3 parameters on 4 ranks: two zeros of padding, none, and a rank with nothing else.
    weights, biases = layers(rng, 5, 7, 2, 1)
    x, target = randn_of(rng)(8, 3, 5), randn_of(rng)(8, 3, 1)

    out = attempt.ranks(4)(run_mlp, weights, biases, x, target)

    assert_close(out, whole_run(weights, biases, x, target, 4))


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_takes_one_sample_a_rank(attempt, rng, n_ranks):
    weights, biases = layers(rng, 5, 7, 3)
    x, target = randn_of(rng)(n_ranks, 5), randn_of(rng)(n_ranks, 3)

    out = attempt.ranks(n_ranks)(run_mlp, weights, biases, x, target, one_sample=True)

    expected = whole_run(weights, biases, x, target, n_ranks)
    assert_close(out, [each | {"y": each["y"][0], "x": each["x"][0]} for each in expected])


def test_keeps_two_forwards_apart_until_their_backward(attempt, rng):
    weights, biases = layers(rng, 3, 4, 2)
    xs = [randn_of(rng)(2, 3), randn_of(rng)(6, 5, 3)]
    upstreams = [randn_of(rng)(2, 2), randn_of(rng)(6, 5, 2)]

    out = attempt.ranks(2)(run_two_forwards, weights, biases, xs, upstreams)

    params = [t.requires_grad_() for t in (*weights, *biases)]
    ys = [whole_mlp(weights, biases, x) for x in xs]
    grads = torch.autograd.grad(ys, params, [upstream / 2 for upstream in upstreams])
    shards = [pieces(layer, 2) for layer in zip(grads[:2], grads[2:], strict=True)]
    assert_close(out, [[s[rank] for s in shards] for rank in range(2)])


def test_trains_like_an_unsharded_model_on_the_whole_batch(attempt, rng):
    weights, biases = layers(rng, 3, 4, 2)
    xs, targets = randn_of(rng)(3, 2, 6, 3), randn_of(rng)(3, 2, 6, 2)  # steps, micro-batches, …

    out = attempt.ranks(3)(train, weights, biases, xs, targets, 0.05)

    params = [t.requires_grad_() for t in (*weights, *biases)]
    for batch in zip(xs, targets, strict=True):
        loss = sum(
            (whole_mlp(weights, biases, x) - t).square().mean() for x, t in zip(*batch, strict=True)
        )
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param -= 0.05 * grad
    shards = [pieces(layer, 3) for layer in zip(weights, biases, strict=True)]
    assert_close(out, [[s[rank] for s in shards] for rank in range(3)])


def test_sends_an_all_gather_a_layer_each_way_and_a_reduce_scatter_in_backward(attempt, rng):
    weights, biases = layers(rng, 3, 4, 5, 2)

    out = attempt.ranks(2)(count_collectives, weights, biases, randn_of(rng)(2, 3))

    backward = {"all_gather": 3, "reduce_scatter": 3}
    assert_close(out, [{"forward": {"all_gather": 3}, "backward": backward}] * 2)


def test_never_holds_more_than_two_whole_layers(attempt, rng):
    weights, biases = layers(rng, *[WIDTH] * 5)

    out = attempt.ranks(2)(watch_memory, weights, biases, randn_of(rng)(2, WIDTH))

    for rank, seen in enumerate(out):
        said = f"rank {rank} holds parameters of others, in layers: {seen}"
        assert seen["whole after construction"] == 0, said
        assert seen["parameter bytes"] == 4 * 8 * (WIDTH * WIDTH + WIDTH) // 2, said
        assert seen["most in forward"] <= 2, said
        assert seen["after forward"] == 0, said
        assert seen["most in backward"] <= 2, said
        assert seen["after backward"] == 0, said
        assert seen["after forward without gradients"] == 0, said


def test_needs_no_more_memory_at_once_for_more_layers(attempt, rng):
    weights, biases = layers(rng, *[WIDTH] * 11)
    x = randn_of(rng)(2, WIDTH)

    few = attempt.ranks(2)(watch_large_memory, weights[:3], biases[:3], x)
    many = attempt.ranks(2)(watch_large_memory, weights, biases, x)

    for rank in range(2):
        # A thread of gloo's may still hold a buffer or two.
        said = f"rank {rank} holds {few[rank]} with 3 layers, and {many[rank]} with 10"
        assert many[rank] <= few[rank] + 3, f"pieces of a layer's size: {said}"


def test_shares_the_layers_within_its_group_only(attempt, rng):
    weights, biases = layers(rng, 3, 4, 1)
    xs, targets = randn_of(rng)(2, 2, 3), randn_of(rng)(2, 2, 1)

    out = attempt.ranks(4)(run_mlp_in_two_groups, weights, biases, xs, targets)

    wholes = [whole_run(weights, biases, x, t, 2) for x, t in zip(xs, targets, strict=True)]
    assert_close(out, [wholes[rank % 2][rank // 2] for rank in range(4)])


def test_names_all_dtypes_where_they_differ(attempt):
    dtypes = [torch.float64, torch.float64, torch.float32, torch.float16]
    tensors = [torch.zeros(2, 3, dtype=dtype) for dtype in dtypes]

    with pytest.raises(TypeError, match=r"(?s)(?=.*float16)(?=.*float32)(?=.*float64)"):
        attempt.ranks(2)(run_shard, tensors)
