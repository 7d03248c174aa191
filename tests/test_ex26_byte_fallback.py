"""Specs for exercise 26: SentencePiece with byte fallback."""

import io
from functools import cache

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["sentencepiece.SentencePieceProcessor"]


def tokenizer(ex, names, split_digits=True, added=""):
    """Of these pieces, given best score first, and of added ones, which score better still."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(name, -float(rank)) for rank, name in enumerate(names.split(" "))]
    pieces += [(name, 1.0) for name in added.split(" ") if name]
    return ex.SentencePieceBPE(pieces, split_digits)


def encode(ex, names, text, split_digits=True, added=""):
    return tokenizer(ex, names, split_digits, added).encode(text)


def encode_by_scores(ex, names, scores, text):
    """The names of the pieces, which stand in another order than that of their scores."""
    pieces = [(f"<{i}>", 0.0) for i in range(259)]
    pieces += zip(names.split(" "), scores, strict=True)
    return [pieces[i][0] for i in ex.SentencePieceBPE(pieces).encode(text)]


def decode(ex, names, ids):
    return tokenizer(ex, names).decode(ids)


def one_after_the_other(ex, names, texts):
    """The ids and the texts of one tokenizer that reads them all; another keeps digits together."""
    made, other = tokenizer(ex, names), tokenizer(ex, names, split_digits=False)
    out = []
    for text in texts:
        ids = made.encode(text)
        out.append({"ids": ids, "together": other.encode(text), "text": made.decode(ids)})
    return out


def there_and_back(ex, names, text):
    made = tokenizer(ex, names)
    ids = made.encode(text)
    return {"ids": ids, "text": made.decode(ids)}


# --- the oracle: sentencepiece, trained on a small text as Llama's was ----------------------------

TEXT = """\
low lower lowest, new newer newest: the lowest of the newest is wider than the widest
the cat sat on the mat in 1984 and in 2024 and 2025, 10 or 100 or 1000 times
a plot of 30 m² or 40 m² or 2024 m², naïve café, Zoë ähnlich, 日本語 日本 東京 日本語
    if x1<s1: return x2<s2, x10<s3, x3<s3     # indented, twice
        return aaa aaaa aaaaaaa baa f<s1 g<so
"""
WORDS = TEXT.split()


@cache
def oracle(split_digits=True):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=written, model_type="bpe",
        vocab_size=259 + 120, byte_fallback=True, split_digits=split_digits,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_by_unicode_script=False,
        character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@cache
def vocabulary(split_digits=True):
    """The names of its pieces, those of the specials and bytes aside, best score first."""
    model = oracle(split_digits)
    return " ".join(model.id_to_piece(i) for i in range(259, model.vocab_size()))


def id_of(piece):
    return oracle().piece_to_id(piece)


# --- encode --------------------------------------------------------------------------------------


def test_merges_the_pieces_that_sentencepiece_merges(attempt, np_rng):
    text = " ".join(np_rng.choice(WORDS, 30))

    ids = attempt(encode, vocabulary(), text)

    assert_close(ids, oracle().encode(text))


def test_goes_by_the_scores_and_not_by_the_ids(attempt, np_rng):
    names, order = vocabulary().split(" "), np_rng.permutation(120)
    shuffled, scores = " ".join(names[i] for i in order), [-float(i) for i in order]
    text = "the lowest of the newest naïve returns, <so wider aaaa 日本語"

    pieces = attempt(encode_by_scores, shuffled, scores, text)

    assert_close(pieces, oracle().encode(text, out_type=str))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("quid", "▁ qui d"),  # no "q" is a piece, and "qu" is none either
        ("uiqui", "▁ ui qui"),
        ("éèéè", "▁ éè éè"),
        ("abc bcab", "▁ ab c ▁ bc ab"),  # ab and bc score alike
        ("xyz", "▁ xy z"),  # as do xy and yz, whose id is smaller
        ("mnop", "▁ mn op"),  # and mn and nop, which is longer
        ("٢٤24", "▁ ٢٤ 2 4"),
        ("eeeee", "▁ ee eee"),
        ("high", "▁hi gh"),  # hi and gh have the lowest scores of all
    ],
)  # fmt: skip
def test_merges_any_two_that_together_are_a_piece(attempt, text, pieces):
    # Some pieces can be made of no two pieces, some scores are equal, some above 0 or far below.
    scored = "▁ -20 ui -9 qui -10 d -20 éè -8 ab -1 bc -1 c -20 a -20 ee -5 eee -6 e -20 ▁hi 0.5 "
    scored += "gh -1e30 hi 1 g -20 h -20 i -20 yz -4 xy -4 z -20 op -3 nop -4 mn -4 "
    scored += "٢٤ -4 24 -4 2 -20 4 -20"
    names, scores = scored.split(" ")[::2], [float(score) for score in scored.split(" ")[1::2]]

    out = attempt(encode_by_scores, " ".join(names), scores, text)

    assert_close(out, pieces.split(" "))


def test_begins_anew_with_every_text(attempt):
    texts = ["low", "the lowest 2024", "low 🙂 2025", "", "24 low"]

    out = attempt(one_after_the_other, vocabulary(), texts)

    alone = [attempt(one_after_the_other, vocabulary(), [text])[0] for text in texts]
    assert_close(out, alone)
    assert_close([of["ids"] for of in out], [oracle().encode(text) for text in texts])
    assert_close([of["text"] for of in out], texts)


@pytest.mark.parametrize("text", ["baaaaa", "aaaaaaa", "eseses", "lololow"])
def test_merges_the_leftmost_of_equal_pairs(attempt, text):
    ids = attempt(encode, vocabulary(), text)

    assert_close(ids, oracle().encode(text))


def test_leaves_a_piece_alone_that_no_two_pieces_make(attempt):
    names = "abc ▁ a b c"  # neither ab nor bc

    ids = attempt(encode, names, "abc")

    assert_close(ids, [260, 261, 262, 263])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "low",
        "low low",
        " low",
        "   low    the  ",
        " ",
        "   ",
        "\nlow\t low\n",
        "low▁low_low",
        "a\u00a0b\u3000c\r\nlow ",
    ],
    ids=[
        "nothing",
        "word",
        "words",
        "indented",
        "many",
        "1",
        "3",
        "newline_and_tab",
        "written_out",
        "other_spaces",
    ],
)
def test_puts_a_space_before_the_text_and_keeps_all_others(attempt, text):
    ids = attempt(encode, vocabulary(), text)

    assert_close(ids, oracle().encode(text))


@pytest.mark.parametrize("text", ["in 2024 m²", "1984", "x1<s1 x10", "1000²"])
def test_keeps_digits_apart_whatever_the_vocabulary_holds(attempt, text):
    added = "20 24 2024 ▁1 x1 00 0² <s1"

    ids = attempt(encode, vocabulary(), text, added=added)

    assert_close(ids, oracle().encode(text))


@pytest.mark.parametrize("text", ["in 2024 m²", "1984", "x1<s1 x10", "1000²"])
def test_merges_digits_where_they_need_not_stay_apart(attempt, text):
    ids = attempt(encode, vocabulary(split_digits=False), text, split_digits=False)

    assert_close(ids, oracle(split_digits=False).encode(text))


@pytest.mark.parametrize(
    "text",
    ["🙂", "low 🙂🙃 the", "ñ ñandú", "中日本", "e\u0301 é ﬁ ½", "𝄞\u200b", "\x00\x7f\r\n"],
    ids=["alone", "two", "latin", "beside_known", "not_normalised", "invisible", "control"],
)
def test_falls_back_to_the_bytes_of_an_unknown_character(attempt, text):
    ids = attempt(encode, vocabulary(), text)

    assert_close(ids, oracle().encode(text))


@pytest.mark.parametrize("text", ["x<s>", "x<s>1</s>", "<unk>", "<0x41>"])
def test_takes_no_text_for_a_special_or_a_byte(attempt, text):
    ids = attempt(encode, vocabulary(), text)

    assert_close(ids, oracle().encode(text))


def test_takes_no_text_for_a_byte_even_if_its_pieces_lead_there(attempt):
    names, text = "<0 <0x <0x4 <0x41 < 0 x 4 1 >", "<0x41>"

    ids = attempt(encode, names, text, split_digits=False)

    # The space has no piece here, and is three bytes.
    assert_close(ids, [*(3 + byte for byte in "▁".encode()), 259 + 3, 259 + 9])


# --- decode --------------------------------------------------------------------------------------

EURO, SMILE = (bytes(text, "utf-8") for text in "€🙂")


@pytest.mark.parametrize(
    "read",
    [EURO, EURO + b"A" + SMILE + EURO, EURO[:2], SMILE[:3] + EURO, EURO[1:], b"\xff\xfeA",
     b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b" A"],
    ids=["whole", "several", "cut_off", "cut_off_and_whole", "beginning_missing", "never_used",
         "overlong", "surrogate", "beyond_unicode", "space"],
)  # fmt: skip
@pytest.mark.parametrize("before", ["", "▁low"], ids=["first", "after_a_piece"])
def test_reads_neighbouring_bytes_as_utf_8_together(attempt, read, before):
    ids = [id_of(before)] if before else []
    ids += [3 + byte for byte in read] + [id_of("▁the")]

    text = attempt(decode, vocabulary(), ids)

    assert_close(text, oracle().decode(ids))


@pytest.mark.parametrize("between", ["<s>", "</s>", "<unk>", "▁low", "low"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_reads_no_character_across_another_id(attempt, between, at):
    ids = [3 + byte for byte in SMILE + SMILE]
    ids.insert(at, id_of(between))

    text = attempt(decode, vocabulary(), ids)

    assert_close(text, oracle().decode(ids))


@pytest.mark.parametrize(
    "names",
    [[], ["▁low", "▁the"], ["low", "▁the"], ["▁", "low"], ["▁▁", "low", "▁▁"], ["▁", "▁▁", "▁low"],
     ["<s>", "▁low", "</s>"], ["<s>", "▁", "▁low"], ["<unk>", "▁low", "<unk>"],
     ["</s>", "<s>", "▁low", "</s>", "▁the"], ["▁", "</s>", "▁low"], ["<s>", "<unk>", "▁low"]],
    ids=lambda names: " ".join(names) or "nothing",
)  # fmt: skip
def test_takes_away_only_the_space_that_encode_has_put_there(attempt, names):
    ids = [id_of(name) for name in names]

    text = attempt(decode, vocabulary(), ids)

    assert_close(text, oracle().decode(ids))


@pytest.mark.parametrize("wrong", [-1, 379])
def test_rejects_an_id_that_is_not_in_the_vocabulary(attempt, wrong):
    with pytest.raises(IndexError, match=str(wrong)):
        attempt(decode, vocabulary(), [300, wrong])


# --- both ----------------------------------------------------------------------------------------

known = st.sampled_from([*WORDS, " ", "  ", "\n", "1", "20", "🙂", "<s>", "aa", "日"])
characters = st.one_of(st.integers(0, 0xD7FF), st.integers(0xE000, 0x10FFFF)).map(chr)


@given(text=st.lists(known | characters.filter("▁".__ne__), max_size=12).map("".join))
@settings(max_examples=15)
def test_brings_any_text_back_whole(attempt, text):
    out = attempt(there_and_back, vocabulary(), text)

    assert_close(out, {"ids": oracle().encode(text), "text": text})
