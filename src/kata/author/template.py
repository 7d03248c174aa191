"""`kata new`: the floors of an exercise that is to be written."""

from __future__ import annotations

from pathlib import Path

from kata.course.catalog import Exercise, exercises
from kata.course.stubs import make_stub

SOLUTION = '''\
"""Exercise {number}: {title}.

Why anybody wants it, in two sentences, and the equation:

    y = f(x)

Source: authors, year, "Title", equation, link
"""

from torch import Tensor


def {slug}(x: Tensor) -> Tensor:
    """Say in one line what it gives.

    x:       (..., d_model)
    returns: (..., d_model), dtype of x
    """
    # solution
    return x
'''

SPECS = '''\
"""Specs for exercise {number}: {title}."""

import pytest
import torch

from kata.testing import assert_close

pytestmark = pytest.mark.cpu


def run(ex, x):
    return ex.{slug}(x)


def test_says_in_a_sentence_what_is_right(attempt, rng):
    x = torch.randn(2, 3, generator=rng, dtype=torch.float64)

    out = attempt(run, x)

    assert_close(out, x)
'''

MISTAKES = """\
[[mistake]]
says = "The input is negated."
swap = [["return x", "return -x"]]

[[accept]]
says = "Returns a copy."
swap = [["return x", "return x.clone()"]]
"""

LESSON = """\
# {number} {title}

The idea in three sentences. The equation with its shapes. An example small enough to do by hand.
Where the trap is.

## Hints

<details><summary>Hint 1</summary>

A nudge.

</details>

<details><summary>Hint 2</summary>

A step.

</details>

<details><summary>Hint 3</summary>

Nearly the answer.

</details>

## After it passes

- What to notice, and what else to try.

## Reading

- The source.
"""


def make(root: Path, number: int, slug: str) -> list[Path]:
    """Write the floors; nothing that is there is touched."""
    if not 1 <= number <= 99:
        raise ValueError(f"an exercise has a number from 1 to 99, got {number}")
    if not slug.isidentifier() or slug != slug.lower():
        raise ValueError(f"a slug is like fused_softmax: small letters, digits and _, got {slug!r}")
    taken = [e.stem for e in exercises(root) if e.number == number]
    if taken:
        raise ValueError(f"number {number:02d} is taken by {taken[0]}")
    exercise = Exercise(root, f"ex{number:02d}_{slug}")
    words = {"number": f"{number:02d}", "slug": slug, "title": slug.replace("_", " ")}
    solution = SOLUTION.format(**words)
    floors = {
        exercise.solution: solution,
        exercise.stub: make_stub(solution, number),
        exercise.spec: SPECS.format(**words),
        exercise.mistakes: MISTAKES,
        exercise.lesson: LESSON.format(**words),
    }
    for path, text in floors.items():
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return list(floors)
