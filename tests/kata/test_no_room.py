"""A full disk and a read-only checkout: a verdict comes all the same."""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from kata.course import cache as caches
from kata.course import catalog, variants

SOURCES = Path(__file__).parents[2] / "src"

PROJECT = {
    "solutions/ex05_doubling.py": '''"""Exercise 05: doubling."""


def double(x):
    """Twice x."""
    # solution
    return 2 * x
''',
    # Slow enough for what its replays give to be kept as well.
    "exercises/ex05_doubling.py": """import time


def double(x):
    time.sleep(0.01)
    return 3 * x
""",
    "tests/test_ex05_doubling.py": """import torch
from kata.testing import assert_close


def double(ex, x):
    return ex.double(x)


def test_doubles_a_tensor(attempt, rng):
    x = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    assert_close(attempt(double, x), x + x)


def test_doubles_nothing(attempt):
    assert_close(attempt(double, torch.zeros(2)), torch.zeros(2))
""",
    "mistakes/ex05_doubling.toml": """[[mistake]]
says = "It is tripled."
swap = [["2 * x", "3 * x"]]
""",
    "lessons/ex05_doubling.md": """<details><summary>1</summary>
Add it to itself.
</details>
<details><summary>2</summary>
Count on.
</details>
""",
}
HALF = """def double(x):
    if x.any():
        raise NotImplementedError("exercise 05 is not written yet")
    return x
"""
READ_ONLY = "mount --bind . . && cd $PWD && mount -o remount,bind,ro $PWD"
FULL = """mkdir ../disk && mount -t tmpfs -o size=1m none ../disk && cp -r . ../disk && cd ../disk
! dd if=/dev/zero of=filler bs=512 2>../dd"""


@pytest.fixture
def root(tmp_path):
    for name, text in PROJECT.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "project"


def mounted(root, mounts, *commands):
    """What commands print in a mount namespace of their own. Root would ignore modes of files."""
    if why := refusal():
        pytest.skip(f"mounting is not allowed here: {why}")
    return printed(root, "set -e", mounts, "set +e", *commands, inside=unshare())


def printed(root, *commands, inside=()):
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCES),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(root.parent / "tmp"),
        "COLUMNS": "400",
        "KATA": f"{sys.executable} -m kata",
    }
    done = subprocess.run(
        [*inside, "sh", "-c", "\n".join(commands)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def unshare():
    return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


@cache
def refusal():
    """Why mounting is refused; empty if it isn't."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [*unshare(), "mount", "-t", "tmpfs", "none", folder]
            return subprocess.run(command, capture_output=True, text=True).stderr.strip()
        except FileNotFoundError as error:
            return str(error)


def test_a_read_only_checkout_gives_verdict_name_and_warning(root):
    told = mounted(root, READ_ONLY, "$KATA run 05", "echo status $?")

    assert "05 doubling  not yet, 1 of 2 specs" in told
    assert "It is tripled." in told
    warning = "the run was not written down: Read-only file system (.kata/runs.jsonl)"
    assert told.count(warning) == 1
    assert told.endswith("status 1\n")
    assert sorted(path.name for path in root.iterdir()) == [
        "exercises", "lessons", "mistakes", "solutions", "tests"
    ]  # fmt: skip


def test_a_full_disk_gives_a_verdict_and_a_warning(root):
    told = mounted(
        root, FULL, "$KATA run 05", "echo status $?", "rm filler", "$KATA run 05",
        "wc -l .kata/runs.jsonl", "find .kata .cache -type f -size 0 -name '*.py'",
    )  # fmt: skip

    first, second = told.split("status 1\n")
    assert "05 doubling  not yet, 1 of 2 specs" in first
    warning = "the run was not written down: No space left on device (.kata/runs.jsonl)"
    assert first.count(warning) == 1
    assert "It is tripled." in second
    assert "not written down" not in second
    assert second.endswith("1 .kata/runs.jsonl\n")


def test_a_record_that_can_not_be_read_costs_no_verdict(root):
    told = printed(root, "mkdir -p .kata/runs.jsonl", "$KATA run 05", "$KATA", "echo status $?")

    assert "05 doubling  not yet, 1 of 2 specs" in told
    assert "the run was not written down: Is a directory (.kata/runs.jsonl)" in told
    assert told.endswith("status 2\n")


def test_a_run_that_reads_no_spec_is_written_down_in_its_project_not_where_pytest_was_called(root):
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (root / "tests/test_ex05_doubling.py").write_text("def (:\n")
    (root.parent / "elsewhere").mkdir()
    pytest_there = f"{sys.executable} -m pytest -q -p kata.plugin -p no:cacheprovider"
    printed(root, "cd ../elsewhere", f"{pytest_there} {root}/tests || true")

    assert not any((root.parent / "elsewhere").iterdir())
    assert "doubling | failing | 0/0 | 1 |" in (root / "progress.md").read_text()


def test_the_row_of_a_half_written_file_says_how_far_it_is(root):
    (root / "exercises/ex05_doubling.py").write_text(HALF)
    told = printed(root, "$KATA run 05", "cat progress.md")

    assert "05 doubling  begun, 1 of 2 specs" in told
    assert "| [05](lessons/ex05_doubling.md) doubling | begun | 1/2 | 1 |" in told
    assert "**0 passed** | 1/2 | 1 |" in told


def test_the_map_and_hints_ask_for_no_room(root):
    told = mounted(root, READ_ONLY, "$KATA && $KATA hint 05 && $KATA hint 05", "echo status $?")

    assert "05 doubling" in told
    assert told.count("Add it to itself.") == told.count("Count on.") == 1
    assert told.endswith("status 0\n")


@pytest.mark.parametrize("command", ["note 05 mine", "diff 05 --give-up", "reset 05"])
def test_a_command_that_must_write_says_in_a_line_why_it_can_not(root, command):
    told = mounted(root, READ_ONLY, f"$KATA {command}", "echo status $?")

    assert "Read-only file system" in told
    assert told.endswith("status 2\n")
    assert len(told.splitlines()) == 2


def test_a_version_of_the_solution_is_written_elsewhere_where_the_checkout_is_read_only(root):
    code = (
        "import kata.course.variants as v, kata.course.catalog as c; e = c.find(c.Path.cwd(), 5); "
    )
    code += "print(v.write(e, v.load(e).mistake[0]))"
    told = mounted(root, READ_ONLY, f"{sys.executable} -c '{code}'")

    path = Path(told.strip())
    assert path.is_relative_to(root.parent / "tmp" / f"kata-{os.getuid()}")
    assert "3 * x" in path.read_text()


# --- the folder of caches ------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    caches._temporary.cache_clear()
    yield folder
    caches._temporary.cache_clear()


def blocked(root):
    """A project in which no cache can be kept, for root too."""
    root.mkdir()
    (root / ".cache").write_text("in the way")
    return root


def test_a_cache_is_kept_in_the_project_where_that_can_be_written(tmp_path, temporary):
    assert caches.folder(tmp_path, "a", "b") == tmp_path / ".cache" / "kata" / "a" / "b"
    assert caches.folder(tmp_path, "a", "b").is_dir()
    assert not any(temporary.iterdir())


def test_else_in_a_folder_of_this_user_one_for_each_project(tmp_path, temporary):
    one, other = (caches.folder(blocked(tmp_path / name), "a") for name in ("one", "other"))

    assert one != other
    assert one.is_dir() and other.is_dir()
    (mine,) = temporary.iterdir()
    assert one.is_relative_to(mine)
    assert mine.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["link", "open to all", "file"])
def test_a_folder_that_another_may_have_made_is_not_used(tmp_path, temporary, trap):
    path = temporary / f"kata-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    if trap == "link":
        path.symlink_to(tmp_path / "theirs")
    elif trap == "file":
        path.write_text("")
    else:
        path.mkdir()
        path.chmod(0o777)

    folder = caches.folder(blocked(tmp_path / "one"), "a")

    assert not folder.is_relative_to(path)
    assert not any((tmp_path / "theirs").iterdir())
    assert folder.is_dir() == (trap != "file")


def test_a_cache_that_can_be_kept_nowhere_is_an_os_error_only_when_written(tmp_path, monkeypatch):
    caches._temporary.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))

    folder = caches.folder(blocked(tmp_path / "one"), "a")

    with pytest.raises(OSError):
        caches.write(folder / "x", b"x")


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def stop(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="full"):
        caches.write(tmp_path / "x", b"x")

    assert not any(tmp_path.iterdir())


def test_a_version_that_a_crash_left_empty_is_written_again(root):
    exercise = catalog.find(root, 5)
    (mistake,) = variants.load(exercise).mistake
    path = variants.write(exercise, mistake)
    path.write_bytes(b"")

    assert variants.write(exercise, mistake) == path
    assert "3 * x" in path.read_text()
