"""Exercise 38: a token of `generate`, beside one for which `forward` reads the whole text again."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kata.racing import Race

N_PROMPT, N_NEW = 16, 112


def race(ex: Any) -> Iterator[Race]:
    """Both compiled; NumPy's arrays are there when they are handed over, JAX's need not be."""
    config = ex.GPTConfig(
        vocab_size=1000, block_size=N_PROMPT + N_NEW, n_layers=4, n_heads=4, d_model=128
    )
    params, key = ex.init_params(jax.random.key(0), config), jax.random.key(1)
    tokens = jnp.arange(N_PROMPT, dtype=jnp.int32)[None]

    @jax.jit
    def read_again(params, tokens):
        def step(text, position):
            new = ex.forward(params, config, text)[:, position - 1].argmax(axis=-1)
            return text.at[:, position].set(new), None

        text = jnp.pad(tokens, ((0, 0), (0, N_NEW)))
        return jax.lax.scan(step, text, N_PROMPT + jnp.arange(N_NEW))[0]

    yield Race(
        "a token of a small GPT",
        lambda: np.asarray(ex.generate(params, config, tokens, N_NEW, key, 0.0)),
        {"`forward` for every token": lambda: np.asarray(read_again(params, tokens))},
        amount=N_NEW,
        unit="ms",
    )
