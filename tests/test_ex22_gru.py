"""Specs for exercise 22: GRU."""

import math

import pytest
import torch
from hypothesis import example, given, settings
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

LARGE = torch.finfo(torch.float64).max  # two of them are infinite together

# All in float64: a single rounding to float32 would cost 6e-8.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def shapes(input_size=INPUT_SIZE, hidden_size=HIDDEN_SIZE):
    return {
        "weight_ih": (3 * hidden_size, input_size),
        "weight_hh": (3 * hidden_size, hidden_size),
        "bias_ih": (3 * hidden_size,),
        "bias_hh": (3 * hidden_size,),
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


def read_in_turn(ex, weights, *batches):
    """One network reads several batches, each (x, h0, lengths), one after the other."""
    model, results = ex.GRU(INPUT_SIZE, HIDDEN_SIZE), []
    load(model, weights, "cell.")
    for x, h0, lengths in batches:
        results.append(model.to(x.dtype)(x, h0, lengths))
    return results


def parameters_after_a_step(ex, input_size, hidden_size, n):
    """Of n new cells. A step leaves them as they were drawn."""
    cells = [ex.GRUCell(input_size, hidden_size) for _ in range(n)]
    for cell in cells:
        cell(torch.ones(input_size), torch.ones(hidden_size))
    return [dict(cell.named_parameters()) for cell in cells]


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


def make_weights(rng, *sizes):
    """Large enough that the state of the first step still matters at the last."""
    return {name: 0.5 * randn(rng, *shape) for name, shape in shapes(*sizes).items()}


def make_inputs(rng, seq_len=SEQ_LEN, batch=BATCH):
    """x with the steps first, and h0."""
    return randn(rng, batch, seq_len, INPUT_SIZE).transpose(0, 1), 0.5 * randn(
        rng, batch, HIDDEN_SIZE
    )


def padding(lengths, seq_len=SEQ_LEN):
    """(seq_len, batch, 1), True at padding."""
    return (torch.arange(seq_len)[:, None] >= lengths)[..., None]


def fill(x, mask, values):
    """x with these values, in turn, where the mask is True."""
    values = torch.tensor(values, dtype=x.dtype)
    return x.where(~mask, values[torch.arange(x.numel()) % len(values)].view(x.shape))


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

    assert_close(out, read(oracle, weights, x, h0), **EXACT)


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

    assert_close(out, read(oracle, weights, x, h0, LENGTHS), **EXACT)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "with_lengths"])
def test_sends_gradients_back_through_all_steps(attempt, rng, lengths):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    upstream = randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)

    grads = attempt(gradients, weights, x, h0, lengths, *upstream)

    assert_close(grads, gradients(oracle, weights, x, h0, lengths, *upstream), **EXACT)


def test_gives_finite_gradients_where_the_gates_are_shut_or_wide_open(attempt, rng):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    upstream = randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)
    x = 1e4 * x

    grads = attempt(gradients, weights, x, h0, None, *upstream)

    assert_close(grads, gradients(oracle, weights, x, h0, None, *upstream))


@pytest.mark.parametrize(
    "filled", [[1e3], [math.nan, LARGE, -math.inf, -LARGE, math.inf]], ids=["1000", "all"]
)
def test_gives_the_same_results_and_gradients_whatever_the_padding_holds(attempt, rng, filled):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)
    upstream = randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)
    weights["weight_ih"][0] = 2.0  # LARGE overflows to both sides, and inf − inf is NaN
    x = fill(x, padding(LENGTHS), filled)

    out = attempt(read, weights, x, h0, LENGTHS)
    grads = attempt(gradients, weights, x, h0, LENGTHS, *upstream)

    clean = x.masked_fill(padding(LENGTHS), 0)
    assert_close(out, read(oracle, weights, clean, h0, LENGTHS))
    assert_close(grads, gradients(oracle, weights, clean, h0, LENGTHS, *upstream))


@pytest.mark.parametrize("lengths", [None, torch.tensor([1])], ids=["whole", "with_lengths"])
def test_takes_sizes_of_one(attempt, rng, lengths):
    weights, x = make_weights(rng, 1, 1), randn(rng, 1, 1, 1)

    out = attempt(read, weights, x, None, lengths)

    assert_close(out, read(oracle, weights, x, None, lengths), **EXACT)


def test_begins_anew_at_every_call(attempt, rng):
    weights, (x, h0) = make_weights(rng), make_inputs(rng, seq_len=SEQ_LEN + 2)
    batches = [
        (x[:3], None, torch.tensor([3, 1, 2])),
        (x, None, None),  # longer
        (x[:SEQ_LEN], h0, LENGTHS),
        (x[:SEQ_LEN, 1:], None, LENGTHS[1:]),  # fewer
    ]

    out = attempt(read_in_turn, weights, *batches, (x.float(), None, None))

    expected = [read(oracle, weights, *batch) for batch in batches]
    assert_close(out[:-1], expected, **EXACT)
    narrow = {name: weight.float() for name, weight in weights.items()}
    assert_close(out[-1], read(oracle, narrow, x.float()))


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 999))
@settings(max_examples=15)
@example(lengths=[1], seed=0)
@example(lengths=[0], seed=1)
@example(lengths=[0, 2, 0], seed=2)
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


def test_draws_all_parameters_evenly_from_a_small_range(attempt):
    hidden_size, bound = 16, 0.25  # 1/√16

    draws = attempt(parameters_after_a_step, 5, hidden_size, 20)

    for name, shape in shapes(5, hidden_size).items():
        drawn = torch.stack([draw[name] for draw in draws])
        assert_close(drawn.shape, torch.Size([20, *shape]))
        share = drawn.detach().flatten().double().sort().values / bound
        # Even draws from ±1, sorted, lie near a ramp. DKW: one of n is off by more than
        # 2·√(ln(2/δ)/2n) with probability δ at most; here δ = 1e-9.
        off = 2 * (21.4 / (2 * len(share))) ** 0.5
        ramp = torch.linspace(-1, 1, len(share), dtype=torch.float64)
        assert share.abs().max() <= 1, f"{name} must lie in ±{bound}, see {bound * share[[0, -1]]}"
        assert (share - ramp).abs().max() <= off + 2 / len(share), (
            f"{name} must be even in ±{bound}: a quarter lies below "
            f"{bound * share[len(share) // 4]:.3g}, a half below {bound * share.median():.3g}"
        )
    numbers = torch.cat([values.flatten() for draw in draws for values in draw.values()])
    # Of 2²⁴ steps of float32, thousands of draws share a handful by chance.
    share = len(numbers.unique()) / len(numbers)
    assert share > 0.99, f"each number must be drawn for itself, only {share:.0%} differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype):
    weights = {name: weight.to(dtype) for name, weight in make_weights(rng).items()}
    x, lengths = make_inputs(rng, seq_len=3)[0].to(dtype), torch.tensor([2, 3, 1])

    out = attempt(read, weights, x, None, lengths)

    wide = {name: weight.double() for name, weight in weights.items()}
    expected = read(oracle, wide, x.double(), None, lengths)
    # Three steps, each rounded a few times, were off by 3 eps at most in 150 draws.
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(out, tuple(y.to(dtype) for y in expected), atol=tolerance)


@pytest.mark.parametrize("wrong", [8, -1])
def test_rejects_a_length_that_no_sequence_can_have(attempt, rng, wrong):
    weights, (x, h0) = make_weights(rng), make_inputs(rng)

    with pytest.raises(ValueError, match=rf"(?s)7.*{wrong}|{wrong}.*7"):
        attempt(read, weights, x, h0, torch.tensor([4, wrong, 1]))
