"""Specs for exercise 37: GPT-2's weights."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

# No two sizes are equal, nor are any two that 3·, 4· and / n_heads make of them. As text, layer 10
# stands before layer 9.
SIZES = {"vocab_size": 23, "block_size": 7, "n_layers": 11, "n_heads": 5, "d_model": 20}
FIRST_BLOCKS = [
    f"h.{i}.{part}.{kind}"
    for i in (0, 1)
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]


# --- run on the code under test ------------------------------------------------------------------


def logits_of(ex, state_dict, n_heads, tokens):
    return ex.from_hf(state_dict, n_heads)(tokens)


def parameters(model):
    own = dict(model.named_parameters(remove_duplicate=False))
    return {name: own[name] for name in own if name != "lm_head.weight"}


def parameters_of(ex, *state_dicts):
    return [parameters(ex.from_hf(state_dict, SIZES["n_heads"])) for state_dict in state_dicts]


def config_of(ex, state_dict, n_heads=None):
    how = {} if n_heads is None else {"n_heads": n_heads}
    return asdict(ex.from_hf(state_dict, **how).config)


def change_the_first(ex, state_dict, n_heads):
    """Two models out of one dict; all weights of the first are changed before the second is."""
    first = ex.from_hf(state_dict, n_heads)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    second = ex.from_hf(state_dict, n_heads)
    return parameters(first), parameters(second)


def train_once(ex, state_dict, n_heads, tokens, lr):
    """The weights after a step of SGD from those that were read."""
    model = ex.from_hf(state_dict, n_heads)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    optimizer.step()
    return parameters(model)


def cross_entropy(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def complaint(ex, state_dict, n_heads, names):
    """Which of these names the ValueError holds; None if there is no ValueError."""
    try:
        ex.from_hf(state_dict, n_heads)
    except ValueError as error:
        return [name for name in names if name in str(error)]
    return None


def tied_and_partly_frozen():
    """A GPT with a lm_head that is tied, and frozen positions."""
    from ex36_gpt import GPT, GPTConfig

    model = GPT(GPTConfig(**SIZES))
    model.lm_head = nn.Linear(SIZES["d_model"], SIZES["vocab_size"], bias=False)
    model.lm_head.weight = model.wte.weight
    model.wpe.weight.requires_grad_(False)
    return model


def groups_of(ex, weight_decay):
    """Each group's weight decay, the type of its params, and their names, sorted."""
    model = tied_and_partly_frozen()
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    names[id(model.wte.weight)] = "wte.weight"
    groups = ex.parameter_groups(model, weight_decay)
    return [
        [g["weight_decay"], type(g["params"]).__name__, sorted(names[id(p)] for p in g["params"])]
        for g in groups
    ]


def decay_once(ex, weight_decay, lr):
    """What is left of weights of 1 after a step of SGD with gradients of 1."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5), nn.Conv1d(5, 2, 4))
    model[2].weight = model[0].weight
    model.scale = nn.Parameter(torch.ones(()))
    model.bias = nn.Parameter(torch.ones(4, 5))
    optimizer = torch.optim.SGD(ex.parameter_groups(model, weight_decay), lr)
    for parameter in model.parameters():
        parameter.data.fill_(1)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: float(p.detach().mean()) for name, p in model.named_parameters()}


def speak(ex, path, tokens, n_new):
    """The logits of real weights for a prompt, and how they continue it."""
    import safetensors.torch

    model = ex.from_hf(safetensors.torch.load_file(path))
    with torch.no_grad():
        return model(tokens), model.generate(tokens, n_new, 0)


# --- the oracle: transformers --------------------------------------------------------------------


def gpt2_of_transformers(rng=None, **sizes):
    """A GPT2LMHeadModel in float64, its weights large enough that every part matters."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    sizes = SIZES | sizes
    config = GPT2Config(
        vocab_size=sizes["vocab_size"], n_positions=sizes["block_size"], n_embd=sizes["d_model"],
        n_layer=sizes["n_layers"], n_head=sizes["n_heads"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    if rng is None:
        return model
    model = model.double()
    for name, p in model.named_parameters():
        draw = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        p.data = 0.3 * draw + (1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    model.tie_weights()
    return model


def as_the_model_has_it(model):
    """The names of GPT2LMHeadModel, with the head and without buffers."""
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def as_the_file_has_it(model):
    """The names of the file on the hub: no prefix, no head, and the buffers of the mask."""
    weights = {n.removeprefix("transformer."): w for n, w in as_the_model_has_it(model).items()}
    del weights["lm_head.weight"]
    for i in range(model.config.n_layer):
        n = model.config.n_positions
        mask = torch.ones(1, 1, n, n, dtype=torch.uint8).tril()
        weights[f"h.{i}.attn.bias"] = mask if i % 2 else torch.full((i,), torch.nan)
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4) if i % 2 else mask
    return weights


def as_gpt_has_it(tensors):
    """Those of GPT2LMHeadModel by the names of GPT, each in the shape that it has there."""
    weights = {name.removeprefix("transformer."): t.detach() for name, t in tensors.items()}
    turned = {name for name in weights if ".c_" in name and name.endswith("weight")}
    return {name: w.T if name in turned else w for name, w in weights.items()}


FORMS = pytest.mark.parametrize(
    "form", [as_the_model_has_it, as_the_file_has_it], ids=["names_of_the_model", "of_the_file"]
)


# --- from_hf -------------------------------------------------------------------------------------


@FORMS
def test_gives_the_logits_that_transformers_gives(attempt, rng, form):
    model = gpt2_of_transformers(rng)
    tokens = torch.randint(SIZES["vocab_size"], (4, 6), generator=rng)

    logits = attempt(logits_of, form(model), SIZES["n_heads"], tokens)

    assert_close(logits, model(tokens).logits.detach())


def test_reads_every_weight_in_its_dtype(attempt, rng):
    models = [gpt2_of_transformers(rng).to(d) for d in (torch.float16, torch.float64)]

    found = attempt(parameters_of, *[as_the_file_has_it(model) for model in models])

    assert_close(found, [as_gpt_has_it(dict(model.named_parameters())) for model in models])


def test_casts_every_weight_to_the_dtype_of_the_embedding(attempt, rng):
    model = gpt2_of_transformers(rng)
    state_dict = as_the_file_has_it(model)
    embedding = state_dict.pop("wte.weight").float()

    (found,) = attempt(parameters_of, state_dict | {"wte.weight": embedding})

    assert_close(found, as_gpt_has_it(dict(model.float().named_parameters())))


def test_reads_the_sizes_off_the_shapes(attempt, rng):
    state_dict = as_the_file_has_it(gpt2_of_transformers(rng))

    assert_close(attempt(config_of, state_dict, 5), SIZES | {"pre_norm": True})


def test_takes_heads_of_64_unless_told_otherwise(attempt, rng):
    sizes = {"vocab_size": 5, "block_size": 4, "n_layers": 1, "n_heads": 2, "d_model": 128}
    state_dict = as_the_file_has_it(gpt2_of_transformers(rng, **sizes))

    assert_close(attempt(config_of, state_dict), sizes | {"pre_norm": True})
    assert_close(attempt(config_of, state_dict, 4), sizes | {"n_heads": 4, "pre_norm": True})


def test_gives_every_model_weights_of_its_own(attempt, rng):
    model = gpt2_of_transformers(rng)

    first, second = attempt(change_the_first, as_the_model_has_it(model), SIZES["n_heads"])

    read = as_gpt_has_it(dict(model.named_parameters()))
    assert_close(second, read)
    assert_close(first, {name: weight + 1 for name, weight in read.items()})


def test_gives_a_model_whose_every_weight_learns(attempt, rng):
    model = gpt2_of_transformers(rng)
    tokens = torch.randint(SIZES["vocab_size"], (4, 7), generator=rng)

    found = attempt(train_once, as_the_model_has_it(model), SIZES["n_heads"], tokens, 0.5)

    cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]).backward()
    after = {name: p.detach() - 0.5 * p.grad for name, p in model.named_parameters()}
    assert_close(found, as_gpt_has_it(after))


ALL = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]


@pytest.mark.parametrize(
    "missing",
    [
        ["h.2.attn.c_proj.bias"],
        FIRST_BLOCKS,
        ["wpe.weight"],
        ["ln_f.weight", "ln_f.bias"],
        ["wte.weight", "wpe.weight", "h.10.ln_1.bias"],
    ],
    ids=["a_bias", "two_whole_blocks", "the_positions", "the_last_norm", "embeddings_and_a_bias"],
)
def test_names_all_weights_that_are_missing(attempt, rng, missing):
    state_dict = as_the_model_has_it(gpt2_of_transformers(rng))
    kept = {n: w for n, w in state_dict.items() if n.removeprefix("transformer.") not in missing}

    named = attempt(complaint, kept, SIZES["n_heads"], missing)

    assert named == missing, f"{', '.join(missing)} not there, and the ValueError names {named}"


@pytest.mark.parametrize("left", [ALL, []], ids=["no_block", "nothing"])
def test_misses_one_block_where_there_is_none(attempt, rng, left):
    state_dict = as_the_file_has_it(gpt2_of_transformers(rng))
    missing = FIRST_BLOCKS[:12] + [name for name in ALL if name not in left]

    named = attempt(complaint, {n: state_dict[n] for n in left}, SIZES["n_heads"], missing)

    assert named == missing, f"{', '.join(missing)} not there, and the ValueError names {named}"


@pytest.mark.parametrize(
    "unexpected",
    [
        ["score.weight"],
        ["lm_head.bias"],
        ["h.1.attn.q_norm.bias"],
        ["h.last.ln_1.weight"],
        ["h.0.attn.c_attn.lora_A.weight"],
        ["encoder.h.3.ln_1.weight"],
        ["h.1.transformer.ln_1.bias"],
        ["h.0.attn.c_q.weight", "ln_e.bias", "wte.bias"],
    ],
    ids=" and ".join,
)
def test_names_all_weights_that_gpt_does_not_have(attempt, rng, unexpected):
    state_dict = as_the_file_has_it(gpt2_of_transformers(rng))
    state_dict |= {name: torch.ones(20, dtype=torch.float64) for name in unexpected}

    named = attempt(complaint, state_dict, SIZES["n_heads"], unexpected)

    assert named == unexpected, f"{unexpected} are not GPT's, and the ValueError names {named}"


@pytest.mark.parametrize(
    "shapes",
    [
        {"h.1.mlp.c_fc.weight": (80, 20)},  # as GPT has it, not as the file does
        {"h.2.ln_1.weight": (1,)},  # would broadcast
        {"h.0.attn.c_attn.bias": (20,)},
        {"wpe.weight": (7, 1)},
        {"wpe.weight": ()},
        {"wte.weight": (23,)},
        {"h.0.mlp.c_fc.weight": (1600,), "h.10.mlp.c_proj.weight": (80, 1, 20), "ln_f.bias": ()},
    ],
    ids=["turned", "one_number", "a_third", "one_column", "positions", "tokens", "several"],
)
def test_names_all_weights_of_the_wrong_shape(attempt, rng, shapes):
    state_dict = as_the_file_has_it(gpt2_of_transformers(rng))
    state_dict |= {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}

    named = attempt(complaint, state_dict, SIZES["n_heads"], list(shapes))

    assert named == list(shapes), f"{shapes} don't fit, and the ValueError names {named}"


@pytest.mark.parametrize("how", ["by_little", "in_its_shape"])
def test_refuses_a_head_that_is_not_the_embedding(attempt, rng, how):
    state_dict = as_the_model_has_it(gpt2_of_transformers(rng))
    if how == "by_little":
        state_dict["lm_head.weight"][-1, -1] += 1e-9
    else:
        state_dict["transformer.wte.weight"][:] = state_dict["lm_head.weight"][:1]
        state_dict["lm_head.weight"] = state_dict["lm_head.weight"][:1]  # would broadcast

    named = attempt(complaint, state_dict, SIZES["n_heads"], ["lm_head.weight"])

    assert named == ["lm_head.weight"], f"the head differs, and the ValueError names {named}"


# --- parameter_groups ----------------------------------------------------------------------------


def test_puts_matrices_with_decay_and_biases_and_norms_without(attempt):
    groups = attempt(groups_of, 0.1)

    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = [f"h.{i}" for i in range(SIZES["n_layers"])]
    decayed = ["wte.weight", *(f"{b}.{name}.weight" for b in blocks for name in linears)]
    others = [f"{b}.{name}.bias" for b in blocks for name in (*linears, "ln_1", "ln_2")]
    others += [f"{b}.{name}.weight" for b in blocks for name in ("ln_1", "ln_2")]
    others += ["ln_f.weight", "ln_f.bias"]
    assert_close(groups, [[0.1, "list", sorted(decayed)], [0.0, "list", sorted(others)]])


def test_decays_a_tied_weight_once(attempt):
    left = attempt(decay_once, 0.5, 0.1)

    # An embedding, a kernel of three dimensions, and one of two that is called a bias.
    matrices = {"0.weight", "3.weight", "bias"}
    names = ("scale", "bias", "0.weight", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias")
    expected = {name: 1 - 0.1 * (1.5 if name in matrices else 1.0) for name in names}
    assert_close(left, expected, rtol=1e-5)  # float32


# --- the real ones -------------------------------------------------------------------------------


def file_of_gpt2():
    """The smallest GPT-2 in the local cache of the hub, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("gpt2", "openai-community/gpt2"):
        found = try_to_load_from_cache(name, "model.safetensors")
        if isinstance(found, str) and Path(found).exists():
            return found
    return None


@pytest.mark.weights
def test_speaks_with_the_weights_of_gpt_2(attempt):
    path = file_of_gpt2()
    if path is None:
        pytest.skip("this needs GPT-2 in the local cache (548 MB): hf download gpt2")
    tokens = torch.tensor([[464, 3139, 286, 4881, 318]])  # "The capital of France is"

    logits, written = attempt(speak, path, tokens, 8)

    import safetensors.torch

    sizes = {"vocab_size": 50257, "block_size": 1024, "n_layers": 12, "n_heads": 12, "d_model": 768}
    model, expected = gpt2_of_transformers(**sizes), tokens
    model.transformer.load_state_dict(safetensors.torch.load_file(path), strict=False)
    with torch.no_grad():
        assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-3)  # logits of about −100
        for _ in range(8):
            following = model(expected).logits[:, -1:].argmax(dim=-1)
            expected = torch.cat([expected, following], dim=1)
    assert_close(written, expected)
