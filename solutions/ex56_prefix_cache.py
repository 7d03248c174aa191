"""Exercise 56: a prefix cache.

Requests to one model often begin alike: the same system prompt, the same conversation so far. Keys
and values depend on a token and on all that stands before it, so a prefix that was computed once
can be used again. The cache works in whole blocks of block_size tokens, and a block's name is a
hash of its tokens *and of its parent's name*, so that one name stands for a whole prefix:

    hash_i = H(hash_{i−1}, tokens of block i)         hash_{−1}: nothing

Blocks that a running request holds may not go. Of the others the least recently used goes first
when room is needed. A prefix without its beginning is worth nothing, so blocks are touched from
the end of a text to its start: then a parent is always younger than its children.

Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", section 4.4, https://arxiv.org/abs/2309.06180; vLLM's design of automatic
    prefix caching, https://docs.vllm.ai/en/latest/design/prefix_caching.html; Zheng et al. 2023,
    "SGLang", section 3, https://arxiv.org/abs/2312.07104
"""

import hashlib
from collections import Counter
from typing import Any


def block_hashes(ids: list[int], block_size: int) -> list[bytes]:
    """Name each whole block of a text, together with all that stands before it.

    ids:     tokens, from 0 up to 2⁶³ − 1
    returns: a hash for each of the len(ids) // block_size whole blocks, in order; tokens behind
             the last of them have none

    Two hashes are equal where the texts are equal up to the end of the block, and only there: a
    cryptographic hash of 16 bytes or more, whichever. It is the same in every process. A
    block_size below 1 raises ValueError.
    """
    # solution
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    hashes, parent = [], b""
    for start in range(0, len(ids) - block_size + 1, block_size):
        block = b"".join(i.to_bytes(8, "little") for i in ids[start : start + block_size])
        parent = hashlib.sha256(parent + block).digest()
        hashes.append(parent)
    return hashes


class PrefixCache:
    """What was computed for blocks of tokens, by the hashes of their prefixes."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        """Make an empty cache for at most n_blocks blocks, 0 or more, of block_size tokens."""
        # solution
        self.n_blocks, self.block_size = n_blocks, block_size
        self.data: dict[bytes, Any] = {}  # the least recently used first
        self.holders: dict[bytes, int] = {}

    def __len__(self) -> int:
        """How many blocks are here."""
        # solution
        return len(self.data)

    def match(self, ids: list[int]) -> tuple[list[bytes], list[Any]]:
        """Find the longest prefix in whole blocks that is here, and hold its blocks.

        returns: the hashes of its blocks, and what was inserted for each; both may be empty

        At least one token is left to compute, since the next token is predicted from the last one:
        of a text that is here whole, the last block isn't given. What is given counts as used now,
        and can't be evicted before `release` has been called as often as `match` has given it.
        """
        # solution
        found = []
        for name in block_hashes(ids[:-1], self.block_size):
            if name not in self.data:
                break
            found.append(name)
        for name in found:
            self.holders[name] += 1
        self._touch(found)
        return found, [self.data[name] for name in found]

    def release(self, hashes: list[bytes]) -> None:
        """Let go what one `match` has given. The blocks stay here, and may be evicted.

        Hashes that are held by nobody, or fewer times than they are given here, raise ValueError,
        and none is let go.
        """
        # solution
        if any(self.holders.get(name, 0) < n for name, n in Counter(hashes).items()):
            raise ValueError("some of these blocks are held by nobody")
        for name in hashes:
            self.holders[name] -= 1

    def insert(self, ids: list[int], data: list[Any]) -> int:
        """Take in what was computed for the whole blocks of a text, and count them as used now.

        data:    one for each whole block of ids, any objects; another number raises ValueError
        returns: how many of the text's blocks are here afterwards, counted from its start

        A block that is here already keeps what it has. Others are evicted where there is no room,
        but none of this text's; if even so there is none, only the beginning of the text is taken.
        """
        # solution
        hashes = block_hashes(ids, self.block_size)
        if len(data) != len(hashes):
            raise ValueError(f"{len(ids)} ids have {len(hashes)} whole blocks, got {len(data)}")
        here = 0
        for name, value in zip(hashes, data, strict=True):
            if name not in self.data:
                self._touch(hashes[:here])  # so that no block of this text is the oldest
                if len(self.data) >= self.n_blocks and not self._evict_one(set(hashes)):
                    break
                self.data[name], self.holders[name] = value, 0
            here += 1
        self._touch(hashes[:here])
        return here

    def evict(self, n: int) -> list[bytes]:
        """Drop n blocks, or as many as nobody holds.

        returns: their hashes, in the order in which they went: of the blocks that nobody holds the
                 least recently used first, and of one text used at one time the last block first
        """
        # solution
        gone = [self._evict_one(set()) for _ in range(n)]
        return [name for name in gone if name is not None]

    def _touch(self, hashes: list[bytes]) -> None:
        for name in reversed(hashes):  # the start of a text is younger than what follows
            self.data[name] = self.data.pop(name)

    def _evict_one(self, spared: set[bytes]) -> bytes | None:
        for name in self.data:
            if self.holders[name] == 0 and name not in spared:
                del self.data[name], self.holders[name]
                return name
        return None
