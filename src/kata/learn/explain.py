"""Why a spec failed, in the words that a learner reads."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from kata.attempt.outcome import Frame
from kata.judge.report import Detail, SpecReport
from kata.learn.lines import WIDTH, Line, labelled, near

FRAMES = 6  # lines of code that an exception went through; of more, the middle is left out
MESSAGE = 12, 400  # lines of an error's message, and characters of each
PRINTED = 10  # lines of what the code printed, the last ones


def plain(detail: Detail) -> str:
    """Why a spec failed, as plain text."""
    console = Console(width=WIDTH, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        for line in explain(detail):
            console.print(line)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def failure(spec: SpecReport) -> list[Line]:
    """A failed spec in full: the reason, and what was printed."""
    lines = explain(spec.detail) if spec.detail else []
    if spec.output:
        lines.append(Line(Text("it printed", "dim")))
        printed = spec.output.rstrip().splitlines()[-PRINTED:]
        lines += [Line(Text.from_ansi(text)).indented(2) for text in printed]
    return lines


def explain(detail: Detail) -> list[Line]:
    """Why a spec failed: the fact, then where, then in which call."""
    lines = [Line(Text(_short(detail.message), "red"))]
    there = detail.mismatch
    if hint := there.get("hint"):
        lines.append(Line(Text(hint, "yellow")))
    if "index" in there:
        at = f"first at {there['index']}: " if there["index"] else ""
        yours, expected = (
            (there["yours_there"], "bold red"),
            (there["expected_there"], "bold green"),
        )
        lines.append(Line(Text.assemble(at, "yours ", yours, ", expected ", expected)))
    if there:
        lines.append(Line(Text(there["yours"]), Text("yours     ", "red")))
        lines.append(Line(Text(there["expected"]), Text("expected  ", "green")))
    lines += _frames(detail.frames)
    if detail.call:
        lines.append(labelled("call", Text(detail.call)))
    if detail.where:
        lines.append(labelled("spec", Text(near(detail.where), "cyan")))
    return lines


def _short(message: str) -> str:
    most, length = MESSAGE
    lines = message.strip().splitlines()
    more = ["…"] if len(lines) > most else []
    return "\n".join(x if len(x) <= length else x[:length] + "…" for x in lines[:most] + more)


def _frames(frames: list[Frame]) -> list[Line]:
    """Each line of code that the exception went through; of an endless recursion, both ends."""
    lines = []
    for n, frame in enumerate(frames):
        left_out = len(frames) - FRAMES
        if left_out > 0 and FRAMES // 2 <= n < FRAMES // 2 + left_out:
            if n == FRAMES // 2:
                lines.append(Line(Text(f"… {left_out} more", "dim")))
            continue
        place = near(f"{frame.file}:{frame.line}" if frame.line else frame.file)
        named = frame.function and frame.function != "<module>"
        inside = f" in {frame.function}" if named else ""
        lines.append(Line(Text.assemble((place, "cyan"), (inside, "dim"))))
        if frame.text:
            lines.append(Line(Text(frame.text)).indented(4))
    return lines
