"""Exercise 54: a paged cache of keys and values.

A cache that reserves each sequence's longest length wastes what isn't written yet. So memory is
cut into blocks of block_size tokens that any sequence may take, one by one as it grows. A table
tells each sequence's blocks in order, as an operating system's page table does:

    token t of a sequence lies in block table[t // block_size], at slot t % block_size
    blocks in use = Σ ⌈length / block_size⌉            less what sequences share

Sequences that begin alike share blocks. Each block counts who has it, and whoever writes into one
that others have too copies it first.

Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", sections 4.1 to 4.4, https://arxiv.org/abs/2309.06180
"""

import math

import torch
from torch import Tensor


class BlockAllocator:
    """Numbers of blocks from 0 to n_blocks − 1: which are free, and how many have each.

    n_free: how many nobody has
    """

    def __init__(self, n_blocks: int) -> None:
        raise NotImplementedError("exercise 54 is not written yet")

    @property
    def n_free(self) -> int:
        raise NotImplementedError("exercise 54 is not written yet")

    def allocate(self) -> int:
        """Take any free block, with one owner. Where none is free, MemoryError."""
        raise NotImplementedError("exercise 54 is not written yet")

    def share(self, block: int) -> None:
        """Give a block one more owner. One that nobody has raises ValueError, with its number."""
        raise NotImplementedError("exercise 54 is not written yet")

    def free(self, block: int) -> None:
        """Take one owner from a block; it is free again after the last.

        One that nobody has raises ValueError, with its number: it would be given out twice.
        """
        raise NotImplementedError("exercise 54 is not written yet")

    def n_owners(self, block: int) -> int:
        """How many have a block."""
        raise NotImplementedError("exercise 54 is not written yet")


class PagedKVCache:
    """Keys and values of one layer for many sequences, in blocks.

    keys, values: (n_blocks, n_kv_heads, block_size, head_dim), reserved once
    allocator:    the BlockAllocator of these blocks
    tables:       the blocks of each sequence in order, by its number: dict[int, list[int]]
    lengths:      how many tokens each sequence has: dict[int, int]
    """

    def __init__(
        self,
        n_blocks: int,
        block_size: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        raise NotImplementedError("exercise 54 is not written yet")

    def add(self) -> int:
        """Begin an empty sequence, which has no block yet; its number, never given before."""
        raise NotImplementedError("exercise 54 is not written yet")

    def append(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of n_new tokens behind a sequence's others.

        k, v: (n_kv_heads, n_new, head_dim)

        Blocks are taken when they are needed, not before. A last block that others have too is
        copied, and the others keep theirs. Nothing else is moved. If there aren't blocks enough,
        MemoryError, and all stays as it was.
        """
        raise NotImplementedError("exercise 54 is not written yet")

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the same tokens, in the same blocks; its number."""
        raise NotImplementedError("exercise 54 is not written yet")

    def remove(self, sequence: int) -> None:
        """End a sequence, and free what nobody else has. Its number is unknown from then on."""
        raise NotImplementedError("exercise 54 is not written yet")

    def gather(self, sequence: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values in order, each (n_kv_heads, length, head_dim), copied."""
        raise NotImplementedError("exercise 54 is not written yet")


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> Tensor:
    """Let one query of each sequence look at all its tokens, wherever they lie.

    q:            (n_sequences, n_heads, head_dim); heads i · group … belong to key head i, where
                  group = n_heads / n_kv_heads
    keys, values: (n_blocks, n_kv_heads, block_size, head_dim)
    tables:       (n_sequences, most_blocks) int64; behind a sequence's blocks stands anything
    lengths:      (n_sequences,) int64, each at least 1
    returns:      (n_sequences, n_heads, head_dim), scores divided by √head_dim

    Slots behind a sequence's length, and blocks that aren't its own, may hold anything, NaN and
    inf too: they count for nothing, also in the gradients of q. A number of heads that n_kv_heads
    doesn't divide raises ValueError.
    """
    raise NotImplementedError("exercise 54 is not written yet")
