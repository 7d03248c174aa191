"""Exercise 51: a Switch layer.

With k = 1 the router's work is plain: each token goes to one expert. Experts that run side by
side want equal shares, so each has room for `capacity` tokens, and the rest are dropped: their
result is 0, and the residual stream carries them on. Two losses and a bias teach the router.

    p        = softmax(router x)                           over all experts
    e        = argmax(p + bias)                            the bias moves choices, not weights
    capacity = ⌈capacity_factor · n_tokens / n_experts⌉
    y        = p_e · down_e relu(up_e x)                   0 for a dropped token
    balance  = n_experts · Σₑ fₑ · Pₑ                      f: shares of the choices, P: mean of p
    z        = mean over tokens of (log Σₑ exp logitₑ)²

Source: Fedus, Zoph & Shazeer 2021, "Switch Transformers", sections 2.1 and 2.2, eqs. 1 to 6,
    https://arxiv.org/abs/2101.03961; the z-loss: Zoph et al. 2022, "ST-MoE", eq. 5,
    https://arxiv.org/abs/2202.08906; the bias: Wang et al. 2024, "Auxiliary-Loss-Free Load
    Balancing", algorithm 1, https://arxiv.org/abs/2408.15664
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwitchFFN(nn.Module):
    """n_experts ReLU networks, of which each token passes through one at most.

    router:      (n_experts, d_model)
    up_proj:     (n_experts, d_ff, d_model)      up_proj[e] is expert e's
    down_proj:   (n_experts, d_model, d_ff)
    router_bias: (n_experts,) float32 buffer, at first 0, not trained by gradients
    """

    router_bias: Tensor

    def __init__(self, d_model: int, d_ff: int, n_experts: int, capacity_factor: float) -> None:
        """How the weights begin is free. A capacity_factor of 0 or less raises ValueError."""
        super().__init__()
        raise NotImplementedError("exercise 51 is not written yet")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send each token to its expert, as long as that has room.

        x:       (..., d_model); its leading axes are one batch of n_tokens tokens, in their order,
                 and there may be none
        returns: y (..., d_model), dtype of x;
                 logits (..., n_experts), float32 for a router of half precision, else its dtype;
                 choice (...) int64, the expert that each token asked for, dropped or not

        Of the tokens that choose an expert, the first `capacity` are kept. The logits and their
        softmax are computed in float32 at least. Of experts with equal p + bias any may be chosen.
        Gradients reach the router through p, all weights, and x. An expert works on the tokens
        that it keeps, 4·d_model·d_ff flops each; the router costs 2·d_model·n_experts a token.
        Training and evaluation do the same, and leave the bias alone.
        """
        raise NotImplementedError("exercise 51 is not written yet")


def load_balancing_loss(probs: Tensor, choice: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tell how far the experts are from equal shares: 1 where they are equal, at most n_experts.

    probs:   (..., n_experts) floating, the router's softmax
    choice:  (...) int64, the expert that each token asked for
    mask:    (...) bool, True for the tokens that count; None: all of them. At least one counts.
    returns: () dtype of probs, n_experts · Σₑ fₑ · Pₑ over the tokens that count

    f can't be differentiated: the gradient goes through P alone. Tokens that don't count may hold
    anything, NaN and choices of no expert too, and get a gradient of 0.
    """
    raise NotImplementedError("exercise 51 is not written yet")


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Keep the logits small: the mean over tokens of their squared log-sum-exp.

    logits:  (..., n_experts) floating, of any finite size
    mask:    (...) bool, as above
    returns: () dtype of the logits
    """
    raise NotImplementedError("exercise 51 is not written yet")


def update_router_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Move each expert's bias by one step towards equal shares.

    bias:    (n_experts,) floating, left as it is
    counts:  (n_experts,) integers, how many tokens chose each expert in the last batch
    rate:    the step, say 0.001
    returns: (n_experts,) like bias: one step up for experts below the mean of the counts, one
             down for those above it, none at the mean
    """
    raise NotImplementedError("exercise 51 is not written yet")
