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


@pytest.mark.parametrize(("n_data", "n_model"), [(4, 2), (2, 3)])
def test_arranges_the_devices_in_rows_of_data_and_columns_of_model(attempt, n_data, n_model):
    layout = attempt(lay_out, n_data, n_model)

    assert_close(layout["axes"], ["data", "model"])
    assert_close(layout["shape"], [n_data, n_model])
    assert_close(layout["devices"], n_data * n_model)
    assert_close(layout["kinds"], ["Auto", "Auto"])


def test_refuses_a_mesh_of_more_devices_than_there_are(attempt):
    with pytest.raises(ValueError):
        attempt(lay_out, 3, 5)


# --- data parallel and FSDP ----------------------------------------------------------------------


def squared_error(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def specs_of(axes):
    """PartitionSpecs as plain data: {"w": [None, "data"]}; None stands for P() for them all."""
    if axes is None:
        return PartitionSpec()
    return {name: PartitionSpec(*spec) for name, spec in axes.items()}


def take_steps(ex, n_data, n_model, axes, params, batch, n_steps=1):
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return squared_error(params, batch)

    mesh = mesh_of(n_data, n_model)
    step = ex.data_parallel_step(mesh, loss_fn, LEARNING_RATE, specs_of(axes))
    losses = []
    for _ in range(n_steps):
        params, loss = step(params, batch)
        losses.append(loss)
    return {
        "params": params,
        "losses": losses,
        "blocks": {name: blocks(array) for name, array in params.items()},
        "loss block": blocks(losses[-1]),
        "traces": len(traces),
    }


def compile_step(ex, n_data, n_model, axes, params, batch):
    mesh = mesh_of(n_data, n_model)
    step = ex.data_parallel_step(mesh, squared_error, LEARNING_RATE, specs_of(axes))
    compiled = jax.jit(step).lower(params, batch).compile()
    (params_in, batch_in), _ = compiled.input_shardings
    return {
        "params in": {k: s.shard_shape(params[k].shape) for k, s in params_in.items()},
        "batch in": {k: s.shard_shape(batch[k].shape) for k, s in batch_in.items()},
        "collectives": collectives(compiled),
    }


def regression(np_rng, rows=24, d_in=8, d_out=5):
    """Parameters and a batch. All sizes differ, so no two axes can be swapped unnoticed."""

    def randn(*shape):
        return np_rng.standard_normal(shape).astype(np.float32)

    params = {"w": randn(d_in, d_out), "b": randn(d_out)}
    return params, {"x": randn(rows, d_in), "y": randn(rows, d_out)}


def one_step(params, batch):
    """The same by hand, unsharded and in float64: the new parameters and the loss."""
    w, b, x, y = (a.astype(np.float64) for a in (*params.values(), *batch.values()))
    error = x @ w + b - y
    grads = {"w": x.T @ error * 2 / error.size, "b": error.sum(0) * 2 / error.size}
    new = {"w": w - LEARNING_RATE * grads["w"], "b": b - LEARNING_RATE * grads["b"]}
    return {k: v.astype(np.float32) for k, v in new.items()}, np.float32(np.mean(error**2))


def test_steps_along_the_gradient_of_the_mean_over_all_rows(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(take_steps, 8, 1, None, params, batch)

    new_params, loss = one_step(params, batch)
    assert_close(out["losses"], [loss])
    assert_close(out["params"], new_params)


def test_divides_the_rows_of_the_batch_among_the_devices(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(compile_step, 4, 2, None, params, batch)

    assert_close(out["batch in"], {"x": (6, 8), "y": (6, 5)})
    assert_close(out["params in"], {"w": (8, 5), "b": (5,)})


def test_communicates_nothing_but_sums_of_the_gradients_and_the_loss(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(compile_step, 4, 2, None, params, batch)

    assert {name for name, _ in out["collectives"]} == {"all-reduce"}
    n_params = 8 * 5 + 5
    assert n_params <= sum(numbers for _, numbers in out["collectives"]) <= 2 * n_params


def test_keeps_the_parameters_cut_as_their_specs_say(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(take_steps, 4, 2, {"w": ["data", None], "b": []}, params, batch)

    new_params, loss = one_step(params, batch)
    assert_close(out["params"], new_params)
    assert_close(out["losses"], [loss])
    assert_close(out["blocks"], {"w": [(2, 5)] * 8, "b": [(5,)] * 8})
    assert_close(out["loss block"], [()] * 8)


def test_compiles_once_for_many_steps(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(take_steps, 4, 2, {"w": ["data", None], "b": []}, params, batch, n_steps=4)

    expected = []
    for _ in range(4):
        params, loss = one_step(params, batch)
        expected.append(loss)
    assert_close(out["losses"], expected)
    # The first step gets NumPy's arrays and the others JAX's, which jit may tell apart.
    assert out["traces"] <= 2


def choose(ex, n_data, n_model, shapes):
    """The block of each parameter on one device, and the mesh axes that cut it."""
    mesh = mesh_of(n_data, n_model)
    params = [{"weight": jax.ShapeDtypeStruct(tuple(s), jnp.float32)} for s in shapes]
    specs = ex.fsdp_specs(mesh, params)
    chosen = [spec["weight"] for spec in specs]
    return {
        "blocks": [
            list(NamedSharding(mesh, spec).shard_shape(tuple(shape)))
            for spec, shape in zip(chosen, shapes, strict=True)
        ],
        "axes": [[axis for axis in spec if axis is not None] for spec in chosen],
    }


shapes = st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=4)


@settings(max_examples=20)
@given(shapes=shapes, n_data=st.sampled_from([2, 4]))
@example(shapes=[[7, 4], [4, 9], [8, 3], [8], []], n_data=4)
def test_leaves_each_device_its_share_of_every_parameter_that_can_be_cut(attempt, shapes, n_data):
    out = attempt(choose, n_data, 2, shapes)

    share = [n_data if any(n % n_data == 0 for n in shape) else 1 for shape in shapes]
    held = [math.prod(block) for block in out["blocks"]]
    assert_close(held, [math.prod(s) // n for s, n in zip(shapes, share, strict=True)])
    assert_close(out["axes"], [["data"] if n > 1 else [] for n in share])


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


def feed_forward(ex, n_data, n_model, params, x):
    mesh = mesh_of(n_data, n_model)
    args = placed(mesh, params, x)
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


@pytest.mark.parametrize(("n_data", "n_model"), [(1, 6), (2, 4)])
def test_computes_what_the_unsharded_mlp_computes(attempt, np_rng, n_data, n_model):
    params, x = mlp(np_rng, batch=(4, 3))

    out = attempt(feed_forward, n_data, n_model, params, x)

    y, _ = unsharded(params, x)
    assert_close(out["y"], y.detach().float().numpy())
    assert_close(out["blocks"], [(4 // n_data, 3, 5)] * (n_data * n_model))


def test_sums_the_output_once_and_communicates_nothing_else(attempt, np_rng):
    params, x = mlp(np_rng)

    out = attempt(feed_forward, 2, 4, params, x)

    assert_close(out["collectives"], [["all-reduce", 2 * 5]])


def test_gives_the_gradients_of_the_unsharded_mlp(attempt, np_rng):
    params, x = mlp(np_rng)
    grad_y = np_rng.standard_normal(x.shape).astype(np.float32)

    grad_params, grad_x = attempt(feed_back, 2, 4, params, x, grad_y)

    y, t = unsharded(params, x)
    (y * torch.tensor(grad_y)).sum().backward()
    assert_close(grad_params, {name: t[name].grad.float().numpy() for name in params})
    assert_close(grad_x, t["x"].grad.float().numpy())


def test_refuses_hidden_features_that_cannot_be_divided(attempt, np_rng):
    params, x = mlp(np_rng, d_ff=10)

    with pytest.raises(ValueError):
        attempt(feed_forward_unplaced, 2, 4, params, x)


def feed_forward_unplaced(ex, n_data, n_model, params, x):
    return ex.tensor_parallel_mlp(mesh_of(n_data, n_model), params, x)
