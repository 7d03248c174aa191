"""The floors: finds exercises, titles, chapters and suites. The file names are the registry."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CHAPTERS = (
    "Arrays",
    "Autograd and training",
    "Sequences and tokens",
    "Attention to GPT and BERT",
    "The Llama family",
    "Experts and serving",
    "Diffusion",
    "Sharding",
    "Triton kernels",
    "Scale",
)

STEM = re.compile(r"ex(\d\d)_(\w+)")
TITLE = re.compile(r'"""([^"\\\n]*\w[^"\\\n]*)(?:""")?[ \t]*\n')  # a docstring's first line


class UnknownExercise(LookupError):
    """Nothing of this number or name; the message offers the nearest ones."""


@dataclass(frozen=True)
class Exercise:
    """One column of files with one stem."""

    root: Path
    stem: str

    @property
    def number(self) -> int:
        return int(self.stem[2:4])

    @property
    def slug(self) -> str:
        return self.stem[5:]

    @property
    def chapter(self) -> int:
        return self.number // 10

    @property
    def stub(self) -> Path:
        return self.root / "exercises" / f"{self.stem}.py"

    @property
    def solution(self) -> Path:
        return self.root / "solutions" / f"{self.stem}.py"

    @property
    def spec(self) -> Path:
        return self.root / "tests" / f"test_{self.stem}.py"

    @property
    def mistakes(self) -> Path:
        return self.root / "mistakes" / f"{self.stem}.toml"

    @property
    def lesson(self) -> Path:
        return self.root / "lessons" / f"{self.stem}.md"

    @property
    def figure(self) -> Path:
        return self.root / "figures" / f"{self.stem}.py"

    @property
    def race(self) -> Path:
        return self.root / "races" / f"{self.stem}.py"

    @cached_property
    def title(self) -> str:
        """What the solution's docstring says after "Exercise NN: ", without its full stop."""
        text = self.solution.read_text("utf-8")
        if plain := TITLE.match(text):  # to parse all of it takes 3 ms, and the map shows 99
            first = plain[1].strip()
        else:
            first = (ast.get_docstring(ast.parse(text)) or self.slug).splitlines()[0]
        return first.partition(": ")[2].rstrip(".") or first

    @cached_property
    def suites(self) -> frozenset[str]:
        """The pytest marks of the whole spec file: `pytestmark = pytest.mark.cpu`, or a list."""
        for node in ast.parse(self.spec.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                return frozenset(re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node.value)))
        return frozenset({"cpu"})

    @cached_property
    def imports(self) -> frozenset[str]:
        """The packages that the solution and its specs import, anywhere in them."""
        return frozenset(name.partition(".")[0] for name in self.modules)

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that they import, by their whole names."""
        return imported(self.solution) | imported(self.spec)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The stems of the earlier exercises that this one builds on, and that they build on."""
        found: dict[str, None] = {}
        waiting = sorted(name for name in self.imports if STEM.fullmatch(name))
        while waiting:
            stem = waiting.pop(0)
            if stem not in found and stem != self.stem:
                found[stem] = None
                part = Exercise(self.root, stem)
                waiting += sorted(n for n in imported(part.solution) if STEM.fullmatch(n))
        return tuple(found)

    def section(self, heading: str) -> str:
        """A section of the lesson, without its heading; empty if it has none of this name."""
        text = self.lesson.read_text("utf-8") if self.lesson.exists() else ""
        match = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        return match[1].strip() if match else ""

    @property
    def hints(self) -> list[str]:
        """The lesson's hints, from a nudge to nearly the answer."""
        text = self.lesson.read_text("utf-8") if self.lesson.exists() else ""
        pattern = r"<details>\s*<summary>.*?</summary>(.*?)</details>"
        return [hint.strip() for hint in re.findall(pattern, text, re.S)]


def imported(path: Path) -> frozenset[str]:
    """The whole names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return frozenset(names)


def find_root(start: Path) -> Path:
    """The nearest folder at or above `start` that holds the floors."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "exercises").is_dir() and (folder / "solutions").is_dir():
            return folder
    raise FileNotFoundError(
        f"no exercises/ and solutions/ in {start} or above it: run this inside the project's folder"
    )


def exercises(root: Path) -> list[Exercise]:
    """All exercises that have a solution, by number."""
    return [
        Exercise(root, path.stem)
        for path in sorted((root / "solutions").glob("ex[0-9][0-9]_*.py"))
        if STEM.fullmatch(path.stem)
    ]


def of_spec(path: Path) -> Exercise | None:
    """The exercise whose specs stand in this file, if it is a spec file."""
    stem = path.stem.removeprefix("test_")
    if path.stem == stem or not STEM.fullmatch(stem):
        return None
    return Exercise(path.resolve().parent.parent, stem)


def find(root: Path, wanted: str | int) -> Exercise:
    """An exercise by number (7, 07), slug, stem or one of its file names."""
    known = exercises(root)
    word = Path(str(wanted)).stem.removeprefix("test_").removeprefix("exercise-").lower()
    number = re.fullmatch(r"(?:ex)?(\d{1,2})", word)
    for exercise in known:
        if number and exercise.number == int(number[1]):
            return exercise
        if word in (exercise.slug, exercise.stem):
            return exercise
    if number:
        near = sorted(known, key=lambda e: abs(e.number - int(number[1])))[:3]
    else:
        names = [e.slug for e in known]
        slugs = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
        slugs += [n for n in names if word in n and n not in slugs]
        near = [e for slug in slugs for e in known if e.slug == slug]
    offered = ", ".join(f"{e.number:02d} {e.slug}" for e in near)
    raise UnknownExercise(
        f"no exercise {wanted}" + (f"; the nearest are {offered}" if offered else "; see `kata`")
    )
