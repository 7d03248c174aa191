"""Specs for exercise 46: dual chunk attention."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

BATCH, N_HEADS, N_KV_HEADS, HEAD_DIM, VALUE_DIM, THETA = 2, 6, 3, 4, 5, 30.0
CHUNK, CONTEXT = 6, 10  # as in the paper's figure 2
D_MODEL = N_HEADS * HEAD_DIM


# --- what is done with the code under test -------------------------------------------------------


def positions(ex, seq_len, chunk_size, context_len):
    return ex.query_positions(seq_len, chunk_size, context_len)


def attend(ex, q, k, v, frequencies, chunk_size=CHUNK, context_len=CONTEXT):
    return ex.dual_chunk_attention(q, k, v, frequencies, chunk_size, context_len)


def gradients(ex, q, k, v, frequencies, grad):
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(attend(ex, q, k, v, frequencies), inputs, grad)
    for x in inputs:
        x.requires_grad_(False)
    return found


def cost(ex, q, k, v, frequencies):
    with FlopCounterMode(display=False) as counter:
        out = attend(ex, q, k, v, frequencies)
    return out, counter.get_total_flops()


def new_layer(ex, chunk_size, context_len, n_heads=N_HEADS, n_kv_heads=N_KV_HEADS):
    return ex.DualChunkAttention(D_MODEL, n_heads, n_kv_heads, chunk_size, context_len, THETA)


def layer(ex, weights, x):
    """The result of a layer with these weights, and the gradients of all of them."""
    own = new_layer(ex, CHUNK, CONTEXT).double()
    own.load_state_dict(weights)
    out = own(x)
    out.sum().backward()
    return out, {name: parameter.grad for name, parameter in own.named_parameters()}


def logits(ex, weights, ids, chunk_size):
    """Qwen2 in transformers, with the attention under test in every layer."""
    model = qwen2(weights)
    for block in model.model.layers:
        own = new_layer(ex, chunk_size, 2 * chunk_size).double()
        own.load_state_dict(block.self_attn.state_dict())
        block.self_attn = InTheirPlace(own)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


class InTheirPlace(torch.nn.Module):
    """Takes what transformers gives to an attention, and returns what it expects of one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **_):
        return self.layer(hidden_states), None


# --- inputs and oracles --------------------------------------------------------------------------


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def qkv(rng, seq_len, batch=BATCH):
    """Queries and keys large enough that distances matter."""
    q = 1.5 * randn(rng, batch, N_HEADS, seq_len, HEAD_DIM)
    k = 1.5 * randn(rng, batch, N_KV_HEADS, seq_len, HEAD_DIM)
    return q, k, randn(rng, batch, N_KV_HEADS, seq_len, VALUE_DIM)


def frequencies_for_specs():
    return torch.tensor([1.0, THETA**-0.5], dtype=torch.float64)


def distance(i, j, s, c):
    """How far key j is behind query i: the definition, pair by pair."""
    chunks_between = i // s - j // s
    if chunks_between == 0:
        return i - j
    if chunks_between == 1:
        return min(s + i % s, c - 1) - j % s
    return c - 1 - j % s


def direct(q, k, v, frequencies, chunk_size=CHUNK, context_len=CONTEXT):
    """Every pair of a query and a key is turned by its own distance, as complex numbers."""
    n, half = q.shape[2], HEAD_DIM // 2
    pairs = [[distance(i, j, chunk_size, context_len) for j in range(n)] for i in range(n)]
    turns = torch.exp(1j * torch.tensor(pairs)[:, :, None] * frequencies)
    k, v = (x.repeat_interleave(N_HEADS // N_KV_HEADS, dim=1) for x in (k, v))
    q, k = (torch.complex(x[..., :half], x[..., half:]) for x in (q, k))
    scores = torch.einsum("bhid,ijd,bhjd->bhij", q, turns, k.conj()).real / math.sqrt(HEAD_DIM)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v


def plain(q, k, v, frequencies):
    """Rotary positions as they are, by PyTorch's attention."""
    cos, sin = (f(torch.arange(q.shape[2])[:, None] * frequencies) for f in (torch.cos, torch.sin))
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    q, k = (
        x * cos + torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), dim=-1) * sin
        for x in (q, k)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def shapes_of_a_layer():
    heads = {"q_proj": N_HEADS, "k_proj": N_KV_HEADS, "v_proj": N_KV_HEADS}
    shapes = {f"{name}.weight": (n * HEAD_DIM, D_MODEL) for name, n in heads.items()}
    shapes |= {f"{name}.bias": (n * HEAD_DIM,) for name, n in heads.items()}
    return shapes | {"o_proj.weight": (D_MODEL, D_MODEL)}


def random_weights(rng, shapes):
    """Large enough that everything matters; the norms are about 1."""
    return {
        name: randn(rng, *shape) * 1.5 / math.sqrt(shape[-1])
        if len(shape) == 2
        else (1.0 if "norm" in name else 0.0) + 0.4 * randn(rng, *shape)
        for name, shape in shapes.items()
    }


def shapes_of_qwen2():
    layer = {f"self_attn.{name}": shape for name, shape in shapes_of_a_layer().items()}
    layer |= {f"mlp.{name}_proj.weight": (20, D_MODEL) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": (D_MODEL, 20)}
    layer |= {f"{name}_layernorm.weight": (D_MODEL,) for name in ("input", "post_attention")}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (23, D_MODEL), "lm_head.weight": (23, D_MODEL)}
    return shapes | ends | {"model.norm.weight": (D_MODEL,)}


def qwen2(weights):
    """A tiny Qwen2 in transformers, with these weights."""
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=23,
        hidden_size=D_MODEL,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config).double().eval()
    model.load_state_dict(weights)
    return model


# --- the specs -----------------------------------------------------------------------------------


def test_gives_each_query_a_position_for_each_kind_of_key(attempt):
    found = attempt(positions, 14, CHUNK, CONTEXT)

    assert_close(
        found,
        (
            torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1]),
            torch.tensor([6, 7, 8, 9, 9, 9, 6, 7, 8, 9, 9, 9, 6, 7]),
            torch.tensor([9] * 14),
        ),
    )


@pytest.mark.parametrize("seq_len", [1, 6, 7, 12, 17, 18, 25])
def test_puts_every_key_at_its_distance_in_a_text_of_any_length(attempt, rng, seq_len):
    q, k, v = qkv(rng, seq_len)
    frequencies = frequencies_for_specs()

    out = attempt(attend, q, k, v, frequencies)

    assert_close(out, direct(q, k, v, frequencies))


@settings(max_examples=10, phases=[Phase.generate])  # as small as they come
@given(
    chunk_size=st.integers(1, 5),
    window=st.integers(1, 7),
    seq_len=st.integers(1, 14),
    seed=st.integers(0, 999),
)
def test_cuts_chunks_of_any_size(attempt, chunk_size, window, seq_len, seed):
    q, k, v = qkv(torch.Generator().manual_seed(seed), seq_len, batch=1)
    frequencies, context_len = frequencies_for_specs(), chunk_size + window

    out = attempt(attend, q, k, v, frequencies, chunk_size, context_len)

    assert_close(out, direct(q, k, v, frequencies, chunk_size, context_len))


@pytest.mark.parametrize("seq_len", [1, 8, 13])
def test_is_plain_attention_as_long_as_the_text_fits_one_chunk(attempt, rng, seq_len):
    q, k, v = qkv(rng, seq_len)
    frequencies = frequencies_for_specs()

    out = attempt(attend, q, k, v, frequencies, 13, 17)

    assert_close(out, plain(q, k, v, frequencies))


def test_sends_gradients_to_q_k_and_v(attempt, rng):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(rng, 15))
    frequencies, grad = frequencies_for_specs(), randn(rng, BATCH, N_HEADS, 15, VALUE_DIM)

    found = attempt(gradients, q, k, v, frequencies, grad)

    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert_close(found, torch.autograd.grad(direct(*inputs, frequencies), inputs, grad))


def test_takes_angles_in_float64_and_gives_the_dtype_of_the_queries(attempt, rng):
    q, k, v = (x.float() for x in qkv(rng, 20))
    frequencies = frequencies_for_specs()

    out = attempt(attend, q, k, v, frequencies)

    assert_close(out, direct(q.double(), k.double(), v.double(), frequencies).float())


def test_compares_each_query_with_each_key_once(attempt, rng):
    q, k, v = qkv(rng, 40)
    frequencies = frequencies_for_specs()

    out, flops = attempt(cost, q, k, v, frequencies)

    assert_close(out, direct(q, k, v, frequencies))
    # One score and one share of the average for each pair, even if none were hidden.
    assert flops <= 2 * BATCH * N_HEADS * 40 * 40 * (HEAD_DIM + VALUE_DIM)


def test_layer_projects_with_bias_attends_and_merges(attempt, rng):
    weights, x = random_weights(rng, shapes_of_a_layer()), randn(rng, BATCH, 15, D_MODEL)

    out, found = attempt(layer, weights, x)

    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    q, k, v = (
        F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        .unflatten(-1, (-1, HEAD_DIM))
        .transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    merged = direct(q, k, v, frequencies_for_specs()).transpose(1, 2).flatten(2)
    expected = F.linear(merged, weights["o_proj.weight"])
    assert_close(out, expected.detach())
    of_weights = torch.autograd.grad(expected.sum(), list(weights.values()))
    assert_close(found, dict(zip(weights, of_weights, strict=True)))


@pytest.mark.parametrize("seq_len", [5, 11], ids=["shorter than a chunk", "one chunk"])
def test_makes_qwen2_say_what_it_says_in_transformers(attempt, rng, seq_len):
    weights = random_weights(rng, shapes_of_qwen2())
    ids = torch.randint(23, (2, seq_len), generator=rng)

    out = attempt(logits, weights, ids, 11)

    # transformers computes cos and sin in float32, whatever the model's dtype.
    assert_close(out, qwen2(weights)(ids).logits.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_size", "context_len"), [(8, 8), (9, 8), (0, 8)])
def test_rejects_a_chunk_that_leaves_no_position_for_what_is_outside(
    attempt, chunk_size, context_len
):
    both = rf"\b{chunk_size}\b.*\b{context_len}\b|\b{context_len}\b.*\b{chunk_size}\b"
    with pytest.raises(ValueError, match=both):
        attempt(positions, 20, chunk_size, context_len)
