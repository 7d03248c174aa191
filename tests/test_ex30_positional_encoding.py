"""Specs for exercise 30: positional encodings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu


# --- run on the code under test ------------------------------------------------------------------


def rows(ex, seq_len, d_model, dtype, first=0):
    """The shape of the table, and its rows from `first` on."""
    table = ex.sinusoidal(seq_len, d_model, dtype)
    return list(table.shape), table[first:]


def default_table(ex):
    return ex.sinusoidal(3, 4)


def tables_after_a_change(ex):
    """Two tables, made after the caller has changed one of the same sizes."""
    ex.sinusoidal(5, 6).zero_()
    return ex.sinusoidal(5, 6), ex.sinusoidal(5, 6, torch.float64)


def add_waves(ex, x, max_len):
    return ex.SinusoidalPositions(x.shape[-1], max_len)(x)


def add_learned(ex, x, weight, **start):
    return learned(ex, weight)(x, **start)


def add_waves_to_each(ex, xs, max_len):
    """One module, called with one x after the other, and the gradient of each x."""
    module = ex.SinusoidalPositions(xs[0].shape[-1], max_len)
    outs = [module(x.requires_grad_()) for x in xs]
    return outs, torch.autograd.grad([out.sum() for out in outs], xs)


def add_learned_to_each(ex, xs, weight, starts):
    module = learned(ex, weight)
    return [module(x, start=start) for x, start in zip(xs, starts, strict=True)]


def two_fresh_weights(ex):
    return [ex.LearnedPositions(4, 5).weight for _ in range(2)]


def stored(ex, d_model, max_len):
    """What the two modules train, and what a checkpoint holds of them."""
    modules = ex.SinusoidalPositions(d_model, max_len), ex.LearnedPositions(d_model, max_len)
    return [
        {
            "trained": {name: list(p.shape) for name, p in module.named_parameters()},
            "in a checkpoint": {name: list(p.shape) for name, p in module.state_dict().items()},
        }
        for module in modules
    ]


def device_of_result(ex, device):
    """Where a module that was moved there gives its result."""
    module = ex.SinusoidalPositions(4, 6).to(device)
    return str(module(torch.ones(2, 3, 4, device=device)).device)


def gradients(ex, x, weight, start, upstream):
    module = learned(ex, weight)
    module(x.requires_grad_(), start=start).backward(upstream)
    return x.grad, module.weight.grad


def fresh_weight(ex, d_model, max_len):
    return ex.LearnedPositions(d_model, max_len).weight


def learned(ex, weight):
    max_len, d_model = weight.shape
    module = ex.LearnedPositions(d_model, max_len).to(weight.dtype)
    own = {name: list(p.shape) for name, p in module.named_parameters()}
    if own != {"weight": [max_len, d_model]}:
        raise AttributeError(f"the parameters must be weight {[max_len, d_model]}, got {own}")
    module.weight.data.copy_(weight)
    return module


# --- the oracle: number by number, in Python's floats ---------------------------------------------


def closed_form(positions, d_model, dtype=torch.float64):
    table = torch.empty(len(positions), d_model, dtype=torch.float64)
    for row, t in enumerate(positions):
        for i in range(d_model // 2):
            angle = t / 10000.0 ** (2 * i / d_model)
            table[row, 2 * i], table[row, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table.to(dtype)


def draw(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("seq_len", "d_model"), [(7, 10), (3, 16), (5, 2), (1, 6), (0, 4)])
def test_gives_each_position_a_sine_and_a_cosine_of_every_frequency(attempt, seq_len, d_model):
    shape, table = attempt(rows, seq_len, d_model, torch.float64)

    assert shape == [seq_len, d_model]
    # float32 on the way would cost 6e-8.
    assert_close(table, closed_form(range(seq_len), d_model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_as_exact_as_its_dtype_at_far_positions_too(attempt, dtype):
    last = range(29_997, 30_000)

    shape, table = attempt(rows, 30_000, 6, dtype, last[0])

    assert shape == [30_000, 6]
    assert_close(table, closed_form(last, 6, dtype))


def test_is_float32_unless_told_otherwise(attempt):
    assert_close(attempt(default_table), closed_form(range(3), 4, torch.float32))


def test_makes_its_table_anew_at_every_call(attempt):
    tables = attempt(tables_after_a_change)

    assert_close(tables, tuple(closed_form(range(5), 6, d) for d in (torch.float32, torch.float64)))


@pytest.mark.parametrize("d_model", [1, 7])
def test_rejects_an_odd_d_model(attempt, rng, d_model):
    with pytest.raises(ValueError, match=rf"\b{d_model}\b"):
        attempt(rows, 3, d_model, torch.float64)
    with pytest.raises(ValueError, match=rf"\b{d_model}\b"):
        attempt(add_waves, draw(rng, 3, d_model), 3)


@settings(max_examples=20)
@given(t=st.integers(0, 20), distance=st.integers(0, 20), half=st.integers(1, 5))
def test_makes_two_positions_as_alike_as_they_are_near(attempt, t, distance, half):
    _, table = attempt(rows, 41, 2 * half, torch.float64)

    # sin a sin b + cos a cos b = cos(a − b): of two positions, only the distance is left.
    angles = [distance / 10000.0 ** (i / half) for i in range(half)]
    expected = torch.tensor(sum(map(math.cos, angles)), dtype=torch.float64)
    assert_close(table[t] @ table[t + distance], expected)


# --- the modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch", [(), (1,), (3,), (2, 3)], ids=["no batch", "batch of 1", "batch", "two batch axes"]
)
@pytest.mark.parametrize("seq_len", [0, 5, 9])
def test_adds_the_waves_to_what_comes_in(attempt, rng, batch, seq_len):
    x = draw(rng, *batch, seq_len, 6).float()

    out = attempt(add_waves, x, 9)

    assert_close(out, x + closed_form(range(seq_len), 6, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_what_comes_in(attempt, rng, dtype):
    x = draw(rng, 3, 300, 6).to(dtype)
    x[0], x[1] = 0, 1000 * x[1]

    out = attempt(add_waves, x, 310)

    waves = closed_form(range(300), 6)
    # The waves are rounded to float32 or coarser before the sum, which is rounded again.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert_close(out, (x.double() + waves).to(dtype), atol=4 * eps)
    assert_close(out[0], waves.to(dtype), rtol=0, atol=eps)


def test_adds_the_same_waves_at_every_call_and_passes_gradients_on(attempt, rng):
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    xs = [draw(rng, 2, n, 6).to(dtype) for n, dtype in zip((3, 5, 8, 2), dtypes, strict=True)]

    outs, grads = attempt(add_waves_to_each, xs, 9)

    for out, x in zip(outs, xs, strict=True):
        expected = (x.double() + closed_form(range(x.shape[-2]), 6)).to(x.dtype)
        # The waves may be rounded before the sum, which is rounded again.
        assert_close(out, expected, atol=4 * torch.finfo(x.dtype).eps)
    assert_close(grads, [torch.ones_like(x) for x in xs])


def test_keeps_no_start_from_one_call_to_the_next(attempt, rng):
    xs, weight = [draw(rng, 2, n, 6) for n in (3, 2, 4, 1, 1, 0)], draw(rng, 9, 6)
    starts = 2, 6, 0, 0, 0, 3

    outs = attempt(add_learned_to_each, xs, weight, starts)

    rows_of = [weight[s : s + x.shape[-2]] for x, s in zip(xs, starts, strict=True)]
    assert_close(outs, [x + r for x, r in zip(xs, rows_of, strict=True)])


def test_draws_each_learned_table_anew(attempt):
    first, second = attempt(two_fresh_weights)

    assert not torch.equal(first, second), "two tables hold the same numbers"


def test_trains_and_stores_the_learned_table_alone(attempt):
    waves, table = attempt(stored, 6, 9)

    assert_close(waves, {"trained": {}, "in a checkpoint": {}})
    shapes = {"weight": [9, 6]}
    assert_close(table, {"trained": shapes, "in a checkpoint": shapes})


def test_follows_its_module_to_another_device(attempt):
    assert_close(attempt(device_of_result, "meta"), "meta")  # where tensors have no numbers


@pytest.mark.parametrize("start", [None, 0, 3, 4])
def test_adds_the_learned_vectors_from_its_start_on(attempt, rng, start):
    x, weight = draw(rng, 2, 3, 5, 6), draw(rng, 9, 6)
    how = {} if start is None else {"start": start}

    out = attempt(add_learned, x, weight, **how)

    begin = start or 0
    assert_close(out, x + weight[begin : begin + 5])


def test_sends_gradients_to_the_rows_in_use_alone(attempt, rng):
    x, weight, upstream = draw(rng, 3, 5, 6), draw(rng, 9, 6), draw(rng, 3, 5, 6)

    grads = attempt(gradients, x, weight, 2, upstream)

    of_weight = torch.zeros(9, 6, dtype=torch.float64)
    of_weight[2:7] = upstream.sum(dim=0)
    assert_close(grads, (upstream, of_weight))


def test_draws_the_learned_table_with_a_deviation_of_two_hundredths(attempt):
    weight = attempt(fresh_weight, 40, 500)

    rows = weight.double() / 0.02
    z = rows.flatten()
    # Six standard deviations of what 20,000 normal draws give: a chance of 2 in 10⁹ each.
    assert_close(float(z.mean()), 0.0, atol=6 / math.sqrt(len(z)))
    assert_close(float(z.std()), 1.0, atol=6 / math.sqrt(2 * len(z)))
    assert_close(float((z.abs() < 1).double().mean()), 0.6827, atol=6 * 0.4655 / math.sqrt(len(z)))
    for axis in (0, 1):  # products of neighbours, which are drawn each by itself
        product = float((rows * rows.roll(1, axis)).mean())
        assert_close(product, 0.0, atol=6 / math.sqrt(len(z)))


def test_rejects_more_positions_than_max_len(attempt, rng):
    x, weight = draw(rng, 2, 5, 6), draw(rng, 4, 6)

    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        attempt(add_waves, x, 4)
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        attempt(add_learned, x, weight)
    with pytest.raises(ValueError, match=r"4.*7|7.*4"):
        attempt(add_learned, x[:, :3], weight, start=4)
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        attempt(add_learned, x[:, :1], weight, start=4)
    with pytest.raises(ValueError, match=r"\b4\b.*\b12\b|\b12\b.*\b4\b"):
        attempt(add_learned, x[:, :2], weight, start=10)
