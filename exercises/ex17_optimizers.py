"""Exercise 17: optimizers.

A gradient says which way is down, but not how far to go. SGD trusts its length, and momentum
its history; Adam divides by its usual size, so that each number moves by about lr whatever
its scale. With g the gradient of a parameter θ, and λ the weight decay:

    SGD       g ← g + λ θ          b ← momentum · b + g
              θ ← θ − lr · b       Nesterov:  θ ← θ − lr · (g + momentum · b)

    Adam      g ← g + λ θ          m ← β₁ m + (1 − β₁) g          m̂ = m / (1 − β₁ᵗ)
                                   v ← β₂ v + (1 − β₂) g²         v̂ = v / (1 − β₂ᵗ)
              θ ← θ − lr · m̂ / (√v̂ + eps)

    AdamW     θ ← θ − lr · λ θ     then Adam's step, with the gradient as it is

b, m and v start at 0; t counts the steps of this parameter and is 1 in the first.

Source: Kingma and Ba 2015, "Adam", algorithm 1, https://arxiv.org/abs/1412.6980
    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2,
    https://arxiv.org/abs/1711.05101
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Optimizer:
    """What all optimizers share: groups of parameters, and a state for each parameter.

    params:       tensors; or groups, dicts with "params" and any options of their own
    options:      what holds for a group that says nothing else
    param_groups: list of dicts, each with "params" and all options. A schedule may change
                  an option between two steps, and the next step goes by the new one
    state:        one dict for each parameter, which update fills as it likes. All that an
                  optimizer remembers stands there and in param_groups, and nowhere else:
                  state_dict, which is given, writes those two down
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        groups = list(params)  # model.parameters() can be read only once
        if groups and isinstance(groups[0], Tensor):
            groups = [{"params": groups}]
        self.param_groups = [options | g | {"params": list(g["params"])} for g in groups]
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)

    def zero_grad(self) -> None:
        """Forget all gradients: every .grad becomes None."""
        raise NotImplementedError("exercise 17 is not written yet")

    def step(self) -> None:
        """Update every parameter in place, by its gradient and the options of its group.

        A parameter whose .grad is None stays as it is: no momentum, no decay, no step
        counted. The gradients stay as they are, and the next ones may be written into the
        same memory. Autograd records nothing.
        """
        raise NotImplementedError("exercise 17 is not written yet")

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Move one parameter, in place. `step` calls it; each optimizer writes its own."""
        raise NotImplementedError(f"{type(self).__name__} has no update")

    # Given: what a training run writes to disk (exercise 19), and how it goes on from there.

    def state_dict(self) -> dict[str, Any]:
        params = [p for group in self.param_groups for p in group["params"]]
        return {
            "state": {i: dict(self.state[p]) for i, p in enumerate(params) if p in self.state},
            "options": [{k: g[k] for k in g if k != "params"} for g in self.param_groups],
        }

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for i, state in kept["state"].items():
            # Copies: what is loaded may be loaded again.
            self.state[params[i]] = {
                k: v.to(params[i].device, copy=True) if isinstance(v, Tensor) else v
                for k, v in state.items()
            }
        for group, options in zip(self.param_groups, kept["options"], strict=True):
            group.update(options)


class SGD(Optimizer):
    """Gradient descent, with momentum where a group asks for it.

    nesterov=True without a momentum above 0, in any group, raises ValueError at once, which
    says what the momentum was.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
        raise NotImplementedError("exercise 17 is not written yet")

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Move one parameter by the rule of SGD."""
        raise NotImplementedError("exercise 17 is not written yet")


class Adam(Optimizer):
    """Steps of about lr in every direction. Weight decay is added to the gradient."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Move one parameter by the rule of Adam."""
        raise NotImplementedError("exercise 17 is not written yet")


class AdamW(Adam):
    """Adam with decoupled weight decay: each step takes the share lr · λ of the parameter."""

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Move one parameter by the rule of AdamW."""
        raise NotImplementedError("exercise 17 is not written yet")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's parameters into those that decay and those that do not.

    returns: two groups, each with "params" and "weight_decay". The first decays at
             weight_decay and holds every parameter of two or more dimensions: matrices,
             embeddings, kernels. The second, at 0.0, holds the rest: biases and the
             weights of norms, where small is no simpler than large

    A parameter that is tied in several places is held once, a frozen one (requires_grad
    False) not at all. Either list may be empty.
    """
    raise NotImplementedError("exercise 17 is not written yet")
