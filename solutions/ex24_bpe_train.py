"""Exercise 24: byte-pair encoding, training.

A model reads ids from a fixed vocabulary. Bytes can spell every text, but take many ids;
whole words take few, but no list of them is ever complete. Byte-pair encoding lies between.
It starts from the 256 bytes and then, again and again, makes one token of the pair of
neighbours that occurs most often. Common words end up as one token, rare ones as a few.

Start: every word is the list of its bytes. Then, until the vocabulary is large enough:

    best  = argmax over pairs (a, b) of  Σ over words  times(word) · #{i : wordᵢ wordᵢ₊₁ = a b}
    every word:  … a b …  →  … ab …

Source: Sennrich, Haddow & Birch 2016, "Neural Machine Translation of Rare Words with Subword
    Units", section 3.2, https://arxiv.org/abs/1508.07909. Bytes for characters, and the
    pattern: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
    section 2.2, and the encoder in https://github.com/openai/gpt-2
"""

import heapq
from collections import Counter, defaultdict
from itertools import pairwise

import regex  # as Python's re, and it knows \p{L}, any letter, and \p{N}, any number

# What GPT-2 calls a word: it takes the space before it along. " don't stop" has three of
# them: " don", "'t" and " stop". PRETOKEN.findall(text) gives the words of a text, in order;
# joined, they are the text again.
PRETOKEN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


_Pair = tuple[int, int]


def train_bpe(text: str, vocab_size: int) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learn tokens from a text by merging the most frequent pair of neighbours, over and over.

    text:       what to learn from; its words are PRETOKEN.findall(text), as UTF-8
    vocab_size: how many tokens to stop at, 256 or more
    returns:    vocab, id to the token's bytes: ids 0 to 255 are the single bytes, in order,
                    then come the merged tokens, in the order in which they were made;
                merges, the two tokens of each merge as bytes, in the order of merging

    >>> vocab, merges = train_bpe("low low lower", 258)
    >>> vocab[256], vocab[257], merges
    (b'lo', b'low', [(b'l', b'o'), (b'lo', b'w')])

    A pair lies inside one word: tokens never span two. It is counted at every place where it
    starts, so "aaa" holds (a, a) twice, and merged from left to right, so "aaa" becomes aa, a.
    Of pairs that occur equally often, the one whose (left id, right id) is smallest is merged.
    A pair that occurs once is a pair like any other. When no pair is left, training ends.
    An empty text gives the 256 bytes and no merges. A vocab_size below 256 raises ValueError,
    which gives it.

    Cost: a word that occurs many times is worked on once, with its count. A merge visits only
    the words that hold its pair, and corrects the counts that change there. Going through all
    pairs in search of the most frequent one is allowed; going through all words is not.
    """
    # solution
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, one for each byte, got {vocab_size}")
    times_of = Counter(PRETOKEN.findall(text))
    words, times = [list(word.encode()) for word in times_of], list(times_of.values())
    counts: Counter[_Pair] = Counter()
    places = defaultdict(set)  # pair -> indices of the words that hold it, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[i]
            places[pair].add(i)

    vocab = {byte: bytes([byte]) for byte in range(256)}
    merges = []
    heap = [(-n, pair) for pair, n in counts.items()]  # smallest first: frequent, then low ids
    heapq.heapify(heap)
    while len(vocab) < vocab_size and (best := _most_frequent(heap, counts)):
        left, right = vocab[best[0]], vocab[best[1]]
        new = len(vocab)
        vocab[new] = left + right
        merges.append((left, right))
        made = set()  # the pairs of the new token with its neighbours
        for i in places[best]:
            for pair in pairwise(words[i]):
                counts[pair] -= times[i]
            words[i] = _merge(words[i], best, new)
            for pair in pairwise(words[i]):
                counts[pair] += times[i]
                if new in pair:
                    places[pair].add(i)
                    made.add(pair)
        for pair in made:
            heapq.heappush(heap, (-counts[pair], pair))
    return vocab, merges


def _most_frequent(heap: list[tuple[int, _Pair]], counts: Counter[_Pair]) -> _Pair | None:
    """Take the best pair off the heap. Merges make counts fall, and the heap is told only here."""
    while heap:
        n, pair = heapq.heappop(heap)
        if -n == counts[pair]:
            return pair
        if counts[pair] > 0:
            heapq.heappush(heap, (-counts[pair], pair))
    return None


def _merge(word: list[int], pair: _Pair, new: int) -> list[int]:
    """Put the new id in place of each such pair, from left to right."""
    merged: list[int] = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
