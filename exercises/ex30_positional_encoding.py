"""Exercise 30: positional encodings.

Attention does not know in which order its keys come. So a vector that depends on the
position alone is added to each embedding. The first transformer took waves for it, two
to a frequency, from fast ones that tell neighbours apart to slow ones that tell far
places apart:

    p[t, 2i]     = sin(t / 10000^(2i / d_model))    t = 0, 1, …,  i = 0 … d_model/2 − 1
    p[t, 2i + 1] = cos(t / 10000^(2i / d_model))

GPT and BERT learn a table of such vectors instead, one for each position.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5,
    https://arxiv.org/abs/1706.03762; Gehring et al. 2017, "Convolutional Sequence to
    Sequence Learning", section 3.1 (learned), https://arxiv.org/abs/1705.03122
"""

import torch
from torch import Tensor, nn


def sinusoidal(seq_len: int, d_model: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make the table of the equation for positions 0 … seq_len − 1.

    seq_len: int, 0 or more
    d_model: int, even
    dtype:   floating point, of the result alone: each number is as exact as dtype allows, at
             any position, so positions and angles are computed in float64
    returns: (seq_len, d_model) dtype, sines in the even columns, cosines in the odd ones

    An odd d_model raises ValueError, and the message holds it.
    """
    raise NotImplementedError("exercise 30 is not written yet")


class SinusoidalPositions(nn.Module):
    """Adds the waves to whatever comes in. It learns nothing and stores nothing.

    It has no parameters, and its state_dict is empty: the table can be made again at any
    time, so a checkpoint need not hold it. After `.to(device)` it works on that device.
    """

    def __init__(self, d_model: int, max_len: int) -> None:
        """Make the table for positions 0 … max_len − 1.

        Raises ValueError for an odd d_model; the message holds it.
        """
        super().__init__()
        raise NotImplementedError("exercise 30 is not written yet")

    def forward(self, x: Tensor) -> Tensor:
        """Add to each row of x the vector of its position.

        x:       (..., seq_len, d_model) floating point, the rows at positions 0 … seq_len − 1
        returns: same shape and dtype; the waves are as exact as float32, or as x if coarser

        More than max_len rows raise ValueError, and the message holds both numbers.
        """
        raise NotImplementedError("exercise 30 is not written yet")


class LearnedPositions(nn.Module):
    """Adds a learned vector to each position.

    Its only parameter: weight (max_len, d_model), row t for position t.
    """

    def __init__(self, d_model: int, max_len: int) -> None:
        """Make the table, drawn from a normal distribution with mean 0 and deviation 0.02."""
        super().__init__()
        raise NotImplementedError("exercise 30 is not written yet")

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add to each row of x the vector of its position.

        x:       (..., seq_len, d_model) dtype of weight, positions start … start + seq_len − 1
        start:   int, 0 or more: how many rows came before x, for those who write token by token
        returns: same shape and dtype

        A position of max_len or more raises ValueError; the message holds max_len and the
        number of positions that were asked for, start + seq_len.
        """
        raise NotImplementedError("exercise 30 is not written yet")
