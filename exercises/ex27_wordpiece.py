"""Exercise 27: WordPiece.

BERT's vocabulary holds whole words and pieces of words: "##ing" is a piece that goes on inside
a word. No merges are replayed. A text is cleaned and cut into words by fixed rules, and a word is
taken apart from the left, each time by the longest piece that fits:

    pieceᵢ = the longest prefix of what is left of the word that stands in the vocabulary,
             with "##" before it unless i = 1
    If nothing fits at one place, the whole word is [UNK]: what was taken is not taken back.

Source: Devlin et al. 2019, "BERT", section 3, https://arxiv.org/abs/1810.04805, and its
    tokenization.py, https://github.com/google-research/bert. WordPiece: Wu et al. 2016,
    "Google's Neural Machine Translation System", section 4.1, https://arxiv.org/abs/1609.08144
"""

import unicodedata

# Code points, both ends included, of Chinese characters: written without spaces between words.
CJK = [
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
]
MAX_LETTERS = 100  # characters in a word; a longer one is [UNK]


def basic_tokens(text: str) -> list[str]:
    """Clean a text as BERT does, and cut it into words.

    text:    any, also none
    returns: its words, none of them empty

    Step by step, with unicodedata.category for what is told of a character's category:
    1. Control characters go: categories that begin with C, but not tab, newline and carriage
       return; and U+FFFD, which stands for what could not be read. What stood at their two sides
       stands side by side then.
    2. Around each character of CJK there is a space.
    3. Letters become small ones, by str.lower of the text or of each character.
    4. The text is decomposed (unicodedata.normalize, form NFD: é becomes e and an accent), and the
       accents go, category Mn.
    5. Words are what stands between spaces, as str.split sees them, and each mark of punctuation is
       a word by itself: a category that begins with P, and all of ASCII that is neither letter,
       digit, space nor control character, such as $ and +.

    >>> basic_tokens("Ça coûte 5$, n'est-ce pas?")
    ['ca', 'coute', '5', '$', ',', 'n', "'", 'est', '-', 'ce', 'pas', '?']
    """
    raise NotImplementedError("exercise 27 is not written yet")


class WordPiece:
    """Turns a text into pieces of words, and into ids for BERT.

    >>> pieces = ["[UNK]", "[CLS]", "[SEP]", "un", "##able", "##aff", "##a"]
    >>> vocab = {piece: i for i, piece in enumerate(pieces)}
    >>> WordPiece(vocab).tokenize("Unaffable, unable")
    ['un', '##aff', '##able', '[UNK]', 'un', '##able']
    >>> WordPiece(vocab).encode("Unable")
    [1, 3, 4, 2]
    """

    def __init__(self, vocab: dict[str, int]) -> None:
        """Take a vocabulary.

        vocab: piece to id; "##…" are pieces that continue a word

        If [UNK], [CLS] or [SEP] is not in it, ValueError is raised, and names it.
        """
        raise NotImplementedError("exercise 27 is not written yet")

    def tokenize(self, text: str) -> list[str]:
        """Cut a text into pieces of the vocabulary.

        returns: the pieces of its basic_tokens, in order; [UNK] alone for each word that cannot be
                 taken apart to its end, or that has more than MAX_LETTERS characters

        A "[MASK]" in the text is text like any other.
        """
        raise NotImplementedError("exercise 27 is not written yet")

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids as BERT reads them: [CLS], the pieces, [SEP]."""
        raise NotImplementedError("exercise 27 is not written yet")
