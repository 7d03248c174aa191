"""Exercise 38: GPT in JAX.

The GPT-2 of exercise 36 once more, as functions: the weights are an argument, and nothing
hides a state. That is what JAX's transformations ask for. Reading is one pass; training is
its gradient; writing is one compiled loop:

    loss     = mean over t of −log softmax(forward(tokens))[t, tokens[t + 1]]      value_and_grad
    params  ← params − learning_rate · ∇loss
    token    ~ softmax(logits / temperature), token after token                    scan, jit

In a compiled loop all shapes stay as they are, while a text grows. So the keys and values of
all tokens so far live in a cache, made at full length at the start; a step writes its own
into the next slot, and must not see the slots that are still empty.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
    Bradbury et al. 2018, "JAX", https://docs.jax.dev
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Any]


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT. Frozen, so that it can be a static argument of jax.jit.

    vocab_size: number of tokens that there are
    block_size: longest row of tokens that the model can read
    n_layers:   number of blocks
    n_heads:    number of attention heads; divides d_model
    d_model:    width of x; the MLP is 4·d_model wide inside
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768


def init_params(key: Array, config: GPTConfig) -> Params:
    """Draw the weights, as exercise 36 does for the GPT-2 form.

    returns: a tree of float32 arrays; those of all blocks are stacked, with n_layers in front

        wte                          (vocab_size, d_model)   also the head
        wpe                          (block_size, d_model)
        h/ln_1, h/ln_2               {"weight": (n_layers, d_model), "bias": the same}
        h/attn/c_attn                {"weight": (n_layers, d_model, 3·d_model), "bias": …}
        h/attn/c_proj                {"weight": (n_layers, d_model, d_model), "bias": …}
        h/mlp/c_fc                   {"weight": (n_layers, d_model, 4·d_model), "bias": …}
        h/mlp/c_proj                 {"weight": (n_layers, 4·d_model, d_model), "bias": …}
        ln_f                         {"weight": (d_model,), "bias": (d_model,)}

    where h/attn/c_attn stands for params["h"]["attn"]["c_attn"]. A bias of a linear layer has
    n_layers and the last size of its weight. Weights, those of wte and wpe too, are normal with
    standard deviation 0.02, the two c_proj with 0.02/√(2·n_layers). Biases are 0, and the weights
    of norms 1. No two numbers come from the same draw: no key is used twice.
    """
    # solution
    n, d = config.n_layers, config.d_model
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, std: float = 0.02) -> Array:
        return std * jax.random.normal(next(keys), shape)

    def linear(d_in: int, d_out: int, std: float = 0.02) -> Params:
        return {"weight": normal(n, d_in, d_out, std=std), "bias": jnp.zeros((n, d_out))}

    def norm(*shape: int) -> Params:
        return {"weight": jnp.ones(shape), "bias": jnp.zeros(shape)}

    small = 0.02 / math.sqrt(2 * n)  # x sums up 2·n_layers branches
    return {
        "wte": normal(config.vocab_size, d),
        "wpe": normal(config.block_size, d),
        "h": {
            "ln_1": norm(n, d),
            "attn": {"c_attn": linear(d, 3 * d), "c_proj": linear(d, d, small)},
            "ln_2": norm(n, d),
            "mlp": {"c_fc": linear(d, 4 * d), "c_proj": linear(4 * d, d, small)},
        },
        "ln_f": norm(d),
    }


def _linear(p: Params, x: Array) -> Array:
    return x @ p["weight"] + p["bias"]


def _layer_norm(p: Params, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * p["weight"] + p["bias"]


def _new_cache(config: GPTConfig, batch: int, max_len: int) -> Array:
    """Room for the keys and values of every layer."""
    head_dim = config.d_model // config.n_heads
    return jnp.zeros((config.n_layers, 2, batch, config.n_heads, max_len, head_dim))


def _read(
    params: Params, config: GPTConfig, tokens: Array, cache: Array, start: int | Array
) -> tuple[Array, Array]:
    """Read tokens (batch, n) that stand from position start on: their logits, the cache after."""
    positions = start + jnp.arange(tokens.shape[1])
    # A slot behind a query's own position holds a later token, or none yet.
    visible = jnp.arange(cache.shape[-2]) <= positions[:, None]  # (n, max_len)

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], config.n_heads, -1).swapaxes(1, 2)

    def attend(p: Params, x: Array, cache: Array) -> tuple[Array, Array]:
        q, k, v = (heads(part) for part in jnp.split(_linear(p["c_attn"], x), 3, axis=-1))
        cache = jax.lax.dynamic_update_slice(cache, jnp.stack([k, v]), (0, 0, 0, start, 0))
        k, v = cache  # (batch, n_heads, max_len, head_dim)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return _linear(p["c_proj"], (weights @ v).swapaxes(1, 2).reshape(x.shape)), cache

    def block(x: Array, layer: tuple[Params, Array]) -> tuple[Array, Array]:
        p, cache = layer
        attended, cache = attend(p["attn"], _layer_norm(p["ln_1"], x), cache)
        x = x + attended
        hidden = jax.nn.gelu(_linear(p["mlp"]["c_fc"], _layer_norm(p["ln_2"], x)), approximate=True)
        return x + _linear(p["mlp"]["c_proj"], hidden), cache

    x = params["wte"][tokens] + params["wpe"][positions]
    x, cache = jax.lax.scan(block, x, (params["h"], cache))
    return _layer_norm(params["ln_f"], x) @ params["wte"].T, cache


def forward(params: Params, config: GPTConfig, tokens: Array) -> Array:
    """Score every token as the next one, at every position.

    params:  the tree of init_params
    tokens:  (batch, seq_len) int32, each in [0, vocab_size)
    returns: (batch, seq_len, vocab_size) float32 logits

    The GPT-2 form: pre-norm blocks with GELU in its tanh form, a last norm, eps 1e-5 in all of
    them, and wteᵀ as the head. c_attn gives q, k and v side by side; within each, head 0 comes
    first. A weight is (d_in, d_out): y = x W + b. Scores may have any size that float32 has.

    More than block_size tokens raise ValueError, which gives both numbers. JAX itself would not
    complain: an index that is out of range gives some row or other. Made for use under jax.jit,
    with config static.
    """
    # solution
    batch, seq_len = tokens.shape
    if seq_len > config.block_size:
        raise ValueError(f"seq_len must be at most block_size = {config.block_size}, got {seq_len}")
    return _read(params, config, tokens, _new_cache(config, batch, seq_len), 0)[0]


def train_step(
    params: Params, config: GPTConfig, tokens: Array, learning_rate: float | Array
) -> tuple[Params, Array]:
    """Step once against the gradient of the loss, by plain gradient descent.

    tokens:  (batch, seq_len) int32, seq_len ≥ 2; each but the first is the target of those before
    returns: the new params, the same tree; the mean loss before the step, over all
             batch · (seq_len − 1) targets

    Made for use under jax.jit, with config static.
    """
    # solution
    read, targets = tokens[:, :-1], tokens[:, 1:]

    def loss_fn(params: Params) -> Array:
        logs = jax.nn.log_softmax(forward(params, config, read))
        return -jnp.take_along_axis(logs, targets[:, :, None], axis=-1).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss


@partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def generate(
    params: Params,
    config: GPTConfig,
    tokens: Array,
    max_new_tokens: int,
    key: Array,
    temperature: float | Array = 1.0,
) -> Array:
    """Write on, one token at a time, as one compiled program.

    tokens:  (batch, seq_len) int32, seq_len ≥ 1
    key:     a JAX random key. The token number i of the new ones is drawn for all rows at once
             with keys[i], keys = jax.random.split(key, max_new_tokens), by
             jax.random.categorical(keys[i], logits / temperature), logits (batch, vocab_size)
    returns: (batch, seq_len + max_new_tokens) int32, the given tokens first

    max_new_tokens is at least 1. At temperature 0 the token with the highest logit is taken.
    config and max_new_tokens are fixed when the program is compiled, all else is traced: a later
    call with the same shapes traces and compiles nothing, whatever the numbers are. The program
    does not grow with max_new_tokens, and computes each token's keys and values once: the prompt
    is read at once, each new token alone.

    More than block_size tokens in all raise ValueError, which gives both numbers.
    """
    # solution
    batch, seq_len = tokens.shape
    total = seq_len + max_new_tokens
    if total > config.block_size:
        raise ValueError(f"at most block_size = {config.block_size} tokens, got {total} in all")

    def step(carry: tuple[Array, Array, Array], key: Array) -> tuple[Any, Array]:
        logits, cache, position = carry
        warmth = jnp.where(temperature == 0, 1.0, temperature)
        drawn = jax.random.categorical(key, logits / warmth)
        new = jnp.where(temperature == 0, logits.argmax(axis=-1), drawn)  # (batch,)
        logits, cache = _read(params, config, new[:, None], cache, position)
        return (logits[:, -1], cache, position + 1), new

    logits, cache = _read(params, config, tokens, _new_cache(config, batch, total), 0)
    keys = jax.random.split(key, max_new_tokens)
    _, written = jax.lax.scan(step, (logits[:, -1], cache, seq_len), keys)
    return jnp.concatenate([tokens, written.T], axis=1)
