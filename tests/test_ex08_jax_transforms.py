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


NOISE = -0.5


def squared_error(params, example):
    """The loss of one example, of a linear model."""
    x, wanted = example
    return jnp.sum((x @ params["w"] + params["rest"][0] - wanted["y"]) ** 2)


def weights_by(params, example):
    """A loss that costs next to nothing."""
    return example * sum(jnp.sum(p) for p in jax.tree.leaves(params))


def counted(function):
    """The same function, and a list that grows each time that Python runs it: when it is traced."""
    traces = []

    def counting(*args):
        traces.append(1)
        return function(*args)

    return counting, traces


def same(key, shape):
    return jnp.full(shape, NOISE)


def recorded():
    """The same noise, and a list of [key's data, how many numbers it is for], one for each draw."""
    draws = []

    def recording(key, shape):
        data, size = jax.random.key_data(key), int(np.prod(shape))
        jax.debug.callback(lambda data: draws.append([np.asarray(data).tolist(), size]), data)
        return same(key, shape)

    return recording, draws


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
    step = jax.jit(lambda given: ex.private_step(squared_error, same, params, batch, key, **given))
    return step(numbers), step(others)


def fit_each(ex, calls, n_steps):
    """Fits one after the other, each of (params, batch, numbers); and then the params given."""
    key, found = jax.random.key(0), []
    given = [jax.tree.map(jnp.asarray, params) for params, _, _ in calls]
    for params, (_, batch, numbers) in zip(given, calls, strict=True):
        found.append(ex.fit(squared_error, same, params, batch, key, **numbers, n_steps=n_steps))
    return found, given


def functions_used(ex, params, batch):
    """For three fits, whether their loss and noise are traced; all losses have one name."""
    losses, noises = [counted(squared_error) for _ in "12"], [counted(same) for _ in "12"]
    used = []
    for (loss, in_loss), (noise, in_noise) in zip(
        (losses[0], losses[1], losses[0]), (noises[0], noises[0], noises[1]), strict=True
    ):
        in_loss.clear()
        in_noise.clear()

        def fit(params, batch, loss=loss, noise=noise):
            return ex.fit(loss, noise, params, batch, jax.random.key(0), 0.1, 3.0, 3)

        jax.eval_shape(fit, params, batch)
        used.append({"loss": bool(in_loss), "noise": bool(in_noise)})
    return used


def fit_steps(ex, params, batch, n_steps, learning_rate=0.1):
    key = jax.random.key(0)
    return ex.fit(squared_error, same, params, batch, key, learning_rate, 3.0, n_steps)


def draws_of_fits(ex, params, batch, seeds, n_steps):
    """For each key, the draws of noise of a fit."""
    noise_fn, draws = recorded()
    found = []
    for seed in seeds:
        key = jax.random.key(seed)
        jax.block_until_ready(ex.fit(weights_by, noise_fn, params, batch, key, 0.1, 3.0, n_steps))
        jax.effects_barrier()
        found.append(list(draws))
        draws.clear()
    return found


def grows(ex, params, batch, fewer, more):
    """Whether the program of a fit has more lines for more steps. It is not compiled."""

    def lines(n_steps):
        def fit(params, batch, learning_rate):
            return fit_steps(ex, params, batch, n_steps, learning_rate)

        return len(jax.jit(fit).lower(params, batch, 0.1).as_text().splitlines())

    return lines(more) - lines(fewer) >= (more - fewer) / 2


def traces_of_fits(ex, params, batch, numbers, n_steps):
    """How often the loss and the noise are traced by a call, and by others after it.

    Only shapes are computed: nothing is compiled.
    """
    loss_fn, traces = counted(squared_error)
    noise_fn, of_noise = counted(same)

    def shapes(params, batch, seed, numbers, n_steps=n_steps):
        def fit(params, batch):
            key = jax.random.key(seed)
            return ex.fit(loss_fn, noise_fn, params, batch, key, **numbers, n_steps=n_steps)

        traces.clear()
        of_noise.clear()
        _, losses = jax.eval_shape(fit, params, batch)
        return {"traces": len(traces), "of noise": len(of_noise), "losses": losses.shape}

    others = {name: 0.5 * number for name, number in numbers.items()}
    return {
        "first": shapes(params, batch, 0, numbers),
        "the same again": shapes(params, batch, 0, numbers),
        "other numbers": shapes(params, batch, 1, others),
        "more steps": shapes(params, batch, 0, numbers, n_steps + 1),
        "the same after more steps": shapes(params, batch, 0, numbers),
    }


def regression(np_rng, n=7, d_in=4, d_out=3):
    """All sizes differ, so that no two axes can be swapped unnoticed."""

    def randn(*shape):
        return np_rng.standard_normal(shape).astype(np.float32)

    params = {"w": randn(d_in, d_out), "rest": [randn(d_out)]}
    return params, (randn(n, d_in), {"y": randn(n, d_out)})


def one_by_one(params, batch):
    """The losses and gradients by hand, in float64."""
    losses, of_w, of_b = [], [], []
    xs, wanted = batch
    for x, y in zip(xs.astype(float), wanted["y"].astype(float), strict=True):
        error = x @ params["w"] + params["rest"][0] - y
        losses.append(np.sum(error**2))
        of_w.append(2 * np.outer(x, error))
        of_b.append(2 * error)
    return np.array(losses), {"w": np.array(of_w), "rest": [np.array(of_b)]}


def descend(params, batch, learning_rate, max_norm, n_steps):
    """The steps by hand, in float64."""
    params, mean_losses = jax.tree.map(lambda p: p.astype(float), params), []
    for _ in range(n_steps):
        losses, grads = one_by_one(params, batch)
        mean_losses.append(losses.mean())
        norms = np.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in jax.tree.leaves(grads)))
        factors = np.minimum(1, max_norm / norms)

        def step(p, g, factors=factors):
            return p - learning_rate * (np.tensordot(factors, g, 1) + NOISE) / len(g)

        params = jax.tree.map(step, params, grads)
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


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
def test_clips_only_gradients_that_are_longer_than_max_norm(attempt, np_rng, scale):
    # Each has the length 3 in w, 4 in s and 12 in b, so 13 over all of them.
    w, b = np_rng.normal(size=(6, 2, 3)), np_rng.normal(size=(6, 4))
    w *= 3 / np.sqrt((w**2).sum((1, 2), keepdims=True))
    b *= 12 / np.sqrt((b**2).sum(1, keepdims=True))
    s = np.array([4.0, -4.0, 4.0, -4.0, 4.0, 0.0])
    w[5] = b[5] = 0
    max_norms = np.array([0.5, 6.5, 11.0, 12.99, 14.0, 1.0])
    tree = {"w": w, "rest": [s, (b,)]}

    grads = jax.tree.map(lambda g: scale * g, tree)
    out = attempt(clip_many, single(grads), single(scale * max_norms))

    factors = np.array([0.5 / 13, 6.5 / 13, 11 / 13, 12.99 / 13, 1.0, 1.0])
    expected = jax.tree.map(lambda g: g * factors.reshape(-1, *[1] * (g.ndim - 1)), grads)
    assert_close(out, single(expected), rtol=1e-6, atol=0.0)  # sums of 11 squares in float32


def test_steps_against_the_noisy_mean_of_the_clipped_gradients(attempt, np_rng):
    params, batch = regression(np_rng)
    others = {"learning_rate": 0.3, "max_norm": 1e6}  # nothing is clipped

    out = attempt(step_twice, params, batch, NUMBERS, others)

    for (new, loss), numbers in zip(out, (NUMBERS, others), strict=True):
        expected, losses = descend(params, batch, **numbers, n_steps=1)
        assert_close(new, single(expected))
        assert_close(loss, single(losses[0]))


def test_fits_step_by_step_and_reports_the_loss_before_each_in_every_call(attempt, np_rng):
    numbers = {"learning_rate": 0.03, "max_norm": 1.0}
    calls = [(*regression(np_rng), NUMBERS), (*regression(np_rng), numbers)]

    found, left = attempt(fit_each, calls, 3)

    for (params, batch, given), (new, mean_losses) in zip(calls, found, strict=True):
        expected, losses = descend(params, batch, **given, n_steps=3)
        assert_close(new, single(expected))
        assert_close(mean_losses, single(losses))
    assert_close(left, [params for params, _, _ in calls])


def test_uses_the_functions_that_each_call_is_given(attempt, np_rng):
    params, batch = regression(np_rng)

    used = attempt(functions_used, params, batch)

    assert_close(used[0], {"loss": True, "noise": True})
    assert used[1]["loss"], "a fit with another loss, and that loss was never traced"
    assert used[2]["noise"], "a fit with another noise, and that noise was never traced"


def test_draws_noise_for_every_number_with_keys_of_its_own(attempt, np_rng):
    params = {"w": np.zeros((2, 3), np.float32), "rest": [np.zeros(4, np.float32)]}
    seed = int(np_rng.integers(1 << 30))

    out = attempt(draws_of_fits, params, np.ones(1, np.float32), [seed, seed + 1], 3)

    keys = [tuple(key) for draws in out for key, _ in draws]
    assert len(set(keys)) == len(keys), f"{len(set(keys))} keys for {len(keys)} draws in two fits"
    assert_close([sum(size for _, size in draws) for draws in out], [3 * 10, 3 * 10])


def test_makes_a_program_that_does_not_grow_with_the_steps(attempt, np_rng):
    params, batch = regression(np_rng)

    longer = attempt(grows, params, batch, 16, 32)

    assert not longer, "32 steps make a longer program than 16"


@pytest.mark.parametrize("n_steps", [1, 30])
def test_traces_the_loss_a_few_times_however_many_steps_there_are(attempt, np_rng, n_steps):
    params, batch = regression(np_rng)

    out = attempt(traces_of_fits, params, batch, NUMBERS, n_steps)

    first = out["first"]
    assert_close(first["losses"], (n_steps,))
    assert first["traces"] <= 4, f"the loss was traced {first['traces']} times for {n_steps} steps"


def test_traces_nothing_in_later_calls(attempt, np_rng):
    params, batch = regression(np_rng)

    out = attempt(traces_of_fits, params, batch, NUMBERS, 3)

    for call in ("the same again", "other numbers", "the same after more steps"):
        again, noise = out[call]["traces"], out[call]["of noise"]
        assert again == 0, f"a later call ({call}) traced the loss {again} more times"
        assert noise == 0, f"a later call ({call}) traced the noise {noise} more times"


@pytest.mark.parametrize("n_steps", [0, -1, -17])
def test_rejects_a_number_of_steps_below_one(attempt, np_rng, n_steps):
    params, batch = regression(np_rng)

    with pytest.raises(ValueError, match=str(n_steps)):
        attempt(fit_steps, params, batch, n_steps)
