"""The verdict on hand-made reports: what it says, in which order, and how it wraps."""

import io
import re

import pytest
from rich.console import Console

from kata.attempt.outcome import Frame
from kata.course import catalog
from kata.judge.report import Detail, Report, SpecReport
from kata.learn import explain, verdict

LESSON = """# 31

## After it passes

- Count the numbers in `scores`, and read [how](https://example.org/count) others store fewer.

## Reading

- Vaswani et al. 2017, [Attention Is All You Need](https://example.org/attention), section 3.2.1.
"""


@pytest.fixture
def exercise(project):
    found = catalog.find(project, 31)
    found.lesson.write_text(LESSON)
    return found


def shown(report, exercise, width=100, **console):
    to = Console(file=io.StringIO(), width=width, **{"color_system": None} | console)
    verdict.show(report, exercise, to, "kata watch 32")
    return to.file.getvalue()


def report_of(*specs, **more):
    return Report("ex31_scaled_dot_product_attention", "", [*specs], **more)


def spec(name, status="passed", **more):
    return SpecReport(f"test_{name}", status, 0.001, **more)


def failed(name="weighs_all", message="12 of 12 elements differ", mistakes=(), **more):
    detail = Detail("mismatch", message, "/far/tests/test_ex31.py:7", "attend(q: float64[2])")
    detail.mismatch = {"yours": "float64[3] [1., 2.]", "expected": "float64[3] [1., 3.]"} | more
    return spec(name, "failed", detail=detail, mistakes=list(mistakes))


# --- begun, and ended before its end -------------------------------------------------------------


def test_what_is_begun_shows_its_written_functions_first_and_folds_the_rest(exercise):
    report = report_of(
        spec("a_is_missing", "unwritten"), spec("b_passes"), spec("c_is_missing", "unwritten"),
        failed("d_fails"), *[spec(f"e_{n}", "unwritten") for n in range(9)],
    )  # fmt: skip
    text = shown(report, exercise)

    assert "begun, 1 of 13 specs" in text
    assert text.index("✓ b passes") < text.index("✗ d fails") < text.index("○ 11 not written yet")
    assert "12 of 12 elements differ" in text
    assert "missing" not in text


def test_specs_that_were_not_tried_are_one_line(exercise):
    stopped = Detail(
        "time", "not done after 5 s", frames=[Frame("/far/ex31.py", 9, "f", "while 1:")]
    )
    report = report_of(
        spec("a_passes"), spec("b_hangs", "failed", detail=stopped),
        *[spec(f"c_{n}", "untried") for n in range(9)],
    )  # fmt: skip
    text = shown(report, exercise)

    assert "· 9 not tried: the run had ended" in text
    assert "not done after 5 s" in text and "/far/ex31.py:9 in f" in text
    assert "c 0" not in text


def test_a_process_that_was_ended_is_told_plainly(exercise):
    died = Detail("died", "the process was ended by SIGSEGV")
    text = shown(report_of(spec("a_passes"), spec("b", "untried"), error=died), exercise)

    assert "the process was ended by SIGSEGV" in text
    assert "· 1 not tried: the run had ended" in text


# --- a file that cannot be read ------------------------------------------------------------------


def unread(exercise, error, submission=None):
    specs = [spec(f"x_{n}", "untried") for n in range(16)]
    report = report_of(*specs, error=error)
    report.submission = submission or str(exercise.stub)
    return shown(report, exercise)


def test_a_file_that_is_missing_or_empty_is_one_failure_and_offers_a_fresh_stub(exercise):
    why = f"nothing is defined in {exercise.stub.name}"
    text = unread(exercise, Detail("absent", why, str(exercise.stub)))

    assert "scaled dot-product attention  nothing to judge" in text
    assert why in text and "exercises/ex31_scaled" in text.replace("\n", "")
    assert "a fresh stub: kata reset 31" in text
    assert "· 16 not tried\n" in text and text.count("✗") == 0
    assert len(text.splitlines()) < 8


def test_a_submission_that_is_missing_is_not_answered_with_a_fresh_stub(exercise):
    text = unread(exercise, Detail("absent", "there is no file", "/far/mine.py"), "/far/mine.py")

    assert "/far/mine.py" in text and "kata reset" not in text


def test_a_syntax_error_is_one_failure_with_its_line(exercise):
    frame = Frame("/far/ex31.py", 4, "", "    return (2 * x\n           ^")
    why = Detail("unreadable", "SyntaxError: '(' was never closed", "/far/ex31.py:4")
    why.frames = [frame]
    text = unread(exercise, why)

    assert "SyntaxError: '(' was never closed" in text and "/far/ex31.py:4" in text
    lines = text.splitlines()
    at = next(n for n, line in enumerate(lines) if "return (2 * x" in line)
    assert lines[at].index("(") == lines[at + 1].index("^")
    assert "kata reset" not in text and text.count("/far/ex31.py") == 1


# --- the names of mistakes -----------------------------------------------------------------------


def test_a_name_stands_under_its_own_spec_and_only_once(exercise):
    report = report_of(
        failed("a", mistakes=["One."]), failed("b", mistakes=["One."]),
        failed("c", mistakes=["Two.", "Three."]), failed("d"),
    )  # fmt: skip
    lines = [line.strip() for line in shown(report, exercise).splitlines()]

    names = {line: lines[n - 1] for n, line in enumerate(lines) if "a known mistake" in line}
    assert names == {
        "a known mistake: One.": "✗ a  1 ms",
        "a known mistake: Two. Or: Three.": "✗ c  1 ms",
    }


def test_a_name_that_comes_after_the_verdict_stands_under_its_spec_and_once(exercise):
    report = report_of(failed("a", mistakes=["One."]), failed("b", mistakes=["One."]), failed("c"))
    to = Console(file=io.StringIO(), width=60, color_system=None)
    verdict.show_names(report, to)
    verdict.show_names(report_of(failed("c")), to)

    assert [line.strip() for line in to.file.getvalue().splitlines()] == [
        "✗ a  1 ms",
        "a known mistake: One.",
        "it is none of the known mistakes",
    ]


# --- a failure -----------------------------------------------------------------------------------


def test_a_hint_of_the_comparison_is_shown(exercise):
    hint = "swapping your axes 0 and 1 would give this shape"

    assert hint in shown(report_of(failed(hint=hint)), exercise)


def test_an_endless_recursion_shows_both_its_ends():
    frames = [Frame("/far/ex31.py", n, "f", f"f({n})") for n in range(1, 991)]
    text = explain.plain(Detail("raised", "RecursionError: too deep", frames=frames))

    assert "f(1)" in text and "f(990)" in text and "… 984 more" in text
    assert len(text.splitlines()) < 20


def test_a_message_of_any_length_is_cut():
    text = explain.plain(Detail("raised", "ValueError: " + "x" * 10_000 + "\n" * 500))

    assert len(text) < 600 and text.endswith("…")


# --- layout --------------------------------------------------------------------------------------


def everything():
    words = "word " * 40
    frames = [Frame("/far/" + "folder/" * 12 + "ex31.py", 7, "f", "x = " + "y + " * 40)]
    there = {"yours_there": "1", "expected_there": "2", "index": [0], "hint": words}
    one = failed("weighs_" + "all_" * 40, words, ["The scores are " + words], **there)
    one.detail.mismatch |= {"yours": words, "expected": words}
    one.detail.frames, one.detail.call = frames, f"attend({words})"
    skipped = spec("needs_weights", "skipped", reason=words)
    return report_of(one, failed("b", mistakes=[words]), skipped, spec("c", "unwritten"))


@pytest.mark.parametrize("width", [40, 60, 100])
def test_nothing_wraps_to_the_first_column(exercise, width):
    lines = shown(everything(), exercise, width).splitlines()

    assert all(len(line) <= width for line in lines)
    assert [line for line in lines[1:] if not line.startswith(" ")] == []


def test_what_wraps_goes_on_below_its_beginning(exercise):
    lines = shown(everything(), exercise, 60).splitlines()

    at = next(n for n, line in enumerate(lines) if line.startswith("     expected  word"))
    assert lines[at + 1].startswith(" " * 15 + "word")
    at = next(n for n, line in enumerate(lines) if line.startswith(" ✗ weighs all"))
    assert re.match(r" {3}all", lines[at + 1])


@pytest.mark.parametrize("status", ["passed", "unwritten"])
def test_wide_terminals_are_not_filled_with_one_line(exercise, status):
    report = report_of(spec("weighs_" + "all_" * 90, status))

    for text in shown(report, exercise, 200), shown(everything(), exercise, 200):
        assert max(map(len, text.splitlines())) <= 100


def test_milliseconds_are_not_torn_from_their_unit(exercise):
    for n in range(20, 60):
        lines = shown(report_of(spec("x" * n), spec("a", "unwritten")), exercise, 60).splitlines()
        assert [line for line in lines if line.strip().startswith("ms")] == []
        assert any(line.endswith("1 ms") for line in lines)


def test_a_pass_shows_what_to_notice_and_to_read_under_its_headings(exercise):
    text = shown(report_of(spec("a")), exercise, 60)

    assert text.index("\n  After it passes\n") < text.index("Count the numbers")
    assert text.index("Count the numbers") < text.index("\n  Reading\n") < text.index("Vaswani")
    assert "https://example.org/attention" in text and "https://example.org/count" in text
    assert text.index("Vaswani") < text.index("compare: kata diff 31")
    assert "next: kata watch 32\n" in text
    assert [line for line in text.splitlines()[1:] if line and not line.startswith(" ")] == []


def test_links_are_links_where_the_terminal_has_them(exercise):
    report = report_of(spec("a"))
    terminal = shown(report, exercise, force_terminal=True, color_system="standard")
    dumb = shown(report, exercise, force_terminal=True, color_system=None)

    assert re.search(r"\x1b\]8;[^;]*;https://example.org/attention\x1b", terminal)
    assert "(https://example.org/attention)" not in terminal
    assert "https://example.org/attention" in dumb and "\x1b]8" not in dumb


def test_an_unwritten_stub_lists_its_specs_and_says_where_to_begin(exercise):
    report = report_of(spec("weighs_all", "unwritten"), spec("adds_up", "unwritten"))
    lines = [line.strip() for line in shown(report, exercise).splitlines()]

    assert lines[0].startswith("31 scaled dot-product attention  not written yet, 2 specs")
    assert lines[1:3] == ["○ weighs all", "○ adds up"]
    labels = [line.partition(":")[0] for line in lines[3:] if ":" in line]
    assert labels == ["your file", "the lesson", "a hint"]
