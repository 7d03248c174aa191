"""The commands of `kata`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.columns import Columns
from rich.text import Text

from kata.course import catalog, stubs
from kata.course.catalog import Exercise
from kata.judge.submission import refusal
from kata.learn import record, terminal, views
from kata.learn.lines import width

app = typer.Typer(no_args_is_help=False, add_completion=False, rich_markup_mode=None)
console = terminal.console()

Number = Annotated[str, typer.Argument(metavar="EXERCISE", help="a number or a name")]
QUIET_OPTIONS = {"--isolate", "--seed", "--parts", "--time-limit", "--junitxml"}


def main() -> None:
    """The entry point: errors that a user can mend are one line, without a traceback."""
    terminal.prepare()
    try:
        app()
    except (catalog.UnknownExercise, OSError, stubs.BadSolution, ValueError) as error:
        console.print(Text(f"kata: {error}", "red"))
        sys.exit(2)


def root(or_ours: bool = False) -> Path:
    """The project's folder: where the user stands, or else the one that this code belongs to."""
    try:
        return catalog.find_root(Path.cwd())
    except FileNotFoundError:
        if or_ours:
            with suppress(FileNotFoundError):
                return catalog.find_root(Path(__file__).parent)
        raise


@app.callback(invoke_without_command=True)
def overview(context: typer.Context) -> None:
    """Ninety-nine katas from softmax to Triton. Without a command: the map."""
    if context.invoked_subcommand is None:
        console.print(views.map_of(root()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, number: Number) -> None:
    """Judge an exercise. What follows is handed to pytest (-k, --pdb, --junitxml=FILE, …)."""
    extras = [a for a in context.args if a != "--"]
    submission = any(extra.startswith("--submission") for extra in extras)
    sys.exit(judge(catalog.find(root(or_ours=submission), number), extras))


def judge(exercise: Exercise, extras: list[str]) -> int:
    """Run the specs, show the verdict; 0 if it says that they passed."""
    from kata.judge.child import Request
    from kata.learn import once

    submission, extras = _submission(extras)
    named = {extra.partition("=")[0] for extra in extras if extra.startswith("-")}
    loud = bool(named - QUIET_OPTIONS)
    request = Request(str(exercise.root), exercise.stem, submission, extras, loud)
    following = views.next_after(exercise.root, exercise)
    suggestion = f"kata watch {following.number:02d}" if following else ""
    return once.run(request, console, suggestion)


def _submission(extras: list[str]) -> tuple[str, list[str]]:
    """The file that is to be judged instead, from where the user stands; and the other words."""
    words, file = list(extras), ""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--submission":
            end = i + 1 if equals else i + 2
            file = value if equals else "".join(words[i + 1 : end])
            del words[i:end]
            break
    if not file:
        return "", words
    path = Path(file).absolute()
    if why := refusal(path):
        raise ValueError(why)
    return str(path), words


@app.command()
def watch(
    number: Annotated[str, typer.Argument(metavar="[EXERCISE]")] = "",
    parts: Annotated[str, typer.Option(help="whose earlier exercises are used")] = "solutions",
) -> None:
    """The verdict at every save, until you quit."""
    from kata.learn import watch as watching

    folder = root()
    exercise = catalog.find(folder, number) if number else views.next_after(folder, None)
    watching.watch(exercise or catalog.exercises(folder)[0], console, parts)


@app.command()
def hint(number: Number) -> None:
    """The next hint, one at a time."""
    console.print(views.next_hint(catalog.find(root(), number)), width=width(console))


@app.command()
def diff(
    number: Number,
    give_up: Annotated[bool, typer.Option("--give-up", help="before it has passed")] = False,
) -> None:
    """Your code beside the solution, once it has passed."""
    exercise = catalog.find(root(), number)
    if give_up:
        record.give_up(exercise.root, exercise.stem)
    else:
        views.must_have_passed(exercise)
    console.print(views.beside(exercise, console.width))


@app.command()
def show(
    number: Number,
    solution: Annotated[bool, typer.Option("--solution", help="drawn by the solution")] = False,
) -> None:
    """The picture of an exercise, drawn by your own code."""
    exercise = catalog.find(root(), number)
    console.print(f"the picture: {views.draw(exercise, solution)}")


@app.command()
def reset(number: Number) -> None:
    """A fresh stub. Your file is kept beside it."""
    exercise = catalog.find(root(), number)
    fresh = stubs.make_stub(exercise.solution.read_text("utf-8"), exercise.number).encode()
    name = exercise.stub.relative_to(exercise.root)
    if exercise.stub.exists() and exercise.stub.read_bytes() == fresh:
        console.print(f"{name} is a fresh stub already")
        return
    kept = set_aside(exercise.stub) if exercise.stub.exists() else None
    exercise.stub.write_bytes(fresh)
    console.print(f"a fresh stub: {name}")
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
    record.note(exercise.root, exercise.number, text, datetime.now().astimezone())
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
    from kata.author import template

    made = template.make(root(), number, slug)
    console.print(Columns([str(path.relative_to(root())) for path in made]))


@app.command()
def proof(
    numbers: Annotated[list[str] | None, typer.Argument(metavar="[EXERCISE]...")] = None,
    seed: Annotated[int, typer.Option(help="draw other inputs")] = 0,
    most: Annotated[int, typer.Option(help="mistakes (and right versions) of an exercise")] = 99,
    fresh: Annotated[bool, typer.Option("--fresh", help="judge all, whatever is known")] = False,
) -> None:
    """For authors: show that the specs reject every mistake and accept every right version."""
    from kata.author import proof as proving

    folder = root()
    some = [catalog.find(folder, word) for word in numbers or ()]
    status = proving.main(some or catalog.exercises(folder), seed, most, fresh)
    sys.stdout.flush()
    os._exit(status)  # an orderly exit has Triton's bindings complain of leaks


@app.command()
def bench(
    wanted: Annotated[list[str] | None, typer.Argument(metavar="[EXERCISE OR MEASURE]...")] = None,
    times: Annotated[int, typer.Option(help="how often each is measured")] = 9,
) -> None:
    """For authors: measure the speeds. All of them are written to benchmarks.md and README.md."""
    from kata.author import bench as benching

    benching.main(root(), times, wanted or [])


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
