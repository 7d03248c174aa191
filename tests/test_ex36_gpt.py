"""Specs for exercise 36: GPT."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

# No two sizes are equal, nor are any two that 3·, 4· and / n_heads make of them.
SIZES = {"vocab_size": 23, "block_size": 7, "n_layers": 2, "n_heads": 3, "d_model": 15}
GPT2 = SIZES | {"pre_norm": True}
GPT1 = SIZES | {"pre_norm": False}
DEEP = {"n_layers": 11, "n_heads": 1}  # names of layers don't sort by number, and one head is all


def shapes(config):
    """The names and shapes that the docstring of GPT promises."""
    d_model = config["d_model"]
    found = {
        "wte.weight": (config["vocab_size"], d_model),
        "wpe.weight": (config["block_size"], d_model),
    }
    linears = {
        "attn.c_attn": (3, 1),
        "attn.c_proj": (1, 1),
        "mlp.c_fc": (4, 1),
        "mlp.c_proj": (1, 4),
    }
    for i in range(config["n_layers"]):
        for name, (out, into) in linears.items():
            found[f"h.{i}.{name}.weight"] = (out * d_model, into * d_model)
            found[f"h.{i}.{name}.bias"] = (out * d_model,)
        for name in ("ln_1", "ln_2"):
            found[f"h.{i}.{name}.weight"] = found[f"h.{i}.{name}.bias"] = (d_model,)
    if config["pre_norm"]:
        found["ln_f.weight"] = found["ln_f.bias"] = (d_model,)
    return found


def make_weights(config, rng):
    """Random weights in float64, large enough that every part of the model matters."""
    weights = {}
    for name, shape in shapes(config).items():
        draw = torch.randn(shape, generator=rng, dtype=torch.float64)
        weights[name] = 0.3 * draw + (1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    return weights


def make_tokens(config, rng, batch, seq_len):
    return torch.randint(config["vocab_size"], (batch, seq_len), generator=rng)


# --- run on the code under test ------------------------------------------------------------------


def build(ex, config, weights):
    return load(ex.GPT(ex.GPTConfig(**config)).double(), weights)


def load(model, weights):
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        if name not in own:
            raise AttributeError(f"GPT must have a parameter {name}, it has {', '.join(own)}")
        if own[name].shape != weight.shape:
            raise ValueError(f"{name} must be {tuple(weight.shape)}, got {tuple(own[name].shape)}")
        own[name].data.copy_(weight)
    return model


def logits_of(ex, config, weights, tokens):
    return build(ex, config, weights)(tokens)


def part_of(ex, config, weights, part, x):
    """What h[0], or a part of it, makes of x."""
    return build(ex, config, weights).get_submodule(f"h.0{part}")(x)


def gradients_of(ex, config, weights, tokens, targets):
    model = build(ex, config, weights)
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    own = dict(model.named_parameters(remove_duplicate=False))
    return {name: own[name].grad for name in weights}


def logits_by_the_way(ex, config, weights, rows):
    """Logits of one model: for rows[0], after a step for it, in other dtypes, with new weights."""
    model = build(ex, config, weights)
    found = [model(rows[0])]
    take_a_step(model, found[0], rows[0])
    found.append(model(rows[1]))
    model.bfloat16()
    dtypes = [str(model(tokens).dtype) for tokens in rows]
    dtypes += [str(model.float()(tokens).dtype) for tokens in rows]
    load(model.double(), weights)
    return [*found, model(rows[1])], dtypes


def take_a_step(model, logits, targets):
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def parameter_sizes(ex, config):
    """The number of elements of each parameter, one that is used twice counted once."""
    own = ex.GPT(ex.GPTConfig(**config)).named_parameters(remove_duplicate=False)
    once = {id(parameter): parameter.numel() for _, parameter in own}
    return sorted(once.values())


def fresh_weights(ex, config):
    own = dict(ex.GPT(ex.GPTConfig(**config)).named_parameters(remove_duplicate=False))
    return {name: own[name] for name in shapes(config) if name in own}


def fresh_logits(ex, config, tokens):
    return ex.GPT(ex.GPTConfig(**config))(tokens)


def generate(ex, config, weights, prompts, max_new_tokens, temperature=None):
    """What one model writes after each of the prompts."""
    how = {} if temperature is None else {"temperature": temperature}
    model = build(ex, config, weights)
    return [model.generate(tokens, max_new_tokens, **how) for tokens in prompts]


def generate_from_one_state(ex, config, weights, tokens, max_new_tokens):
    """What a model writes, twice, torch's generator being put back in between."""
    model, state = build(ex, config, weights), torch.get_rng_state()
    first = model.generate(tokens, max_new_tokens)
    torch.set_rng_state(state)
    return first, model.generate(tokens, max_new_tokens)


def looks_of_generating(ex, config, weights, tokens, train):
    """What can be seen of a model before it generates, and after."""
    model = build(ex, config, weights).train(train)
    for own in model.parameters():
        own.grad = torch.ones_like(own)
    model.get_parameter("wpe.weight").requires_grad_(False)
    looks = [look(model)]
    for temperature in (0, 1.0):
        model.generate(tokens, 2, temperature)
        looks.append(look(model))
    return looks


def look(model):
    found = {name: module.training for name, module in model.named_modules()}
    for name, own in model.named_parameters():
        found[f"{name} itself"] = own.detach().clone(), own.requires_grad, own.grad
    return found


def saved_by_generating(ex, config, tokens):
    """How many tensors autograd saves while the model generates."""
    model = ex.GPT(ex.GPTConfig(**config))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, torch.Tensor):
        model.generate(tokens, 2)
    return len(saved)


# --- the oracle: transformers --------------------------------------------------------------------


def oracle(config, weights):
    """GPT2LMHeadModel or OpenAIGPTLMHeadModel with these weights."""
    if config["pre_norm"]:
        from transformers.models.gpt2.configuration_gpt2 import GPT2Config as Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel as Model
    else:
        from transformers.models.openai.configuration_openai import OpenAIGPTConfig as Config
        from transformers.models.openai.modeling_openai import OpenAIGPTLMHeadModel as Model
    theirs = Config(
        vocab_size=config["vocab_size"], n_positions=config["block_size"], n_embd=config["d_model"],
        n_layer=config["n_layers"], n_head=config["n_heads"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Model(theirs).double().eval()
    renamed = {their_name(name, config): stored(name, weight) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # it is tied: loaded as the embedding
    return model


def their_name(name, config):
    if not config["pre_norm"]:
        name = name.replace("wte", "tokens_embed").replace("wpe", "positions_embed")
    return f"transformer.{name}"


def stored(name, weight):
    """Their Conv1D stores a linear layer's weight transposed."""
    return weight.T if ".c_" in name and name.endswith("weight") else weight


# --- the model -----------------------------------------------------------------------------------

forms = pytest.mark.parametrize("config", [GPT2, GPT1], ids=["gpt_2", "gpt_1"])


@pytest.mark.parametrize(
    ("other", "seq_len"), [({}, 1), ({}, 7), (DEEP, 5)], ids=["one token", "seven tokens", "deep"]
)
def test_gives_the_logits_of_gpt_2(attempt, rng, other, seq_len):
    config = GPT2 | other
    weights, tokens = make_weights(config, rng), make_tokens(config, rng, 4, seq_len)

    logits = attempt(logits_of, config, weights, tokens)

    assert_close(logits, oracle(config, weights)(tokens).logits)


@pytest.mark.parametrize("other", [{}, DEEP], ids=["two layers", "deep"])
def test_gives_the_logits_of_gpt_1_in_the_post_norm_form(attempt, rng, other):
    config = GPT1 | other
    weights, tokens = make_weights(config, rng), make_tokens(config, rng, 4, 6)

    logits = attempt(logits_of, config, weights, tokens)

    assert_close(logits, oracle(config, weights)(tokens).logits)


@forms
@pytest.mark.parametrize("part", ["", ".attn", ".mlp"], ids=["block", "attention", "mlp"])
def test_has_parts_that_work_alone(attempt, rng, config, part):
    weights = make_weights(config, rng)
    x = torch.randn(2, 5, config["d_model"], generator=rng, dtype=torch.float64)

    out = attempt(part_of, config, weights, part, x)

    theirs = oracle(config, weights).transformer.get_submodule(f"h.0{part}")(x)
    assert_close(out, theirs[0] if isinstance(theirs, (tuple, list)) else theirs)


def test_hides_later_tokens_however_low_the_others_score(attempt, rng):
    weights, tokens = make_weights(GPT2, rng), make_tokens(GPT2, rng, 4, 7)
    for i in range(GPT2["n_layers"]):
        weights[f"h.{i}.attn.c_attn.weight"][: 2 * GPT2["d_model"]] *= 1e25  # q and k

    logits = attempt(logits_of, GPT2, weights, tokens)

    # Not asked of GPT-1: its oracle hides with −10⁴.
    assert_close(logits, oracle(GPT2, weights)(tokens).logits)


@forms
def test_gives_logits_for_the_weights_that_it_has_now_and_in_their_dtype(attempt, rng, config):
    weights = make_weights(config, rng)
    rows = [make_tokens(config, rng, 3, seq_len) for seq_len in (4, 6)]

    logits, dtypes = attempt(logits_by_the_way, config, weights, rows)

    model = oracle(config, weights)
    first, fresh = (model(tokens).logits for tokens in rows)
    take_a_step(model, first, rows[0])
    assert_close(logits, [first, model(rows[1]).logits, fresh])
    assert_close(dtypes, ["torch.bfloat16"] * 2 + ["torch.float32"] * 2)


@forms
def test_gives_every_parameter_its_gradient(attempt, rng, config):
    weights, tokens = make_weights(config, rng), make_tokens(config, rng, 3, 5)
    targets = make_tokens(config, rng, 3, 5)

    gradients = attempt(gradients_of, config, weights, tokens, targets)

    model = oracle(config, weights)
    F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(model.named_parameters())
    expected = {k: stored(k, theirs[their_name(k, config)].grad) for k in weights}
    assert_close(gradients, expected)


@forms
def test_holds_each_weight_once_and_no_other(attempt, config):
    sizes = attempt(parameter_sizes, config)

    assert_close(sizes, sorted(math.prod(shape) for shape in shapes(config).values()))


@settings(max_examples=6)
@given(
    pre_norm=st.booleans(),
    n_heads=st.sampled_from([1, 3, 5]),
    changed=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_lets_no_logit_depend_on_a_later_token(attempt, pre_norm, n_heads, changed, seed):
    rng = torch.Generator().manual_seed(seed)
    config = SIZES | {"pre_norm": pre_norm, "n_heads": n_heads}
    weights, tokens = make_weights(config, rng), make_tokens(config, rng, 1, 7)
    other = tokens.clone()
    other[:, changed] = (tokens[:, changed] + 1) % config["vocab_size"]

    logits = attempt(logits_of, config, weights, torch.cat([tokens, other]))

    assert_close(logits[0, :changed], logits[1, :changed])
    differs = (logits[0, changed:] != logits[1, changed:]).any(dim=-1)
    assert differs.all(), f"only {int(differs.sum())} of the {7 - changed} rows that see it changed"


def test_rejects_more_tokens_than_block_size(attempt, rng):
    tokens = make_tokens(GPT2, rng, 2, 8)

    with pytest.raises(ValueError, match=r"7.*8|8.*7"):
        attempt(logits_of, GPT2, {}, tokens)


# --- the start -----------------------------------------------------------------------------------

# The chance that a right version fails one check of this section, at most. A run makes 86 of
# these checks, so that it fails a right version with probability 1e-7 at most.
DELTA = 1e-9
WIDE = {"vocab_size": 131, "block_size": 61, "n_layers": 3, "n_heads": 2, "d_model": 32}
DRAWS = 3


def check_normal(name, values, std):
    """Each bound holds with probability 1 − DELTA, or more, for independent normal values.

    Variance: n·s²/σ² is χ² with n degrees of freedom, and |χ² − n| ≤ 2√(n·x) + 2x with
    x = ln(2/DELTA) (Laurent and Massart 2000, lemma 1). Mean: Gaussian tail. The share
    within one σ, which tells a normal from a uniform distribution: Hoeffding.
    """
    n, x = values.numel(), math.log(2 / DELTA)
    mean, variance = float(values.mean()), float(values.square().mean())
    share = float((values.abs() < std).double().mean())
    assert abs(variance / std**2 - 1) <= 2 * math.sqrt(x / n) + 2 * x / n, (
        f"{name} must have a standard deviation of {std:.4g}, got {math.sqrt(variance):.4g}"
    )
    assert abs(mean) <= std * math.sqrt(2 * x / n), f"{name} must have mean 0, got {mean:.4g}"
    assert abs(share - math.erf(math.sqrt(0.5))) <= math.sqrt(x / (2 * n)), (
        f"{name} must be normal: 68 % within one standard deviation, got {share:.0%}"
    )


@pytest.mark.parametrize("pre_norm", [True, False], ids=["gpt_2", "gpt_1"])
def test_draws_its_weights_with_the_stated_spread(attempt, pre_norm):
    config = WIDE | {"pre_norm": pre_norm}

    draws = [attempt(fresh_weights, config) for _ in range(DRAWS)]

    layers = range(config["n_layers"])
    residual = 0.02 / math.sqrt(2 * config["n_layers"]) if pre_norm else 0.02
    groups = {"wte": 0.02, "wpe": 0.02}
    groups |= {f"h.{i}.{part}": 0.02 for i in layers for part in ("attn.c_attn", "mlp.c_fc")}
    groups |= {f"h.{i}.{part}.c_proj": residual for i in layers for part in ("attn", "mlp")}
    scaled = []
    for name, std in groups.items():
        values = torch.cat([draw[f"{name}.weight"].double().flatten() for draw in draws])
        check_normal(f"{name}.weight", values, std)
        scaled.append(values / std)
    check_counts("more than three standard deviations from 0", *far_out(torch.cat(scaled)), DELTA)
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            assert_close(draws[0][name], torch.full(shape, value))


def far_out(normal):
    """How many lie beyond three, of how many, and the share of them that should."""
    return (normal.abs() > 3).sum().double(), len(normal), torch.tensor(math.erfc(3 / math.sqrt(2)))


def check_counts(what, counts, n, probabilities, delta=1e-9):
    """By Bernstein, a count of mean n·p is off by more than this with probability delta at most."""
    x = math.log(2 / delta)
    bound = x / 3 + (x**2 / 9 + 2 * x * n * probabilities * (1 - probabilities)).sqrt()
    off = (counts - n * probabilities).abs()
    assert (off <= bound).all(), (
        f"{what}: counts {counts.tolist()}, expected {(n * probabilities).tolist()}"
    )


def test_draws_each_row_of_each_matrix_anew(attempt):
    config = WIDE | {"pre_norm": True}

    draws = [attempt(fresh_weights, config) for _ in range(DRAWS)]

    # Five numbers alike, where float32 has millions: that is no chance.
    starts = {
        name: torch.stack([draw[name][:, :5] for draw in draws]).flatten(0, 1)
        for name, shape in shapes(config).items()
        if len(shape) == 2
    }
    alike = {name: len(rows) - len(rows.unique(dim=0)) for name, rows in starts.items()}
    assert_close(alike, dict.fromkeys(starts, 0))
    rows = torch.cat(list(starts.values()))
    assert len(rows.unique(dim=0)) == len(rows), "two matrices must not start alike"


@pytest.mark.parametrize("pre_norm", [True, False], ids=["gpt_2", "gpt_1"])
def test_starts_with_a_loss_near_ln_vocab_size(attempt, rng, pre_norm):
    config = WIDE | {"vocab_size": 997, "pre_norm": pre_norm}
    tokens, targets = (make_tokens(config, rng, 5, 60) for _ in range(2))

    logits = attempt(fresh_logits, config, tokens)

    loss = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    # The last norm gives x a length of √d_model. So a logit, x·wte[token], has a spread of
    # σ = 0.02·√d_model about 0, and the mean of exp(logit) is exp(σ²/2): the first term. The
    # token just read scores higher, by at most √d_model·|wte[token]|, about 0.02·d_model (we
    # allow twice that): the second. The third is six deviations of the means of the targets'
    # logits and of all logits. Together that is 0.055, less than 1 % of ln vocab_size.
    sigma, n = 0.02 * math.sqrt(config["d_model"]), targets.numel()
    bound = sigma**2 / 2 + math.exp(2 * 0.02 * config["d_model"]) / config["vocab_size"]
    bound += 6 * sigma * math.sqrt(1 / n + 1 / config["vocab_size"])
    start = math.log(config["vocab_size"])
    assert abs(loss - start) <= bound, (
        f"a fresh model's loss must be within {bound:.3f} of ln vocab_size = {start:.3f}, "
        f"got {loss:.3f}"
    )


# --- generate ------------------------------------------------------------------------------------


@forms
def test_writes_what_the_last_block_size_tokens_make_likeliest(attempt, rng, config):
    weights = make_weights(config, rng)
    prompts = [make_tokens(config, rng, 8, n_given) for n_given in (3, 9, 1)]

    written = attempt(generate, config, weights, prompts, 6, 0)

    model, expected = oracle(config, weights), prompts
    for _ in range(6):
        seen = [tokens[:, -config["block_size"] :] for tokens in expected]
        best = [model(tokens).logits[:, -1].argmax(dim=-1, keepdim=True) for tokens in seen]
        expected = [torch.cat(pair, dim=1) for pair in zip(expected, best, strict=True)]
    assert_close(written, expected)


def with_favourite(weights, favourite, rival, inch):
    """Makes the favourite likeliest after any token, by an inch before the rival."""
    ahead = 20 * weights["ln_f.bias"].sign()
    weights["ln_f.weight"] *= 0.1
    weights["wte.weight"][favourite], weights["wte.weight"][rival] = ahead, (1 - inch) * ahead
    return weights


@pytest.mark.parametrize(("favourite", "rival"), [(0, 22), (22, 0)])
def test_takes_the_highest_logit_at_temperature_0_be_it_by_an_inch(attempt, rng, favourite, rival):
    weights = with_favourite(make_weights(GPT2, rng), favourite, rival, 1e-9)
    tokens = make_tokens(GPT2, rng, 1, 2)

    (written,) = attempt(generate, GPT2, weights, [tokens], 4, 0)

    assert_close(written, torch.cat([tokens, torch.full((1, 4), favourite)], dim=1))


@pytest.mark.parametrize("temperature", [1e-4, 1e-12])
def test_draws_the_likeliest_token_at_a_tiny_temperature(attempt, rng, temperature):
    weights, tokens = make_weights(GPT2, rng), make_tokens(GPT2, rng, 20, 2)
    weights = with_favourite(weights, 5, 8, 1e-4)  # its logit is higher by some 0.007

    (written,) = attempt(generate, GPT2, weights, [tokens], 4, temperature)

    assert_close(written, torch.cat([tokens, torch.full((20, 4), 5)], dim=1))


def test_returns_the_tokens_as_given_when_none_are_to_be_added(attempt, rng):
    weights, tokens = make_weights(GPT2, rng), make_tokens(GPT2, rng, 2, 5)

    assert_close(attempt(generate, GPT2, weights, [tokens], 0, 1.0), [tokens])


@pytest.mark.parametrize("temperature", [0.5, None, 99.0], ids=["half", "unsaid", "ninety-nine"])
def test_draws_each_token_as_often_as_its_prompt_and_the_temperature_say(attempt, rng, temperature):
    n, weights, tokens = 2000, make_weights(GPT2, rng), make_tokens(GPT2, rng, 2, 2)
    in_turn = tokens.repeat(n, 1)

    (written,) = attempt(generate, GPT2, weights, [in_turn], 1, temperature)

    logits = oracle(GPT2, weights)(tokens).logits[:, -1].detach()
    probabilities = torch.softmax(logits / (temperature or 1.0), dim=-1)
    drawn = F.one_hot(written[:, -1].unflatten(0, (n, 2)), GPT2["vocab_size"])
    check_counts("tokens after each prompt", drawn.sum(dim=0).double(), n, probabilities)


def test_draws_every_token_by_itself_in_every_row_at_every_step_and_call(attempt, rng):
    n, probabilities = 1000, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    config = GPT2 | {"vocab_size": 3}
    weights, tokens = make_weights(config, rng), make_tokens(config, rng, 1, 2).expand(n, 2)
    # Whatever it reads, x is ln_f.bias, and scores the tokens by their likelihood at temperature 2.
    weights["ln_f.weight"] *= 0.0
    weights["ln_f.bias"][:] = torch.eye(config["d_model"])[0]
    weights["wte.weight"][:, 0] = 2 * probabilities.log()

    written = attempt(generate, config, weights, [tokens, tokens], 3, 2.0)

    drawn = F.one_hot(torch.cat([rows[:, 2:] for rows in written], dim=1), 3).double()
    both = probabilities[:, None] * probabilities
    steps = torch.einsum("nia,njb->ijab", drawn, drawn)  # steps 0, 1, 2 of each call
    i, j = torch.triu_indices(6, 6, offset=1)
    check_counts("pairs of tokens in one row", steps[i, j], n, both)
    rows = torch.einsum("nia,nib->iab", drawn[::2], drawn[1::2])
    check_counts("pairs of tokens in neighbouring rows", rows, n // 2, both)


def test_draws_from_the_global_generator_of_torch(attempt, rng):
    weights, tokens = make_weights(GPT2, rng), make_tokens(GPT2, rng, 20, 2)

    first, second = attempt(generate_from_one_state, GPT2, weights, tokens, 3)

    assert_close(second, first)


@pytest.mark.parametrize("train", [True, False])
def test_leaves_the_model_as_it_was_when_it_generates(attempt, rng, train):
    weights, tokens = make_weights(GPT2, rng), make_tokens(GPT2, rng, 2, 5)

    before, *after = attempt(looks_of_generating, GPT2, weights, tokens, train)

    assert_close(after, [before, before])


def test_keeps_nothing_for_backward_while_it_generates(attempt, rng):
    saved = attempt(saved_by_generating, GPT2, make_tokens(GPT2, rng, 2, 5))

    assert_close(saved, 0)
