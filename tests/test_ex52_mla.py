"""Specs for exercise 52: multi-head latent attention (MLA)."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

SIZES = {
    "d_model": 11,
    "n_heads": 3,
    "q_rank": 8,
    "kv_rank": 14,
    "nope_dim": 4,
    "rope_dim": 6,
    "v_dim": 5,
}
OTHERS = {
    "wide values": SIZES | {"v_dim": 13, "kv_rank": 7},
    "mostly turned": SIZES | {"nope_dim": 2, "rope_dim": 8, "n_heads": 5},
    "one head": SIZES | {"n_heads": 1, "rope_dim": 2, "nope_dim": 1, "v_dim": 1},
}
EPS = 0.1  # of the norms, so large that its place matters
LITE = {"kv_rank": 512, "rope_dim": 64}  # DeepSeek-V2-Lite: 16 heads of 128 features, without rope
WAYS = ["forward", "absorbed"]


# --- run on the code under test ------------------------------------------------------------------


def new_layer(ex, sizes, weights, factor=1.0):
    layer = ex.MultiHeadLatentAttention(**sizes, attention_factor=factor, norm_eps=EPS)
    layer.to(weights["o_proj.weight"].dtype).load_state_dict(weights)
    return layer


def new_cache(ex, sizes, batch, max_len, dtype=torch.float64):
    return ex.LatentKVCache(batch, max_len, sizes["kv_rank"], sizes["rope_dim"], dtype=dtype)


def kept(cache, sizes, batch, dtype=torch.float64):
    """All that a cache holds: what it returns where no token is added."""
    empty = [torch.zeros(batch, 0, sizes[name], dtype=dtype) for name in ("kv_rank", "rope_dim")]
    return cache.append(*empty)


def attend(ex, sizes, weights, x, frequencies, way="forward", factor=1.0):
    """A whole text at once, without a cache."""
    layer = new_layer(ex, sizes, weights, factor)
    run = layer if way == "forward" else ex.absorb(layer)
    return run(x, frequencies)


def attend_in_chunks(ex, sizes, weights, x, frequencies, chunks, factor=1.0):
    """A text through one cache, each chunk in its way: results, lengths, and what is kept."""
    layer = new_layer(ex, sizes, weights, factor)
    runs = {"forward": layer, "absorbed": ex.absorb(layer)}
    cache = new_cache(ex, sizes, len(x), x.shape[1] + 2, x.dtype)
    outs, lengths = [], [cache.length]
    with torch.no_grad():
        for part, (_, way) in zip(x.split([n for n, _ in chunks], dim=1), chunks, strict=True):
            outs.append(runs[way](part, frequencies, cache))
            lengths.append(cache.length)
        held = kept(cache, sizes, len(x), x.dtype)
    return torch.cat(outs, dim=1), lengths, held


def attend_to_given(ex, sizes, weights, latents, rope_keys, x, frequencies, way):
    """New tokens after others that somebody else has put into the cache."""
    layer = new_layer(ex, sizes, weights)
    cache = new_cache(ex, sizes, len(x), 20)
    with torch.no_grad():
        cache.append(latents, rope_keys)
        return (layer if way == "forward" else ex.absorb(layer))(x, frequencies, cache)


def attend_and_differentiate(ex, sizes, weights, x, frequencies, grad, factor):
    layer = new_layer(ex, sizes, weights, factor)
    x.requires_grad_()
    layer(x, frequencies).backward(grad)
    return {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def attend_in_turn(ex, sizes, several, texts, frequencies, way):
    """Each layer writes every text, all with caches of their own, token by token in turn."""
    layers = [new_layer(ex, sizes, weights) for weights in several]
    runs = [layer if way == "forward" else ex.absorb(layer) for layer in layers]
    all_of_them = [(run, x, new_cache(ex, sizes, *x.shape[:2]), []) for x in texts for run in runs]
    with torch.no_grad():
        for t in range(texts[0].shape[1]):
            for run, x, cache, out in all_of_them:
                out.append(run(x[:, t : t + 1], frequencies, cache))
    return [torch.cat(out, dim=1) for *_, out in all_of_them]


def attend_again(ex, sizes, weights, texts, way):
    """One layer, in bfloat16 and in float64 by turns, and one cache that is reset each time."""
    layer = new_layer(ex, sizes, weights)
    cache, outs = new_cache(ex, sizes, 2, 12), []
    with torch.no_grad():
        for x, frequencies in texts:
            layer.bfloat16()
            run = layer if way == "forward" else ex.absorb(layer)
            run(x.bfloat16(), frequencies)
            layer.double()
            run = layer if way == "forward" else ex.absorb(layer)
            cache.reset()
            outs.append([run(x, frequencies), run(x, frequencies, cache)])
    return outs


def absorb_and_look(ex, sizes, weights, x, frequencies, mode):
    """The layer before and after an absorbed one was made of it and used.

    returns: result, flops, mode and gradients before and after; the weights; who still learns
    """
    layer = new_layer(ex, sizes, weights)
    layer.train(mode)
    layer(x, frequencies).sum().backward()
    seen = []
    for _ in range(2):
        with counting() as counter:
            out = layer(x, frequencies)
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
        seen.append([out.detach(), counter.get_total_flops(), layer.training, grads])
        ex.absorb(layer)(x, frequencies)
    layer.zero_grad()
    out.sum().backward()
    state = {name: value.detach() for name, value in layer.state_dict().items()}
    learns = {name: p.grad is not None for name, p in layer.named_parameters()}
    return *seen, state, learns


def shapes(ex, sizes):
    layer = ex.MultiHeadLatentAttention(**sizes)
    return {name: list(parameter.shape) for name, parameter in layer.named_parameters()}


def first_norms(ex, sizes):
    layer = ex.MultiHeadLatentAttention(**sizes)
    return [layer.q_a_layernorm.weight, layer.kv_a_layernorm.weight]


def append(ex, sizes, pairs, max_len):
    dtype = pairs[0][0].dtype
    cache = new_cache(ex, sizes, len(pairs[0][0]), max_len, dtype)
    return [(*cache.append(*pair), cache.length) for pair in pairs]


def append_wrong(ex, sizes, first, wrong, second):
    """What is said of a wrong call, and the cache after it."""
    cache = new_cache(ex, sizes, len(first[0]), 5)
    cache.append(*first)
    message = None
    try:
        cache.append(*wrong)
    except ValueError as error:
        message = str(error)
    return message, cache.length, cache.append(*second)


def append_and_overwrite(ex, sizes, pairs):
    """The caller uses its memory again after two calls, and the cache grows after that.

    Another cache is full with the first call.
    """
    batch, n, _ = pairs[0][0].shape
    cache, full = new_cache(ex, sizes, batch, 9), new_cache(ex, sizes, batch, n)
    mine = [[x.clone() for x in pair] for pair in pairs[:2]]
    full.append(*mine[0])
    cache.append(*mine[0])
    cache.append(*mine[1])
    for pair in mine:
        for x in pair:
            x.zero_()
    return kept(full, sizes, batch), cache.append(*pairs[2])


def reserved(ex, batch, max_len, kv_rank, rope_dim, dtype):
    """The bytes of memory that a new cache takes."""
    with NewMemory() as memory:
        cache = ex.LatentKVCache(batch, max_len, kv_rank, rope_dim, **dtype)
    return memory.bytes, cache.length


def memory_of_a_step(ex, sizes, first, last):
    """New bytes for one more token; new bytes for a reset; and whether the memory is the same."""
    cache = new_cache(ex, sizes, len(first[0]), first[0].shape[1] + 50)
    cache.append(*first)
    with NewMemory() as step:
        all_of_them = cache.append(*last)
    before, held = [storage(x) for x in all_of_them], [x.clone() for x in all_of_them]
    with NewMemory() as reset:
        cache.reset()
    again = [storage(x) for x in cache.append(*last)]
    return step.bytes, held, reset.bytes, before == again


def flops_of_texts(ex, sizes, weights, texts, frequencies):
    """The flops of forward on each text, without a cache."""
    layer, counts = new_layer(ex, sizes, weights), []
    with torch.no_grad():
        for x in texts:
            with counting() as counter:
                layer(x, frequencies)
            counts.append(counter.get_total_flops())
    return counts


def flops_of_steps(ex, sizes, weights, x, frequencies, steps, n_new, way):
    """The flops of n_new tokens, for each number of tokens before them and each room."""
    layer = new_layer(ex, sizes, weights)
    run, counts = layer if way == "forward" else ex.absorb(layer), []
    with torch.no_grad():
        for start, room in steps:
            cache = new_cache(ex, sizes, len(x), room)
            layer(x[:, :start], frequencies, cache)
            with counting() as counter:
                run(x[:, start : start + n_new], frequencies, cache)
            counts.append(counter.get_total_flops())
    return counts


def counting():
    return FlopCounterMode(display=False, custom_mapping={FUSED: flops_of_fused_attention})


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


# --- inputs --------------------------------------------------------------------------------------


def shapes_of(sizes):
    """Every parameter, by the names that the docstring promises."""
    d_model, n_heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim = sizes.values()
    return {
        "q_a_proj.weight": [q_rank, d_model],
        "q_a_layernorm.weight": [q_rank],
        "q_b_proj.weight": [n_heads * (nope_dim + rope_dim), q_rank],
        "kv_a_proj_with_mqa.weight": [kv_rank + rope_dim, d_model],
        "kv_a_layernorm.weight": [kv_rank],
        "kv_b_proj.weight": [n_heads * (nope_dim + v_dim), kv_rank],
        "o_proj.weight": [d_model, n_heads * v_dim],
    }


def randn(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def make_weights(rng, sizes=SIZES):
    """So large that every feature matters."""
    weights = {}
    for name, shape in shapes_of(sizes).items():
        weight = randn(rng, *shape)
        weights[name] = 1 + 0.3 * weight if len(shape) == 1 else 1.5 * weight / shape[1] ** 0.5
    return weights


def make_frequencies(sizes=SIZES):
    return 1.7 * 0.4 ** torch.arange(sizes["rope_dim"] // 2, dtype=torch.float64)


def make_tokens(rng, n, batch=2, dtype=torch.float64, sizes=SIZES):
    """What n tokens leave in a cache."""
    return tuple(randn(rng, batch, n, sizes[k], dtype=dtype) for k in ("kv_rank", "rope_dim"))


# --- two oracles: DeepSeek's layer in transformers, and the definition, head by head --------------


def deepseek(sizes, weights, rope_parameters=None):
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=sizes["d_model"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_heads"],
        q_lora_rank=sizes["q_rank"],
        kv_lora_rank=sizes["kv_rank"],
        qk_nope_head_dim=sizes["nope_dim"],
        qk_rope_head_dim=sizes["rope_dim"],
        v_head_dim=sizes["v_dim"],
        rope_parameters=rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="sdpa",
    )
    layer = DeepseekV3Attention(config, layer_idx=0)
    # Theirs round to float32, and have an eps of 1e-6.
    layer.q_a_layernorm = torch.nn.RMSNorm(sizes["q_rank"], eps=EPS)
    layer.kv_a_layernorm = torch.nn.RMSNorm(sizes["kv_rank"], eps=EPS)
    layer.double().eval().load_state_dict(weights)
    return layer


def run_deepseek(layer, x, frequencies, cache=None):
    angles = (torch.arange(x.shape[1])[:, None] * frequencies).repeat(1, 2)[None]
    return layer(x, (angles.cos(), angles.sin()), None, past_key_values=cache)[0]


def turned(x, positions, frequencies):
    """Neighbours as complex numbers; x is (batch, n, rope_dim)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.exp(1j * positions[:, None] * frequencies)
    return torch.view_as_real(pairs * turns).flatten(-2)


def normed(x, weight):
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def leave(sizes, weights, x, frequencies, start=0):
    """What tokens leave in the cache."""
    c, k_rope = (x @ weights["kv_a_proj_with_mqa.weight"].T).tensor_split([sizes["kv_rank"]], -1)
    positions = torch.arange(start, start + x.shape[1])
    return normed(c, weights["kv_a_layernorm.weight"]), turned(k_rope, positions, frequencies)


def by_definition(sizes, weights, x, frequencies, before=None, factor=1.0):
    """Head by head. `before`: what earlier tokens left."""
    start = before[0].shape[1] if before else 0
    latents, rope_keys = leave(sizes, weights, x, frequencies, start)
    if before:
        latents, rope_keys = (
            torch.cat(pair, 1) for pair in zip(before, (latents, rope_keys), strict=True)
        )
    positions = torch.arange(start, start + x.shape[1])
    hidden = torch.arange(latents.shape[1]) > positions[:, None]
    nope, rope, v_dim, heads = sizes["nope_dim"], sizes["rope_dim"], sizes["v_dim"], []
    c_q = normed(x @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"])
    for h in range(sizes["n_heads"]):
        w_q = weights["q_b_proj.weight"][h * (nope + rope) : (h + 1) * (nope + rope)]
        w_kv = weights["kv_b_proj.weight"][h * (nope + v_dim) : (h + 1) * (nope + v_dim)]
        q = c_q @ w_q.T
        q = torch.cat((q[..., :nope], turned(q[..., nope:], positions, frequencies)), -1) * factor
        k = torch.cat((latents @ w_kv[:nope].T, rope_keys), -1) * factor
        scores = (q @ k.mT / math.sqrt(nope + rope)).masked_fill(hidden, -math.inf)
        heads.append(torch.softmax(scores, -1) @ (latents @ w_kv[nope:].T))
    return torch.cat(heads, -1) @ weights["o_proj.weight"].T


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_returns_all_that_was_left_so_far(attempt, rng, dtype):
    latents, rope_keys = make_tokens(rng, 6, dtype=dtype)
    parts = list(zip(latents.split([3, 0, 1, 2], 1), rope_keys.split([3, 0, 1, 2], 1), strict=True))

    found = attempt(append, SIZES, parts, 8)

    assert_close(found, [(latents[:, :n], rope_keys[:, :n], n) for n in (3, 3, 4, 6)])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_reserves_a_latent_and_one_rotary_key_for_each_token(attempt, dtype):
    given = {"dtype": dtype} if dtype else {}

    (small, length), (large, _) = (
        attempt(reserved, 3, n, LITE["kv_rank"], LITE["rope_dim"], given) for n in (10, 30)
    )

    a_token = (large - small) / (3 * 20 * (dtype or torch.float32).itemsize)
    heads = {"MHA": 16, "GQA of 4": 4, "MQA": 1}
    others = {name: 2 * n_kv_heads * 128 for name, n_kv_heads in heads.items()}
    assert a_token == 512 + 64, f"{a_token} numbers a token; of the same width keep {others}"
    assert others["MQA"] < a_token < others["GQA of 4"] < others["MHA"]
    assert length == 0


def test_copies_what_it_is_given(attempt, rng):
    latents, rope_keys = make_tokens(rng, 7)
    parts = list(zip(latents.split([3, 2, 2], 1), rope_keys.split([3, 2, 2], 1), strict=True))

    first, last = attempt(append_and_overwrite, SIZES, parts)

    assert_close((first, last), ((latents[:, :3], rope_keys[:, :3]), (latents, rope_keys)))


def test_takes_no_new_memory_for_a_token_or_a_reset(attempt, rng):
    latents, rope_keys = make_tokens(rng, 200)
    parts = zip(latents.split([199, 1], 1), rope_keys.split([199, 1], 1), strict=True)

    step, held, reset, same = attempt(memory_of_a_step, SIZES, *parts)

    assert_close(held, [latents, rope_keys])
    one = (latents.nbytes + rope_keys.nbytes) // 200
    assert step <= 4 * one, f"a token of {one} bytes took {step} bytes of new memory"
    assert (reset, same) == (0, True), f"a reset took {reset} bytes; the same memory: {same}"


def test_refuses_more_tokens_than_it_has_room_for(attempt, rng):
    first, too_many, second = (make_tokens(rng, n) for n in (3, 3, 2))

    message, length, held = attempt(append_wrong, SIZES, first, too_many, second)

    assert message is not None, "6 tokens in a cache for 5 must raise ValueError"
    assert "5" in message, f"the message must tell how many there is room for, got: {message}"
    assert length == 3
    assert_close(held, tuple(torch.cat(pair, 1) for pair in zip(first, second, strict=True)))


WRONG_SHAPES = {
    "a latent of one number": ((2, 1, 1), (2, 1, 6)),
    "a rotary key of one number": ((2, 1, 14), (2, 1, 1)),
    "a latent too wide": ((2, 1, 15), (2, 1, 6)),
    "a key with the latent's width": ((2, 1, 14), (2, 1, 14)),
    "one sequence": ((1, 1, 14), (1, 1, 6)),
    "one sequence's keys": ((2, 1, 14), (1, 1, 6)),
    "three sequences": ((3, 1, 14), (3, 1, 6)),
    "one key for two latents": ((2, 2, 14), (2, 1, 6)),
    "two keys for one latent": ((2, 1, 14), (2, 2, 6)),
    "a rotary key a head": ((2, 1, 14), (2, 3, 1, 6)),
    "one sequence without its axis": ((2, 14), (2, 6)),
    "one token's numbers alone": ((14,), (6,)),
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES)
def test_refuses_another_shape(attempt, rng, wrong):
    first, second = make_tokens(rng, 3), make_tokens(rng, 2)
    call = tuple(randn(rng, *shape) for shape in WRONG_SHAPES[wrong])

    message, length, held = attempt(append_wrong, SIZES, first, call, second)

    assert message is not None, f"{wrong} must raise ValueError"
    assert length == 3
    assert_close(held, tuple(torch.cat(pair, 1) for pair in zip(first, second, strict=True)))


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, *OTHERS.values()], ids=["usual", *OTHERS])
def test_has_the_parameters_of_deepseeks_checkpoints(attempt, sizes):
    found = attempt(shapes, sizes)

    assert_close(found, shapes_of(sizes))


def test_begins_with_norms_of_ones(attempt):
    found = attempt(first_norms, SIZES)

    assert_close([x.detach() for x in found], [torch.ones(8), torch.ones(14)])


@pytest.mark.parametrize("rope_dim", [1, 7])
def test_refuses_an_odd_number_of_rotary_features(attempt, rope_dim):
    with pytest.raises(ValueError, match=str(rope_dim)):
        attempt(shapes, SIZES | {"rope_dim": rope_dim})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [SIZES, *OTHERS.values()], ids=["usual", *OTHERS])
def test_attends_as_deepseeks_layer_in_transformers_does(attempt, rng, sizes, way):
    weights, frequencies = make_weights(rng, sizes), make_frequencies(sizes)
    x = randn(rng, 2, 7, 11)

    out = attempt(attend, sizes, weights, x, frequencies, way)

    assert_close(out, run_deepseek(deepseek(sizes, weights), x, frequencies))


@pytest.mark.parametrize("way", WAYS)
def test_sharpens_all_scores_as_a_stretched_deepseek_does(attempt, rng, way):
    weights, frequencies = make_weights(rng), make_frequencies()
    x = randn(rng, 2, 5, 11)
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }

    out = attempt(attend, SIZES, weights, x, frequencies, way, 1 + 0.1 * math.log(40))

    assert_close(out, run_deepseek(deepseek(SIZES, weights, yarn), x, frequencies))


def test_learns_as_deepseeks_layer_does(attempt, rng):
    weights, frequencies = make_weights(rng), make_frequencies()
    x, grad = randn(rng, 2, 5, 11), randn(rng, 2, 5, 11)

    found = attempt(attend_and_differentiate, SIZES, weights, x, frequencies, grad, 1.0)

    layer, x = deepseek(SIZES, weights), x.clone().requires_grad_()
    run_deepseek(layer, x, frequencies).backward(grad)
    assert_close(found, {"x": x.grad} | {name: layer.get_parameter(name).grad for name in weights})


@pytest.mark.parametrize("way", WAYS)
def test_keeps_what_deepseeks_layer_keeps(attempt, rng, way):
    from transformers.cache_utils import DynamicCache

    weights, frequencies = make_weights(rng), make_frequencies()
    x = randn(rng, 2, 6, 11)

    _, lengths, held = attempt(
        attend_in_chunks, SIZES, weights, x, frequencies, [(3, way), (1, way), (2, way)]
    )

    cache = DynamicCache()
    run_deepseek(deepseek(SIZES, weights), x, frequencies, cache)
    latents, rope_keys = cache.layers[0].keys[:, 0], cache.layers[0].values[:, 0]
    # Theirs has all first features of the pairs, then all second ones.
    rope_keys = rope_keys.unflatten(-1, (2, -1)).mT.flatten(-2)
    assert_close(held, (latents.detach(), rope_keys.detach()))
    assert_close(lengths, [0, 3, 4, 6])


@settings(max_examples=12)
@example([(3, "forward"), (2, "absorbed"), (1, "forward"), (1, "absorbed")], 2, 1.25, 0)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(WAYS)), min_size=1, max_size=5),
    n_heads=st.sampled_from([1, 2, 4]),
    factor=st.sampled_from([1.0, 1.25]),
    seed=st.integers(0, 999),
)
def test_takes_a_text_in_chunks_of_any_size_in_either_way(attempt, chunks, n_heads, factor, seed):
    rng = torch.Generator().manual_seed(seed)
    sizes = SIZES | {"n_heads": n_heads}
    weights, frequencies = make_weights(rng, sizes), make_frequencies()
    x = randn(rng, 2, sum(n for n, _ in chunks), 11)

    out, _, held = attempt(attend_in_chunks, sizes, weights, x, frequencies, chunks, factor)

    assert_close(out, by_definition(sizes, weights, x, frequencies, factor=factor))
    assert_close(held, leave(sizes, weights, x, frequencies))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_new", [1, 3])
def test_reads_what_stands_in_the_cache_whoever_wrote_it(attempt, rng, n_new, way):
    weights, frequencies = make_weights(rng), make_frequencies()
    before, x = make_tokens(rng, 5), randn(rng, 2, n_new, 11)

    out = attempt(attend_to_given, SIZES, weights, *before, x, frequencies, way)

    assert_close(out, by_definition(SIZES, weights, x, frequencies, before))


@pytest.mark.parametrize("way", WAYS)
def test_sees_nothing_of_the_future_however_low_the_past_scores(attempt, rng, way):
    weights, frequencies = make_weights(rng), make_frequencies()
    weights["q_b_proj.weight"] *= 1e60
    x = randn(rng, 3, 6, 11)

    out = attempt(attend, SIZES, weights, x, frequencies, way)
    chunked, _, _ = attempt(attend_in_chunks, SIZES, weights, x, frequencies, [(2, way), (4, way)])

    expected = by_definition(SIZES, weights, x, frequencies)
    assert_close([out, chunked], [expected, expected])


@pytest.mark.parametrize("way", WAYS)
def test_takes_an_x_of_any_layout(attempt, rng, way):
    weights, frequencies = make_weights(rng), make_frequencies()
    x = randn(rng, 5, 11, 3).permute(2, 0, 1)[:, 1:]

    out = attempt(attend, SIZES, weights, x, frequencies, way)

    assert_close(out, by_definition(SIZES, weights, x, frequencies))


@pytest.mark.parametrize("way", WAYS)
def test_keeps_layers_and_caches_apart(attempt, rng, way):
    frequencies = make_frequencies()
    several, texts = [make_weights(rng) for _ in range(2)], [randn(rng, 2, 4, 11) for _ in range(2)]

    out = attempt(attend_in_turn, SIZES, several, texts, frequencies, way)

    assert_close(out, [by_definition(SIZES, w, x, frequencies) for x in texts for w in several])


@pytest.mark.parametrize("way", WAYS)
def test_keeps_nothing_from_one_text_to_the_next(attempt, rng, way):
    # Whole numbers of 1/16: bfloat16 can hold them.
    weights = {name: (16 * w).round() / 16 for name, w in make_weights(rng).items()}
    paces = [1.0, 1.0, 0.6, 1.0]
    texts = [
        (randn(rng, 2, n, 11), pace * make_frequencies())
        for n, pace in zip([3, 7, 7, 4], paces, strict=True)
    ]

    out = attempt(attend_again, SIZES, weights, texts, way)

    assert_close(out, [[by_definition(SIZES, weights, *text)] * 2 for text in texts])


# Of a standard deviation, rounding costs up to 0.017 in bfloat16 and 0.002 in float16; angles, or
# frequencies alone, that are rounded too cost 0.12 and 0.01 at least.
HALVES = {torch.bfloat16: 0.05, torch.float16: 0.005}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "limit"), HALVES.items(), ids=map(str, HALVES))
def test_turns_by_exact_angles_in_half_precision(attempt, rng, way, dtype, limit):
    weights = {name: w.to(dtype) for name, w in make_weights(rng).items()}
    frequencies = torch.tensor([1.7, 0.3, 0.9], dtype=torch.float64)
    x = randn(rng, 1, 400, 11, dtype=dtype)

    out, _, _ = attempt(
        attend_in_chunks, SIZES, weights, x, frequencies, [(390, "forward"), (1, way), (9, way)]
    )

    weights = {name: w.double() for name, w in weights.items()}
    expected = by_definition(SIZES, weights, x.double(), frequencies)
    error = (out.double() - expected)[:, 390:].square().mean().sqrt() / expected.std()
    assert out.dtype == dtype
    assert error < limit, f"off by {error:.3f} standard deviations at positions 390 to 400"


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_absorbing_leaves_the_layer_as_it_was(attempt, rng, mode):
    weights, frequencies = make_weights(rng), make_frequencies()

    before, after, state, learns = attempt(
        absorb_and_look, SIZES, weights, randn(rng, 2, 3, 11), frequencies, mode
    )

    assert_close(state, weights)
    assert_close(after, before)
    assert after[2] == mode
    assert_close(learns, dict.fromkeys(weights, True))


# --- what it costs -------------------------------------------------------------------------------


def test_forward_takes_scores_over_each_heads_own_features(attempt, rng):
    weights, frequencies = make_weights(rng), make_frequencies()
    texts = [randn(rng, 2, n, 11) for n in (10, 20)]

    short, long = attempt(flops_of_texts, SIZES, weights, texts, frequencies)

    # What grows with n alone falls out: a(2n) + b(2n)² − 2(an + bn²) = 2bn².
    a_pair = (long - 2 * short) / (2 * 10**2 * 2 * 3)
    assert a_pair <= 2 * (4 + 6 + 5), (
        f"a score and its part of the average cost {a_pair:g} flops a head; 30 are enough"
    )


@pytest.mark.parametrize("n_new", [1, 2])
def test_absorbed_makes_no_key_or_value_of_an_earlier_token(attempt, rng, n_new):
    weights, frequencies = make_weights(rng), make_frequencies()
    x = randn(rng, 2, 60, 11)

    steps = [(10, 90), (50, 90)]
    few, many = attempt(flops_of_steps, SIZES, weights, x, frequencies, steps, n_new, "absorbed")

    a_key = (many - few) / (2 * 40)
    enough = n_new * 3 * 2 * (14 + 6 + 14)
    assert a_key <= enough, (
        f"a token in the cache costs {n_new} new ones {a_key:g} flops; {enough} are enough"
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_step_costs_what_the_tokens_so_far_cost_not_the_room(attempt, rng, way):
    weights, frequencies = make_weights(rng), make_frequencies()
    x = randn(rng, 2, 9, 11)

    tight, wide = attempt(
        flops_of_steps, SIZES, weights, x, frequencies, [(8, 9), (8, 500)], 1, way
    )

    assert wide == tight, f"{wide} flops with room for 500 tokens, {tight} with room for 9"
