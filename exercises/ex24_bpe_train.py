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
    raise NotImplementedError("exercise 24 is not written yet")
