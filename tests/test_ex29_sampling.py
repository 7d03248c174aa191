"""Specs for exercise 29: sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.multinomial", "torch.Tensor.multinomial"]


def distribution(ex, name, logits, *args):
    """What one function makes of the logits, and the probabilities that follow from it."""
    out = getattr(ex, name)(logits, *args)
    return {"logits": out, "probabilities": torch.softmax(out, dim=-1)}


def chain(ex, logits, tokens):
    """All of them, one after the other."""
    out = ex.repetition_penalty(logits, tokens, 1.3)
    out = ex.top_p(ex.top_k(ex.temperature(out, 0.7), 6), 0.8)
    return torch.softmax(ex.min_p(out, 0.1), dim=-1)


def sample(ex, logits, u):
    return ex.sample(logits, u)


# --- the oracle: transformers, which takes (rows, vocab_size) -------------------------------------


def theirs(name, logits, *args):
    import transformers.generation.logits_process as processors

    kind = {
        "temperature": processors.TemperatureLogitsWarper,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
    }[name]
    # Only the penalty asks for tokens; the others are handed none.
    tokens, value = args if len(args) == 2 else (torch.zeros(*logits.shape[:-1], 0).long(), *args)
    rows = kind(value)(tokens.flatten(0, -2), logits.flatten(0, -2)).view(logits.shape)
    return {"logits": rows, "probabilities": torch.softmax(rows, dim=-1)}


def their_chain(logits, tokens):
    out = theirs("repetition_penalty", logits, tokens, 1.3)
    for name, value in (("temperature", 0.7), ("top_k", 6), ("top_p", 0.8), ("min_p", 0.1)):
        out = theirs(name, out["logits"], value)
    return out["probabilities"]


def random_logits(rng, *shape):
    return 2 * torch.randn(*shape, generator=rng, dtype=torch.float64)


def logits_of(*probabilities):
    """Logits of which softmax makes these, though they are not log-probabilities themselves."""
    return torch.tensor(probabilities, dtype=torch.float64).log() + 3


FILTERS = [
    ("temperature", 0.6),
    ("temperature", 2.5),
    ("top_k", 1),
    ("top_k", 4),
    ("top_k", 99),
    ("top_p", 0.001),
    ("top_p", 0.5),
    ("top_p", 0.93),
    ("min_p", 0.0),
    ("min_p", 0.07),
    ("min_p", 0.9),
    ("min_p", 1.0),
]


@pytest.mark.parametrize(("name", "value"), FILTERS, ids=[f"{n}={v}" for n, v in FILTERS])
def test_leaves_the_distribution_that_transformers_leaves(attempt, rng, name, value):
    logits = random_logits(rng, 3, 2, 11)

    out = attempt(distribution, name, logits, value)

    assert_close(out, theirs(name, logits, value))


@pytest.mark.parametrize("penalty", [1.8, 0.6])
def test_penalises_each_used_token_once(attempt, rng, penalty):
    logits = random_logits(rng, 3, 2, 11)
    tokens = torch.randint(11, (3, 2, 7), generator=rng)
    tokens[..., 4:] = tokens[..., :3]  # so that some occur twice at least

    out = attempt(distribution, "repetition_penalty", logits, tokens, penalty)
    none = attempt(distribution, "repetition_penalty", logits, tokens[..., :0], penalty)

    assert_close(out, theirs("repetition_penalty", logits, tokens, penalty))
    assert_close(none["logits"], logits)


def test_each_takes_what_another_has_left(attempt, rng):
    logits, tokens = random_logits(rng, 5, 17), torch.randint(17, (5, 9), generator=rng)

    out = attempt(chain, logits, tokens)

    assert_close(out, their_chain(logits, tokens))


def test_temperature_zero_leaves_the_best_token_alone(attempt):
    logits = torch.tensor([[[1.0, 3.0, 2.0, 3.0], [-5.0, -1e3, -6.0, -math.inf]]])

    out = attempt(distribution, "temperature", logits, 0.0)

    assert_close(out["probabilities"], torch.tensor([[[0.0, 1, 0, 0], [1, 0, 0, 0]]]))


def test_top_k_keeps_all_that_tie_for_the_last_place(attempt):
    logits = torch.tensor([[2.0, 5.0, 2.0, 1.0, 2.0], [4.0, 4.0, 4.0, 4.0, 4.0]])

    out = attempt(distribution, "top_k", logits, 2)

    inf = math.inf
    assert_close(out["logits"], torch.tensor([[2.0, 5, 2, -inf, 2], [4, 4, 4, 4, 4]]))


def test_top_p_keeps_the_token_that_crosses_p(attempt):
    logits = logits_of(0.1, 0.4, 0.2, 0.3)

    two = attempt(distribution, "top_p", logits, 0.45)["probabilities"]
    three = attempt(distribution, "top_p", logits, 0.75)["probabilities"]

    assert_close(two, torch.tensor([0, 4, 0, 3], dtype=torch.float64) / 7)
    assert_close(three, torch.tensor([0, 4, 2, 3], dtype=torch.float64) / 9)


def test_top_p_treats_equal_tokens_alike(attempt):
    logits = logits_of(0.1, 0.2, 0.3, 0.2, 0.2)

    out = attempt(distribution, "top_p", logits, 0.4)["probabilities"]

    assert_close(out, torch.tensor([0, 2, 3, 2, 2], dtype=torch.float64) / 9)


def test_top_p_of_one_keeps_even_the_least_likely(attempt):
    logits = torch.tensor([60.0, 0.0, -60.0])

    out = attempt(distribution, "top_p", logits, 1.0)

    assert_close(out["logits"], logits)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5])
def test_top_p_rejects_what_is_no_share(attempt, p):
    with pytest.raises(ValueError, match=str(p)):
        attempt(distribution, "top_p", logits_of(0.5, 0.5), p)


@given(n=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_sample_gives_each_token_its_share_of_the_numbers_below_one(attempt, n, seed):
    np_rng = np.random.default_rng(seed)
    shares = np_rng.dirichlet(np.full(n, 0.7), size=2) + 1e-6
    ends = np.cumsum(shares, -1) / shares.sum(-1, keepdims=True)
    # Just inside either end of the interval that belongs to each token.
    starts = np.concatenate([np.zeros((2, 1)), ends[:, :-1]], -1)
    u = torch.from_numpy(np.concatenate([starts + 1e-9, ends - 1e-9], -1))
    logits = torch.from_numpy(np.log(shares))[:, None].expand(2, 2 * n, n)

    out = attempt(sample, logits, u)

    assert_close(out, torch.arange(n).repeat(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sample_never_draws_what_has_no_share(attempt, rng, dtype):
    logits = torch.randn(50, 300, generator=rng).to(dtype)
    logits[:, [0, 1, 150, 298, 299]] = -math.inf
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64).repeat_interleave(25)

    out = attempt(sample, logits, u)

    assert_close(out, torch.tensor([2, 297]).repeat_interleave(25))


def test_all_take_a_single_row(attempt, rng):
    logits, tokens = random_logits(rng, 13), torch.tensor([3, 3, 12])

    out = attempt(chain, logits, tokens)
    drawn = attempt(sample, logits, torch.tensor(0.5, dtype=torch.float64))

    cumulative = torch.softmax(logits, -1).cumsum(-1)
    assert_close(out, their_chain(logits[None], tokens[None])[0])
    assert_close(drawn, (cumulative > 0.5).int().argmax())
