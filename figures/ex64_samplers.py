"""Paths from noise to two-humped data with 5, 20 and 1000 steps, by your own code."""

import torch
from matplotlib.figure import Figure

N_STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, N_STEPS, dtype=torch.float64)
PLACES, WIDTH = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.15
RED, BLUE = "#b5452c", "#3b6ea5"


def noise_in(x, t):
    """What noise to expect in x, exactly, where the data have two humps of one size."""
    left = (1 - BETAS).cumprod(0)[t][:, None]
    variance = left * WIDTH**2 + 1 - left
    apart = x[:, None] - left.sqrt() * PLACES
    share = torch.softmax(-(apart**2) / (2 * variance), 1)  # of each hump
    return (share * (1 - left).sqrt() * apart / variance).sum(1)


def draw(ex) -> Figure:
    """Rows: DDIM and DDPM. Columns: numbers of steps; each with where 2,000 draws end."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    figure.suptitle(
        "The same noise: DDIM takes smooth paths, DDPM wanders. Five steps leave many in between"
    )
    counts = (5, 20, 1000)
    axes = figure.subplots(2, 2 * len(counts), sharey=True, width_ratios=(4, 1) * len(counts))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2000, generator=generator, dtype=torch.float64)
    for row, (eta, name, colour) in zip(
        axes, ((0.0, "DDIM, η = 0", BLUE), (1.0, "DDPM, η = 1", RED)), strict=True
    ):
        for column, n in enumerate(counts):
            paths, ends = row[2 * column : 2 * column + 2]
            steps = ex.timesteps(N_STEPS, n)
            noise = torch.randn(n, len(start), generator=generator, dtype=torch.float64)
            seen = []

            def model(x, t, seen=seen):
                seen.append(x[:12].clone())
                return noise_in(x, t)

            end = ex.sample(model, start, steps, BETAS, eta, noise)
            paths.plot([*steps, -1], torch.stack([*seen, end[:12]]), color=colour, linewidth=0.8)
            paths.set(xlim=(N_STEPS, -10), ylim=(-3, 3))
            paths.set_title(f"{n} steps", fontsize=10)
            bins = torch.linspace(-3, 3, 80).tolist()
            ends.hist(end.tolist(), bins, density=True, orientation="horizontal", color=colour)
            grid = torch.linspace(-3, 3, 300, dtype=torch.float64)
            humps = torch.distributions.Normal(PLACES, WIDTH).log_prob(grid[:, None]).exp().mean(1)
            ends.plot(humps, grid, color="black", linewidth=0.8)
            ends.set(xticks=[])
        row[0].set_ylabel(name)
    for ax in axes[1, ::2]:
        ax.set_xlabel("step t")
    return figure
