"""Exercise 21: LSTM.

In a plain recurrent network a gradient shrinks at every step it goes back. A long short-term
memory keeps a second state, the cell c, that is carried from step to step by a sum. Gates, numbers
between 0 and 1, say how much of it is kept, how much is written, and how much is shown:

    i = σ(W_ii x + b_ii + W_hi h + b_hi)         input gate: what is written
    f = σ(W_if x + b_if + W_hf h + b_hf)         forget gate: what is kept
    g = tanh(W_ig x + b_ig + W_hg h + b_hg)      candidate: what could be written
    o = σ(W_io x + b_io + W_ho h + b_ho)         output gate: what is shown
    c' = f ⊙ c + i ⊙ g
    h' = o ⊙ tanh(c')

Source: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory",
    https://doi.org/10.1162/neco.1997.9.8.1735; the forget gate: Gers, Schmidhuber, Cummins 2000,
    "Learning to Forget", https://doi.org/10.1162/089976600300015015; names and order as in
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
"""

import math

import torch
from torch import Tensor, nn


class LSTMCell(nn.Module):
    """One step. The four blocks of rows of each parameter belong to i, f, g, o, in this order:

    weight_ih: (4·hidden_size, input_size)     bias_ih: (4·hidden_size)
    weight_hh: (4·hidden_size, hidden_size)    bias_hh: (4·hidden_size)
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        """Make the parameters, and draw them.

        All are uniform in ±1/√hidden_size, but for the biases of the forget gate: these start at
        1 together, b_if + b_hf = 1 in every element, so that a fresh cell keeps what it holds.
        """
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden_size))
        raise NotImplementedError("exercise 21 is not written yet")

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the state (h, c) after one more input.

        x:       (..., input_size) floating point, dtype of the parameters
        state:   (h, c), both (..., hidden_size), before it
        returns: (h', c'), both (..., hidden_size), after it

        There may be any number of leading dimensions, also none. However large the sums before σ
        and tanh are, results and gradients are finite.
        """
        raise NotImplementedError("exercise 21 is not written yet")


class LSTM(nn.Module):
    """A cell that reads whole sequences. Its only parameters are those of `cell`, an LSTMCell."""

    def __init__(self, input_size: int, hidden_size: int, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cell = LSTMCell(input_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Read every sequence from its first step to its last.

        x:       (seq_len, batch, input_size), or (batch, seq_len, input_size) if batch_first;
                 floating point, dtype of the parameters, seq_len ≥ 1
        state:   (h0, c0), both (batch, hidden_size), before the first step; zeros if None
        lengths: (batch) int64, steps in each sequence, 0 … seq_len in any order; the steps of x
                 from there on are padding; None: all sequences have seq_len steps
        returns: outputs, h after each step, in the layout of x with hidden_size for input_size,
                 0 at every step that is padding; and (h_n, c_n), both (batch, hidden_size), the
                 state after the last step of each sequence, (h0, c0) where there is none

        Padding may hold anything, NaN too: outputs, h_n, c_n and all gradients are the same, and
        the gradient of the padding is 0. A length below 0 or above seq_len raises ValueError,
        which gives both.
        """
        raise NotImplementedError("exercise 21 is not written yet")
