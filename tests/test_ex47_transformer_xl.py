"""Specs for exercise 47: Transformer-XL."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

BATCH, N_HEADS, HEAD_DIM, D_FF, N_LAYERS = 2, 3, 6, 7, 2
D_MODEL = N_HEADS * HEAD_DIM


# --- what is done with the code under test -------------------------------------------------------


def shift(ex, x):
    """The shifted scores; those of the future, where anything may stand, as 0."""
    return ex.relative_shift(x).tril(x.shape[-1] - x.shape[-2])


def scores(ex, q, k, r, u, v):
    return ex.relative_scores(q, k, r, u, v)


def gradients_of_scores(ex, inputs, grad):
    """What each input's gradient is, given that of the scores of the past."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    found = scores(ex, *inputs)
    past = found.masked_fill(found == -math.inf, 0.0)
    return torch.autograd.grad(past, inputs, grad)


def size_of_scores(ex, q, k, r, u, v):
    """The scores, and how many numbers the largest tensor on the way to them has."""
    with Largest() as largest:
        found = scores(ex, q, k, r, u, v)
    return found, largest.numel


def attend(ex, weights, x, memory=None):
    with torch.no_grad():
        return new_attention(ex, weights)(x, memory)


def attend_in_turn(ex, texts):
    """One layer: for each (weights, x, memory) what it makes of x with these weights."""
    layer, found = new_attention(ex, texts[0][0]), []
    for weights, x, memory in texts:
        layer.to(x.dtype).load_state_dict(weights)
        with torch.no_grad():
            found.append(layer(x, memory))
    return found


def learn(ex, weights, x, memory, grad):
    """Gradients of the weights, of x and of the memory."""
    layer = new_attention(ex, weights)
    x, memory = x.clone().requires_grad_(), memory.clone().requires_grad_()
    layer(x, memory).backward(grad)
    of_memory = torch.zeros_like(memory) if memory.grad is None else memory.grad
    return {name: own.grad for name, own in layer.named_parameters()}, x.grad, of_memory


def remember(ex, memory, x, mem_len):
    kept = ex.update_memory(memory, x.clone().requires_grad_(), mem_len)
    if kept.grad_fn is not None:
        return kept, "still part of the graph that made it"
    return kept, "a leaf that asks for a gradient" if kept.requires_grad else "cut"


def remember_and_write(ex, memory, x, mem_len):
    """What is kept of x and of an older memory, before and after both have been overwritten."""
    kept = ex.update_memory(memory, x, mem_len)
    before = kept.clone()
    for old in (memory, x):
        if old is not None:
            old.zero_()
    return before, kept


def read(ex, weights, x, segments, mem_len):
    """A text in segments: all results in a row, and the memories that are left."""
    model = new_model(ex, weights, mem_len)
    outs, memories = [], None
    with torch.no_grad():
        for segment in x.split(segments, dim=1):
            out, memories = model(segment, memories)
            outs.append(out)
    return torch.cat(outs, dim=1), list(memories)


def read_on(ex, weights, x, memories):
    """What a trained model makes of a segment after these memories, and what it remembers then."""
    model = new_model(ex, weights, memories[0].shape[1]).eval()
    with torch.no_grad():
        out, memories = model(x, memories)
    return out, list(memories)


def read_branches(ex, weights, first, ways):
    """One model: the results of a first segment, of each way to go on, and of the first again."""
    model, buffer = new_model(ex, weights, first.shape[1]), first.clone()
    with torch.no_grad():
        out, memories = model(buffer)
        buffer.zero_()  # the caller's own, which it may use again
        outs = [out] + [model(second, memories)[0] for second in ways]
        return [*outs, model(first)[0]]


def learn_from_the_second(ex, weights, first, second, grad):
    """Gradients of the weights and of both segments, given that of the second one's result."""
    model = new_model(ex, weights, first.shape[1])
    inputs = [x.clone().requires_grad_() for x in (first, second)]
    _, memories = model(inputs[0])
    model(inputs[1], tuple(memories))[0].backward(grad)
    of_inputs = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    return {name: own.grad for name, own in model.named_parameters()}, of_inputs


def read_with_memories(ex, weights, x, memories):
    return new_model(ex, weights, 4)(x, memories)


def new_attention(ex, weights):
    layer = ex.RelativeAttention(D_MODEL, N_HEADS).to(weights["u"].dtype)
    layer.load_state_dict(weights)
    return layer


def new_model(ex, weights, mem_len):
    model = ex.TransformerXL(D_MODEL, N_HEADS, D_FF, N_LAYERS, mem_len).double()
    model.load_state_dict(weights)
    return model


class Largest(TorchDispatchMode):
    """Remembers how large the largest result of an operation was."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if hasattr(x, "numel")]
        self.numel = max(self.numel, *sizes, 0)
        return out


# --- inputs and oracles --------------------------------------------------------------------------


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def parts_of_scores(rng, n_queries, n_keys, batch=BATCH, n_heads=N_HEADS, head_dim=HEAD_DIM):
    return (
        randn(rng, batch, n_heads, n_queries, head_dim),
        randn(rng, batch, n_heads, n_keys, head_dim),
        randn(rng, n_heads, n_keys, head_dim),
        randn(rng, n_heads, head_dim),
        randn(rng, n_heads, head_dim),
    )


def pair_by_pair(q, k, r, u, v):
    """The equation, one pair of a query and a key after the other."""
    n_queries, n_keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
    rows = []
    for i in range(n_queries):
        row = []
        for j in range(n_keys):
            back = n_keys - n_queries + i - j
            if back < 0:
                row.append(torch.full(q.shape[:2], -math.inf, dtype=q.dtype))
                continue
            q_i, k_j, r_n = q[:, :, i], k[:, :, j], r[:, n_keys - 1 - back]
            terms = q_i * k_j + q_i * r_n + u * k_j + v * r_n
            row.append(terms.sum(-1) / math.sqrt(head_dim))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def weights_of_attention(rng, prefix=""):
    """Large enough that content and distance both matter."""
    names = ("q_proj", "k_proj", "v_proj", "r_proj", "o_proj")
    weights = {f"{name}.weight": 0.33 * randn(rng, D_MODEL, D_MODEL) for name in names}
    weights |= {name: randn(rng, N_HEADS, HEAD_DIM) for name in ("u", "v")}
    return {prefix + name: weight for name, weight in weights.items()}


def weights_of_model(rng):
    weights = {}
    for layer in (f"layers.{n}." for n in range(N_LAYERS)):
        weights |= weights_of_attention(rng, f"{layer}attn.")
        weights[f"{layer}ff.w_1.weight"] = 0.33 * randn(rng, D_FF, D_MODEL)
        weights[f"{layer}ff.w_1.bias"] = 0.33 * randn(rng, D_FF)
        weights[f"{layer}ff.w_2.weight"] = 0.33 * randn(rng, D_MODEL, D_FF)
        weights[f"{layer}ff.w_2.bias"] = 0.33 * randn(rng, D_MODEL)
        for norm in ("norm_1", "norm_2"):
            weights[f"{layer}{norm}.weight"] = 1 + 0.3 * randn(rng, D_MODEL)
            weights[f"{layer}{norm}.bias"] = 0.3 * randn(rng, D_MODEL)
    return weights


def wave(n):
    """Exercise 30's encoding of one position."""
    angles = [n / 10000 ** (i / D_MODEL) for i in range(0, D_MODEL, 2)]
    return [f(angle) for angle in angles for f in (math.sin, math.cos)]


def rows_of_distances(weights, n):
    waves = torch.tensor([wave(distance) for distance in range(n)], dtype=torch.float64)
    return (waves @ weights["r_proj.weight"].mT).unflatten(-1, (N_HEADS, HEAD_DIM))


def direct_attention(weights, text, seen):
    """Attention of the last tokens of a text to all of it: one r for every pair, and a mask."""
    n_queries, n_keys = seen.shape
    q, k, values = (
        (y @ weights[f"{name}_proj.weight"].mT).unflatten(-1, (N_HEADS, HEAD_DIM))
        for name, y in (("q", text[:, n_keys - n_queries :]), ("k", text), ("v", text))
    )
    r = rows_of_distances(weights, n_keys)
    back = torch.arange(n_keys)[n_keys - n_queries :, None] - torch.arange(n_keys)
    r = r[back.clamp(min=0)]  # (n_queries, n_keys, n_heads, head_dim)
    found = (
        torch.einsum("bihd,bjhd->bhij", q, k)
        + torch.einsum("bihd,ijhd->bhij", q, r)
        + torch.einsum("hd,bjhd->bhj", weights["u"], k)[:, :, None]
        + torch.einsum("hd,ijhd->hij", weights["v"], r)
    ) / math.sqrt(HEAD_DIM)
    averages = torch.softmax(found.masked_fill(~seen, -math.inf), dim=-1)
    out = torch.einsum("bhij,bjhd->bihd", averages, values)
    return out.flatten(-2) @ weights["o_proj.weight"].mT


def causal(n_queries, n_keys):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def one_pass(weights, x, segments, mem_len, learned=0):
    """The whole text at once: its result, and what went into each layer.

    A token sees from mem_len tokens before its segment up to itself. No gradient reaches those
    before the token `learned`.
    """
    rows, start = [], 0
    for length in segments:
        for i in range(start, start + length):
            rows.append([start - mem_len <= j <= i for j in range(x.shape[1])])
        start += length
    seen, inputs = torch.tensor(rows), []
    for n in range(N_LAYERS):
        x = torch.cat((x[:, :learned].detach(), x[:, learned:]), dim=1)
        inputs.append(x)
        x = direct_block(weights, n, x, x, seen)
    return x, inputs


def direct_block(weights, n, x, text, seen):
    """Layer n's result for x, the last tokens of what it has been given, `text`."""
    own = {name.removeprefix(f"layers.{n}."): weight for name, weight in weights.items()}
    attn = {name.removeprefix("attn."): weight for name, weight in own.items()}
    x = x + direct_attention(attn, text, seen)
    x = F.layer_norm(x, (D_MODEL,), own["norm_1.weight"], own["norm_1.bias"])
    inner = torch.relu(F.linear(x, own["ff.w_1.weight"], own["ff.w_1.bias"]))
    x = x + F.linear(inner, own["ff.w_2.weight"], own["ff.w_2.bias"])
    return F.layer_norm(x, (D_MODEL,), own["norm_2.weight"], own["norm_2.bias"])


# --- the specs -----------------------------------------------------------------------------------


@settings(max_examples=15, phases=[Phase.generate])  # as small as they come
@given(
    n_queries=st.integers(0, 5),
    n_memory=st.integers(0, 4),
    leading=st.sampled_from([(), (1,), (2, 3)]),
    seed=st.integers(0, 999),
)
def test_moves_a_score_from_its_distance_to_its_key(attempt, n_queries, n_memory, leading, seed):
    n_keys = n_memory + n_queries
    x = randn(torch.Generator().manual_seed(seed), *leading, n_keys, n_queries).mT

    out = attempt(shift, x)

    expected = torch.zeros(*leading, n_queries, n_keys, dtype=torch.float64)
    for i in range(n_queries):
        for j in range(n_memory + i + 1):
            expected[..., i, j] = x[..., i, n_keys - 1 - (n_memory + i - j)]
    assert_close(out, expected)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 3), (5, 4), (1, 0)])
def test_refuses_to_shift_fewer_keys_than_queries(attempt, rng, n_queries, n_keys):
    both = rf"{n_queries}\D+{n_keys}|{n_keys}\D+{n_queries}"
    with pytest.raises(ValueError, match=both):
        attempt(shift, randn(rng, BATCH, n_queries, n_keys))


@pytest.mark.parametrize(
    ("batch", "n_heads", "n_queries", "n_memory"),
    [(2, 3, 5, 0), (2, 3, 5, 2), (2, 3, 5, 9), (1, 3, 1, 4), (3, 1, 5, 2), (1, 1, 1, 0)],
)
def test_adds_the_four_terms_for_every_pair(attempt, rng, batch, n_heads, n_queries, n_memory):
    inputs = parts_of_scores(rng, n_queries, n_memory + n_queries, batch, n_heads)

    out = attempt(scores, *inputs)

    assert_close(out, pair_by_pair(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_have_the_dtype_of_the_queries(attempt, rng, dtype):
    inputs = [x.to(dtype) for x in parts_of_scores(rng, 5, 7)]

    out = attempt(scores, *inputs)

    # Each sum on the way is rounded, by half an eps of what may be 16.
    expected = pair_by_pair(*(x.double() for x in inputs)).to(dtype)
    assert_close(out, expected, atol=32 * torch.finfo(dtype).eps)


def test_sends_gradients_to_all_parts_of_a_score(attempt, rng):
    inputs, grad = parts_of_scores(rng, 3, 5), randn(rng, BATCH, N_HEADS, 3, 5)

    grads = attempt(gradients_of_scores, inputs, grad)

    inputs = [x.requires_grad_() for x in inputs]
    past = pair_by_pair(*inputs).masked_fill(~causal(3, 5), 0.0)
    assert_close(grads, torch.autograd.grad(past, inputs, grad))


def test_compares_a_query_with_a_distance_only_once(attempt, rng):
    inputs = parts_of_scores(rng, 6, 11, batch=1, head_dim=16)

    out, largest = attempt(size_of_scores, *inputs)

    assert_close(out, pair_by_pair(*inputs))
    assert largest < N_HEADS * 6 * 11 * 16, (
        f"a tensor of {largest} numbers, for {N_HEADS * 6 * 11} scores of head_dim 16"
    )


@pytest.mark.parametrize("n_memory", [None, 0, 3, 8])
def test_gathers_from_the_memory_and_from_the_past(attempt, rng, n_memory):
    weights, x = weights_of_attention(rng), randn(rng, BATCH, 5, D_MODEL)
    memory = None if n_memory is None else randn(rng, BATCH, n_memory, D_MODEL)

    out = attempt(attend, weights, x, memory)

    text = x if memory is None else torch.cat((memory, x), dim=1)
    assert_close(out, direct_attention(weights, text, causal(5, text.shape[1])))


def test_takes_zeros_in_the_memory_for_tokens(attempt, rng):
    weights, x = weights_of_attention(rng), randn(rng, BATCH, 5, D_MODEL)
    memory = torch.zeros(BATCH, 3, D_MODEL, dtype=torch.float64)

    out = attempt(attend, weights, x, memory)

    assert_close(out, direct_attention(weights, torch.cat((memory, x), dim=1), causal(5, 8)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e11), (torch.float32, 1e10)])
def test_gathers_from_a_token_itself_however_low_it_scores(attempt, rng, dtype, size, sign):
    weights = {name: weight.to(dtype) for name, weight in weights_of_attention(rng).items()}
    itself = rows_of_distances({name: weight.double() for name, weight in weights.items()}, 1)[0]
    weights["v"] = (sign * size * itself).to(dtype)  # distance 0 counts most: for it or against it
    x = randn(rng, BATCH, 4, D_MODEL).to(dtype)

    out = attempt(attend, weights, x)

    weights = {name: weight.double() for name, weight in weights.items()}
    assert_close(out, direct_attention(weights, x.double(), causal(4, 4)).to(dtype))


def test_attends_to_every_text_anew(attempt, rng):
    kinds = [(5, 9, torch.float32), (5, 9, torch.float64), (4, None, torch.float64)]
    kinds += [(5, 9, torch.float64), (2, 1, torch.float64), (6, 12, torch.float64)]
    texts = []
    for n, n_memory, dtype in kinds:
        weights = {name: weight.to(dtype) for name, weight in weights_of_attention(rng).items()}
        x, memory = (randn(rng, BATCH, m or 0, D_MODEL).to(dtype) for m in (n, n_memory))
        texts.append((weights, x, None if n_memory is None else memory))

    outs = attempt(attend_in_turn, texts)

    for out, (weights, x, memory) in zip(outs, texts, strict=True):
        text = (x if memory is None else torch.cat((memory, x), dim=1)).double()
        weights = {name: weight.double() for name, weight in weights.items()}
        expected = direct_attention(weights, text, causal(x.shape[1], text.shape[1]))
        assert_close(out, expected.to(x.dtype))


@pytest.mark.parametrize("n_memory", [0, 6])
def test_learns_from_the_memory_without_a_gradient_into_it(attempt, rng, n_memory):
    weights, x = weights_of_attention(rng), randn(rng, BATCH, 4, D_MODEL)
    memory, grad = randn(rng, BATCH, n_memory, D_MODEL), randn(rng, BATCH, 4, D_MODEL)

    of_weights, of_x, of_memory = attempt(learn, weights, x, memory, grad)

    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()} | {
        "x": x.clone().requires_grad_()
    }
    text = torch.cat((memory, leaves["x"]), dim=1)
    direct_attention(leaves, text, causal(4, n_memory + 4)).backward(grad)
    assert_close(of_memory, torch.zeros_like(memory))
    assert_close(of_x, leaves["x"].grad)
    assert_close(of_weights, {name: leaves[name].grad for name in weights})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, dtype):
    weights = {name: weight.to(dtype) for name, weight in weights_of_attention(rng).items()}
    x, memory = (randn(rng, BATCH, n, D_MODEL).to(dtype) for n in (5, 3))

    out = attempt(attend, weights, x, memory)

    weights = {name: weight.double() for name, weight in weights.items()}
    text = torch.cat((memory, x), dim=1).double()
    expected = direct_attention(weights, text, causal(5, 8)).to(dtype)
    # Scores of about 8 carry errors of a few eps into the weights, and results reach 5.
    assert_close(out, expected, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("batch", "n_memory"), [(2, None), (2, 4), (1, 4)])
@pytest.mark.parametrize("mem_len", [0, 2, 5, 30])
def test_remembers_the_last_tokens_cut_from_the_graph(attempt, rng, batch, n_memory, mem_len):
    x = randn(rng, batch, 3, D_MODEL)
    memory = None if n_memory is None else randn(rng, batch, n_memory, D_MODEL)

    kept, state = attempt(remember, memory, x, mem_len)

    text = x if memory is None else torch.cat((memory, x), dim=1)
    first = max(0, text.shape[1] - mem_len)
    assert_close(kept, text[:, first:])
    assert state == "cut", f"the memory is {state}"


@pytest.mark.parametrize(("n_memory", "mem_len"), [(None, 3), (None, 2), (4, 7), (0, 5)])
def test_remembers_in_memory_of_its_own(attempt, rng, n_memory, mem_len):
    x = randn(rng, BATCH, 3, D_MODEL)
    memory = None if n_memory is None else randn(rng, BATCH, n_memory, D_MODEL)

    before, after = attempt(remember_and_write, memory, x, mem_len, may_change=True)

    assert_close(after, before)


@pytest.mark.parametrize(
    ("segments", "mem_len"),
    [([5, 5], 5), ([3, 4, 2, 3], 8), ([6, 4, 5], 2), ([4, 3], 0), ([5, *[1] * 5], 4), ([4, 3], 50)],
    ids=["as long", "longer", "shorter", "no memory", "token by token", "all of it"],
)
def test_reads_segments_as_one_pass_with_the_matching_mask(attempt, rng, segments, mem_len):
    weights, x = weights_of_model(rng), randn(rng, BATCH, sum(segments), D_MODEL)

    out, memories = attempt(read, weights, x, segments, mem_len)

    expected, inputs = one_pass(weights, x, segments, mem_len)
    assert_close(out, expected)
    assert_close(memories, [y[:, max(0, sum(segments) - mem_len) :] for y in inputs])


def test_uses_and_keeps_memories_of_any_length(attempt, rng):
    n_memory = int(torch.randint(1100, 1500, (), generator=rng))
    weights, x = weights_of_model(rng), randn(rng, 1, 3, D_MODEL)
    memories = [randn(rng, 1, n_memory, D_MODEL) for _ in range(N_LAYERS)]

    out, kept = attempt(read_on, weights, x, memories)

    expected, remembered = x, []
    for n, memory in enumerate(memories):
        text = torch.cat((memory, expected), dim=1)
        remembered.append(text[:, 3:])
        expected = direct_block(weights, n, expected, text, causal(3, n_memory + 3))
    assert_close(out, expected)
    assert_close(kept, remembered)


def test_knows_of_the_past_what_the_memories_hold_and_nothing_else(attempt, rng):
    weights = weights_of_model(rng)
    first, *ways = (randn(rng, BATCH, n, D_MODEL) for n in (4, 4, 6, 1))

    out, *outs, again = attempt(read_branches, weights, first, ways)

    for second, found in zip(ways, outs, strict=True):
        text = torch.cat((first, second), dim=1)
        expected, _ = one_pass(weights, text, [4, second.shape[1]], 4)
        assert_close(found, expected[:, 4:])
    assert_close([out, again], [one_pass(weights, first, [4], 4)[0]] * 2)


def test_learns_through_all_layers_but_not_from_the_segment_before(attempt, rng):
    weights, text = weights_of_model(rng), randn(rng, BATCH, 7, D_MODEL)
    first, second = text.split([4, 3], dim=1)
    grad = randn(rng, *second.shape)

    of_weights, of_inputs = attempt(learn_from_the_second, weights, first, second, grad)

    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    text = text.clone().requires_grad_()
    one_pass(leaves, text, [4, 3], 4, learned=4)[0][:, 4:].backward(grad)
    assert_close(of_inputs, list(text.grad.split([4, 3], dim=1)))
    assert_close(of_weights, {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("n_memories", [0, 1, 3])
def test_rejects_another_number_of_memories_than_of_layers(attempt, rng, n_memories):
    weights, x = weights_of_model(rng), randn(rng, BATCH, 5, D_MODEL)
    memories = [randn(rng, BATCH, 4, D_MODEL)] * n_memories

    with pytest.raises(ValueError, match=rf"{N_LAYERS}\D+{n_memories}|{n_memories}\D+{N_LAYERS}"):
        attempt(read_with_memories, weights, x, memories)
