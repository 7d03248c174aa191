"""The losses of a small run, and what a resumed run must bring back, by your own trainer."""

from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from torch import nn

N_STEPS, STOP = 120, 60
SEQ_LEN = 32
COLOURS = {"batch": "#bbbbbb", "train": "#b5452c", "val": "#3b6ea5"}


class CharModel(nn.Module):
    """Scores the next character from the one before it and a GRU's memory."""

    def __init__(self, n_chars):
        super().__init__()
        self.embed = nn.Embedding(n_chars, 24)
        self.rnn = nn.GRU(24, 64, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(64, n_chars)

    def forward(self, x):
        return self.head(self.drop(self.rnn(self.embed(x))[0]))


def windows():
    """The first 30,000 characters of the Python manual as x and y; and a mask of every tenth."""
    text = "\n".join(topics[name] for name in sorted(topics))[:30_000]
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(c) for c in text])
    n = (len(ids) - 1) // SEQ_LEN
    x, y = (ids[i : i + n * SEQ_LEN].view(n, SEQ_LEN) for i in (0, 1))
    return x, y, torch.arange(n) % 10 == 9, len(chars)


def new_trainer(ex, callbacks):
    x, y, val, n_chars = windows()
    torch.manual_seed(0)
    model = CharModel(n_chars)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train = ex.Batches(x[~val], y[~val], batch_size=16)
    sets = {"train": (x[~val][:90], y[~val][:90]), "val": (x[val], y[val])}
    return ex.Trainer(model, optimizer, train, sets, max_norm=1.0, callbacks=callbacks)


def run(ex):
    """The losses of a run in one go, and of two that went on from its file of step STOP."""
    plots = {name: ex.LossPlot() for name in ("whole", "resumed", "fresh optimizer")}
    with TemporaryDirectory() as folder:
        path = f"{folder}/run.pt"
        trainer = new_trainer(ex, [plots["whole"]])
        trainer.fit(STOP, eval_every=10)
        trainer.save(path)
        trainer.fit(N_STEPS, eval_every=10)
        for name in ("resumed", "fresh optimizer"):
            trainer = new_trainer(ex, [plots[name]])
            trainer.load(path)
            if name == "fresh optimizer":
                trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
            trainer.fit(N_STEPS)
    return {name: plot.curves for name, plot in plots.items()}


def draw(ex) -> Figure:
    """Left: the losses of a run. Right: how far runs that were interrupted stray from it."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on two, far slower on a busy machine
    try:
        curves = run(ex)
    finally:
        torch.set_num_threads(n_threads)

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    losses, apart = figure.subplots(1, 2)
    for name, curve in curves["whole"].items():
        style = {"linewidth": 0.8} if name == "batch" else {"marker": ".", "linewidth": 1.2}
        losses.plot(*zip(*curve, strict=True), label=name, color=COLOURS[name], **style)
    losses.set(title="A small GRU reads the Python manual", xlabel="step")
    losses.set(ylabel="loss (nats a character)")
    losses.legend(frameon=False)

    whole = dict(curves["whole"]["batch"])
    for name, colour in (("fresh optimizer", "#b5452c"), ("resumed", "#3b6ea5")):
        steps, found = zip(*curves[name]["batch"], strict=True)
        away = [loss - whole[step] for step, loss in zip(steps, found, strict=True)]
        label = f"{name}, at most {max(map(abs, away)):.2g} away"
        apart.plot(steps, away, color=colour, label=label)
    for axes in (losses, apart):
        axes.axvline(STOP, color="#888888", linewidth=0.8, linestyle="--")
    apart.annotate("interrupted here", (STOP, 0), (-8, 12), textcoords="offset points", ha="right")
    apart.set(title=f"Resumed from a file at step {STOP}", xlabel="step", xlim=losses.get_xlim())
    apart.set(ylabel="loss of each batch, less that of the run in one go")
    apart.legend(frameon=False)
    return figure
