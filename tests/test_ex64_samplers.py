"""Specs for exercise 64: samplers, DDPM and DDIM."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

SPACINGS = ["leading", "trailing", "linspace"]
pairs = pytest.mark.parametrize(("t", "prev"), [(4, 3), (4, 1), (3, 0), (2, -1), (0, -1), (1, 0)])


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def some_betas(rng, n_steps):
    return 0.05 + 0.4 * torch.rand(n_steps, generator=rng, dtype=torch.float64)


# --- run on the code under test ------------------------------------------------------------------


def timesteps(ex, *arguments):
    return ex.timesteps(*arguments)


def step(ex, name, *arguments):
    return getattr(ex, name)(*arguments)


def steps_in_turn(ex, name, x, eps, t, prev, schedules, *more):
    """With each schedule, all in the same tensor in turn."""
    betas = torch.empty_like(schedules[0])
    return [getattr(ex, name)(x, eps, t, prev, betas.copy_(s), *more) for s in schedules]


def of_gaussian(betas, mean, deviation, seen=None):
    """A model that knows what noise to expect in data that are Gaussian."""
    left = (1 - betas).cumprod(0)

    def model(x, t):
        if seen is not None:
            seen.append((x.clone(), t.clone()))
        share = left[t].view(-1, *[1] * (x.dim() - 1))
        whole = share * deviation**2 + 1 - share
        return (1 - share).sqrt() * (x - share.sqrt() * mean) / whole

    return model


def sample(ex, x, steps, betas, mean, deviation, *more):
    return ex.sample(of_gaussian(betas, mean, deviation), x, steps, betas, *more)


def sample_and_look(ex, x, steps, betas, *more):
    """The result, what the model was asked, and x afterwards."""
    seen = []
    out = ex.sample(of_gaussian(betas, 0.5, 0.3, seen), x, steps, betas, *more)
    return out, [s for s, _ in seen], [t for _, t in seen], x


def sample_with_weights(ex, x, steps, betas):
    """Whether the calls and the result are recorded for a backward pass, and grad mode after."""
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    recorded = []

    def model(x, t):
        out = weight * x
        recorded.append(out.requires_grad)
        return out

    out = ex.sample(model, x, steps, betas)
    return any(recorded), out.requires_grad, torch.is_grad_enabled()


# --- what is right -------------------------------------------------------------------------------


def left_after(betas, t):
    return math.prod(1 - beta for beta in betas[: t + 1].tolist())


def stepped(x, eps, t, prev, betas, eta, noise):
    """By the posterior of x after prev for η = 1, else by the definition, in plain numbers."""
    after, before = left_after(betas, t), left_after(betas, prev)
    x_0 = (x - math.sqrt(1 - after) * eps) / math.sqrt(after)
    kept = after / before
    variance = (1 - before) * (1 - kept) / (1 - after)
    if eta == 1:
        of_x_0 = math.sqrt(before) * (1 - kept) / (1 - after)
        of_x = math.sqrt(kept) * (1 - before) / (1 - after)
        return of_x_0 * x_0 + of_x * x + math.sqrt(variance) * noise
    sigma = eta * math.sqrt(variance)
    direction = math.sqrt(max(1 - before - sigma**2, 0))
    return math.sqrt(before) * x_0 + direction * eps + (sigma * noise if eta else 0)


def chosen(n_steps, n, spacing):
    """With fractions, which round exactly, halves to even."""
    if spacing == "leading":
        steps = [k * (n_steps // n) for k in range(n)]
    elif spacing == "trailing":
        steps = [round(Fraction(k * n_steps, n)) - 1 for k in range(1, n + 1)]
    else:
        steps = [round(Fraction(k * (n_steps - 1), n - 1)) for k in range(n)]
    return steps[::-1]


# --- which steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("leading", [6, 4, 2, 0]), ("trailing", [9, 7, 4, 1]), ("linspace", [9, 6, 3, 0])],
)
def test_timesteps_of_ten_steps(attempt, spacing, expected):
    assert_close(attempt(timesteps, 10, 4, spacing), expected)


@given(n_steps=st.integers(2, 120), n=st.integers(2, 120), spacing=st.sampled_from(SPACINGS))
def test_timesteps_fall_as_the_spacing_says(attempt, n_steps, n, spacing):
    n = min(n, n_steps)

    assert_close(attempt(timesteps, n_steps, n, spacing), chosen(n_steps, n, spacing))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("n_steps", "n"), [(1000, 1000), (1000, 50), (1000, 7), (2, 2), (15, 6)])
def test_timesteps_without_further_words_are_trailing(attempt, n_steps, n, spacing):
    assert_close(attempt(timesteps, n_steps, n), chosen(n_steps, n, "trailing"))
    assert_close(attempt(timesteps, n_steps, n, spacing), chosen(n_steps, n, spacing))


def test_a_single_timestep_is_the_first_or_the_last(attempt):
    assert_close(attempt(timesteps, 9, 1, "leading"), [0])
    assert_close(attempt(timesteps, 9, 1, "trailing"), [8])
    assert_close(attempt(timesteps, 1, 1, "trailing"), [0])


@pytest.mark.parametrize(
    ("n", "spacing"),
    [
        *((n, spacing) for n in (11, 0, -2) for spacing in SPACINGS),
        *((4, spacing) for spacing in ("even", "", "Leading")),
        (1, "linspace"),
    ],
)
def test_timesteps_refuse_numbers_and_spacings_that_there_are_not(attempt, n, spacing):
    with pytest.raises(ValueError):
        attempt(timesteps, 10, n, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_agree_with_diffusers(attempt, spacing):
    outs = [attempt(timesteps, 1000, n, spacing) for n in (2, 10, 30, 999)]

    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    oracle = DDIMScheduler(timestep_spacing=spacing)
    for out, n in zip(outs, (2, 10, 30, 999), strict=True):
        oracle.set_timesteps(n)
        assert_close(out, oracle.timesteps.tolist())


# --- one step ------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_keeps_the_guess_and_the_direction_and_adds_noise_by_eta(attempt, rng, t, prev, eta):
    betas, x = some_betas(rng, 5), randn(rng, 3, 4, 2).mT
    eps, noise = randn(rng, 3, 2, 4), randn(rng, 3, 2, 4)

    out = attempt(step, "ddim_step", x, eps, t, prev, betas, eta, noise)

    assert_close(out, stepped(x, eps, t, prev, betas, eta, noise))


@pairs
def test_ddim_draws_nothing_of_its_own(attempt, rng, t, prev):
    betas, x, eps = some_betas(rng, 5), randn(rng, 3, 2), randn(rng, 3, 2)

    outs = [attempt(step, "ddim_step", x, eps, t, prev, betas) for _ in range(2)]
    given = attempt(step, "ddim_step", x, eps, t, prev, betas, 0.0, randn(rng, 3, 2))

    expected = stepped(x, eps, t, prev, betas, 0, None)
    assert_close([*outs, given], [expected] * 3)


@pairs
def test_ddpm_draws_from_the_posterior_of_the_guess(attempt, rng, t, prev):
    betas, x = some_betas(rng, 5), randn(rng, 3, 4, 2).mT
    eps, noise = randn(rng, 3, 2, 4), randn(rng, 3, 2, 4)

    out = attempt(step, "ddpm_step", x, eps, t, prev, betas, noise)

    assert_close(out, stepped(x, eps, t, prev, betas, 1, noise))


@pytest.mark.parametrize("name", ["ddpm_step", "ddim_step"])
def test_the_step_to_the_data_gives_the_guess_without_noise(attempt, rng, name):
    betas = some_betas(rng, 5)
    x_0, eps, noise = randn(rng, 3, 2), randn(rng, 3, 2), 100 * randn(rng, 3, 2)

    for t in (0, 2, 4):
        left = left_after(betas, t)
        x = math.sqrt(left) * x_0 + math.sqrt(1 - left) * eps
        more = (1.0, noise) if name == "ddim_step" else (noise,)
        assert_close(attempt(step, name, x, eps, t, -1, betas, *more), x_0)


def test_ddim_goes_straight_where_the_noise_is_known(attempt, rng):
    # Whoever knows ε of x_t lands at the x_prev of the same x_0 and ε.
    betas, x_0, eps = some_betas(rng, 9), randn(rng, 3, 2), randn(rng, 3, 2)
    shares = [(math.sqrt(a), math.sqrt(1 - a)) for a in (left_after(betas, t) for t in range(9))]

    for t, prev in ((8, 0), (8, 7), (5, 2)):
        x, expected = (signal * x_0 + spread * eps for signal, spread in (shares[t], shares[prev]))
        assert_close(attempt(step, "ddim_step", x, eps, t, prev, betas), expected)


@pytest.mark.parametrize("name", ["ddpm_step", "ddim_step"])
@pytest.mark.parametrize("shape", [(), (4,), (0, 3), (1, 1), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_keep_shape_and_dtype(attempt, rng, name, shape, dtype):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    x, eps, noise = (randn(rng, *shape).to(dtype) for _ in range(3))
    more = (1.0, noise) if name == "ddim_step" else (noise,)

    out = attempt(step, name, x, eps, 500, 430, betas, *more)

    expected = stepped(x.double(), eps.double(), 500, 430, betas, 1, noise.double())
    # Roundings of x_0, which is 3.6 times as large as x, and of the sum.
    wide = {} if dtype == torch.float64 else {"rtol": 0.0, "atol": 40 * torch.finfo(dtype).eps}
    assert_close(out, expected.to(dtype), **wide)


@pytest.mark.parametrize("name", ["ddpm_step", "ddim_step"])
def test_factors_are_worked_out_in_float64(attempt, name):
    # 1 − ᾱ of the first steps is 10⁻⁴, of which float32 knows three digits. All is x, nothing ε.
    betas, x = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), torch.ones(1)
    zeros = torch.zeros(1)
    more = (0.5, zeros) if name == "ddim_step" else (zeros,)

    for t, prev in ((1, 0), (2, 0), (999, 998)):
        out = attempt(step, name, zeros, x, t, prev, betas, *more)

        eta = 0.5 if name == "ddim_step" else 1
        ones = torch.ones(1, dtype=torch.float64)
        expected = stepped(0 * ones, ones, t, prev, betas, eta, 0 * ones)
        # The result is a difference of products, each rounded to float32.
        assert_close(out, expected.float(), rtol=0.0, atol=2e-7 / math.sqrt(left_after(betas, t)))


@pytest.mark.parametrize("name", ["ddpm_step", "ddim_step"])
def test_steps_go_by_the_betas_of_each_call(attempt, rng, name):
    x, eps, noise = randn(rng, 3, 2), randn(rng, 3, 2), randn(rng, 3, 2)
    schedules = [some_betas(rng, 5) for _ in range(3)]
    more = (1.0, noise) if name == "ddim_step" else (noise,)

    outs = attempt(steps_in_turn, name, x, eps, 3, 1, schedules, *more)

    assert_close(outs, [stepped(x, eps, 3, 1, betas, 1, noise) for betas in schedules])


@pytest.mark.parametrize("name", ["ddpm_step", "ddim_step"])
@pytest.mark.parametrize(("t", "prev"), [(5, 2), (2, 2), (2, 3), (-1, -1), (-1, -2), (3, -2)])
def test_steps_refuse_what_leads_nowhere(attempt, rng, name, t, prev):
    betas, x = some_betas(rng, 5), randn(rng, 2, 3)
    more = (0.5, x) if name == "ddim_step" else (x,)

    with pytest.raises(ValueError):
        attempt(step, name, x, x, t, prev, betas, *more)


@pytest.mark.parametrize(("eta", "noisy"), [(-0.1, True), (1.1, True), (0.3, False), (1.0, False)])
def test_ddim_refuses_another_eta_and_an_eta_without_noise(attempt, rng, eta, noisy):
    betas, x = some_betas(rng, 5), randn(rng, 2, 3)

    with pytest.raises(ValueError):
        attempt(step, "ddim_step", x, x, 3, 1, betas, eta, x if noisy else None)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_steps_agree_with_diffusers(attempt, rng, eta):
    betas = torch.linspace(1e-3, 0.05, 100, dtype=torch.float64)
    x, eps, noise = (randn(rng, 2, 6) for _ in range(3))
    moves = [(75, 50), (50, 25), (25, 0)]

    outs = [attempt(step, "ddim_step", x, eps, t, prev, betas, eta, noise) for t, prev in moves]

    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    # Its step to an earlier time is right for "leading" alone.
    oracle = DDIMScheduler(
        100, trained_betas=betas.numpy(), clip_sample=False, timestep_spacing="leading"
    )
    oracle.set_timesteps(4)
    for out, (t, _) in zip(outs, moves, strict=True):
        found = oracle.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
        assert_close(out, found, rtol=1e-4, atol=1e-4)  # its ᾱ is float32


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [[6, 4, 1], [3], [6, 5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("shape", [(3, 2), (1,), (2, 1, 3)])
def test_sample_takes_all_steps_to_the_data(attempt, rng, shape, steps, eta):
    betas, x = some_betas(rng, 7), randn(rng, *shape)
    noise = randn(rng, len(steps), *shape)
    more = (eta, noise) if eta else ()

    out = attempt(sample, x, steps, betas, 0.4, 0.7, *more)

    model, expected = of_gaussian(betas, 0.4, 0.7), x
    for i, (t, prev) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        eps = model(expected, torch.full((len(x),), t))
        expected = stepped(expected, eps, t, prev, betas, eta, noise[i])
    assert_close(out, expected)


def test_sample_asks_the_model_once_a_step_with_the_whole_batch_and_leaves_x(attempt, rng):
    betas, x, steps = some_betas(rng, 7), randn(rng, 4, 2), [6, 3, 1]

    _, images, asked, after = attempt(sample_and_look, x, steps, betas)

    assert_close(asked, [torch.full((4,), t) for t in steps])
    assert_close(images[0], x)
    assert_close(after, x)


def test_sample_records_no_graph(attempt, rng):
    recorded = attempt(sample_with_weights, randn(rng, 2, 3), [4, 2, 0], some_betas(rng, 5))

    assert_close(recorded, (False, False, True))


def test_sample_takes_an_empty_batch(attempt, rng):
    out = attempt(sample, randn(rng, 0, 3), [4, 1], some_betas(rng, 5), 0.4, 0.7)

    assert_close(out, torch.zeros(0, 3, dtype=torch.float64))


def test_many_steps_without_noise_carry_noise_to_gaussian_data_along_the_flow(attempt, rng):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    x, mean, deviation = randn(rng, 6), 0.5, 0.3
    steps = list(range(999, -1, -1))

    out = attempt(sample, x, steps, betas, mean, deviation)

    # The flow keeps how many deviations a number is from the mean.
    left = left_after(betas, 999)
    apart = (x - math.sqrt(left) * mean) / math.sqrt(left * deviation**2 + 1 - left)
    # Steps are finite: each is off by the square of its size, a thousand by some thousandths.
    assert_close(out, mean + deviation * apart, rtol=0.0, atol=0.02)


def test_many_steps_with_noise_give_gaussian_data_their_mean_and_spread(attempt, rng):
    n_steps, mean, deviation = 400, 0.5, 0.3
    betas = torch.linspace(2.5e-4, 0.05, n_steps, dtype=torch.float64)
    # All is linear: the first row shows the mean, and each other row one draw's share.
    x = torch.eye(n_steps + 1, 1, dtype=torch.float64).roll(1, 0)
    noise = torch.eye(n_steps + 1, dtype=torch.float64)[2:, :, None]
    noise = torch.cat((noise, torch.zeros(1, n_steps + 1, 1, dtype=torch.float64)))

    out = attempt(sample, x, list(range(n_steps - 1, -1, -1)), betas, mean, deviation, 1.0, noise)

    spread = (out[1:] - out[0]).square().sum().sqrt()
    # β̃ is a little too small for data that have a spread, the less so the more steps there are.
    assert_close(out[0, 0], torch.tensor(mean).double(), rtol=0.0, atol=0.01)
    assert_close(spread, torch.tensor(deviation).double(), rtol=0.05, atol=0.0)
