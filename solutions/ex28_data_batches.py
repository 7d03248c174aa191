"""Exercise 28: batches of data.

A model is trained on what a loader hands it, and a loader that is off by one fails silently: the
loss falls all the same. A language model has to guess the next token at each position, so the
targets are the inputs, moved by one:

    tokens   t₀ t₁ t₂ t₃ t₄ …        x = t₀ t₁ t₂ t₃        y = t₁ t₂ t₃ t₄

Positions that are not to be learnt have the target −100, which torch's cross_entropy leaves out.
When several ranks read one dataset, each must see its own part; and after a crash training must
go on where it was, not begin again.

Source: get_batch as in https://github.com/karpathy/nanoGPT, the sorting task as in
    https://github.com/karpathy/minGPT; sharding as in torch.utils.data.DistributedSampler,
    https://docs.pytorch.org/docs/stable/data.html
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

IGNORED = -100


def get_batch(
    data: Tensor, block_size: int, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut windows out of one long row of tokens, at random places.

    data:      (n,) tokens, of any integer dtype
    generator: the source of all randomness
    returns:   x (batch_size, block_size) int64, a window of data in each row;
               y (batch_size, block_size) int64, what comes next after each element of x

    Windows are drawn independently, each possible one with the same probability: those that begin
    with data's first token and those whose last target is data's last token too. Where data holds
    no window with its targets, ValueError says how many tokens there are.
    """
    # solution
    n_windows = len(data) - block_size
    if n_windows < 1:
        raise ValueError(f"data must hold at least {block_size + 1} tokens, got {len(data)}")
    starts = torch.randint(n_windows, (batch_size,), generator=generator)
    x = torch.stack([data[i : i + block_size] for i in starts.tolist()])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in starts.tolist()])
    return x.long(), y.long()


class CharDataset:
    """All windows of a text, its characters as tokens.

    chars: list of the different characters of the text, sorted; a character's token is its place
    """

    def __init__(self, text: str, block_size: int) -> None:
        """text: longer than block_size characters."""
        self.chars = sorted(set(text))
        self.block_size = block_size
        # solution
        place = {char: i for i, char in enumerate(self.chars)}
        self.tokens = torch.tensor([place[char] for char in text])

    def __len__(self) -> int:
        """Count the windows that have all their targets in the text."""
        # solution
        return len(self.tokens) - self.block_size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Return window i and its targets.

        i:       in [0, len(self)); beyond, IndexError gives it: that is how a for loop ends
        returns: x, y, each (block_size,) int64: the tokens from character i on, and from i + 1 on
        """
        # solution
        if not 0 <= i < len(self):
            raise IndexError(f"window must be in [0, {len(self)}), got {i}")
        window = self.tokens[i : i + self.block_size + 1]
        return window[:-1], window[1:]


def sorting_examples(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Write down rows of digits followed by the same digits sorted, for a model that is to sort.

    digits:  (batch, length) int64
    returns: x (batch, 2·length − 1) int64, the digits as they came, then sorted, without the last;
             y (batch, 2·length − 1) int64, what comes next after each element of x, but IGNORED
             where that is one of the unsorted digits: they are random, nobody can guess them
    """
    # solution
    length = digits.shape[1]
    row = torch.cat([digits, digits.sort(dim=1).values], dim=1)
    x, y = row[:, :-1], row[:, 1:].clone()
    y[:, : length - 1] = IGNORED  # the last unsorted digit is where the answer begins
    return x, y


class ShardedLoader:
    """Batches for one of several ranks, epoch after epoch; it can be stopped and go on elsewhere.

    In each epoch all ranks share one order of the dataset, drawn anew: every order is equally
    likely, and given by seed and epoch alone, whatever the state of torch's global generator,
    which stays as it is. Each rank takes the items at other places of that order, so that in an
    epoch no item is taken twice, by the same rank or by two. An epoch ends when fewer than
    world_size · batch_size items are left; these few sit out.
    """

    def __init__(
        self,
        dataset: Sequence[tuple[Tensor, Tensor]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Stand before the first batch of epoch 0.

        dataset:    (x, y) by index; the x are of one shape, so are the y
        rank:       which of the world_size ranks this is, from 0

        A dataset too small to give each rank one batch raises ValueError, which gives its length.
        """
        self.dataset, self.batch_size = dataset, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        # solution
        self.steps = len(dataset) // (world_size * batch_size)  # in one epoch
        if self.steps == 0:
            raise ValueError(
                f"{world_size} ranks with batches of {batch_size} need "
                f"{world_size * batch_size} items, got {len(dataset)}"
            )
        self.load_state_dict({"epoch": 0, "step": 0})

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the loader itself."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return the next batch, the first of a new epoch after the last of the one before.

        returns: x (batch_size, …) and y (batch_size, …), the items of the batch stacked
        """
        # solution
        if self.step == self.steps:
            self.load_state_dict({"epoch": self.epoch + 1, "step": 0})
        first = (self.step * self.world_size + self.rank) * self.batch_size
        self.step += 1
        items = [self.dataset[i] for i in self.order[first : first + self.batch_size].tolist()]
        x, y = zip(*items, strict=True)
        return torch.stack(x), torch.stack(y)

    def state_dict(self) -> dict[str, int]:
        """Say where the loader stands, in a few whole numbers that later batches leave as they are.

        They are the same on all ranks.
        """
        # solution
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where a loader stood that was made with the same arguments.

        What follows is what that loader gave after its state was taken; so for all other ranks.
        """
        # solution
        self.epoch, self.step = state["epoch"], state["step"]
        # The order needs no storing: seed and epoch say it all.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.order = torch.randperm(len(self.dataset), generator=generator)
