"""Specs for exercise 62: what a model predicts, and what an error in it weighs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

KINDS = ["x_0", "eps", "v", "mean"]
kinds = pytest.mark.parametrize("kind", KINDS)
convert = pytest.mark.parametrize("name", ["to_x0", "to_eps"])


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def uniform(rng, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)


def of(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# --- run on the code under test ------------------------------------------------------------------


def run(ex, name, *arguments):
    return getattr(ex, name)(*arguments)


def run_with_each(ex, name, arguments, schedules):
    """With each schedule, all in the same tensor in turn."""
    betas = torch.empty_like(schedules[0])
    return [getattr(ex, name)(*arguments, betas.copy_(schedule)) for schedule in schedules]


def gradients(ex, name, before, tensors, t, betas, upstream):
    inputs = [x.clone().requires_grad_() for x in tensors]
    out = getattr(ex, name)(*before, *inputs, t, betas)
    return torch.autograd.grad(out, inputs, upstream, allow_unused=True)


def weight(ex, kind, snr, *gamma):
    return ex.loss_weight(kind, snr, *gamma)


# --- what is right -------------------------------------------------------------------------------


def signal(betas, n):
    """ᾱ after n steps."""
    return math.prod(1 - beta for beta in betas[:n].tolist())


def each(values, x):
    """A number for each sample, in line with its first axis."""
    return of(*values).view(-1, *[1] * (x.dim() - 1))


def mixed(x_0, eps, t, betas):
    """x_t."""
    left = each([signal(betas, s + 1) for s in t.tolist()], x_0)
    return left.sqrt() * x_0 + (1 - left).sqrt() * eps


def predicted(kind, x_0, eps, t, betas):
    """What a perfect model would say."""
    if kind in ("x_0", "eps"):
        return {"x_0": x_0, "eps": eps}[kind]
    before, after = (each([signal(betas, s + n) for s in t.tolist()], x_0) for n in (0, 1))
    if kind == "v":
        return after.sqrt() * eps - (1 - after).sqrt() * x_0
    beta = each(betas[t].tolist(), x_0)
    shares = before.sqrt() * beta, (1 - beta).sqrt() * (1 - before)
    return (shares[0] * x_0 + shares[1] * mixed(x_0, eps, t, betas)) / (1 - after)


def case(rng, kind, shape=(5, 2, 3), n_steps=4, t=(3, 0, 1, 3, 2)):
    """x_0, ε, and the arguments from which they are to be found again."""
    x_0, eps, betas = randn(rng, *shape), randn(rng, *shape), uniform(rng, 0.05, 0.5, n_steps)
    t = torch.tensor(t) if t is not None else torch.randint(n_steps, shape[:1], generator=rng)
    given = (predicted(kind, x_0, eps, t, betas), mixed(x_0, eps, t, betas), t, betas)
    return {"to_x0": x_0, "to_eps": eps}, given


# --- v -------------------------------------------------------------------------------------------


def test_v_is_the_noise_less_the_image_each_by_the_share_of_the_other(attempt, rng):
    x_0, eps, betas = randn(rng, 5, 3, 2).mT, randn(rng, 5, 2, 3), uniform(rng, 0.05, 0.5, 4)
    t = torch.tensor([3, 0, 1, 3, 2])

    out = attempt(run, "velocity_target", x_0, eps, t, betas)

    assert_close(out, predicted("v", x_0, eps, t, betas))


@given(left=st.floats(0.01, 0.999), x_0=st.floats(-9, 9), eps=st.floats(-9, 9))
def test_v_and_x_t_are_the_image_and_the_noise_turned_by_an_angle(attempt, left, x_0, eps):
    angle = math.acos(math.sqrt(left))

    out = attempt(run, "velocity_target", of(x_0), of(eps), torch.tensor([0]), of(1 - left))

    assert_close(out, of(math.cos(angle) * eps - math.sin(angle) * x_0))


@pytest.mark.parametrize("shape", [(4,), (0, 3), (1, 3), (3, 3), (2, 1, 3, 5), (1, 2, 3, 5)])
def test_v_takes_samples_of_any_shape(attempt, rng, shape):
    x_0, eps, betas = 50 * randn(rng, *shape), randn(rng, *shape), uniform(rng, 0.05, 0.5, 7)
    t = torch.randint(7, shape[:1], generator=rng)

    out = attempt(run, "velocity_target", x_0, eps, t, betas)

    assert_close(out, predicted("v", x_0, eps, t, betas))


def test_v_is_all_image_where_no_signal_is_left(attempt, rng):
    x_0, eps = randn(rng, 2, 3), randn(rng, 2, 3)

    out = attempt(run, "velocity_target", x_0, eps, torch.tensor([1, 0]), of(0.36, 1.0))

    assert_close(out, torch.stack([-x_0[0], 0.8 * eps[1] - 0.6 * x_0[1]]))


def test_v_agrees_with_diffusers(attempt, rng):
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    x_0, eps, t = randn(rng, 4, 6), randn(rng, 4, 6), torch.tensor([49, 0, 7, 30])

    out = attempt(run, "velocity_target", x_0, eps, t, betas)

    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    oracle = DDPMScheduler(trained_betas=betas.numpy()).get_velocity(x_0, eps, t)
    assert_close(out, oracle, rtol=1e-4, atol=1e-4)  # its ᾱ is float32


# --- from one to another -------------------------------------------------------------------------


@convert
@kinds
def test_both_find_what_a_perfect_prediction_was_made_of(attempt, rng, name, kind):
    made_of, given = case(rng, kind)

    out = attempt(run, name, kind, *given)

    assert_close(out, made_of[name])


@convert
@kinds
def test_both_take_any_prediction(attempt, rng, name, kind):
    _, (_, x_t, t, betas) = case(rng, kind)
    prediction = randn(rng, 5, 3, 2).mT

    out = attempt(run, name, kind, prediction, x_t, t, betas)
    other = attempt(run, "to_eps" if name == "to_x0" else "to_x0", kind, prediction, x_t, t, betas)

    # Right is what leads back to the prediction and to x_t.
    x_0, eps = (out, other) if name == "to_x0" else (other, out)
    assert_close(predicted(kind, x_0, eps, t, betas), prediction)
    assert_close(mixed(x_0, eps, t, betas), x_t)


@convert
@kinds
@pytest.mark.parametrize("shape", [(4,), (0, 3), (1, 3), (3, 3), (2, 1, 3, 5)])
def test_both_take_samples_of_any_shape(attempt, rng, name, kind, shape):
    made_of, given = case(rng, kind, shape, 7, None)

    out = attempt(run, name, kind, *given)

    assert_close(out, made_of[name])


@convert
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_work_in_float64_and_round_once(attempt, rng, name, kind, dtype):
    _, (prediction, x_t, t, _) = case(rng, kind, (9, 40), 1000, (999, 0, 1, 5, 20, 90, 400, 7, 998))
    betas = torch.linspace(1e-4, 0.01, 1000, dtype=torch.float64)
    prediction, x_t = prediction.to(dtype), x_t.to(dtype)

    out = attempt(run, name, kind, prediction, x_t, t, betas)
    wide = attempt(run, name, kind, prediction.double(), x_t.double(), t, betas)

    # Where the last digits of float64 differ, a result may round the other way.
    assert_close(out, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_v_is_worked_out_in_float64_and_rounded_once(attempt, rng, dtype):
    betas, t = torch.linspace(1e-4, 0.01, 1000, dtype=torch.float64), torch.tensor([999, 0, 300])
    x_0, eps = randn(rng, 3, 50).to(dtype), randn(rng, 3, 50).to(dtype)

    out = attempt(run, "velocity_target", x_0, eps, t, betas)

    expected = predicted("v", x_0.double(), eps.double(), t, betas).to(dtype)
    assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0.0)


@convert
@kinds
def test_both_go_by_the_betas_of_each_call(attempt, rng, name, kind):
    _, (prediction, x_t, t, _) = case(rng, kind)
    schedules = [uniform(rng, 0.05, 0.5, 4) for _ in range(3)]

    in_turn = attempt(run_with_each, name, (kind, prediction, x_t, t), schedules)

    apart = [attempt(run, name, kind, prediction, x_t, t, betas) for betas in schedules]
    assert_close(in_turn, apart)


@pytest.mark.parametrize("kind", ["x_0", "v", "mean"])
def test_both_know_steps_that_leave_no_signal(attempt, rng, kind):
    made_of, _ = case(rng, kind, (2, 3), 3, (2, 0))
    betas, t = of(0.36, 0.2, 1.0), torch.tensor([2, 0])
    x_0, eps = made_of["to_x0"], made_of["to_eps"]
    given = (predicted(kind, x_0, eps, t, betas), mixed(x_0, eps, t, betas), t, betas)

    assert_close(attempt(run, "to_x0", kind, *given), x_0)
    assert_close(attempt(run, "to_eps", kind, *given), eps)


def test_noise_stays_what_it_is_where_no_signal_is_left(attempt, rng):
    eps, x_t, betas = randn(rng, 2, 3), randn(rng, 2, 3), of(0.36, 1.0, 0.3)

    out = attempt(run, "to_eps", "eps", eps, x_t, torch.tensor([1, 2]), betas)

    assert_close(out, eps)


def test_a_little_signal_is_enough(attempt, rng):
    x_0, eps, t = randn(rng, 1, 3), randn(rng, 1, 3), torch.tensor([0])
    betas = of(1 - 1e-12)  # a cosine schedule ends not far from it

    out = attempt(run, "to_x0", "eps", eps, mixed(x_0, eps, t, betas), t, betas)

    # √ᾱ is 10⁻⁶, by which roundings of float64 are divided.
    assert_close(out, x_0, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "kind", "t"),
    [
        ("to_x0", "eps", (0, 1)),
        ("to_x0", "eps", (2, 2)),
        ("to_x0", "mean", (0, 2)),
        ("to_eps", "mean", (2, 1)),
    ],
)
def test_a_prediction_that_tells_nothing_of_the_image_is_refused(attempt, rng, name, kind, t):
    betas = of(0.36, 1.0, 0.3)

    with pytest.raises(ValueError, match="signal"):
        attempt(run, name, kind, randn(rng, 2, 3), randn(rng, 2, 3), torch.tensor(t), betas)


@convert
@kinds
def test_both_send_gradients_to_prediction_and_image(attempt, rng, name, kind):
    _, (prediction, x_t, t, betas) = case(rng, kind)
    upstream = randn(rng, 5, 2, 3)

    grads = attempt(gradients, name, [kind], (prediction, x_t), t, betas, upstream)

    # Both are linear, so images of ones show the slopes; None stands for a slope of 0.
    ones, zeros = torch.ones(5, 2, 3).double(), torch.zeros(5, 2, 3).double()
    slopes = [
        attempt(run, name, kind, ones, zeros, t, betas),
        attempt(run, name, kind, zeros, ones, t, betas),
    ]
    for grad, slope in zip(grads, slopes, strict=True):
        assert_close(zeros if grad is None else grad, slope * upstream)


def test_v_sends_gradients_to_image_and_noise(attempt, rng):
    x_0, eps, upstream = randn(rng, 3, 2, 4), randn(rng, 3, 2, 4), randn(rng, 3, 2, 4)
    betas, t = uniform(rng, 0.05, 0.5, 5), torch.tensor([4, 0, 2])

    grads = attempt(gradients, "velocity_target", [], (x_0, eps), t, betas, upstream)

    left = each([signal(betas, s + 1) for s in t.tolist()], x_0)
    assert_close(grads, (-((1 - left).sqrt()) * upstream, left.sqrt() * upstream))


@pytest.mark.parametrize("kind", ["x0", "epsilon", "", "X_0", "noise"])
def test_both_name_the_kinds_that_there_are(attempt, rng, kind):
    _, given = case(rng, "v")

    for name in ("to_x0", "to_eps"):
        with pytest.raises(ValueError, match=r"(?=.*x_0)(?=.*eps)(?=.*\bv\b)(?=.*mean)"):
            attempt(run, name, kind, *given)


@pytest.mark.parametrize("wrong", [-1, -4, 4, 90])
def test_all_reject_a_step_that_the_schedule_does_not_have(attempt, rng, wrong):
    x, betas, t = randn(rng, 3, 2), uniform(rng, 0.05, 0.5, 4), torch.tensor([1, wrong, 2])

    for kind in KINDS:
        for name in ("to_x0", "to_eps"):
            with pytest.raises(IndexError):
                attempt(run, name, kind, x, x, t, betas)
    with pytest.raises(IndexError):
        attempt(run, "velocity_target", x, x, t, betas)


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
def test_x_0_agrees_with_diffusers(attempt, rng, kind):
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    t = torch.tensor([49, 1, 7, 30])
    prediction, x_t = randn(rng, 4, 6), randn(rng, 4, 6)

    out = attempt(run, "to_x0", kind, prediction, x_t, t, betas)

    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    theirs = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}[kind]
    oracle = DDIMScheduler(trained_betas=betas.numpy(), prediction_type=theirs, clip_sample=False)
    oracle.set_timesteps(50)
    for i, s in enumerate(t.tolist()):
        found = oracle.step(prediction[[i]], s, x_t[[i]]).pred_original_sample
        assert_close(out[[i]], found, rtol=1e-3, atol=1e-3)  # its ᾱ is float32


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [5.0, 0.5, 20.0, math.inf])
@pytest.mark.parametrize("kind", ["x_0", "eps", "v"])
def test_weights_make_the_error_that_of_x_0_times_the_smaller_of_snr_and_gamma(
    attempt, rng, kind, gamma
):
    betas, t = uniform(rng, 0.01, 0.7, 9), torch.arange(9)
    x_t, x_0, guess = randn(rng, 9), randn(rng, 9), randn(rng, 9)
    left = of(*[signal(betas, s + 1) for s in range(9)])
    snr = left / (1 - left)

    out = attempt(weight, kind, snr, gamma)

    # The same guess of x_0, and the truth, in both coordinates.
    noises = [(x_t - left.sqrt() * x) / (1 - left).sqrt() for x in (guess, x_0)]
    made = [predicted(kind, x, e, t, betas) for x, e in zip((guess, x_0), noises, strict=True)]
    wanted = torch.tensor([min(s, gamma) for s in snr.tolist()], dtype=torch.float64)
    assert_close(out * (made[0] - made[1]) ** 2, wanted * (guess - x_0) ** 2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("x_0", [[0, 0.5, 4], [5, 5, 5]]),
        ("eps", [[1, 1, 1], [1, 0.625, 5e-9]]),
        ("v", [[0, 1 / 3, 0.8], [5 / 6, 5 / 9, 5 / (1e9 + 1)]]),
    ],
)
def test_weights_go_by_a_gamma_of_five_from_no_signal_to_no_noise(attempt, kind, expected):
    snr = torch.tensor([[0.0, 0.5, 4.0], [5.0, 8.0, 1e9]], dtype=torch.float64)

    out = attempt(weight, kind, snr)

    assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
def test_weights_are_like_the_snr(attempt, rng, shape, dtype):
    snr = (10 * torch.rand(shape, generator=rng)).to(dtype)

    for kind in ("x_0", "eps", "v"):
        out = attempt(weight, kind, snr, 2.0)

        kept = snr.double().clamp(max=2)
        per = {"x_0": 1.0, "eps": snr.double(), "v": snr.double() + 1}[kind]
        assert_close(out, (kept / per).to(dtype))


@pytest.mark.parametrize("kind", ["mean", "x0", "epsilon", ""])
def test_weights_name_the_kinds_that_there_are(attempt, kind):
    with pytest.raises(ValueError, match=r"(?=.*x_0)(?=.*eps)(?=.*\bv\b)"):
        attempt(weight, kind, of(1.0))
