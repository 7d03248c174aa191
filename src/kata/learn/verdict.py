"""What the learner reads after a run."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from kata.course.catalog import Exercise
from kata.judge.report import Detail, Report, SpecReport

MARKS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "unwritten": ("○", "yellow"),
         "skipped": ("–", "dim"), "untried": ("·", "dim")}  # fmt: skip
LINES_MORE = 20  # what a verdict has besides a line for each spec
INSTALL = re.compile(r"No module named '([\w.]+)'")


def show(report: Report, exercise: Exercise, console: Console, next_one: str = "") -> None:
    """Print the verdict: every spec by its sentence, the first failure in full.

    A terminal that is too low for that gets a count of those that pass and of the last that fail.
    """
    console.print(_head(report, exercise))
    if report.error:
        console.print(_indent(_explain(report.error)))
        return
    if report.state == "unwritten" and not report.count("passed"):
        console.print(_indent(_unwritten(report, exercise)))
        return
    first = next((s for s in report.specs if s.status == "failed"), None)
    shown, room = report.specs, max(3, console.height - LINES_MORE)
    low = first is not None and console.is_terminal and len(shown) > room
    if low:
        shown = [s for s in shown if s.status != "passed"][:room]
    for spec in shown:
        console.print(_line(spec), no_wrap=low, overflow="ellipsis" if low else None)
        if spec is first:
            console.print(_indent(_failure(report, spec), 4))
    folded = [s.status for s in report.specs if s not in shown]
    for status in sorted(set(folded)):
        console.print(Text.assemble(" ", MARKS[status], f" {folded.count(status)} more {status}"))
    if report.state == "passed":
        console.print(_passed(exercise, next_one))
    elif report.state != "skipped":
        hints = f"kata hint {exercise.number:02d}"
        console.print(_indent(Text.assemble("a hint: ", (hints, "bold"))))


def show_names(report: Report, console: Console) -> None:
    """The names that came after the verdict."""
    named = [spec for spec in report.specs if spec.mistakes]
    for spec in named:
        known = " Or: ".join(spec.mistakes)
        console.print(_line(spec))
        console.print(
            _indent(Text.assemble(("a known mistake: ", "bold yellow"), (known, "bold")), 4)
        )
    if not named:
        console.print(Text("it is no known mistake", "dim"))


def plain(detail: Detail) -> str:
    """Why a spec failed, as plain text."""
    console = Console(width=120, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(_explain(detail))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def near(path: str) -> str:
    """A path as it is shortest to read (and to click on): from here, if it is below."""
    name, colon, line = path.partition(":")
    try:
        return f"{Path(name).relative_to(Path.cwd())}{colon}{line}"
    except ValueError:
        return path


def _head(report: Report, exercise: Exercise) -> Text:
    words = {
        "passed": ("passed", "bold green"),
        "failed": ("not yet", "bold red"),
        "unwritten": ("not written yet", "bold yellow"),
        "begun": ("begun", "bold yellow"),
        "skipped": ("skipped", "bold"),
    }
    count = f"  {report.count('passed')} of {report.total} specs" if report.total else ""
    return Text.assemble(
        (f"{exercise.number:02d} {exercise.title}", "bold"), "  ", words[report.state],
        (f"{count}  {_milliseconds(report.seconds)}", "dim"),
    )  # fmt: skip


def _line(spec: SpecReport) -> Text:
    mark, style = MARKS[spec.status]
    note = spec.reason if spec.status == "skipped" else _milliseconds(spec.seconds)
    if spec.status == "unwritten":
        note = "not written yet"
    body = Text(spec.sentence, "default" if spec.status == "failed" else "")
    return Text.assemble(" ", (mark, style), " ", body, ("  " + note, "dim"))


def _failure(report: Report, spec: SpecReport) -> RenderableType:
    parts: list[RenderableType] = []
    if spec.mistakes:
        known = " Or: ".join(spec.mistakes)
        parts.append(Text.assemble(("a known mistake: ", "bold yellow"), (known, "bold")))
    if spec.detail:
        parts.append(_explain(spec.detail))
    if spec.output:
        lines = spec.output.rstrip().splitlines()
        shown = "\n".join(lines[-10:])
        parts.append(Text.assemble(("it printed\n", "dim"), shown))
    return Group(*parts)


def _explain(detail: Detail) -> RenderableType:
    lines = [Text(_first_lines(detail.message), "red")]
    there = detail.mismatch
    if "index" in there:
        at = f"at {there['index']}" if there["index"] else "it is"
        lines.append(
            Text.assemble(
                f"first {at}: " if there["index"] else "",
                "yours ", (there["yours_there"], "bold red"),
                ", expected ", (there["expected_there"], "bold green"),
            )
        )  # fmt: skip
    if there:
        lines.append(Text.assemble(("yours     ", "red"), there["yours"]))
        lines.append(Text.assemble(("expected  ", "green"), there["expected"]))
    if module := INSTALL.search(detail.message):
        package = module[1].partition(".")[0]
        lines.append(Text.assemble("to install it: ", (f"pip install {package}", "bold")))
    for frame in detail.frames:
        where = f"{near(f'{frame.file}:{frame.line}')}"
        inside = f" in {frame.function}" if frame.function else ""
        lines.append(Text.assemble((where, "cyan"), (inside, "dim")))
        if frame.text:
            lines.append(Text(f"    {frame.text}"))
    if detail.call:
        lines.append(Text.assemble(("in   ", "dim"), detail.call))
    if detail.where:
        lines.append(Text.assemble(("spec ", "dim"), (near(detail.where), "cyan")))
    return Group(*lines)


def _first_lines(message: str, limit: int = 12) -> str:
    lines = message.strip().splitlines()
    return "\n".join(lines[:limit] + (["…"] if len(lines) > limit else []))


def _unwritten(report: Report, exercise: Exercise) -> RenderableType:
    specs = [Text.assemble(" ", ("○", "yellow"), f" {s.sentence}") for s in report.specs]
    return Group(
        Text(f"The specs of {near(str(exercise.stub))} say that it"),
        *specs,
        Text.assemble("the lesson: ", (near(str(exercise.lesson)), "cyan")),
        Text.assemble("a hint: ", (f"kata hint {exercise.number:02d}", "bold")),
    )


def _passed(exercise: Exercise, next_one: str) -> RenderableType:
    number = f"{exercise.number:02d}"
    ways = Text.assemble("compare: ", (f"kata diff {number}", "bold"))
    if exercise.figure.exists():
        ways.append_text(Text.assemble("   picture: ", (f"kata show {number}", "bold")))
    if next_one:
        ways.append_text(Text.assemble("   next: ", (next_one, "bold")))
    after = exercise.section("After it passes")
    reading = exercise.section("Reading")
    parts = [Padding(Markdown(text), (0, 2)) for text in (after, reading) if text]
    return Group(Text(), *parts, _indent(ways))


def _indent(content: RenderableType, left: int = 2) -> Padding:
    return Padding(content, (0, 0, 0, left))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"
