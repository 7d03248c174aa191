"""Specs for exercise 79: JAX sharding."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kata.testing import assert_close

pytestmark = pytest.mark.jax

LEARNING_RATE = 0.3
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def mesh_of(n_data, n_model):
    devices = np.array(jax.devices()[: n_data * n_model]).reshape(n_data, n_model)
    return Mesh(devices, ("data", "model"))


def blocks(array):
    """The shape of the block that each device holds, one for each device."""
    return [shard.data.shape for shard in array.addressable_shards]


def collectives(compiled):
    """What the devices tell each other: [name, numbers that come out on each device]."""
    found = re.findall(rf"= (.+?) ({COLLECTIVES})(?:-start)?\(", compiled.as_text())
    sizes = [
        [
            math.prod(map(int, filter(None, s.split(","))))
            for s in re.findall(r"\[([\d,]*)\]", shapes)
        ]
        for shapes, _ in found
    ]
    return [[name, sum(size)] for (_, name), size in zip(found, sizes, strict=True)]


# --- the mesh ------------------------------------------------------------------------------------


def lay_out(ex, n_data, n_model):
    mesh = ex.make_mesh(n_data, n_model)
    return {
        "axes": list(mesh.axis_names),
        "shape": list(mesh.devices.shape),
        "devices": len({device.id for device in mesh.devices.flat}),
        "kinds": [kind.name for kind in mesh.axis_types],
    }


@pytest.mark.parametrize(("n_data", "n_model"), [(4, 2), (2, 3), (1, 1)])
def test_arranges_the_devices_in_rows_of_data_and_columns_of_model(attempt, n_data, n_model):
    layout = attempt(lay_out, n_data, n_model)

    assert_close(layout["axes"], ["data", "model"])
    assert_close(layout["shape"], [n_data, n_model])
    assert_close(layout["devices"], n_data * n_model)
    assert_close(layout["kinds"], ["Auto", "Auto"])


@pytest.mark.parametrize(("n_data", "n_model"), [(3, 5), (9, 1)])
def test_refuses_a_mesh_of_more_devices_than_there_are(attempt, n_data, n_model):
    with pytest.raises(ValueError):
        attempt(lay_out, n_data, n_model)


# --- data parallel and FSDP ----------------------------------------------------------------------


def bits(numbers, n):
    """Whole numbers as rows of n zeros and ones: what the model is to tell."""
    return numbers[:, None] >> np.arange(n) & 1


def squared_error(params, batch):
    layer = params["layers"][0]
    y = batch["x"] @ layer["w"] + layer["b"]
    return jnp.mean((y - bits(batch["more"]["label"], y.shape[1])) ** 2)


def tree(w, b):
    """Parameters, or something for each of them, as `squared_error` takes them."""
    return {"layers": [{"w": w, "b": b}]}


def specs_of(axes):
    """PartitionSpecs as plain data, of w and b: [["data"], []]; or one for both: ["data"]."""
    if any(isinstance(spec, list) for spec in axes):
        return tree(*(PartitionSpec(*spec) for spec in axes))
    return PartitionSpec(*axes)


def take_steps(ex, n_data, n_model, axes, params, batch, n_steps):
    """What steps give that follow each other on one batch.

    For more than one, all arrays are JAX's and placed from the start, which spares a compilation:
    jit tells them from NumPy's.
    """
    calls = []

    def loss_fn(params, batch):
        calls.append(1)
        return squared_error(params, batch)

    mesh, specs = mesh_of(n_data, n_model), specs_of(axes)
    step = ex.data_parallel_step(mesh, loss_fn, LEARNING_RATE, specs)
    if n_steps > 1:
        params = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    losses, calls_before = [], []
    for _ in range(n_steps):
        calls_before.append(len(calls))
        params, loss = step(params, batch)
        losses.append(loss)
    layer = params["layers"][0]
    return {
        "params": params,
        "losses": losses,
        "blocks": [blocks(layer["w"]), blocks(layer["b"])],
        "loss block": blocks(losses[-1]),
        "calls in the last step": len(calls) - calls_before[-1],
    }


def take_separate_steps(ex, n_data, n_model, inputs):
    """One step for each (params, batch), all by the same function."""
    mesh = mesh_of(n_data, n_model)
    step = ex.data_parallel_step(mesh, squared_error, LEARNING_RATE, PartitionSpec())
    return [step(params, batch) for params, batch in inputs]


def dtypes_of_step(ex, params, batch):
    step = ex.data_parallel_step(mesh_of(1, 1), squared_error, LEARNING_RATE, PartitionSpec())
    return jax.tree.map(lambda x: str(x.dtype), jax.eval_shape(step, params, batch)[0])


def compile_step(ex, n_data, n_model, params, batch):
    mesh = mesh_of(n_data, n_model)
    step = ex.data_parallel_step(mesh, squared_error, LEARNING_RATE, PartitionSpec())
    compiled = jax.jit(step).lower(params, batch).compile()
    shardings, _ = compiled.input_shardings
    held = jax.tree.map(lambda s, array: s.shard_shape(array.shape), shardings, (params, batch))
    return {"held": held, "collectives": collectives(compiled)}


def regression(np_rng, rows=24, d_in=12, d_out=8, dtype=np.float32):
    """Parameters and a batch. All sizes differ, so no two axes can be swapped unnoticed."""
    w, b, x = map(np_rng.standard_normal, ((d_in, d_out), d_out, (rows, d_in)))
    label = np_rng.integers(2**d_out, size=rows, dtype=np.int32)
    batch = {"x": x.astype(np.float32), "more": {"label": label}}
    return tree(w.astype(dtype), b.astype(np.float32)), batch


def one_step(params, batch):
    """The same by hand, unsharded and in float64: the new parameters and the loss."""
    w, b = (params["layers"][0][name] for name in ("w", "b"))
    x, y = batch["x"].astype(np.float64), bits(batch["more"]["label"], len(b))
    error = x @ w + b - y
    new_w = w - LEARNING_RATE * x.T @ error * 2 / error.size
    new_b = b - LEARNING_RATE * error.sum(0) * 2 / error.size
    return tree(new_w.astype(w.dtype), new_b.astype(b.dtype)), np.float32(np.mean(error**2))


def many_steps(params, batch, n_steps):
    losses = []
    for _ in range(n_steps):
        params, loss = one_step(params, batch)
        losses.append(loss)
    return params, losses


def test_steps_along_the_gradient_of_the_mean_over_all_rows(attempt, np_rng):
    inputs = regression(np_rng)

    out = attempt(take_separate_steps, 3, 1, [inputs])

    assert_close(out, [one_step(*inputs)])


def test_computes_each_step_from_nothing_but_what_it_is_given(attempt, np_rng):
    inputs = [regression(np_rng) for _ in range(2)]
    inputs += [regression(np_rng, rows=30), inputs[0]]

    out = attempt(take_separate_steps, 1, 1, inputs)

    assert_close(out, [one_step(*each) for each in inputs])


def test_leaves_each_parameter_its_dtype(attempt, np_rng):
    out = attempt(dtypes_of_step, *regression(np_rng, dtype=np.float16))

    assert_close(out, tree("float16", "float32"))


def test_divides_the_rows_among_the_devices_and_sends_only_what_is_summed(attempt, np_rng):
    out = attempt(compile_step, 4, 2, *regression(np_rng))

    batch = {"x": (6, 12), "more": {"label": (6,)}}
    assert_close(out["held"], (tree((12, 8), (8,)), batch))
    assert {name for name, _ in out["collectives"]} == {"all-reduce"}
    n_params = 12 * 8 + 8
    assert n_params <= sum(numbers for _, numbers in out["collectives"]) <= 2 * n_params


@pytest.mark.parametrize(
    ("axes", "held", "n_steps"),
    [
        ([["model", "data"], ["data"]], [(6, 2), (2,)], 1),
        (["data"], [(3, 8), (2,)], 2),
    ],
    ids=["one spec each", "one spec for all, two steps"],
)
def test_keeps_the_parameters_cut_as_their_specs_say(attempt, np_rng, axes, held, n_steps):
    params, batch = regression(np_rng)

    out = attempt(take_steps, 4, 2, axes, params, batch, n_steps)

    new_params, losses = many_steps(params, batch, n_steps)
    assert_close(out["params"], new_params)
    assert_close(out["losses"], losses)
    assert_close(out["blocks"], [[shape] * 8 for shape in held])
    assert_close(out["loss block"], [()] * 8)


def test_compiles_once_for_many_steps(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(take_steps, 1, 1, [["data"], []], params, batch, n_steps=3)

    # A trace may call the loss more than once, and jit may tell the parameters that a step gave
    # from those of the first. So the second step may be traced again, but no other.
    assert_close(out["calls in the last step"], 0)


# --- FSDP ----------------------------------------------------------------------------------------


def choose(ex, mesh_shape, shapes):
    """The block of each parameter on each device, and the mesh axes that cut it."""
    mesh = mesh_of(*mesh_shape)
    first, *rest = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for shape in shapes]
    params = {"embedding": first, "layers": [{"norm": {"weight": param}} for param in rest]}
    specs = ex.fsdp_specs(mesh, params)
    chosen = jax.tree.map(lambda param, spec: (param, spec), params, specs)
    pairs = [chosen["embedding"], *(layer["norm"]["weight"] for layer in chosen["layers"])]
    arrays = [jax.device_put(np.zeros(p.shape), NamedSharding(mesh, spec)) for p, spec in pairs]
    return {
        "blocks": [sorted(set(blocks(array))) for array in arrays],
        "axes": [[axis for axis in spec if axis is not None] for _, spec in pairs],
    }


shapes = st.lists(st.lists(st.integers(1, 12), max_size=4), min_size=1, max_size=4)


@settings(max_examples=12)
@given(shapes=shapes, mesh_shape=st.sampled_from([(2, 3), (3, 1), (4, 2)]))
@example(shapes=[[7, 4], [4, 9], [8, 3], [8], []], mesh_shape=(4, 2))
@example(shapes=[[5, 7, 2, 6], [5], [3]], mesh_shape=(3, 2))
def test_leaves_each_device_its_share_of_every_parameter_that_can_be_cut(
    attempt, shapes, mesh_shape
):
    out = attempt(choose, mesh_shape, shapes)

    n_data = mesh_shape[0]
    share = [n_data if any(n % n_data == 0 for n in shape) else 1 for shape in shapes]
    held = [[math.prod(block) for block in kinds] for kinds in out["blocks"]]
    assert_close(held, [[math.prod(s) // n] for s, n in zip(shapes, share, strict=True)])
    assert_close(out["axes"], [["data"] if n > 1 else [] for n in share])


def test_leaves_the_only_device_along_data_everything(attempt):
    out = attempt(choose, (1, 3), [[7, 4], [3], []])

    assert_close(out["blocks"], [[(7, 4)], [(3,)], [()]])


# --- tensor parallel -----------------------------------------------------------------------------

CUTS = {
    "w_up": PartitionSpec(None, "model"),
    "b_up": PartitionSpec("model"),
    "w_down": PartitionSpec("model", None),
    "b_down": PartitionSpec(),
}


def placed(mesh, params, x):
    params = {k: jax.device_put(v, NamedSharding(mesh, CUTS[k])) for k, v in params.items()}
    return params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))


def feed_forward(ex, n_data, n_model, params, x, unplaced=False):
    mesh = mesh_of(n_data, n_model)
    args = (params, x) if unplaced else placed(mesh, params, x)
    jitted = jax.jit(lambda params, x: ex.tensor_parallel_mlp(mesh, params, x))
    compiled = jitted.lower(*args).compile()
    y = compiled(*args)
    return {"y": y, "blocks": blocks(y), "collectives": collectives(compiled)}


def feed_back(ex, n_data, n_model, params, x, grad_y):
    mesh = mesh_of(n_data, n_model)

    def loss(params, x):
        return jnp.sum(ex.tensor_parallel_mlp(mesh, params, x) * grad_y)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(*placed(mesh, params, x))


def mlp(np_rng, batch=(4,), d_model=5, d_ff=12):
    def randn(*shape):
        return np_rng.standard_normal(shape).astype(np.float32)

    params = {
        "w_up": randn(d_model, d_ff),
        "b_up": randn(d_ff),
        "w_down": randn(d_ff, d_model),
        "b_down": randn(d_model),
    }
    return params, randn(*batch, d_model)


def unsharded(params, x):
    """The oracle, in float64: y as a tensor that remembers where it came from, and its inputs."""
    t = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in params.items()}
    t["x"] = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = torch.relu(t["x"] @ t["w_up"] + t["b_up"]) @ t["w_down"] + t["b_down"]
    return y, t


@pytest.mark.parametrize(
    ("n_data", "n_model", "batch"),
    [(2, 4, (4, 3)), (3, 1, (6,)), (1, 1, (1, 2, 4))],
    ids=str,
)
def test_computes_what_the_unsharded_mlp_computes(attempt, np_rng, n_data, n_model, batch):
    params, x = mlp(np_rng, batch)

    out = attempt(feed_forward, n_data, n_model, params, x)

    y, _ = unsharded(params, x)
    assert_close(out["y"], y.detach().float().numpy())
    assert_close(out["blocks"], [(batch[0] // n_data, *batch[1:], 5)] * (n_data * n_model))


def test_sums_the_output_once_and_communicates_nothing_else(attempt, np_rng):
    params, x = mlp(np_rng)

    out = attempt(feed_forward, 2, 2, params, x)

    assert_close(out["collectives"], [["all-reduce", 2 * 5]])


def test_takes_unplaced_arrays_and_answers_in_their_dtype(attempt, np_rng):
    params, x = mlp(np_rng)
    params, x = {k: v.astype(np.float16) for k, v in params.items()}, x.astype(np.float16)

    out = attempt(feed_forward, 1, 3, params, x, unplaced=True)

    y, _ = unsharded(params, x)
    # Hidden features and shares of y are rounded too: a dozen numbers of up to 16, by eps / 2.
    eps = float(np.finfo(np.float16).eps)
    assert_close(out["y"], y.detach().half().numpy(), rtol=0.0, atol=12 * 8 * eps)
    assert_close(out["blocks"], [(4, 5)] * 3)


def test_gives_the_gradients_of_the_unsharded_mlp(attempt, np_rng):
    params, x = mlp(np_rng)
    grad_y = np_rng.standard_normal(x.shape).astype(np.float32)

    grad_params, grad_x = attempt(feed_back, 2, 3, params, x, grad_y)

    y, t = unsharded(params, x)
    (y * torch.tensor(grad_y)).sum().backward()
    assert_close(grad_params, {name: t[name].grad.float().numpy() for name in params})
    assert_close(grad_x, t["x"].grad.float().numpy())


def feed_forward_at_once(ex, n_data, n_model, params, x):
    return ex.tensor_parallel_mlp(mesh_of(n_data, n_model), params, x)


@pytest.mark.parametrize(("rows", "d_ff"), [(4, 10), (3, 12), (1, 12)])
def test_refuses_sizes_that_the_mesh_does_not_divide(attempt, np_rng, rows, d_ff):
    params, x = mlp(np_rng, (rows,), d_ff=d_ff)

    with pytest.raises(ValueError):
        attempt(feed_forward_at_once, 2, 4, params, x)
