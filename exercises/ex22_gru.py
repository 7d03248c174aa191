"""Exercise 22: GRU.

A gated recurrent unit does with one state what an LSTM does with two. Its update gate z mixes the
old state with a candidate n, and its reset gate r says how much of the old state the candidate
sees:

    r = σ(W_ir x + b_ir + W_hr h + b_hr)           reset gate
    z = σ(W_iz x + b_iz + W_hz h + b_hz)           update gate
    n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))  candidate
    h' = (1 − z) ⊙ n + z ⊙ h

The first paper resets before the product, W_hn (r ⊙ h). The form above, which PyTorch and cuDNN
use, needs a single product with h for all three parts. Papers differ in which side z stands on.

Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation", https://arxiv.org/abs/1406.1078; the form above:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
"""

import math

import torch
from torch import Tensor, nn


class GRUCell(nn.Module):
    """One step. The three blocks of rows of each parameter belong to r, z, n, in this order, and
    each is drawn uniformly from ±1/√hidden_size:

    weight_ih: (3·hidden_size, input_size)     bias_ih: (3·hidden_size)
    weight_hh: (3·hidden_size, hidden_size)    bias_hh: (3·hidden_size)
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the state after one more input.

        x:       (..., input_size) floating point, dtype of the parameters
        h:       (..., hidden_size) the state before it
        returns: (..., hidden_size) the state after it

        There may be any number of leading dimensions, also none. However large the sums before σ
        and tanh are, results and gradients are finite.
        """
        raise NotImplementedError("exercise 22 is not written yet")


class GRU(nn.Module):
    """A cell that reads whole sequences. Its only parameters are those of `cell`, a GRUCell."""

    def __init__(self, input_size: int, hidden_size: int, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cell = GRUCell(input_size, hidden_size)

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
        raise NotImplementedError("exercise 22 is not written yet")
