"""Exercise 26: SentencePiece with byte fallback.

A text should come back from its tokens exactly, spaces and strange characters included. So
SentencePiece knows no words: a space is a character like any other, written ▁, and pieces are
merged from characters. A character that has no piece is not lost in an <unk>: it falls back to
the bytes of its UTF-8, and there is a piece for each byte.

    "low 🙂"  →  ▁ l o w ▁ 🙂  →  ▁low ▁ 🙂  →  ▁low ▁ <0xF0> <0x9F> <0x99> <0x82>

Source: Kudo & Richardson 2018, "SentencePiece: A simple and language independent subword
    tokenizer and detokenizer for Neural Text Processing", https://arxiv.org/abs/1808.06226.
    Digits apart and bytes for what is unknown: Touvron et al. 2023, "LLaMA: Open and
    Efficient Foundation Language Models", section 2.1, https://arxiv.org/abs/2302.13971
"""

SPACE = "▁"  # U+2581, not the underscore
FIRST_BYTE = 3  # the id of byte 0; that of byte 255 is 258
FIRST_PIECE = FIRST_BYTE + 256  # the id of the first piece that stands for text


class SentencePieceBPE:
    """A vocabulary of pieces, and how texts are written in it.

    The ids are laid out as in Llama's vocabulary:

        0, 1, 2   <unk>, <s> and </s>, which no text stands for, not even "<s>"
        3 … 258   the bytes, named <0x00> … <0xFF>; no text stands for these names either
        259 …     pieces of text, each with a score; spaces are written ▁ in them
    """

    def __init__(self, pieces: list[tuple[str, float]], split_digits: bool = True) -> None:
        """Keep what encode and decode need.

        pieces:       (name, score) of each id, all names different; the scores of ids below
                      259 mean nothing
        split_digits: whether each of the digits 0 to 9 stays apart. Then a piece of several
                      characters with a digit among them, such as "24" or "▁1", is never used
        """
        # solution
        self.names = [name for name, _ in pieces]
        self.scores, self.ids = {}, {}
        for id, (name, score) in enumerate(pieces[FIRST_PIECE:], start=FIRST_PIECE):
            if split_digits and len(name) > 1 and any(c in "0123456789" for c in name):
                continue
            self.scores[name], self.ids[name] = score, id

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids.

        1. Put a space before the text, so that a word has the same pieces at the start of a
           text as in its middle. Write each space as ▁. An empty text has no ids.
        2. Begin with the single characters. Of all neighbours that together are a piece, merge
           the two whose piece has the highest score; of several such, the leftmost two. Go
           on until no two neighbours are a piece.
        3. A part that is a piece gives its id. A character that is none gives the ids of the
           bytes of its UTF-8.

        >>> SentencePieceBPE([*specials_and_bytes, ("▁", -2.0), ("a", -1.0)]).encode("aé a")
        [259, 260, 198, 172, 259, 260]
        """
        # solution
        if not text:
            return []
        parts = list((" " + text).replace(" ", SPACE))
        while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in self.scores]:
            # max gives the first of equals, which is the leftmost.
            best = max(pairs, key=lambda i: self.scores[parts[i] + parts[i + 1]])
            parts[best : best + 2] = [parts[best] + parts[best + 1]]

        ids: list[int] = []
        for part in parts:
            if part in self.ids:
                ids.append(self.ids[part])
            else:
                ids.extend(FIRST_BYTE + byte for byte in part.encode())
        return ids

    def decode(self, ids: list[int]) -> str:
        """Turn ids into a text.

        Each ▁ in a piece of text becomes a space. The first of the ids, <s> and </s> not
        counted, loses the space at its start, if it is a piece of text that starts with one: it is
        the space that encode has put there. Bytes that follow one another, with no other id
        between them, are read as UTF-8 together. Each byte that is not part of a whole character
        becomes one "�" (U+FFFD). <s> and </s> give nothing, and part the bytes at their two sides;
        <unk> gives " ⁇ " (U+2047 between two spaces).

        An id outside of the vocabulary raises IndexError, which gives it.
        """
        # solution
        for id in ids:
            if not 0 <= id < len(self.names):
                raise IndexError(f"id must be in [0, {len(self.names)}), got {id}")
        out, first = [b""], True
        for id in ids:
            if id in (1, 2):
                out.append(b"")  # the bytes at its two sides are no neighbours
                continue
            if id >= FIRST_PIECE:
                piece = self.names[id].replace(SPACE, " ")
                out[-1] += (piece.removeprefix(" ") if first else piece).encode()
            elif id >= FIRST_BYTE:
                out[-1] += bytes([id - FIRST_BYTE])
            else:
                out[-1] += " ⁇ ".encode()
            first = False
        # surrogateescape makes one lone surrogate, U+DC80 … U+DCFF, of each byte that is astray.
        text = "".join(part.decode(errors="surrogateescape") for part in out)
        return "".join(
            "\N{REPLACEMENT CHARACTER}" if "\udc80" <= c <= "\udcff" else c for c in text
        )
