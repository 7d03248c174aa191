"""Specs for exercise 35: the encoder-decoder transformer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = [
    "torch.nn.Transformer",
    "torch.nn.TransformerEncoder",
    "torch.nn.TransformerEncoderLayer",
    "torch.nn.TransformerDecoder",
    "torch.nn.TransformerDecoderLayer",
]

VOCAB_SIZE, D_MODEL, N_HEADS, D_FF, N_LAYERS, MAX_LEN = 11, 12, 3, 7, 2, 9
BATCH, SRC_LEN, TGT_LEN = 3, 6, 4
SIZES = VOCAB_SIZE, D_MODEL, N_HEADS, D_FF, N_LAYERS, MAX_LEN

# Waves as exact as float32 are right, and the weights below make some of that error.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def block_shapes(attentions):
    """The names and shapes of a block's parameters."""
    found = {}
    for attention in attentions:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{attention}.{name}.weight"] = (D_MODEL, D_MODEL)
            found[f"{attention}.{name}.bias"] = (D_MODEL,)
    found |= {"ff.w_1.weight": (D_FF, D_MODEL), "ff.w_1.bias": (D_FF,)}
    found |= {"ff.w_2.weight": (D_MODEL, D_FF), "ff.w_2.bias": (D_MODEL,)}
    for i in range(1, len(attentions) + 2):
        found |= {f"norm_{i}.weight": (D_MODEL,), f"norm_{i}.bias": (D_MODEL,)}
    return found


ENCODER_BLOCK, DECODER_BLOCK = block_shapes(["attn"]), block_shapes(["self_attn", "cross_attn"])


def model_shapes():
    found = {"embed.weight": (VOCAB_SIZE, D_MODEL)}
    for i in range(N_LAYERS):
        found |= {f"encoder.{i}.{name}": shape for name, shape in ENCODER_BLOCK.items()}
        found |= {f"decoder.{i}.{name}": shape for name, shape in DECODER_BLOCK.items()}
    return found


# --- run on the code under test ------------------------------------------------------------------


def load(module, weights):
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in weights.items()}:
        raise AttributeError(f"the parameters must be {', '.join(weights)}, got {own}")
    module.load_state_dict(weights)
    return module


def build(ex, weights, dropout=0.0):
    return load(ex.Transformer(*SIZES, dropout).double(), weights)


def run_block(ex, weights, x, memory, mask=None):
    return load(ex.DecoderBlock(D_MODEL, N_HEADS, D_FF).double(), weights)(x, memory, mask)


def run_block_that_drops_inside_its_feed_forward(ex, weights, x, memory):
    block = load(ex.DecoderBlock(D_MODEL, N_HEADS, D_FF, 1.0).double(), weights)
    block.dropout.p = 0.0
    return block(x, memory)


def logits(ex, weights, src, tgt):
    return build(ex, weights)(src, tgt)


def encode(ex, weights, src, dropout=0.0):
    return build(ex, weights, dropout).encode(src)


def decode(ex, weights, tgt, memory, src):
    return build(ex, weights).decode(tgt, memory, src)


def logits_with_dropout(ex, weights, src, tgt, dropout, train):
    return build(ex, weights, dropout).train(train)(src, tgt)


def gradients(ex, weights, src, tgt, upstream):
    model = build(ex, weights)
    model(src, tgt).backward(upstream)
    return {name: p.grad for name, p in model.named_parameters()}


def write(ex, table, src, bos_id, eos_id, max_new):
    """What greedy writes, how often it read the source, and what it did with gradients and mode."""
    model = Speller(table)
    out = ex.greedy(model, src, bos_id, eos_id, max_new)
    return out, model.n_reads, model.recorded, model.training


class Speller(nn.Module):
    """Scores the next token by a table: the sum of all tokens before it says which row."""

    def __init__(self, table):
        super().__init__()
        self.table, self.n_reads, self.recorded = nn.Parameter(table), 0, False

    def encode(self, src):
        self.n_reads += 1
        return src.sum(1)[:, None, None].double()

    def decode(self, tgt, memory, src):
        scores = self.table[(tgt.cumsum(1) + memory[:, 0].long()) % len(self.table)]
        self.recorded |= scores.requires_grad
        return scores

    def forward(self, src, tgt):
        return self.decode(tgt, self.encode(src), src)


def fresh(ex, vocab_size, d_model):
    """The parameters' names, in order, and the table before any training."""
    model = ex.Transformer(vocab_size, d_model, 2, 3, 1)
    return sorted(name for name, _ in model.named_parameters()), model.embed.weight


def learn_to_reverse(ex, n_steps, batch, most):
    """Teach a model to reverse strings of 1 … most digits; the share that it gets right."""
    model = ex.Transformer(13, 64, 4, 128, 2, most + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98), fused=True)
    for step in range(n_steps):
        warm_up = min((step + 1) / 60, 1)
        optimizer.param_groups[0]["lr"] = 2e-3 * warm_up * (1 - step / n_steps)
        src, tgt = digit_strings(batch, most)
        given = F.pad(tgt[:, :-1], (1, 0), value=BOS)
        scores = model(src, given)
        loss = F.cross_entropy(scores.flatten(0, 1), tgt.flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    src, tgt = digit_strings(1000, most)
    out = ex.greedy(model, src, BOS, EOS, most + 1)
    return (F.pad(out, (0, most + 1 - out.shape[1])) == tgt).all(1).double().mean().item()


BOS, EOS = 1, 2  # digits are 3 … 12


def digit_strings(n, most):
    """Strings and their reverses, each with EOS behind it, then padding."""
    lengths = torch.randint(1, most + 1, (n, 1))
    digits = torch.randint(3, 13, (n, most + 1))
    at = torch.arange(most + 1)
    backwards = digits.gather(1, (lengths - 1 - at).clamp(min=0))
    src, tgt = (x.masked_fill(at >= lengths, 0) for x in (digits, backwards))
    return src.scatter(1, lengths, EOS), tgt.scatter(1, lengths, EOS)


# --- the oracle: nn.Transformer ------------------------------------------------------------------


class Oracle:
    """torch's own layers with these weights, without the norm that torch puts behind the last."""

    def __init__(self, weights):
        sizes = {"dim_feedforward": D_FF, "dropout": 0.0, "batch_first": True}
        encoder = nn.TransformerEncoderLayer(D_MODEL, N_HEADS, **sizes)
        decoder = nn.TransformerDecoderLayer(D_MODEL, N_HEADS, **sizes)
        self.model = nn.Transformer(
            D_MODEL, N_HEADS, batch_first=True,
            custom_encoder=nn.TransformerEncoder(encoder, N_LAYERS, enable_nested_tensor=False),
            custom_decoder=nn.TransformerDecoder(decoder, N_LAYERS),
        ).double()  # fmt: skip
        self.table = weights["embed.weight"].clone().requires_grad_()
        with torch.no_grad():
            theirs = dict(self.model.named_parameters())
            for name, values in under_our_names(theirs).items():
                values.copy_(weights[name])

    def embedded(self, ids):
        t, i = torch.arange(ids.shape[1]).double()[:, None], torch.arange(D_MODEL // 2)
        angles = t / 10000 ** (2 * i.double() / D_MODEL)
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return self.table[ids] * D_MODEL**0.5 + waves

    def encode(self, src):
        return self.model.encoder(self.embedded(src), src_key_padding_mask=src == 0)

    def decode(self, tgt, memory, src):
        n = tgt.shape[1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        out = self.model.decoder(
            self.embedded(tgt), memory, tgt_mask=future, memory_key_padding_mask=src == 0
        )
        return out @ self.table.T

    def __call__(self, src, tgt):
        return self.decode(tgt, self.encode(src), src)


def expected_from_block(weights, x, memory, hidden=None):
    """What nn.TransformerDecoderLayer gives with these weights."""
    layer = nn.TransformerDecoderLayer(
        D_MODEL, N_HEADS, D_FF, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        for name, values in block_under_our_names(dict(layer.named_parameters()), "", "").items():
            values.copy_(weights[name])
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return layer(x, memory, tgt_mask=future, memory_key_padding_mask=hidden)


def under_our_names(theirs):
    """Their parameters, or gradients of them, as views that have our names."""
    ours = {}
    for i in range(N_LAYERS):
        ours |= block_under_our_names(theirs, f"encoder.layers.{i}.", f"encoder.{i}.")
        ours |= block_under_our_names(theirs, f"decoder.layers.{i}.", f"decoder.{i}.")
    return ours


def block_under_our_names(theirs, before, our_before):
    attentions = {"self_attn": "attn"}
    if f"{before}multihead_attn.in_proj_bias" in theirs:
        attentions = {"self_attn": "self_attn", "multihead_attn": "cross_attn"}
    ours = {}
    for kind in ("weight", "bias"):
        for their_name, name in attentions.items():
            parts = theirs[f"{before}{their_name}.in_proj_{kind}"].chunk(3)
            for proj, part in zip("qkv", parts, strict=True):
                ours[f"{our_before}{name}.{proj}_proj.{kind}"] = part
            o_proj = theirs[f"{before}{their_name}.out_proj.{kind}"]
            ours[f"{our_before}{name}.o_proj.{kind}"] = o_proj
        for i in (1, 2):
            ours[f"{our_before}ff.w_{i}.{kind}"] = theirs[f"{before}linear{i}.{kind}"]
        for i in range(1, len(attentions) + 2):
            ours[f"{our_before}norm_{i}.{kind}"] = theirs[f"{before}norm{i}.{kind}"]
    return ours


def written_by_hand(model, src, bos_id, eos_id, max_new):
    """A row at a time, everything computed anew for each token."""
    rows = []
    for row in src:
        tgt = [bos_id]
        while len(tgt) <= max_new and tgt[-1] != eos_id:
            tgt.append(model(row[None], torch.tensor([tgt]))[0, -1].argmax().item())
        rows.append(tgt[1:])
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


# --- inputs --------------------------------------------------------------------------------------


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def make_weights(rng, shapes=None):
    """Random weights, large enough that every part matters."""
    shapes = shapes or model_shapes()
    return {name: 0.5 * randn(rng, *shape) for name, shape in shapes.items()}


def make_ids(rng, *shape):
    return torch.randint(1, VOCAB_SIZE, shape, generator=rng)


def padded(src):
    """With padding at the end, at the front, and in between."""
    src = src.clone()
    src[0, 4:], src[1, :2], src[2, 3] = 0, 0, 0
    return src


# --- the specs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all seen", "padding"])
def test_decoder_block_is_that_of_torch(attempt, rng, masked):
    weights = make_weights(rng, DECODER_BLOCK)
    x, memory = randn(rng, BATCH, TGT_LEN, D_MODEL), randn(rng, BATCH, SRC_LEN, D_MODEL)
    mask = (padded(make_ids(rng, BATCH, SRC_LEN)) != 0)[:, None, None] if masked else None

    out = attempt(run_block, weights, x, memory, mask)

    hidden = None if mask is None else ~mask[:, 0, 0]
    assert_close(out, expected_from_block(weights, x, memory, hidden))


def test_decoder_block_has_dropout_inside_its_feed_forward(attempt, rng):
    weights = make_weights(rng, DECODER_BLOCK)
    x, memory = randn(rng, BATCH, TGT_LEN, D_MODEL), randn(rng, BATCH, SRC_LEN, D_MODEL)

    out = attempt(run_block_that_drops_inside_its_feed_forward, weights, x, memory)

    without = weights | {"ff.w_2.weight": torch.zeros_like(weights["ff.w_2.weight"])}
    assert_close(out, expected_from_block(without, x, memory))


@pytest.mark.parametrize("has_padding", [False, True], ids=["no padding", "padding"])
def test_gives_the_logits_of_torch(attempt, rng, has_padding):
    weights, src, tgt = make_weights(rng), *make_ids(rng, 2, BATCH, SRC_LEN)
    src, tgt = padded(src) if has_padding else src, tgt[:, :TGT_LEN]

    out = attempt(logits, weights, src, tgt)

    assert_close(out, Oracle(weights)(src, tgt), **TOLERANCE)


def test_reads_the_source_alone_and_decodes_against_any_memory(attempt, rng):
    weights, tgt = make_weights(rng), make_ids(rng, BATCH, TGT_LEN)
    src, other = make_ids(rng, BATCH, SRC_LEN), randn(rng, BATCH, SRC_LEN, D_MODEL)

    memory = attempt(encode, weights, src)
    out = attempt(decode, weights, tgt, other, padded(src))

    oracle = Oracle(weights)
    expected = oracle.encode(src), oracle.decode(tgt, other, padded(src))
    assert_close((memory, out), expected, **TOLERANCE)


def test_sends_gradients_to_every_weight_and_thrice_to_the_table(attempt, rng):
    weights, src, tgt = make_weights(rng), *make_ids(rng, 2, BATCH, SRC_LEN)
    tgt, src, upstream = tgt[:, :TGT_LEN], padded(src), randn(rng, BATCH, TGT_LEN, VOCAB_SIZE)

    grads = attempt(gradients, weights, src, tgt, upstream)

    oracle = Oracle(weights)
    oracle(src, tgt).backward(upstream)
    theirs = {name: p.grad for name, p in oracle.model.named_parameters()}
    expected = under_our_names(theirs) | {"embed.weight": oracle.table.grad}
    # Gradients reach 100, and pass through twice as many layers.
    assert_close(grads, expected, atol=2e-4, rtol=1e-4)


def test_starts_with_a_table_as_wide_as_its_scale_undoes_and_no_other(attempt):
    names, table = attempt(fresh, 300, 64)

    shapes = [name for name in model_shapes() if ".1." not in name]
    assert_close(names, sorted(shapes))
    # Six standard errors, of the deviation and of the mean, from 300 · 64 draws.
    n = table.numel()
    assert_close(table.double().std().item() * 8, 1.0, rtol=0, atol=6 / math.sqrt(2 * n))
    assert_close(table.double().mean().item() * 8, 0.0, rtol=0, atol=6 / math.sqrt(n))


def test_drops_embeddings_and_all_that_branches_return(attempt, rng):
    weights, src, tgt = make_weights(rng), *make_ids(rng, 2, BATCH, TGT_LEN)

    out = attempt(logits_with_dropout, weights, src, tgt, 1.0, True)
    memory = attempt(encode, weights, src, 1.0)

    stacks = {}
    for stack, n_norms in (("encoder", 2), ("decoder", 3)):
        x = torch.zeros(D_MODEL, dtype=torch.float64)
        for norm in [f"{stack}.{i}.norm_{j + 1}" for i in range(N_LAYERS) for j in range(n_norms)]:
            x = F.layer_norm(x, (D_MODEL,), weights[f"{norm}.weight"], weights[f"{norm}.bias"])
        stacks[stack] = x.expand(BATCH, TGT_LEN, -1)
    expected = stacks["decoder"] @ weights["embed.weight"].T, stacks["encoder"]
    assert_close((out, memory), expected)


def test_drops_nothing_in_eval_mode(attempt, rng):
    weights, src, tgt = make_weights(rng), *make_ids(rng, 2, BATCH, TGT_LEN)

    out = attempt(logits_with_dropout, weights, src, tgt, 0.5, False)

    assert_close(out, Oracle(weights)(src, tgt), **TOLERANCE)


@pytest.mark.parametrize("max_new", [1, 4, 99])
def test_greedy_writes_the_likeliest_tokens_up_to_the_end(attempt, rng, max_new):
    table, bos_id, eos_id = randn(rng, 97, 17), 1, 2
    table[:, 0] = -100  # padding is never likeliest
    table[::4, eos_id] = 100  # a target goes on with a chance of 3/4
    src = make_ids(rng, 7, SRC_LEN)

    out, n_reads, recorded, training = attempt(write, table, src, bos_id, eos_id, max_new)

    assert_close(out, written_by_hand(Speller(table), src, bos_id, eos_id, max_new))
    assert n_reads == 1, f"the source is read {n_reads} times, once is enough"
    assert not recorded, "gradients are recorded, and nobody asks for them"
    assert training, "the model is left in eval mode, and came in train mode"


def test_rejects_more_tokens_than_it_has_positions(attempt, rng):
    weights, tgt = make_weights(rng), make_ids(rng, BATCH, TGT_LEN)

    with pytest.raises(ValueError, match=r"(?s)(?=.*\b10\b).*\b9\b"):
        attempt(logits, weights, make_ids(rng, BATCH, 10), tgt)


@pytest.mark.train
def test_learns_to_reverse_strings_of_digits(attempt):
    share = attempt(learn_to_reverse, 500, 32, 6)

    assert share > 0.99, f"reverses {share:.1%} of 1,000 strings"
