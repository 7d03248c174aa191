"""What a terminal that knows ASCII alone is shown instead of ✓, √ and α.

Python writes what it is given or raises UnicodeEncodeError; here a stand-in is written. All that
we print goes through sys.stdout, whoever printed it, so this is the one place for it. Files are
UTF-8 whatever the terminal is.
"""

from __future__ import annotations

import codecs
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping

from rich.console import Console

STAND_INS = {
    "✓": "ok", "✗": "X", "○": "o", "●": "*", "◐": "~", "◔": "~", "·": ".", "•": "*", "–": "-",
    "—": "--", "−": "-", "×": "x", "÷": "/", "√": "sqrt", "∞": "inf", "∑": "sum", "∏": "prod",
    "∂": "d", "∇": "grad ", "∈": "in", "∉": "not in", "≠": "!=", "≤": "<=", "≥": ">=", "≈": "~=",
    "≪": "<<", "≫": ">>", "±": "+-", "→": "->", "←": "<-", "↔": "<->", "⇒": "=>", "↑": "^",
    "↓": "v", "⊙": "*", "⊗": "(x)", "⊕": "(+)", "∘": "o", "∪": "|", "∩": "&", "∅": "{}",
    "‖": "||", "⌊": "floor(", "⌋": ")", "⌈": "ceil(", "⌉": ")", "⟨": "<", "⟩": ">", "∀": "for all",
    "∝": "~", "∧": "and", "∨": "or", "¬": "not ", "⋮": ":", "⋯": "...", "⁄": "/", "“": '"',
    "”": '"', "‘": "'", "’": "'", "«": '"', "»": '"', "°": "deg", "§": "section ", "ß": "ss",
    "ø": "o", "æ": "ae", "œ": "oe", "ł": "l", "đ": "d", "ı": "i", "€": "EUR", "▁": "_", "█": "#",
    "½": "1/2", "′": "'", "␣": "_", "Æ": "AE", "Ø": "O", "Ł": "L", "λ": "lambda", "Λ": "Lambda",
}  # fmt: skip


def console() -> Console:
    """Where all is printed. Paths are no markup; rich takes a dumb terminal for 80 columns wide."""
    width, height = shutil.get_terminal_size() if os.environ.get("TERM") == "dumb" else (None, None)
    return Console(highlight=False, markup=False, emoji=False, width=width, height=height)


def prepare(environment: Mapping[str, str] = os.environ) -> None:
    """From here on, whatever is printed can be printed."""
    codecs.register_error("kata", stand_in)
    encoding = {"encoding": "ascii"} if ascii_alone(environment) else {}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="kata", **encoding)


def ascii_alone(environment: Mapping[str, str]) -> bool:
    """Whether a terminal says that it knows no more, even where Python would write UTF-8.

    Python takes the locale C for UTF-8, and sets LC_CTYPE accordingly where only LANG says C.
    """
    locale = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG")
    if locale == "C.UTF-8" and not environment.get("LC_ALL"):
        locale = environment.get("LANG") or locale
    return environment.get("TERM") == "dumb" or locale in ("C", "POSIX")


def stand_in(error: UnicodeError) -> tuple[str, int]:
    """The handler of the codec's error: stand-ins for what has no place in the encoding."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(char: str) -> str:
    if char in STAND_INS:
        return STAND_INS[char]
    apart = unicodedata.normalize("NFKD", char)  # é is e and an accent, ² is 2, … is ...
    if apart != char:
        return "".join(c if c.isascii() else _ascii(c) for c in apart)
    if unicodedata.combining(char):
        return ""
    name = unicodedata.name(char, "")
    kind, _, letter = name.partition(" LETTER ")
    if kind.startswith("GREEK"):
        return letter.split()[0].capitalize() if "CAPITAL" in kind else letter.split()[0].lower()
    if name.startswith("BOX DRAWINGS"):
        return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(name.split()[-1], "+")
    return "." if name.startswith("BRAILLE") else "?"  # a spinner is of braille
