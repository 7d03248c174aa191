"""The front door: nox."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOX = Path(sys.executable).with_name("nox")


@pytest.fixture
def folder(project):
    """A copy with the front door, in the environment that runs this test."""
    for name in ("noxfile.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    (project / "src").symlink_to(ROOT / "src")
    return project


def nox(folder, *args):
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "NOX", "PYTEST"))
    }
    env["VIRTUAL_ENV"] = sys.prefix
    done = subprocess.run([NOX, *args], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_lists_sessions_by_their_titles(folder):
    _, listed = nox(folder, "-l")

    assert "exercise-31 [chapter-3] -> scaled dot-product attention" in listed
    for name in ("cpu", "gpu", "multiprocess", "solutions", "proof", "tests", "lint", "bench"):
        assert f"- {name} -> " in listed


def test_tags_select_a_chapter(folder):
    _, listed = nox(folder, "-l", "-t", "chapter-3")

    assert "* exercise-31" in listed and "- exercise-01" in listed


def test_a_number_without_its_zero_works_and_what_follows_goes_to_pytest(folder):
    status, out = nox(folder, "-s", "exercise-1", "--", "--collect-only", "-q")

    assert "test_ex01_softmax.py::test_" in out
    assert status == 1  # nothing was judged, so nothing has passed


def test_an_unknown_exercise_gets_the_nearest_names(folder):
    status, out = nox(folder, "-s", "exercise-32")

    assert status != 0
    assert "no exercise 32; the nearest are 31" in out and "Traceback" not in out


def test_the_stub_is_not_written_yet_and_a_right_softmax_passes(folder):
    status, out = nox(folder, "-s", "exercise-01")
    assert status == 1 and "not written yet" in out and "Traceback" not in out

    shutil.copy(folder / "solutions/ex01_softmax.py", folder / "exercises")
    status, out = nox(folder, "-s", "exercise-01")
    assert status == 0 and "01 softmax  passed" in out
    assert "softmax | passed" in (folder / "progress.md").read_text()


def test_an_environment_that_lacks_something_says_what(folder, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    env = os.environ | {"VIRTUAL_ENV": str(bare)}
    done = subprocess.run(
        [NOX, "-s", "exercise-01"], cwd=folder, env=env, capture_output=True, text=True
    )

    assert done.returncode != 0
    assert "lacks" in done.stderr and "torch" in done.stderr and "pip install" in done.stderr
