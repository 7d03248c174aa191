"""Specs for exercise 24: byte-pair encoding, training."""

import json
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["tokenizers.trainers.BpeTrainer"]


def train(ex, text, vocab_size):
    vocab, merges = ex.train_bpe(text, vocab_size)
    return {"merges": merges, "vocab": vocab}


def train_in_turn(ex, texts, vocab_size):
    return [train(ex, text, vocab_size) for text in texts]


def copies_of_the_text(ex, text, n_merges):
    """How many copies of the whole text a merge makes, the first merge aside, and the merges."""
    before, _ = large_allocations(len(text), ex.train_bpe, text, 256 + 1)
    after, (_, merges) = large_allocations(len(text), ex.train_bpe, text, 256 + n_merges)
    return {"copies": round((after - before) / (n_merges - 1)), "merges": merges}


def large_allocations(n_bytes, function, *args):
    """How many lines of a call take at least that much memory, even for a moment; its result."""
    n_large, held = 0, 0

    def look(frame, event, arg):
        nonlocal n_large, held
        now, peak = tracemalloc.get_traced_memory()
        n_large += peak - held >= n_bytes
        held = now
        tracemalloc.reset_peak()
        return look

    tracing, tracer = tracemalloc.is_tracing(), sys.gettrace()
    tracemalloc.start()
    sys.settrace(look)
    try:
        result = function(*args)
    finally:
        sys.settrace(tracer)
        if not tracing:
            tracemalloc.stop()
    return n_large, result


def rounds_over_all_words(ex, text, n_words, n_merges):
    """How often a merge goes through all words, and what is learnt.

    Counted in lines of Python, the first merge aside: 0 if a merge runs far fewer lines than
    there are words, else 1.
    """
    first, _ = lines_run(sys.maxsize, ex.train_bpe, text, 256 + 1)
    enough = n_words * (n_merges - 1)  # one line for each word and merge
    lines, (_, merges) = lines_run(first + enough, ex.train_bpe, text, 256 + n_merges)
    return {"rounds": round((lines - first) / enough), "merges": merges}


def lines_run(enough, function, *args):
    """How many lines of Python a call runs, up to that many, and its result."""
    n_lines = 0

    def count(frame, event, arg):
        nonlocal n_lines
        n_lines += event == "line"
        if n_lines >= enough:
            sys.settrace(None)
            return None
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        result = function(*args)
    finally:
        sys.settrace(before)
    return n_lines, result


# --- the oracles: the definition, word for word, and the package tokenizers -----------------------


def words_of(text):
    """The words of a text as GPT-2 sees them, by tokenizers' own pattern."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [text[start:end] for _, (start, end) in gpt2.pre_tokenize_str(text)]


def defined(text, vocab_size):
    """Count all pairs of the whole text, merge the best one everywhere, and begin again."""
    words = [list(word.encode()) for word in words_of(text)]
    vocab, merges = {byte: bytes([byte]) for byte in range(256)}, []
    while len(vocab) < vocab_size:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((vocab[best[0]], vocab[best[1]]))
        words = [replaced(word, best, len(vocab)) for word in words]
        vocab[len(vocab)] = b"".join(merges[-1])
    return {"merges": merges, "vocab": vocab}


def replaced(word, pair, new):
    for i, found in enumerate(pairwise(word)):
        if found == pair:
            return [*word[:i], new, *replaced(word[i + 2 :], pair, new)]
    return word


def trained_by_tokenizers(text, vocab_size):
    """The merges that its trainer learns, each byte given as a letter of the same rank.

    It breaks ties by id as well, but would number the bytes in GPT-2's order, not by value.
    """
    letters = [chr(0x4E00 + byte) for byte in range(256)]
    corpus = " ".join("".join(letters[byte] for byte in word.encode()) for word in words_of(text))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        [corpus],
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=letters, show_progress=False),
    )
    learnt = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(bytes(ord(c) - 0x4E00 for c in token) for token in pair) for pair in learnt]


# --- texts ---------------------------------------------------------------------------------------


def prose(np_rng, n_words=400):
    """Made-up words in many lengths, some far more frequent than others, with what prose has."""
    syllables = ["ka", "lo", "mi", "ré", "shu", "t", "en", "œu", "日本", "🙂", "aa"]
    made = ["".join(np_rng.choice(syllables, size=np_rng.integers(1, 5))) for _ in range(60)]
    picked = np_rng.choice(made, size=n_words, p=np.arange(60, 0, -1) / 1830)
    ends = np_rng.choice(
        [" ", " ", " ", ", ", ". ", "'s ", "\n\n", "  ", " 1984 ", "!!! "], n_words
    )
    return "".join(word + end for word, end in zip(picked, ends, strict=True))


# --- specs ---------------------------------------------------------------------------------------


def test_merges_the_pair_that_occurs_most_often(attempt):
    out = attempt(train, "aaabdaaabac", 259)

    merges = [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab")]
    vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"aa", 257: b"ab", 258: b"aaab"}
    assert_close(out, {"merges": merges, "vocab": vocab})


def test_learns_the_merges_that_tokenizers_learns(attempt, np_rng):
    text = prose(np_rng)

    out = attempt(train, text, 256 + 90)

    merges = trained_by_tokenizers(text, 256 + 90)
    vocab = dict(enumerate([bytes([b]) for b in range(256)] + [b"".join(pair) for pair in merges]))
    assert_close(out, {"merges": merges, "vocab": vocab})


def test_settles_ties_by_the_smaller_pair_of_ids(attempt):
    # All pairs but "ab" occur once. Those that come last in the alphabet come first in the text,
    # and the token "ab" has an id above any letter's, though not by its bytes.
    text = "zy\nyx\nczab\nabd\nqab\nmn"

    out = attempt(train, text, 999)

    assert_close(out, defined(text, 999))


@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
def test_counts_overlapping_pairs_and_merges_from_the_left(attempt, n):
    # Runs of n and n + 2, among pairs that are about as frequent.
    text = "\n".join(["a" * n, *["bc"] * (n - 1), *["cd"] * n, "xaa" + "a" * n])

    out = attempt(train, text, 999)

    assert_close(out, defined(text, 999))


def test_never_joins_two_words(attempt):
    text = "   to be, to be: we're 10 to 2  to\n\nbe 99to!? ok \t"

    out = attempt(train, text, 999)

    assert_close(out, defined(text, 999))


def test_merges_bytes_and_not_characters(attempt):
    text = "é è ê ë 日本 日曜 本日 🙂🙃 naïve ñ é"  # é, è, ê, ë share their first byte

    out = attempt(train, text, 275)

    assert_close(out, defined(text, 275))


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301 é e\u0301te\u0301 été",  # not normalised
        "a\r\nb\r\n\r\nc\r\nd\n\n\n",
        "ﬁ fi ½ 1/2 Å Å",
        "The the THE ThE tHe",
        "    ",
        "  a  a   b\t\tb\u00a0\u00a0c ",
        "\ufeffz a\0\0b\0\0b\ufeffa",
        "22 222 2222 ²² Ⅳ٣٣",
        "we'll we've 'll'll 've''ve WE'LL",
    ],
)
def test_learns_from_a_text_as_it_is(attempt, text):
    out = attempt(train, text, 999)

    assert_close(out, defined(text, 999))


def test_begins_anew_with_every_text(attempt):
    texts = ["abab abc", "bcbc abcd", "abab abc", "", "cd abcd abcd"]

    out = attempt(train_in_turn, texts, 262)

    assert_close(out, [defined(text, 262) for text in texts])


@pytest.mark.parametrize("text", ["", "a b c", "abc abc"], ids=["nothing", "letters", "words"])
def test_ends_when_no_pair_is_left(attempt, text):
    out = attempt(train, text, 400)

    assert_close(out, defined(text, 400))


def test_gives_the_bytes_alone_for_a_vocabulary_of_256(attempt):
    out = attempt(train, "abab", 256)

    assert_close(out, {"merges": [], "vocab": {byte: bytes([byte]) for byte in range(256)}})


@pytest.mark.parametrize("wrong", [255, 0, -300])
def test_rejects_a_vocabulary_too_small_for_the_bytes(attempt, wrong):
    with pytest.raises(ValueError, match=rf"(?<!\d){wrong}\b"):
        attempt(train, "abab", wrong)


@given(text=st.text("aab \n'sé1", max_size=30), n_merges=st.integers(0, 12))
@settings(max_examples=20)
def test_agrees_with_the_definition_on_any_text(attempt, text, n_merges):
    out = attempt(train, text, 256 + n_merges)

    assert_close(out, defined(text, 256 + n_merges))


# --- specs: cost ---------------------------------------------------------------------------------

LONG = "abcdefghijklmnopqrstuvwxyzABCDE"  # 30 pairs, merged one after the other


def test_visits_only_the_words_that_hold_the_merged_pair(attempt):
    others = ["".join(letters) for letters in product("FGHIJKLMNOPQRS", repeat=3)]
    text = "\n".join(others + [LONG] * 50)

    out = attempt(rounds_over_all_words, text, len(others), 30)

    assert_close(out["merges"], chain(LONG))
    assert out["rounds"] == 0, f"each merge goes through all {len(others)} words of the text"


def test_works_once_on_a_word_that_occurs_many_times(attempt):
    word = LONG[:13]
    text = "\n".join([word] * 900)

    out = attempt(rounds_over_all_words, text, 900, 12)

    assert_close(out["merges"], chain(word))
    assert out["rounds"] == 0, "each merge goes through all 900 places where one word occurs"


def test_copies_no_whole_text(attempt):
    text = "\n".join([LONG] * 50) + "\nq" * 4000  # "q" and the line's end have no pairs

    out = attempt(copies_of_the_text, text, 30)

    assert_close(out["merges"], chain(LONG))
    assert out["copies"] == 0, f"for each merge it takes {len(text)} bytes, as many as the text has"


def chain(word):
    """The merges that make one token of a word whose pairs are all equally frequent."""
    return defined(word, 999)["merges"]
