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
        # solution
        self.owners = [0] * n_blocks
        self.free_blocks = list(range(n_blocks))

    @property
    def n_free(self) -> int:
        # solution
        return len(self.free_blocks)

    def allocate(self) -> int:
        """Take any free block, with one owner. Where none is free, MemoryError."""
        # solution
        if not self.free_blocks:
            raise MemoryError(f"all {len(self.owners)} blocks are in use")
        block = self.free_blocks.pop()
        self.owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """Give a block one more owner. One that nobody has raises ValueError, with its number."""
        # solution
        if self.owners[block] == 0:
            raise ValueError(f"nobody has block {block}")
        self.owners[block] += 1

    def free(self, block: int) -> None:
        """Take one owner from a block; it is free again after the last.

        One that nobody has raises ValueError, with its number: it would be given out twice.
        """
        # solution
        if self.owners[block] == 0:
            raise ValueError(f"nobody has block {block}")
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.free_blocks.append(block)

    def n_owners(self, block: int) -> int:
        """How many have a block."""
        # solution
        return self.owners[block]


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
        # solution
        self.block_size = block_size
        self.keys = torch.zeros(n_blocks, n_kv_heads, block_size, head_dim, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.allocator = BlockAllocator(n_blocks)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.next_number = 0

    def add(self) -> int:
        """Begin an empty sequence, which has no block yet; its number, never given before."""
        # solution
        number, self.next_number = self.next_number, self.next_number + 1
        self.tables[number], self.lengths[number] = [], 0
        return number

    def append(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of n_new tokens behind a sequence's others.

        k, v: (n_kv_heads, n_new, head_dim)

        Blocks are taken when they are needed, not before. A last block that others have too is
        copied, and the others keep theirs. Nothing else is moved. If there aren't blocks enough,
        MemoryError, and all stays as it was.
        """
        # solution
        size, n_new = self.block_size, k.shape[1]
        table, start = self.tables[sequence], self.lengths[sequence]
        n_more = math.ceil((start + n_new) / size) - len(table)
        shared = start % size > 0 and n_new > 0 and self.allocator.n_owners(table[-1]) > 1
        if n_more + shared > self.allocator.n_free:
            raise MemoryError(f"{n_more + shared} blocks wanted, {self.allocator.n_free} are free")

        if shared:
            own = self.allocator.allocate()
            self.keys[own], self.values[own] = self.keys[table[-1]], self.values[table[-1]]
            self.allocator.free(table[-1])
            table[-1] = own
        table += [self.allocator.allocate() for _ in range(n_more)]
        places = torch.arange(start, start + n_new)
        blocks = torch.tensor(table, dtype=torch.int64)[places // size]
        self.keys[blocks, :, places % size] = k.transpose(0, 1)  # (n_new, n_kv_heads, head_dim)
        self.values[blocks, :, places % size] = v.transpose(0, 1)
        self.lengths[sequence] = start + n_new

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the same tokens, in the same blocks; its number."""
        # solution
        number = self.add()
        for block in self.tables[sequence]:
            self.allocator.share(block)
        self.tables[number] = list(self.tables[sequence])
        self.lengths[number] = self.lengths[sequence]
        return number

    def remove(self, sequence: int) -> None:
        """End a sequence, and free what nobody else has. Its number is unknown from then on."""
        # solution
        for block in self.tables.pop(sequence):
            self.allocator.free(block)
        del self.lengths[sequence]

    def gather(self, sequence: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values in order, each (n_kv_heads, length, head_dim), copied."""
        # solution
        table = torch.tensor(self.tables[sequence], dtype=torch.int64)
        length = self.lengths[sequence]
        # (n, n_kv_heads, block_size, head_dim) -> (n_kv_heads, n · block_size, head_dim)
        k, v = (x[table].transpose(0, 1).flatten(1, 2) for x in (self.keys, self.values))
        return k[:, :length], v[:, :length]


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
    # solution
    n_kv_heads, size = keys.shape[1], keys.shape[2]
    if q.shape[1] % n_kv_heads:
        raise ValueError(f"{q.shape[1]} heads can't share {n_kv_heads} key heads evenly")
    rows = []
    for query, table, length in zip(q, tables, lengths.tolist(), strict=True):
        own = table[: math.ceil(length / size)]
        k, v = (x[own].transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys, values))
        grouped = query.unflatten(0, (n_kv_heads, -1))  # (n_kv_heads, group, head_dim)
        weights = torch.softmax(grouped @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        rows.append((weights @ v).flatten(0, 1))
    return torch.stack(rows)
