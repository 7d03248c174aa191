"""Exercise 20: a recurrent network.

A recurrent network reads a sequence one step at a time and keeps what it has seen in a state of
fixed size. The same weights serve every step, so one network reads sequences of any length:

    hₜ = tanh(W_ih xₜ + b_ih + W_hh hₜ₋₁ + b_hh)

Sequences of one batch differ in length. The shorter ones are filled up with padding, and the
padding must change nothing: no output, no state, no gradient.

Source: Elman 1990, "Finding Structure in Time", https://doi.org/10.1207/s15516709cog1402_1, and
    torch.nn.RNN, whose names and two biases are used here,
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
"""

import math

import torch
from torch import Tensor, nn


class RNNCell(nn.Module):
    """One step of the network. Its parameters, each drawn uniformly from ±1/√hidden_size:

    weight_ih: (hidden_size, input_size)     bias_ih: (hidden_size)
    weight_hh: (hidden_size, hidden_size)    bias_hh: (hidden_size)
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the state after one more input.

        x:       (..., input_size) floating point, dtype of the parameters
        h:       (..., hidden_size) the state before it
        returns: (..., hidden_size) the state after it

        There may be any number of leading dimensions, also none.
        """
        raise NotImplementedError("exercise 20 is not written yet")


class RNN(nn.Module):
    """A cell that reads whole sequences. Its only parameters are those of `cell`, an RNNCell."""

    def __init__(self, input_size: int, hidden_size: int, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cell = RNNCell(input_size, hidden_size)

    def forward(
        self, x: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read every sequence from its first step to its last.

        x:       (seq_len, batch, input_size), or (batch, seq_len, input_size) if batch_first;
                 floating point, dtype of the parameters, seq_len ≥ 1
        h0:      (batch, hidden_size) the states before the first step; zeros if None
        lengths: (batch) int64, steps in each sequence, 0 … seq_len in any order; the steps of x
                 from there on are padding; None: all sequences have seq_len steps
        returns: outputs, the state after each step, in the layout of x with hidden_size for
                 input_size, 0 at every step that is padding; and h_n (batch, hidden_size), the
                 state after the last step of each sequence, h0 where there is none

        Padding may hold anything, NaN too: outputs, h_n and all gradients are the same, and the
        gradient of the padding is 0. A length below 0 or above seq_len raises ValueError,
        which gives both.
        """
        raise NotImplementedError("exercise 20 is not written yet")
