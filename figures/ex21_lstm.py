"""The gates of a small LSTM over time, read off from your own cell without looking inside it."""

import torch
from matplotlib.figure import Figure

SEED = 0  # not every start of a single unit learns it
SEQ_LEN, LEARNED_LEN, STEPS, BATCH = 24, 12, 200, 64
SHOWN = {3: 1, 7: -1, 14: -1, 20: 1}  # the marked steps of the figure, and their numbers
COLOURS = {"f": "#3b6ea5", "ig": "#b5452c", "o": "#8a9a5b", "c": "#222222"}


def random_inputs(seq_len, batch):
    """A number ±1 and, rarely, a mark at each step: both (seq_len, batch)."""
    number = torch.randint(0, 2, (seq_len, batch)) * 2.0 - 1
    return number, (torch.rand(seq_len, batch) < 0.15).float()


def latest_marked(number, mark):
    """The number that stood at the latest mark, at each step; 0 before the first mark."""
    targets, held = [], torch.zeros(number.shape[1])
    for number_t, mark_t in zip(number, mark, strict=True):
        held = torch.where(mark_t == 1, number_t, held)
        targets.append(held)
    return torch.stack(targets)


def train(ex):
    """An LSTM with a single unit that learns to hold the marked number."""
    model, scale = ex.LSTM(2, 1), torch.nn.Parameter(torch.ones(1))
    torch.manual_seed(SEED)  # however the cell drew its weights, start from the same ones
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    model.cell.bias_ih.data[1] = 2.0
    optimizer = torch.optim.Adam([*model.parameters(), scale], lr=0.1)
    for _ in range(STEPS):
        number, mark = random_inputs(LEARNED_LEN, BATCH)
        outputs, _ = model(torch.stack([number, mark], dim=-1))
        loss = (scale * outputs[..., 0] - latest_marked(number, mark)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, scale


def gates(cell, x, h, c):
    """What the cell does with a step: f, i·g, o and the new state.

    c' = f·c + i·g is a straight line in c: its height at 0 is i·g, and its slope is f.
    """
    _, at_zero = cell(x, (h, torch.zeros_like(c)))
    _, at_one = cell(x, (h, torch.ones_like(c)))
    h, c = cell(x, (h, c))
    return at_one - at_zero, at_zero, h / torch.tanh(c), h, c


def draw(ex) -> Figure:
    """Train a unit for two seconds, then show one sequence: inputs, gates, cell and output."""
    with torch.random.fork_rng(devices=[]):
        model, scale = train(ex)
        number, mark = random_inputs(SEQ_LEN, 1)
        mark.zero_()
        for t, marked_number in SHOWN.items():
            number[t - 1], mark[t - 1] = marked_number, 1
        x, targets = torch.stack([number, mark], dim=-1), latest_marked(number, mark)
        h, c, rows = torch.zeros(1, 1), torch.zeros(1, 1), []
        with torch.no_grad():
            for t in range(SEQ_LEN):
                f, ig, o, h, c = gates(model.cell, x[t], h, c)
                rows.append([y.item() for y in (f, ig, o, c, scale * h)])
    f, ig, o, c, shown = zip(*rows, strict=True)
    place = range(1, SEQ_LEN + 1)

    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle(
        "One unit holds the last marked number: it forgets only where it writes\n"
        f"(your LSTM with hidden_size 1, trained just now for {STEPS} steps)"
    )
    seen, forget, write, cell, out = axes = figure.subplots(5, 1, sharex=True)
    for axis in axes:
        for t in SHOWN:
            axis.axvspan(t - 0.5, t + 0.5, color="#f1e3b8", zorder=0, linewidth=0)
        axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
        axis.spines[["top", "right"]].set_visible(False)
    colours = [COLOURS["ig"] if t in SHOWN else "#cccccc" for t in place]
    seen.bar(place, number[:, 0], 0.6, color=colours)
    seen.set(ylabel="input", yticks=(-1, 0, 1))
    forget.bar(place, f, 0.6, color=COLOURS["f"], label="f, what is kept")
    forget.plot(place, o, ".", color=COLOURS["o"], markersize=9, label="o, what is shown")
    forget.set(ylabel="gates", ylim=(0, 1.1), yticks=(0, 1))
    write.bar(place, ig, 0.6, color=COLOURS["ig"])
    write.set(ylabel="i · g,\nwhat is written", ylim=(-1.1, 1.1), yticks=(-1, 0, 1))
    cell.bar(place, c, 0.6, color=COLOURS["c"])
    cell.set(ylabel="cell c")
    out.step(place, targets[:, 0], where="mid", color="#bbbbbb", linewidth=4, label="wanted")
    out.plot(place, shown, ".-", color=COLOURS["c"], label="h, scaled")
    out.set(ylabel="output", xlabel="step (marked steps are shaded)", ylim=(-1.4, 1.4))
    out.set(yticks=(-1, 0, 1), xticks=[*SHOWN], xlim=(0.3, SEQ_LEN + 0.7))
    forget.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.96))
    out.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.9))
    return figure
