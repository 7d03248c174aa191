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
    raise NotImplementedError("exercise 38 is not written yet")


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
    raise NotImplementedError("exercise 38 is not written yet")


def train_step(
    params: Params, config: GPTConfig, tokens: Array, learning_rate: float | Array
) -> tuple[Params, Array]:
    """Step once against the gradient of the loss, by plain gradient descent.

    tokens:  (batch, seq_len) int32, seq_len ≥ 2; each but the first is the target of those before
    returns: the new params, the same tree; the mean loss before the step, over all
             batch · (seq_len − 1) targets

    Made for use under jax.jit, with config static.
    """
    raise NotImplementedError("exercise 38 is not written yet")


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
    raise NotImplementedError("exercise 38 is not written yet")
