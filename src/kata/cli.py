"""The commands of `kata`."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console, Group
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kata import catalog, progress, stubs
from kata.catalog import Exercise

app = typer.Typer(no_args_is_help=False, add_completion=False, rich_markup_mode=None)
console = Console(highlight=False)

Number = Annotated[str, typer.Argument(metavar="EXERCISE", help="a number or a name")]
Extras = typer.Option


def main() -> None:
    """The entry point: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except (catalog.UnknownExercise, FileNotFoundError, stubs.BadSolution, ValueError) as error:
        console.print(Text(f"kata: {error}", "red"))
        sys.exit(2)


def root() -> Path:
    """The project's folder."""
    return catalog.find_root(Path.cwd())


@app.callback(invoke_without_command=True)
def overview(context: typer.Context) -> None:
    """Ninety-nine katas from softmax to Triton. Without a command: the map."""
    if context.invoked_subcommand is None:
        console.print(map_of(root()))


def map_of(folder: Path) -> Group:
    """Ten chapters, each exercise's state, and what is next."""
    standings = progress.standings(folder)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(no_wrap=False)
    marks = {"passed": ("●", "green"), "failed": ("◐", "red"), "unwritten": ("○", "")}
    every = catalog.exercises(folder)
    for chapter, title in enumerate(catalog.CHAPTERS):
        own = [e for e in every if e.chapter == chapter]
        table.add_row(Text(str(chapter), "bold"), Text(title, "bold"))
        for e in own:
            state = standings[e.stem].state if e.stem in standings else "unwritten"
            mark, style = marks[state]
            table.add_row("", Text.assemble((mark, style), f" {e.number:02d} {e.title}"))
        if not own:
            table.add_row("", Text("to come", "dim"))
    following = next_after(folder, None)
    passed = sum(s.state == "passed" for s in standings.values())
    foot = [Text(f"{passed} of {len(every)} passed", "bold")]
    if following:
        foot.append(
            Text.assemble("next: ", (f"kata watch {following.number:02d}", "bold"),
                          f"  {following.title}")
        )  # fmt: skip
    return Group(table, *foot)


def next_after(folder: Path, exercise: Exercise | None) -> Exercise | None:
    """The first exercise after this one that has not passed; before it, if all later ones have."""
    standings = progress.standings(folder)
    every = catalog.exercises(folder)
    start = every.index(exercise) + 1 if exercise in every else 0
    for candidate in every[start:] + every[:start]:
        standing = standings.get(candidate.stem)
        if candidate != exercise and (standing is None or standing.state != "passed"):
            return candidate
    return None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, number: Number) -> None:
    """Judge an exercise. What follows is handed to pytest (-k, --pdb, --junitxml=FILE, …)."""
    exercise = catalog.find(root(), number)
    sys.exit(judge(exercise, [a for a in context.args if a != "--"]))


def judge(exercise: Exercise, extras: list[str]) -> int:
    """Run the specs here, show the verdict; 0 if they passed."""
    os.environ.setdefault("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    from kata import server, verdict

    report = server.judge(
        server.Job(str(exercise.root), exercise.stem, "", extras), quiet=not extras
    )
    following = next_after(exercise.root, exercise)
    suggestion = f"kata watch {following.number:02d}" if following else ""
    verdict.show(report, exercise, console, suggestion)
    for warning in report.warnings:
        console.print(Text(warning, "yellow"))
    return 0 if report.state in ("passed", "skipped") else 1


@app.command()
def watch(
    number: Annotated[str, typer.Argument(metavar="[EXERCISE]")] = "",
    parts: Annotated[str, typer.Option(help="whose earlier exercises are used")] = "solutions",
) -> None:
    """The verdict at every save, until you quit."""
    from kata import watch as watching

    folder = root()
    exercise = catalog.find(folder, number) if number else next_after(folder, None)
    watching.watch(exercise or catalog.exercises(folder)[0], console, parts)


@app.command()
def hint(number: Number) -> None:
    """The next hint, one at a time."""
    console.print(next_hint(catalog.find(root(), number)))


def next_hint(exercise: Exercise) -> Group:
    """One hint more than last time; after the last, the first again."""
    hints = exercise.hints
    if not hints:
        raise ValueError(f"no hints in {exercise.lesson.name}")
    seen = exercise.root / ".kata" / "hints" / exercise.stem
    count = int(seen.read_text()) % len(hints) if seen.exists() else 0
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.write_text(str(count + 1))
    return Group(Text(f"Hint {count + 1} of {len(hints)}", "bold"), Markdown(hints[count]))


@app.command()
def diff(
    number: Number,
    give_up: Annotated[bool, typer.Option("--give-up", help="before it has passed")] = False,
) -> None:
    """Your code beside the solution, once it has passed."""
    exercise = catalog.find(root(), number)
    if give_up:
        progress.give_up(exercise.root, exercise.stem)
    else:
        must_have_passed(exercise)
    console.print(beside(exercise, console.width))


def must_have_passed(exercise: Exercise) -> None:
    """The solution opens on a pass."""
    standing = progress.standings(exercise.root).get(exercise.stem)
    if not (standing and standing.state == "passed"):
        raise ValueError(
            f"exercise {exercise.number:02d} has not passed yet; to see the solution all the same "
            f"(the record keeps it): kata diff {exercise.number:02d} --give-up"
        )


def beside(exercise: Exercise, width: int) -> Table | Syntax | Text:
    """Two columns with the differing lines marked; one after the other where there is no room."""
    yours = exercise.stub.read_text("utf-8").splitlines()
    ours = exercise.solution.read_text("utf-8").splitlines()
    if yours == ours:
        return Text("yours is the solution, word for word")
    if width < 120:
        lines = difflib.unified_diff(yours, ours, "yours", "the solution", lineterm="", n=3)
        return Syntax("\n".join(lines), "diff", background_color="default", word_wrap=True)
    table = Table("yours", "the solution", box=None, padding=(0, 1), expand=True)
    for column in table.columns:
        column.ratio = 1
    for tag, a, b, c, d in difflib.SequenceMatcher(None, yours, ours, False).get_opcodes():
        if tag == "equal" and b - a > 8:
            _add_rows(table, yours[a : a + 3], ours[c : c + 3], "dim")
            table.add_row(Text("⋮", "dim"), Text("⋮", "dim"))
            _add_rows(table, yours[b - 3 : b], ours[d - 3 : d], "dim")
        else:
            _add_rows(table, yours[a:b], ours[c:d], "dim" if tag == "equal" else "")
    return table


def _add_rows(table: Table, left: list[str], right: list[str], style: str) -> None:
    for i in range(max(len(left), len(right))):
        a, b = (side[i] if i < len(side) else "" for side in (left, right))
        table.add_row(Text(a, style or "red"), Text(b, style or "green"))


@app.command()
def show(
    number: Number,
    solution: Annotated[bool, typer.Option("--solution", help="drawn by the solution")] = False,
) -> None:
    """The picture of an exercise, drawn by your own code."""
    exercise = catalog.find(root(), number)
    console.print(f"the picture: {draw(exercise, solution)}")


def draw(exercise: Exercise, solution: bool = False) -> Path:
    """Draw into .kata/figures and return the file."""
    if not exercise.figure.exists():
        raise ValueError(f"exercise {exercise.number:02d} has no picture")
    import pytest

    from kata import attempt, plugin

    plugin.prepare_environment()
    attempt.use_parts(exercise.root / "solutions")
    module = attempt.load(exercise.solution if solution else exercise.stub)
    try:
        figure = attempt.load(exercise.figure, f"figure_{exercise.stem}").draw(module)
    except NotImplementedError as error:
        raise ValueError(f"{error}; the picture is drawn by your own code") from error
    except pytest.skip.Exception as missing:  # weights
        raise ValueError(str(missing)) from missing
    path = exercise.root / ".kata" / "figures" / f"{exercise.stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


@app.command()
def reset(number: Number) -> None:
    """A fresh stub. Your file is kept beside it."""
    exercise = catalog.find(root(), number)
    fresh = stubs.make_stub(exercise.solution.read_text("utf-8"), exercise.number)
    kept = set_aside(exercise.stub) if exercise.stub.exists() else None
    exercise.stub.write_text(fresh, "utf-8")
    console.print(f"a fresh stub: {exercise.stub.relative_to(exercise.root)}")
    if kept:
        console.print(f"what you had: {kept.relative_to(exercise.root)}")


def set_aside(path: Path) -> Path:
    """Move a file to the first free name beside it."""
    n = 1
    while (kept := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return path.rename(kept)


@app.command()
def note(number: Number, text: str) -> None:
    """A dated line in progress.md."""
    exercise = catalog.find(root(), number)
    progress.note(exercise.root, exercise.number, text, datetime.now().astimezone())
    console.print("noted in progress.md")


@app.command("stubs")
def make_stubs(
    check: Annotated[
        bool, typer.Option("--check", help="only compare; fail if one differs")
    ] = False,
) -> None:
    """For authors: make every stub from its solution."""
    stale = []
    for exercise in catalog.exercises(root()):
        fresh = stubs.make_stub(exercise.solution.read_text("utf-8"), exercise.number)
        if exercise.stub.exists() and exercise.stub.read_text("utf-8") == fresh:
            continue
        stale.append(exercise)
        if check:
            continue
        if exercise.stub.exists() and not committed(exercise.stub):
            console.print(f"kept what was not committed: {set_aside(exercise.stub).name}")
        exercise.stub.write_text(fresh, "utf-8")
    for exercise in stale:
        word = "differs from its solution's stub" if check else "made"
        console.print(f"exercises/{exercise.stem}.py {word}")
    if check and stale:
        raise ValueError("make them with: kata stubs")
    if not stale:
        console.print("every stub is its solution's")


def committed(path: Path) -> bool:
    """Whether git has this very text, so that writing over it loses nothing."""
    answer = subprocess.run(
        ["git", "status", "--porcelain", "--", path.name], cwd=path.parent, capture_output=True
    )
    return answer.returncode == 0 and not answer.stdout.strip()


@app.command()
def new(number: int, slug: str) -> None:
    """For authors: begin an exercise; makes its floors."""
    from kata import template

    made = template.make(root(), number, slug)
    console.print(Columns([str(path.relative_to(root())) for path in made]))


@app.command()
def proof(
    numbers: Annotated[list[str] | None, typer.Argument(metavar="[EXERCISE]...")] = None,
    seed: Annotated[int, typer.Option(help="draw other inputs")] = 0,
    most: Annotated[int, typer.Option(help="mistakes (and right versions) of an exercise")] = 99,
) -> None:
    """For authors: show that the specs reject every mistake and accept every right version."""
    from kata import proof as proving

    folder = root()
    some = [catalog.find(folder, word) for word in numbers or ()]
    status = proving.main(some or catalog.exercises(folder), seed, most)
    sys.stdout.flush()
    os._exit(status)  # an orderly exit has Triton's bindings complain of leaks


@app.command()
def bench(times: Annotated[int, typer.Option(help="how often each is measured")] = 9) -> None:
    """For authors: measure the speeds; written to benchmarks.md and README.md."""
    from kata import bench as benching

    benching.main(root(), times)


@app.command()
def readme(
    check: Annotated[
        bool, typer.Option("--check", help="only compare; fail if it differs")
    ] = False,
) -> None:
    """For authors: make README's table of exercises from the files."""
    path = root() / "README.md"
    text = path.read_text("utf-8")
    head, begin, rest = text.partition("<!-- exercises -->\n")
    _, end, tail = rest.partition("<!-- exercises: end -->")
    rows = ["| no | exercise | suites |", "|---|---|---|"]
    for e in catalog.exercises(root()):
        link = f"[{e.title}](lessons/{e.stem}.md)"
        rows.append(f"| {e.number:02d} | {link} | {', '.join(sorted(e.suites))} |")
    fresh = head + begin + "\n".join(rows) + "\n" + end + tail
    if check and fresh != text:
        raise ValueError("README's table of exercises is stale; make it with: kata readme")
    path.write_text(fresh, "utf-8")
