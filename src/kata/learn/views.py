"""What the learner looks at between runs: the map, hints, the solution beside, the picture."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

from rich.console import Group
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kata.course import cache, catalog
from kata.course.catalog import Exercise
from kata.learn import record
from kata.learn.standing import Standing


def map_of(folder: Path) -> Group:
    """Ten chapters, each exercise's state, and what is next."""
    standings = record.standings(folder)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(no_wrap=False)
    marks = {
        "passed": ("●", "green"),
        "failed": ("◐", "red"),
        "begun": ("◔", "yellow"),
        "unwritten": ("○", ""),
    }
    every = catalog.exercises(folder)
    for chapter, title in enumerate(catalog.CHAPTERS):
        own = [e for e in every if e.chapter == chapter]
        table.add_row(Text(str(chapter), "bold"), Text(title, "bold"))
        for e in own:
            standing = standings.get(e.stem)
            mark, style = marks[standing.state if standing else "unwritten"]
            far = ""
            if standing and standing.state in ("begun", "failed"):
                word = "begun" if standing.state == "begun" else "not yet"
                far = f"  {word}, {standing.passed} of {standing.total} specs"
            row = Text.assemble((mark, style), f" {e.number:02d} {e.title}", (far, "dim"))
            table.add_row("", row)
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
    standings: dict[str, Standing] = {}
    with suppress(OSError):  # a verdict asks for this too, and comes all the same
        standings = record.standings(folder)
    every = catalog.exercises(folder)
    start = every.index(exercise) + 1 if exercise in every else 0
    for candidate in every[start:] + every[:start]:
        standing = standings.get(candidate.stem)
        if candidate != exercise and (standing is None or standing.state != "passed"):
            return candidate
    return None


def next_hint(exercise: Exercise) -> Group:
    """One hint more than last time; after the last, the first again."""
    hints = exercise.hints
    if not hints:
        raise ValueError(f"no hints in {exercise.lesson.name}")
    seen = cache.folder(exercise.root, "hints") / exercise.stem
    count = 0
    with suppress(OSError, ValueError):  # none was seen, or the disk was full
        count = int(seen.read_text()) % len(hints)
    with suppress(OSError):
        seen.write_text(str(count + 1))
    return Group(Text(f"Hint {count + 1} of {len(hints)}", "bold"), Markdown(hints[count]))


def must_have_passed(exercise: Exercise) -> None:
    """The solution opens on a pass."""
    standing = record.standings(exercise.root).get(exercise.stem)
    if not (standing and standing.state == "passed"):
        raise ValueError(
            f"exercise {exercise.number:02d} has not passed yet; to see its solution all the same "
            f"(progress.md will say so): kata diff {exercise.number:02d} --give-up"
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


def draw(exercise: Exercise, solution: bool = False) -> Path:
    """Draw into .kata/figures and return the file."""
    if not exercise.figure.exists():
        raise ValueError(f"exercise {exercise.number:02d} has no picture")
    import pytest

    from kata.attempt import modules, warm

    warm.prepare_environment()
    modules.use_parts(exercise.root / "solutions")
    module = modules.load(exercise.solution if solution else exercise.stub)
    try:
        figure = modules.load(exercise.figure, f"figure_{exercise.stem}").draw(module)
    except NotImplementedError as error:
        raise ValueError(f"{error}; the picture is drawn by your own code") from error
    except pytest.skip.Exception as missing:  # weights
        raise ValueError(str(missing)) from missing
    path = exercise.root / ".kata" / "figures" / f"{exercise.stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
