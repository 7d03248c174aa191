"""Exercise 50: a sparse mixture of experts, as in Mixtral.

A feed-forward network holds most of a model's weights, and a token needs few of them.
So there are n_experts small networks, and a router that sends each token to k of them:

    p      = softmax(router x)                  over all experts
    chosen = the k experts with the highest p
    y      = Σ  p_e / (Σ p over chosen) · expert_e(x)      over e in chosen
    expert_e(x) = down_e (silu(gate_e x) ⊙ up_e x)

The number of weights grows with n_experts; the work for a token only with k.

Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1,
    https://arxiv.org/abs/2401.04088
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def route(logits: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token, and weigh them.

    logits:      (..., n_experts) floating point of any precision
    renormalize: True: the k weights of a token sum to 1, as in Mixtral.
                 False: each weight is the expert's share of the softmax over all experts.
    returns:     weights (..., k), the largest first, float32 for logits of half precision,
                 else dtype of the logits;
                 experts (..., k) int64, the experts that the weights belong to

    The softmax is done in float32 at least: in half precision it would round away small
    differences. Logits of any size give finite weights, and these are differentiated. Of
    experts with equal logits any may be chosen, but none twice. A k below 1 or above
    n_experts raises ValueError, which says what it was.
    """
    # solution
    n_experts = logits.shape[-1]
    if not 1 <= k <= n_experts:
        raise ValueError(f"k must be between 1 and n_experts = {n_experts}, got {k}")

    precise = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.softmax(logits, dim=-1, dtype=precise)
    weights, experts = probabilities.topk(k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


class SparseMoE(nn.Module):
    """n_experts SwiGLU networks, of which each token passes through k.

    router:    (n_experts, d_model)
    gate_proj: (n_experts, d_ff, d_model)    gate_proj[e] is expert e's, and so on
    up_proj:   (n_experts, d_ff, d_model)
    down_proj: (n_experts, d_model, d_ff)
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Parameter(0.02 * torch.randn(n_experts, d_model))
        self.gate_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_ff, d_model))
        self.up_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_ff, d_model))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_ff))

    def forward(self, x: Tensor) -> Tensor:
        """Send each token to its k experts, and add up what they return.

        x, returns: (..., d_model), dtype of the weights; there may be no token at all

        The weights come from `route`, and are differentiated. An expert works on its own
        tokens only: for each of them 6·d_model·d_ff flops, and 2·d_model·n_experts for the
        router, whatever the other experts do. An expert may have no token.
        """
        # solution
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = route(tokens @ self.router.T, self.k)
        out = torch.zeros_like(tokens)
        for e in range(len(self.router)):
            token, slot = torch.where(experts == e)  # a token meets an expert at most once
            own = tokens[token]
            hidden = F.silu(own @ self.gate_proj[e].T) * (own @ self.up_proj[e].T)
            weighted = weights[token, slot, None] * (hidden @ self.down_proj[e].T)
            out = out.index_add(0, token, weighted.to(out.dtype))
        return out.reshape(x.shape)
