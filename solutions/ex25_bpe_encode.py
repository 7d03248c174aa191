"""Exercise 25: byte-pair encoding, encoding and decoding.

Training (exercise 24) leaves a vocabulary and merges in an order. To encode a text is to go
through the same merges again, word by word: those learnt first come first. Nothing is searched
for, so the tokens are not the longest nor the fewest. To decode is to join bytes.

    word:   its UTF-8 bytes; then, as long as two neighbours are a merge,
            … a b …  →  … ab …   at the pair that was learnt first of all that stand there
    ids:    of its tokens;   special tokens, cut out of the text before, have ids of their own
    text:   UTF-8⁻¹( bytes(id₁) bytes(id₂) … )

Source: Sennrich, Haddow & Birch 2016, "Neural Machine Translation of Rare Words with Subword
    Units", section 3.2, https://arxiv.org/abs/1508.07909. Bytes for characters, and the
    pattern: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
    section 2.2, and the encoder in https://github.com/openai/gpt-2
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import pairwise

import regex  # as Python's re, and it knows \p{L}, any letter, and \p{N}, any number

# The words of GPT-2, as in exercise 24, and those of SmolLM2, where every digit is a word of its
# own. PATTERN.findall(text) gives the words of a text, in order; joined, they are the text again.
GPT2 = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SMOLLM2 = regex.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)


class Tokenizer:
    """Turns a text into ids and back, by a vocabulary and merges that were learnt before.

    >>> vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"lo", 257: b"low"}
    >>> tokenizer = Tokenizer(vocab, [(b"l", b"o"), (b"lo", b"w")], {"<|end|>": 258})
    >>> tokenizer.encode("slow<|end|>")
    [115, 257, 258]
    >>> tokenizer.decode([115, 257, 258])
    'slow<|end|>'
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: list[tuple[bytes, bytes]],
        special_tokens: dict[str, int] | None = None,
        pattern: regex.Pattern[str] = GPT2,
    ) -> None:
        """Take what was learnt.

        vocab:          id to the token's bytes, each token once: the 256 single bytes, under any
                        ids, and the result of every merge
        merges:         the two tokens of each merge, in the order of merging; both are single
                        bytes or were made by merges before
        special_tokens: text to id; none of them empty
        pattern:        its findall gives the words of a text: GPT2, SMOLLM2, or one like these

        A special token whose id vocab holds already raises ValueError, which gives the id.
        """
        # solution
        self.special_tokens = special_tokens or {}
        for text, i in self.special_tokens.items():
            if i in vocab:
                raise ValueError(f"id {i} is that of {vocab[i]!r}: give {text!r} another one")
        self.bytes_of = vocab | {i: text.encode() for text, i in self.special_tokens.items()}
        self.id_of = {token: i for i, token in vocab.items()}
        self.rank_of = {pair: rank for rank, pair in enumerate(merges)}
        self.pattern = pattern
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        # Where there are none, a pattern that nothing matches: "" would match everywhere.
        self.special = regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")
        # A few thousand words make up most of any text.
        self.ids_of_word = lru_cache(2**16)(partial(_ids_of_word, self))

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids.

        Special tokens are cut out first: read from the left, at each place the longest that stands
        there. What lies between two of them is cut into words on its own, as if it were all of the
        text. A pair of tokens lies inside one word. The empty text has no ids.

        Cost: a word takes time by its own length; merges that it does not hold cost nothing. Words
        may be remembered with their ids, as many different ones as have come.
        """
        # solution
        return [i for _, ids in _pieces(self, text) for i in ids]

    def encode_iterable(self, chunks: Iterable[str]) -> Iterator[int]:
        """Give the ids of encode("".join(chunks)), one by one, while the chunks come.

        chunks: anywhere cut, also within words and special tokens; some may be empty

        All ids that are sure come before the next chunk is asked for. Which ones are: if what came
        so far ends in what may be the beginning of a special token, leave that out, from the
        earliest such beginning that isn't within a special token itself. Of the rest, the last
        two pieces (words or special tokens) may change: "'" and "r" may become "'re". All pieces
        before these two are sure. An id may come earlier than this rule gives it.

        What is done is forgotten: memory holds a chunk and the little that is not yet sure, and
        at most each different word once, with its ids.
        """
        # solution
        text = ""
        for chunk in chunks:
            text += chunk
            # Not encode() of a shorter text: a word may be another one where the text ends.
            sure = list(_pieces(self, text[: _end_of_sure(self, text)]))[:-2]
            for _, ids in sure:
                yield from ids
            text = text[sum(length for length, _ in sure) :]
        yield from self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into the text that they spell.

        Bytes that are not UTF-8, such as half a letter, become U+FFFD (�), as Python's "replace"
        does it for all the bytes together. An id that is neither in vocab nor that of a special
        token raises KeyError, which gives the id.
        """
        # solution
        return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace")


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, list[int]]]:
    """Words and special tokens in order: the length of each, and its ids."""

    def words(between: str) -> Iterator[tuple[int, list[int]]]:
        for word in tokenizer.pattern.findall(between):
            yield len(word), tokenizer.ids_of_word(word)

    start = 0
    for match in tokenizer.special.finditer(text):
        yield from words(text[start : match.start()])
        yield len(match[0]), [tokenizer.special_tokens[match[0]]]
        start = match.end()
    yield from words(text[start:])


def _ids_of_word(tokenizer: Tokenizer, word: str) -> list[int]:
    """Merge the neighbours that were learnt first, until no neighbours are a merge."""
    tokens = [bytes([byte]) for byte in word.encode()]
    never = len(tokenizer.rank_of)
    while True:
        ranks = [tokenizer.rank_of.get(pair, never) for pair in pairwise(tokens)]
        first = min(ranks, default=never)
        if first == never:
            return [tokenizer.id_of[token] for token in tokens]
        i = ranks.index(first)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def _end_of_sure(tokenizer: Tokenizer, text: str) -> int:
    """Where the first special token begins of which more may come, or the end of the text."""
    inside = {i for m in tokenizer.special.finditer(text) for i in range(m.start() + 1, m.end())}
    longest = max(map(len, tokenizer.special_tokens), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        rest = text[start:]
        more = any(len(s) > len(rest) and s.startswith(rest) for s in tokenizer.special_tokens)
        if more and start not in inside:
            return start
    return len(text)
