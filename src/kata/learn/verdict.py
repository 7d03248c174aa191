"""What the learner reads after a run."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from kata.course.catalog import Exercise
from kata.judge.report import Detail, Report, SpecReport
from kata.learn.explain import explain, failure
from kata.learn.lines import Line, labelled, near, pointer, width

MARKS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "unwritten": ("○", "yellow"),
         "skipped": ("–", "dim"), "untried": ("·", "dim")}  # fmt: skip
HEADS = {"passed": ("passed", "bold green"), "failed": ("not yet", "bold red"),
         "unwritten": ("not written yet", "bold yellow"), "begun": ("begun", "bold yellow"),
         "skipped": ("skipped", "bold")}  # fmt: skip
FOLDED = {"unwritten": "not written yet", "untried": "not tried"}
UNREAD = {"absent": "nothing to judge", "unreadable": "cannot be read"}  # so nothing was tried
LOOKING = "comparing it with the known mistakes …"
LINES_MORE = 20  # what a verdict has besides a line for each spec


def show(report: Report, exercise: Exercise, console: Console, next_one: str = "") -> None:
    """Print the verdict: every spec by its sentence, the first failure in full.

    A terminal that is too low for that gets a count of those that pass and of the last that fail.
    """
    lines = [_head(report, exercise)]
    if report.error:
        lines += _stopped(report, report.error, exercise)
    lines += _specs(report, console)
    if report.state == "unwritten":
        lines.append(pointer("your file", near(str(exercise.stub))).indented(2))
        lines.append(pointer("the lesson", near(str(exercise.lesson))).indented(2))
    if report.state in ("failed", "begun", "unwritten") and not report.error:
        lines.append(pointer("a hint", f"kata hint {exercise.number:02d}").indented(2))
    for line in lines:
        console.print(line, width=width(console))
    if report.state == "passed":
        _passed(exercise, next_one, console)


def show_names(report: Report, console: Console) -> None:
    """The names that came after the verdict."""
    named = [spec for spec in report.specs if spec.mistakes]
    told: set[str] = set()
    for spec in named:
        if names := _fresh(spec, told):
            for line in [_line(spec, cut=False), *names]:
                console.print(line, width=width(console))
    if not named:
        console.print(Text("  it is none of the known mistakes", "dim"))


def _head(report: Report, exercise: Exercise) -> Line:
    word, style = HEADS[report.state]
    count = f", {report.count('passed')} of {report.total} specs" if report.total else ""
    if report.state == "unwritten":
        count = f", {report.total} specs"
    if report.error and report.error.kind in UNREAD:
        word, count = UNREAD[report.error.kind], ""
    elif report.error and not report.specs:
        word = "no verdict"
    body = Text.assemble((exercise.title, "bold"), "  ", (word + count, style))
    took = Text(_seconds(report.seconds), "dim")
    return Line(body, Text(f"{exercise.number:02d} ", "bold"), took)


def _stopped(report: Report, error: Detail, exercise: Exercise) -> list[Line]:
    """Why the specs, or some of them, were not tried."""
    if error.kind in UNREAD:  # the line is among its frames
        lines = explain(msgspec.structs.replace(error, where=""))
    else:
        lines = explain(error)
    if error.kind == "absent":
        lines.append(labelled("file", Text(near(error.where), "cyan")))
        if report.submission in ("", str(exercise.stub)):
            lines.append(pointer("a fresh stub", f"kata reset {exercise.number:02d}"))
    return [line.indented(2) for line in lines]


def _specs(report: Report, console: Console) -> list[Line]:
    """A line for each spec that is worth one, the first failure with its reason."""
    first = next((s for s in report.specs if s.status == "failed"), None)
    folds = ["untried"] if report.state == "unwritten" else ["unwritten", "untried"]
    shown = [s for s in report.specs if s.status not in folds]
    room = max(3, console.height - LINES_MORE)
    low = first is not None and console.is_terminal and len(shown) > room
    more = [s.status for s in shown]
    if low:
        shown = [s for s in shown if s.status != "passed"][:room]
    lines: list[Line] = []
    told: set[str] = set()
    for spec in shown:
        lines += [_line(spec, low), *_fresh(spec, told)]
        if spec is first:
            lines += [line.indented(5) for line in failure(spec)]
    for spec in shown:
        more.remove(spec.status)
    for status in sorted(set(more)):
        lines.append(_folded(status, f"{more.count(status)} more {status}"))
    unread = report.error is not None and report.error.kind in UNREAD
    for status in folds:
        if count := report.count(status):
            why = ": the run had ended" if status == "untried" and not unread else ""
            lines.append(_folded(status, f"{count} {FOLDED[status]}{why}"))
    return lines


def _fresh(spec: SpecReport, told: set[str]) -> list[Line]:
    """The known mistakes that explain a spec, each told only once in a verdict."""
    names = [says for says in spec.mistakes if says not in told]
    told.update(names)
    body = Text.assemble(("a known mistake: ", "bold yellow"), " Or: ".join(names))
    return [Line(body).indented(5)] if names else []


def _line(spec: SpecReport, cut: bool) -> Line:
    if spec.status == "skipped":
        body = Text.assemble(spec.sentence, (f"  {spec.reason}", "dim"))
        return Line(body, _mark(spec.status), cut=cut)
    took = "" if spec.status == "unwritten" else _seconds(spec.seconds)
    return Line(Text(spec.sentence), _mark(spec.status), Text(took, "dim"), cut)


def _folded(status: str, words: str) -> Line:
    return Line(Text(words), _mark(status))


def _mark(status: str) -> Text:
    return Text.assemble(" ", MARKS[status], " ")


def _passed(exercise: Exercise, next_one: str, console: Console) -> None:
    """What to notice and to read, and where to go on."""
    links = console.is_terminal and console.color_system is not None  # else the URL is shown
    for heading in ("After it passes", "Reading"):
        if text := exercise.section(heading):
            console.print()
            console.print(Line(Text(heading, "bold")).indented(2), width=width(console))
            words = Padding(Markdown(text, hyperlinks=links), (0, 2, 0, 2), expand=False)
            console.print(words, width=width(console))
    console.print()
    number = f"{exercise.number:02d}"
    ways = {"compare": f"kata diff {number}"}
    if exercise.figure.exists():
        ways["picture"] = f"kata show {number}"
    if next_one:
        ways["next"] = next_one
    for label, way in ways.items():
        console.print(pointer(label, way).indented(2), width=width(console))


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"
