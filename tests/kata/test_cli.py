"""The commands, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys

import pytest


def kata(project, *args, width=100, status=0):
    env = os.environ | {"COLUMNS": str(width), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "kata", *args]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def stub(project):
    return project / "exercises" / "ex31_scaled_dot_product_attention.py"


def solve(project):
    shutil.copy(project / "solutions" / stub(project).name, stub(project))


def test_a_learners_way_through_an_exercise(project):
    assert "○ 31 scaled dot-product attention" in kata(project)
    assert "not written yet" in kata(project, "run", "31", status=1)
    assert "has not passed yet" in kata(project, "diff", "31", status=2)
    assert "Hint 1 of 3" in kata(project, "hint", "31")
    assert "Hint 2 of 3" in kata(project, "hint", "31")

    solve(project)
    stub(project).write_text(stub(project).read_text().replace(" / math.sqrt(q.shape[-1])", ""))
    assert "a known mistake: The scores are not divided" in kata(project, "run", "31", status=1)
    assert "a known mistake" not in (project / "progress.md").read_text()

    solve(project)
    assert "12 of 12 specs" in kata(project, "run", "31") or "passed" in kata(project, "run", "31")
    assert "● 31 scaled dot-product attention" in kata(project)
    assert "next: kata watch 01" in kata(project)
    kata(project, "note", "31", "the scale keeps the softmax off its flat ends")
    page = (project / "progress.md").read_text()
    assert "31: the scale keeps the softmax off its flat ends" in page
    assert re.search(r"scaled dot-product attention \| passed", page)


@pytest.mark.parametrize("width", [60, 160])
def test_diff_shows_both_sides(project, width):
    out = kata(project, "diff", "31", "--give-up", width=width)

    assert "raise NotImplementedError" in out and "torch.softmax" in out
    assert "solution seen" in (project / "progress.md").read_text()


def test_reset_keeps_what_was_there(project):
    stub(project).write_text("mine = 1\n")
    out = kata(project, "reset", "31")

    kept = stub(project).with_name(stub(project).name + ".1")
    assert kept.name in out and kept.read_text() == "mine = 1\n"
    assert "is not written yet" in stub(project).read_text()


def test_stubs_check_fails_where_one_differs_and_making_them_loses_nothing(project):
    assert "every stub is its solution's" in kata(project, "stubs", "--check")
    stub(project).write_text("mine = 1\n")
    assert "differs" in kata(project, "stubs", "--check", status=2)
    kata(project, "stubs")
    assert stub(project).with_name(stub(project).name + ".1").read_text() == "mine = 1\n"
    kata(project, "stubs", "--check")


def test_show_draws_with_the_learners_code(project):
    assert "drawn by your own code" in kata(project, "show", "1", status=2)
    assert "has no picture" in kata(project, "show", "31", status=2)
    out = kata(project, "show", "1", "--solution")
    drawn = project / ".kata" / "figures" / "ex01_softmax.png"
    assert str(drawn) in out.replace("\n", "")
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_exercise_gets_the_nearest_names(project):
    assert "the nearest are 31" in kata(project, "run", "32", status=2)
    assert "01 softmax" in kata(project, "hint", "softmx", status=2)


def test_outside_of_a_project_it_says_where_to_go(tmp_path):
    assert "run this inside the project's folder" in kata(tmp_path, "run", "1", status=2)


def test_new_makes_floors_that_prove_themselves(project):
    kata(project, "new", "7", "linear")
    assert "is taken by ex07_linear" in kata(project, "new", "7", "other", status=2)
    assert "got 'Bad-Name'" in kata(project, "new", "8", "Bad-Name", status=2)
    out = kata(project, "proof", "7")
    assert "4 passed, 0 failed" in out


def test_what_follows_goes_to_pytest(project):
    out = kata(project, "run", "31", "-k", "mask", "--junitxml=out.xml", status=1)

    assert "deselected" in out and (project / "out.xml").exists()


def test_a_damaged_record_is_named_and_the_rest_is_kept(project):
    kata(project, "run", "1", status=1)
    with (project / ".kata" / "runs.jsonl").open("a") as file:
        file.write('{"torn": tr')
    out = kata(project, "run", "1", status=1)
    assert "runs.jsonl:2 is damaged" in out.replace("\n", "")
    assert "| 2 |" in (project / "progress.md").read_text()
