"""progress.md: a page that is the learner's, with one table in it that is not.

Nothing here decodes the page, so that whatever stands outside the table survives byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from kata.course import catalog
from kata.learn.standing import Standing

BEGIN = b"<!-- kata: this table is made from .kata/runs.jsonl; write above or below it -->"
END = b"<!-- kata: end of the table -->"
HEAD = ("| Exercise | State | Specs | Tries | First | Last |", "|:--|:--|--:|--:|:--|:--|")
FRESH = b"""# Progress

Each run of an exercise is kept in `.kata/runs.jsonl`, and this table is made from that. All else
on this page is yours and stays as you write it. `kata note 31 "what I learned"` adds a dated line
at its end.

%s
%s

## Notes

""" % (BEGIN, END)


def rows(root: Path, standings: Mapping[str, Standing]) -> list[str]:
    """One row for each exercise that was tried, and one of totals. The map of all is `kata`."""
    known = catalog.exercises(root)
    tried = {exercise: standings[exercise.stem] for exercise in known if exercise.stem in standings}
    lines = []
    for exercise, standing in tried.items():
        link = f"[{exercise.number:02d}](lessons/{exercise.stem}.md)"
        lines.append(_row(f"{link} {_title(exercise)}", standing.label, [standing]))
    passed = sum(standing.state == "passed" for standing in tried.values())
    totals = f"**{len(tried)} of {len(known)} tried**", f"**{passed} passed**"
    return [*lines, _row(*totals, list(tried.values()))]


def _row(name: str, state: str, of: Sequence[Standing]) -> str:
    specs = f"{sum(s.passed for s in of)}/{sum(s.total for s in of)}" if of else "—"
    tries = sum(s.tries for s in of)
    first = min((s.first for s in of if s.first), default=None)
    last = max((s.last for s in of if s.last), default=None)
    dates = " | ".join(str(time.date()) if time else "—" for time in (first, last))
    return f"| {name} | {state} | {specs} | {tries} | {dates} |"


@cache
def _title(exercise: catalog.Exercise) -> str:
    try:
        return exercise.title.replace("|", r"\|")
    except (OSError, SyntaxError, ValueError):
        return exercise.slug.replace("_", " ")


def remade(old: bytes, rows: Sequence[str], item: Sequence[str] = ()) -> bytes:
    """The page with a table of these rows, and one more list item at its end if there is one.

    old:  the page as it is; an empty one is written afresh
    rows: what goes below the table's head; each begins with "|"
    item: the lines of a list item
    """
    old = old or FRESH
    eol = b"\r\n" if 2 * old.count(b"\r\n") > old.count(b"\n") else b"\n"
    above, below = _around(old)
    table = [BEGIN, *(row.encode() for row in (*HEAD, *rows)), END]
    page = _ended(above, eol) + eol.join(table) + eol + below
    if item:
        # An argument that was not UTF-8 came as escaped surrogates, and goes back to its bytes.
        lines = [line.encode("utf-8", "surrogateescape") for line in item]
        page = _ended(page, eol) + eol.join(lines) + eol
    return page


def _ended(text: bytes, eol: bytes) -> bytes:
    return text + eol if text and not text.endswith((b"\n", b"\r")) else text


def _around(old: bytes) -> tuple[bytes, bytes]:
    """What stands above the table and what stands below it.

    A marker that is a line of its own is taken away wherever it stands, and rows where they are
    surely the table's. Any other text that came to stand among them goes below the table.
    """
    lines = old.splitlines(keepends=True)
    words = [line.rstrip() for line in lines]
    marks = [i for i, word in enumerate(words) if word in (BEGIN, END)]
    spans = _spans(words, marks)
    dropped = set(marks).union(*(_made(words, first, last) for first, last in spans))
    if spans or marks:
        place = spans[0][0] if spans else marks[0]
    else:
        place = int(old.startswith((b"# ", b"\xef\xbb\xbf")))  # below a title or a byte order mark
    above = [line for i, line in enumerate(lines) if i < place and i not in dropped]
    below = [line for i, line in enumerate(lines) if i >= place and i not in dropped]
    return b"".join(above), b"".join(below)


def _spans(words: Sequence[bytes], marks: Sequence[int]) -> list[tuple[int, int]]:
    """The first and last lines of each table that kata made; a sound page has one.

    It begins at a marker and ends at the next one, or with its rows where that is missing. Where
    no rows have a marker, the first table that has our head will do.
    """
    spans = []
    for begin, following in pairwise([*marks, len(words)]):
        if words[begin] == BEGIN:
            closed = following < len(words) and words[following] == END
            spans.append((begin, following if closed else _last_row(words, begin)))
    spans = [(first, last) for first, last in spans if first < last]
    head = HEAD[0].encode()
    if not spans and head in words:
        spans = [(words.index(head), _last_row(words, words.index(head)))]
    return spans


def _last_row(words: Sequence[bytes], first: int) -> int:
    """The last of the rows that follow this line without a gap, or the line itself."""
    last = first
    while last + 1 < len(words) and words[last + 1].startswith(b"|"):
        last += 1
    return last


def _made(words: Sequence[bytes], first: int, last: int) -> set[int]:
    """Which of these lines are the table's: rows, and blank ones outside any other text."""
    inside = range(first, last + 1)
    rows = {i for i in inside if words[i].lstrip().startswith(b"|")}
    text = [i for i in inside if i not in rows and words[i] not in (b"", BEGIN, END)]
    return rows.union(i for i in inside if not text or not text[0] <= i <= text[-1])
