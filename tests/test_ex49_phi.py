"""Specs for exercise 49: Phi."""

import math

import pytest
import torch

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

# Small, but of the published proportions: Phi-1 turns half of each head's features, Phi-2 0.4.
SIZES = {
    "vocab_size": 23,
    "d_model": 60,
    "d_ff": 28,
    "n_layers": 2,
    "n_heads": 3,
    "rope_theta": 50.0,
    "norm_eps": 0.02,
}
FORMS = {"Phi-1": SIZES | {"rotary_dim": 10}, "Phi-2": SIZES | {"rotary_dim": 8}}
OTHERS = {
    "nothing turned": SIZES | {"rotary_dim": 0},
    "all turned": SIZES | {"rotary_dim": 20},
    "one head": SIZES | {"rotary_dim": 8, "n_heads": 1},
    "eleven layers": SIZES | {"rotary_dim": 8, "n_layers": 11},
}
TEXTS = (2, 7), (2, 7), (1, 1)  # twice the same shape, so that nothing of the first may be kept


# --- what is done with the code under test -------------------------------------------------------


def build(ex, sizes, weights):
    """A model with these weights, in their dtype."""
    model = ex.Phi(ex.PhiConfig(**sizes)).to(weights["token_embd.weight"].dtype)
    model.load_state_dict(weights, strict=False)
    return model


def logits(ex, sizes, weights, *texts):
    model = build(ex, sizes, weights)
    return [model(ids) for ids in texts]


def logits_again(ex, sizes, weights, *texts):
    """One model, in bfloat16 and in float64 by turns. Its weights are whole numbers of 1/16."""
    model, outs = build(ex, sizes, weights), []
    for ids in texts:
        model.bfloat16()(ids)
        outs.append(model.double()(ids))
    return outs


def gradients(ex, sizes, weights, ids, upstream):
    model = build(ex, sizes, weights)
    model(ids).backward(upstream)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def shapes(ex, sizes):
    model = ex.Phi(ex.PhiConfig(**sizes))
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def rotate(ex, x, positions, frequencies):
    return ex.apply_partial_rope(x, positions, frequencies)


# --- weights, and the oracle: Phi in transformers ------------------------------------------------

THEIR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.final_layernorm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def their_name(name):
    *block, name, kind = name.split(".")
    return ".".join([*(["model.layers", block[1]] if block else []), THEIR_NAMES[name], kind])


def shapes_of(sizes):
    """Every parameter, by the names of GGUF."""
    vocab_size, d_model, d_ff = sizes["vocab_size"], sizes["d_model"], sizes["d_ff"]
    parts = {"token_embd": [vocab_size, d_model], "output_norm": [d_model]}
    parts["output"] = [vocab_size, d_model]
    for n in range(sizes["n_layers"]):
        layer = {"attn_norm": [d_model], "ffn_up": [d_ff, d_model], "ffn_down": [d_model, d_ff]}
        layer |= {f"attn_{name}": [d_model, d_model] for name in ("q", "k", "v", "output")}
        parts |= {f"blk.{n}.{name}": shape for name, shape in layer.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in parts.items() if name != "token_embd"}
    return {f"{name}.weight": shape for name, shape in parts.items()} | biases


def random_weights(rng, sizes):
    """Large enough that everything matters."""
    weights = {}
    for name, shape in shapes_of(sizes).items():
        weights[name] = torch.randn(shape, generator=rng, dtype=torch.float64)
        if len(shape) == 2:
            weights[name] *= 0.3 if "embd" in name else 1.5 / math.sqrt(shape[1])
        elif name.endswith("norm.weight"):
            weights[name] = 1 + 0.3 * weights[name]
    return weights


def phi(sizes, weights):
    """The same model in transformers."""
    from transformers.models.phi.configuration_phi import PhiConfig
    from transformers.models.phi.modeling_phi import PhiForCausalLM

    config = PhiConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": sizes["rope_theta"],
            "partial_rotary_factor": sizes["rotary_dim"] * sizes["n_heads"] / sizes["d_model"],
        },
        layer_norm_eps=sizes["norm_eps"],
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = PhiForCausalLM(config).double().eval()
    model.model.rotary_emb = ExactAngles(sizes["rotary_dim"], sizes["rope_theta"])
    model.load_state_dict({their_name(n): w for n, w in weights.items()})
    return model


class ExactAngles(torch.nn.Module):
    """Cos and sin in float64, where transformers has float32 whatever the model's dtype."""

    def __init__(self, rotary_dim, theta):
        super().__init__()
        pairs = torch.arange(rotary_dim // 2, dtype=torch.float64)
        self.frequencies = theta ** (-2 * pairs / max(rotary_dim, 1))

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def random_ids(rng, *shape):
    return torch.randint(SIZES["vocab_size"], shape, generator=rng)


def turned(x, positions, frequencies):
    """The definition: the pairs of the first features as complex numbers."""
    n_pairs = len(frequencies)
    turns = torch.exp(1j * positions[..., None] * frequencies)
    pairs = torch.complex(x[..., :n_pairs], x[..., n_pairs : 2 * n_pairs]) * turns
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * n_pairs :]), dim=-1)


# --- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_pairs", [0, 1, 3, 5])
def test_turns_the_first_features_and_leaves_the_others(attempt, rng, n_pairs):
    x = torch.randn(2, 4, 3, 10, generator=rng, dtype=torch.float64).transpose(1, 2)
    positions = torch.tensor([[[4, 5, 6, 70]], [[0, 0, 1, 2]]])  # (batch, 1, seq_len)
    frequencies = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.02], dtype=torch.float64)[:n_pairs]

    out = attempt(rotate, x, positions, frequencies)

    assert_close(out, turned(x, positions, frequencies))


@pytest.mark.parametrize("form", FORMS | OTHERS)
def test_scores_the_next_token_as_transformers_does(attempt, rng, form):
    sizes = (FORMS | OTHERS)[form]
    weights, texts = random_weights(rng, sizes), [random_ids(rng, n, m) for n, m in TEXTS]

    out = attempt(logits, sizes, weights, *texts)

    model = phi(sizes, weights)
    assert_close(out, [model(ids).logits.detach() for ids in texts])


def test_gives_the_same_however_often_it_is_called(attempt, rng):
    weights = random_weights(rng, FORMS["Phi-2"])
    weights = {name: (16 * w).round() / 16 for name, w in weights.items()}
    texts = random_ids(rng, 2, 4), random_ids(rng, 3, 9), random_ids(rng, 1, 6)

    out = attempt(logits_again, FORMS["Phi-2"], weights, *texts)

    model = phi(FORMS["Phi-2"], weights)
    assert_close(out, [model(ids).logits.detach() for ids in texts])


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_sees_no_later_token_however_low_the_others_score(attempt, rng, size):
    sizes = FORMS["Phi-2"] | {"n_layers": 1}
    weights, ids = random_weights(rng, sizes), random_ids(rng, 2, 5)
    weights["blk.0.attn_q.weight"] *= size
    weights["blk.0.attn_k.weight"] = -weights["blk.0.attn_q.weight"]  # a token scores itself lowest

    [out] = attempt(logits, sizes, weights, ids)

    assert_close(out, phi(sizes, weights)(ids).logits.detach())


@pytest.mark.parametrize("form", FORMS)
def test_learns_as_transformers_does(attempt, rng, form):
    weights, ids = random_weights(rng, FORMS[form]), random_ids(rng, 2, 5)
    ids[0, 1] = 0  # a token like any other
    upstream = torch.randn(2, 5, SIZES["vocab_size"], generator=rng, dtype=torch.float64)

    found = attempt(gradients, FORMS[form], weights, ids, upstream)

    model = phi(FORMS[form], weights)
    model(ids).logits.backward(upstream)
    expected = {name: model.get_parameter(their_name(name)).grad for name in weights}
    assert_close(found, expected)


def test_has_one_norm_a_layer_and_a_bias_everywhere(attempt):
    found = attempt(shapes, FORMS["Phi-2"])

    assert_close(found, shapes_of(FORMS["Phi-2"]))


def test_keeps_exact_angles_when_it_is_cast_to_bfloat16(attempt, rng):
    sizes = FORMS["Phi-1"] | {"rotary_dim": 20, "n_layers": 1, "rope_theta": 3.0}
    weights, ids = random_weights(rng, sizes), random_ids(rng, 1, 600)
    coarse = {name: weight.bfloat16() for name, weight in weights.items()}

    [out] = attempt(logits, sizes, coarse, ids)

    expected = phi(sizes, weights)(ids).logits.detach()
    error = (out.double() - expected).square().mean().sqrt() / expected.std()
    assert out.dtype == torch.bfloat16
    # Rounding to 8 bits costs 0.007 of a standard deviation, frequencies of 8 bits cost 0.05.
    assert error < 0.02, f"off by {error:.3f} standard deviations at positions up to 600"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"n_heads": 7}, r"60\D+7|7\D+60"),
        ({"rotary_dim": 22}, r"22\D+20|20\D+22"),
        ({"rotary_dim": 9}, "9"),
        ({"rotary_dim": -2}, "-2"),
    ],
    ids=[
        "heads that do not divide d_model",
        "more than a head has",
        "an odd number",
        "a negative one",
    ],
)
def test_rejects_sizes_that_do_not_fit(attempt, changed, told):
    with pytest.raises(ValueError, match=told):
        attempt(shapes, FORMS["Phi-2"] | changed)
