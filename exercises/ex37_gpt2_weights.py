"""Exercise 37: GPT-2's weights.

GPT-2's weights are public: a dict from names to tensors. Your GPT of exercise 36 has the same
parameters, yet a file holds them as the code that wrote it did, and a loader that guesses
gives a model that runs and talks nonsense. What differs:

    in the file                               in GPT
    h.{i}.….c_….weight  (d_in, d_out)         (d_out, d_in): y = x W + b there, x Wᵀ + b here
    transformer.wte.weight, or wte.weight     wte.weight
    lm_head.weight, or nothing                wte.weight again
    h.{i}.attn.bias, h.{i}.attn.masked_bias   nothing: the causal mask, not parameters

Before such a model is trained on, its parameters are split: matrices decay, the rest does not.

Source: Radford et al. 2019, the released weights, https://huggingface.co/openai-community/gpt2
"""

from typing import Any

import torch
from torch import Tensor, nn

from ex36_gpt import GPT, GPTConfig


def from_hf(state_dict: dict[str, Tensor], n_heads: int | None = None) -> GPT:
    """Make a GPT of exercise 36 out of the weights of a GPT-2.

    state_dict: name to tensor, as the file on the hub or GPT2LMHeadModel names them: all names
                but lm_head.weight begin with "transformer.", or none does
    n_heads:    the one size that no shape tells; None: d_model / 64, as in every released GPT-2
    returns:    a GPT in the dtype of wte.weight, pre_norm, with weights of its own: the
                state_dict stays as it is, whatever becomes of the model

    The four linear layers of a block (c_attn, both c_proj, c_fc) are stored transposed.
    Sizes come from the shapes of wte.weight and wpe.weight; n_layers is one more than the highest
    i, and 1 where there is none. Weights of another dtype are cast. h.{i}.attn.bias and
    h.{i}.attn.masked_bias are left out, whatever they hold, and so is lm_head.weight if it equals
    wte.weight.

    ValueError otherwise, each of them naming every key concerned, with its prefix or without:
    keys that are missing; keys that are unexpected; weights that do not have the shape that GPT
    needs, or its transpose where the file holds that; a lm_head.weight that differs from
    wte.weight. Where several of these are true, raise any of them. A wte.weight or wpe.weight
    without two axes tells no sizes, and may be named alone.
    """
    raise NotImplementedError("exercise 37 is not written yet")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters of a model for an optimizer of torch.optim.

    returns: two groups, each a dict of "params", a list, and "weight_decay". The first decays at
             weight_decay: every parameter of two dimensions or more, embeddings too. The
             second, at 0.0, has the rest: biases and the weights of norms

    A parameter that stands in two places of the model, as a tied head's weight does, is in one
    group once: twice would be to decay it twice. One that does not require a gradient is in
    neither.
    """
    raise NotImplementedError("exercise 37 is not written yet")
