"""Specs for exercise 43: attention with a cache of keys and values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

BATCH, N_HEADS, N_KV_HEADS, HEAD_DIM = 2, 6, 3, 10  # √10 is no 10 / 2


def new_cache(ex, batch, max_len, dtype=torch.float64, n_kv_heads=N_KV_HEADS):
    return ex.KVCache(batch, n_kv_heads, max_len, HEAD_DIM, dtype=dtype)


def attend(ex, q, k, v, frequencies, chunks, max_len, n_pad=None):
    """A text in chunks through one cache: all results in a row, and the lengths of the cache."""
    cache = new_cache(ex, len(q), max_len, k.dtype, k.shape[1])
    parts = zip(*(x.split(chunks, dim=-2) for x in (q, k, v)), strict=True)
    outs, lengths = [], [cache.length]
    for part in parts:
        outs.append(ex.attend_with_cache(*part, cache, frequencies, n_pad))
        lengths.append(cache.length)
    return torch.cat(outs, dim=-2), lengths


def attend_alone(ex, q, k, v, frequencies, n_pad=None):
    return ex.attend_with_cache(q, k, v, None, frequencies, n_pad)


def attend_without_cache(ex, q, k, v, frequencies, grad, n_pad=None):
    for x in (q, k, v):
        x.requires_grad_()
    out = ex.attend_with_cache(q, k, v, None, frequencies, n_pad)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    for x in (q, k, v):
        x.requires_grad_(False)
    return found


def attend_after_reset(ex, first, n_pad, second, frequencies):
    """The first text is padded, the second one is not."""
    cache = new_cache(ex, BATCH, 12)
    ex.attend_with_cache(*first, cache, frequencies, n_pad)
    cache.reset()
    return cache.length, ex.attend_with_cache(*second, cache, frequencies), cache.length


def attend_in_turn(ex, one, two, frequencies):
    """Two texts, each with a cache of its own, token by token in turn."""
    caches = new_cache(ex, BATCH, 9), new_cache(ex, BATCH, 9)
    outs = [[], []]
    for t in range(one[0].shape[-2]):
        for text, cache, out in zip((one, two), caches, outs, strict=True):
            token = [x[:, :, t : t + 1] for x in text]
            out.append(ex.attend_with_cache(*token, cache, frequencies))
    return [torch.cat(out, dim=-2) for out in outs]


def attend_to_texts(ex, texts):
    """Texts of other lengths, paces, dtypes and paddings in turn, none with a cache."""
    return [ex.attend_with_cache(*qkv, None, *more) for *qkv, more in texts]


def memory_after_reset(ex, k, v):
    """What a reset and a second text take of new memory, and whether they use the first one's."""
    cache = new_cache(ex, BATCH, 8)
    before = [storage(x) for x in cache.append(k, v)]
    with NewMemory() as memory:
        cache.reset()
    return memory.bytes, before == [storage(x) for x in cache.append(k, v)]


def append_and_overwrite(ex, k, v):
    """The caller uses its memory again after two calls, and the cache grows after that."""
    cache = new_cache(ex, BATCH, 8)
    mine = [x[:, :, part].clone() for part in (slice(3), slice(3, 5)) for x in (k, v)]
    first = cache.append(*mine[:2])
    cache.append(*mine[2:])
    for x in mine:
        x.zero_()
    return first, cache.append(k[:, :, 5:], v[:, :, 5:])


def append(ex, pairs, max_len):
    cache = new_cache(ex, len(pairs[0][0]), max_len, pairs[0][0].dtype)
    return [(*cache.append(k, v), cache.length) for k, v in pairs]


def append_too_many(ex, first, too_many, second):
    cache = new_cache(ex, BATCH, 5)
    cache.append(*first)
    message = None
    try:
        cache.append(*too_many)
    except ValueError as error:
        message = str(error)
    return message, cache.length, cache.append(*second)


def flops_of_a_step(ex, q, k, v, frequencies, max_len):
    """The flops of the last token, when all others are in the cache."""
    cache = new_cache(ex, len(q), max_len)
    counter = FlopCounterMode(display=False, custom_mapping={FUSED: flops_of_fused_attention})
    with torch.no_grad():
        ex.attend_with_cache(*(x[:, :, :-1] for x in (q, k, v)), cache, frequencies)
        with counter:
            out = ex.attend_with_cache(*(x[:, :, -1:] for x in (q, k, v)), cache, frequencies)
    return out, counter.get_total_flops()


def bytes_of_a_step(ex, k, v, max_len):
    """The bytes of new memory that one more token takes."""
    cache = new_cache(ex, len(k), max_len)
    cache.append(k[:, :, :-1], v[:, :, :-1])
    with NewMemory() as memory:
        keys, values = cache.append(k[:, :, -1:], v[:, :, -1:])
    return keys, values, memory.bytes


def reserve_and_append(ex, k, v, max_len, dtype):
    """The bytes of memory that a new cache takes, and what it gives back of its first tokens."""
    with NewMemory() as memory:
        cache = ex.KVCache(len(k), k.shape[1], max_len, k.shape[-1], **dtype)
    return memory.bytes, cache.append(k, v)


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def flops_of_fused_attention(q, k, v, *_, out_shape=None, **__):
    """PyTorch's counter knows the fused attention of GPUs only."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


class NewMemory(TorchDispatchMode):
    """Adds up the bytes of results that are no views of what an operation was given."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(x) for x in leaves((args, kwargs or {}))}
        self.bytes += sum(x.nbytes for x in leaves(out) if storage(x) not in given)
        return out


def leaves(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(x):
    return x.untyped_storage().data_ptr()


def qkv(rng, n, batch=BATCH, dtype=torch.float64, n_kv_heads=N_KV_HEADS):
    q = torch.randn(batch, N_HEADS, n, HEAD_DIM, generator=rng, dtype=dtype)
    k = torch.randn(batch, n_kv_heads, n, HEAD_DIM, generator=rng, dtype=dtype)
    v = torch.randn(batch, n_kv_heads, n, HEAD_DIM, generator=rng, dtype=dtype)
    return q, k, v


def frequencies_for_specs():
    return torch.tensor([1.0, 0.3, 0.2, 0.1, 0.03], dtype=torch.float64)


def uncached(q, k, v, frequencies):
    """The definition: all tokens at once, turned as complex numbers, each looks only back."""
    n = q.shape[-2]
    turns = torch.exp(1j * torch.arange(n)[:, None] * frequencies)
    half = HEAD_DIM // 2
    q, k = (torch.complex(x[..., :half], x[..., half:]) * turns for x in (q, k))
    k, v = (x.repeat_interleave(N_HEADS // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mH).real / math.sqrt(HEAD_DIM)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v


def test_prefills_a_prompt_as_without_a_cache(attempt, rng):
    q, k, v = qkv(rng, 5)
    frequencies = frequencies_for_specs()

    out, lengths = attempt(attend, q, k, v, frequencies, [5], 9)

    assert_close(out, uncached(q, k, v, frequencies))
    assert lengths == [0, 5]


def test_decodes_token_by_token_as_without_a_cache(attempt, rng):
    q, k, v = qkv(rng, 7)
    frequencies = frequencies_for_specs()

    out, lengths = attempt(attend, q, k, v, frequencies, [3, 1, 1, 1, 1], 7)

    assert_close(out, uncached(q, k, v, frequencies))
    assert lengths == [0, 3, 4, 5, 6, 7]


@settings(max_examples=25)
@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    n_kv_heads=st.sampled_from([1, 2, 3, 6]),
    seed=st.integers(0, 999),
)
def test_takes_a_text_in_chunks_of_any_size(attempt, chunks, n_kv_heads, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = qkv(rng, sum(chunks), n_kv_heads=n_kv_heads)
    frequencies = frequencies_for_specs()

    out, _ = attempt(attend, q, k, v, frequencies, chunks, 20)

    assert_close(out, uncached(q, k, v, frequencies))


def test_gives_a_padded_sequence_what_it_gives_that_sequence_alone(attempt, rng):
    q, k, v = qkv(rng, 8, batch=3)
    frequencies, n_pad = frequencies_for_specs(), torch.tensor([2, 0, 4])

    out, lengths = attempt(attend, q, k, v, frequencies, [3, 2, 1, 1, 1], 8, n_pad)
    at_once = attempt(attend_alone, q, k, v, frequencies, n_pad)

    for b, pad in enumerate([2, 0, 4]):
        alone = uncached(*(x[b : b + 1, :, pad:] for x in (q, k, v)), frequencies)
        assert_close(out[b : b + 1, :, pad:], alone)
        assert_close(at_once[b : b + 1, :, pad:], alone)
    assert lengths == [0, 3, 5, 6, 7, 8]
    assert out.isfinite().all(), "the result of a padding query must be finite"
    assert at_once.isfinite().all(), "the result of a padding query must be finite"


def levels(v, size, level):
    """q and k with which every query scores a key `size` times its level, where nothing turns."""
    batch, _, n, head_dim = v.shape
    q = torch.full((batch, N_HEADS, n, head_dim), size, dtype=v.dtype)
    return q, level[..., None, :, None].expand(v.shape).to(v.dtype)


@pytest.mark.parametrize("chunks", [[5], [3, 1, 1]], ids=["prefill", "decode"])
def test_sees_nothing_of_the_future_however_low_the_past_scores(attempt, rng, chunks):
    _, _, v = qkv(rng, 5)
    q, k = levels(v, 1e50, torch.tensor([-4.0, -3.0, -2.0, 1.0, 2.0]))

    out, _ = attempt(attend, q, k, v, torch.zeros(5, dtype=torch.float64), chunks, 8)

    # Scores grow with the key: a query's own position has all the weight.
    assert_close(out, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("chunks", [[6], [4, 1, 1]], ids=["prefill", "decode"])
def test_hides_padding_however_low_the_others_score(attempt, rng, chunks):
    _, _, v = qkv(rng, 6)
    n_pad = torch.tensor([2, 4])
    slots, pads = torch.arange(6), n_pad[:, None]
    level = torch.where(slots < pads, 9.0, torch.where(slots == pads, -1.0, -2.0))
    q, k = levels(v, 1e50, level)
    v[0, :, :2], v[1, :, :4] = 1e10, -1e10

    out, _ = attempt(attend, q, k, v, torch.zeros(5, dtype=torch.float64), chunks, 8, n_pad)

    for b, pad in enumerate([2, 4]):  # the first real token has all the weight
        expected = v[b, :, pad : pad + 1].repeat_interleave(2, dim=0).expand(-1, 6 - pad, -1)
        assert_close(out[b, :, pad:], expected)


def test_turns_by_exact_angles_in_bfloat16(attempt, rng):
    q, k, v = (x.bfloat16() for x in qkv(rng, 300, batch=1))
    v = v / v.abs().amax()
    frequencies = torch.tensor([1.7, 0.3, 0.9, 1.1, 0.1], dtype=torch.float64)

    out, _ = attempt(attend, q, k, v, frequencies, [297, 1, 2], 300)

    expected = uncached(*(x.double() for x in (q, k, v)), frequencies)
    # Turned queries and keys are rounded to 8 bits, which costs 0.02 here. Positions or frequencies
    # of 8 bits turn the last tokens by a radian and more.
    assert_close(out, expected.bfloat16(), rtol=0.0, atol=0.06)


def test_keeps_nothing_from_one_text_to_the_next(attempt, rng):
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float64, torch.float64]
    paces, pads = [1.0, 0.7, 0.7, 1.0, 1.0], [(0, 1), (0, 0), (2, 0), (0, 0), (1, 3)]
    texts = [
        (*qkv(rng, n, dtype=dtype), (pace * frequencies_for_specs(), torch.tensor(pad)))
        for n, dtype, pace, pad in zip([3, 7, 7, 4, 7], dtypes, paces, pads, strict=True)
    ]

    outs = attempt(attend_to_texts, texts)

    for out, (*text, (frequencies, n_pad)) in list(zip(outs, texts, strict=True))[1:]:
        for b, pad in enumerate(n_pad.tolist()):
            alone = uncached(*(x[b : b + 1, :, pad:].double() for x in text), frequencies)
            assert_close(out[b : b + 1, :, pad:], alone.to(out.dtype))


def test_attends_and_learns_without_a_cache(attempt, rng):
    q, k, v = qkv(rng, 5)
    frequencies = frequencies_for_specs()
    grad = torch.randn(q.shape, generator=rng, dtype=torch.float64)

    found = attempt(attend_without_cache, q, k, v, frequencies, grad)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = uncached(*inputs, frequencies)
    assert_close(found, [out.detach(), *torch.autograd.grad(out, inputs, grad)])


def test_sends_the_same_gradients_through_a_padded_sequence_as_through_that_sequence_alone(
    attempt, rng
):
    q, k, v = qkv(rng, 5)
    frequencies, n_pad = frequencies_for_specs(), torch.tensor([3, 1])
    grad = torch.randn(q.shape, generator=rng, dtype=torch.float64)
    grad[0, :, :3] = grad[1, :, :1] = 0

    _, *found = attempt(attend_without_cache, q, k, v, frequencies, grad, n_pad)

    expected = [torch.zeros_like(x) for x in (q, k, v)]
    for b, pad in enumerate([3, 1]):
        inputs = [x[b : b + 1, :, pad:].clone().requires_grad_() for x in (q, k, v)]
        out = uncached(*inputs, frequencies)
        for x, dx in zip(
            expected, torch.autograd.grad(out, inputs, grad[b : b + 1, :, pad:]), strict=True
        ):
            x[b, :, pad:] = dx[0]
    assert_close(found, expected)


def test_returns_all_keys_and_values_so_far(attempt, rng):
    _, k, v = qkv(rng, 6, dtype=torch.bfloat16)
    parts = list(zip(k.split([3, 1, 2], dim=-2), v.split([3, 1, 2], dim=-2), strict=True))

    found = attempt(append, parts, 8)

    expected = [(k[:, :, :n], v[:, :, :n], n) for n in (3, 4, 6)]
    assert_close(found, expected)


def test_starts_afresh_after_a_reset(attempt, rng):
    first, second = qkv(rng, 7), qkv(rng, 4)
    frequencies, n_pad = frequencies_for_specs(), torch.tensor([3, 1])

    emptied, out, length = attempt(attend_after_reset, first, n_pad, second, frequencies)

    assert emptied == 0
    assert_close(out, uncached(*second, frequencies))
    assert length == 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_reserves_all_its_room_when_it_is_made_as_float32_if_not_told(attempt, rng, dtype):
    _, k, v = qkv(rng, 3, dtype=dtype or torch.float32)

    reserved, found = attempt(reserve_and_append, k, v, 40, {"dtype": dtype} if dtype else {})

    assert_close(found, (k, v))
    assert reserved >= (k.nbytes + v.nbytes) * 40 // 3, f"{reserved} bytes for 40 tokens"


def test_keeps_its_memory_when_it_is_reset(attempt, rng):
    _, k, v = qkv(rng, 5)

    new_bytes, same = attempt(memory_after_reset, k, v)

    assert (new_bytes, same) == (0, True), f"{new_bytes} new bytes, the same memory: {same}"


def test_copies_what_it_is_given(attempt, rng):
    _, k, v = qkv(rng, 7)

    first, last = attempt(append_and_overwrite, k, v)

    assert_close((first, last), ((k[:, :, :3], v[:, :, :3]), (k, v)))


def test_keeps_two_caches_apart(attempt, rng):
    one, two = qkv(rng, 4), qkv(rng, 4)
    frequencies = frequencies_for_specs()

    outs = attempt(attend_in_turn, one, two, frequencies)

    assert_close(outs, [uncached(*one, frequencies), uncached(*two, frequencies)])


def test_refuses_more_tokens_than_it_has_room_for(attempt, rng):
    _, k, v = qkv(rng, 10)
    first, too_many, second = [
        (k[:, :, i], v[:, :, i]) for i in (slice(3), slice(3, 6), slice(6, 8))
    ]

    message, length, (keys, values) = attempt(append_too_many, first, too_many, second)

    assert message is not None, "6 tokens in a cache for 5 must raise ValueError"
    assert "5" in message, (
        f"the message must tell how many tokens there is room for, got: {message}"
    )
    assert length == 3
    kept = [0, 1, 2, 6, 7]
    assert_close([keys, values], [k[:, :, kept], v[:, :, kept]])


def test_a_step_costs_what_the_tokens_so_far_cost_not_the_room(attempt, rng):
    q, k, v = qkv(rng, 11)
    frequencies = frequencies_for_specs()

    out, flops = attempt(flops_of_a_step, q, k, v, frequencies, 300)

    assert_close(out, uncached(q, k, v, frequencies)[:, :, -1:])
    # One row of scores and one average over 11 keys, for each head of each sequence.
    assert flops <= 2 * 2 * BATCH * N_HEADS * 11 * HEAD_DIM


def test_one_more_token_copies_none_of_the_earlier_ones(attempt, rng):
    _, k, v = qkv(rng, 200)

    keys, values, new_bytes = attempt(bytes_of_a_step, k, v, 250)

    assert_close([keys, values], [k, v])
    assert new_bytes <= 4 * (k.nbytes + v.nbytes) / 200, (
        f"one token of {(k.nbytes + v.nbytes) // 200} bytes took {new_bytes} bytes of new memory"
    )
