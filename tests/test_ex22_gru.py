"""Specs for exercise 22: GRU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    "torch.nn.GRU.forward",
    "torch.nn.GRUCell.forward",
    "torch.gru",
    "torch.gru_cell",
]

# No two sizes are equal, so no two axes can be swapped unnoticed.
INPUT_SIZE, HIDDEN_SIZE, BATCH, SEQ_LEN = 5, 4, 3, 7
LENGTHS = torch.tensor([4, 7, 1])  # neither rising nor falling

SHAPES = {
    "weight_ih": (3 * HIDDEN_SIZE, INPUT_SIZE),
    "weight_hh": (3 * HIDDEN_SIZE, HIDDEN_SIZE),
    "bias_ih": (3 * HIDDEN_SIZE,),
    "bias_hh": (3 * HIDDEN_SIZE,),
}


class oracle:
    """PyTorch's own network under the names of the exercise."""

    GRUCell = nn.GRUCell

    class GRU(nn.Module):
        def __init__(self, input_size, hidden_size, batch_first=False):
            super().__init__()
            self.cell = nn.GRU(input_size, hidden_size, batch_first=batch_first)

        def forward(self, x, h0=None, lengths=None):
            time, batch_first = (1 if self.cell.batch_first else 0), self.cell.batch_first
            h0 = None if h0 is None else h0[None]
            if lengths is None:
                outputs, h_n = self.cell(x, h0)
                return outputs, h_n[0]
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            outputs, h_n = self.cell(packed, h0)
            outputs, _ = pad_packed_sequence(outputs, batch_first, total_length=x.shape[time])
            return outputs, h_n[0]


def load(model, weights, prefix=""):
    """Copy the weights in by name; return the model's own parameters under these names."""
    own = {name.removesuffix("_l0"): p for name, p in model.named_parameters()}
    if sorted(own) != sorted(prefix + name for name in weights):
        raise AttributeError(f"the parameters must be {prefix}{', '.join(weights)}, got {[*own]}")
    for name, weight in weights.items():
        parameter = own[prefix + name]
        if parameter.shape != weight.shape:
            raise ValueError(f"{name} must be {tuple(weight.shape)}, got {tuple(parameter.shape)}")
        parameter.data = weight.clone()
    return {name: own[prefix + name] for name in weights}


def step(ex, weights, x, h):
    cell = ex.GRUCell(x.shape[-1], h.shape[-1])
    load(cell, weights)
    return cell(x, h)


def read(ex, weights, x, h0=None, lengths=None, batch_first=False):
    model = ex.GRU(x.shape[-1], weights["weight_hh"].shape[1], batch_first)
    load(model, weights, "cell.")
    return model(x, h0, lengths)


def gradients(ex, weights, x, h0, lengths, grad_outputs, grad_h_n):
    """The gradients of x, h0 and all parameters, given those of outputs and h_n."""
    model = ex.GRU(x.shape[-1], h0.shape[-1])
    inputs = {"x": x.requires_grad_(), "h0": h0.requires_grad_()}
    inputs |= load(model, weights, "cell.")
    results = model(x, h0, lengths)
    found = torch.autograd.grad(results, list(inputs.values()), (grad_outputs, grad_h_n))
    return dict(zip(inputs, found, strict=True))


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def make_weights(rng):
    """Large enough that the state of the first step still matters at the last."""
    return {name: 0.5 * randn(rng, *shape) for name, shape in SHAPES.items()}


def make_inputs(rng, seq_len=SEQ_LEN, batch=BATCH):
    """x with the steps first, and h0."""
    return randn(rng, seq_len, batch, INPUT_SIZE), 0.5 * randn(rng, batch, HIDDEN_SIZE)


def padding(lengths, seq_len=SEQ_LEN):
    """(seq_len, batch, 1), True at padding."""
    return (torch.arange(seq_len)[:, None] >= lengths)[..., None]


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=["none", "3", "2x3"])
def test_takes_one_step_for_any_leading_dimensions(attempt, rng, leading):
    weights = make_weights(rng)
    x, h = randn(rng, *leading, INPUT_SIZE), randn(rng, *leading, HIDDEN_SIZE)

    out = attempt(step, weights, x, h)

    flat = step(oracle, weights, x.reshape(-1, INPUT_SIZE), h.reshape(-1, HIDDEN_SIZE))
    assert_close(out, flat.reshape(h.shape))


@pytest.mark.parametrize("start", ["zeros", "given"])
def test_carries_the_state_from_step_to_step(attempt, rng, start):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    h0 = h0 if start == "given" else None

    out = attempt(read, weights, x, h0)

    assert_close(out, read(oracle, weights, x, h0))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "with_lengths"])
def test_takes_the_batch_first_as_well(attempt, rng, lengths):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    x = x.transpose(0, 1).contiguous()

    out = attempt(read, weights, x, h0, lengths, batch_first=True)

    assert_close(out, read(oracle, weights, x, h0, lengths, batch_first=True))


@pytest.mark.parametrize("start", ["zeros", "given"])
def test_stops_each_sequence_at_its_own_length(attempt, rng, start):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    h0 = h0 if start == "given" else None

    out = attempt(read, weights, x, h0, LENGTHS)

    assert_close(out, read(oracle, weights, x, h0, LENGTHS))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "with_lengths"])
def test_sends_gradients_back_through_all_steps(attempt, rng, lengths):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    upstream = randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)

    grads = attempt(gradients, weights, x, h0, lengths, *upstream)

    assert_close(grads, gradients(oracle, weights, x, h0, lengths, *upstream))


def test_gives_finite_gradients_where_the_gates_are_shut_or_wide_open(attempt, rng):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    upstream = randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)
    x = 1e4 * x

    grads = attempt(gradients, weights, x, h0, None, *upstream)

    assert_close(grads, gradients(oracle, weights, x, h0, None, *upstream))


@pytest.mark.parametrize("filled", [1e3, float("nan")], ids=["1000", "nan"])
def test_gives_the_same_results_and_gradients_whatever_the_padding_holds(attempt, rng, filled):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    upstream = randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)
    x = x.masked_fill(padding(LENGTHS), filled)

    out = attempt(read, weights, x, h0, LENGTHS)
    grads = attempt(gradients, weights, x, h0, LENGTHS, *upstream)

    clean = x.masked_fill(padding(LENGTHS), 0)
    assert_close(out, read(oracle, weights, clean, h0, LENGTHS))
    assert_close(grads, gradients(oracle, weights, clean, h0, LENGTHS, *upstream))


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_reads_a_sequence_in_a_batch_as_it_reads_it_alone(attempt, lengths, seed):
    rng = torch.Generator().manual_seed(seed)
    seq_len = max(1, *lengths) + seed % 2  # some batches are padding in the last step
    weights, (x, h0) = make_weights(rng), make_inputs(rng, seq_len, len(lengths))

    outputs, h_n = attempt(read, weights, x, h0, torch.tensor(lengths))

    for i, n in enumerate(lengths):
        alone, last = torch.zeros(0, HIDDEN_SIZE, dtype=torch.float64), h0[i]
        if n:
            alone, last = (y.squeeze(1) for y in read(oracle, weights, x[:n, [i]], h0[[i]]))
            last = last[0]
        assert_close(outputs[:, i], torch.cat([alone, torch.zeros(seq_len - n, HIDDEN_SIZE)]))
        assert_close(h_n[i], last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype):
    weights = {name: weight.to(dtype) for name, weight in make_weights(rng).items()}
    x, lengths = make_inputs(rng, seq_len=3)[0].to(dtype), torch.tensor([2, 3, 1])

    out = attempt(read, weights, x, None, lengths)

    wide = {name: weight.double() for name, weight in weights.items()}
    expected = read(oracle, wide, x.double(), None, lengths)
    # Sums of about 6 before each gate, of three steps, each rounded a few times.
    tolerance = 32 * torch.finfo(dtype).eps
    assert_close(out, tuple(y.to(dtype) for y in expected), atol=tolerance)


@pytest.mark.parametrize("wrong", [8, -2])
def test_rejects_a_length_that_no_sequence_can_have(attempt, rng, wrong):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)

    with pytest.raises(ValueError, match=rf"(?s)7.*{wrong}|{wrong}.*7"):
        attempt(read, weights, x, h0, torch.tensor([4, wrong, 1]))
