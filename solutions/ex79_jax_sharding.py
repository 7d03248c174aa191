"""Exercise 79: JAX sharding.

A mesh is a table of devices whose axes have names. A PartitionSpec names, for each axis
of an array, the mesh axis along which it is cut: P(None, "model") cuts the columns into
n_model blocks, and P() leaves the array whole on every device. jit then compiles one
program, which all devices run on their own blocks; where a result needs the blocks of
others, they communicate.

    data parallel     parameters P()                    batch P("data")
    FSDP              parameters cut along "data" too   batch P("data")
    tensor parallel   w_up P(None, "model"), w_down P("model", None):
                      y = psum over "model" of (relu(x w_up + b_up) w_down) + b_down

Source: Xu et al. 2021, "GSPMD", section 3, https://arxiv.org/abs/2105.04663;
    Shoeybi et al. 2019, "Megatron-LM", section 3, https://arxiv.org/abs/1909.08053
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(n_data: int, n_model: int) -> Mesh:
    """Arrange n_data · n_model devices as a table with n_data rows and n_model columns.

    returns: a mesh with the axes "data" (down the rows) and "model", in this order

    Both axes are Auto: where no spec says anything, the compiler decides. (jax.make_mesh
    makes them Explicit by default since JAX 0.9.) Devices that are left over stay out.
    Too few devices raise ValueError; JAX's own will do.
    """
    # solution
    return jax.make_mesh((n_data, n_model), ("data", "model"), (AxisType.Auto, AxisType.Auto))


def data_parallel_step(
    mesh: Mesh,
    loss_fn: Callable[[Any, Any], Array],
    learning_rate: float,
    param_specs: Any,
) -> Callable[[Any, Any], tuple[Any, Array]]:
    """Make a jitted step of gradient descent, `step(params, batch) -> (new_params, loss)`.

    loss_fn:     loss_fn(params, batch) is the mean loss over the rows of whatever batch it is given
    param_specs: a PartitionSpec for each parameter (a tree like params), or one for them all

    params and batch are trees of arrays, possibly NumPy's, and each array of the batch has
    its rows first. Each device holds 1/n_data of the batch's rows, and of the parameters
    what param_specs says: before the step, and again after it. The new parameters are
    params − learning_rate · (the gradient of the loss over all rows), each in its dtype, and
    the loss is the mean over all rows, before the step, whole on every device. n_data
    divides the rows, of which another batch may have more or fewer.

    loss_fn may be called more than once while the step is traced, but in no later step. Under
    another jax.jit the step asks for the same placement. The new parameters may take over the
    memory of params; the batch stays usable.
    """
    # solution
    parameters = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs)
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def step(params: Any, batch: Any) -> tuple[Any, Array]:
        # As if for one device: under jit an array is the whole one, so the mean is over all
        # rows, and the compiler adds what the devices must tell each other.
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    return jax.jit(step, in_shardings=(parameters, rows), out_shardings=(parameters, whole))


def tensor_parallel_mlp(mesh: Mesh, params: dict[str, Array], x: Array) -> Array:
    """Apply relu(x w_up + b_up) w_down + b_down with its hidden features cut along "model".

    params:  w_up (d_model, d_ff), b_up (d_ff,), w_down (d_ff, d_model), b_down (d_model,)
    x:       (batch, …, d_model)
    returns: (batch, …, d_model), in the dtype of x and params

    Each device computes d_ff / n_model hidden features for batch / n_data rows, from the
    matching blocks of the weights: columns of w_up, rows of w_down. Going forward the
    devices communicate once: they sum y. The result is cut along "data" in its rows and
    whole along "model". Sizes that the mesh does not divide raise ValueError; JAX's own
    will do. Made for use under jax.jit and jax.grad.
    """
    # solution
    specs = {"w_up": P(None, "model"), "b_up": P("model"), "w_down": P("model"), "b_down": P()}

    def block(params: dict[str, Array], x: Array) -> Array:
        hidden = jax.nn.relu(x @ params["w_up"] + params["b_up"])  # (…, d_ff / n_model)
        y = jax.lax.psum(hidden @ params["w_down"], "model")
        # After the sum: before it, the bias would be added n_model times.
        return y + params["b_down"]

    sharded = jax.shard_map(block, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    return sharded(params, x)


def fsdp_specs(mesh: Mesh, params: Any) -> Any:
    """Choose a PartitionSpec for each parameter, so that each device holds 1/n_data of it.

    params:  a tree of arrays, or of jax.ShapeDtypeStructs
    returns: a tree like params, of PartitionSpecs

    A parameter is cut along "data", in one of its axes whose length n_data divides (any
    such axis will do). One that has no such axis stays whole: P().
    """
    # solution
    n_data = mesh.shape["data"]

    def spec(param: Any) -> P:
        axes = [i for i, length in enumerate(param.shape) if length % n_data == 0]
        if not axes:
            return P()
        longest = max(axes, key=lambda i: param.shape[i])
        return P(*["data" if i == longest else None for i in range(len(param.shape))])

    return jax.tree.map(spec, params)
