"""Lines that keep their indent where they wrap, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

WIDTH = 100  # columns: nobody reads a longer line at a glance
LEAST = 20  # columns for the words, however narrow the terminal is


@dataclass(frozen=True)
class Line:
    """Words behind a mark or a label; where they wrap, they go on below their beginning."""

    body: Text
    head: Text = field(default_factory=Text)
    tail: Text = field(default_factory=Text)  # after the last words, in one piece
    cut: bool = False  # at the edge, instead of wrapped

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(LEAST, options.max_width - self.head.cell_len)
        lines: list[Text] = []
        for text in self.body.split("\n", allow_blank=True):
            if self.cut:
                text.truncate(width - 2 - self.tail.cell_len, overflow="ellipsis")
            lines += text.wrap(console, width) or [text]
        for line in lines:
            line.rstrip()
        if lines[-1].cell_len + 2 + self.tail.cell_len > width and self.tail:
            lines.append(self.tail)
        elif self.tail:
            lines[-1] = Text.assemble(lines[-1], "  ", self.tail)
        for n, line in enumerate(lines):
            yield Text.assemble(" " * self.head.cell_len if n else self.head, line)

    def indented(self, left: int) -> Line:
        """The same further to the right."""
        return replace(self, head=Text.assemble(" " * left, self.head))


def labelled(label: str, body: Text) -> Line:
    """What a short label says it is."""
    return Line(body, Text(f"{label:<5}", "dim"))


def pointer(label: str, way: str) -> Line:
    """A command or a place, on a line of its own so that it is not torn."""
    return Line(Text(way, "bold"), Text(f"{label}: "))


def near(path: str) -> str:
    """A path as it is shortest to read (and to click on): from here, if it is below."""
    name, colon, line = path.partition(":")
    try:
        return f"{Path(name).relative_to(Path.cwd())}{colon}{line}"
    except ValueError:
        return path


def width(console: Console) -> int:
    """How wide a verdict is. What stands for √ and its like in ASCII is longer."""
    return min(console.width - 6 * console.options.ascii_only, WIDTH)
