"""What a learner reads: pytest on small projects, and every line of DESIGN's "Bad input"."""

import io
import os
import signal
import textwrap
import time
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from small import MISTAKES, SOLUTION, SPEC, make_project

from kata.attempt import forbidden
from kata.attempt.worker import ForkServer
from kata.judge.report import SpecReport
from kata.judge.session import JUDGE
from kata.learn import verdict

pytest_plugins = ["pytester"]

OTHER = """
import torch

def add(ex, x):
    return ex.add(x)

def test_adds_a_tensor_to_itself(attempt):
    attempt(add, torch.ones(2))
"""

PARAMETERS = """
@pytest.mark.parametrize("text", [b"\\xff\\n"])
@pytest.mark.parametrize("n", [4])
@pytest.mark.parametrize("shape", [(2, 3)])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_works(attempt, dtype, shape, n, text):
    attempt(double, torch.ones(shape, dtype=dtype))
"""


class Project:
    """A project of one exercise, judged by pytest in this process."""

    def __init__(self, pytester):
        self.pytester, self.root = pytester, pytester.path
        self.exercise = make_project(self.root)

    def submit(self, body, *options):
        """Judge an exercise with this text; returns (pytest's result, the report)."""
        text = body if "def " in body else f"import torch\n\ndef double(x):\n    {body}\n"
        self.exercise.stub.write_text(textwrap.dedent(text))
        return self.judge(*options)

    def judge(self, *options):
        kept = []

        class Keep:
            def pytest_sessionstart(self, session):
                kept.append(session.config.stash[JUDGE])

        result = self.pytester.runpytest_inprocess(
            "-p", "kata.plugin", "-p", "no:cacheprovider", "tests", *options, plugins=[Keep()]
        )
        return result, kept[0].reports[0]

    def read(self, report, width=100):
        """The verdict as the learner reads it."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        verdict.show(report, self.exercise, console, "kata watch 06")
        return console.file.getvalue()


@pytest.fixture
def small(pytester):
    return Project(pytester)


def test_a_right_version_passes_and_is_told_what_to_try_next(small):
    result, report = small.submit("""
        def double(x):
            if isinstance(x, str):
                raise TypeError("a tensor, please")
            return x * 2
    """)

    result.assert_outcomes(passed=3)
    text = small.read(report)
    assert "05 doubling  passed, 3 of 3 specs" in text
    assert "✓ doubles a tensor" in text
    assert "Treble." in text
    assert "next: kata watch 06" in text
    assert "passed | 3/3" in (small.root / "progress.md").read_text()


def test_a_stub_is_not_written_yet_and_shows_no_traceback(small):
    from kata.course.stubs import make_stub

    result, report = small.submit(make_stub(SOLUTION, 5))

    assert report.state == "unwritten"
    assert {spec.status for spec in report.specs} == {"unwritten"}
    text = small.read(report)
    assert "not written yet" in text and "○ refuses text" in text and "kata hint 05" in text
    for output in (text, result.stdout.str()):
        assert "Traceback" not in output and "NotImplementedError" not in output


def test_a_known_mistake_is_named_however_it_is_written(small):
    _, report = small.submit("return x + 2 * x")

    assert report.mistakes == ["It is tripled."]
    text = small.read(report)
    assert "a known mistake: It is tripled." in text
    assert "6 of 6 elements differ" in text
    assert "first at [0, 0]: yours" in text
    assert "yours     float64[2, 3]" in text and "expected  float64[2, 3]" in text
    assert "double(x: float64[2, 3])" in text
    assert "tests/test_ex05_doubling.py:" in text
    assert "kata hint 05" in text


def test_an_unknown_mistake_is_not_named(small):
    _, report = small.submit("return 5 * x")

    assert report.state == "failed" and report.mistakes == []


@pytest.mark.parametrize("mark", ["train", "weights"])
def test_what_takes_seconds_is_run_once_the_other_specs_pass(small, mark):
    with (small.root / "tests/test_ex05_doubling.py").open("a") as spec:
        spec.write(f"\n\n@pytest.mark.{mark}\ndef test_in_seconds(attempt):\n    pass\n")

    wrong, right = small.submit("return 3 * x")[1], small.submit(SOLUTION)[1]

    assert [s.reason for s in wrong.specs if s.status == "skipped"] == [
        "runs once the other specs pass: it takes seconds"
    ]
    assert right.state == "passed" and right.count("passed") == 4


def test_only_the_first_failure_is_expanded(small):
    _, report = small.submit("return x[:0]")

    assert small.read(report).count("spec tests/") == 1
    assert report.count("failed") == 3


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return (2 * x)[0]", "has shape (3,), expected (2, 3)"),
        ("return (2 * x).float()", "has dtype float32, expected float64"),
        ("return x / 0", "elements are infinite where they should not be"),
        ("return x * float('nan')", "elements are NaN where they should not be"),
        ("return None", "the result is None, not a tensor"),
        ("return object()", "object is not plain data"),
        ("return x.mul_(2)", "double must leave its argument x as it was"),
        ("return torch.add(x, x)", "torch.add is what this exercise asks you to write"),
        ("return x.no_such_thing", "AttributeError: 'Tensor' object has no attribute"),
    ],
)
def test_the_verdict_says_what_is_wrong(small, body, sentence):
    _, report = small.submit(body)

    assert sentence in small.read(report)


@pytest.mark.parametrize(
    ("judged", "call"),
    [
        ("assert_close(one, 2 * torch.ones(1))", "double(x: float32[1])"),
        ("assert_close(one + 1, torch.ones(1))", "double(x: float32[2]), the last of 2 calls"),
        ("assert one.sum() == 2", "double(x: float32[2]), the last of 2 calls"),
        ("attempt(double, None)", "double(x: None)"),
    ],
)
def test_of_several_calls_the_one_is_shown_whose_result_was_judged(small, judged, call):
    with (small.root / "tests/test_ex05_doubling.py").open("a") as spec:
        spec.write(
            "\n\ndef test_twice(attempt):\n    one = attempt(double, torch.ones(1))\n"
            f"    attempt(double, torch.ones(2))\n    {judged}\n"
        )

    _, report = small.submit("return 5 * x")

    calls = [spec.detail.call for spec in report.specs if spec.detail]
    assert calls[0] == "double(x: float64[2, 3])"
    assert calls[-1] == call


def test_what_is_forbidden_is_guarded_no_longer_than_its_specs_run(small):
    forbidden.forbid([])  # what the specs before this one left
    before = torch.add, vars(torch.nn.Linear)["__init__"]
    small.submit("return x + x")
    forbidden.forbid(["torch.nn.Linear"])
    assert torch.add is before[0]

    forbidden.forbid([])
    assert vars(torch.nn.Linear)["__init__"] is before[1]


def test_forbidden_help_is_noticed_even_if_the_complaint_is_swallowed(small):
    _, report = small.submit("""
        import torch
        def double(x):
            try:
                torch.add(x, x)
            except AssertionError:
                pass
            return 2 * x
    """)

    assert report.specs[0].detail.kind == "reached"


def test_a_forbidden_class_can_be_inherited_from_and_not_used(small):
    small.exercise.spec.write_text(SPEC.replace('"torch.add"', '"torch.nn.ReLU"'))
    heir = "import torch\n\nclass Heir(torch.nn.ReLU): ...\n\ndef double(x):\n    {}\n"

    small.submit(heir.format("return 2 * x"), "-k", "doubles")[0].assert_outcomes(passed=1)
    _, report = small.submit(heir.format("return torch.nn.ReLU()(x)"), "-k", "doubles")

    assert "torch.nn.ReLU is what this exercise asks you to write" in small.read(report)


def test_a_forbidden_class_that_is_made_by_new_still_takes_its_arguments(small):
    spec = "import fractions\n" + SPEC.replace("torch.add", "fractions.Fraction")
    small.exercise.spec.write_text(
        spec + "\ndef test_half(attempt):\n    fractions.Fraction(1, 2)\n"
    )

    small.submit("return 2 * x", "-k", "half or doubles")[0].assert_outcomes(passed=2)


def test_what_one_exercise_forbids_is_free_to_the_next(small):
    for floor in ("exercises", "solutions"):
        (small.root / floor / "ex06_adding.py").write_text(
            "import torch\n\ndef add(x):\n    return torch.add(x, x)\n"
        )
    (small.root / "tests/test_ex06_adding.py").write_text(OTHER)

    result, _ = small.submit("return 2 * x", "-k", "adds or doubles")

    result.assert_outcomes(passed=2)


def test_an_exception_shows_the_learners_frames_only(small):
    _, report = small.submit("""
        def double(x):
            return helper(x)

        def helper(x):
            return x.missing
    """)

    frames = report.specs[0].detail.frames
    assert [frame.function for frame in frames] == ["double", "helper"]
    assert all(frame.file == str(small.exercise.stub) for frame in frames)
    text = small.read(report)
    assert "exercises/ex05_doubling.py:6 in helper" in text and "return x.missing" in text
    assert "attempt.py" not in text


def test_an_error_that_was_expected_and_did_not_come_is_told(small):
    _, report = small.submit("return 2 * x")

    assert "no error was raised, expected TypeError" in small.read(report)


def test_an_error_that_does_not_say_what_it_should_is_told(small):
    _, report = small.submit("""
        def double(x):
            if isinstance(x, str):
                raise TypeError("no")
            return 2 * x
    """)

    assert "the error says 'no', and should say 'tensor'" in small.read(report)


def test_a_syntax_error_shows_file_line_and_text(small):
    result, report = small.submit("def double(x):\n    return (2 * x\n")

    text = small.read(report)
    assert "SyntaxError" in text and "exercises/ex05_doubling.py:2" in text
    assert "return (2 * x" in text
    assert "_pytest" not in text and "_pytest" not in result.stdout.str()


def listing(small):
    (small.root / "pyproject.toml").write_text("[project]\ndependencies = ['no-such-package>=1']\n")


def test_a_missing_package_comes_with_the_command_that_installs_it(small):
    listing(small)
    _, report = small.submit("import no_such_package\ndef double(x):\n    return 2 * x\n")

    assert "pip install no-such-package" in small.read(report)


def test_pip_is_never_offered_for_a_name_that_the_project_does_not_list(small):
    listing(small)
    _, report = small.submit("import nunpy\ndef double(x):\n    return 2 * x\n")

    text = small.read(report)
    assert "there is no module nunpy; did you mean numpy?" in text and "pip" not in text


def test_specs_that_need_a_missing_package_say_so(small):
    listing(small)
    small.exercise.spec.write_text("import no_such_package\n" + SPEC)
    small.submit("return 2 * x")
    _, report = small.judge()

    assert "pip install no-such-package" in small.read(report)


@pytest.mark.parametrize("options", [(), ("--isolate",)], ids=["here", "isolated"])
@pytest.mark.parametrize("loop", ["pass", "time.sleep(0.01)"])
def test_a_spec_that_runs_past_its_time_is_named_and_ends_the_run(small, loop, options):
    body = f"""
        import time
        def double(x):
            while True:
                {loop}
    """

    _, report = small.submit(body, "--time-limit", "0.5", *options)

    assert [spec.status for spec in report.specs] == ["failed", "untried", "untried"]
    assert "not done after 0.5 s" in small.read(report)


def test_a_loop_inside_a_given_spec_is_ended_though_hypothesis_catches_what_it_can(small):
    start = time.monotonic()
    _, report = small.submit(
        "import torch\ndef double(x):\n    while x.ndim == 1:\n        pass\n    return 2 * x\n",
        "--time-limit", "1", "-k", "length",
    )  # fmt: skip

    assert report.specs[0].detail.kind == "time"
    assert time.monotonic() - start < 10


def test_a_late_answer_is_for_nobody(small):
    """The first call takes longer than a spec may; what it answers then must not meet the next."""
    slow = SOLUTION.replace("    return 2 * x", "    time.sleep(6)\n    return x[:0]")
    _, report = small.submit("import time\n" + slow, "--isolate", "--time-limit", "1")
    assert [spec.status for spec in report.specs] == ["failed", "untried", "untried"]

    _, report = small.submit(SOLUTION, "--isolate")
    assert report.state == "passed"


def test_what_the_code_prints_is_shown_with_the_failure(small):
    _, report = small.submit("print('here', 7); return 3 * x")

    assert "here 7" in small.read(report)


def test_leaving_the_interpreter_is_a_failure(small):
    _, report = small.submit("raise SystemExit(0)")

    assert report.state == "failed" and report.count("passed") == 0


def test_other_seeds_draw_other_inputs_and_the_same_seed_the_same(small):
    def yours(*options):
        _, report = small.submit("return 3 * x", *options)
        return report.specs[0].detail.mismatch["yours_there"]

    assert yours() == yours() != yours("--seed", "1")


def test_the_solutions_can_be_judged_and_leave_no_record(small):
    result, report = small.judge("--on", "solutions")

    result.assert_outcomes(passed=3)
    assert report.state == "passed"
    assert not (small.root / "progress.md").exists()


def test_a_run_of_some_specs_is_not_recorded(small):
    small.submit("return 2 * x", "-k", "doubles")

    assert not (small.root / ".kata/runs.jsonl").exists()


def test_a_submission_elsewhere_can_be_judged_in_a_worker(small, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def double(x):\n    return helper(x)\n\ndef helper(x):\n    return 3 * x\n")

    _, report = small.judge("--submission", str(mine), "--isolate")

    assert report.mistakes == ["It is tripled."]
    assert report.specs[1].detail.kind == "no-raise"


def test_a_worker_knows_nothing_of_the_submission_before(small):
    small.submit(SOLUTION.replace("return 2 * x", "torch.left = 1; return 2 * x"), "--isolate")

    text = SOLUTION.replace("return 2 * x", "return (2 + hasattr(torch, 'left')) * x")
    _, report = small.submit(text, "--isolate")

    assert report.state == "passed"


def test_a_fork_server_that_was_killed_costs_nobody_anything(small):
    small.submit(SOLUTION, "--isolate")
    os.killpg(ForkServer.start().pid, signal.SIGKILL)

    _, report = small.submit(SOLUTION, "--isolate")

    assert report.state == "passed"


def test_a_worker_that_dies_fails_the_spec(small):
    body = "import os\ndef double(x):\n    os._exit(0)\n"
    _, report = small.submit(body, "--isolate")

    assert report.count("failed") == 3
    assert "the worker gave no answer" in small.read(report)


def test_junit_xml_on_request(small):
    small.submit("return 3 * x", "--junitxml", "out.xml")

    text = (small.root / "out.xml").read_text()
    assert "6 of 6 elements differ" in text and "known mistake" not in text
    cases = {case.get("name"): case for case in ElementTree.fromstring(text).iter("testcase")}
    named = {name: [p.attrib for p in case.iter("property")] for name, case in cases.items()}
    assert named == {
        "test_doubles_a_tensor": [{"name": "mistake", "value": "It is tripled."}],
        "test_refuses_text": [],  # what is tripled refuses text
        "test_keeps_the_length": [],
    }


def test_the_summary_names_a_mistake_with_its_spec(small):
    result, _ = small.submit("return 3 * x")

    result.stdout.fnmatch_lines(["ex05_doubling: doubles a tensor: known mistake: It is tripled."])


def test_a_half_written_file_gets_names(small):
    with (small.root / "solutions/ex05_doubling.py").open("a") as solution:
        solution.write("\n\ndef halve(x):\n    return x / 2\n")
    with (small.root / "tests/test_ex05_doubling.py").open("a") as spec:
        spec.write("\n\ndef halve(ex, x):\n    return ex.halve(x)\n")
        spec.write("\n\ndef test_halves(attempt):\n    attempt(halve, torch.ones(2))\n")

    unwritten = 'raise NotImplementedError("exercise 05 is not written yet")'
    _, report = small.submit(
        SOLUTION.replace("2 * x", "3 * x") + f"\n\ndef halve(x):\n    {unwritten}\n"
    )

    assert report.state == "begun" and report.count("unwritten") == 1
    assert report.mistakes == ["It is tripled."]


def test_narrow_terminals_lose_no_words(small):
    _, report = small.submit("return 3 * x")

    words = small.read(report, width=40).split()
    assert words == small.read(report, width=200).split()


def test_a_low_terminal_counts_what_it_has_no_room_for(small):
    _, report = small.submit("return 3 * x")
    report.specs += [
        SpecReport(f"test_more_{n}", s) for n in range(9) for s in ("passed", "failed")
    ]

    console = Console(file=io.StringIO(), width=40, height=24, force_terminal=True)
    verdict.show(report, small.exercise, console)
    lines = console.file.getvalue().splitlines()

    assert len(lines) <= 24
    assert "7 more failed" in lines[-3] and "10 more passed" in lines[-2]


def test_a_sentence_says_which_parameters_it_is_about(small):
    small.exercise.spec.write_text(SPEC + PARAMETERS)

    letters = "disable_test_id_escaping_and_forfeit_all_rights_to_community_support=true"
    _, report = small.submit("return x + x", "-o", letters)  # as in our pyproject.toml

    assert report.specs[-1].sentence == r"works (float16-2x3-n=4-\xff\n)"


def test_a_swap_whose_text_is_not_there_once_names_file_and_text(small):
    from kata.course import variants

    small.exercise.mistakes.write_text(MISTAKES.replace('"2 * x", "3 * x"', '"x", "y"'))
    variant = variants.load(small.exercise).mistake[0]
    with pytest.raises(variants.BadMistakes, match=r"ex05_doubling.toml.*'x', which stands \d+"):
        variants.write(small.exercise, variant)
