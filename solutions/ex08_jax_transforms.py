"""Exercise 08: JAX's transformations.

JAX takes a plain function and gives back another: its gradient, its version for a whole
batch, its compiled version. Here five of these build one algorithm, private gradient
descent: no single example may pull hard on the parameters, and noise hides what is left.

    gᵢ      = gradient of the loss of example i             value_and_grad, vmap
    ḡᵢ      = gᵢ · min(1, max_norm / ‖gᵢ‖)                  cond
    params ← params − learning_rate · (Σᵢ ḡᵢ + noise) / n
    ... and that n_steps times over                         scan, jit

JAX runs your Python once, with stand-ins for the arrays (it traces the function), writes
down what you did to them, and from then on runs that. So inside, no Python `if` or `for`
can depend on the value of an array, and a call that has to trace again is a slow one.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1,
    https://arxiv.org/abs/1607.00133
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Loss = Callable[[Any, Any], Array]  # loss_fn(params, example): one number
Noise = Callable[[Array, tuple[int, ...]], Array]  # noise_fn(key, shape): an array of that shape


def per_example_gradients(loss_fn: Loss, params: Any, batch: Any) -> tuple[Array, Any]:
    """Take the loss and the gradient of each example by itself.

    params:  a tree of float32 arrays, such as {"w": …, "b": …}, of any depth
    batch:   a tree of arrays whose first axis counts the n examples; an example is the same
             tree without that axis
    returns: losses (n,); gradients, a tree like params whose arrays have n in front

    loss_fn is traced once or twice, not once for each example. Made for use under jax.jit.
    """
    # solution
    return jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0))(params, batch)


def clip(grads: Any, max_norm: float | Array) -> Any:
    """Shorten a gradient to max_norm if it is longer, and leave it as it is if not.

    grads:    a tree of arrays, the gradient of one example
    max_norm: above 0
    returns:  the same tree; its norm (the root of the sum of all squares of all its arrays)
              is at most max_norm, and its direction is the same

    Made for use under jax.jit and jax.vmap, where grads and max_norm are traced. A gradient
    of zeros stays zeros. Any other is of a size whose square float32 can hold.
    """
    # solution
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))

    def shorten(grads: Any) -> Any:
        return jax.tree.map(lambda g: g * (max_norm / norm), grads)

    return jax.lax.cond(norm > max_norm, shorten, lambda grads: grads, grads)


def private_step(
    loss_fn: Loss,
    noise_fn: Noise,
    params: Any,
    batch: Any,
    key: Array,
    learning_rate: float | Array,
    max_norm: float | Array,
) -> tuple[Any, Array]:
    """Step against the mean of the clipped gradients, with noise.

    noise_fn: such as jax.random.normal; every number of the sum of the clipped gradients gets
              one from here, and no key is used twice
    params, batch: as in per_example_gradients, with n examples
    key:      a JAX random key, the only source of chance
    returns:  the new parameters, a tree like params; the mean loss before the step

    Made for use under jax.jit, where all but the two functions is traced.
    """
    # solution
    losses, grads = per_example_gradients(loss_fn, params, batch)
    clipped = jax.vmap(clip, in_axes=(0, None))(grads, max_norm)

    sums, tree = jax.tree.flatten(jax.tree.map(lambda g: g.sum(axis=0), clipped))
    # A key gives the same numbers each time, so every array needs a key of its own.
    keys = jax.random.split(key, len(sums))
    noisy = [g + noise_fn(k, g.shape) for g, k in zip(sums, keys, strict=True)]

    mean = jax.tree.map(lambda g: g / len(losses), jax.tree.unflatten(tree, noisy))
    return jax.tree.map(lambda p, g: p - learning_rate * g, params, mean), losses.mean()


def fit(
    loss_fn: Loss,
    noise_fn: Noise,
    params: Any,
    batch: Any,
    key: Array,
    learning_rate: float | Array,
    max_norm: float | Array,
    n_steps: int,
) -> tuple[Any, Array]:
    """Take n_steps private steps, all on the same batch, as one compiled program.

    key:     the only source of chance; every step has keys of its own
    returns: the last parameters; losses (n_steps,), each the mean loss before its step

    The two functions and n_steps are fixed when the program is compiled, all else is traced.
    loss_fn is traced a few times (at most 4) however many steps there are, and the program holds
    a step once, or a fixed number of times. A later call with the same functions, n_steps, shapes
    and dtypes traces nothing, whatever the numbers are and whatever was called in between. An
    n_steps below 1 raises ValueError, and the message holds it.
    """
    # solution
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    return _fit(loss_fn, noise_fn, params, batch, key, learning_rate, max_norm, n_steps)


# jit keeps its compiled programs with the function that it gives, so that one is made once, here.
@partial(jax.jit, static_argnames=("loss_fn", "noise_fn", "n_steps"))
def _fit(
    loss_fn: Loss,
    noise_fn: Noise,
    params: Any,
    batch: Any,
    key: Array,
    learning_rate: Array,
    max_norm: Array,
    n_steps: int,
) -> tuple[Any, Array]:
    def step(params: Any, key: Array) -> tuple[Any, Array]:
        return private_step(loss_fn, noise_fn, params, batch, key, learning_rate, max_norm)

    return jax.lax.scan(step, params, jax.random.split(key, n_steps))
