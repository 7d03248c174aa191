"""Specs for exercise 18: learning rate schedule and gradient clipping."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    "torch.nn.utils.clip_grad_norm_",
    "torch.nn.utils.clip_grad.clip_grad_norm_",
    "torch.nn.utils.get_total_norm",
    "torch.nn.utils.clip_grads_with_norm_",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
]


class oracle:
    """PyTorch's own clipping under the name of the exercise."""

    @staticmethod
    def clip_grad_norm(parameters, max_norm):
        return clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)


def rates_of_torch(max_lr, min_lr, n_warmup, n_steps):
    """Two of PyTorch's schedulers, one after the other."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=max_lr)
    parts = [lr_scheduler.CosineAnnealingLR(optimizer, n_steps - 1 - n_warmup, min_lr)]
    if n_warmup:
        rise = lr_scheduler.LinearLR(optimizer, 1 / (n_warmup + 1), total_iters=n_warmup)
        parts.insert(0, rise)
    schedule = lr_scheduler.SequentialLR(optimizer, parts, [n_warmup] * (len(parts) - 1))
    rates = []
    for _ in range(n_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


# --- run on the code under test ------------------------------------------------------------------


def rates(ex, steps, options):
    return [ex.warmup_cosine(step, **options) for step in steps]


def clip(ex, grads, max_norm, read_once=True):
    """The norm, and all gradients after clipping. model.parameters() can be read only once."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in grads]
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            param.data = torch.zeros_like(grad)
            param.grad = grad.clone(memory_format=torch.preserve_format)
    norm = ex.clip_grad_norm(iter(params) if read_once else params, max_norm)
    return norm, [param.grad for param in params]


def clip_or_refuse(ex, grads, max_norm):
    """The gradients after clipping, and whether it was refused."""
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    try:
        ex.clip_grad_norm(params, max_norm)
        refused = False
    except NotImplementedError:
        raise
    except RuntimeError:
        refused = True
    return refused, [param.grad for param in params]


# --- specs: the schedule -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_warmup", "n_steps"), [(4, 17), (1, 8), (0, 7), (5, 7)], ids=lambda n: f"{n}"
)
def test_warms_up_in_a_line_and_falls_along_a_cosine(attempt, n_warmup, n_steps):
    options = {"max_lr": 0.3, "min_lr": 0.02, "n_warmup": n_warmup, "n_steps": n_steps}

    got = attempt(rates, list(range(n_steps)), options)

    assert_close(got, rates_of_torch(**options))


def test_begins_above_zero_and_below_the_peak(attempt):
    options = {"max_lr": 0.5, "min_lr": 0.1, "n_warmup": 9, "n_steps": 40}

    first, second, peak = attempt(rates, [0, 1, 9], options)

    assert_close((first, second, peak), (0.05, 0.1, 0.5))


def test_stays_at_the_lowest_rate_from_the_last_step_on(attempt):
    options = {"max_lr": 0.5, "min_lr": 0.1, "n_warmup": 3, "n_steps": 10}

    got = attempt(rates, [9, 10, 11, 16, 17, 1000], options)

    assert_close(got, [0.1] * 6)


@given(n_warmup=st.integers(0, 9), n_more=st.integers(2, 20), share=st.floats(0, 1))
@settings(max_examples=20)
def test_rises_to_the_peak_and_never_again(attempt, n_warmup, n_more, share):
    n_steps = n_warmup + n_more
    options = {"max_lr": 2.0, "min_lr": 2.0 * share, "n_warmup": n_warmup, "n_steps": n_steps}

    got = attempt(rates, list(range(n_steps + 5)), options)

    rise, fall = got[: n_warmup + 1], got[n_warmup:]
    assert rise == sorted(rise), "the rate falls before the peak"
    assert fall == sorted(fall, reverse=True), "the rate rises after the peak"
    assert_close((got[n_warmup], got[n_steps - 1]), (2.0, 2.0 * share))


@pytest.mark.parametrize(
    ("n_warmup", "n_steps", "step"), [(7, 8, 0), (7, 7, 0), (7, 3, 0), (0, 1, 0), (7, 8, 9)]
)
def test_rejects_a_warm_up_that_leaves_no_steps(attempt, n_warmup, n_steps, step):
    options = {"max_lr": 0.5, "min_lr": 0.1, "n_warmup": n_warmup, "n_steps": n_steps}

    with pytest.raises(ValueError, match=rf"\b{n_steps}\b"):
        attempt(rates, [step], options)


# --- specs: clipping -----------------------------------------------------------------------------


def some_grads(rng, dtype=torch.float64):
    """Gradients of different shapes and lengths; one is missing."""
    shapes = ((4, 3), (), (5,), (0, 2))
    grads = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]
    return [grads[0], None, *grads[1:]]


@pytest.mark.parametrize(
    "max_norm", [0.25, 2.0, 0.0], ids=["much too long", "a little too long", "to nothing"]
)
def test_shortens_all_gradients_by_one_factor(attempt, rng, max_norm):
    grads = [None if g is None else g + g.sign() for g in some_grads(rng)]  # norm above 4

    results = attempt(clip, grads, max_norm)

    # Tight enough to see the 1e-6 that is added to the norm.
    assert_close(results, clip(oracle, grads, max_norm), rtol=1e-10, atol=0)


def test_leaves_short_gradients_as_they_are(attempt, rng):
    grads = some_grads(rng)

    norm, clipped = attempt(clip, grads, 100.0)

    assert_close((norm, clipped), (clip(oracle, grads, 100.0)[0], grads))


def test_takes_gradients_of_any_memory_layout(attempt, rng):
    grad = torch.randn(3, 4, 5, generator=rng, dtype=torch.float64)
    grads = [grad.mT, grad[:, ::2], grad[0, 0].expand(2, 5).clone().t()]

    results = attempt(clip, grads, 0.5)

    assert_close(results, clip(oracle, grads, 0.5))


@given(exponent=st.integers(-9, 18), max_norm=st.floats(0.01, 10), seed=st.integers(0, 999))
@example(exponent=18, max_norm=1.0, seed=0)
@settings(max_examples=20)
def test_keeps_the_direction_and_bounds_the_length(attempt, exponent, max_norm, seed):
    rng = torch.Generator().manual_seed(seed)
    sizes = (2, 3) * 6
    grads = [torch.randn(n, generator=rng, dtype=torch.float64) * 10.0**exponent for n in sizes]

    norm, clipped = attempt(clip, grads, max_norm, read_once=False)

    before, after = torch.cat(grads), torch.cat(clipped)
    assert_close(norm, before.norm())
    # A rounding more is no matter.
    assert after.norm() <= max_norm * (1 + 1e-12), (
        f"the norm is {after.norm():.6g}, allowed are {max_norm:.6g}"
    )
    assert_close(after / after.norm(), before / before.norm())


@pytest.mark.parametrize(
    "dtypes",
    [
        *([torch.float16], [torch.bfloat16], [torch.float32]),
        *([torch.float16, torch.float64], [torch.float64, torch.float16]),
    ],
    ids=["float16", "bfloat16", "float32", "float16 and float64", "float64 and float16"],
)
def test_sums_squares_up_in_float32_or_better(attempt, rng, dtypes):
    grads = [300 * g.sign() for g in some_grads(rng) if g is not None]  # float16 ends at 65504
    grads = [g.to(dtypes[i % len(dtypes)]) for i, g in enumerate(grads)]

    norm, clipped = attempt(clip, grads, 1e-3)  # a factor of which float16 holds few digits

    expected_norm, expected = clip(oracle, [g.double() for g in grads], 1e-3)
    assert_close(norm, expected_norm if torch.float64 in dtypes else expected_norm.float())
    for after, e, grad in zip(clipped, expected, grads, strict=True):
        # One rounding each of the norm, of the factor and of the product.
        tolerance = 2 * torch.finfo(grad.dtype).eps
        assert_close(after, e.to(grad.dtype), rtol=max(tolerance, 1e-7), atol=0.0)


@pytest.mark.parametrize("grads", [[], [None], [0.0, 0.0]], ids=["nothing", "None", "zeros"])
def test_has_a_norm_of_zero_where_there_is_nothing_to_clip(attempt, grads):
    grads = [None if g is None else torch.full((2,), g) for g in grads]

    norm, clipped = attempt(clip, grads, 1.0)

    assert_close((norm, clipped), (torch.tensor(0.0), grads))


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=["inf", "nan"])
def test_refuses_a_norm_that_is_not_finite_and_changes_nothing(attempt, rng, bad):
    grads = [torch.randn(3, generator=rng), torch.tensor([1.0, bad])]

    refused, after = attempt(clip_or_refuse, grads, 0.5)

    assert_close((refused, after), (True, grads))
