"""Specs for exercise 40: rotary positions (RoPE)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

LIBRARIES = {"numpy": np, "torch": torch}
both_libraries = pytest.mark.parametrize("library", ["numpy", "torch"])
both_layouts = pytest.mark.parametrize("layout", ["interleaved", "half"])


def frequencies_of(ex, head_dim, theta, library):
    return ex.rope_frequencies(head_dim, theta, LIBRARIES[library])


def frequencies_in_turn(ex, calls):
    """What each call gives. The caller then overwrites it, and the next call must not see that."""
    found = []
    for head_dim, theta, library in calls:
        given = ex.rope_frequencies(head_dim, theta, LIBRARIES[library])
        found.append(given + 0)
        given[...] = 0
    return found


def default_frequencies(ex, head_dim):
    return ex.rope_frequencies(head_dim)


def rotate(ex, x, positions, frequencies, layout):
    return getattr(ex, f"apply_rope_{layout}")(x, positions, frequencies)


def rotate_in_turn(ex, calls, layout):
    return [rotate(ex, *call, layout) for call in calls]


def reorder_each(ex, weights, head_dim):
    return {name: ex.interleaved_to_half(w, head_dim) for name, w in weights.items()}


def scores(ex, q, k, q_positions, k_positions, theta, layout):
    frequencies = ex.rope_frequencies(q.shape[-1], theta)
    q, k = (
        rotate(ex, q, q_positions, frequencies, layout),
        rotate(ex, k, k_positions, frequencies, layout),
    )
    return q @ k.mT


def gradient(ex, x, positions, frequencies, grad, layout):
    x.requires_grad_()
    rotate(ex, x, positions, frequencies, layout).backward(grad)
    found = x.grad
    x.requires_grad_(False).grad = None
    return found


def turned(x, positions, frequencies, layout):
    """The definition: each vector times the rotation matrix of its position, in float64."""
    x, positions, frequencies = (np.asarray(a) for a in (x, positions, frequencies))
    n_pairs = len(frequencies)
    matrices = np.zeros((*positions.shape, 2 * n_pairs, 2 * n_pairs))
    for i, angles in enumerate(np.moveaxis(positions[..., None] * frequencies, -1, 0)):
        first, second = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + n_pairs)
        matrices[..., first, first] = matrices[..., second, second] = np.cos(angles)
        matrices[..., second, first] = np.sin(angles)
        matrices[..., first, second] = -np.sin(angles)
    return np.einsum("...ij,...j->...i", matrices, x)


def of(library, array):
    return torch.from_numpy(array) if library == "torch" else array


def as_dtype(array, dtype):
    return array.to(getattr(torch, dtype)) if torch.is_tensor(array) else array.astype(dtype)


def randn(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def test_gives_every_pair_a_slower_turn_than_the_one_before(attempt):
    calls = [(6, 500.0, "torch"), (6, 500.0, "numpy"), (6, 20.0, "torch"), (8, 500.0, "torch")]
    calls += calls[:2]

    found = attempt(frequencies_in_turn, calls)

    for (head_dim, theta, library), frequencies in zip(calls, found, strict=True):
        expected = np.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
        assert_close(frequencies, of(library, expected))


def test_turns_by_the_base_of_the_paper_where_none_is_given(attempt):
    found = attempt(default_frequencies, 8)

    assert_close(found, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))


@both_layouts
@both_libraries
def test_turns_each_vector_as_the_rotation_matrix_of_its_position(attempt, np_rng, library, layout):
    x = np_rng.normal(size=(2, 3, 5, 8))
    positions, frequencies = np.array([3, 0, -2, 70, 12]), np.array([1.0, 0.6, 0.25, 0.01])
    q = of(library, x.astype(np.float32))

    out = attempt(rotate, of(library, x), of(library, positions), of(library, frequencies), layout)
    in_float32 = attempt(rotate, q, of(library, positions), of(library, frequencies), layout)

    expected = turned(x, positions, frequencies, layout)
    assert_close(out, of(library, expected))
    assert_close(in_float32, of(library, expected.astype(np.float32)))


def test_half_agrees_with_llama_in_transformers(attempt, rng):
    q, positions = randn(rng, 2, 4, 7, 6, dtype=torch.float32), torch.arange(7) + 2
    frequencies = 300.0 ** (-torch.arange(0, 6, 2) / 6)

    out = attempt(rotate, q, positions, frequencies, "half")

    from transformers.models.llama.modeling_llama import (
        LlamaConfig,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    rope = {"rope_type": "default", "rope_theta": 300.0}
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, head_dim=6, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    assert_close(out, apply_rotary_pos_emb(q, q, cos, sin)[0])


@both_layouts
@pytest.mark.parametrize(
    ("x_shape", "positions_shape"),
    [
        ((2, 5, 6), (2, 5)),
        ((2, 3, 5, 6), (2, 1, 5)),
        ((2, 3, 5, 6), (3, 5)),
        ((2, 3, 1, 6), (2, 3, 1)),
    ],
    ids=["each_sequence", "each_for_all_its_heads", "each_head", "one_for_each_vector"],
)
def test_broadcasts_the_positions_over_the_vectors(attempt, rng, layout, x_shape, positions_shape):
    x = randn(rng, *x_shape[::-1]).permute(*reversed(range(len(x_shape))))  # strides in reverse
    positions = torch.randint(50, positions_shape, generator=rng, dtype=torch.int32)
    frequencies = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)

    out = attempt(rotate, x, positions, frequencies, layout)

    assert_close(out, torch.from_numpy(turned(x, positions, frequencies, layout)))


@both_layouts
def test_turns_as_told_in_every_call(attempt, rng, layout):
    x, longer, one = randn(rng, 2, 4, 6), randn(rng, 2, 7, 6), randn(rng, 2, 1, 6)
    at, other = torch.tensor([2, 3, 4, 5]), torch.tensor([9, 0, 4, 1])
    slow, fast = torch.tensor([[0.9, 0.4, 0.2], [1.0, 0.7, 0.5]], dtype=torch.float64)
    calls = [
        (x.bfloat16(), at, slow), (x, at, slow), (x, other, slow), (x, other, fast),
        (longer, torch.arange(7), fast), (one, torch.tensor([7]), fast),
    ]  # fmt: skip

    _, *outs = attempt(rotate_in_turn, calls, layout)

    assert_close(outs, [torch.from_numpy(turned(*call, layout)) for call in calls[1:]])


@both_layouts
def test_turns_no_vectors_at_all_into_none(attempt, layout):
    out = attempt(rotate, torch.ones(2, 0, 4), torch.arange(0), torch.ones(2), layout)

    assert_close(out, torch.ones(2, 0, 4))


@both_layouts
@settings(max_examples=25)
@given(
    n_pairs=st.integers(1, 5),
    start=st.integers(-50, 50),
    shift=st.integers(1, 5000),
    seed=st.integers(0, 999),
)
def test_scores_depend_only_on_the_distance(attempt, layout, n_pairs, start, shift, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k = randn(rng, 3, 2 * n_pairs), randn(rng, 4, 2 * n_pairs)
    at_q, at_k = torch.arange(3) + start, 2 * torch.arange(4)

    here = attempt(scores, q, k, at_q, at_k, 100.0, layout)
    there = attempt(scores, q, k, at_q + shift, at_k + shift, 100.0, layout)

    assert_close(there, here)


@both_layouts
@pytest.mark.parametrize(
    ("library", "dtype"),
    [
        ("numpy", "float32"),
        *(("torch", dtype) for dtype in ("float64", "float32", "float16", "bfloat16")),
    ],
)
def test_keeps_far_positions_apart_in_every_dtype(attempt, np_rng, layout, library, dtype):
    # One member of each pair is 0, the other ±1: nothing is rounded but a cosine or a sine, once.
    ones = np_rng.choice([-1.0, 1.0], size=(20, 3))
    first = np_rng.random((20, 3)) < 0.5
    pairs = np.stack((ones * first, ones * ~first), axis=-1 if layout == "interleaved" else -2)
    x, positions = pairs.reshape(20, 6), np_rng.integers(-(10**6), 10**6, 20)
    positions[:4] = 1000, 1001, 1_000_000, 1_000_001
    frequencies = np.array([1.0, 0.3, 0.05])

    out = attempt(
        rotate, as_dtype(of(library, x), dtype), of(library, positions),
        of(library, frequencies), layout,
    )  # fmt: skip

    # An ulp below 1 is half an eps. In float64 the angles, up to 10⁶, are what is rounded.
    atol = 1e-9 if dtype == "float64" else torch.finfo(getattr(torch, dtype)).eps / 2
    expected = turned(x, positions, frequencies, layout)
    assert_close(out, as_dtype(of(library, expected), dtype), rtol=0.0, atol=atol)


@both_layouts
def test_turns_gradients_back(attempt, rng, layout):
    x, grad = randn(rng, 3, 4, 6), randn(rng, 3, 4, 6)
    positions = torch.tensor([9, 2, 3, 4])
    frequencies = torch.tensor([0.9, 0.4, 0.2], dtype=torch.float64)

    found = attempt(gradient, x, positions, frequencies, grad, layout)

    assert_close(found, torch.from_numpy(turned(grad, -positions, frequencies, layout)))


@both_libraries
def test_reorders_the_rows_of_each_head_from_pairs_to_halves(attempt, np_rng, library):
    weights = {
        "matrix": np_rng.normal(size=(5, 3 * 8)).T,  # transposed in memory
        "bias": np_rng.normal(size=3 * 8).astype(np.float32),
        "one head": np_rng.normal(size=(8, 5)).astype(np.float16),
        "three axes": np_rng.normal(size=(2 * 8, 3, 7)),
    }

    out = attempt(reorder_each, {name: of(library, w) for name, w in weights.items()}, 8)

    rows = [8 * head + 2 * i + second for head in range(3) for second in (0, 1) for i in range(4)]
    expected = {name: of(library, w[rows[: len(w)]]) for name, w in weights.items()}
    assert_close(out, expected, rtol=0.0, atol=0.0)  # rows are moved, numbers stay


@both_libraries
@pytest.mark.parametrize("head_dim", [1, 131])
def test_rejects_an_odd_head_dim(attempt, library, head_dim):
    with pytest.raises(ValueError, match=str(head_dim)):
        attempt(frequencies_of, head_dim, 500.0, library)
