"""Specs for exercise 33: attention, backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.functional.scaled_dot_product_attention"]

kinds = pytest.mark.parametrize("kind", ["Attention", "RecomputingAttention"])
masks = pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])


# --- run on the code under test ------------------------------------------------------------------


def derive(ex, q, k, v, p, grad_out):
    return ex.attention_gradients(q, k, v, p, grad_out)


def attend(ex, kind, q, k, v, causal, grad_out):
    """The result, and the gradients of q, k and v."""
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = getattr(ex, kind).apply(*inputs, causal)
    return out, *grad(out, inputs, grad_out)


def attend_for(ex, kind, asked, q, k, v, causal, grad_out):
    """The gradient of one input alone; the others need none."""
    asked = {"q": q, "k": k, "v": v}[asked].requires_grad_()
    return grad(getattr(ex, kind).apply(q, k, v, causal), asked, grad_out)


def attend_again(ex, kind, q, k, v, causal, grad_out):
    """Two backward passes over one graph."""
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = getattr(ex, kind).apply(*inputs, causal)
    return grad(out, inputs, grad_out, retain_graph=True), grad(out, inputs, grad_out)


def attend_twice(ex, kind, q, k, v, causal, direction):
    """The gradients of out² along a direction, differentiated again, or "refused"."""
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = getattr(ex, kind).apply(*inputs, causal)
    first = grad((out**2).sum(), inputs, create_graph=True)
    try:
        return grad(first, inputs, direction)
    except RuntimeError:
        return "refused"


def attend_in_turn(ex, kind, first, second):
    """Two texts, the second read before the gradients of the first are asked for."""
    graphs = []
    for q, k, v, causal, grad_out in (first, second):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        graphs.append((getattr(ex, kind).apply(*inputs, causal), inputs, grad_out))
    return [grad(*graph) for graph in graphs]


def check(ex, kind, q, k, v, causal):
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return gradcheck(getattr(ex, kind).apply, (*inputs, causal))


def keeps(ex, kind, q, k, v, causal):
    """The bytes that the graph keeps alive, saved for backward, and what else stands on ctx."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = getattr(ex, kind).apply(*inputs, causal)
    others = {name: value for name, value in vars(out.grad_fn).items() if not plain_value(value)}
    return {"saved": sum(saved.values()), "on ctx": [type(x).__name__ for x in others.values()]}


def plain_value(value):
    """A number, a string, a dtype, a size, or a few of them."""
    if isinstance(value, (list, tuple)):
        return all(plain_value(x) for x in value)
    kinds = (bool, int, float, str, torch.dtype, torch.device, torch.layout)
    return value is None or isinstance(value, kinds)


def costs(ex, kind, q, k, v, grad_out):
    """The flops of matrix products in the backward pass."""
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = getattr(ex, kind).apply(*inputs, False)
    with FlopCounterMode(display=False) as counter:
        grad(out, inputs, grad_out)
    return counter.get_total_flops()


# --- the oracle: torch ---------------------------------------------------------------------------


class Fused:
    @staticmethod
    def apply(q, k, v, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class oracle:
    """torch's own attention under the names of the exercise."""

    Attention = RecomputingAttention = Fused


class plain:
    """The equation in torch, which can be differentiated twice."""

    class Attention:
        @staticmethod
        def apply(q, k, v, causal):
            return weights_of(q, k, causal) @ v

    RecomputingAttention = Attention


def weights_of(q, k, causal):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~mask, -math.inf) if causal else scores, -1)


# --- inputs --------------------------------------------------------------------------------------


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def make_inputs(rng, n_queries=3, n_keys=5, head_dim=4, value_dim=6, batch=()):
    """q, k, v, and the gradient of the result. All sizes differ."""
    q, k = randn(rng, *batch, n_queries, head_dim), randn(rng, *batch, n_keys, head_dim)
    return q, k, randn(rng, *batch, n_keys, value_dim), randn(rng, *batch, n_queries, value_dim)


# --- the specs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2, 7)], ids=["no batch", "2x7"])
def test_the_gradients_are_those_of_autograd(attempt, rng, batch):
    q, k, v, grad_out = make_inputs(rng, batch=batch)

    grads = attempt(derive, q, k, v, weights_of(q, k, False), grad_out)

    assert_close(grads, attend(oracle, "Attention", q, k, v, False, grad_out)[1:])


@kinds
@masks
def test_gives_result_and_gradients_of_torch_in_any_memory_layout(attempt, rng, kind, causal):
    inputs = make_inputs(rng, n_keys=3 if causal else 5, batch=(2, 7))
    # As projections leave them: (batch, seq_len, n_heads, …) in memory, viewed heads first.
    q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)

    results = attempt(attend, kind, q, k, v, causal, grad_out)

    assert_close(results, attend(oracle, kind, q, k, v, causal, grad_out))


@kinds
@settings(max_examples=10)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), causal=st.booleans(), seed=st.integers(0, 999))
def test_works_for_every_size(attempt, kind, sizes, causal, seed):
    rng = torch.Generator().manual_seed(seed)
    n_queries, n_keys, *dims = sizes
    q, k, v, grad_out = make_inputs(rng, n_queries, n_queries if causal else n_keys, *dims)

    results = attempt(attend, kind, q, k, v, causal, grad_out)

    assert_close(results, attend(oracle, kind, q, k, v, causal, grad_out))


@kinds
@masks
def test_agrees_with_finite_differences(attempt, rng, kind, causal):
    q, k, v, _ = make_inputs(rng, n_keys=3 if causal else 4, head_dim=2, value_dim=5)

    assert attempt(check, kind, q, k, v, causal) is True


@kinds
@masks
@pytest.mark.parametrize("asked", ["q", "k", "v"])
def test_gives_the_gradient_of_one_input_where_the_others_need_none(
    attempt, rng, kind, causal, asked
):
    q, k, v, grad_out = make_inputs(rng, 5)

    found = attempt(attend_for, kind, asked, q, k, v, causal, grad_out)

    assert_close(found, attend_for(oracle, kind, asked, q, k, v, causal, grad_out))


@kinds
def test_stays_exact_when_the_scores_are_far_too_large_for_exp(attempt, rng, kind):
    q, k, v, grad_out = make_inputs(rng)
    signs = torch.tensor([[-1.0], [1.0], [-1.0]])  # scores above 10⁴ in row 1, else below −10⁴
    q, k = 1e4 * signs * (q.abs() + 1), k.abs() + 1

    results = attempt(attend, kind, q, k, v, False, grad_out)

    # Scores of 10⁵ are exact to 10⁻¹¹ in float64, and q multiplies that by 10⁴ in dk.
    assert_close(results, attend(plain, kind, q, k, v, False, grad_out), atol=1e-5)


@kinds
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e45), (torch.float32, 1e10)])
def test_sees_nothing_of_the_future_however_low_the_past_scores(attempt, rng, kind, dtype, size):
    q, k, v, grad_out = (x.to(dtype) for x in make_inputs(rng, 5))
    q = torch.full_like(q, size)
    k = torch.tensor([-4.0, -3.0, -2.0, 1.0, 2.0], dtype=dtype)[:, None].expand(5, 4)

    out, _, _, dv = attempt(attend, kind, q, k, v, True, grad_out)

    # Scores grow with the key: of what a query sees, its own position has all the weight.
    assert_close((out, dv), (v, grad_out))


@kinds
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_takes_float16_whose_products_are_too_large_for_float16(attempt, rng, kind, sign):
    _, _, v, grad_out = (x.half() for x in make_inputs(rng))
    q, k = torch.full((3, 4), 300.0).half(), torch.full((5, 4), 300.0 * sign).half()

    results = attempt(attend, kind, q, k, v, False, grad_out)

    expected = attend(oracle, kind, *(x.double() for x in (q, k, v)), False, grad_out.double())
    # Gradients of scores are rounded to eps of about 2; in dq and dk 300/√4 of up to 5 add up.
    eps = torch.finfo(torch.float16).eps
    for result, wide, largest in zip(results, expected, [1, 750, 750, 1], strict=True):
        assert_close(result, wide.half(), rtol=0.0, atol=4 * eps * largest)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_the_dtype_of_its_inputs_after_the_softmax(attempt, rng, kind, dtype):
    inputs = make_inputs(rng, 20, 20, head_dim=5, batch=(2,))
    q, k, v, grad_out = (x.to(dtype) for x in inputs)
    q, v = 6 * q, v / v.abs().amax()
    # Scores beyond 100, which half a precision rounds by up to 1/2, of parts that are larger still.
    q[..., :3] = torch.tensor([15, 17, 16])
    parts = torch.randint(-8, 8, (2, 20, 1), generator=rng)
    k[..., :3] = torch.tensor([0, 0, 16]) + parts * torch.tensor([17, -15, 0])

    out, *_ = attempt(attend, kind, q, k, v, True, grad_out)

    wide = (x.double() for x in (q, k, v))
    expected, *_ = attend(oracle, kind, *wide, True, grad_out.double())
    # The weights may be rounded, by half an eps each, and the result is: values are 1 at most.
    assert_close(out, expected.to(dtype), rtol=0.0, atol=1.5 * torch.finfo(dtype).eps)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_its_inputs(attempt, rng, kind, dtype):
    inputs = make_inputs(rng, n_queries=5, batch=(2,))
    q, k, v, grad_out = (x.to(dtype) for x in inputs)

    results = attempt(attend, kind, q, k, v, True, grad_out)

    wide = (x.double() for x in (q, k, v))
    expected = attend(oracle, kind, *wide, True, grad_out.double())
    # Scores of about 4 carry errors of a few eps into the weights, and gradients reach 10.
    tolerance = 32 * torch.finfo(dtype).eps
    assert_close(results, [x.to(dtype) for x in expected], atol=tolerance)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finds_exact_weights_where_a_coarse_log_sum_exp_would_not(attempt, rng, kind, dtype):
    q, k, v, grad_out = (x.to(dtype) for x in make_inputs(rng))
    # Scores of 96, 97, … 100: exact in either dtype, unlike the logarithm of a sum.
    q, k = torch.full_like(q, 2), 24 + torch.randint(2, k.shape, generator=rng).to(dtype)

    results = attempt(attend, kind, q, k, v, False, grad_out)

    expected = attend(oracle, kind, *(x.double() for x in (q, k, v)), False, grad_out.double())
    # Weights and gradients of scores are rounded to eps. In dq that of 5 keys adds up, 24 large.
    tolerance = 32 * torch.finfo(dtype).eps
    for i, (result, wide) in enumerate(zip(results, expected, strict=True)):
        rounded = tolerance * (24 if i == 1 else 1)
        assert_close(result, wide.to(dtype), atol=rounded)


@kinds
def test_backward_leaves_what_was_kept_as_it_was(attempt, rng, kind):
    q, k, v, grad_out = make_inputs(rng)

    first, second = attempt(attend_again, kind, q, k, v, False, grad_out)

    expected = attend(oracle, kind, q, k, v, False, grad_out)[1:]
    assert_close((first, second), (expected, expected))


@kinds
def test_keeps_apart_what_two_calls_at_once_need(attempt, rng, kind):
    causal = *make_inputs(rng, 4, 4)[:3], True, randn(rng, 4, 6)
    longer = *make_inputs(rng, 7, 7)[:3], False, randn(rng, 7, 6)

    both = attempt(attend_in_turn, kind, causal, longer)
    other_way = attempt(attend_in_turn, kind, longer, causal)

    one, other = (attend(oracle, kind, *text)[1:] for text in (causal, longer))
    assert_close((both, other_way), ([one, other], [other, one]))


@kinds
@masks
def test_gives_no_silently_wrong_second_derivative(attempt, rng, kind, causal):
    q, k, v, _ = make_inputs(rng, n_keys=3)
    direction = [randn(rng, *x.shape) for x in (q, k, v)]

    second = attempt(attend_twice, kind, q, k, v, causal, direction)

    expected = attend_twice(plain, kind, q, k, v, causal, direction)
    assert_close(second, "refused" if isinstance(second, str) else expected)


@masks
def test_attention_keeps_one_tensor_of_weights(attempt, rng, causal):
    q, k, v, out = make_inputs(rng, 40, 40)

    kept = attempt(keeps, "Attention", q, k, v, causal)

    bound = sum(x.nbytes for x in (q, k, v, out)) + 40 * 40 * 8
    assert kept["saved"] <= bound, f"keeps {kept['saved']} bytes, needs no more than {bound}"
    assert not kept["on ctx"], f"keeps {kept['on ctx']} on ctx, past save_for_backward"


@masks
def test_recomputing_attention_keeps_nothing_that_grows_with_the_square(attempt, rng, causal):
    for seq_len in (10, 40, 160):
        q, k, v, out = make_inputs(rng, seq_len, seq_len)

        kept = attempt(keeps, "RecomputingAttention", q, k, v, causal)

        bound = sum(x.nbytes for x in (q, k, v, out)) + 4 * seq_len * 8
        assert kept["saved"] <= bound, f"keeps {kept['saved']} bytes, needs no more than {bound}"
        assert not kept["on ctx"], f"keeps {kept['on ctx']} on ctx, past save_for_backward"


@pytest.mark.parametrize(("kind", "n_products"), [("Attention", 4), ("RecomputingAttention", 5)])
def test_backward_computes_each_matrix_product_once(attempt, rng, kind, n_products):
    q, k, v, grad_out = make_inputs(rng, 8, 9, head_dim=5, value_dim=5, batch=(2,))

    flops = attempt(costs, kind, q, k, v, grad_out)

    # A sum over a row of weights may be written as a product with a vector, a fifth as large.
    n_done = flops / (2 * 2 * 8 * 9 * 5)
    assert n_done <= n_products + 0.5, f"{n_done:g} products, {n_products} are enough"


@kinds
@pytest.mark.parametrize("n_keys", [1, 2, 5])
def test_rejects_causal_attention_to_another_number_of_keys(attempt, rng, kind, n_keys):
    q, k, v, grad_out = make_inputs(rng, n_keys=n_keys)

    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b3\b).*\b{n_keys}\b"):
        attempt(attend, kind, q, k, v, True, grad_out)
