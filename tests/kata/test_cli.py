"""The commands, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kata.learn import terminal

ROOT = Path(__file__).parents[2]


def kata(project, *args, width=100, status=0, **environment):
    env = os.environ | {"COLUMNS": str(width), "NO_COLOR": "1"} | environment
    command = [sys.executable, "-m", "kata", *args]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == status, out + err
    assert "Traceback" not in err and "UnicodeEncodeError" not in out + err
    return out


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


def test_what_is_begun_is_begun_in_the_verdict_on_the_map_and_in_progress_md(project):
    file, solved = (project / name / "ex01_softmax.py" for name in ("exercises", "solutions"))
    text, whole, last = file.read_text(), solved.read_text(), "def log_softmax("
    file.write_text(whole[: whole.index(last)] + text[text.index(last) :])

    begun = re.search(
        r"01 softmax  begun, (\d+) of (\d+) specs", kata(project, "run", "1", status=1)
    )
    assert begun and 0 < int(begun[1]) < int(begun[2])
    assert begun[0] in kata(project)
    page = (project / "progress.md").read_text()
    assert f"softmax | begun | {begun[1]}/{begun[2]}" in page


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


def test_reset_keeps_nothing_aside_where_the_stub_is_a_fresh_one(project):
    before = stub(project).read_bytes()
    out = kata(project, "reset", "31")

    assert "is a fresh stub already" in out
    assert [path.name for path in stub(project).parent.glob("ex31*")] == [stub(project).name]
    assert stub(project).read_bytes() == before


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
    assert "5 passed, 0 failed" in out


def test_a_submission_is_judged_from_wherever_the_user_stands(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(ROOT / "solutions/ex01_softmax.py", elsewhere / "mine.py")

    out = kata(elsewhere, "run", "1", "--submission", "mine.py")
    assert "01 softmax  passed" in out
    out = kata(elsewhere, "run", "1", "--submission=mine.py", "-k", "ratio", status=0)
    assert "configfile: pyproject.toml" in out and f"rootdir: {ROOT}" in out
    refused = kata(elsewhere, "run", "1", "--submission", "other.py", status=2)
    assert "there is no submission" in refused
    assert not (elsewhere / "progress.md").exists() and not (elsewhere / ".kata").exists()
    (project / "sub").mkdir()
    shutil.copy(elsewhere / "mine.py", project / "sub")
    assert "01 softmax  passed" in kata(project / "sub", "run", "1", "--submission", "mine.py")
    assert not (project / "progress.md").exists()


def test_choosing_specs_brings_no_warning_of_pytests(project):
    shutil.copy(ROOT / "pyproject.toml", project)
    out = kata(project, "run", "31", "-k", "mask", status=1)

    assert re.search(r"\d+ deselected", out) and "Warning" not in out


@pytest.mark.parametrize(
    ("named", "ours", "theirs"),
    [((), True, False), (("tests",), True, False), ((".",), True, False),
     (("tests/kata",), False, True), (("tests/kata/test_runner.py",), False, True)],
)  # fmt: skip
def test_pytest_collects_the_exercises_specs_and_the_runners_tests_where_named(
    project, named, ours, theirs
):
    shutil.copy(ROOT / "pyproject.toml", project)
    (project / "tests/kata").mkdir()
    (project / "tests/kata/test_runner.py").write_text("def test_it():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *named]
    out = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout

    assert ("test_ex01_softmax.py::" in out) == ours
    assert ("test_runner.py::" in out) == theirs


ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LANG": "C", "LC_ALL": ""},
    {"LC_ALL": "POSIX"},
    {"TERM": "dumb"},
]


@pytest.mark.parametrize("environment", ASCII, ids=lambda e: "-".join(e))
def test_a_terminal_that_knows_ascii_alone_gets_stand_ins(project, environment):
    map_of_all = kata(project, **environment)
    help_and_error = (
        kata(project, "--help", **environment),
        kata(project, "run", "é", status=2, **environment),
    )

    assert "o 31 scaled dot-product attention" in map_of_all
    assert map_of_all.isascii() and help_and_error[0].isascii()


def test_every_command_works_on_a_terminal_that_knows_ascii_alone(project):
    def shown(*args, **more):
        out = kata(project, *args, PYTHONIOENCODING="ascii", **more)
        assert out.isascii()
        return out

    assert " o lets a query" in shown("run", "31", status=1)
    solve(project)
    stub(project).write_text(stub(project).read_text().replace(" / math.sqrt(q.shape[-1])", ""))
    text = shown("run", "31", status=1)
    assert " X averages" in text and "divided by sqrthead_dim" in text
    assert "mu " in text and "sigma " in text
    assert "deselected" in shown("run", "31", "-k", "mask_allows", status=1)
    solve(project)
    assert " ok averages" in shown("run", "31")
    for args in (["hint", "31"], ["diff", "31"], ["note", "31", "größer — ✓"], ["reset", "31"]):
        shown(*args)
    assert "größer — ✓" in (project / "progress.md").read_text("utf-8")


def test_junit_files_are_utf_8_whatever_the_terminal_is(project):
    with (project / "tests/test_ex01_softmax.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef test_sees_α():\n    assert '√' == 'α'\n")
    kata(project, "run", "1", "--junitxml=out.xml", status=1, PYTHONIOENCODING="ascii")

    assert "test_sees_α" in (project / "out.xml").read_text("utf-8")


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


def test_every_sign_that_we_write_has_a_stand_in(monkeypatch):
    monkeypatch.setattr(terminal.sys, "stdout", None)
    monkeypatch.setattr(terminal.sys, "stderr", None)
    terminal.prepare()
    files = [p for name in ("lessons/*.md", "src/kata/**/*.py") for p in ROOT.glob(name)]
    signs = {sign for path in files for sign in path.read_text("utf-8")}
    shown = {s: s.encode("ascii", "kata").decode() for s in signs if not s.isascii()}

    assert len(shown) > 100
    assert {s for s, text in shown.items() if "?" in text} <= set("�日🙂語本")
    assert shown["✓"] == "ok" and shown["√"] == "sqrt" and shown["α"] == "alpha"
    assert "é²…─│┌﹏ᵀ".encode("ascii", "kata") == b"e2...-|+_T"


def test_a_dumb_terminal_is_as_wide_as_it_says(monkeypatch):
    for name, value in (("TERM", "dumb"), ("COLUMNS", "60"), ("LINES", "20")):
        monkeypatch.setenv(name, value)

    assert terminal.console().size == (60, 20)


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False), ({"LANG": "C"}, True), ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),
        ({"LC_CTYPE": "C.UTF-8"}, False), ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, True),
        ({"LC_ALL": "C.UTF-8", "LANG": "C"}, False), ({"LANG": "en_US.UTF-8"}, False),
        ({"TERM": "dumb", "LANG": "en_US.UTF-8"}, True), ({"TERM": "xterm"}, False),
    ],
)  # fmt: skip
def test_a_terminal_says_what_it_knows(environment, alone):
    assert terminal.ascii_alone(environment) == alone
