"""Specs for exercise 61: the posterior and the ELBO."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from kata.testing import assert_close

pytestmark = pytest.mark.cpu


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def uniform(rng, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)


# --- run on the code under test ------------------------------------------------------------------


def posterior(ex, x_0, x_t, t, betas):
    return ex.posterior(x_0, x_t, t, betas)


def posterior_in_turn(ex, x_0, x_t, t, schedules):
    """With each schedule, all in the same tensor in turn."""
    betas = torch.empty_like(schedules[0])
    return [ex.posterior(x_0, x_t, t, betas.copy_(schedule)) for schedule in schedules]


def posterior_gradients(ex, x_0, x_t, t, betas, upstream):
    inputs = [x.clone().requires_grad_() for x in (x_0, x_t)]
    mean, _ = ex.posterior(inputs[0], inputs[1], t, betas)
    return torch.autograd.grad(mean, inputs, upstream, allow_unused=True)


def kl(ex, mean, variance, mean_2, variance_2):
    return ex.kl_normal(mean, variance, mean_2, variance_2)


def kl_gradients(ex, upstream, *arguments):
    inputs = [x.clone().requires_grad_() for x in arguments]
    return torch.autograd.grad(ex.kl_normal(*inputs), inputs, upstream, allow_unused=True)


def linear_model(slope, shift, variance, seen=None):
    """mean = slope_t · x_t + shift_t, and a variance for each step."""

    def model(x_t, t):
        if seen is not None:
            seen.append((x_t.detach().clone(), t.clone()))
        each = (-1, *[1] * (x_t.dim() - 1))
        mean = slope[t].view(each) * x_t + shift[t].view(each)
        found = variance[t]
        return mean, found if found.dim() > 1 else found.view(each)

    return model


def elbo(ex, x_0, slope, shift, variance, betas, noise):
    """variance: (n_steps,), or (n_steps, ...) with the shape of a sample."""
    return ex.elbo_terms(x_0, linear_model(slope, shift, variance), betas, noise)


def elbo_of_a_model_with_one_variance(ex, x_0, betas, noise, variance):
    return ex.elbo_terms(x_0, lambda x_t, t: (torch.tanh(x_t), variance), betas, noise)


def elbo_of_one_who_knows(ex, x_0, betas, noise):
    """The model is told x_0; for step 0 it takes a variance of 1."""

    def model(x_t, t):
        mean, variance = ex.posterior(x_0, x_t, t, betas)
        return mean, torch.where(variance > 0, variance, 1.0)

    return ex.elbo_terms(x_0, model, betas, noise)


def elbo_calls(ex, x_0, slope, shift, variance, betas, noise):
    """What the model was asked: the images and the steps."""
    seen = []
    ex.elbo_terms(x_0, linear_model(slope, shift, variance, seen), betas, noise)
    return [x_t for x_t, _ in seen], [t for _, t in seen]


def elbo_gradients(ex, x_0, slope, shift, variance, betas, noise, upstream):
    inputs = [x.clone().requires_grad_() for x in (slope, shift, variance)]
    terms = ex.elbo_terms(x_0, linear_model(*inputs), betas, noise)
    return torch.autograd.grad(terms, inputs, upstream, allow_unused=True)


def elbo_twice(ex, settings):
    return [elbo(ex, *setting) for setting in settings]


def bits(ex, *arguments, **options):
    return ex.bits_per_dim(*arguments, **options)


# --- what is right -------------------------------------------------------------------------------


def signal(betas, n):
    """ᾱ after n steps."""
    return math.prod(1 - beta for beta in betas[:n].tolist())


def factors(betas, t):
    """Of x_0 and of x_t in the mean, and the variance, for each t."""
    found = []
    for s in t.tolist():
        beta, before, after = betas[s].item(), signal(betas, s), signal(betas, s + 1)
        shares = math.sqrt(before) * beta, math.sqrt(1 - beta) * (1 - before), beta * (1 - before)
        found.append([share / (1 - after) for share in shares])
    return torch.tensor(found, dtype=torch.float64).view(-1, 3).unbind(1)


def by_integration(x_0, x_t, beta, before):
    """Mean and variance of Bayes' rule, prior times likelihood, summed on a fine grid."""
    x = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    prior = (x - math.sqrt(before) * x_0) ** 2 / (1 - before)
    likelihood = (x_t - math.sqrt(1 - beta) * x) ** 2 / beta
    weights = torch.softmax(-(prior + likelihood) / 2, 0)
    mean = (weights * x).sum()
    return mean, (weights * (x - mean) ** 2).sum()


def bound(x_0, model, betas, noise):
    """The terms, by torch.distributions."""
    terms = []
    for s in range(len(betas)):
        t = torch.full((len(x_0),), s)
        left = signal(betas, s + 1)
        x_t = math.sqrt(left) * x_0 + math.sqrt(1 - left) * noise[s]
        mean, variance = model(x_t, t)
        theirs = Normal(mean, variance.sqrt().expand_as(mean))
        if s == 0:
            terms.append(-theirs.log_prob(x_0))
        else:
            of_x_0, of_x_t, spread = (v[0] for v in factors(betas, t[:1]))
            target = Normal(of_x_0 * x_0 + of_x_t * x_t, spread.sqrt().expand_as(x_0))
            terms.append(kl_divergence(target, theirs))
    left = signal(betas, len(betas))
    last = Normal(math.sqrt(left) * x_0, math.sqrt(1 - left))
    terms.append(kl_divergence(last, Normal(0.0, 1.0)))
    return torch.stack([term.reshape(len(x_0), -1).sum(1) for term in terms])


def a_model(rng, n_steps, *shape):
    """Slopes, shifts and variances of a linear model."""
    variance = uniform(rng, 0.3, 2.0, n_steps, *shape)
    return uniform(rng, 0.2, 1.5, n_steps), randn(rng, n_steps), variance


# --- the posterior -------------------------------------------------------------------------------


def test_posterior_is_what_bayes_rule_gives_integrated_on_a_grid(attempt, rng):
    betas = uniform(rng, 0.1, 0.6, 5)
    t = torch.tensor([1, 2, 3, 4])
    x_0, x_t = randn(rng, 4), randn(rng, 4)

    mean, variance = attempt(posterior, x_0, x_t, t, betas)

    found = [
        by_integration(x_0[i].item(), x_t[i].item(), betas[s].item(), signal(betas, s))
        for i, s in enumerate(t.tolist())
    ]
    assert_close(mean, torch.stack([m for m, _ in found]))
    assert_close(variance, torch.stack([v for _, v in found]))


def test_posterior_goes_for_each_sample_by_its_own_step(attempt, rng):
    x_0, x_t, betas = randn(rng, 5, 3, 2).mT, randn(rng, 5, 2, 3), uniform(rng, 0.05, 0.5, 4)
    t = torch.tensor([3, 1, 0, 3, 2])

    mean, variance = attempt(posterior, x_0, x_t, t, betas)

    of_x_0, of_x_t, spread = (v[:, None, None] for v in factors(betas, t))
    assert_close(mean, of_x_0 * x_0 + of_x_t * x_t)
    assert_close(variance, spread)


def test_posterior_of_the_first_step_is_x_0_itself(attempt, rng):
    x_0, x_t = randn(rng, 3, 4), 10 * randn(rng, 3, 4)

    for first in (1e-4, 0.3, 0.999, 1.0):
        betas = torch.tensor([first, 0.2], dtype=torch.float64)
        mean, variance = attempt(posterior, x_0, x_t, torch.zeros(3, dtype=torch.int64), betas)

        assert_close(mean, x_0)
        assert_close(variance, torch.zeros(3, 1, dtype=torch.float64))


def test_posterior_knows_steps_that_leave_no_signal(attempt, rng):
    x_0, x_t = randn(rng, 4, 3), randn(rng, 4, 3)
    betas = torch.tensor([0.2, 1.0, 0.3, 1.0], dtype=torch.float64)

    mean, variance = attempt(posterior, x_0, x_t, torch.arange(4), betas)

    # Step 1 erases the image, so x_1 tells nothing. Before step 2 there is noise, whatever x_0.
    expected = [x_0[0], math.sqrt(0.8) * x_0[1], math.sqrt(0.7) * x_t[2], torch.zeros(3).double()]
    assert_close(mean, torch.stack(expected))
    assert_close(variance, torch.tensor([[0.0], [0.2], [0.3], [1.0]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4,), (0, 3), (1, 3), (3, 3), (2, 1, 3, 5), (1, 2, 3, 5)])
def test_posterior_takes_samples_of_any_shape(attempt, rng, shape):
    x_0, x_t, betas = 50 * randn(rng, *shape), randn(rng, *shape), uniform(rng, 0.05, 0.5, 7)
    t = torch.randint(7, shape[:1], generator=rng)

    mean, variance = attempt(posterior, x_0, x_t, t, betas)

    each = (-1, *[1] * (len(shape) - 1))
    of_x_0, of_x_t, spread = (v.view(each) for v in factors(betas, t))
    assert_close(mean, of_x_0 * x_0 + of_x_t * x_t)
    assert_close(variance, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_posterior_rounds_no_factor_before_it_is_finished(attempt, dtype):
    # In bfloat16 1 − 0.0001 is 1. Half of the samples are x_0 alone, the others x_t alone: out come
    # the factors as they are.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t = torch.arange(1, 1000, 37).repeat(2)
    x_0 = torch.arange(2, dtype=dtype).repeat_interleave(len(t) // 2)

    mean, variance = attempt(posterior, x_0, 1 - x_0, t, betas)

    of_x_0, of_x_t, spread = factors(betas, t)
    # 1 − ᾱ loses four digits where ᾱ is close to 1, so the last one may round either way.
    eps = torch.finfo(dtype).eps
    assert_close(mean, torch.where(x_0 == 1, of_x_0, of_x_t).to(dtype), rtol=eps, atol=0.0)
    assert_close(variance, spread)


def test_posterior_goes_by_the_betas_of_each_call(attempt, rng):
    x_0, x_t, t = randn(rng, 3, 4), randn(rng, 3, 4), torch.tensor([4, 0, 2])
    schedules = [uniform(rng, 0.05, 0.9, 5) for _ in range(3)]

    outs = attempt(posterior_in_turn, x_0, x_t, t, schedules)

    for (mean, variance), betas in zip(outs, schedules, strict=True):
        of_x_0, of_x_t, spread = (v[:, None] for v in factors(betas, t))
        assert_close(mean, of_x_0 * x_0 + of_x_t * x_t)
        assert_close(variance, spread)


def test_posterior_sends_gradients_to_both_images(attempt, rng):
    x_0, x_t, upstream = randn(rng, 3, 2, 4), randn(rng, 3, 2, 4), randn(rng, 3, 2, 4)
    betas, t = uniform(rng, 0.05, 0.5, 5), torch.tensor([4, 0, 2])

    grads = attempt(posterior_gradients, x_0, x_t, t, betas, upstream)

    of_x_0, of_x_t, _ = (v[:, None, None] for v in factors(betas, t))
    assert_close(grads, (of_x_0 * upstream, of_x_t * upstream))


@pytest.mark.parametrize("wrong", [-1, -3, 4, 90])
def test_posterior_rejects_a_step_that_the_schedule_does_not_have(attempt, rng, wrong):
    x_0, x_t, betas = randn(rng, 3, 2), randn(rng, 3, 2), uniform(rng, 0.05, 0.5, 4)

    with pytest.raises(IndexError):
        attempt(posterior, x_0, x_t, torch.tensor([1, wrong, 2]), betas)


def test_posterior_agrees_with_a_step_of_diffusers(attempt, rng):
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    t = torch.tensor([1, 7, 30, 49])
    x_0, x_t = randn(rng, 4, 6), randn(rng, 4, 6)

    mean, variance = attempt(posterior, x_0, x_t, t, betas)

    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    oracle = DDPMScheduler(trained_betas=betas.numpy(), prediction_type="sample", clip_sample=False)
    for i, s in enumerate(t.tolist()):
        drawn = torch.Generator().manual_seed(i)
        noise = torch.randn(1, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        stepped = oracle.step(x_0[[i]], s, x_t[[i]], generator=drawn).prev_sample
        # The scheduler works in float32: 1 − ᾱ ≥ 10⁻⁴ carries an error of 10⁻⁷.
        assert_close(mean[[i]] + variance[i].sqrt() * noise, stepped, rtol=1e-2, atol=1e-3)


# --- the distance of two Gaussians ---------------------------------------------------------------


def test_kl_is_that_of_torch_number_by_number(attempt, rng):
    means, variances = randn(rng, 2, 3, 4), uniform(rng, 0.1, 9, 2, 3, 4)

    out = attempt(kl, means[0], variances[0], means[1], variances[1])

    first, second = (Normal(m, v.sqrt()) for m, v in zip(means, variances, strict=True))
    assert_close(out, kl_divergence(first, second))


def test_kl_broadcasts_all_four(attempt, rng):
    mean, variance = randn(rng, 5, 1, 3), uniform(rng, 0.1, 9, 4, 1)
    mean_2, variance_2 = randn(rng), uniform(rng, 0.1, 9, 2, 1, 1, 1)

    out = attempt(kl, mean, variance, mean_2, variance_2)

    shape = (2, 5, 4, 3)
    first = Normal(mean.expand(shape), variance.sqrt().expand(shape))
    assert_close(out, kl_divergence(first, Normal(mean_2, variance_2.sqrt())))
    for arguments in [(mean, mean**2 + 1, mean, mean**2 + 1), (mean_2, variance[0, 0]) * 2]:
        same = attempt(kl, *arguments)
        assert_close(same, torch.zeros_like(arguments[0]))


def test_kl_sends_gradients_to_all_four(attempt, rng):
    means, variances = randn(rng, 2, 3, 4), uniform(rng, 0.1, 9, 2, 3, 4)
    upstream = randn(rng, 3, 4)

    grads = attempt(kl_gradients, upstream, means[0], variances[0], means[1], variances[1])

    inputs = [x.clone().requires_grad_() for x in (means[0], variances[0], means[1], variances[1])]
    first, second = Normal(inputs[0], inputs[1].sqrt()), Normal(inputs[2], inputs[3].sqrt())
    assert_close(grads, torch.autograd.grad(kl_divergence(first, second), inputs, upstream))


@example(ratio=1e100, apart=1.0, variance=1e-100)
@example(ratio=1e-20, apart=0.0, variance=1e-20)
@given(ratio=st.floats(1e-6, 1e6), apart=st.floats(-100, 100), variance=st.floats(1e-3, 1e3))
def test_kl_is_never_below_zero_and_grows_with_the_distance(attempt, ratio, apart, variance):
    mean = torch.tensor([0.0, apart, 2 * apart], dtype=torch.float64)
    first = torch.tensor(variance, dtype=torch.float64)

    out = attempt(kl, mean, first, torch.zeros(3, dtype=torch.float64), ratio * first)

    still = 0.5 * (math.log(ratio) + 1 / ratio - 1)
    expected = [still + 0.5 * (k * apart) ** 2 / (ratio * variance) for k in range(3)]
    assert_close(out, torch.tensor(expected, dtype=torch.float64))


# --- the bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_steps", "shape"), [(4, (3, 2)), (1, (5,)), (2, (1,)), (3, (2, 1, 3))])
def test_terms_are_the_density_then_the_kl_of_each_step_then_what_is_left(
    attempt, rng, n_steps, shape
):
    x_0, betas = randn(rng, 4, *shape), uniform(rng, 0.05, 0.6, n_steps)
    noise, tables = randn(rng, n_steps, 4, *shape), a_model(rng, n_steps)

    terms = attempt(elbo, x_0, *tables, betas, noise)

    assert_close(terms, bound(x_0, linear_model(*tables), betas, noise))


def test_terms_take_a_variance_for_each_number(attempt, rng):
    x_0, betas, noise = randn(rng, 4, 3, 2), uniform(rng, 0.05, 0.6, 3), randn(rng, 3, 4, 3, 2)
    tables = a_model(rng, 3, 3, 2)

    terms = attempt(elbo, x_0, *tables, betas, noise)

    assert_close(terms, bound(x_0, linear_model(*tables), betas, noise))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (1, 1, 2), (4, 1, 1)])
def test_terms_take_a_variance_of_any_shape_that_broadcasts(attempt, rng, shape):
    x_0, betas, noise = randn(rng, 4, 3, 2), uniform(rng, 0.05, 0.6, 3), randn(rng, 3, 4, 3, 2)
    variance = uniform(rng, 0.2, 3.0, *shape)

    terms = attempt(elbo_of_a_model_with_one_variance, x_0, betas, noise, variance)

    expected = bound(x_0, lambda x_t, t: (torch.tanh(x_t), variance), betas, noise)
    assert_close(terms, expected)


def test_terms_sum_to_the_bound_that_joint_gaussians_give_in_closed_form(attempt, rng):
    n_steps = 4
    betas, (slope, shift, variance) = uniform(rng, 0.1, 0.6, n_steps), a_model(rng, n_steps)
    x_0 = randn(rng, 1).item()
    # A term is a quadratic of its own noise, so the mean of noise +1 and −1 is the exact one.
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(n_steps, 2)[..., None]

    terms = attempt(
        elbo, torch.full((2, 1), x_0, dtype=torch.float64), slope, shift, variance, betas, noise
    )

    # The model's x after each step, from the last to x_0, as sums of independent numbers; and q's.
    sums = torch.zeros(n_steps + 1, n_steps + 1, dtype=torch.float64)
    mean = torch.zeros(n_steps + 1, dtype=torch.float64)
    sums[n_steps, n_steps] = 1
    for s in reversed(range(n_steps)):
        sums[s] = slope[s] * sums[s + 1]
        sums[s, s] = variance[s].sqrt()
        mean[s] = slope[s] * mean[s + 1] + shift[s]
    p = sums @ sums.T
    # p of x_1 … x_n given x_0, whose place is 0.
    gain = p[1:, 0] / p[0, 0]
    given = MultivariateNormal(
        mean[1:] + gain * (x_0 - mean[0]), p[1:, 1:] - gain[:, None] * p[0, 1:]
    )
    of_q = torch.zeros(n_steps + 1, n_steps + 1, dtype=torch.float64)
    where = torch.full((n_steps + 1,), x_0, dtype=torch.float64)
    for s in range(n_steps):
        of_q[s + 1] = (1 - betas[s]).sqrt() * of_q[s]
        of_q[s + 1, s + 1] = betas[s].sqrt()
        where[s + 1] = (1 - betas[s]).sqrt() * where[s]
    noised = MultivariateNormal(where[1:], (of_q @ of_q.T)[1:, 1:])
    surprise = -Normal(mean[0], p[0, 0].sqrt()).log_prob(torch.tensor(x_0, dtype=torch.float64))
    assert_close(terms.sum(0).mean(), surprise + kl_divergence(noised, given))


def test_bound_is_exact_where_the_model_is(attempt, rng):
    # Data of N(0, 1) stay N(0, 1), and each step back is distributed as the step forth.
    betas = uniform(rng, 0.1, 0.6, 5)
    x_0 = randn(rng, 1).expand(2)[:, None]
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(5, 2)[..., None]

    terms = attempt(elbo, x_0, (1 - betas).sqrt(), torch.zeros(5).double(), betas, betas, noise)

    assert_close(terms.sum(0).mean(), -Normal(0.0, 1.0).log_prob(x_0[0, 0]))


def test_steps_cost_nothing_for_a_model_that_knows_x_0(attempt, rng):
    x_0, betas, noise = randn(rng, 4, 3), uniform(rng, 0.05, 0.6, 5), randn(rng, 5, 4, 3)

    terms = attempt(elbo_of_one_who_knows, x_0, betas, noise)

    assert_close(terms[1:-1], torch.zeros(4, 4, dtype=torch.float64))
    assert_close(terms[0], torch.full((4,), 1.5 * math.log(2 * math.pi), dtype=torch.float64))


def test_model_sees_each_step_once_with_the_whole_batch_and_that_steps_noise(attempt, rng):
    n_steps = 4
    x_0, betas = randn(rng, 3, 2), uniform(rng, 0.05, 0.6, n_steps)
    noise = randn(rng, n_steps, 3, 2)

    images, steps = attempt(elbo_calls, x_0, *a_model(rng, n_steps), betas, noise)

    order = sorted(range(len(steps)), key=lambda call: steps[call].tolist())
    assert_close([steps[i] for i in order], [torch.full((3,), s) for s in range(n_steps)])
    left = [signal(betas, s + 1) for s in range(n_steps)]
    expected = [math.sqrt(a) * x_0 + math.sqrt(1 - a) * e for a, e in zip(left, noise, strict=True)]
    assert_close([images[i] for i in order], expected)


def test_terms_send_gradients_to_what_the_model_computes_with(attempt, rng):
    n_steps = 4
    x_0, betas = randn(rng, 3, 2), uniform(rng, 0.05, 0.6, n_steps)
    noise, tables = randn(rng, n_steps, 3, 2), a_model(rng, n_steps)
    upstream = randn(rng, n_steps + 1, 3)

    grads = attempt(elbo_gradients, x_0, *tables, betas, noise, upstream)

    inputs = [x.clone().requires_grad_() for x in tables]
    terms = bound(x_0, linear_model(*inputs), betas, noise)
    assert_close(grads, torch.autograd.grad(terms, inputs, upstream))


def test_terms_of_several_calls_are_kept_apart(attempt, rng):
    settings = []
    for n_steps, batch in [(2, 3), (5, 1), (3, 0)]:
        x_0, betas = randn(rng, batch, 2), uniform(rng, 0.05, 0.6, n_steps)
        noise = randn(rng, n_steps, batch, 2)
        settings.append((x_0, *a_model(rng, n_steps), betas, noise))

    outs = attempt(elbo_twice, settings)

    expected = [bound(s[0], linear_model(*s[1:4]), *s[4:]) for s in settings[:2]]
    assert_close(outs, [*expected, torch.zeros(4, 0, dtype=torch.float64)])


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", [1, 2, 784])
@pytest.mark.parametrize("n_levels", [2, 17, 256])
def test_bits_of_numbers_spread_evenly_are_the_logarithm_of_their_levels(attempt, n_dims, n_levels):
    # On −1 … 1 the density of each number is 1/2.
    nats = torch.full((3,), n_dims * math.log(2), dtype=torch.float64)

    out = attempt(bits, nats, n_dims, width=2 / n_levels)

    assert_close(out, torch.full((3,), math.log2(n_levels), dtype=torch.float64))


def test_bits_without_a_width_are_those_of_bins_of_one(attempt, rng):
    nats = 100 * randn(rng, 4, 3)

    out = attempt(bits, nats, 5)

    assert_close(out, nats / 5 / math.log(2))


@pytest.mark.parametrize(("n_dims", "width"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -0.1)])
def test_bits_reject_no_numbers_and_bins_without_a_width(attempt, n_dims, width):
    with pytest.raises(ValueError, match=r"n_dims|width"):
        attempt(bits, torch.ones(2, dtype=torch.float64), n_dims, width)
