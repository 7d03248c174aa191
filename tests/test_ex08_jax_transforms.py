"""Specs for exercise 08: JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kata.testing import assert_close

pytestmark = pytest.mark.jax

WITHOUT = [
    "jax.example_libraries.optimizers.clip_grads",
    "optax.clip_by_global_norm",
    "optax.contrib.differentially_private_aggregate",
]

NUMBERS = {"learning_rate": 0.1, "max_norm": 3.0}


def squared_error(params, example):
    """The loss of one example, of a linear model."""
    return jnp.sum((example["x"] @ params["w"] + params["b"] - example["y"]) ** 2)


def first_weight(params, example):
    """A loss that shows where the parameters are, and has no gradient to move them."""
    return jax.lax.stop_gradient(params["w"][0, 0] * example)


def counted(loss_fn):
    """The same loss, and a list that grows each time that Python runs it: when it is traced."""
    traces = []

    def counting(params, example):
        traces.append(1)
        return loss_fn(params, example)

    return counting, traces


def ones(key, shape):
    return jnp.ones(shape)


def mark_of(key, shape):
    """Numbers that tell which key they are from, far cheaper than normal ones."""
    mark = jnp.sum(jax.random.key_data(key)) * jnp.float32(2**-32)  # between 0 and 1
    return mark + jnp.arange(np.prod(shape)).reshape(shape)


def gradients(ex, params, batch):
    compiled = jax.jit(lambda p, b: ex.per_example_gradients(squared_error, p, b))
    return compiled(params, batch)


def traces_of_gradients(ex, params, batch):
    """How often the loss is traced. Only shapes are computed: nothing is compiled."""
    loss_fn, traces = counted(squared_error)
    losses, _ = jax.eval_shape(lambda p: ex.per_example_gradients(loss_fn, p, batch), params)
    return {"traces": len(traces), "losses": losses.shape}


def clip_many(ex, grads, max_norms):
    """Compiled, and for several gradients at once."""
    return jax.jit(jax.vmap(ex.clip))(grads, max_norms)


def step_twice(ex, params, batch, numbers, others):
    """Steps of one compiled program from the same place with different numbers."""
    key = jax.random.key(0)
    step = jax.jit(lambda given: ex.private_step(squared_error, ones, params, batch, key, **given))
    return step(numbers), step(others)


def fit(ex, params, batch, numbers, n_steps):
    key = jax.random.key(0)
    return ex.fit(squared_error, ones, params, batch, key, **numbers, n_steps=n_steps)


def fit_noise(ex, params, seeds, n_steps):
    """For each key, where the noise alone moves the parameters, and the first weight on the way."""
    keys, batch = [jax.random.key(seed) for seed in seeds], np.ones(1, np.float32)
    return [ex.fit(first_weight, mark_of, params, batch, k, 1.0, 1.0, n_steps) for k in keys]


def traces_of_fits(ex, params, batch, numbers, n_steps):
    """How often the loss is traced by three calls, the last of them with other values.

    Only shapes are computed: nothing is compiled.
    """
    loss_fn, traces = counted(squared_error)

    def shapes(params, batch, seed, numbers):
        def fit(params, batch):
            key = jax.random.key(seed)
            return ex.fit(loss_fn, ones, params, batch, key, **numbers, n_steps=n_steps)

        before = len(traces)
        _, losses = jax.eval_shape(fit, params, batch)
        return {"traces": len(traces) - before, "losses": losses.shape}

    others = {name: 0.5 * number for name, number in numbers.items()}
    return {
        "first": shapes(params, batch, 0, numbers),
        "the same again": shapes(params, batch, 0, numbers),
        "other numbers": shapes(params, batch, 1, others),
    }


def regression(np_rng, n=7, d_in=4, d_out=3):
    """All sizes differ, so that no two axes can be swapped unnoticed."""

    def randn(*shape):
        return np_rng.standard_normal(shape).astype(np.float32)

    params = {"w": randn(d_in, d_out), "b": randn(d_out)}
    return params, {"x": randn(n, d_in), "y": randn(n, d_out)}


def one_by_one(params, batch):
    """The losses and gradients by hand, in float64."""
    losses, grads = [], {"w": [], "b": []}
    for x, y in zip(batch["x"].astype(float), batch["y"].astype(float), strict=True):
        error = x @ params["w"] + params["b"] - y
        losses.append(np.sum(error**2))
        grads["w"].append(2 * np.outer(x, error))
        grads["b"].append(2 * error)
    return np.array(losses), {name: np.array(g) for name, g in grads.items()}


def descend(params, batch, learning_rate, max_norm, n_steps):
    """The steps by hand, in float64, with ones for noise."""
    params, mean_losses = {k: v.astype(float) for k, v in params.items()}, []
    for _ in range(n_steps):
        losses, grads = one_by_one(params, batch)
        mean_losses.append(losses.mean())
        norms = np.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in grads.values()))
        factors = np.minimum(1, max_norm / norms)
        for name, g in grads.items():
            noisy_sum = np.tensordot(factors, g, 1) + 1
            params[name] = params[name] - learning_rate * noisy_sum / len(g)
    return params, np.array(mean_losses)


def single(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def test_takes_the_gradient_of_every_example_by_itself(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(gradients, params, batch)

    assert_close(out, single(one_by_one(params, batch)))


def test_traces_the_loss_once_for_all_examples(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(traces_of_gradients, params, batch)

    assert_close(out["losses"], (7,))
    assert out["traces"] <= 2, f"the loss was traced {out['traces']} times for 7 examples"


def test_clips_only_gradients_that_are_longer_than_max_norm(attempt, np_rng):
    # Each has the length 5 in w and 12 in b, so 13 over both together.
    w, b = np_rng.normal(size=(6, 2, 3)), np_rng.normal(size=(6, 4))
    w *= 5 / np.sqrt((w**2).sum((1, 2), keepdims=True))
    b *= 12 / np.sqrt((b**2).sum(1, keepdims=True))
    w[5] = b[5] = 0
    max_norms = np.array([0.5, 6.5, 11.0, 12.5, 14.0, 1.0])

    out = attempt(clip_many, single({"w": w, "b": b}), single(max_norms))

    factors = np.array([0.5 / 13, 6.5 / 13, 11 / 13, 12.5 / 13, 1.0, 1.0])
    assert_close(out, single({"w": w * factors[:, None, None], "b": b * factors[:, None]}))


def test_steps_against_the_noisy_mean_of_the_clipped_gradients(attempt, np_rng):
    params, batch = regression(np_rng)
    others = {"learning_rate": 0.3, "max_norm": 1e6}  # nothing is clipped

    out = attempt(step_twice, params, batch, NUMBERS, others)

    for (new, loss), numbers in zip(out, (NUMBERS, others), strict=True):
        expected, losses = descend(params, batch, **numbers, n_steps=1)
        assert_close(new, single(expected))
        assert_close(loss, single(losses[0]))


def test_fits_step_by_step_and_reports_the_loss_before_each(attempt, np_rng):
    params, batch = regression(np_rng)

    new, mean_losses = attempt(fit, params, batch, NUMBERS, 3)

    expected, losses = descend(params, batch, **NUMBERS, n_steps=3)
    assert_close(new, single(expected))
    assert_close(mean_losses, single(losses))


def test_uses_no_key_twice(attempt, np_rng):
    params = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    seed = int(np_rng.integers(1 << 30))

    out = attempt(fit_noise, params, [seed, seed + 1], 3)

    arrays = [array for new, _ in out for array in new.values()]
    noise = np.concatenate([array.flatten() for array in arrays])
    # One pair may be equal by chance, once in ten thousand runs. A key used twice gives many.
    assert len(np.unique(noise)) >= len(noise) - 1, "some numbers got the same noise"
    for new, first_weights in out:
        steps = np.diff([*first_weights, new["w"][0, 0]])
        assert np.ptp(steps) > 1e-5, "every step had the same noise"


def test_traces_the_loss_a_few_times_however_many_steps_there_are(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(traces_of_fits, params, batch, NUMBERS, 30)

    first = out["first"]
    assert_close(first["losses"], (30,))
    assert first["traces"] <= 4, f"the loss was traced {first['traces']} times for 30 steps"


def test_traces_nothing_in_later_calls(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(traces_of_fits, params, batch, NUMBERS, 3)

    for call in ("the same again", "other numbers"):
        again = out[call]["traces"]
        assert again == 0, f"a later call ({call}) traced the loss {again} more times"


@pytest.mark.parametrize("n_steps", [0, -3])
def test_rejects_a_number_of_steps_below_one(attempt, np_rng, n_steps):
    params, batch = regression(np_rng)

    with pytest.raises(ValueError, match=str(n_steps)):
        attempt(fit, params, batch, NUMBERS, n_steps)
