"""Specs for exercise 40: rotary positions (RoPE)."""

import math

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


def default_frequencies(ex, head_dim):
    return ex.rope_frequencies(head_dim)


def rotate(ex, x, positions, frequencies, layout):
    return getattr(ex, f"apply_rope_{layout}")(x, positions, frequencies)


def reorder(ex, weight, head_dim):
    return ex.interleaved_to_half(weight, head_dim)


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


def rotations(positions, frequencies, layout):
    """The definition: the rotation matrix of each position, (seq_len, head_dim, head_dim)."""
    n_pairs = len(frequencies)
    matrices = np.zeros((len(positions), 2 * n_pairs, 2 * n_pairs))
    for m, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            first, second = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + n_pairs)
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            matrices[m, first, [first, second]] = cos, -sin
            matrices[m, second, [first, second]] = sin, cos
    return matrices


def of(library, array):
    return torch.from_numpy(array) if library == "torch" else array


def randn(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


@both_libraries
def test_gives_every_pair_a_slower_turn_than_the_one_before(attempt, library):
    found = attempt(frequencies_of, 6, 500.0, library)

    expected = np.array([500.0**0, 500.0 ** (-2 / 6), 500.0 ** (-4 / 6)])
    assert_close(found, of(library, expected))


def test_turns_by_the_base_of_the_paper_where_none_is_given(attempt):
    found = attempt(default_frequencies, 8)

    assert_close(found, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))


@both_layouts
@both_libraries
def test_turns_each_vector_as_the_rotation_matrix_of_its_position(attempt, np_rng, library, layout):
    x = np_rng.normal(size=(2, 3, 5, 8))
    positions, frequencies = np.array([3, 0, 1, 70, 12]), np.array([1.0, 0.6, 0.25, 0.01])
    q = of(library, x.astype(np.float32))

    out = attempt(rotate, of(library, x), of(library, positions), of(library, frequencies), layout)
    in_float32 = attempt(rotate, q, of(library, positions), of(library, frequencies), layout)

    expected = np.einsum("tij,bhtj->bhti", rotations(positions, frequencies, layout), x)
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
def test_gives_each_sequence_positions_of_its_own(attempt, rng, layout):
    x = randn(rng, 2, 5, 3, 6).transpose(
        1, 2
    )  # (batch, n_heads, seq_len, head_dim), not contiguous
    positions = torch.tensor([[[4, 5, 6, 7, 8]], [[0, 0, 0, 1, 2]]])
    frequencies = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)

    out = attempt(rotate, x, positions, frequencies, layout)

    for b in range(2):
        matrices = torch.from_numpy(rotations(positions[b, 0].numpy(), frequencies.numpy(), layout))
        assert_close(out[b], torch.einsum("tij,htj->hti", matrices, x[b]))


@both_layouts
def test_turns_no_vectors_at_all_into_none(attempt, layout):
    out = attempt(rotate, torch.ones(2, 0, 4), torch.arange(0), torch.ones(2), layout)

    assert_close(out, torch.ones(2, 0, 4))


@both_layouts
@settings(max_examples=25)
@given(
    n_pairs=st.integers(1, 5),
    start=st.integers(0, 50),
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
def test_keeps_far_positions_apart_in_bfloat16(attempt, rng, layout):
    x = randn(rng, 4, 6, dtype=torch.bfloat16)
    positions, frequencies = torch.tensor([1, 1000, 1001, 30_011]), np.array([1.0, 0.3, 0.05])

    out = attempt(rotate, x, positions, torch.from_numpy(frequencies), layout)

    matrices = torch.from_numpy(rotations(positions.numpy(), frequencies, layout))
    expected = torch.einsum("tij,tj->ti", matrices, x.double())
    # cos, sin, products and sum may each be rounded to 8 bits, and the sum may cancel: a few
    # roundings of the larger term. Angles in bfloat16 would be wrong by whole turns.
    assert_close(out, expected.bfloat16(), atol=4 * 2**-8 * float(x.abs().max()))


@both_layouts
def test_turns_gradients_back(attempt, rng, layout):
    x, grad = randn(rng, 3, 4, 6), randn(rng, 3, 4, 6)
    positions = torch.tensor([9, 2, 3, 4])
    frequencies = torch.tensor([0.9, 0.4, 0.2], dtype=torch.float64)

    found = attempt(gradient, x, positions, frequencies, grad, layout)

    matrices = torch.from_numpy(rotations(positions.numpy(), frequencies.numpy(), layout))
    assert_close(found, torch.einsum("tji,btj->bti", matrices, grad))


@both_libraries
def test_reorders_the_rows_of_each_head_from_pairs_to_halves(attempt, np_rng, library):
    weight, bias = np_rng.normal(size=(3 * 8, 5)), np_rng.normal(size=3 * 8)

    out = attempt(reorder, of(library, weight), 8)
    out_bias = attempt(reorder, of(library, bias), 8)

    rows = [8 * head + 2 * i + second for head in range(3) for second in (0, 1) for i in range(4)]
    assert_close(out, of(library, weight[rows]))
    assert_close(out_bias, of(library, bias[rows]))


def test_rejects_an_odd_head_dim(attempt):
    with pytest.raises(ValueError, match="5"):
        attempt(default_frequencies, 5)
