"""Where a decoder looks while it rewrites a date, learned by your own attention."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
CHARS = " ,abcdefghijklmnopqrstuvwxyz0123456789-^"  # "^" begins every target
WIDTH, N_STEPS, BATCH = 32, 200, 32
SHOWN = (("7 november 1998", "1998-11-07"), ("may 23, 2041", "2041-05-23"))


def draw(ex: Any) -> Figure:
    """The weights of two dates, before the training and after it."""
    rng_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Rewriter(ex)
    before = [model.weights(*pair) for pair in SHOWN]
    loss = train(model)
    after = [model.weights(*pair) for pair in SHOWN]
    torch.set_rng_state(rng_state)

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(
        "Rewriting dates: each row is one step of your decoder, and shows where it looks\n"
        f"(nobody told it where; {N_STEPS} batches of {BATCH} dates, loss at the end {loss:.3f})"
    )
    axes = figure.subplots(2, 2)
    for row, matrices, when in zip(axes, (before, after), ("before", "after"), strict=True):
        for axis, weights, (source, target) in zip(row, matrices, SHOWN, strict=True):
            image = axis.imshow(weights, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
            axis.set_xticks(range(len(source)), source.replace(" ", "␣"))
            axis.set_yticks(range(len(target)), target)
            axis.set_title(f"{when} training", fontsize=10)
        row[0].set_ylabel("character written")
    for axis in axes[1]:
        axis.set_xlabel("character looked at")
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    return figure


class Rewriter(nn.Module):
    """torch's GRU reads in both directions, your DecoderStep writes."""

    def __init__(self, ex: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARS), WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.step = ex.DecoderStep(WIDTH, WIDTH, WIDTH, 2)
        self.head = nn.Linear(WIDTH, len(CHARS))

    def forward(self, sources: list[str], targets: list[str]) -> tuple[Tensor, Tensor]:
        """Logits (batch, steps, characters) and weights (batch, steps, keys)."""
        lengths = torch.tensor([len(source) for source in sources])
        keys, _ = self.encoder(self.embed(numbers(sources)))
        given = self.embed(numbers(["^" + target[:-1] for target in targets]))
        states, logits, rows = keys.new_zeros(2, len(sources), WIDTH), [], []
        for x in given.unbind(1):
            states, _, weights = self.step(x, states, keys, lengths)
            logits.append(self.head(states[-1]))
            rows.append(weights)
        return torch.stack(logits, 1), torch.stack(rows, 1)

    def weights(self, source: str, target: str) -> Tensor:
        with torch.no_grad():
            return self([source], [target])[1][0]


def train(model: Rewriter) -> float:
    """Teach it dates of two kinds; the last loss."""
    draws = random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(N_STEPS):
        sources, targets = zip(*(date(draws) for _ in range(BATCH)), strict=True)
        logits, _ = model(list(sources), list(targets))
        loss = F.cross_entropy(logits.flatten(0, 1), numbers(list(targets)).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def date(draws: random.Random) -> tuple[str, str]:
    year, month, day = draws.randint(1900, 2099), draws.randint(1, 12), draws.randint(1, 28)
    name = MONTHS[month - 1]
    source = f"{day} {name} {year}" if draws.random() < 0.5 else f"{name} {day}, {year}"
    return source, f"{year}-{month:02d}-{day:02d}"


def numbers(texts: list[str]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([[CHARS.index(c) for c in text.ljust(longest)] for text in texts])
