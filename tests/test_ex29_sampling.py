"""Specs for exercise 29: sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
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


def each_of_them(ex, logits, tokens):
    """What each function makes of the logits."""
    return {
        "temperature": ex.temperature(logits, 0.5),
        "temperature 0": ex.temperature(logits, 0.0),
        "top_k": ex.top_k(logits, 2),
        "top_p": ex.top_p(logits, 0.9),
        "min_p": ex.min_p(logits, 0.1),
        "repetition_penalty": ex.repetition_penalty(logits, tokens, 2.0),
    }


def top_p_of_each(ex, logits, shares):
    return torch.stack([ex.top_p(logits, p) for p in shares])


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
    """Not contiguous."""
    return 2 * torch.randn(*shape, 2, generator=rng, dtype=torch.float64)[..., 0]


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

    # Nothing is rounded to float32, which would cost 6e-8.
    assert_close(out, theirs(name, logits, value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [1.8, 0.6])
def test_penalises_each_used_token_once(attempt, rng, penalty):
    logits = random_logits(rng, 3, 2, 11)
    tokens = torch.randint(11, (3, 2, 7), generator=rng)
    tokens[..., 4:] = tokens[..., :3]  # so that some occur twice at least
    logits[0, 0, tokens[0, 0, :2]] = torch.tensor([-math.inf, 0.0], dtype=torch.float64)

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

    inf = math.inf
    assert_close(out["logits"], torch.tensor([[[-inf, 3, -inf, -inf], [-5, -inf, -inf, -inf]]]))


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


def test_top_p_keeps_no_token_more_where_the_likelier_ones_have_p_exactly(attempt):
    # Powers of 2, which no sum rounds.
    logits = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()

    out = attempt(distribution, "top_p", logits, 0.5)["probabilities"]

    assert_close(out, torch.tensor([0, 1, 0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_top_p_adds_up_in_float64(attempt, rng, dtype):
    logits = (2 * torch.randn(200, generator=rng)).to(dtype)  # in bfloat16 many are equal
    above = logits > logits[:, None]
    likelier = (above * torch.softmax(logits.double(), dim=-1)).sum(dim=-1)
    sums = likelier.unique()[1:60:4]
    shares = torch.cat([sums - 1e-10, sums + 1e-10])  # just too little, and just enough

    out = attempt(top_p_of_each, logits, shares.tolist())

    assert_close(out, logits.masked_fill(likelier >= shares[:, None], -math.inf))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_keeps_the_dtype_of_the_logits(attempt, dtype):
    # Halves, doubles and what stays are exact in each dtype.
    logits, inf = torch.tensor([0.5, 3.0, -2.0, 1.0], dtype=dtype), math.inf

    out = attempt(each_of_them, logits, torch.tensor([2, 0, 2]))

    expected = {
        "temperature": [1, 6, -4, 2],
        "temperature 0": [-inf, 3, -inf, -inf],
        "top_k": [-inf, 3, -inf, 1],
        "top_p": [-inf, 3, -inf, 1],
        "min_p": [-inf, 3, -inf, 1],
        "repetition_penalty": [0.25, 3, -4, 1],
    }
    expected = {name: torch.tensor(row, dtype=dtype) for name, row in expected.items()}
    assert_close(out, expected, rtol=0, atol=0)


@given(
    n=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=15)
@example(n=9, dtype=torch.float32, seed=0)
@example(n=9, dtype=torch.bfloat16, seed=1)
def test_sample_gives_each_token_its_share_of_the_numbers_below_one(attempt, n, dtype, seed):
    np_rng = np.random.default_rng(seed)
    logits = torch.from_numpy(np.log(np_rng.dirichlet(np.full(n, 0.7), size=2) + 1e-6)).to(dtype)
    shares = np.exp(logits.double().numpy())
    ends = np.cumsum(shares, -1) / shares.sum(-1, keepdims=True)
    # Just inside either end of the interval that belongs to each token.
    starts = np.concatenate([np.zeros((2, 1)), ends[:, :-1]], -1)
    u = torch.from_numpy(np.concatenate([starts + 1e-9, ends - 1e-9], -1))

    out = attempt(sample, logits[:, None].expand(2, 2 * n, n), u)

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
