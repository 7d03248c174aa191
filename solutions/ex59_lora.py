"""Exercise 59: LoRA.

A trained weight needs only a small change to learn something new, and that change has a low
rank. So the weight is frozen, and beside it two thin matrices learn their product:

    y  = W x + b + (alpha / r) · B A x          A (r, d_in), B (d_out, r)
    ΔW = (alpha / r) · B A                      rank r at most

B begins at zero, so that at first nothing is changed. Once trained, ΔW can be added into W, and
the layer costs what it cost before. An optimizer keeps state for r · (d_in + d_out) numbers a
layer, not for d_in · d_out.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, eq. 3,
    https://arxiv.org/abs/2106.09685
"""

import math

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A linear layer whose weight is frozen, and an update of rank r.

    base:   the layer, its own parameters frozen
    a:      (r, d_in) parameter, random and not zero; which distribution is free
    b:      (d_out, r) parameter, zeros
    scale:  alpha / r, a float
    merged: whether the update stands in base.weight now; at first False
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        """Wrap a layer, and freeze it.

        base: nn.Linear, or a module like one: in_features, out_features, weight, and a call. Its
              weight may be made anew at each look, from quantised numbers say.

        a and b have the dtype and device of base.weight. An r below 1 or above the smaller of
        d_in and d_out raises ValueError, which gives r.
        """
        super().__init__()
        # solution
        d_in, d_out = base.in_features, base.out_features
        _check(r, base)
        self.base = base.requires_grad_(False)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.a = nn.Parameter(torch.randn(r, d_in, **like) / math.sqrt(d_in))
        self.b = nn.Parameter(torch.zeros(d_out, r, **like))
        self.scale, self.merged = alpha / r, False

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out).

        Cost: the base's, and 2·r·(d_in + d_out) flops a token; merged, the base's alone. ΔW itself
        is never made here.
        """
        # solution
        y = self.base(x)
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)


def merge(layer: LoRALinear) -> None:
    """Add ΔW into base.weight, in place; a layer that is merged already stays as it is.

    The sum is worked out in float32, or in the weight's dtype where that is wider, and rounded to
    the weight's dtype once.
    """
    # solution
    if not layer.merged:
        _add_update(layer, layer.scale)
        layer.merged = True


def unmerge(layer: LoRALinear) -> None:
    """Take ΔW out of base.weight again, up to rounding; nothing happens to a layer not merged.

    Whether ΔW is subtracted or the old weight was kept aside is free. a and b stay as they are.
    """
    # solution
    if layer.merged:
        _add_update(layer, -layer.scale)
        layer.merged = False


def add_lora(model: nn.Module, names: list[str], r: int, alpha: float) -> list[str]:
    """Wrap linear layers of a model by name, in place, and freeze all else.

    names:   the last part of a layer's name: "attn_q" wraps blk.0.attn_q, blk.1.attn_q, …
    returns: the full names of the wrapped layers, in the model's order

    Afterwards the a and b of all wrapped layers require gradients, and no other parameter does. A
    layer that is wrapped already stays as it is, and so does the base inside it. ValueError: a name
    that no linear layer of the model bears, wrapped or not, which is given; an r below 1 or too
    large for one of them. The model is then as it was.
    """
    # solution
    inner = {layer.base for layer in model.modules() if isinstance(layer, LoRALinear)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | LoRALinear)}
    layers = {name: m for name, m in layers.items() if name.split(".")[-1] in names}
    layers = {name: m for name, m in layers.items() if m not in inner}
    if missing := set(names) - {name.split(".")[-1] for name in layers}:
        raise ValueError(f"no linear layer of the model is called {', '.join(sorted(missing))}")
    plain = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    for layer in plain.values():
        _check(r, layer)  # before any of them is changed

    model.requires_grad_(False)
    for name, layer in plain.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(layer, r, alpha))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.a.requires_grad_(True)
            layer.b.requires_grad_(True)
    return list(plain)


def _check(r: int, base: nn.Linear) -> None:
    most = min(base.in_features, base.out_features)
    if not 1 <= r <= most:
        raise ValueError(f"r must be between 1 and {most}, got {r}")


@torch.no_grad()
def _add_update(layer: LoRALinear, scale: float) -> None:
    weight = layer.base.weight
    precise = torch.promote_types(weight.dtype, torch.float32)
    update = scale * (layer.b.to(precise) @ layer.a.to(precise))
    weight.copy_(weight.to(precise) + update)
