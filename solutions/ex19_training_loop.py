"""Exercise 19: a training loop.

Every step is the same few lines: take a batch, add up its gradients piece by piece, clip
them, set the rate, move. The art lies in what must not change the result: how a batch is cut
to fit into memory, when somebody looks at the losses, and that the machine was switched off.

    loss = Σ over all targets of the batch of −log p(target) / number of targets

cut into micro-batches of any size: each gives its sum divided by the *whole* number of
targets, and their gradients add up to those of the batch.

Source: Goodfellow, Bengio, Courville 2016, "Deep Learning", section 8.1.3,
    https://www.deeplearningbook.org/contents/optimization.html
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn


class Batches:
    """Batches of x and y for ever; every epoch shuffles anew and shows each example once."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int = 0) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.int64)  # the examples left of this epoch

    def __next__(self) -> tuple[Tensor, Tensor]:
        if len(self.left) == 0:
            self.left = torch.randperm(len(self.x), generator=self.generator)
        now, self.left = self.left[: self.batch_size], self.left[self.batch_size :].clone()
        return self.x[now], self.y[now]

    def state_dict(self) -> dict[str, Tensor]:
        return {"left": self.left, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.left = state["left"]
        self.generator.set_state(state["generator"])


class Callback:
    """Is told what happens. A subclass writes the methods that it wants to hear of."""

    def on_fit_start(self, trainer: "Trainer", n_steps: int) -> None: ...
    def on_step_end(self, trainer: "Trainer", loss: float) -> None: ...
    def on_evaluate(self, trainer: "Trainer", losses: dict[str, float]) -> None: ...
    def on_fit_end(self, trainer: "Trainer") -> None: ...


class ProgressBar(Callback):
    """One line in the terminal: the bar, the time that is left, the losses."""

    def on_fit_start(self, trainer: "Trainer", n_steps: int) -> None:
        self.bar, self.evaluated = Progress(), ""
        self.task = self.bar.add_task("", total=n_steps, completed=trainer.step)
        self.bar.start()

    def on_step_end(self, trainer: "Trainer", loss: float) -> None:
        self.text = f"step {trainer.step}  loss {loss:.3f}"
        self.bar.update(self.task, completed=trainer.step, description=self.text + self.evaluated)

    def on_evaluate(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        self.evaluated = "".join(f"  {name} {loss:.3f}" for name, loss in losses.items())
        self.bar.update(self.task, description=self.text + self.evaluated)

    def on_fit_end(self, trainer: "Trainer") -> None:
        self.bar.stop()


class LossPlot(Callback):
    """Keeps the losses, (step, loss) by name, and draws them."""

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {"batch": []}

    def on_step_end(self, trainer: "Trainer", loss: float) -> None:
        self.curves["batch"].append((trainer.step, loss))

    def on_evaluate(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        for name, loss in losses.items():
            self.curves.setdefault(name, []).append((trainer.step, loss))

    def draw(self) -> Figure:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a target)")
        for name, curve in self.curves.items():
            axes.plot(*zip(*curve, strict=True), ".-", linewidth=0.8, markersize=3, label=name)
        axes.legend(frameon=False)
        return figure


class Trainer:
    """Trains a model, and can be stopped and gone on with at any step.

    model:       gives logits (batch, ..., n_classes) for x
    optimizer:   one of torch.optim, or one like them, such as those of exercise 17: it has
                 param_groups, step, zero_grad, state_dict and load_state_dict. It holds all
                 parameters of the model that want gradients
    train:       next(train) gives x (batch, ...) and y (batch, ...) int64, where −100 is no
                 target; has state_dict and load_state_dict
    eval_sets:   by name ("train", "val"), x and y of the examples that estimate_loss uses
    schedule:    gives the learning rate of all groups for a step, counted from 0
    max_norm:    the longest norm of all gradients together; None for no clipping
    micro_batch: the most examples that go through the model at once; None for whole batches
    autocast:    None or torch.bfloat16; float16, which needs loss scaling, raises
                 ValueError, which names it
    step:        number of steps made so far
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        train: Any,
        eval_sets: dict[str, tuple[Tensor, Tensor]] | None = None,
        schedule: Callable[[int], float] | None = None,
        max_norm: float | None = None,
        micro_batch: int | None = None,
        autocast: torch.dtype | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.model, self.optimizer, self.train = model, optimizer, train
        self.eval_sets, self.schedule, self.max_norm = eval_sets or {}, schedule, max_norm
        self.micro_batch, self.autocast = micro_batch, autocast
        self.callbacks, self.step = list(callbacks), 0
        # solution
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be None or torch.bfloat16, got {autocast}")

    def tell(self, event: str, *args: Any) -> None:
        """Tell all callbacks, in their order."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    def summed_losses(self, x: Tensor, y: Tensor) -> Iterable[Tensor]:
        """Give the sum of −log p(target) of each micro-batch in turn, () float32 or better.

        x and y go to the model's device piece by piece. Only the model runs under autocast,
        and with it the logits become float32 before the loss is taken.
        """
        # solution
        device = next(self.model.parameters()).device
        size = self.micro_batch or max(1, len(x))
        for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                logits = self.model(x_part.to(device))
            logits = logits.float() if self.autocast else logits
            targets = y_part.to(device).flatten()
            yield F.cross_entropy(logits.flatten(0, -2), targets, reduction="sum")

    def train_step(self) -> float:
        """Make one step on the next batch, in train mode, and give the mean loss before it.

        Gradients that are there already do not count. A batch without any target has loss 0.
        """
        # solution
        self.model.train()
        x, y = next(self.train)
        n_targets = max(1, int((y != -100).sum()))
        self.optimizer.zero_grad()
        total = 0.0
        for summed in self.summed_losses(x, y):
            # By the targets of the whole batch: micro-batches need not have equally many.
            loss = summed / n_targets
            loss.backward()
            total += loss.item()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        if self.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule(self.step)
        self.optimizer.step()
        self.step += 1
        return total

    def fit(self, n_steps: int, eval_every: int = 0) -> None:
        """Train until n_steps steps are made, those before a resumption included.

        Tells on_fit_start(n_steps); on_step_end(loss) after each step; then, if the step is a
        multiple of eval_every or the last (and eval_every is not 0), on_evaluate(losses); and
        on_fit_end() in any case, even if an error or Ctrl-C ends the run.
        """
        # solution
        self.tell("on_fit_start", n_steps)
        try:
            while self.step < n_steps:
                self.tell("on_step_end", self.train_step())
                if eval_every and (self.step % eval_every == 0 or self.step == n_steps):
                    self.tell("on_evaluate", self.estimate_loss())
        finally:
            self.tell("on_fit_end")

    def estimate_loss(self) -> dict[str, float]:
        """Give the mean loss over all targets of each of eval_sets, in eval mode; 0 without any.

        Nothing is kept for backward, and nothing else changes: the model and each module in
        it is in the mode that it was in, even after an error, and the run goes on as if
        nobody had asked.
        """
        # solution
        # Each by itself: somebody may have frozen a part of the model in eval mode.
        modes = [(module, module.training) for module in self.model.modules()]
        losses = {}
        try:
            self.model.eval()
            with torch.no_grad():
                for name, (x, y) in self.eval_sets.items():
                    total = sum(summed.item() for summed in self.summed_losses(x, y))
                    losses[name] = total / max(1, int((y != -100).sum()))
        finally:
            for module, training in modes:
                module.training = training
        return losses

    def save(self, path: str) -> None:
        """Write all that the next steps depend on: model, optimizer, data, step, torch's RNGs.

        A save that fails half-way leaves the file of an earlier one as it was.
        """
        # solution
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "train": self.train.state_dict(),
            "step": self.step,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)  # all at once: nobody ever finds half a file

    def load(self, path: str) -> None:
        """Go back to where `save` was: the next steps are the same, bit for bit."""
        # solution
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.train.load_state_dict(state["train"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
