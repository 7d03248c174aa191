"""Specs for exercise 21: LSTM."""

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
    "torch.nn.LSTM.forward",
    "torch.nn.LSTMCell.forward",
    "torch.lstm",
    "torch.lstm_cell",
]

# No two sizes are equal, so no two axes can be swapped unnoticed.
INPUT_SIZE, HIDDEN_SIZE, BATCH, SEQ_LEN = 5, 4, 3, 7
LENGTHS = torch.tensor([4, 7, 1])  # neither rising nor falling

LARGE = torch.finfo(torch.float64).max  # two of them are infinite together

# All in float64: a single rounding to float32 would cost 6e-8.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def shapes(input_size=INPUT_SIZE, hidden_size=HIDDEN_SIZE):
    return {
        "weight_ih": (4 * hidden_size, input_size),
        "weight_hh": (4 * hidden_size, hidden_size),
        "bias_ih": (4 * hidden_size,),
        "bias_hh": (4 * hidden_size,),
    }


class oracle:
    """PyTorch's own network under the names of the exercise."""

    LSTMCell = nn.LSTMCell

    class LSTM(nn.Module):
        def __init__(self, input_size, hidden_size, batch_first=False):
            super().__init__()
            self.cell = nn.LSTM(input_size, hidden_size, batch_first=batch_first)

        def forward(self, x, state=None, lengths=None):
            time, batch_first = (1 if self.cell.batch_first else 0), self.cell.batch_first
            state = None if state is None else tuple(y[None] for y in state)
            packed = x
            if lengths is not None:
                packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            outputs, (h_n, c_n) = self.cell(packed, state)
            if lengths is not None:
                outputs, _ = pad_packed_sequence(outputs, batch_first, total_length=x.shape[time])
            return outputs, (h_n[0], c_n[0])


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


def step(ex, weights, x, state):
    cell = ex.LSTMCell(x.shape[-1], state[0].shape[-1])
    load(cell, weights)
    return cell(x, state)


def read(ex, weights, x, state=None, lengths=None, batch_first=False):
    model = ex.LSTM(x.shape[-1], weights["weight_hh"].shape[1], batch_first)
    load(model, weights, "cell.")
    return model(x, state, lengths)


def read_in_turn(ex, weights, *batches):
    """One network reads several batches, each (x, state, lengths), one after the other."""
    model, results = ex.LSTM(INPUT_SIZE, HIDDEN_SIZE), []
    load(model, weights, "cell.")
    for x, state, lengths in batches:
        results.append(model.to(x.dtype)(x, state, lengths))
    return results


def gradients(ex, weights, x, state, lengths, grad_outputs, grad_state):
    """The gradients of x, h0, c0 and all parameters, given those of outputs, h_n and c_n."""
    h0, c0 = state
    model = ex.LSTM(x.shape[-1], h0.shape[-1])
    inputs = {"x": x.requires_grad_(), "h0": h0.requires_grad_(), "c0": c0.requires_grad_()}
    inputs |= load(model, weights, "cell.")
    outputs, last = model(x, (h0, c0), lengths)
    found = torch.autograd.grad(
        (outputs, *last), list(inputs.values()), (grad_outputs, *grad_state)
    )
    return dict(zip(inputs, found, strict=True))


def fresh(ex, input_size, hidden_size, n):
    return [dict(ex.LSTMCell(input_size, hidden_size).named_parameters()) for _ in range(n)]


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def make_weights(rng, *sizes):
    """Large enough that the state of the first step still matters at the last."""
    return {name: 0.5 * randn(rng, *shape) for name, shape in shapes(*sizes).items()}


def make_inputs(rng, seq_len=SEQ_LEN, batch=BATCH):
    """x with the steps first, and the state (h0, c0)."""
    h0, c0 = 0.5 * randn(rng, batch, HIDDEN_SIZE), 3 * randn(rng, batch, HIDDEN_SIZE)
    return randn(rng, batch, seq_len, INPUT_SIZE).transpose(0, 1), (h0, c0)


def make_upstream(rng):
    """Gradients of outputs, and of (h_n, c_n)."""
    grad_h_n, grad_c_n = randn(rng, BATCH, HIDDEN_SIZE), randn(rng, BATCH, HIDDEN_SIZE)
    return randn(rng, SEQ_LEN, BATCH, HIDDEN_SIZE), (grad_h_n, grad_c_n)


def padding(lengths, seq_len=SEQ_LEN):
    """(seq_len, batch, 1), True at padding."""
    return (torch.arange(seq_len)[:, None] >= lengths)[..., None]


def fill(x, mask, values):
    """x with these values, in turn, where the mask is True."""
    values = torch.tensor(values, dtype=x.dtype)
    return x.where(~mask, values[torch.arange(x.numel()) % len(values)].view(x.shape))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=["none", "3", "2x3"])
def test_takes_one_step_for_any_leading_dimensions(attempt, rng, leading):
    weights, x = make_weights(rng), randn(rng, *leading, INPUT_SIZE)
    state = randn(rng, *leading, HIDDEN_SIZE), randn(rng, *leading, HIDDEN_SIZE)

    out = attempt(step, weights, x, state)

    flat = tuple(y.reshape(-1, HIDDEN_SIZE) for y in state)
    flat = step(oracle, weights, x.reshape(-1, INPUT_SIZE), flat)
    assert_close(out, tuple(y.reshape(*leading, HIDDEN_SIZE) for y in flat))


@pytest.mark.parametrize("start", ["zeros", "given"])
def test_carries_both_states_from_step_to_step(attempt, rng, start):
    weights, (x, state) = make_weights(rng), make_inputs(rng)
    state = state if start == "given" else None

    out = attempt(read, weights, x, state)

    assert_close(out, read(oracle, weights, x, state), **EXACT)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "with_lengths"])
def test_takes_the_batch_first_as_well(attempt, rng, lengths):
    weights, (x, state) = make_weights(rng), make_inputs(rng)
    x = x.transpose(0, 1).contiguous()

    out = attempt(read, weights, x, state, lengths, batch_first=True)

    assert_close(out, read(oracle, weights, x, state, lengths, batch_first=True))


@pytest.mark.parametrize("start", ["zeros", "given"])
def test_stops_each_sequence_at_its_own_length(attempt, rng, start):
    weights, (x, state) = make_weights(rng), make_inputs(rng)
    state = state if start == "given" else None

    out = attempt(read, weights, x, state, LENGTHS)

    assert_close(out, read(oracle, weights, x, state, LENGTHS), **EXACT)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "with_lengths"])
def test_sends_gradients_back_through_all_steps(attempt, rng, lengths):
    weights, (x, state), upstream = make_weights(rng), make_inputs(rng), make_upstream(rng)

    grads = attempt(gradients, weights, x, state, lengths, *upstream)

    assert_close(grads, gradients(oracle, weights, x, state, lengths, *upstream), **EXACT)


def test_gives_finite_gradients_where_the_gates_are_shut_or_wide_open(attempt, rng):
    weights, (x, state), upstream = make_weights(rng), make_inputs(rng), make_upstream(rng)
    x = 1e4 * x

    grads = attempt(gradients, weights, x, state, None, *upstream)

    assert_close(grads, gradients(oracle, weights, x, state, None, *upstream))


@pytest.mark.parametrize(
    "filled", [[1e3], [math.nan, LARGE, -math.inf, -LARGE, math.inf]], ids=["1000", "all"]
)
def test_gives_the_same_results_and_gradients_whatever_the_padding_holds(attempt, rng, filled):
    weights, (x, state), upstream = make_weights(rng), make_inputs(rng), make_upstream(rng)
    weights["weight_ih"][0] = 2.0  # LARGE overflows to both sides, and inf − inf is NaN
    x = fill(x, padding(LENGTHS), filled)

    out = attempt(read, weights, x, state, LENGTHS)
    grads = attempt(gradients, weights, x, state, LENGTHS, *upstream)

    clean = x.masked_fill(padding(LENGTHS), 0)
    assert_close(out, read(oracle, weights, clean, state, LENGTHS))
    assert_close(grads, gradients(oracle, weights, clean, state, LENGTHS, *upstream))


@pytest.mark.parametrize("lengths", [None, torch.tensor([1])], ids=["whole", "with_lengths"])
def test_takes_sizes_of_one(attempt, rng, lengths):
    weights, x = make_weights(rng, 1, 1), randn(rng, 1, 1, 1)

    out = attempt(read, weights, x, None, lengths)

    assert_close(out, read(oracle, weights, x, None, lengths), **EXACT)


def test_begins_anew_at_every_call(attempt, rng):
    weights, (x, state) = make_weights(rng), make_inputs(rng, seq_len=SEQ_LEN + 2)
    batches = [
        (x[:3], None, torch.tensor([3, 1, 2])),
        (x, None, None),  # longer
        (x[:SEQ_LEN], state, LENGTHS),
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
    weights, (x, state) = make_weights(rng), make_inputs(rng, seq_len, len(lengths))

    outputs, last = attempt(read, weights, x, state, torch.tensor(lengths))

    for i, n in enumerate(lengths):
        alone, expected = torch.zeros(0, 1, HIDDEN_SIZE), tuple(y[[i]] for y in state)
        if n:
            alone, expected = read(oracle, weights, x[:n, [i]], expected)
        rest = torch.zeros(seq_len - n, HIDDEN_SIZE, dtype=torch.float64)
        assert_close(outputs[:, i], torch.cat([alone[:, 0], rest]))
        assert_close(tuple(y[[i]] for y in last), expected)


def test_starts_with_an_open_forget_gate_and_small_weights(attempt):
    hidden_size, bound = 16, 0.25  # 1/√16
    forget = slice(hidden_size, 2 * hidden_size)

    draws = attempt(fresh, 5, hidden_size, 4)

    pools = {name: [] for name in shapes()}
    for drawn in draws:
        assert_close(drawn["bias_ih"][forget] + drawn["bias_hh"][forget], torch.ones(hidden_size))
        for name, values in drawn.items():
            others = [values[: forget.start], values[forget.stop :]]
            pools[name].append(torch.cat(others if "bias" in name else [values]).flatten())
    numbers = torch.cat([torch.cat(pool) for pool in pools.values()])
    # Of 2²⁴ steps of float32, thousands of draws share a handful by chance.
    share = len(numbers.unique()) / len(numbers)
    assert share > 0.99, f"each number must be drawn for itself, only {share:.0%} differ"
    for name, pool in pools.items():
        share = torch.cat(pool).double() / bound
        # Uniform in ±1: mean 0 and mean square 1/3. Hoeffding: a mean of n values in a range of
        # width w is off by more than w·√(ln(2/δ)/2n) with probability δ at most; here δ = 1e-9.
        off = (21.4 / (2 * len(share))) ** 0.5
        assert share.abs().max() <= 1, (
            f"{name} must lie in ±{bound}, reaches {bound * share.abs().max():.3g}"
        )
        assert abs(share.mean()) <= 2 * off, (
            f"{name} must have mean 0, got {bound * share.mean():.3g}"
        )
        assert abs(share.square().mean() - 1 / 3) <= off, (
            f"{name} must be uniform in ±{bound}, a spread of {bound / 3**0.5:.3g}, "
            f"got {bound * share.square().mean() ** 0.5:.3g}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype):
    weights = {name: weight.to(dtype) for name, weight in make_weights(rng).items()}
    x, lengths = make_inputs(rng, seq_len=3)[0].to(dtype), torch.tensor([2, 3, 1])

    outputs, (h_n, c_n) = attempt(read, weights, x, None, lengths)

    wide = {name: weight.double() for name, weight in weights.items()}
    theirs, (their_h_n, their_c_n) = read(oracle, wide, x.double(), None, lengths)
    expected = tuple(y.to(dtype) for y in (theirs, their_h_n, their_c_n))
    # Three steps, each rounded a few times, were off by 3 eps at most in 150 draws.
    assert_close((outputs, h_n, c_n), expected, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("wrong", [8, -1])
def test_rejects_a_length_that_no_sequence_can_have(attempt, rng, wrong):
    weights, (x, state) = make_weights(rng), make_inputs(rng)

    with pytest.raises(ValueError, match=rf"(?s)7.*{wrong}|{wrong}.*7"):
        attempt(read, weights, x, state, torch.tensor([4, wrong, 1]))
