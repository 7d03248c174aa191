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

VOCAB_SIZE, D_MODEL, N_HEADS, D_FF, N_LAYERS, MAX_LEN = 11, 12, 3, 7, 3, 9
BATCH, SRC_LEN, TGT_LEN = 5, 6, 4
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


def model_shapes(n_layers=N_LAYERS):
    found = {"embed.weight": (VOCAB_SIZE, D_MODEL)}
    for i in range(n_layers):
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


def branch_with_dropout(ex, weights, x, memory, p):
    """Of one block: what it makes of x and memory, in each of two calls."""
    block = ex.DecoderBlock(x.shape[-1], N_HEADS, D_FF, p).double()
    block.load_state_dict(block.state_dict() | weights)
    return torch.stack([block(x, memory), block(x, memory)])


def logits(ex, weights, src, tgt):
    return build(ex, weights)(src, tgt)


def encode(ex, weights, src, dropout=0.0):
    return build(ex, weights, dropout).encode(src)


def encode_all_then_decode_all(ex, weights, sources, targets, memories):
    """Of one model: the memories, and the logits for the targets against other ones."""
    model = build(ex, weights)
    return [model.encode(src) for src in sources], [
        model.decode(*inputs) for inputs in zip(targets, memories, sources, strict=True)
    ]


def learn_between_two_calls(ex, weights, pairs):
    """Of one model: the logits for one pair, for another after a step, and two more dtypes."""
    model = build(ex, weights)
    first = model(*pairs[0])
    take_a_step(first, pairs[0][1], model.parameters())
    second = model(*pairs[1])
    dtypes = [str(model.to(dtype)(*pairs[0]).dtype) for dtype in (torch.bfloat16, torch.float32)]
    return first, second, dtypes


def take_a_step(scores, targets, parameters):
    F.cross_entropy(scores.flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad


def logits_with_dropout(ex, weights, src, tgt, dropout, train):
    return build(ex, weights, dropout).train(train)(src, tgt)


def gradients(ex, weights, src, tgt, upstream):
    model = build(ex, weights)
    model(src, tgt).backward(upstream)
    return {name: p.grad for name, p in model.named_parameters()}


def write(ex, table, src, bos_id, eos_id, max_new, train=True):
    """What greedy writes, how often it read the source, and what it did with gradients and mode."""
    model = Speller(table).train(train)
    out = ex.greedy(model, src, bos_id, eos_id, max_new)
    return out, model.n_reads, model.recorded, (model.training, model.table.requires_grad)


class Speller(nn.Module):
    """Scores the next token by a table: the sum of all tokens before it says which row."""

    def __init__(self, table):
        super().__init__()
        self.table, self.n_reads, self.recorded = nn.Parameter(table), 0, False

    def encode(self, src):
        self.n_reads += 1
        self.recorded |= torch.is_grad_enabled()
        return src.sum(1)[:, None, None].double()

    def decode(self, tgt, memory, src):
        scores = self.table[(tgt.cumsum(1) + memory[:, 0].long()) % len(self.table)]
        self.recorded |= scores.requires_grad
        return scores

    def forward(self, src, tgt):
        return self.decode(tgt, self.encode(src), src)


def fresh(ex, vocab_size, d_model, n_layers):
    """The parameters of a model before any training."""
    return dict(ex.Transformer(vocab_size, d_model, 2, 3, n_layers).named_parameters())


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


def expected_from_block(weights, x, memory, mask=None):
    """What nn.TransformerDecoderLayer gives with these weights."""
    hidden = None
    if mask is not None:
        hidden = ~mask.expand(len(x), N_HEADS, x.shape[1], memory.shape[1]).flatten(0, 1)
    layer = nn.TransformerDecoderLayer(
        D_MODEL, N_HEADS, D_FF, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        for name, values in block_under_our_names(dict(layer.named_parameters()), "", "").items():
            values.copy_(weights[name])
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return layer(x, memory, tgt_mask=future, memory_mask=hidden)


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
        while len(tgt) <= max_new and (len(tgt) == 1 or tgt[-1] != eos_id):
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


@pytest.mark.parametrize("masked", ["all seen", "padding", "by head and position"])
def test_decoder_block_is_that_of_torch(attempt, rng, masked):
    weights = make_weights(rng, DECODER_BLOCK)
    x = randn(rng, TGT_LEN, BATCH, D_MODEL).transpose(0, 1)
    memory, mask = randn(rng, BATCH, SRC_LEN, D_MODEL), None
    if masked == "padding":
        mask = (padded(make_ids(rng, BATCH, SRC_LEN)) != 0)[:, None, None]
    elif masked == "by head and position":
        mask = torch.rand(BATCH, N_HEADS, TGT_LEN, SRC_LEN, generator=rng) < 0.5
        mask[..., 2] = True

    out = attempt(run_block, weights, x, memory, mask)

    assert_close(out, expected_from_block(weights, x, memory, mask))


def test_decoder_block_gives_the_one_place_that_is_seen_all_the_weight(attempt, rng):
    weights = make_weights(rng, DECODER_BLOCK)
    for proj in "qk":
        weights[f"cross_attn.{proj}_proj.weight"] *= 1e25
    x, memory = randn(rng, BATCH, TGT_LEN, D_MODEL), randn(rng, BATCH, SRC_LEN, D_MODEL)
    place = torch.randint(SRC_LEN, (BATCH, N_HEADS, TGT_LEN, 1), generator=rng)
    mask = torch.arange(SRC_LEN) == place

    out = attempt(run_block, weights, x, memory, mask)

    assert_close(out, expected_from_block(weights, x, memory, mask))


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


def test_reads_sources_alone_and_decodes_against_any_memory_in_any_order(attempt, rng):
    weights, tgt_lens = make_weights(rng), (TGT_LEN, TGT_LEN, MAX_LEN, 1)
    sources = [make_ids(rng, BATCH, SRC_LEN), padded(make_ids(rng, SRC_LEN, BATCH).T)]
    sources += [padded(make_ids(rng, BATCH, MAX_LEN)), padded(make_ids(rng, BATCH, SRC_LEN))[:1]]
    targets = [make_ids(rng, n, len(src)).T for n, src in zip(tgt_lens, sources, strict=True)]
    others = [randn(rng, *src.shape, D_MODEL) for src in sources]
    others[0][:, 3] = 0.0  # not padding, for all that

    memories, out = attempt(encode_all_then_decode_all, weights, sources, targets, others)

    oracle = Oracle(weights)
    for i, src in enumerate(sources):
        seen = src != 0
        assert_close(memories[i][seen], oracle.encode(src)[seen], **TOLERANCE)
        assert_close(out[i], oracle.decode(targets[i], others[i], src), **TOLERANCE)


def test_computes_in_the_dtype_of_its_weights(attempt, rng):
    # The waves at position 0 are 0 and 1: exact, whatever precision they have elsewhere.
    weights, (src, tgt) = make_weights(rng), make_ids(rng, 2, BATCH, 1)

    out = attempt(logits, weights, src, tgt)

    assert_close(out, Oracle(weights)(src, tgt))


def test_gives_logits_for_the_weights_that_it_has_now_and_in_their_dtype(attempt, rng):
    weights = make_weights(rng)
    pairs = [make_ids(rng, 2, BATCH, n) for n in (TGT_LEN, SRC_LEN)]

    first, second, dtypes = attempt(learn_between_two_calls, weights, pairs)

    oracle = Oracle(weights)
    scores = oracle(*pairs[0])
    take_a_step(scores, pairs[0][1], [*oracle.model.parameters(), oracle.table])
    # After a step gradients count as well, which are off by as much as theirs may be.
    assert_close((first, second), (scores, oracle(*pairs[1])), atol=2e-4, rtol=1e-4)
    assert_close(dtypes, ["torch.bfloat16", "torch.float32"])


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


# --- chance --------------------------------------------------------------------------------------


def check_counts(what, counts, n, probability):
    """By Bernstein, a count is off by more than this with probability 1e-9 at most."""
    x = math.log(2 / 1e-9)
    bound = x / 3 + math.sqrt(x**2 / 9 + 2 * x * n * probability * (1 - probability))
    off = (torch.as_tensor(counts) - n * probability).abs().max().item()
    assert off <= bound, f"{what}: {counts} of {n}, expected some {n * probability:.0f}"


def test_has_no_other_parameters(attempt):
    own = attempt(fresh, VOCAB_SIZE, D_MODEL, 1)

    assert_close(sorted(own), sorted(model_shapes(1)))


def test_starts_with_a_normal_table_as_wide_as_its_scale_undoes(attempt):
    table = attempt(fresh, 900, 64, 1)["embed.weight"].double() * 8

    # Six standard errors, of the deviation and of the mean, from 900 · 64 draws.
    n = table.numel()
    assert_close(table.std().item(), 1.0, rtol=0, atol=6 / math.sqrt(2 * n))
    assert_close(table.mean().item(), 0.0, rtol=0, atol=6 / math.sqrt(n))
    for far in (1, 3):
        share = math.erfc(far / math.sqrt(2))
        check_counts(f"further than {far} deviations", int((table.abs() > far).sum()), n, share)
    assert table.any(dim=1).all(), "no row may start with zeros"
    assert len(table.unique(dim=0)) == 900, "no two rows may start alike"


def test_starts_all_attentions_as_nn_linear_starts_and_no_two_alike(attempt):
    own = attempt(fresh, 300, 64, 3)

    widest = 64**-0.5  # all that nn.Linear draws is uniform, no further from 0 than this
    drawn = {name: value for name, value in own.items() if "_proj." in name}
    numbers = torch.cat([value.double().flatten() for value in drawn.values()]) / widest
    assert numbers.abs().max() <= 1 + 1e-6, f"{numbers.abs().max():.3g} times as wide as Linear"
    near = [int(((numbers > k / 4) & (numbers <= (k + 1) / 4)).sum()) for k in range(-4, 4)]
    check_counts("by eighths of the range", torch.tensor(near), len(numbers), 1 / 8)
    starts = [value[:5] if value.ndim == 1 else value[0, :5] for value in drawn.values()]
    assert len(torch.stack(starts).unique(dim=0)) == len(drawn), "no two may start alike"


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


BRANCHES = ["self_attn", "cross_attn", "ff"]


def constant_branches(d_model, which):
    """Of a block: weights with which these branches give 1 for all features but the first.

    The memory must be all ones.
    """
    zeros, eye = torch.zeros(d_model, dtype=torch.float64), torch.eye(d_model).double()
    ones = zeros.index_fill(0, torch.arange(1, d_model), 1.0)
    give = {branch: ones if branch in which else zeros for branch in BRANCHES}
    return {
        "self_attn.v_proj.weight": 0 * eye, "self_attn.v_proj.bias": give["self_attn"],
        "self_attn.o_proj.weight": eye, "self_attn.o_proj.bias": zeros,
        "cross_attn.v_proj.weight": give["cross_attn"].diag(), "cross_attn.v_proj.bias": zeros,
        "cross_attn.o_proj.weight": eye, "cross_attn.o_proj.bias": zeros,
        "ff.w_2.weight": zeros[:, None].expand(-1, D_FF), "ff.w_2.bias": give["ff"],
    }  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES)
def test_decoder_block_drops_each_number_of_a_branch_by_itself(attempt, branch):
    p, d_model, shape = 0.25, 48, (6, 10)
    weights, memory = constant_branches(d_model, [branch]), torch.ones(6, SRC_LEN, d_model).double()
    x = torch.zeros(*shape, d_model, dtype=torch.float64)
    x[..., 0] = 2.0

    out = attempt(branch_with_dropout, weights, x, memory, p)

    # Norms keep proportions. So what was added to a feature is read in units of the distance
    # between feature 0, which no branch adds to, and one that was dropped.
    for _ in range(BRANCHES.index(branch)):
        x = F.layer_norm(x, (d_model,))
    low = out.amin(-1, keepdim=True)
    added = (out - low) / (out[..., :1] - low) * (x[..., :1] - x[..., 1:2])
    kept = added[..., 1:] > 0.5
    assert_close(added[..., 1:], kept / (1 - torch.tensor(p).double()))
    for axis, what in enumerate(("calls", "rows", "positions", "numbers")):
        size = kept.shape[axis] // 2
        one, other = kept.narrow(axis, 0, size), kept.narrow(axis, size, size)
        check_counts(f"kept in both {what}", int((one & other).sum()), one.numel(), (1 - p) ** 2)


def test_decoder_block_drops_from_each_branch_anew(attempt):
    weights, memory = constant_branches(48, BRANCHES), torch.ones(6, SRC_LEN, 48).double()
    x = torch.zeros(6, 10, 48, dtype=torch.float64)

    out = attempt(branch_with_dropout, weights, x, memory, 0.5)

    # Three branches, dropped or not: 8 numbers. Where two are dropped together, there are 4.
    # By chance 47 draws show as few in one row of the 120 with probability 1e-10.
    n_numbers = [len(row.round(decimals=9).unique()) for row in out[..., 1:].flatten(0, 2)]
    assert min(n_numbers) > 4, f"{min(n_numbers)} different sums in a row of 47, expected 8"


def test_drops_each_number_of_an_embedding_by_itself(attempt, rng):
    p, weights = 0.25, make_weights(rng)
    for name in weights:
        if "o_proj" in name or "ff.w_2" in name or name.endswith("bias"):
            weights[name] *= 0.0
        elif "norm" in name:
            weights[name][:] = 1.0
    # All sums of embedding and wave are far above 0, as no number that is dropped can be.
    weights["embed.weight"] = 10 + weights["embed.weight"]
    src = make_ids(rng, 400, MAX_LEN)

    memory = attempt(encode, weights, src, p)

    kept = memory > memory.amin(-1, keepdim=True) + 0.1
    for axis, what in enumerate(("rows", "positions", "numbers")):
        size = kept.shape[axis] // 2
        one, other = kept.narrow(axis, 0, size), kept.narrow(axis, size, size)
        check_counts(f"kept in both {what}", int((one & other).sum()), one.numel(), (1 - p) ** 2)


def test_drops_nothing_in_eval_mode(attempt, rng):
    weights, tgt = make_weights(rng), make_ids(rng, BATCH, TGT_LEN)
    src = padded(make_ids(rng, BATCH, SRC_LEN))

    out = attempt(logits_with_dropout, weights, src, tgt, 0.5, False)

    assert_close(out, Oracle(weights)(src, tgt), **TOLERANCE)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("max_new", [1, 4, 99])
def test_greedy_writes_the_likeliest_tokens_up_to_the_end(attempt, rng, max_new, train):
    table, bos_id, eos_id = randn(rng, 97, 17), 1, 2
    table[:, 0] = -100  # padding is never likeliest
    table[::4, eos_id] = 100  # a target goes on with a chance of 3/4
    src = make_ids(rng, 7, SRC_LEN)

    out, n_reads, recorded, left = attempt(write, table, src, bos_id, eos_id, max_new, train)

    assert_close(out, written_by_hand(Speller(table), src, bos_id, eos_id, max_new))
    assert n_reads == 1, f"the source is read {n_reads} times, once is enough"
    assert not recorded, "gradients are recorded, and nobody asks for them"
    assert left == (train, True), "the model is left in another mode, or no longer learns"


@pytest.mark.parametrize(("bos_id", "eos_id"), [(1, 2), (2, 2), (16, 3)])
@pytest.mark.parametrize("n_rows", [1, 5])
def test_greedy_writes_0_where_it_is_likeliest_and_goes_on(attempt, rng, bos_id, eos_id, n_rows):
    table = randn(rng, 97, 17)
    table[::2, 0] = 100
    table[1::4, eos_id] = 100
    table[3::4, 5], table[3::4, 4] = 100, 100 * (1 - 1e-9)  # nearly a tie
    src = make_ids(rng, n_rows, SRC_LEN)

    out, *_ = attempt(write, table, src, bos_id, eos_id, 9)

    assert_close(out, written_by_hand(Speller(table), src, bos_id, eos_id, 9))


@pytest.mark.parametrize(("src_len", "tgt_len"), [(10, TGT_LEN), (SRC_LEN, 10)])
def test_rejects_more_tokens_than_it_has_positions(attempt, rng, src_len, tgt_len):
    weights, src = make_weights(rng), make_ids(rng, BATCH, src_len)

    with pytest.raises(ValueError, match=r"(?s)(?=.*\b10\b).*\b9\b"):
        attempt(logits, weights, src, make_ids(rng, BATCH, tgt_len))


@pytest.mark.train
def test_learns_to_reverse_strings_of_digits(attempt):
    share = attempt(learn_to_reverse, 500, 32, 6)

    assert share > 0.99, f"reverses {share:.1%} of 1,000 strings"
