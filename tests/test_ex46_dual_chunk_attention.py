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

BATCH, N_HEADS, N_KV_HEADS, HEAD_DIM, VALUE_DIM, THETA = 2, 6, 3, 8, 5, 30.0
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
    products = {torch.ops.aten.mul: lambda *_, out_shape, **__: 2 * math.prod(out_shape)}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        out = attend(ex, q, k, v, frequencies)
    return out, counter.get_total_flops()


def new_layer(ex, weights, n_heads, n_kv_heads, chunk_size, context_len, **options):
    own = ex.DualChunkAttention(D_MODEL, n_heads, n_kv_heads, chunk_size, context_len, **options)
    own.double().load_state_dict(weights)
    return own


def layer(ex, weights, x, n_heads, n_kv_heads):
    """The result of a layer with these weights, and the gradients of all of them and of x."""
    own = new_layer(ex, weights, n_heads, n_kv_heads, CHUNK, CONTEXT, rope_theta=THETA)
    x = x.clone().requires_grad_()
    out = own(x)
    out.sum().backward()
    return out, x.grad, {name: parameter.grad for name, parameter in own.named_parameters()}


def one_layer_for_all(ex, weights, texts, context_len=CONTEXT):
    """What one layer makes of texts that follow each other, in the dtype of each."""
    own, found = new_layer(ex, weights, N_HEADS, N_KV_HEADS, CHUNK, context_len), []
    with torch.no_grad():
        for x in texts:
            found.append(own.to(x.dtype)(x))
    return found


def logits(ex, weights, ids, chunk_size):
    """Qwen2 in transformers, with the attention under test in every layer."""
    model = qwen2(weights)
    for block in model.model.layers:
        weights = block.self_attn.state_dict()
        sizes = N_HEADS, N_KV_HEADS, chunk_size, 2 * chunk_size
        block.self_attn = InTheirPlace(new_layer(ex, weights, *sizes, rope_theta=THETA))
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


def qkv(rng, seq_len, batch=BATCH, n_heads=N_HEADS, n_kv_heads=N_KV_HEADS):
    """Queries and keys large enough that distances matter."""
    q = 1.5 * randn(rng, batch, n_heads, seq_len, HEAD_DIM)
    k = 1.5 * randn(rng, batch, n_kv_heads, seq_len, HEAD_DIM)
    return q, k, randn(rng, batch, n_kv_heads, seq_len, VALUE_DIM)


def frequencies_for_specs(head_dim=HEAD_DIM, theta=THETA):
    powers = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    return torch.tensor(powers, dtype=torch.float64)


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
    n, half = q.shape[2], q.shape[3] // 2
    pairs = [[distance(i, j, chunk_size, context_len) for j in range(n)] for i in range(n)]
    turns = torch.exp(1j * torch.tensor(pairs)[:, :, None] * frequencies)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scale = math.sqrt(q.shape[3])
    q, k = (torch.complex(x[..., :half], x[..., half:]) for x in (q, k))
    scores = torch.einsum("bhid,ijd,bhjd->bhij", q, turns, k.conj()).real / scale
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v


def direct_layer(weights, x, frequencies, context_len=CONTEXT):
    q, k, v = (
        F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        .unflatten(-1, (-1, 2 * len(frequencies)))
        .transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    merged = direct(q, k, v, frequencies, CHUNK, context_len).transpose(1, 2).flatten(2)
    return F.linear(merged, weights["o_proj.weight"])


def plain(q, k, v, frequencies):
    """Rotary positions as they are, by PyTorch's attention."""
    cos, sin = (f(torch.arange(q.shape[2])[:, None] * frequencies) for f in (torch.cos, torch.sin))
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    q, k = (
        x * cos + torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), dim=-1) * sin
        for x in (q, k)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def shapes_of_a_layer(n_heads=N_HEADS, n_kv_heads=N_KV_HEADS):
    sizes = {"q_proj": D_MODEL} | dict.fromkeys(
        ("k_proj", "v_proj"), D_MODEL // n_heads * n_kv_heads
    )
    shapes = {f"{name}.weight": (n, D_MODEL) for name, n in sizes.items()}
    shapes |= {f"{name}.bias": (n,) for name, n in sizes.items()}
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


@pytest.mark.parametrize("seq_len", [1, 6, 7, 12, 17, 18, 25, 160])
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


@pytest.mark.parametrize(("batch", "n_heads", "n_kv_heads"), [(1, 1, 1), (3, 4, 1), (1, 3, 3)])
def test_takes_any_number_of_heads(attempt, rng, batch, n_heads, n_kv_heads):
    q, k, v = qkv(rng, 15, batch, n_heads, n_kv_heads)
    frequencies = frequencies_for_specs()

    out = attempt(attend, q, k, v, frequencies)

    assert_close(out, direct(q, k, v, frequencies))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e5), (torch.float64, 1e45), (torch.float32, 1e10)]
)
def test_hides_the_future_however_low_the_past_scores(attempt, rng, dtype, size, sign):
    # As many tokens as features, and nothing is turned: k_j has the feature j alone, so feature j
    # of q_i is their score. Of the past a token's own is the largest, by far.
    n = HEAD_DIM
    ones = torch.ones(n, n, dtype=dtype)
    scores = sign * (ones.triu(1) - ones.tril()) - ones.tril(-1) / 2
    q = size * math.sqrt(n) * scores.expand(BATCH, N_HEADS, -1, -1)
    k = torch.eye(n, dtype=dtype).expand(BATCH, N_KV_HEADS, -1, -1)
    _, _, v = (x.to(dtype) for x in qkv(rng, n))

    out = attempt(attend, q, k, v, torch.zeros(n // 2, dtype=torch.float64), 3, 5)

    assert_close(out, v.repeat_interleave(N_HEADS // N_KV_HEADS, dim=1))


# Half a precision may round the scores, of up to 10 in steps of 1/16. An angle that is wrong
# gives another average of values that reach 3.
ANGLES = [(torch.float32, None), (torch.bfloat16, 0.3)]


@pytest.mark.parametrize(("dtype", "atol"), ANGLES)
def test_takes_angles_in_float64_whatever_the_dtype_of_the_queries(attempt, rng, dtype, atol):
    q, k, v = (x.to(dtype) for x in qkv(rng, 20))
    frequencies = frequencies_for_specs()

    out = attempt(attend, q, k, v, frequencies, CHUNK, 1_000_000)

    exact = direct(q.double(), k.double(), v.double(), frequencies, CHUNK, 1_000_000)
    assert_close(out, exact.to(dtype), atol=atol)


def test_compares_each_query_with_each_key_once(attempt, rng):
    q, k, v = qkv(rng, 40)
    frequencies = frequencies_for_specs()

    out, flops = attempt(cost, q, k, v, frequencies)

    assert_close(out, direct(q, k, v, frequencies))
    # One score and one share of the average for each pair, even if none were hidden.
    assert flops <= 2 * BATCH * N_HEADS * 40 * 40 * (HEAD_DIM + VALUE_DIM)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(N_HEADS, N_KV_HEADS), (1, 1)])
def test_layer_projects_with_bias_attends_and_merges(attempt, rng, n_heads, n_kv_heads):
    weights = random_weights(rng, shapes_of_a_layer(n_heads, n_kv_heads))
    x = randn(rng, BATCH, 15, D_MODEL)

    out, of_x, of_weights = attempt(layer, weights, x, n_heads, n_kv_heads)

    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    x.requires_grad_()
    expected = direct_layer(leaves, x, frequencies_for_specs(D_MODEL // n_heads))
    expected.sum().backward()
    assert_close(out, expected.detach())
    assert_close(of_x, x.grad)
    assert_close(of_weights, {name: leaf.grad for name, leaf in leaves.items()})


def test_layer_reads_every_text_anew_whatever_its_length(attempt, rng):
    weights = random_weights(rng, shapes_of_a_layer())
    texts = [
        randn(rng, batch, n, D_MODEL) for batch, n in ((2, 8), (1, 20), (3, 5), (3, 5), (2, 8))
    ]

    outs = attempt(one_layer_for_all, weights, texts)

    frequencies = frequencies_for_specs(theta=10_000.0)  # the default
    assert_close(outs, [direct_layer(weights, x, frequencies) for x in texts])


@pytest.mark.parametrize(("dtype", "atol"), ANGLES)
def test_layer_turns_by_angles_in_float64_whatever_its_dtype(attempt, rng, dtype, atol):
    weights, x = random_weights(rng, shapes_of_a_layer()), randn(rng, BATCH, 15, D_MODEL)
    weights = {name: 0.5 * weight.to(dtype).double() for name, weight in weights.items()}
    texts = [x.to(dtype), x.to(dtype).double()]

    outs = attempt(one_layer_for_all, weights, texts, 1_000_000)

    exact = direct_layer(weights, texts[1], frequencies_for_specs(theta=10_000.0), 1_000_000)
    assert_close(outs[0], exact.to(dtype), atol=atol)
    assert_close(outs[1], exact)


@pytest.mark.parametrize("seq_len", [5, 11], ids=["shorter than a chunk", "one chunk"])
def test_makes_qwen2_say_what_it_says_in_transformers(attempt, rng, seq_len):
    weights = random_weights(rng, shapes_of_qwen2())
    ids = torch.randint(23, (2, seq_len), generator=rng)

    out = attempt(logits, weights, ids, 11)

    # transformers computes cos and sin in float32, whatever the model's dtype.
    assert_close(out, qwen2(weights)(ids).logits.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_size", "context_len"), [(8, 8), (9, 8), (0, 8), (-2, 8)])
def test_rejects_a_chunk_that_leaves_no_position_for_what_is_outside(
    attempt, rng, chunk_size, context_len
):
    q, k, v = qkv(rng, 5)  # shorter than a chunk: no text is too short to be refused

    both = rf"{chunk_size}\b.*\b{context_len}\b|\b{context_len}\b.*{chunk_size}\b"
    with pytest.raises(ValueError, match=both):
        attempt(positions, 20, chunk_size, context_len)
    with pytest.raises(ValueError, match=both):
        attempt(attend, q, k, v, frequencies_for_specs(), chunk_size, context_len)
