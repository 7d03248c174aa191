"""What a failure is told as: which call, which line, which rank, which module."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kata.attempt import modules, outcome, wire
from kata.attempt.outcome import Attempted, Done, Job, Problem
from kata.judge import absent, detail
from kata.judge.calls import judged_call
from kata.testing import assert_close

ROOT = Path(__file__).parents[2]


# --- which call was judged -----------------------------------------------------------------------


def attempts(*results):
    """Attempts of one spec with what they gave."""
    return [
        (Attempted(Job("spec", f"run_{i}", b"", 0), []), wire.decode(wire.encode(result)))
        for i, result in enumerate(results)
    ]


def judged(given, actual, expected):
    with pytest.raises(AssertionError) as raised:
        assert_close(actual, expected)
    found = judged_call(given, raised.value)
    return found and found.job.run


def test_the_call_is_the_one_whose_result_was_judged():
    given = attempts(torch.ones(2), torch.ones(2), np.ones(3), 1.5, [torch.ones(4), {"a": "text"}])
    one, two, three, four, five = (result for _, result in given)

    assert judged(given, one, torch.zeros(2)) == "run_0"
    assert judged(given, two, torch.zeros(2)) == "run_1"
    assert judged(given, three, np.zeros(3)) == "run_2"
    assert judged(given, four, 2.5) == "run_3"
    assert judged(given, five, 0) == "run_4"
    assert judged(given, five[1]["a"], "other") == "run_4"


def test_a_part_or_a_view_of_a_result_is_known_by_its_memory():
    given = attempts(torch.ones(2, 3), np.ones((2, 3)), [torch.ones(4), 1])
    tensor, array, items = (result for _, result in given)

    assert judged(given, tensor[1:].T, None) == "run_0"
    assert judged(given, tensor.numpy()[0], None) == "run_0"
    assert judged(given, array[::-1, 1:], None) == "run_1"
    assert judged(given, torch.from_numpy(array), None) == "run_1"
    assert judged(given, items[0][2:], None) == "run_2"
    assert judged(given, {"x": [items[0]]}, None) == "run_2"


def test_of_several_the_part_that_differs_decides():
    given = attempts(torch.ones(2), torch.ones(2))
    one, two = (result for _, result in given)

    assert judged(given, [one, two], [torch.ones(2), torch.zeros(2)]) == "run_1"


@pytest.mark.parametrize("value", [None, True, 7, "", "x", (), torch.float32])
def test_what_python_has_only_one_of_tells_nothing(value):
    assert judged(attempts(value, 1.5), value, [1]) is None


def test_what_was_computed_from_results_and_other_errors_tell_nothing():
    given = attempts(torch.ones(2), torch.ones(0))

    assert judged(given, given[0][1] + 1, None) is None
    assert judged(given, torch.ones(0), None) is None
    assert judged_call(given, AssertionError("x")) is None


# --- which line ----------------------------------------------------------------------------------


def raised_by(tmp_path, text, call=None):
    path = tmp_path / "ex81_fused_softmax.py"
    path.write_text(text)
    try:
        call(modules.load(path))
    except BaseException as error:
        return outcome.problem(error, {str(path)})
    raise AssertionError("nothing was raised")


KERNEL = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import sys
sys.path.insert(0, {folder!r})
import torch
from pathlib import Path
from kata.attempt import modules, outcome
module = modules.load(Path({path!r}))
try:
    module.softmax(torch.randn(3, 20))
except Exception as error:
    problem = outcome.problem(error, {{{path!r}}})
    print(problem.types[0], problem.message, problem.frames[-1].line, problem.frames[-1].text)
"""


@pytest.mark.parametrize(
    ("old", "new", "says", "line"),
    [
        (
            "tl.sum(numerator, axis=0)",
            "tl.summ(numerator, axis=0)",
            "AttributeError: module 'triton.language' has no attribute 'summ'",
            "out = numerator / tl.summ(numerator, axis=0)",
        ),
        (
            "x.to(tl.float32)\n        numerator",
            "x.to(tl.float32) + tl.arange(0, 64)\n        numerator",
            "ValueError: Cannot make_shape_compatible",
            "x = x.to(tl.float32) + tl.arange(0, 64)",
        ),
    ],
)
def test_an_error_in_a_kernel_points_into_the_kernel_in_its_own_words(
    tmp_path, old, new, says, line
):
    pytest.importorskip("triton")
    solution = (ROOT / "solutions/ex81_fused_softmax.py").read_text("utf-8")
    path = tmp_path / "ex81_fused_softmax.py"
    path.write_text(solution.replace(old, new))
    number = path.read_text().splitlines().index(f"        {line}") + 1

    code = KERNEL.format(folder=str(ROOT / "src"), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.startswith(f"InterpreterError {says}"), done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(f"{number} {line}")


def test_where_a_library_raised_it_its_cause_in_the_file_counts_too(tmp_path):
    text = """
        import json
        def run(wrap):
            def inner(text):
                raise KeyError("missing")
            wrap(inner)
    """

    def wrapped(function):
        try:
            function("")
        except KeyError as error:
            raise RuntimeError("a library's own words") from error

    found = raised_by(
        tmp_path, "\n".join(line[8:] for line in text.splitlines()), lambda m: m.run(wrapped)
    )

    assert found.message == "a library's own words"
    assert [frame.function for frame in found.frames] == ["run", "inner"]


def test_an_error_that_the_code_raised_itself_shows_its_own_way_only(tmp_path):
    text = (
        "def run():\n    try:\n        helper()\n    except KeyError as error:\n"
        "        raise ValueError('mine') from error\n\ndef helper():\n    raise KeyError(1)\n"
    )
    found = raised_by(tmp_path, text, lambda m: m.run())

    assert [frame.line for frame in found.frames] == [5]


def test_an_error_whose_words_fail_is_told_all_the_same(tmp_path):
    text = (
        "class Bad(Exception):\n    def __str__(self):\n        raise ValueError\n\n"
        "def run():\n    raise Bad\n"
    )
    found = raised_by(tmp_path, text, lambda m: m.run())

    assert (found.types[0], found.message) == ("Bad", "its message cannot be read")


# --- a file that cannot be read ------------------------------------------------------------------


def unreadable(path):
    try:
        modules.load(path)
    except (Exception, SystemExit) as error:
        return detail.unreadable(outcome.problem(error, {str(path)}), path, ROOT)


@pytest.mark.parametrize(
    ("text", "message", "frames"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax", [(1, "def f(:\n      ^")]),
        ("def f():\nreturn 1\n", "IndentationError: expected an indented block", [(2, "ret")]),
        ("x = 1 / 0\n", "ZeroDivisionError: division by zero", [(1, "x = 1 / 0")]),
        ("import sys; sys.exit(3)\n", "SystemExit: 3", [(1, "import sys; sys.exit(3)")]),
        ("import nunpy\n", "there is no module nunpy; did you mean numpy?", [(1, "import n")]),
        (
            "from torch import Tensr\n",
            "ImportError: cannot import name 'Tensr' from 'torch'",
            [(1, "from torch import Tensr")],
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_failure(tmp_path, text, message, frames):
    path = tmp_path / "ex05_doubling.py"
    path.write_text(text)

    found = unreadable(path)

    assert found.kind == "unreadable" and found.message.startswith(message)
    assert "(/" not in found.message
    assert [frame.line for frame in found.frames] == [line for line, _ in frames]
    assert all(f.text.startswith(t) for f, (_, t) in zip(found.frames, frames, strict=True))


def test_bytes_that_are_no_text_are_one_failure(tmp_path):
    path = tmp_path / "ex05_doubling.py"
    path.write_bytes(b"x = '\xff'\n")

    found = unreadable(path)

    assert found.kind == "unreadable" and "utf-8" in found.message
    assert found.frames[0].file == str(path)


# --- which rank ----------------------------------------------------------------------------------


def complaint(problem, *raised):
    done = [Done(problem=p) for p in raised]
    return detail._complaint(problem, [Attempted(Job("s", "run", b"", 0, len(done)), done)], ROOT)


def test_a_problem_says_on_which_rank_it_was():
    two = Problem(["ValueError", "Exception"], "no", [], 2)

    assert complaint(two, None, None, two, None) == "on rank 2: ValueError: no"
    assert complaint(Problem(["ValueError"], "no"), None) == "ValueError: no"
    assert complaint(Problem(["ValueError"], "", [], 0), None) == "on rank 0: ValueError"


def test_a_problem_of_every_rank_is_told_once():
    every = [Problem(["ValueError"], "no", [], rank) for rank in range(4)]
    other = Problem(["RankWaits"], "rank 1 waits", [], 1)

    assert complaint(every[0], *every) == "on each of 4 ranks: ValueError: no"
    assert complaint(every[0], every[0], other) == "on rank 0: ValueError: no"


def test_what_names_its_rank_by_itself_is_not_told_twice():
    dead = Problem(["RankDied"], "rank 1 was ended by SIGKILL and gave no result", [], 1)

    assert complaint(dead, None, dead) == dead.message


# --- which module --------------------------------------------------------------------------------


@pytest.fixture
def listing(tmp_path):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions/ex40_rope.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = ['scikit-learn>=1.5', 'quite-absent>=2', "
        "'for-others; sys_platform == \"none\"']\n"
        "[project.optional-dependencies]\ndev = ['only-for-authors']\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("sklearn", "there is no module sklearn; to install it: pip install scikit-learn"),
        ("quite_absent.part", "there is no module quite_absent; to install it: pip install quite"),
        ("for_others", 'there is no module for_others; it needs sys_platform == "none"'),
        ("nunpy", "there is no module nunpy; did you mean numpy?"),
        ("tourch.nn", "there is no module tourch.nn; did you mean torch?"),
        ("maths", "there is no module maths; did you mean math?"),
        ("ex40_roop", "there is no module ex40_roop; did you mean ex40_rope?"),
        ("torch.nn.functionals", "there is no module torch.nn.functionals; did you mean torch.nn."),
        ("only_for_authors", "there is no module only_for_authors"),
        ("xqzwkj", "there is no module xqzwkj"),
    ],
)
def test_pip_is_offered_for_what_the_project_lists_and_for_nothing_else(
    listing, monkeypatch, module, says
):
    monkeypatch.setattr(absent, "_is_there", lambda top: top == "torch")
    told = absent.advice(module, listing)

    assert told.startswith(says)
    assert ("pip" in told) == ("pip" in says)
    assert absent.plainly(f"No module named '{module}'", listing) == told


def test_every_dependency_of_ours_is_offered_under_the_name_of_its_module(monkeypatch):
    monkeypatch.setattr(absent, "_is_there", lambda top: False)
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
    for name in re.findall(r'"([\w-]+)', listed):
        module = {"scikit-learn": "sklearn"}.get(name, name)
        assert absent.advice(module, ROOT).endswith(f"pip install {name}") or os.name != "posix"


def test_other_messages_stay_as_they_are():
    assert absent.plainly("cannot import name 'x' from 'y'", ROOT) == (
        "cannot import name 'x' from 'y'"
    )
