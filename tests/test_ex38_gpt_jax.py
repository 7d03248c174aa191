"""Specs for exercise 38: GPT in JAX."""

import math
from functools import cache, partial

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kata.testing import assert_close

pytestmark = pytest.mark.jax

# No two sizes are equal, nor are any two that 3·, 4· and / n_heads make of them.
SIZES = {"vocab_size": 23, "block_size": 7, "n_layers": 2, "n_heads": 3, "d_model": 15}

# What makes a program fast takes most of the time to compile it, and here each runs once.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@cache
def quick():
    """The options above, if this JAX knows them all."""
    try:
        jax.jit(lambda x: x, compiler_options=QUICK).lower(0.0).compile()
    except Exception:
        return {}
    return QUICK


def quick_jit(function):
    return jax.jit(function, compiler_options=quick())


# A key is a key: this kind needs a tenth of the instructions of the default one.
new_key = partial(jax.random.key, impl="unsafe_rbg")

# Sums of up to 60 products in float32, through two blocks, to logits of a few units.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


# --- run on the code under test ------------------------------------------------------------------


def logits_of(ex, several_params, sizes, tokens):
    """The logits by several params, all of one compiled program."""
    config = ex.GPTConfig(**sizes)
    compiled = quick_jit(lambda params, tokens: ex.forward(params, config, tokens))
    return [compiled(params, tokens) for params in several_params]


def step(ex, params, sizes, tokens, rates):
    """Steps from the same place at several rates, all of one compiled program."""
    config = ex.GPTConfig(**sizes)

    def stepped(params, tokens, rate):
        return ex.train_step(params, config, tokens, rate)

    compiled = quick_jit(stepped)
    return [compiled(params, tokens, rate) for rate in rates]


def generate(ex, sizes, tokens, n_new, seed, cases):
    """Texts by several params and temperatures, all of one compiled program."""
    config = ex.GPTConfig(**sizes)

    def written(params, tokens, seed, temperature):
        return ex.generate(params, config, tokens, n_new, new_key(seed), temperature)

    compiled = quick_jit(written)
    return [compiled(params, tokens, seed, temperature) for params, temperature in cases]


def draw_params(ex, sizes, seeds):
    config = ex.GPTConfig(**sizes)
    drawn = quick_jit(lambda seed: ex.init_params(new_key(seed), config))
    return [drawn(seed) for seed in seeds]


def shape_of_text(ex, params, sizes, tokens, n_new):
    """The shape of what comes, if no error does. Nothing is compiled."""
    config = ex.GPTConfig(**sizes)

    def read_or_written(params, tokens):
        if n_new is None:
            return ex.forward(params, config, tokens)
        return ex.generate(params, config, tokens, n_new, new_key(0))

    return jax.eval_shape(read_or_written, params, tokens).shape


@jax.tree_util.register_pytree_node_class
class Watched(dict):
    """Parameters that count how often a function is traced with them."""

    traces = 0

    def tree_flatten(self):
        names = sorted(self)
        return [self[name] for name in names], names

    @classmethod
    def tree_unflatten(cls, names, values):
        cls.traces += 1
        return cls(zip(names, values, strict=True))


def traces_of_generating(ex, params, sizes, tokens, n_new, temperatures):
    """How often generate is traced by one call after the other, each with other values.

    Only shapes are computed: nothing is compiled.
    """
    config, found = ex.GPTConfig(**sizes), []
    for seed, temperature in enumerate(temperatures):
        given = Watched({name: params[name] for name in params})
        other = (tokens + seed) % sizes["vocab_size"]

        def shape(given=given, other=other, seed=seed, temperature=temperature):
            return ex.generate(given, config, other, n_new, new_key(seed), temperature)

        Watched.traces = 0
        jax.eval_shape(shape)
        found.append(Watched.traces)
    return found


def cost_of_generating(ex, params, sizes, tokens, n_new):
    """The program's matrix products: how many stand in it, how many are run, their flops."""
    config = ex.GPTConfig(**sizes)

    def written(params, tokens, seed, temperature):
        return ex.generate(params, config, tokens, n_new, new_key(seed), temperature)

    program = jax.make_jaxpr(written)(params, tokens, 0, 1.0)
    products = list(products_in(program.jaxpr))
    standing, run, flops = (sum(numbers) for numbers in zip(*products, strict=True))
    return {"products": standing, "run": run, "flops": flops}


def products_in(jaxpr, times=1, copies=1):
    """For each matrix product of a traced program: how often it stands there when loops are
    unrolled, how often it is run, and the flops of all runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            n = math.prod(equation.outvars[0].aval.shape)
            yield copies, times, 2 * times * n * math.prod(shape[axis] for axis in summed)
        scan = equation.params if equation.primitive.name == "scan" else {}
        inside = times * scan.get("length", 1), copies * scan.get("unroll", 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products_in(inner, *inside)


# --- weights, and the oracle: transformers -------------------------------------------------------


def make_params(np_rng, sizes=SIZES):
    """The tree of init_params, with numbers so large that every part of the model matters."""
    n, d = sizes["n_layers"], sizes["d_model"]

    def randn(*shape):
        return np_rng.normal(0, 0.3, shape).astype(np.float32)

    def linear(d_in, d_out):
        return {"weight": randn(n, d_in, d_out), "bias": randn(n, d_out)}

    def norm(*shape):
        return {"weight": 1 + randn(*shape), "bias": randn(*shape)}

    return {
        "wte": randn(sizes["vocab_size"], d),
        "wpe": randn(sizes["block_size"], d),
        "h": {
            "ln_1": norm(n, d),
            "attn": {"c_attn": linear(d, 3 * d), "c_proj": linear(d, d)},
            "ln_2": norm(n, d),
            "mlp": {"c_fc": linear(d, 4 * d), "c_proj": linear(4 * d, d)},
        },
        "ln_f": norm(d),
    }


def make_tokens(np_rng, batch, seq_len):
    return np_rng.integers(0, SIZES["vocab_size"], (batch, seq_len)).astype(np.int32)


def flat(params):
    """{"wte.weight": …, "h.0.attn.c_attn.weight": …}: the names of GPT-2's file."""
    found = {}
    for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
        first, *rest = (entry.key for entry in path)
        if first == "h":
            found |= {".".join(["h", str(i), *rest]): part for i, part in enumerate(array)}
        else:
            found[".".join([first, *rest] if rest else [first, "weight"])] = array
    return found


def state_dict_of(params):
    """GPT-2's file holds a weight as we do: (d_in, d_out)."""
    return {name: torch.tensor(array, dtype=torch.float64) for name, array in flat(params).items()}


def gpt2_of_transformers(params):
    """The same model in transformers, in float64."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=SIZES["vocab_size"], n_positions=SIZES["block_size"], n_embd=SIZES["d_model"],
        n_layer=SIZES["n_layers"], n_head=SIZES["n_heads"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    model.transformer.load_state_dict(state_dict_of(params))
    return model


def single(tensor):
    return tensor.detach().numpy().astype(np.float32)


def with_very_low_scores(params):
    """The same, but all scores lie below −10³⁰, lower than those of empty slots, and far apart."""
    params = jax.tree.map(np.copy, params)
    c_attn, d = params["h"]["attn"]["c_attn"], SIZES["d_model"]
    c_attn["weight"][:, :, : 2 * d] = 0.0
    c_attn["weight"][:, 0, d : 2 * d] = 1e15
    c_attn["bias"][:, :d], c_attn["bias"][:, d : 2 * d] = 1e15, -8e15
    return params


def with_last_norm_times(factor, params):
    """The same, but its logits, and most gradients, are so many times as large."""
    return params | {"ln_f": {name: factor * array for name, array in params["ln_f"].items()}}


# --- forward and train_step ----------------------------------------------------------------------


def test_gives_the_logits_of_transformers_and_of_exercise_36(attempt, np_rng):
    from ex37_gpt2_weights import from_hf

    params, tokens = make_params(np_rng), make_tokens(np_rng, 4, 7)
    tokens[0, 0], tokens[1, 2] = 5, 0
    for rows in (params["wte"][5], params["wpe"][0]):
        rows *= 0.01  # so that the eps of the first norm matters where a text begins with token 5

    low = with_very_low_scores(params)
    logits, low_logits = attempt(logits_of, [params, low], SIZES, tokens)

    theirs = gpt2_of_transformers(params)(torch.tensor(tokens)).logits
    assert_close(logits, single(theirs), **FLOAT32)
    theirs = gpt2_of_transformers(low)(torch.tensor(tokens)).logits
    assert_close(low_logits, single(theirs), **FLOAT32)
    ours = from_hf(state_dict_of(params), SIZES["n_heads"])(torch.tensor(tokens))
    assert_close(logits, single(ours), **FLOAT32)


def test_steps_against_the_gradient_of_the_next_token_loss(attempt, np_rng):
    # Some gradients are beyond 1, and nobody has asked to clip them.
    params, tokens = with_last_norm_times(5, make_params(np_rng)), make_tokens(np_rng, 4, 6)
    tokens[0, 3] = tokens[2, 5] = 0  # a token like any other
    rates = [0.3, 0.0]

    steps = attempt(step, params, SIZES, tokens, rates)

    model, text = gpt2_of_transformers(params), torch.tensor(tokens).long()
    loss = F.cross_entropy(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    theirs = dict(model.transformer.named_parameters())
    for (new, old_loss), rate in zip(steps, rates, strict=True):
        assert_close(old_loss, single(loss), **FLOAT32)
        expected = {name: single(p - rate * p.grad) for name, p in theirs.items()}
        assert_close(flat(new), expected, **FLOAT32)


# --- generate ------------------------------------------------------------------------------------


def test_writes_token_by_token_as_if_it_read_all_each_time(attempt, np_rng):
    params, tokens = make_params(np_rng), make_tokens(np_rng, 5, 3)
    seed, low = int(np_rng.integers(1 << 30)), with_very_low_scores(params)
    # Logits about 0.0001 apart are as good as equal at most temperatures, but not at a low one.
    near = with_last_norm_times(np.float32(1e-4), params)
    cases = [(params, t) for t in (0.0, 1.0, 2.5)] + [(low, 0.0), (near, 0.0), (near, 2e-4)]

    texts = attempt(generate, SIZES, tokens, 4, seed, cases)

    @quick_jit
    def draw(i, logits):
        return jax.random.categorical(jax.random.split(new_key(seed), 4)[i], logits)

    models = {id(p): gpt2_of_transformers(p) for p in (params, low, near)}
    for text, (given, temperature) in zip(texts, cases, strict=True):
        model, expected = models[id(given)], tokens
        for i in range(4):
            logits = single(model(torch.tensor(expected)).logits[:, -1])
            if temperature:
                new = np.asarray(draw(i, logits / temperature))
            else:
                new = logits.argmax(axis=-1)
            expected = np.concatenate([expected, new[:, None].astype(np.int32)], axis=1)
        assert_close(text, expected)


def test_traces_nothing_when_only_the_numbers_change(attempt, np_rng):
    params, tokens = make_params(np_rng), make_tokens(np_rng, 4, 3)

    first, *later = attempt(traces_of_generating, params, SIZES, tokens, 3, [1.0, 0.5, 0.0])

    assert later == [0, 0], f"traced {first} times by the first call, and {later} by the next two"


def test_compiles_one_program_for_all_tokens(attempt, np_rng):
    params, tokens = make_params(np_rng), make_tokens(np_rng, 4, 2)

    short = attempt(cost_of_generating, params, SIZES, tokens, 2)
    long = attempt(cost_of_generating, params, SIZES, tokens, 5)

    assert long["products"] == short["products"], (
        f"{short['products']} matrix products stand in the program for 2 tokens, "
        f"{long['products']} in that for 5"
    )


def test_reads_each_token_once(attempt, np_rng):
    batch, seq_len, n_new = 4, 2, 5
    params, tokens = make_params(np_rng), make_tokens(np_rng, batch, seq_len)

    cost = attempt(cost_of_generating, params, SIZES, tokens, n_new)

    d, n_layers = SIZES["d_model"], SIZES["n_layers"]
    # A token's 12·d_model² weights of each block, its scores with at most block_size keys and
    # their values, and its row of the head.
    one = n_layers * (12 * d**2 + 2 * d * SIZES["block_size"]) + d * SIZES["vocab_size"]
    most = 2 * batch * (seq_len + n_new) * one
    assert cost["flops"] <= most, (
        f"generate took {cost['flops']:,} flops, where reading each of "
        f"{seq_len + n_new} tokens once takes {most:,}"
    )


def test_reads_the_prompt_at_once(attempt, np_rng):
    params = make_params(np_rng)

    short = attempt(cost_of_generating, params, SIZES, make_tokens(np_rng, 4, 2), 2)
    long = attempt(cost_of_generating, params, SIZES, make_tokens(np_rng, 4, 5), 2)

    assert long["run"] == short["run"], (
        f"a prompt of 2 tokens takes {short['run']} matrix products, one of 5 takes {long['run']}"
    )


@pytest.mark.parametrize(("seq_len", "n_new"), [(1, 1), (4, 1), (1, 6)])
def test_writes_as_many_tokens_as_it_is_asked_for(attempt, np_rng, seq_len, n_new):
    params, tokens = make_params(np_rng), make_tokens(np_rng, 2, seq_len)

    shape = attempt(shape_of_text, params, SIZES, tokens, n_new)

    assert shape == (2, seq_len + n_new), f"{seq_len} and {n_new} tokens are {shape}"


@pytest.mark.parametrize(
    ("seq_len", "n_new", "total"), [(8, None, 8), (3, 5, 8)], ids=["forward", "generate"]
)
def test_refuses_more_tokens_than_block_size(attempt, np_rng, seq_len, n_new, total):
    params, tokens = make_params(np_rng), make_tokens(np_rng, 2, seq_len)

    with pytest.raises(ValueError, match=f"7.*{total}|{total}.*7"):
        attempt(shape_of_text, params, SIZES, tokens, n_new)


# --- the start -----------------------------------------------------------------------------------

# The chance that a right version fails one check of this section, at most. There are 42 of them.
DELTA = 1e-9
WIDE = {"vocab_size": 131, "block_size": 61, "n_layers": 3, "n_heads": 2, "d_model": 32}


def check_normal(name, values, std):
    """Each bound holds with probability 1 − DELTA, or more, for independent normal values.

    Variance: n·s²/σ² is χ² with n degrees of freedom, and |χ² − n| ≤ 2√(n·x) + 2x with
    x = ln(2/DELTA) (Laurent and Massart 2000, lemma 1). Mean: Gaussian tail. The share
    within one σ, which tells a normal from a uniform distribution: Hoeffding.
    """
    n, x = values.size, math.log(2 / DELTA)
    mean, variance = values.mean(), np.square(values).mean()
    share = (np.abs(values) < std).mean()
    assert abs(variance / std**2 - 1) <= 2 * math.sqrt(x / n) + 2 * x / n, (
        f"{name} must have a standard deviation of {std:.4g}, got {math.sqrt(variance):.4g}"
    )
    assert abs(mean) <= std * math.sqrt(2 * x / n), f"{name} must have mean 0, got {mean:.4g}"
    assert abs(share - math.erf(math.sqrt(0.5))) <= math.sqrt(x / (2 * n)), (
        f"{name} must be normal: 68 % within one standard deviation, got {share:.0%}"
    )


def test_draws_every_weight_by_itself_with_the_stated_spread(attempt, np_rng):
    seed = int(np_rng.integers(1 << 30))

    drawn = attempt(draw_params, WIDE, [seed, seed + 1])

    draws = [flat(params) for params in drawn]
    shapes = {name: array.shape for name, array in flat(make_params(np_rng, WIDE)).items()}
    assert_close({name: array.shape for name, array in draws[0].items()}, shapes)
    small, starts = 0.02 / math.sqrt(2 * WIDE["n_layers"]), {}
    for name in shapes:
        values = np.stack([draw[name] for draw in draws]).astype(np.float64)
        if name.endswith("bias") or "ln_" in name:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert_close(values, np.full(values.shape, expected))
        else:
            check_normal(name, values, small if name.endswith("c_proj.weight") else 0.02)
            starts |= {f"{name} of draw {i}": v.flatten()[:1024] for i, v in enumerate(values)}
    # Correlations of 1024 independent numbers spread by 1/32 about 0: ten spreads are 0.31.
    names, alike = list(starts), np.corrcoef(np.stack(list(starts.values())))
    np.fill_diagonal(alike, 0)
    one, other = np.unravel_index(np.abs(alike).argmax(), alike.shape)
    assert abs(alike[one, other]) < 0.31, f"{names[one]} and {names[other]} are alike"
