"""Specs for exercise 48: Mistral's sliding window and its rolling cache."""

import math
from contextlib import suppress
from itertools import accumulate

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

BATCH, N_HEADS, N_KV_HEADS, HEAD_DIM, WINDOW, THETA = 2, 6, 3, 4, 5, 30.0
SIZES = N_HEADS, N_KV_HEADS, HEAD_DIM
D_MODEL = N_HEADS * HEAD_DIM


# --- what is done with the code under test -------------------------------------------------------


def mask(ex, q_positions, k_positions, window):
    return ex.window_mask(q_positions, k_positions, window)


def new_cache(ex, batch, window, dtype=torch.float64, sizes=SIZES):
    _, n_kv_heads, head_dim = sizes
    return ex.RollingKVCache(batch, n_kv_heads, window, head_dim, dtype=dtype)


def new_layer(ex, weights, window, sizes=SIZES):
    n_heads, n_kv_heads, head_dim = sizes
    layer = ex.SlidingWindowAttention(n_heads * head_dim, n_heads, n_kv_heads, window, THETA)
    layer = layer.to(weights["q_proj.weight"].dtype)
    layer.load_state_dict(weights)
    return layer


def attend(ex, weights, x, window, chunks, sizes=SIZES):
    """A text in chunks through one cache: all results in a row, and the cache's length after it."""
    layer = new_layer(ex, weights, window, sizes)
    cache = new_cache(ex, len(x), window, x.dtype, sizes)
    with torch.no_grad():
        outs = [layer(chunk, cache) for chunk in x.split(chunks, dim=1)]
    return torch.cat(outs, dim=1), cache.length


def attend_again(ex, weights, texts):
    """One layer reads several texts, each with and without a cache, in bfloat16 and in float64."""
    layer, outs = new_layer(ex, weights, WINDOW), []
    with torch.no_grad():
        for x in texts:
            layer.bfloat16()(x.bfloat16())
            layer.double()  # the weights are whole numbers of 1/8, which bfloat16 has
            caches = [new_cache(ex, len(x), WINDOW) for _ in range(2)]
            outs += [layer(x), *(layer(x, cache) for cache in caches)]
    return outs


def attend_without_cache(ex, weights, x, grad):
    layer, x = new_layer(ex, weights, WINDOW), x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad)
    return out, x.grad, {name: parameter.grad for name, parameter in layer.named_parameters()}


def attend_after_reset(ex, weights, first, second, chunks):
    layer, cache = new_layer(ex, weights, WINDOW), new_cache(ex, BATCH, WINDOW)
    with torch.no_grad():
        layer(first, cache)
        cache.reset()
        length = cache.length
        outs = [layer(chunk, cache) for chunk in second.split(chunks, dim=1)]
    return length, torch.cat(outs, dim=1)


def attend_with_another_window(ex, weights, x, window):
    return new_layer(ex, weights, WINDOW)(x, new_cache(ex, len(x), window))


def attend_with_thetas(ex, weights, x, thetas):
    """Layers of one size, each with a base of its own; None: the one that they have by default."""
    outs = []
    for theta in thetas:
        own = {} if theta is None else {"rope_theta": theta}
        layer = ex.SlidingWindowAttention(D_MODEL, N_HEADS, N_KV_HEADS, WINDOW, **own).double()
        layer.load_state_dict(weights)
        with torch.no_grad():
            outs.append(layer(x))
    return outs


def device_of_slots(ex):
    """On the device "meta" tensors have shapes and no memory, and every machine has it."""
    cache = ex.RollingKVCache(BATCH, N_KV_HEADS, WINDOW, HEAD_DIM, device="meta")
    return cache.keys.device.type, cache.values.device.type


def cache_after_another_window(ex, weights, x, k, window):
    cache = new_cache(ex, len(x), window)
    cache.append(k, k)
    with suppress(ValueError):
        new_layer(ex, weights, WINDOW)(x, cache)
    n_tokens = k.shape[2]
    return cache.length, cache.keys[:, :, :n_tokens], cache.values[:, :, :n_tokens]


def memory(ex, k, chunks):
    """Where keys and values stand, at first, after each chunk, and after a reset and one more."""
    cache = ex.RollingKVCache(len(k), N_KV_HEADS, WINDOW, HEAD_DIM)
    found = [(cache.keys.data_ptr(), cache.values.data_ptr())]
    for new in k.split(chunks, dim=2):
        cache.append(new, new)
        found.append((cache.keys.data_ptr(), cache.values.data_ptr()))
    cache.reset()
    cache.append(k, k)
    return [*found, (cache.keys.data_ptr(), cache.values.data_ptr())], str(cache.keys.dtype)


def append(ex, k, v, window, chunks):
    """After each chunk: what append gave, by position, and what stands in the slots."""
    cache, found = new_cache(ex, len(k), window, k.dtype), []
    for new_k, new_v in zip(k.split(chunks, dim=2), v.split(chunks, dim=2), strict=True):
        keys, values, positions = cache.append(new_k, new_v)
        order = positions.argsort()
        given = positions[order], keys[:, :, order], values[:, :, order]
        found.append((given, cache.length, cache.keys.clone(), cache.values.clone()))
    return found


def cost_of_a_step(ex, weights, x, window):
    """The last token's result and its flops, the bytes of the cache and those of an append."""
    layer = new_layer(ex, weights, window)
    with NewMemory() as reserved, torch.no_grad():
        cache = new_cache(ex, len(x), window)
    with torch.no_grad():
        layer(x[:, :-1], cache)
        with counted_flops() as counter:
            out = layer(x[:, -1:], cache)
        k = torch.ones(len(x), N_KV_HEADS, 1, HEAD_DIM, dtype=x.dtype)
        with NewMemory() as of_append:
            cache.append(k, k)
    return out, counter.get_total_flops(), reserved.bytes, of_append.bytes


def prefill(ex, weights, x, chunk_size, n_before, n_decoded):
    """A beginning, a prompt by prefill, and the rest token by token; what prefill gave at once."""
    layer, cache = new_layer(ex, weights, WINDOW), new_cache(ex, len(x), WINDOW)
    n_prompt = x.shape[1] - n_before - n_decoded
    before, prompt, *tokens = x.split([n_before, n_prompt, *[1] * n_decoded], dim=1)
    sizes = []

    def noted(chunk, cache):
        sizes.append(chunk.shape[1])
        return layer(chunk, cache)

    with torch.no_grad():
        outs = [layer(before, cache), ex.prefill(noted, prompt, cache, chunk_size)]
        outs += [*(layer(token, cache) for token in tokens)]
    return torch.cat(outs, dim=1), sizes


def logits(ex, weights, ids, chunks):
    """Mistral in transformers, with the attention under test and its caches in every layer."""
    model = mistral(weights)
    for layer in model.model.layers:
        own = {name: layer.self_attn.get_parameter(name).data for name in weights_of_a_layer()}
        layer.self_attn = InTheirPlace(
            new_layer(ex, own, WINDOW), new_cache(ex, len(ids), WINDOW, torch.float64)
        )
    with torch.no_grad():
        outs = [model(chunk, use_cache=False).logits for chunk in ids.split(chunks, dim=1)]
    return torch.cat(outs, dim=1)


class InTheirPlace(torch.nn.Module):
    """Takes what transformers gives to an attention, and returns what it expects of one."""

    def __init__(self, layer, cache):
        super().__init__()
        self.layer, self.cache = layer, cache

    def forward(self, hidden_states, **_):
        return self.layer(hidden_states, self.cache), None


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def flops_of_fused_attention(q, k, v, *_, out_shape=None, **__):
    """PyTorch's counter knows the fused attention of GPUs only."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def counted_flops():
    return FlopCounterMode(display=False, custom_mapping={FUSED: flops_of_fused_attention})


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


# --- weights and oracles -------------------------------------------------------------------------


def randn(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def weights_of_a_layer(sizes=SIZES):
    n_heads, n_kv_heads, head_dim = sizes
    heads = {"q_proj": n_heads, "k_proj": n_kv_heads, "v_proj": n_kv_heads, "o_proj": n_heads}
    return {f"{name}.weight": (n * head_dim, n_heads * head_dim) for name, n in heads.items()}


def random_weights(rng, sizes=SIZES):
    """Large enough that scores differ, and with them the weights of the values."""
    return {name: 0.4 * randn(rng, *shape) for name, shape in weights_of_a_layer(sizes).items()}


def full_cache(weights, x, window, sizes=SIZES, theta=THETA):
    """The definition: every key is kept, turned as complex numbers, and a mask hides most."""
    n_heads, n_kv_heads, head_dim = sizes
    q, k, v = (
        (x @ weights[f"{name}.weight"].mT).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    half, n = head_dim // 2, x.shape[1]
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.exp(1j * torch.arange(n)[:, None] * frequencies)
    q, k = (torch.complex(y[..., :half], y[..., half:]) * turns for y in (q, k))
    k, v = (y.repeat_interleave(n_heads // n_kv_heads, dim=1) for y in (k, v))
    scores = (q @ k.mH).real / math.sqrt(head_dim)
    seen = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - window)
    out = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ v
    return out.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].mT


def mistral(weights):
    """A tiny Mistral in transformers, with these weights in the layers' attention."""
    from transformers.models.mistral.configuration_mistral import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralForCausalLM

    config = MistralConfig(
        vocab_size=23,
        hidden_size=D_MODEL,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = MistralForCausalLM(config).to(torch.float64).eval()
    model.load_state_dict(weights)
    return model


def random_model(rng):
    """Weights for all of it, large enough that everything matters."""
    state = mistral_shapes()
    return {
        name: randn(rng, *shape) * 1.5 / math.sqrt(shape[-1])
        if len(shape) == 2
        else 1 + 0.3 * randn(rng, *shape)
        for name, shape in state.items()
    }


def mistral_shapes():
    shapes = {f"self_attn.{name}": shape for name, shape in weights_of_a_layer().items()}
    shapes |= {f"mlp.{name}_proj.weight": (20, D_MODEL) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (D_MODEL, 20)}
    shapes |= {f"{name}_layernorm.weight": (D_MODEL,) for name in ("input", "post_attention")}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in shapes.items()}
    ends = {"model.embed_tokens.weight": (23, D_MODEL), "lm_head.weight": (23, D_MODEL)}
    return shapes | ends | {"model.norm.weight": (D_MODEL,)}


# --- the specs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("start", [0, 2**40 - 6])
def test_a_window_ends_with_the_token_itself(attempt, start, window):
    q_positions = start + torch.tensor([7, 0, 12])
    # A distance of 2¹⁶ or 2³² would be 0 in a narrow integer.
    k_positions = start + torch.tensor([8, 3, 7, -(2**16), 0, 12, 4, 12 - 2**32, 9])

    seen = attempt(mask, q_positions, k_positions, window)

    expected = [[j in range(i - window + 1, i + 1) for j in k_positions] for i in q_positions]
    assert_close(seen, torch.tensor(expected))


@pytest.mark.parametrize(
    ("n_prompt", "window"), [(3, WINDOW), (5, WINDOW), (6, WINDOW), (17, WINDOW), (3, 1), (3, 40)]
)
def test_reads_a_prompt_and_goes_on_as_with_a_full_cache(attempt, rng, n_prompt, window):
    weights, x = random_weights(rng), randn(rng, BATCH, n_prompt + 12, D_MODEL)

    out, length = attempt(attend, weights, x, window, [n_prompt, *[1] * 12])

    assert_close(out, full_cache(weights, x, window))
    assert length == n_prompt + 12


@pytest.mark.parametrize("sizes", [(1, 1, 6), (4, 4, 2), (3, 1, 10)])
def test_takes_heads_of_any_number_and_size(attempt, rng, sizes):
    n_heads, _, head_dim = sizes
    weights, x = random_weights(rng, sizes), randn(rng, BATCH, 9, n_heads * head_dim)

    out, _ = attempt(attend, weights, x, WINDOW, [4, 1, 4], sizes)

    assert_close(out, full_cache(weights, x, WINDOW, sizes))


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # as small as they come
@given(
    window=st.integers(1, 6),
    chunks=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
@example(window=1, chunks=[3, 1, 2], seed=0)
@example(window=3, chunks=[7, 8, 1], seed=0)
def test_takes_a_text_in_chunks_of_any_size(attempt, window, chunks, seed):
    rng = torch.Generator().manual_seed(seed)
    weights, x = random_weights(rng), randn(rng, 1, sum(chunks), D_MODEL)

    out, _ = attempt(attend, weights, x, window, chunks)

    assert_close(out, full_cache(weights, x, window))


def test_puts_token_t_into_slot_t_mod_window(attempt, rng):
    k = randn(rng, BATCH, N_KV_HEADS, 22, HEAD_DIM, dtype=torch.bfloat16)
    v = randn(rng, BATCH, N_KV_HEADS, 22, HEAD_DIM, dtype=torch.bfloat16)

    found = attempt(append, k, v, WINDOW, CHUNKS)

    for end, (_, length, keys, values) in zip(accumulate(CHUNKS), found, strict=True):
        tokens = list(range(max(0, end - WINDOW), end))
        slots = [t % WINDOW for t in tokens]
        assert length == end
        assert_close([keys[:, :, slots], values[:, :, slots]], [k[:, :, tokens], v[:, :, tokens]])


CHUNKS = [3, 1, 1, 1, 4, 7, 5]


def test_gives_new_tokens_all_that_their_windows_hold(attempt, rng):
    k, v = (randn(rng, BATCH, N_KV_HEADS, 22, HEAD_DIM) for _ in range(2))

    found = attempt(append, k, v, WINDOW, CHUNKS)

    for n_new, end, (there, *_) in zip(CHUNKS, accumulate(CHUNKS), found, strict=True):
        (positions, keys, values), start = there, end - n_new
        needed = torch.arange(max(0, start - WINDOW + 1), end)
        assert positions.dtype == torch.int64
        assert set(needed.tolist()) <= set(positions.tolist()), "a token in the window is missing"
        assert len(set(positions.tolist())) == len(positions), "a token is there twice"
        assert len(positions) <= WINDOW + n_new
        assert_close([keys, values], [k[:, :, positions], v[:, :, positions]])


def test_keeps_the_memory_that_it_reserved(attempt, rng):
    k = randn(rng, BATCH, N_KV_HEADS, 13, HEAD_DIM, dtype=torch.float32)

    places, dtype = attempt(memory, k, [WINDOW, 1, 7])

    assert places == places[:1] * 5, "keys or values stand in other memory than at first"
    assert dtype == "torch.float32"


def test_gives_the_same_however_often_it_is_called(attempt, rng):
    weights = {name: (8 * w).round() / 8 for name, w in random_weights(rng).items()}
    texts = [randn(rng, batch, n, D_MODEL) for batch, n in ((2, 7), (1, 12), (3, 4))]

    outs = attempt(attend_again, weights, texts)

    assert_close(outs, [full_cache(weights, x, WINDOW) for x in texts for _ in range(3)])


def test_turns_by_the_base_that_each_layer_has(attempt, rng):
    weights, x = random_weights(rng), randn(rng, BATCH, 9, D_MODEL)

    outs = attempt(attend_with_thetas, weights, x, [3.0, None, 50.0])

    expected = [full_cache(weights, x, WINDOW, theta=theta) for theta in (3.0, 10_000.0, 50.0)]
    assert_close(outs, expected)


def test_reserves_its_slots_on_the_device_that_is_asked_for(attempt):
    assert attempt(device_of_slots) == ("meta", "meta")


def test_keeps_exact_angles_in_bfloat16(attempt, rng):
    weights, x = random_weights(rng), randn(rng, 1, 600, D_MODEL)
    coarse = {name: weight.bfloat16() for name, weight in weights.items()}

    out, _ = attempt(attend, coarse, x.bfloat16(), WINDOW, [590, *[1] * 10])

    expected = full_cache(weights, x, WINDOW)
    error = (out.double() - expected)[:, 300:].square().mean().sqrt() / expected.std()
    assert out.dtype == torch.bfloat16
    assert error < 0.03, f"off by {error:.3f} standard deviations at positions from 300 on"


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_lets_a_token_see_itself_however_low_it_scores(attempt, rng, size):
    weights, x = random_weights(rng, (2, 2, 4)), randn(rng, BATCH, 6, 8)
    weights["k_proj.weight"] *= size
    weights["q_proj.weight"] = -weights["k_proj.weight"]

    out, _ = attempt(attend, weights, x, 1, [4, 2], (2, 2, 4))

    assert_close(out, x @ weights["v_proj.weight"].mT @ weights["o_proj.weight"].mT)


def test_attends_and_learns_without_a_cache(attempt, rng):
    weights, x = random_weights(rng), randn(rng, BATCH, 13, D_MODEL)
    grad = randn(rng, *x.shape)

    out, of_x, gradients = attempt(attend_without_cache, weights, x, grad)

    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    expected = full_cache(weights, x.requires_grad_(), WINDOW)
    for_x, *of_weights = torch.autograd.grad(expected, [x, *weights.values()], grad)
    assert_close(out, expected.detach())
    assert_close(of_x, for_x)
    assert_close(gradients, dict(zip(weights, of_weights, strict=True)))


@pytest.mark.parametrize("n_first", [2, WINDOW, 8])
def test_starts_afresh_after_a_reset(attempt, rng, n_first):
    weights = random_weights(rng)
    first, second = randn(rng, BATCH, n_first, D_MODEL), randn(rng, BATCH, 9, D_MODEL)

    length, out = attempt(attend_after_reset, weights, first, second, [2, 1, 4, 2])

    assert length == 0
    assert_close(out, full_cache(weights, second, WINDOW))


def test_a_step_late_in_a_text_costs_what_the_window_costs(attempt, rng):
    weights, x = random_weights(rng), randn(rng, BATCH, 40, D_MODEL)

    out, flops, reserved, new_bytes = attempt(cost_of_a_step, weights, x, WINDOW)

    assert_close(out, full_cache(weights, x, WINDOW)[:, -1:])
    projections = 2 * BATCH * sum(weight.numel() for weight in weights.values())
    # One row of scores and one average over the kept tokens and the new one.
    assert flops <= projections + 2 * 2 * BATCH * N_HEADS * (WINDOW + 1) * HEAD_DIM
    token = 2 * BATCH * N_KV_HEADS * HEAD_DIM * 8  # bytes of one key and one value
    assert reserved <= token * (WINDOW + 1)
    assert new_bytes <= 4 * token * (WINDOW + 1), (
        f"one more token took {new_bytes} bytes of new memory, the whole window has "
        f"{token * WINDOW}"
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 7, 100])
def test_prefills_in_chunks_what_one_call_would_give(attempt, rng, chunk_size):
    weights, x = random_weights(rng), randn(rng, BATCH, 19, D_MODEL)

    out, sizes = attempt(prefill, weights, x, chunk_size, 3, 2)

    assert_close(out, full_cache(weights, x, WINDOW))
    assert sizes == [min(chunk_size, 14 - start) for start in range(0, 14, chunk_size)]


@pytest.mark.parametrize("window", [4, 6])
def test_rejects_a_cache_of_another_window(attempt, rng, window):
    weights, x = random_weights(rng), randn(rng, BATCH, 3, D_MODEL)

    with pytest.raises(ValueError, match=rf"{WINDOW}\D+{window}|{window}\D+{WINDOW}"):
        attempt(attend_with_another_window, weights, x, window)


def test_leaves_a_cache_of_another_window_as_it_was(attempt, rng):
    weights, x = random_weights(rng), randn(rng, BATCH, 7, D_MODEL)
    k = randn(rng, BATCH, N_KV_HEADS, 4, HEAD_DIM)

    length, keys, values = attempt(cache_after_another_window, weights, x, k, WINDOW + 1)

    assert length == 4
    assert_close([keys, values], [k, k])


def test_makes_mistral_say_what_it_says_in_transformers(attempt, rng):
    weights, ids = random_model(rng), torch.randint(23, (2, 24), generator=rng)

    out = attempt(logits, weights, ids, [9, 4, *[1] * 7, 4])

    # transformers computes cos and sin in float32, whatever the model's dtype.
    expected = mistral(weights)(ids).logits.detach()
    assert_close(out, expected, rtol=1e-5, atol=1e-5)
