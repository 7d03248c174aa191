"""Specs for exercise 45: longer texts by slower rotations (RoPE scaling)."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

factors = pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])

# transformers computes its frequencies in float32.
FLOAT32 = {"rtol": 1e-6, "atol": 0.0}


def frequencies_of(ex, scaling, *args):
    return getattr(ex, f"{scaling}_frequencies")(*args)


def all_frequencies(ex, *cases):
    """For each (scaling, arguments …) its frequencies."""
    return [frequencies_of(ex, *case) for case in cases]


def attention_factor_of(ex, factor):
    return ex.yarn_attention_factor(factor)


def attend(ex, q, k, v, frequencies, *attention_factor):
    return ex.attend_with_rope(q, k, v, frequencies, *attention_factor)


def attend_in_turn(ex, calls):
    return [ex.attend_with_rope(*qkv, frequencies) for qkv, frequencies in calls]


def gradients(ex, q, k, v, frequencies, attention_factor, upstream):
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = ex.attend_with_rope(q, k, v, frequencies, attention_factor)
    return torch.autograd.grad(out, inputs, upstream)


def of_transformers(scaling, head_dim, theta, factor, max_len=4096, seq_len=None, **more):
    """Frequencies, as float64, and attention factor of one of transformers' scalings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    rope = {"rope_type": scaling, "rope_theta": theta, "factor": factor, **more}
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_len,
        rope_parameters=rope,
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[scaling](config, seq_len=seq_len)
    return frequencies.double(), attention_factor


def plain(head_dim, theta):
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def by_the_formula(scaling, head_dim, theta, factor, *lengths):
    """The equations once more, pair by pair in Python's float64 numbers."""
    found = []
    for i in range(head_dim // 2):
        base = theta
        if scaling == "dynamic_ntk":
            scale = max(1.0, factor * lengths[1] / lengths[0] - factor + 1)
            base = theta * scale ** (head_dim / (head_dim - 2))
        angle = math.exp(-2 * i / head_dim * math.log(base))
        slow = 0.0 if scaling == "dynamic_ntk" else 1.0
        if scaling == "llama3":
            slow = (4 - lengths[0] * angle / (2 * math.pi)) / (4 - 1)
        if scaling == "yarn":
            fast, slowest = (math.log(lengths[0] / (2 * math.pi * b)) for b in (32, 1))
            low, high = (head_dim / 2 / math.log(theta) * x for x in (fast, slowest))
            slow = (i - math.floor(low)) / (math.ceil(high) - math.floor(low))
        slow = min(max(slow, 0.0), 1.0)
        found.append(angle * (1 - slow) + angle / factor * slow)
    return torch.tensor(found, dtype=torch.float64)


def attention_by_the_formula(q, k, v, frequencies, attention_factor=1.0):
    """All tokens at once, turned as complex numbers, for a head_dim of 4."""
    n = q.shape[-2]
    turns = attention_factor * torch.exp(1j * torch.arange(n)[:, None] * frequencies)
    q, k = (torch.complex(x[..., :2], x[..., 2:]) * turns for x in (q, k))
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = ((q @ k.mH).real / 2).masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


# --- frequencies ---------------------------------------------------------------------------------


@factors
def test_linear_slows_all_pairs_by_the_factor(attempt, factor):
    found = attempt(frequencies_of, "linear", 12, 500.0, factor)

    expected, _ = of_transformers("linear", 12, 500.0, factor)
    assert_close(found, expected, **FLOAT32)


@factors
def test_dynamic_ntk_raises_the_base_with_the_length_of_the_text(attempt, factor):
    seq_lens = 100, 512, 513, 1024, 20_000
    cases = [("dynamic_ntk", 12, 500.0, factor, 512, seq_len) for seq_len in seq_lens]

    found = attempt(all_frequencies, *cases)

    expected = [of_transformers("dynamic", 12, 500.0, factor, 512, n)[0] for n in seq_lens]
    assert_close(found, expected, **FLOAT32)


@factors
def test_llama3_slows_the_pairs_that_turn_too_seldom(attempt, factor):
    cases = [(n, *bounds) for n in (100, 512, 8192) for bounds in ((), (0.7, 9.0))]

    found = attempt(all_frequencies, *(("llama3", 24, 500.0, factor, *case) for case in cases))

    for out, (original_len, *bounds) in zip(found, cases, strict=True):
        low, high = bounds or (1.0, 4.0)
        expected, _ = of_transformers(
            "llama3", 24, 500.0, factor, 2**20,
            original_max_position_embeddings=original_len,
            low_freq_factor=low, high_freq_factor=high,
        )  # fmt: skip
        assert_close(out, expected, **FLOAT32)


@pytest.mark.parametrize(
    ("head_dim", "theta", "original_len"),
    [(24, 500.0, 512), (24, 500.0, 100), (8, 20.0, 1280), (128, 10_000.0, 4096)],
    ids=[
        "in between",
        "low end cut at 0",
        "high end cut at head_dim − 1",
        "as in Llama 2",
    ],
)
def test_yarn_slows_the_pairs_along_its_ramp(attempt, head_dim, theta, original_len):
    sizes = "yarn", head_dim, theta
    cases = [(f, original_len, *betas) for f in (1.5, 4.0, 32.0) for betas in ((), (11.0, 2.0))]

    found = attempt(all_frequencies, *((*sizes, *case) for case in cases))

    for out, (factor, _, *betas) in zip(found, cases, strict=True):
        fast, slow = betas or (32.0, 1.0)
        expected, _ = of_transformers(
            *sizes, factor, int(factor * original_len),
            original_max_position_embeddings=original_len, beta_fast=fast, beta_slow=slow,
        )  # fmt: skip
        assert_close(out, expected, **FLOAT32)


def test_yarn_takes_a_step_where_both_ends_of_its_ramp_are_one_place(attempt):
    found = attempt(frequencies_of, "yarn", 24, 500.0, 4.0, 6)  # both ends at 0

    # transformers moves the second end by 0.001, which no whole place sees.
    expected, _ = of_transformers(
        "yarn", 24, 500.0, 4.0, 24, original_max_position_embeddings=6, beta_fast=32, beta_slow=1
    )
    assert_close(found, expected, **FLOAT32)


def test_yarn_takes_a_step_where_no_pair_turns_once(attempt):
    found = attempt(frequencies_of, "yarn", 24, 500.0, 4.0, 3)  # the second end at −1

    expected = by_the_formula("linear", 24, 500.0, 4.0)
    expected[0] = 1.0
    assert_close(found, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("scaling", "lengths"),
    [("linear", ()), ("dynamic_ntk", (512, 700)), ("llama3", (512,)), ("yarn", (5000,))],
    ids=["linear", "dynamic_ntk", "llama3", "yarn"],
)
def test_frequencies_have_all_digits_of_float64(attempt, scaling, lengths):
    found = attempt(frequencies_of, scaling, 24, 500.0, 3.7, *lengths)

    expected = by_the_formula(scaling, 24, 500.0, 3.7, *lengths)
    assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_a_factor_of_1_changes_nothing(attempt):
    sizes = 16, 10_000.0, 1.0

    found = attempt(
        all_frequencies,
        ("linear", *sizes),
        ("dynamic_ntk", *sizes, 512, 300),
        ("llama3", *sizes, 512),
        ("yarn", *sizes, 512),
    )

    assert_close(found, 4 * [plain(16, 10_000.0)], rtol=1e-12, atol=0.0)  # all digits of float64


def test_no_pair_turns_faster_than_before_or_slower_than_by_the_factor(attempt, rng):
    theta, factor, original_len = torch.rand(3, 8, generator=rng, dtype=torch.float64)
    thetas, factors = (1e3 ** (1 + theta)).tolist(), (50**factor).tolist()
    lengths = (256 * 32**original_len).long().tolist()
    sizes = list(zip(range(4, 20, 2), thetas, factors, lengths, strict=True))

    for_texts = attempt(all_frequencies, *(("dynamic_ntk", *case, 2 * case[-1]) for case in sizes))
    llama3 = attempt(all_frequencies, *(("llama3", *case) for case in sizes))
    yarn = attempt(all_frequencies, *(("yarn", *case) for case in sizes))

    for i, (head_dim, theta, factor, _) in enumerate(sizes):
        before = plain(head_dim, theta)
        # At twice the length, the scale of dynamic NTK is factor + 1.
        for out, slowest in ((for_texts[i], factor + 1), (llama3[i], factor), (yarn[i], factor)):
            # Rounding may put a pair just outside.
            assert_close(out, out.clamp(before / slowest, before), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    ("scaling", "lengths"),
    [("linear", ()), ("dynamic_ntk", (512, 600)), ("llama3", (512,)), ("yarn", (512,))],
    ids=["linear", "dynamic_ntk", "llama3", "yarn"],
)
@pytest.mark.parametrize("factor", [0.25, 0.999, -2.5])
def test_rejects_a_factor_below_1(attempt, scaling, lengths, factor):
    with pytest.raises(ValueError, match=str(factor).replace(".", r"\.")):
        attempt(frequencies_of, scaling, 16, 500.0, factor, *lengths)


# --- attention -----------------------------------------------------------------------------------


@factors
def test_attention_factor_grows_with_the_logarithm(attempt, factor):
    found = attempt(attention_factor_of, factor)

    assert_close(found, of_transformers("yarn", 16, 500.0, factor, int(4096 * factor))[1])


def test_attention_agrees_with_llama_in_transformers(attempt, rng):
    randn = partial(torch.randn, generator=rng)
    q, k, v = (2 * randn(2, 5, 7, 3, 8).transpose(-2, -3)).unbind(1)[:3]  # not contiguous
    frequencies, attention_factor = of_transformers(
        "yarn", 8, 500.0, 8.0, 800, original_max_position_embeddings=100
    )

    out = attempt(attend, q, k, v, frequencies, attention_factor)
    without_factor = attempt(attend, q, k, v, frequencies)

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = (torch.arange(7)[:, None] * frequencies).repeat(1, 2).expand(2, -1, -1)
    for found, factor in ((out, attention_factor), (without_factor, 1.0)):
        cos, sin = (factor * angles.cos()).float(), (factor * angles.sin()).float()
        turned = apply_rotary_pos_emb(q, k, cos, sin)
        assert_close(found, F.scaled_dot_product_attention(*turned, v, is_causal=True))


def test_attention_learns_through_queries_keys_and_values(attempt, rng):
    randn = partial(torch.randn, generator=rng, dtype=torch.float64)
    q, k, v, upstream = (randn(2, 3, 5, 4) for _ in range(4))
    frequencies = torch.tensor([1.0, 0.2], dtype=torch.float64)

    found = attempt(gradients, q, k, v, frequencies, 1.3, upstream)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention_by_the_formula(*inputs, frequencies, 1.3)
    assert_close(found, torch.autograd.grad(out, inputs, upstream))


@pytest.mark.parametrize(
    ("dtype", "seq_len"), [(torch.float32, 800), (torch.bfloat16, 200)], ids=["float32", "bfloat16"]
)
def test_attention_turns_by_exact_angles_whatever_the_dtype(attempt, rng, dtype, seq_len):
    q, k, v = torch.randn(3, 1, 1, seq_len, 4, generator=rng, dtype=torch.float64)
    q, k, v = (x.to(dtype) for x in (q, k, v / v.abs().amax()))
    frequencies = torch.tensor([3.1, 1.7], dtype=torch.float64)  # of 8 bits: 0.4 % less each

    out = attempt(attend, q, k, v, frequencies, 1.5)

    expected = attempt(attend, q.double(), k.double(), v.double(), frequencies, 1.5)
    # Turned queries and keys are rounded, cosines before them, and scores come to 20. The angles of
    # frequencies that are rounded are off by 10⁻⁴ in float32, and by a whole turn in bfloat16.
    assert_close(out, expected.to(dtype), rtol=0.0, atol=16 * torch.finfo(dtype).eps)


def test_attention_sees_nothing_of_the_future_however_low_the_past_scores(attempt, rng):
    v = torch.randn(1, 2, 5, 4, generator=rng, dtype=torch.float64)
    q = torch.full_like(v, 1e50)
    k = torch.tensor([-4.0, -3.0, -2.0, 1.0, 2.0], dtype=torch.float64)[:, None].expand(1, 2, 5, 4)

    out = attempt(attend, q, k, v, torch.zeros(2, dtype=torch.float64))

    # Nothing turns, and scores grow with the key: a query's own position has all the weight.
    assert_close(out, v)


def test_attention_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    texts = [
        torch.randn(3, 1, 2, n, 4, generator=rng, dtype=torch.float64) for n in (3, 3, 6, 6, 1)
    ]
    texts[0] = texts[0].bfloat16()
    paces = [1.0, 0.2], [1.0, 0.2], [0.7, 0.4], [1.0, 0.2], [1.0, 0.2]
    frequencies = [torch.tensor(pace, dtype=torch.float64) for pace in paces]

    outs = attempt(attend_in_turn, list(zip(texts, frequencies, strict=True)))

    for out, text, pace in list(zip(outs, texts, frequencies, strict=True))[1:]:
        assert_close(out, attention_by_the_formula(*text, pace))


@pytest.mark.parametrize("factor", [0.25, 0.999, -2.5])
def test_attention_factor_rejects_a_factor_below_1(attempt, factor):
    with pytest.raises(ValueError, match=str(factor).replace(".", r"\.")):
        attempt(attention_factor_of, factor)
