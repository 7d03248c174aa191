"""The file names are the registry."""

from pathlib import Path

import pytest

from kata.course import catalog

ROOT = Path(__file__).parents[2]
EVERY = catalog.exercises(ROOT)


@pytest.mark.parametrize("word", ["7x", "softmx", "soft"])
def test_an_unknown_exercise_gets_the_nearest_names(word):
    with pytest.raises(catalog.UnknownExercise, match=r"softmax|see `kata`"):
        catalog.find(ROOT, word)


def test_an_unknown_number_gets_the_nearest_numbers(project):
    with pytest.raises(catalog.UnknownExercise, match="no exercise 30; the nearest are 31"):
        catalog.find(project, 30)


@pytest.mark.parametrize(
    "word",
    ["1", "01", 1, "ex01", "softmax", "ex01_softmax", "tests/test_ex01_softmax.py", "exercise-1"],
)
def test_finds_an_exercise_by_any_of_its_names(word):
    assert catalog.find(ROOT, word).stem == "ex01_softmax"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ('"""Exercise 05: doubling.\n\nTwice.\n"""\n', "doubling"),
        ('"""Exercise 05: the "big" one."""\n', 'the "big" one'),
        ('"""\nExercise 05: below.\n"""\n', "below"),
        ('# coding: utf-8\n"""Exercise 05: commented."""\n', "commented"),
        ('r"""Exercise 05: raw."""\n', "raw"),
        ('"""Exercise 05: \\u03bb."""\n', "λ"),
        ('"""No number"""  \nx = 1\n', "No number"),
        ('"""not""" + "a docstring"\n', "doubling"),
        ("x = 1\n", "doubling"),
    ],
)
def test_a_title_is_the_docstrings_first_line(tmp_path, text, title):
    (tmp_path / "solutions").mkdir()
    exercise = catalog.Exercise(tmp_path, "ex05_doubling")
    exercise.solution.write_text(text, "utf-8")

    assert exercise.title == title


def test_titles_are_read_without_parsing_the_solutions(monkeypatch):
    monkeypatch.setattr(catalog.ast, "parse", None)

    assert len({exercise.title for exercise in catalog.exercises(ROOT)}) == len(EVERY)


@pytest.mark.parametrize("exercise", EVERY, ids=lambda e: e.stem)
def test_every_floor_is_there(exercise):
    for path in (exercise.stub, exercise.spec, exercise.mistakes, exercise.lesson):
        assert path.exists(), path.name
    assert len(exercise.hints) == 3
    assert exercise.section("After it passes") and exercise.section("Reading")
    assert exercise.suites <= {"cpu", "jax", "multiprocess", "gpu"}


@pytest.mark.parametrize("exercise", EVERY, ids=lambda e: e.stem)
def test_enough_mistakes_and_accepted_versions_are_listed(exercise):
    from kata.course import variants

    known = variants.load(exercise)
    assert len(known.mistake) >= 5 and len(known.accept) >= 2
    says = [v.says for v in (*known.mistake, *known.accept)]
    assert len(set(says)) == len(says)


def test_parts_are_found_through_other_parts():
    assert {"ex40_rope", "ex43_kv_cache"} <= set(catalog.find(ROOT, 44).parts)
