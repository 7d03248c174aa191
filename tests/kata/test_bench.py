"""Races and the table of speeds."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kata import racing
from kata.author import bench, rows, saves
from kata.course import catalog

ROOT = Path(__file__).parents[2]

RACE = '''
"""Softmax of some rows."""

import numpy as np

from kata.racing import Race
from test_ex01_softmax import oracle

X = np.arange(12.0).reshape(3, 4)


def race(ex):
    for n in (1, 2):
        library = {"torch": lambda: oracle("softmax", X, -1)}
        yield Race(f"{n} times", lambda: ex.softmax(X), library, amount=n, unit="rows/s")
'''


@pytest.fixture
def softmax(project):
    """Exercise 01, with a race."""
    exercise = catalog.find(project, 1)
    exercise.race.parent.mkdir()
    exercise.race.write_text(RACE)
    return exercise


def kata(folder, *args):
    command = [sys.executable, "-m", "kata", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_every_race_belongs_to_an_exercise():
    known = {exercise.race for exercise in catalog.exercises(ROOT)}
    assert [path for path in (ROOT / "races").glob("*.py") if path not in known] == []


# Those that take seconds. One builds on an earlier exercise, one forks ranks.
@pytest.mark.parametrize("number", [25, 72])
def test_a_race_of_the_course_runs_and_its_entrants_agree(number):
    for result in racing.results(catalog.find(ROOT, number), times=1):
        assert len(result.values) > 1 and min(result.values.values()) > 0


# --- a race --------------------------------------------------------------------------------------


def test_entrants_run_in_turn_and_the_first_lap_does_not_count():
    order, takes = [], {"a": iter([9, 1, 2, 1]), "b": iter([9, 5, 7, 6])}

    def entrant(name):
        def run():
            order.append(name)
            return next(takes[name])

        return run

    found = racing.medians({name: entrant(name) for name in takes}, 3, measure=lambda run: run())

    assert order == ["a", "b"] * 4
    assert found == {"a": 1, "b": 6}


def test_seconds_are_seconds():
    assert 0.05 <= racing.seconds(lambda: time.sleep(0.05)) < 5


def test_a_race_that_takes_long_ends_after_three_laps(monkeypatch):
    monkeypatch.setattr(racing, "BUDGET", 0.0)
    runs = []

    racing.medians({"a": lambda: runs.append(1)}, times=9)

    assert len(runs) == 1 + 3


def test_entrants_that_give_different_things_are_not_timed():
    with pytest.raises(racing.NotMeasured, match="ours and theirs give different things"):
        racing.medians({"ours": lambda: [1, 2], "nobody": lambda: None, "theirs": lambda: [1]}, 3)


def test_memory_is_the_most_that_is_held_at_once():
    assert racing.megabytes(lambda: sum(len(bytes(10**6)) for _ in range(5))) < 2
    assert racing.megabytes(lambda: [bytes(10**6) for _ in range(5)]) > 5


@pytest.mark.parametrize(("unit", "ratio"), [("s", 0.5), ("ms", 0.5), ("MB", 0.5), ("rows/s", 2)])
def test_a_ratio_says_how_many_times_better_the_first_is(unit, ratio):
    result = racing.Result("softmax", unit, {"reference": 8.0, "torch": 4.0})

    assert str(*rows.of(result, 1)) == (
        f"| softmax, 01 | 8 {unit} | torch | 4 {unit} | {ratio:.2f} × |"
    )


def test_a_learners_code_runs_beside_the_reference_and_the_library(softmax):
    softmax.stub.write_text(softmax.solution.read_text())

    once, twice = racing.results(softmax, 3, yours=softmax.stub)

    assert list(once.values) == ["yours", "reference", "torch"]
    assert twice.what == "2 times" and all(1 < value < 1e7 for value in once.values.values())


def test_the_reference_runs_alone_for_the_table(softmax):
    once, _ = racing.results(softmax, 3)

    assert list(once.values) == ["reference", "torch"]


def test_code_that_is_not_written_or_wrong_has_no_speed(softmax):
    with pytest.raises(racing.NotMeasured, match="exercise 01 is not written yet"):
        racing.results(softmax, 3, yours=softmax.stub)

    right = softmax.solution.read_text()
    softmax.stub.write_text(f"{right}\n\n_softmax = softmax\nsoftmax = lambda x: _softmax(x) * 2\n")
    with pytest.raises(racing.NotMeasured, match="yours and reference give different things"):
        racing.results(softmax, 3, yours=softmax.stub)


# --- the table -----------------------------------------------------------------------------------


def test_one_race_is_printed_and_not_written_down(softmax):
    status, out = kata(softmax.root, "bench", "1", "--times", "3")

    assert status == 0
    assert "| 1 times, 01 | " in out and " rows/s | torch | " in out
    assert not (softmax.root / "benchmarks.md").exists()


def test_what_has_no_race_is_said_at_once(softmax):
    status, out = kata(softmax.root, "bench", "31")

    assert status == 2
    assert "31 has no file in races/; there are also front-door" in out


def test_a_race_that_cannot_run_is_a_row_that_says_why(softmax):
    softmax.race.write_text("def race(ex):\n    raise OSError('no weights here')\n")

    (row,) = bench.race(softmax.root, 3, 1)

    assert "| not measured | OSError: no weights here |" in str(row)


def test_the_table_is_written_and_quoted_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{rows.BEGIN}old\n{rows.END}\nafter\n")

    rows.write(tmp_path, [rows.Row("this", "1 s", "that", "3 s", 3.0)])

    text = readme.read_text()
    assert text.startswith(f"before\n{rows.BEGIN}Measured ") and "old" not in text
    assert text.endswith(f"| this | 1 s | that | 3 s | 3.00 × |\n{rows.END}\nafter\n")
    assert "| this | 1 s | that | 3 s | 3.00 × |\n" in (tmp_path / "benchmarks.md").read_text()


def test_a_readme_without_its_markers_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("all there is\n")

    with pytest.raises(ValueError, match="needs the markers"):
        rows.write(tmp_path, [])

    assert readme.read_text() == "all there is\n"


# --- saves ---------------------------------------------------------------------------------------


def test_a_save_is_timed_to_its_verdict_and_to_its_name(project):
    exercise = catalog.find(project, 1)
    stub = exercise.stub.read_text()

    passing, failing = saves.saves(exercise, saves.right_and_wrong(exercise), 1, [])

    assert all(0 < save.beyond < save.verdict <= save.named for save in (passing, failing))
    assert failing.named > failing.verdict
    assert exercise.stub.read_text() == stub


def test_a_save_that_gives_another_verdict_is_not_timed(project):
    exercise = catalog.find(project, 1)
    right = exercise.solution.read_text()

    with pytest.raises(racing.NotMeasured, match="is passed, and should have failed"):
        saves.saves(exercise, {"failed": right}, 1, [])


def test_the_worst_exercise_is_named(monkeypatch, project, capsys):
    def fake(exercise, texts, times, options):
        n = exercise.number
        return [saves.Save(n / 10, n / 100, n), saves.Save(n / 100, n / 1000, n)]

    monkeypatch.setattr(saves, "saves", fake)

    table = "\n".join(map(str, saves.every_exercise(project, 9)))

    assert (
        "| save to verdict beyond the specs, passing, median of 2 | 0.160 s | the worst, 31 "
        "| 0.310 s |  |" in table
    )
    assert "| verdicts within 1 s, passing | 1 of 2 | asked for | 2 |" in table
    assert "| verdicts within 1 s, failing | 2 of 2 |" in table
    assert "31 passing 3.100 s, beyond its specs 0.310 s" in capsys.readouterr().err


def test_an_exercise_that_cannot_be_timed_has_a_row_that_says_why(monkeypatch, project):
    def fake(exercise, texts, times, options):
        if exercise.number == 31:
            raise racing.NotMeasured("skipped here")
        return [saves.Save(1, 1, 1)] * 2

    monkeypatch.setattr(saves, "saves", fake)

    *_, last = saves.every_exercise(project, 9)

    assert str(last) == "| save to verdict, 31 | not measured | skipped here |  |  |"
