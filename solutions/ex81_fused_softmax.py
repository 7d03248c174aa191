"""Exercise 81: fused softmax in Triton.

Softmax does little arithmetic on much memory, so the bytes it moves are what it costs. As five
separate operations it reads a matrix five times and writes it three times; in one kernel, a row
stays on the chip between its only read and its only write:

    softmax(x)_j = exp(x_j − m) / Σ_k exp(x_k − m)        m = max_k x_k

A row longer than one block goes by in blocks. The largest element m and the sum l so far are enough
to go on, since a sum taken against an old m is mended by one factor (exercise 09):

    m' = max(m, max_k x_k)        l' = l exp(m − m') + Σ_k exp(x_k − m')        k in the next block

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3,
    https://arxiv.org/abs/1805.02867
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton gives a program 128 threads unless told otherwise, so a block of this size puts 64 numbers
# in the registers of each. Of much more, some would spill to memory.
MAX_BLOCK_SIZE = 8192


@triton.jit
def softmax_kernel(
    x_ptr, out_ptr, x_row_stride, out_row_stride, n_columns, BLOCK_SIZE: tl.constexpr
):
    """Write the softmax of one row: program i of a grid (n_rows,) has row i.

    x_ptr, out_ptr: first element of the first row of each; within a row, elements are neighbours
    x_row_stride, out_row_stride: elements from the start of one row to the start of the next; a
        row may start more than 2³¹ elements after the first one
    n_columns: elements in a row, at least one
    BLOCK_SIZE: elements that a program holds at once, a power of two; less or more than n_columns

    Computes in float32, whatever the dtypes of x and out. A row that fits one block is read once,
    a longer one twice; each element is written once, and nothing outside the rows is touched.
    −∞ gets weight 0, even where a whole block holds nothing else; a row of −∞ alone gives NaN.
    """
    # solution
    row = tl.program_id(0).to(tl.int64)  # row * stride may exceed 2³¹
    x_ptr += row * x_row_stride
    out_ptr += row * out_row_stride
    lanes = tl.arange(0, BLOCK_SIZE)

    # Bytes moved: an item has 2 in half precision, 4 in float32.
    if n_columns <= BLOCK_SIZE:
        mask = lanes < n_columns
        # The lanes beyond the row hold −∞: never the largest, and exp makes them 0 in the sum.
        x = tl.load(x_ptr + lanes, mask=mask, other=-float("inf"))  # in: n_columns items
        x = x.to(tl.float32)
        numerator = tl.exp(x - tl.max(x, axis=0))
        out = numerator / tl.sum(numerator, axis=0)
        tl.store(out_ptr + lanes, out, mask=mask)  # out: n_columns items
    else:
        m = -float("inf")
        l = 0.0
        for start in range(0, n_columns, BLOCK_SIZE):
            columns = start + lanes
            mask = columns < n_columns
            x = tl.load(x_ptr + columns, mask=mask, other=-float("inf"))  # in: BLOCK_SIZE items
            x = x.to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, axis=0))
            # While all is −∞, any finite number does for m: −∞ − (−∞) would be NaN.
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            l = l * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), axis=0)
            m = m_new
        for start in range(0, n_columns, BLOCK_SIZE):
            columns = start + lanes
            mask = columns < n_columns
            x = tl.load(x_ptr + columns, mask=mask)  # in: BLOCK_SIZE items, the second time
            out = tl.exp(x.to(tl.float32) - m) / l
            tl.store(out_ptr + columns, out, mask=mask)  # out: BLOCK_SIZE items


def softmax(x: Tensor, block_size: int | None = None) -> Tensor:
    """Return the softmax over the last dimension, by `softmax_kernel`.

    x:          (..., n_columns) float16, bfloat16 or float32, any strides, at least one dimension
    block_size: BLOCK_SIZE of the kernel; None for the smallest power of two that holds a row, or
                MAX_BLOCK_SIZE where that is smaller
    returns:    a new tensor of the shape, dtype and device of x

    An x without elements gives an empty result. Another dtype raises TypeError, with or without
    elements, and a block_size that is not a power of two ValueError (1 is one, and one larger than
    needed is fine; where x has no elements, it needn't be looked at). The message says what was
    given. x stays as it is.
    """
    # solution
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.numel() == 0:
        return torch.empty_like(x)
    n_columns = x.shape[-1]
    if block_size is None:
        block_size = min(triton.next_power_of_2(n_columns), MAX_BLOCK_SIZE)
    if block_size < 1 or block_size != triton.next_power_of_2(block_size):
        raise ValueError(f"block_size must be a power of two, got {block_size}")

    rows = x.reshape(-1, n_columns)  # a view where the strides allow it
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    grid = (rows.shape[0],)
    softmax_kernel[grid](rows, out, rows.stride(0), out.stride(0), n_columns, BLOCK_SIZE=block_size)
    return out.view(x.shape)
