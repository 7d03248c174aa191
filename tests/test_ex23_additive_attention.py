"""Specs for exercise 23: additive attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    "torch.nn.functional.scaled_dot_product_attention",
    "torch.nn.functional.multi_head_attention_forward",
]

BATCH, N_KEYS, QUERY_DIM, KEY_DIM, D_ATTN = 3, 5, 4, 6, 7
INPUT_SIZE, HIDDEN_SIZE = 2, 4  # of a decoder; its hidden states are the queries
LENGTHS = torch.tensor([2, 5, 1])

# All in float64: a single rounding to float32 would cost 6e-8.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

SHAPES = {
    "q_proj.weight": (D_ATTN, QUERY_DIM),
    "k_proj.weight": (D_ATTN, KEY_DIM),
    "score.weight": (1, D_ATTN),
}

kinds = pytest.mark.parametrize("kind", ["additive", "dot"])
fillings = pytest.mark.parametrize(
    "filled", [[1e3], [math.nan, 1e300, -math.inf, -1e300, math.inf]], ids=["1000", "all"]
)
layers = pytest.mark.parametrize("n_layers", [1, 2, 3])


def cell_shapes(n_layers):
    """The names and shapes of a decoder's parameters."""
    shapes = {
        "attention.q_proj.weight": (HIDDEN_SIZE, HIDDEN_SIZE),
        "attention.k_proj.weight": (HIDDEN_SIZE, KEY_DIM),
        "attention.score.weight": (1, HIDDEN_SIZE),
    }
    for i in range(n_layers):
        n_read = INPUT_SIZE if i == 0 else HIDDEN_SIZE + KEY_DIM
        shapes |= {
            f"cells.{i}.weight_ih": (3 * HIDDEN_SIZE, n_read),
            f"cells.{i}.weight_hh": (3 * HIDDEN_SIZE, HIDDEN_SIZE),
            f"cells.{i}.bias_ih": (3 * HIDDEN_SIZE,),
            f"cells.{i}.bias_hh": (3 * HIDDEN_SIZE,),
        }
    return shapes


# --- run on the code under test ------------------------------------------------------------------


def load(module, weights):
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in weights.items()}:
        raise AttributeError(f"the parameters must be {', '.join(weights)}, got {own}")
    module = module.to(next(iter(weights.values())).dtype)
    module.load_state_dict(weights)
    return module


def build(ex, kind, weights):
    if kind == "dot":
        return ex.DotAttention()
    return load(ex.AdditiveAttention(QUERY_DIM, KEY_DIM, D_ATTN), weights)


def attend(ex, kind, weights, query, keys, lengths=None):
    return build(ex, kind, weights)(query, keys, lengths)


def attend_in_turn(ex, kind, weights, *batches):
    """One module for several batches, each (query, keys, lengths), one after the other."""
    attention, results = build(ex, kind, weights), []
    for query, keys, lengths in batches:
        results.append(attention.to(keys.dtype)(query, keys, lengths))
    return results


def gradients(ex, kind, weights, query, keys, lengths, grad_context, grad_weights):
    """Of the parameters, the query and the keys."""
    attention = build(ex, kind, weights)
    inputs = {"query": query.requires_grad_(), "keys": keys.requires_grad_()}
    inputs |= dict(attention.named_parameters())
    out = attention(query, keys, lengths)
    found = torch.autograd.grad(out, list(inputs.values()), (grad_context, grad_weights))
    return dict(zip(inputs, found, strict=True))


def decode(ex, weights, xs, states, keys, lengths=None):
    """Several steps: what each of them returns."""
    decoder, steps = decoder_of(ex, weights, len(states)), []
    for x in xs:
        steps.append(decoder(x, states, keys, lengths))
        states = steps[-1][0]
    return steps


def decode_in_turn(ex, weights, *sentences):
    """One decoder for several sentences, each (xs, states, keys, lengths): the last steps."""
    decoder, last = decoder_of(ex, weights, len(sentences[0][1])), []
    for xs, states, keys, lengths in sentences:
        for x in xs:
            out = decoder(x, states, keys, lengths)
            states = out[0]
        last.append(out)
    return last


def decoder_gradients(ex, weights, xs, states, keys, lengths, upstream):
    """Of the parameters and the keys, from all steps' states and contexts."""
    decoder = decoder_of(ex, weights, len(states))
    inputs = {"keys": keys.requires_grad_(), "states": states.requires_grad_()}
    inputs |= dict(decoder.named_parameters())
    outs = []
    for x in xs:
        states, context, _ = decoder(x, states, keys, lengths)
        outs += [states[-1], context]
    found = torch.autograd.grad(outs, list(inputs.values()), upstream)
    return dict(zip(inputs, found, strict=True))


def decoder_of(ex, weights, n_layers):
    return load(ex.DecoderStep(INPUT_SIZE, HIDDEN_SIZE, KEY_DIM, n_layers), weights)


# --- the oracle: direct loops --------------------------------------------------------------------


class oracle:
    """The equations, a key at a time, under the names of the exercise."""

    class DotAttention(nn.Module):
        def forward(self, query, keys, lengths=None):
            return average_by_loops(query, keys, lengths, torch.dot)

    class AdditiveAttention(nn.Module):
        def __init__(self, query_dim, key_dim, d_attn):
            super().__init__()
            self.q_proj = nn.Linear(query_dim, d_attn, bias=False)
            self.k_proj = nn.Linear(key_dim, d_attn, bias=False)
            self.score = nn.Linear(d_attn, 1, bias=False)

        def forward(self, query, keys, lengths=None):
            return average_by_loops(query, keys, lengths, self.score_of)

        def score_of(self, query, key):
            pairs = zip(self.q_proj.weight, self.k_proj.weight, strict=True)
            hidden = [torch.tanh(torch.dot(q, query) + torch.dot(k, key)) for q, k in pairs]
            return sum(w * h for w, h in zip(self.score.weight[0], hidden, strict=True))

    class DecoderStep(nn.Module):
        def __init__(self, input_size, hidden_size, key_dim, n_layers):
            super().__init__()
            above = [nn.GRUCell(hidden_size + key_dim, hidden_size) for _ in range(n_layers - 1)]
            self.cells = nn.ModuleList([nn.GRUCell(input_size, hidden_size), *above])
            self.attention = oracle.AdditiveAttention(hidden_size, key_dim, hidden_size)

        def forward(self, x, states, keys, lengths=None):
            new = [self.cells[0](x, states[0])]
            context, weights = self.attention(new[0], keys, lengths)
            for i in range(1, len(self.cells)):
                read = torch.cat([new[i - 1], context], dim=1)
                new.append(self.cells[i](read, states[i]))
            return torch.stack(new), context, weights


def average_by_loops(query, keys, lengths, score):
    batch, n_keys, _ = keys.shape
    lengths = [n_keys] * batch if lengths is None else lengths.tolist()
    contexts, rows = [], []
    for b, n in enumerate(lengths):
        scores = [score(query[b], keys[b, j]) for j in range(n)]
        largest = max(s.item() for s in scores)
        parts = [torch.exp(s - largest) for s in scores]
        row = [part / sum(parts) for part in parts]
        contexts.append(sum(row[j] * keys[b, j] for j in range(n)))
        rows.append(torch.stack(row + [torch.zeros_like(row[0])] * (n_keys - n)))
    return torch.stack(contexts), torch.stack(rows)


# --- inputs --------------------------------------------------------------------------------------


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def make_weights(rng, shapes=SHAPES):
    return {name: randn(rng, *shape) for name, shape in shapes.items()}


def make_inputs(rng, kind, batch=BATCH, n_keys=N_KEYS):
    """A query and keys, not contiguous."""
    keys = randn(rng, n_keys, batch, KEY_DIM).transpose(0, 1)
    return randn(rng, KEY_DIM if kind == "dot" else QUERY_DIM, batch).T, keys


def make_decoder_inputs(rng, n_layers, n_steps=3):
    """The weights, an x for each step, the first states, and keys."""
    weights = {name: 0.7 * w for name, w in make_weights(rng, cell_shapes(n_layers)).items()}
    xs, states = randn(rng, n_steps, BATCH, INPUT_SIZE), randn(rng, n_layers, BATCH, HIDDEN_SIZE)
    return weights, xs, states, 2 * randn(rng, BATCH, N_KEYS, KEY_DIM)


def padding(lengths=LENGTHS, n_keys=N_KEYS):
    """(batch, n_keys, 1), True at padding."""
    return (torch.arange(n_keys) >= lengths[:, None])[..., None]


def fill(x, mask, values):
    """x with these values, in turn, where the mask is True."""
    values = torch.tensor(values, dtype=x.dtype)
    return x.where(~mask, values[torch.arange(x.numel()) % len(values)].view(x.shape))


# --- the specs -----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("size", [(3, 5), (1, 5), (3, 1)])
def test_averages_the_keys_by_the_softmax_of_their_scores(attempt, rng, kind, size):
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind, *size)

    out = attempt(attend, kind, weights, query, keys)

    assert_close(out, attend(oracle, kind, weights, query, keys), **EXACT)


@kinds
@fillings
def test_gives_padding_no_weight_whatever_it_holds(attempt, rng, kind, filled):
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind)
    keys = fill(keys, padding(), filled)

    out = attempt(attend, kind, weights, query, keys, LENGTHS)

    assert_close(out, attend(oracle, kind, weights, query, keys, LENGTHS))


@kinds
@fillings
def test_sends_gradients_to_all_but_the_padding(attempt, rng, kind, filled):
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind)
    keys = fill(keys, padding(), filled)
    upstream = randn(rng, BATCH, KEY_DIM), randn(rng, BATCH, N_KEYS)

    grads = attempt(gradients, kind, weights, query, keys, LENGTHS, *upstream)

    clean = keys.masked_fill(padding(), 0)
    assert_close(grads, gradients(oracle, kind, weights, query, clean, LENGTHS, *upstream), **EXACT)


@kinds
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e3, torch.float64), (1e40, torch.float64), (1e10, torch.float32)],
    ids=["1000", "1e40", "1e10_float32"],
)
def test_stays_exact_for_scores_of_any_size(attempt, rng, kind, size, dtype):
    # All are positive, and small enough for tanh, but for the signs of the rows' scores.
    weights = {name: 0.1 * w.abs().to(dtype) for name, w in make_weights(rng).items()}
    query, keys = (x.abs().to(dtype) for x in make_inputs(rng, kind, 4))
    lengths, below = torch.tensor([2, 4, 1, 3]), torch.tensor([False, True, True, False])
    if kind == "dot":
        query, keys = query * size, keys * torch.where(below, -1, 1)[:, None, None]
    else:
        weights["score.weight"] *= -size
        keys[~below] *= -3

    out = attempt(attend, kind, weights, query, keys, lengths)

    expected = attend(oracle, kind, weights, query, keys, lengths)
    # A score of 1e3 carries an error of 1e-13 into its exp.
    assert_close(out, expected, **({} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}))


@kinds
def test_takes_a_key_for_what_its_place_says_whatever_it_holds(attempt, rng, kind):
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind)
    keys[0, 1] = 0  # a key of zeros
    keys[1, 3] = keys[0, 4]  # a key that equals padding
    keys[2, 0] = 0  # the only key of its row

    out = attempt(attend, kind, weights, query, keys, LENGTHS)

    assert_close(out, attend(oracle, kind, weights, query, keys, LENGTHS), **EXACT)


@kinds
def test_begins_anew_at_every_call(attempt, rng, kind):
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind)
    batches = [
        (query, keys[:, :3], torch.tensor([3, 1, 2])),
        (query, keys, LENGTHS),  # longer
        (query, 2 * keys, None),
        (query, keys, torch.tensor([1, 4, 5])),
        (query[:2], keys[:2], torch.tensor([5, 1])),  # fewer
    ]

    narrow = query.float(), keys.float(), LENGTHS
    out = attempt(attend_in_turn, kind, weights, *batches, narrow)

    expected = [attend(oracle, kind, weights, *batch) for batch in batches]
    assert_close(out[:-1], expected, **EXACT)
    weights = {name: w.float() for name, w in weights.items()}
    assert_close(out[-1], attend(oracle, kind, weights, *narrow))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, kind, dtype):
    weights = {name: w.to(dtype) for name, w in make_weights(rng).items()}
    query, keys = (x.to(dtype) for x in make_inputs(rng, kind))

    out = attempt(attend, kind, weights, query, keys, LENGTHS)

    wide = {name: w.double() for name, w in weights.items()}
    expected = attend(oracle, kind, wide, query.double(), keys.double(), LENGTHS)
    # Scores of about 8 carry errors of a few eps into the weights, and the keys reach 4.
    tolerance = 32 * torch.finfo(dtype).eps
    assert_close(out, [x.to(dtype) for x in expected], atol=tolerance)


@settings(max_examples=10)
@given(
    kind=st.sampled_from(["additive", "dot"]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_treats_a_row_in_a_batch_as_it_does_alone(attempt, kind, lengths, seed):
    rng = torch.Generator().manual_seed(seed)
    n_keys = max(lengths) + seed % 2  # some batches are padding in the last key
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind, len(lengths), n_keys)

    context, _ = attempt(attend, kind, weights, query, keys, torch.tensor(lengths))

    for b, n in enumerate(lengths):
        alone, _ = attempt(attend, kind, weights, query[b, None], keys[b, None, :n])
        assert_close(context[b], alone[0])


@layers
def test_decoder_asks_with_this_step_and_tells_all_later_cells(attempt, rng, n_layers):
    inputs = make_decoder_inputs(rng, n_layers)

    steps = attempt(decode, *inputs, LENGTHS)

    assert_close(steps, decode(oracle, *inputs, LENGTHS), **EXACT)


def test_decoder_begins_anew_with_every_sentence(attempt, rng):
    weights, xs, states, keys = make_decoder_inputs(rng, n_layers=2)
    sentences = [
        (xs[:1], states, keys[:, :4], torch.tensor([2, 4, 1])),
        (xs[:2], states, 3 * keys[:, 1:], None),  # another of the same shape
        (xs, states, keys, LENGTHS),  # longer
        (xs[:, 1:], states[:, 1:], keys[1:], None),  # fewer
    ]

    last = attempt(decode_in_turn, weights, *sentences)

    assert_close(last, decode_in_turn(oracle, weights, *sentences), **EXACT)


def test_decoder_sends_gradients_back_through_all_steps(attempt, rng):
    inputs = make_decoder_inputs(rng, n_layers=2)
    upstream = [randn(rng, BATCH, n) for _ in inputs[1] for n in (HIDDEN_SIZE, KEY_DIM)]

    grads = attempt(decoder_gradients, *inputs, LENGTHS, upstream)

    assert_close(grads, decoder_gradients(oracle, *inputs, LENGTHS, upstream), **EXACT)


@kinds
@pytest.mark.parametrize("wrong", [0, 6, -1])
def test_rejects_a_length_without_keys_or_beyond_them(attempt, rng, kind, wrong):
    weights, (query, keys) = make_weights(rng), make_inputs(rng, kind)

    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b5\b).*(?<!\d){wrong}\b"):
        attempt(attend, kind, weights, query, keys, torch.tensor([2, wrong, 3]))


@pytest.mark.parametrize("width", [1, 4, 9])
def test_dot_attention_rejects_a_query_of_another_width(attempt, rng, width):
    query, (_, keys) = randn(rng, BATCH, width), make_inputs(rng, "dot")

    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{width}\b).*\b6\b"):
        attempt(attend, "dot", {}, query, keys)
