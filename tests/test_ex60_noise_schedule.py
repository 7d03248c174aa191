"""Specs for exercise 60: noise schedule."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu


def linear(ex, *arguments, **options):
    return ex.linear_betas(*arguments, **options)


def cosine(ex, *arguments, **options):
    return ex.cosine_betas(*arguments, **options)


def step(ex, x, t, betas, noise):
    return ex.q_step(x, t, betas, noise)


def sample(ex, x_0, t, betas, noise):
    return ex.q_sample(x_0, t, betas, noise)


def schedules(ex, settings):
    """One schedule after the other; each is overwritten once it has been read."""
    found = []
    for name, n_steps, options in settings:
        betas = getattr(ex, name)(n_steps, **options)
        found.append(betas.clone())
        betas.zero_()
    return found


def with_each(ex, name, x, t, schedules, noise):
    """What q_step or q_sample makes of x with each schedule, all in the same tensor in turn."""
    betas, found = torch.empty_like(schedules[0]), []
    for schedule in schedules:
        found.append(getattr(ex, name)(x, t, betas.copy_(schedule), noise))
    return found


def gradients(ex, name, x, t, betas, noise, upstream):
    inputs = [y.clone().requires_grad_() for y in (x, noise)]
    out = getattr(ex, name)(inputs[0], t, betas, inputs[1])
    return torch.autograd.grad(out, inputs, upstream, allow_unused=True)


def walk(ex, x, betas, noises):
    """x after each step, one step after the other."""
    images = []
    for t, noise in enumerate(noises):
        x = ex.q_step(x, torch.full((len(x),), t), betas, noise)
        images.append(x)
    return torch.stack(images)


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def some_betas(rng, n_steps):
    return 0.05 + 0.4 * torch.rand(n_steps, generator=rng, dtype=torch.float64)


def alpha_bar(betas, t):
    return math.prod(1 - beta for beta in betas[: t + 1].tolist())


def factors(name, betas, t):
    """Those of the image and of the noise, in float64, for each t."""
    kept = [alpha_bar(betas, s) if name == "q_sample" else 1 - betas[s].item() for s in t.tolist()]
    kept = torch.tensor(kept, dtype=torch.float64)
    return kept.sqrt(), (1 - kept).sqrt()


def signal_left(share, offset=0.008):
    return math.cos((share + offset) / (1 + offset) * math.pi / 2) ** 2


@pytest.mark.parametrize(
    ("n_steps", "ends"), [(5, (0.1, 0.3)), (4, (0.3, 0.1)), (1, ()), (2, ()), (100, ())]
)
def test_linear_betas_go_evenly_from_the_first_to_the_last(attempt, n_steps, ends):
    out = attempt(linear, n_steps, *ends)

    first, last = ends or (1e-4, 0.02)
    step = (last - first) / max(n_steps - 1, 1)
    expected = [first + k * step for k in range(n_steps)]
    assert_close(out, torch.tensor(expected, dtype=torch.float64))


def test_cosine_betas_let_the_signal_fall_like_a_squared_cosine(attempt):
    n_steps, offset = 7, 0.02

    betas = attempt(cosine, n_steps, offset=offset)

    shares = [signal_left(k / n_steps, offset) for k in range(n_steps)]
    expected = [1 - after / before for before, after in pairwise(shares)]
    assert_close(betas, torch.tensor([*expected, 0.999], dtype=torch.float64))


@pytest.mark.parametrize(("n_steps", "largest"), [(6, 0.4), (9, 0.07), (1, 0.9)])
def test_cosine_betas_stay_at_or_below_the_largest_allowed(attempt, n_steps, largest):
    betas = attempt(cosine, n_steps, largest=largest)

    shares = [signal_left(k / n_steps) for k in range(n_steps + 1)]
    expected = [min(1 - b / a, largest) for a, b in pairwise(shares)]
    assert_close(betas, torch.tensor(expected, dtype=torch.float64))


def test_both_schedules_are_made_anew_for_every_call(attempt):
    settings = [("linear_betas", 3, {}), ("linear_betas", 3, {"last": 0.5})]
    settings += [("cosine_betas", 3, {}), ("cosine_betas", 3, {"offset": 0.5})]
    settings += [("cosine_betas", 3, {"largest": 0.3}), ("linear_betas", 3, {})]
    settings += [("cosine_betas", 3, {})]

    in_turn = attempt(schedules, settings)

    assert_close(in_turn, [attempt(schedules, [setting])[0] for setting in settings])


def test_q_step_shrinks_the_image_and_adds_noise_for_each_sample_by_its_own_step(attempt, rng):
    x, noise, betas = randn(rng, 5, 3, 2).mT, randn(rng, 5, 2, 3), some_betas(rng, 4)
    t = torch.tensor([3, 0, 1, 3, 2])

    out = attempt(step, x, t, betas, noise)

    expected = [
        math.sqrt(1 - betas[s]) * x[i] + math.sqrt(betas[s]) * noise[i] for i, s in enumerate(t)
    ]
    assert_close(out, torch.stack(expected))


def test_q_sample_adds_the_noise_of_all_steps_for_each_sample_up_to_its_own(attempt, rng):
    x_0, noise, betas = randn(rng, 5, 2, 3), randn(rng, 5, 3, 2).mT, some_betas(rng, 4)
    t = torch.tensor([3, 0, 1, 3, 2])

    out = attempt(sample, x_0, t, betas, noise)

    left = [alpha_bar(betas, s) for s in t.tolist()]
    expected = [math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * noise[i] for i, a in enumerate(left)]
    assert_close(out, torch.stack(expected))


def test_q_sample_has_the_mean_and_the_variance_of_many_q_steps(attempt, rng):
    n_steps = 6
    betas = some_betas(rng, n_steps)
    # Row 0: the image 1 and no noise. Row 1 + s: no image, and the noise 1 in step s alone.
    # What comes out are the factors of the image and of each step's noise.
    x_0 = torch.eye(n_steps + 1, 1, dtype=torch.float64)
    noises = torch.eye(n_steps + 1, dtype=torch.float64)[1:, :, None]
    t = torch.arange(n_steps)
    ones, zeros = torch.ones(n_steps, 1).double(), torch.zeros(n_steps, 1).double()

    walked = attempt(walk, x_0, betas, noises)
    mean = attempt(sample, ones, t, betas, zeros)
    spread = attempt(sample, zeros, t, betas, ones)

    assert_close(mean, walked[:, 0])
    assert_close(spread**2, walked[:, 1:].square().sum(1))


@pytest.mark.parametrize("shape", [(4,), (0, 3), (1, 3), (3, 3), (2, 1, 3, 5), (1, 2, 3, 5)])
def test_both_take_samples_of_any_shape(attempt, rng, shape):
    x, noise, betas = 50 * randn(rng, *shape), randn(rng, *shape), some_betas(rng, 7)
    t = torch.randint(7, shape[:1], generator=rng)

    stepped = attempt(step, x, t, betas, noise)
    sampled = attempt(sample, x, t, betas, noise)

    beta = betas[t].view(-1, *[1] * (len(shape) - 1))
    left = torch.tensor([alpha_bar(betas, s) for s in t.tolist()], dtype=torch.float64)
    left = left.view(beta.shape)
    assert_close(stepped, (1 - beta) ** 0.5 * x + beta**0.5 * noise)
    assert_close(sampled, left**0.5 * x + (1 - left) ** 0.5 * noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q_step", "q_sample"])
def test_both_keep_the_dtype_of_the_samples(attempt, rng, name, dtype):
    x, noise = randn(rng, 3, 4).to(dtype), randn(rng, 3, 4).to(dtype)
    betas, t = some_betas(rng, 5), torch.tensor([4, 0, 2])

    (out,) = attempt(with_each, name, x, t, [betas], noise)

    signal, spread = factors(name, betas, t)
    expected = signal[:, None] * x.double() + spread[:, None] * noise.double()
    # Factors, products and the sum are rounded, each by half an eps of what may be 4.
    assert_close(out, expected.to(dtype), rtol=0.0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q_step", "q_sample"])
def test_both_round_no_factor_before_it_is_finished(attempt, name, dtype):
    # In bfloat16 1 − 0.0001 is 1, so the first steps would add nothing and 1000 take nothing away.
    # Half of the samples are all signal, the others all noise: out come the factors as they are.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t = torch.arange(0, 1000, 37).repeat(2)
    x = torch.arange(2, dtype=dtype).repeat_interleave(len(t) // 2)

    (out,) = attempt(with_each, name, x, t, [betas], 1 - x)

    signal, spread = factors(name, betas, t)
    assert_close(out, torch.where(x == 1, signal, spread).to(dtype), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["q_step", "q_sample"])
def test_both_go_by_the_betas_of_each_call(attempt, rng, name):
    x, noise, t = randn(rng, 3, 4), randn(rng, 3, 4), torch.tensor([4, 0, 2])
    edges = torch.tensor([0.0, 0.3, 1.0, 0.2, 0.1], dtype=torch.float64)
    betas = [some_betas(rng, 5), edges, some_betas(rng, 5)]

    outs = attempt(with_each, name, x, t, betas, noise)

    for out, schedule in zip(outs, betas, strict=True):
        signal, spread = factors(name, schedule, t)
        assert_close(out, signal[:, None] * x + spread[:, None] * noise)


@pytest.mark.parametrize("name", ["q_step", "q_sample"])
def test_both_send_gradients_to_the_samples_and_the_noise(attempt, rng, name):
    x, noise, upstream = randn(rng, 3, 2, 4), randn(rng, 3, 2, 4), randn(rng, 3, 2, 4)
    betas, t = some_betas(rng, 5), torch.tensor([4, 0, 2])

    grads = attempt(gradients, name, x, t, betas, noise, upstream)

    signal, spread = factors(name, betas, t)
    assert_close(grads, (signal[:, None, None] * upstream, spread[:, None, None] * upstream))


@pytest.mark.parametrize("wrong", [-1, -3, 4, 90])
def test_both_reject_a_step_that_the_schedule_does_not_have(attempt, rng, wrong):
    x, noise, betas = randn(rng, 3, 2), randn(rng, 3, 2), some_betas(rng, 4)
    t = torch.tensor([1, wrong, 2])

    for run in (step, sample):
        with pytest.raises(IndexError):
            attempt(run, x, t, betas, noise)


betas = st.lists(st.floats(1e-4, 0.999), min_size=1, max_size=9)


@example(betas=[0.0, 0.0], which=1)  # steps that add nothing
@example(betas=[0.1, 1.0, 0.1], which=1)  # and one that leaves no signal
@given(betas=betas, which=st.integers(0, 8))
def test_signal_and_noise_have_variances_that_sum_to_one(attempt, betas, which):
    # One sample is all signal, the other all noise; what comes out are their factors.
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    noise = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    t = torch.full((2,), which % len(betas))

    for run in (step, sample):
        found = attempt(run, x, t, torch.tensor(betas, dtype=torch.float64), noise)

        assert_close(found.square().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_agrees_with_diffusers(attempt, rng, schedule):
    x_0, noise = randn(rng, 5, 2, 3).float(), randn(rng, 5, 2, 3).float()
    t = torch.tensor([0, 999, 1, 500, 20])

    betas = attempt({"linear": linear, "cosine": cosine}[schedule], 1000)
    out = attempt(sample, x_0, t, betas, noise)

    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    oracle = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    # The scheduler works in float32: its betas of 4·10⁻⁵ to 1 are differences from 1, so
    # they carry errors up to 10⁻⁷, and 1000 factors multiply them.
    assert_close(betas.float(), oracle.betas, rtol=1e-5, atol=1e-7)
    assert_close(out, oracle.add_noise(x_0, noise, t), rtol=1e-4, atol=1e-4)
