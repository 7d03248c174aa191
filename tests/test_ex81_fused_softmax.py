"""Specs for exercise 81: fused softmax in Triton."""

import math
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

triton = pytest.importorskip("triton", reason="Triton has packages for Linux only")

pytestmark = [pytest.mark.cpu, pytest.mark.gpu]

WITHOUT = [
    "torch.softmax",
    "torch.Tensor.softmax",
    "torch.nn.functional.softmax",
    "torch.special.softmax",
    "torch.log_softmax",
    "torch.Tensor.log_softmax",
    "torch.nn.functional.log_softmax",
    "torch.special.log_softmax",
    "torch.logsumexp",
    "torch.Tensor.logsumexp",
    "torch.special.logsumexp",
    "triton.language.softmax",
]

UNTOUCHED = 7.0


def soften(ex, x, block_size=None):
    with watched() as traffic:
        out = ex.softmax(x, block_size)
    if traffic["astray"]:
        raise IndexError(f"the kernel reaches for {traffic['astray']} elements outside its tensors")
    return out


def count(ex, x, block_size=None):
    """What the kernel moves, in elements, and its result."""
    with watched() as traffic:
        out = ex.softmax(x, block_size)
    # Where the system puts tensors is no work of the code: the same code gives the same data here.
    return {what: traffic[what] for what in ("read", "written", "astray", "block")}, out


def in_turn(ex, inputs):
    """The result for each input, after all calls."""
    with watched():
        return [ex.softmax(x) for x in inputs]


def reach(ex, x, n_rows, row_stride):
    """From where to where programs reach whose rows start far beyond x, counted from its start."""
    with watched() as traffic:
        ex.softmax_kernel[(n_rows,)](x, x, row_stride, row_stride, x.numel(), BLOCK_SIZE=8)
    return traffic["first"], traffic["last"]


def launch(ex, x_buffer, out_buffer, block_size):
    """Launch the kernel on an inner part of two buffers; returns the whole of both."""
    x, out = inner(x_buffer), out_buffer[2:-2, 11:24]
    with watched():
        ex.softmax_kernel[(x.shape[0],)](
            x, out, x.stride(0), out.stride(0), x.shape[1], BLOCK_SIZE=block_size
        )
    return x_buffer, out_buffer


def inner(x_buffer):
    return x_buffer[1:-1, 19:32]


@contextmanager
def watched():
    """Count what kernels launched in here move, in Triton's interpreter. On a GPU all stays 0.

    read, written: elements; astray: those of them that are not in the tensor, passed to the kernel,
    which the first one is in; block: elements of the largest access, masked ones included; first,
    last: the outermost of all, in elements from the start of the first tensor's memory. An
    access outside a tensor's memory is counted, then left out: it might end Python.
    New memory holds NaN, so that an element that nobody writes shows.
    """
    traffic = dict.fromkeys(("read", "written", "astray", "block", "first", "last"), 0)
    with ExitStack() as stack:
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn")
        if triton.knobs.runtime.interpret:
            watch_interpreter(stack, traffic)
        yield traffic


def watch_interpreter(stack, traffic):
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    pass_on = executor._init_args_hst
    memories = []

    def passing(self, args, kwargs):
        passed_args, passed_kwargs = pass_on(self, args, kwargs)
        tensors = [*passed_args, *passed_kwargs.values()]
        memories.extend(memory(t) for t in tensors if isinstance(t, torch.Tensor))
        return passed_args, passed_kwargs

    def allowed(way, pointers, mask):
        address = pointers.data.astype(np.int64)
        wanted = np.broadcast_to(mask.data, address.shape)
        own, safe = np.zeros_like(wanted), np.zeros_like(wanted)
        for start, itemsize, belongs in memories:
            index = (address - start) // itemsize
            inside = (index >= 0) & (index < belongs.size)
            if inside.flat[0]:
                safe |= inside
                own |= inside & belongs[np.where(inside, index, 0)]
        traffic[way] += int(wanted.sum())
        traffic["astray"] += int((wanted & ~own).sum())
        traffic["block"] = max(traffic["block"], wanted.size)
        start, itemsize, _ = memories[0]
        places = (address[wanted] - start) // itemsize
        traffic["first"] = min(traffic["first"], int(places.min(initial=0)))
        traffic["last"] = max(traffic["last"], int(places.max(initial=0)))
        return interpreter.TensorHandle(wanted & safe, mask.dtype)

    def loading(pointers, mask, *rest, **more):
        return load(pointers, allowed("read", pointers, mask), *rest, **more)

    def storing(pointers, value, mask, *rest, **more):
        return store(pointers, value, allowed("written", pointers, mask), *rest, **more)

    stack.enter_context(patch.object(executor, "_init_args_hst", passing))
    stack.enter_context(patch.object(builder, "create_masked_load", loading))
    stack.enter_context(patch.object(builder, "create_masked_store", storing))
    # NumPy warns of exp(1e4) in a masked lane too, where a GPU is silent.
    stack.enter_context(np.errstate(all="ignore"))


def memory(tensor):
    """The address of a tensor's memory, the size of its items, and which of them are its own."""
    storage = tensor.untyped_storage()
    items = torch.arange(max(1, storage.nbytes() // tensor.itemsize))
    own = items.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return storage.data_ptr(), tensor.itemsize, np.isin(items.numpy(), own.numpy())


def randn(rng, *shape, device):
    return (3 * torch.randn(*shape, generator=rng)).to(device)


@pytest.mark.parametrize("n_columns", [1, 2, 13, 16, 33])
def test_gives_torchs_softmax_for_rows_of_any_length(attempt, rng, device, n_columns):
    x = randn(rng, 2, n_columns, device=device)

    out = attempt(soften, x)

    # exp of −20, the least here, may be off by some 20 half eps.
    assert_close(out, torch.softmax(x, -1), rtol=5e-6, atol=0.0)


# Not shrunk: the interpreter is slow, and the examples are small as they are.
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(n_columns=16, block_size=8, seed=0)
@example(n_columns=13, block_size=4, seed=0)
@example(n_columns=5, block_size=1, seed=0)
@example(n_columns=5, block_size=64, seed=0)
@given(n_columns=st.integers(1, 21), block_size=st.sampled_from([4, 8]), seed=st.integers(0, 999))
def test_gives_the_same_however_a_row_falls_into_blocks(
    attempt, device, n_columns, block_size, seed
):
    x = randn(torch.Generator().manual_seed(seed), 2, n_columns, device=device)

    out = attempt(soften, x, block_size)

    assert_close(out, torch.softmax(x, -1))


@pytest.mark.parametrize("block_size", [None, 4])
def test_stays_finite_and_exact_for_large_values(attempt, rng, device, block_size):
    centre = torch.tensor([-3e38, -1e10, -1e5, -200.0, 200.0, 1e5, 3e38], device=device)
    x = centre[:, None] + randn(rng, 7, 13, device=device)

    out = attempt(soften, x, block_size)

    assert_close(out, torch.softmax(x, -1))


@pytest.mark.parametrize("block_size", [None, 4])
def test_gives_minus_infinity_no_weight(attempt, rng, device, block_size):
    x = randn(rng, 5, 11, device=device)
    x[0, ::2] = -math.inf
    x[1, :9] = -math.inf  # whole blocks at the start, as under a sliding window
    x[2, 3:] = -math.inf  # and at the end, as under a causal mask
    x[3, :] = -math.inf

    out = attempt(soften, x, block_size)

    assert_close(out, torch.softmax(x, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [None, 16])
def test_keeps_the_dtype_of_its_input(attempt, rng, device, dtype, block_size):
    x = randn(rng, 2, 37, device=device).to(dtype)

    out = attempt(soften, x, block_size)

    # Rounded once, at the end. Next to the middle of two numbers, float32 may choose the other one.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    assert_close(out, torch.softmax(x.double(), -1).to(dtype), rtol=eps, atol=tiny * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 16])
def test_kernel_computes_in_float32_whatever_the_dtype_of_x(
    attempt, rng, device, dtype, block_size
):
    x_buffer = randn(rng, 5, 51, device=device).to(dtype)
    out_buffer = torch.full((7, 37), UNTOUCHED, device=device)

    _, out = attempt(launch, x_buffer, out_buffer, block_size, may_change=True)

    expected = torch.softmax(inner(x_buffer).float(), -1)
    assert_close(out[2:-2, 11:24], expected, rtol=5e-6, atol=0.0)  # as above


@pytest.mark.parametrize("block_size", [4, 16])
def test_kernel_computes_in_float32_whatever_the_dtype_of_its_output(
    attempt, rng, device, block_size
):
    x_buffer = 9 + randn(rng, 5, 51, device=device)
    out_buffer = torch.full((7, 37), UNTOUCHED, dtype=torch.bfloat16, device=device)

    _, out = attempt(launch, x_buffer, out_buffer, block_size, may_change=True)

    expected = torch.softmax(inner(x_buffer).double(), -1).bfloat16()
    assert_close(out[2:-2, 11:24], expected, rtol=2**-7, atol=0.0)  # eps, as above


@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_touches_nothing_beside_its_rows(attempt, rng, device, block_size):
    # A value this large would take all the weight of a row that reads it.
    x_buffer = torch.full((7, 51), 1e30, device=device)
    inner(x_buffer).copy_(randn(rng, 5, 13, device=device))
    out_buffer = torch.full((9, 37), UNTOUCHED, device=device)
    expected = out_buffer.clone()
    expected[2:-2, 11:24] = torch.softmax(inner(x_buffer), -1)

    x_after, out_after = attempt(launch, x_buffer, out_buffer, block_size, may_change=True)

    assert_close(out_after, expected)
    assert_close(x_after, x_buffer)


@pytest.mark.parametrize(
    ("n_columns", "block_size", "reads"),
    [(13, None, 1), (16, None, 1), (8192, None, 1), (16, 16, 1), (13, 64, 1), (13, 4, 2)],
)
def test_reads_a_row_once_if_it_fits_one_block_else_twice_and_writes_it_once(
    attempt, rng, device, n_columns, block_size, reads
):
    x = randn(rng, 3, n_columns, device=device)

    traffic, _ = attempt(count, x, block_size)

    if device != "cpu":
        pytest.skip("only Triton's interpreter lets us count")
    assert traffic["astray"] == 0, "elements outside its tensors that the kernel reaches for"
    assert traffic["read"] == reads * x.numel(), f"elements read of {x.numel()}"
    assert traffic["written"] == x.numel(), f"elements written of {x.numel()}"


@pytest.mark.parametrize(("n_columns", "block"), [(1, 1), (5, 8), (8, 8), (13, 16)])
def test_takes_the_smallest_block_that_holds_a_row(attempt, rng, device, n_columns, block):
    x = randn(rng, 3, n_columns, device=device)

    traffic, _ = attempt(count, x)

    assert traffic["block"] <= block, "elements that the kernel holds at once"


def test_kernel_finds_rows_that_start_more_than_2_to_the_31_elements_after_the_first(
    attempt, rng, device
):
    if device != "cpu":
        pytest.skip("only Triton's interpreter lets us look at addresses with no memory behind")
    x = randn(rng, 5, device=device)

    first, last = attempt(reach, x, 3, 2**30, may_change=True)

    assert first == 0, "the first element that the kernel reaches for"
    assert last == 2 * 2**30 + 4, "the last element that the kernel reaches for"


def test_holds_no_more_than_the_largest_block_of_a_long_row(attempt, rng, device):
    x = torch.full((1, 8192 + 5), -30.0, device=device)
    x[0, [3, 4001, 8190, 8191, 8192, 8196]] = randn(rng, 6, device=device)

    traffic, out = attempt(count, x)

    assert_close(out, torch.softmax(x, -1))
    assert traffic["astray"] == 0, "elements outside its tensors that the kernel reaches for"
    assert traffic["block"] <= 8192, "elements that the kernel holds at once"


def sliced(x):
    return x[:, 1:-2]


def transposed(x):
    return x.T


def every_other(x):
    return x[::2, ::3]


def repeated(x):
    return x[3].expand(4, -1)


def two_leading(x):
    return x.reshape(2, 3, 10)[:, :, :7]


def turned(x):
    return x.reshape(2, 5, 6).permute(1, 2, 0)


def parts_of_leading(x):
    return x.reshape(2, 3, 10)[:, :2]  # rows at 0, 10, 30 and 40: no one stride


def single(x):
    return x[2]


def single_column(x):
    return x[:, 2]


VIEWS = [sliced, transposed, every_other, repeated, two_leading, turned, parts_of_leading]


@pytest.mark.parametrize("view", [*VIEWS, single, single_column])
def test_follows_the_shape_and_the_strides_of_its_input(attempt, rng, device, view):
    x = view(randn(rng, 6, 10, device=device))

    out = attempt(soften, x)

    assert_close(out, torch.softmax(x, -1))


def test_a_result_stays_when_softmax_is_called_again(attempt, rng, device):
    inputs = [randn(rng, *shape, device=device) for shape in [(3, 5), (3, 5), (2, 9), (3, 5)]]
    inputs[-1] = inputs[-1].half()

    out = attempt(in_turn, inputs)

    assert_close(out, [torch.softmax(x, -1) for x in inputs])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5), (0,)])
def test_gives_an_empty_result_for_an_empty_input(attempt, device, shape):
    x = torch.empty(shape, dtype=torch.float16, device=device)

    out = attempt(soften, x)

    assert_close(out, torch.softmax(x, -1))


@pytest.mark.parametrize("block_size", [12, 0, -8])
def test_rejects_a_block_size_that_is_not_a_power_of_two(attempt, rng, device, block_size):
    x = randn(rng, 2, 5, device=device)

    with pytest.raises(ValueError, match=str(block_size)):
        attempt(soften, x, block_size)


@pytest.mark.parametrize("n_rows", [2, 0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float8_e4m3fn])
def test_rejects_a_dtype_that_it_would_not_compute_in(attempt, device, dtype, n_rows):
    x = torch.ones(n_rows, 5, dtype=dtype, device=device)

    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        attempt(soften, x)
