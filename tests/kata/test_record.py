"""The record and progress.md: nothing that was written is lost, and neither file is ever half."""

import errno
import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from itertools import count
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.judge.report import Detail, Report, SpecReport
from kata.learn import entries
from kata.learn import record as progress
from kata.learn import standing as summaries
from kata.learn.entries import Entry
from kata.learn.page import BEGIN, END, HEAD, remade, rows
from kata.learn.record import give_up, note, read, record_run, remake, standings

PROJECT = Path(__file__).parents[2]
STEM = "ex31_scaled_dot_product_attention"
OTHER = "ex07_online_softmax"
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
LATER = NOON + timedelta(days=99)  # what the clock of these tests says
TRUE_CLOCK = entries.clock
KILLS = int(os.environ.get("KATA_KILLS", "200"))  # of writers, at random moments


def make_root(folder: Path) -> Path:
    """A project of three exercises."""
    for floor in ("exercises", "solutions"):
        (folder / floor).mkdir()
    for stem, title in {
        OTHER: "Exercise 07: online softmax.",
        STEM: "Exercise 31: scaled | dot-product attention.",
        "ex90_scaling_laws": "Exercise 90: scaling laws.",
    }.items():
        (folder / "solutions" / f"{stem}.py").write_text(f'"""{title}"""\n')
    return folder


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


@pytest.fixture(autouse=True)
def set_clock(monkeypatch):
    """The clock says LATER, or what the test sets it to."""

    def set_to(time):
        monkeypatch.setattr(entries, "clock", lambda: time)

    set_to(LATER)
    return set_to


def entry(state="passed", hours=0.0, stem=STEM, passed=7, total=7, **more):
    at = NOON + timedelta(hours=hours)
    return Entry(stem, at, state, passed, total, seconds=0.25, **more)


def make_report(statuses, **more):
    specs = [SpecReport(f"test_{i}", status) for i, status in enumerate(statuses.split())]
    return Report(STEM, "stub.py", specs, **more)


def record(root):
    return root / ".kata" / "runs.jsonl"


def page(root):
    return root / "progress.md"


def append_lines(root, *runs):
    """As a merge brings them: each says no more than its own time."""
    record(root).parent.mkdir(exist_ok=True)
    with record(root).open("ab") as file:
        file.writelines(msgspec.json.encode(run) + b"\n" for run in runs)


def write_page(root, text):
    page(root).write_bytes(text)
    return text


def table(root):
    """The rows between the markers, below the head."""
    lines = page(root).read_bytes().splitlines()
    assert lines.count(BEGIN) == lines.count(END) == 1
    rows = [row.decode() for row in lines[lines.index(BEGIN) + 1 : lines.index(END)]]
    assert tuple(rows[:2]) == HEAD
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows)
    return rows[2:]


# --- the record ----------------------------------------------------------------------------------


def test_a_run_is_one_line_that_reads_back(root):
    runs = [entry("failed", mistake="The scores – not divided by √d.\nAt all."), entry(hours=1)]

    for run in runs:
        assert record_run(root, run) == []

    assert read(root) == (runs, [])
    assert record(root).read_bytes().count(b"\n") == 2


def test_a_line_keeps_the_offset_of_its_clock(root):
    at = datetime(2026, 11, 22, 23, 30, tzinfo=timezone(timedelta(hours=-8)))
    record_run(root, Entry(STEM, at, "passed", 7, 7, 0.1))

    assert json.loads(record(root).read_bytes())["at"] == "2026-11-22T23:30:00-08:00"
    assert table(root)[0].endswith("| 2026-11-22 | 2026-11-22 |")


@pytest.mark.parametrize(
    "bad",
    [
        {"at": datetime(2026, 11, 22)},
        {"seconds": float("nan")},
        {"state": "fine"},
        {"passed": "7"},
    ],
)
def test_what_could_not_be_read_back_is_not_written(root, bad):
    with pytest.raises(msgspec.ValidationError):
        record_run(root, msgspec.structs.replace(entry(), **bad))

    assert not record(root).exists()


DAMAGED = [
    b"{",
    b"<<<<<<< HEAD",
    b"\xff\xfe",
    b"\0" * 40,
    b"[1, 2]",
    b'{"later":' + b"[" * 100_000,
    msgspec.json.encode(entry()).replace(b"ex31", b"ex\xff31"),
    msgspec.json.encode(entry())[:-20],
    msgspec.json.encode(entry()).replace(b'"passed":7', b'"passed":"7"'),
    msgspec.json.encode(entry()).replace(b'"passed":7', b'"passed":true'),
    msgspec.json.encode(entry()).replace(b":00Z", b":00"),
    msgspec.json.encode(entry()).replace(b'"state":"passed"', b'"state":"fine"'),
    msgspec.json.encode(entry()) + msgspec.json.encode(entry(hours=1)),
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_skipped_and_named(root, damaged):
    record_run(root, entry(hours=1))
    with record(root).open("ab") as file:
        file.write(damaged + b"\n")

    warnings = record_run(root, entry(hours=2))

    entries, again = read(root)
    assert entries == [entry(hours=1), entry(hours=2)]
    assert warnings == again
    assert len(warnings) == 1
    assert warnings[0].startswith(".kata/runs.jsonl:2 is damaged and was skipped: ")
    assert note(root, 31, "still", NOON) == remake(root) == give_up(root, STEM, NOON) == warnings


def test_a_line_that_a_kill_has_torn_anywhere_loses_only_itself(root):
    record_run(root, entry(hours=1))
    before = record(root).read_bytes()
    line = msgspec.json.encode(entry(hours=2))

    for length in [1, 2, *range(3, len(line), 9), len(line) - 1]:
        record(root).write_bytes(before + line[:length])
        assert len(read(root)[1]) == 1
        assert len(record_run(root, entry(hours=3))) == 1
        assert read(root)[0] == [entry(hours=1), entry(hours=3)]


def test_a_whole_line_whose_newline_was_torn_off_counts(root):
    record_run(root, entry(hours=1))
    record(root).write_bytes(record(root).read_bytes().removesuffix(b"\n"))

    assert read(root) == ([entry(hours=1)], [])
    assert record_run(root, entry(hours=2)) == []
    assert read(root) == ([entry(hours=1), entry(hours=2)], [])


def test_line_ends_of_other_systems_and_fields_of_later_versions_do_no_harm(root):
    record_run(root, entry(event="hint"))
    line = record(root).read_bytes().replace(b"}\n", b',"mood":{"good":[1]}}\r\n\r\n')
    record(root).write_bytes(line)

    assert read(root) == ([entry(event="hint")], [])
    assert standings(root) == {}


def test_lines_in_any_order_and_doubled_stand_alike(root):
    runs = [entry("failed", hours, passed=n) for hours in (-30, 0, 5.5) for n in range(5)]
    lines = [msgspec.json.encode(run) for run in runs]
    record_run(root, runs[0])
    pages = set()

    for seed in range(10):
        rng = random.Random(seed)
        shuffled = lines + rng.choices(lines, k=seed)
        rng.shuffle(shuffled)
        record(root).write_bytes(b"\n".join(shuffled))
        remake(root)
        pages.add(page(root).read_bytes())

        assert read(root) == (runs, [])
    assert len(pages) == 1


def test_the_record_and_the_page_merge_in_git_by_union(root):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    shutil.copy(PROJECT / ".gitattributes", root)

    def git(*words):
        who = ["-c", "user.name=kata", "-c", "user.email=kata@localhost"]
        subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)

    def commit():
        git("add", "progress.md", ".kata/runs.jsonl", ".gitattributes")
        git("commit", "-m", "on")

    record_run(root, entry(hours=0))
    note(root, 31, "common", NOON)
    git("init", "-b", "main")
    commit()
    git("switch", "-c", "laptop")
    record_run(root, entry(hours=2))
    note(root, 31, "on the laptop", NOON)
    commit()
    git("switch", "main")
    record_run(root, entry("failed", hours=1, stem=OTHER))
    note(root, 7, "on the desktop", NOON)
    commit()
    git("merge", "laptop")
    remake(root)

    text = page(root).read_text()
    assert read(root) == ([entry(), entry("failed", 1, OTHER), entry(hours=2)], [])
    assert [
        text.count(f": {word}\n") for word in ("common", "on the laptop", "on the desktop")
    ] == [1] * 3
    assert table(root)[-1].startswith("| **2 of 3 tried** | **1 passed** | 14/14 | 3 |")


# --- the order, with clocks that are wrong --------------------------------------------------------

YEAR = 365 * 24


def now_of(root):
    return standings(root)[STEM].now


def test_an_entry_of_a_clock_a_year_ahead_hides_no_later_one(root, set_clock):
    set_clock(NOON)
    record_run(root, entry("failed", -2))
    record_run(root, entry("failed", YEAR))
    assert now_of(root) == "failed"

    record_run(root, entry("passed", -1))
    record_run(root, entry("begun", -0.5))
    found = standings(root)[STEM]

    assert [run.state for run in read(root)[0]] == ["failed", "failed", "passed", "begun"]
    assert (found.state, found.now, found.tries) == ("passed", "begun", 4)
    assert table(root)[0].endswith("| 4 | 2026-11-22 | 2026-11-22 |")
    set_clock(NOON + timedelta(hours=2 * YEAR))  # the wrong date has passed
    assert standings(root)[STEM].now == "begun"
    record_run(root, entry("passed", YEAR + 1))
    assert [run.state for run in read(root)[0]][-2:] == ["begun", "passed"]


def test_an_entry_of_a_clock_a_year_behind_is_the_latest_all_the_same(root, set_clock):
    set_clock(NOON)
    record_run(root, entry("failed", -2))
    set_clock(NOON - timedelta(hours=YEAR))
    record_run(root, entry("passed", -YEAR))
    record_run(root, entry("begun", -YEAR + 0.1))
    assert now_of(root) == "begun"

    set_clock(NOON)
    assert now_of(root) == "begun"
    record_run(root, entry("failed", 0))
    assert [run.state for run in read(root)[0]] == ["failed", "passed", "begun", "failed"]


def test_a_line_from_the_future_that_says_no_more_stands_where_the_file_has_it(root, set_clock):
    set_clock(NOON)
    append_lines(
        root, entry("failed", -3), entry("passed", -2), entry("unwritten", YEAR), entry("begun", -1)
    )

    assert [run.state for run in read(root)[0]] == ["failed", "passed", "unwritten", "begun"]
    assert standings(root)[STEM].last == NOON - timedelta(hours=1)


def test_between_two_wrong_dates_only_the_one_that_has_passed_is_believed(root, set_clock):
    """The rule's weak spot, so that it is known: it lasts from one wrong date to the other."""
    for state, hours in (("failed", 0), ("begun", YEAR), ("failed", YEAR + 9), ("passed", 1)):
        record_run(root, entry(state, hours))
    now = {}

    for hours in (2, YEAR + 5, YEAR + 10):
        set_clock(NOON + timedelta(hours=hours))
        now[hours] = now_of(root)

    assert now == {2: "passed", YEAR + 5: "failed", YEAR + 10: "passed"}


def test_a_time_to_come_is_no_date_in_the_table(root, set_clock):
    set_clock(NOON)
    record_run(root, entry("failed", YEAR))

    assert table(root) == [
        f"| [31](lessons/{STEM}.md) scaled \\| dot-product attention | failing | 7/7 | 1 | — | — |",
        "| **1 of 3 tried** | **0 passed** | 7/7 | 1 | — | — |",
    ]


def test_only_an_entry_behind_a_later_time_says_so_in_the_file(root):
    for hours in (0, 1, 2, 1.5, 3):
        record_run(root, entry(hours=hours))

    lines = [json.loads(line) for line in record(root).read_bytes().splitlines()]
    assert [line.get("after") for line in lines] == [
        None, None, None, ["2026-11-22T14:00:00Z"], None
    ]  # fmt: skip


def appended(lines, hours, name, stem=STEM):
    """The lines with one more, as a machine whose clock says that writes it."""
    found, _ = entries.parsed(b"\n".join(lines), "")
    latest = max((run.place for run in found.values()), default=())
    new = entry(hours=hours, stem=stem, mistake=str(name)).behind(latest)
    return [*lines, msgspec.json.encode(new)]


def names_in_order(lines, hours):
    found, warnings = entries.parsed(b"\n".join(lines), "")
    assert not warnings
    return [run.mistake for run in entries.in_order(found, NOON + timedelta(hours=hours))]


clocks = st.lists(st.integers(-9, 9), max_size=8)


@settings(max_examples=300, deadline=None)
@given(clocks)
def test_on_one_machine_the_order_is_that_of_writing_whatever_its_clock_does(hours):
    lines, names = [], "hgfedcba"  # so that lines of one time would sort the other way
    for name, hour in zip(names, hours, strict=False):
        lines = appended(lines, hour, name)

    assert names_in_order(lines, 9) == list(names[: len(hours)])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 0, 50, 70]), max_size=8), st.integers(0, 40))
def test_so_it_is_while_a_wrong_date_is_still_to_come(jumps, more):
    """The clock is ahead by a jump at some entries; a reader's own is right."""
    lines = []
    for hour, jump in enumerate(jumps):
        lines = appended(lines, hour + jump, hour)

    assert names_in_order(lines, len(jumps) + more) == list(map(str, range(len(jumps))))


@settings(max_examples=300, deadline=None)
@given(clocks, clocks, clocks, st.randoms())
def test_a_merge_by_union_keeps_the_order_of_each_side(common, ours, theirs, rng):
    base = []
    for number, hour in enumerate(common):
        base = appended(base, hour, f"base {number}")
    sides = {}
    for side, hours in (("ours", ours), ("theirs", theirs)):
        sides[side] = base
        for number, hour in enumerate(hours):
            sides[side] = appended(sides[side], hour, f"{side} {number}")
    merged = sides["ours"] + sides["theirs"][len(base) :]

    order = names_in_order(merged, 9)

    for lines in sides.values():
        names = [json.loads(line)["mistake"] for line in lines]
        assert [name for name in order if name in names] == names
    doubled = merged + rng.choices(merged, k=3) if merged else []
    rng.shuffle(doubled)
    assert names_in_order(doubled, 9) == order


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=9), st.integers(0, 8), st.integers(0, 40))
def test_two_machines_merge_by_time_also_after_one_was_ahead_before_they_parted(side, ahead, more):
    base = appended(appended([], -2, "first"), ahead + 30, "ahead")
    ours = theirs = base
    for hour, on_ours in enumerate(side):
        if on_ours:
            ours = appended(ours, hour, hour)
        else:
            theirs = appended(theirs, hour, hour)

    order = names_in_order(ours + theirs[2:], len(side) + more)

    assert order == ["first", "ahead", *map(str, range(len(side)))]


def test_an_entry_ahead_does_not_hide_what_another_machine_wrote_without_it():
    ours = []
    for hours in (0, YEAR, 1, 3):
        ours = appended(ours, hours, hours)
    theirs = appended(ours[:1], 2, "theirs 2")
    theirs = appended(theirs, 4, "theirs 4")

    order = names_in_order(ours + theirs[1:], 5)

    assert order == ["0", str(YEAR), "1", "theirs 2", "3", "theirs 4"]


# --- standings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "label"),
    [
        ("unwritten", "not written yet"),
        ("unwritten failed", "failing"),
        ("failed unwritten", "not written yet"),
        ("failed passed", "passed"),
        ("passed failed", "passed, now failing"),
        ("passed unwritten", "passed, now not written yet"),
        ("passed failed passed", "passed"),
        ("give-up", "not written yet (solution seen)"),
        ("failed give-up", "failing (solution seen)"),
        ("failed give-up passed", "passed (solution seen)"),
        ("passed give-up", "passed"),
        ("passed failed give-up", "passed, now failing"),
    ],
)
def test_once_passed_stays_passed_and_a_later_run_shows_beside_it(root, states, label):
    for hours, state in enumerate(states.split()):
        if state == "give-up":
            give_up(root, STEM, NOON + timedelta(hours=hours))
        else:
            record_run(root, entry(state, hours))

    assert standings(root)[STEM].label == label
    assert f"| {label} |" in table(root)[0]


def test_a_standing_counts_tries_and_keeps_the_last_run(root):
    append_lines(
        root,
        entry("failed", 30, passed=5),
        entry("passed", 20),
        entry("failed", 10, passed=3),
        entry("unwritten", 15, passed=0, event="give-up"),
        entry("unwritten", 40, passed=0, event="give-up"),
    )

    standing = standings(root)[STEM]

    assert (standing.state, standing.now) == ("passed", "failed")
    assert (standing.passed, standing.total, standing.tries) == (5, 7, 3)
    assert standing.first == NOON + timedelta(hours=10)
    assert standing.last == NOON + timedelta(hours=40)
    assert standing.gave_up


def test_giving_up_keeps_what_the_last_run_said(root):
    record_run(root, entry("failed", passed=5))
    give_up(root, STEM, NOON + timedelta(hours=1))

    assert read(root)[0][1] == Entry(
        STEM, NOON + timedelta(hours=1), "failed", 5, 7, 0.0, event="give-up"
    )
    assert standings(root)[STEM].tries == 1


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("passed passed", ("passed", 2, 2)),
        ("passed skipped", ("passed", 1, 1)),
        ("passed failed unwritten", ("begun", 1, 3)),
        ("passed unwritten", ("begun", 1, 2)),
        ("unwritten", ("unwritten", 0, 1)),
    ],
)
def test_an_entry_is_made_of_a_report(statuses, expected):
    report = make_report(statuses, seconds=0.25)
    report.specs[0].mistakes = ["It is wrong."]
    made = Entry.of(report, NOON, "exercises")

    assert (made.state, made.passed, made.total) == expected
    assert (made.exercise, made.mistake, made.at) == (STEM, "It is wrong.", NOON)
    assert (made.seconds, made.parts, made.event) == (0.25, "exercises", "run")


def test_a_report_that_judges_too_little_makes_no_entry():
    assert Entry.of(make_report("skipped skipped")) is None
    assert Entry.of(make_report("passed", complete=False)) is None


def test_specs_that_can_not_be_read_make_a_failed_entry():
    made = Entry.of(make_report("", error=Detail("error", "no such name"), complete=False))

    assert (made.state, made.passed, made.total) == ("failed", 0, 0)


def test_the_default_clock_knows_its_offset(root, monkeypatch):
    monkeypatch.setattr(entries, "clock", TRUE_CLOCK)
    before = datetime.now(UTC)
    record_run(root, Entry.of(make_report("passed")))
    note(root, 31, "now")

    assert before <= read(root)[0][0].at <= datetime.now(UTC)
    assert f"- {datetime.now().date()} · 31: now\n" in page(root).read_text()


# --- the page ------------------------------------------------------------------------------------


def test_a_first_page_says_what_it_is_and_how_notes_are_made(root):
    assert remake(root) == []

    text = page(root).read_text()
    assert text.startswith("# Progress\n")
    assert text.endswith("\n## Notes\n\n")
    assert "kata note 31" in text
    assert table(root) == ["| **0 of 3 tried** | **0 passed** | — | 0 | — | — |"]


def test_the_table_has_a_row_for_each_exercise_that_was_tried_and_one_of_totals(root):
    record_run(root, entry("failed", 48, passed=4))
    record_run(root, entry("passed", 24, stem=OTHER, passed=5, total=5))
    record_run(root, entry("failed", 0, passed=4))
    record_run(root, entry("passed", stem="ex55_of_another_year"))

    assert table(root) == [
        f"| [07](lessons/{OTHER}.md) online softmax | passed | 5/5 | 1 | 2026-11-23 | 2026-11-23 |",
        f"| [31](lessons/{STEM}.md) scaled \\| dot-product attention | failing | 4/7 | 2 "
        "| 2026-11-22 | 2026-11-24 |",
        "| **2 of 3 tried** | **1 passed** | 9/12 | 3 | 2026-11-22 | 2026-11-24 |",
    ]


def test_a_solution_that_does_not_parse_still_has_a_row(root):
    (root / "solutions" / f"{OTHER}.py").write_text("def (:\n")
    record_run(root, entry(stem=OTHER))

    assert table(root)[0].startswith(f"| [07](lessons/{OTHER}.md) online softmax | passed |")


def test_a_remake_that_changes_nothing_leaves_the_file_alone(root):
    record_run(root, entry())
    before = page(root).stat()

    remake(root)

    assert page(root).stat().st_mtime_ns == before.st_mtime_ns
    assert page(root).stat().st_ino == before.st_ino


def test_a_note_is_one_dated_item_at_the_end(root):
    remake(root)
    before = page(root).read_bytes()

    note(root, 31, "The root.\r\n\n- keeps the softmax\n    off its ends  \n", NOON)
    note(root, 7, "One pass.", NOON + timedelta(days=1))

    assert (
        page(root).read_bytes()
        == before
        + (
            "- 2026-11-22 · 31: The root.\n\n  - keeps the softmax\n      off its ends\n"
            "- 2026-11-23 · 07: One pass.\n"
        ).encode()
    )


def test_a_note_that_says_what_a_marker_says_is_only_a_note(root):
    note(root, 31, f"{END.decode()}\n{BEGIN.decode()}\n{HEAD[0]}\n| mine |", NOON)
    written = page(root).read_bytes()

    record_run(root, entry())
    remake(root)

    assert page(root).read_bytes().endswith(written.partition(END + b"\n")[2])
    assert len(table(root)) == 2


def test_a_note_keeps_bytes_that_are_not_utf_8(root):
    note(root, 31, b"caf\xe9".decode("utf-8", "surrogateescape"), NOON)

    assert page(root).read_bytes().endswith(b": caf\xe9\n")


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_note_needs_a_text(root, text):
    with pytest.raises(ValueError, match="needs a text"):
        note(root, 31, text)

    assert not page(root).exists()


OWN = {
    "no final newline": b"- mine",
    "CRLF": b"- one\r\n- two\r\n\r\n",
    "old Mac": b"one\rtwo\r",
    "not UTF-8": b"caf\xe9 \xff\xfe\x00\n",
    "blank ends": b"\n\n  \n- mine  \t\n\n\n",
    "a table of her own": b"\n| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    "speaks of markers": b"I saw " + BEGIN + b" and\n    " + END + b"\n",
    "a copied table": b"\n" + "\n".join(HEAD).encode() + b"\n| 31 | passed |\n",
    "nothing": b"",
}


@pytest.mark.parametrize("below", OWN.values(), ids=OWN)
@pytest.mark.parametrize("above", OWN.values(), ids=OWN)
def test_what_stands_outside_the_table_survives_byte_for_byte(root, above, below):
    if above and not above.endswith((b"\n", b"\r")):
        above += b"\n"
    write_page(root, above + BEGIN + b"\n| edited |\n" + END + b"\n" + below)

    record_run(root, entry())
    after = page(root).read_bytes()
    note(root, 31, "later", NOON)
    noted = page(root).read_bytes()

    made = after.removeprefix(above).removesuffix(below)
    assert above + made + below == after
    assert made.startswith(BEGIN)
    assert made.rstrip().endswith(END)
    assert made.count(b"\n") == len(table(root)) + 4
    assert noted.startswith(after)
    assert re.fullmatch(rb"(\r?\n)?- 2026-11-22 \xc2\xb7 31: later\r?\n", noted[len(after) :])


def test_the_table_has_the_line_ends_of_its_page(root):
    write_page(root, b"# Mine\r\n\r\nA text.\r\n")

    record_run(root, entry())
    note(root, 31, "one\ntwo", NOON)

    text = page(root).read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n")


MADE = "\n".join([*HEAD, "| [31](lessons/x.md) | passed | 1/1 | 1 | — | — |"]).encode()
TOP, NOTES = b"# Mine\n\nAbout me.\n\n", b"\n## Notes\n\n- one\n\n| my | own |\n|--|--|\n\nend"
DAMAGES = {
    "no begin": MADE + b"\n" + END + b"\n",
    "no end": BEGIN + b"\n" + MADE + b"\n",
    "neither": MADE + b"\n",
    "two begins": BEGIN + b"\n" + BEGIN + b"\n" + MADE + b"\n" + END + b"\n",
    "two ends": BEGIN + b"\n" + MADE + b"\n" + END + b"\n" + END + b"\n",
    "twice": (BEGIN + b"\n" + MADE + b"\n" + END + b"\n") * 2,
    "reversed": END + b"\n" + MADE + b"\n" + BEGIN + b"\n",
    "empty": BEGIN + b"\n" + END + b"\n",
    "edited": BEGIN + b"\n\n| 31 | perfect |\n\n  | 32\n\n" + END + b"  \n",
    "begin alone": BEGIN + b"\n",
    "end alone": END + b"\n",
}


@pytest.mark.parametrize("damaged", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_table_is_made_again_where_it_stood(root, damaged):
    write_page(root, TOP + damaged + NOTES)

    record_run(root, entry())
    once = page(root).read_bytes()
    remake(root)

    assert len(table(root)) == 2
    assert once.startswith(TOP + BEGIN)
    assert once.endswith(END + b"\n" + NOTES)
    assert page(root).read_bytes() == once


@pytest.mark.parametrize(
    ("old", "above"),
    [
        (b"# Mine\ntext", b"# Mine\n"),
        (b"# Mine", b"# Mine\n"),
        (b"\xef\xbb\xbf# Mine\ntext\n", b"\xef\xbb\xbf# Mine\n"),
        (b"text\n", b""),
        (b"\n", b""),
    ],
)
def test_a_page_without_a_table_gets_one_below_its_title(root, old, above):
    write_page(root, old)

    record_run(root, entry())

    text = page(root).read_bytes()
    assert len(table(root)) == 2
    assert text.startswith(above + BEGIN)
    assert text.endswith(END + b"\n" + old[len(above) :])


def test_what_was_written_among_the_rows_goes_below_the_table(root):
    rows = BEGIN + b"\n" + MADE + b"\n\n- mine\n\n- too\n| 32 |\n\n" + END + b"\n"
    write_page(root, TOP + rows + NOTES)

    record_run(root, entry())

    assert len(table(root)) == 2
    assert page(root).read_bytes().endswith(END + b"\n- mine\n\n- too\n" + NOTES)


def test_what_stands_between_two_tables_or_in_an_unclosed_one_stays(root):
    whole = BEGIN + b"\n" + MADE + b"\n" + END + b"\n"
    first, second, third = b"- one\n| my |\n\n| own |\n- two\n", b"- three\n", b"- four\n"
    write_page(root, whole.removesuffix(END + b"\n") + first + whole + second + END + b"\n" + third)

    record_run(root, entry())

    assert len(table(root)) == 2
    assert page(root).read_bytes().partition(END + b"\n")[2] == first + second + third


def test_a_marker_astray_does_not_move_the_table(root):
    write_page(root, END + b"\n" + TOP + BEGIN + b"\n" + MADE + b"\n" + END + b"\n" + NOTES)

    record_run(root, entry())

    assert page(root).read_bytes().startswith(TOP + BEGIN)
    assert page(root).read_bytes().endswith(END + b"\n" + NOTES)


PIECES = [BEGIN, END, MADE, b"", b"text", b"# Title", b"| my | own |", b"\xff\xfe", b"- note\r"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from([b"", b"\n", b"\r\n"]))
def test_no_damage_loses_a_text_or_survives_a_remake(pieces, end):
    def texts(content):
        words = [line.strip() for line in content.split(b"\n")]
        return [w for w in words if w and w not in (BEGIN, END) and not w.startswith(b"|")]

    old = b"\n".join(pieces) + end
    once = remade(old, ["| a row |"])

    assert once.splitlines().count(BEGIN) == once.splitlines().count(END) == 1
    assert remade(once, ["| a row |"]) == once
    assert not old or texts(once) == texts(old)


# --- files ---------------------------------------------------------------------------------------


def test_importing_it_is_cheap():
    code = "import sys, kata.learn.record; print({'torch', 'numpy', 'pytest'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


def test_a_page_that_can_not_be_replaced_stays_as_it_was(root, monkeypatch):
    record_run(root, entry())
    before = page(root).read_bytes()

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    warnings = record_run(root, entry(hours=1))
    with pytest.raises(OSError, match="no"):
        note(root, 31, "mine")

    assert warnings == ["progress.md stays as it was: no"]
    assert page(root).read_bytes() == before
    assert len(read(root)[0]) == 2
    assert left_behind(root) == set()


def left_behind(root):
    """Files that a finished write has no use for."""
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    ours = {progress.RECORD, progress.PAGE, progress.SUMMARY, progress.LOCK}
    return {name for name in files - ours if not name.startswith("solutions/")}


def test_everything_is_on_disk_before_the_page_is_replaced_all_under_one_lock(root, monkeypatch):
    record_run(root, entry())
    done = []

    def fsync(handle, true=os.fsync):
        assert is_locked(root)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append((path.parent, path.read_bytes()))
        true(handle)

    def replace(old, new, true=os.replace):
        assert is_locked(root)
        assert Path(old).parent == Path(new).parent
        done.append(f"replace {Path(new).name}")
        true(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    record_run(root, entry("failed", hours=1))

    assert done == [
        (root / ".kata", record(root).read_bytes()),
        "replace summary.json",
        (root, page(root).read_bytes()),
        "replace progress.md",
    ]


def is_locked(root):
    with (root / progress.LOCK).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_what_an_editor_saves_during_a_write_is_kept(root, monkeypatch):
    remake(root)
    saved = page(root).read_bytes() + b"- saved by an editor\n"

    saves = iter([None, saved, saved + b"- and again\n"])

    def fsync(_):
        if text := next(saves, None):
            page(root).write_bytes(text)

    monkeypatch.setattr(os, "fsync", fsync)
    record_run(root, entry())

    assert page(root).read_bytes().endswith(b"- saved by an editor\n- and again\n")
    assert len(table(root)) == 2


def test_a_writer_waits_for_the_lock(root):
    remake(root)
    before = page(root).read_bytes()
    writers = [
        threading.Thread(target=record_run, args=(root, entry())),
        threading.Thread(target=note, args=(root, 31, "mine", NOON)),
        threading.Thread(target=give_up, args=(root, OTHER, NOON)),
    ]

    with FileLock(root / progress.LOCK):
        for writer in writers:
            writer.start()
        time.sleep(0.2)
        assert all(writer.is_alive() for writer in writers)
        assert not record(root).exists()
        assert page(root).read_bytes() == before
    for writer in writers:
        writer.join(10)

    assert len(read(root)[0]) == 2
    assert page(root).read_bytes().endswith("· 31: mine\n".encode())


def test_a_lock_that_another_holds_is_waited_for_a_while_and_named(root, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    remake(root)

    with FileLock(root / progress.LOCK), pytest.raises(OSError) as caught:
        record_run(root, entry())

    assert progress.reason(caught.value) == "another process holds .kata/progress.lock"
    assert not record(root).exists()


def test_the_lock_of_a_dead_process_is_free(root):
    code = (
        "import filelock, os, sys; filelock.FileLock(sys.argv[1]).acquire(); "
        "os.kill(os.getpid(), 9)"
    )
    remake(root)
    lock = root / progress.LOCK
    done = subprocess.run([sys.executable, "-c", code, lock], timeout=60)

    assert done.returncode == -signal.SIGKILL
    assert lock.exists()
    assert record_run(root, entry()) == []


def test_a_line_that_finds_no_room_leaves_nothing_of_it(root, monkeypatch):
    record_run(root, entry())
    before = record(root).read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            record_run(root, entry("failed", 1))

    assert record(root).read_bytes() == before
    assert record_run(root, entry("failed", 2)) == []
    assert standings(root)[STEM].tries == 2


@pytest.mark.parametrize("name", [".kata/runs.jsonl", ".kata", ".kata/progress.lock"])
@pytest.mark.parametrize("what", ["folder", "file", "link to itself"])
def test_what_stands_in_the_way_of_the_record_is_an_os_error(root, name, what):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to(path)
    fine = [(".kata", "folder"), (".kata/runs.jsonl", "file"), (".kata/progress.lock", "file")]

    if (name, what) in fine:
        assert record_run(root, entry()) == []
    else:
        with pytest.raises(OSError) as caught:
            record_run(root, entry())
        assert progress.reason(caught.value)
    assert path.is_dir() == (what == "folder")


@pytest.mark.parametrize("what", ["folder", "link to nowhere"])
def test_a_run_counts_also_where_the_page_can_not_be_written(root, what):
    if what == "folder":
        page(root).mkdir()
    else:
        page(root).symlink_to(root / "no" / "where")

    (warning,) = record_run(root, entry())

    assert warning.startswith("progress.md stays as it was: ")
    assert standings(root)[STEM].tries == 1
    assert left_behind(root) == set()


def test_a_record_that_is_a_link_stays_one(root):
    (root / "elsewhere").mkdir()
    real = root / "elsewhere" / "runs.jsonl"
    record(root).parent.mkdir()
    record(root).symlink_to(real)

    record_run(root, entry())
    record_run(root, entry("failed", 1))

    assert record(root).is_symlink()
    assert real.read_bytes().count(b"\n") == 2
    assert is_summed_up(root)


def test_a_byte_order_mark_costs_no_line(root):
    append_lines(root, entry())
    record(root).write_bytes(entries.BOM + record(root).read_bytes())

    assert record_run(root, entry("failed", 1)) == []
    assert standings(root)[STEM].tries == 2


def test_a_link_stays_a_link_and_a_mode_its_mode(root):
    (root / "elsewhere").mkdir()
    real = root / "elsewhere" / "mine.md"
    real.write_text("# Mine\n")
    real.chmod(0o640)
    page(root).symlink_to(real)

    record_run(root, entry())

    assert page(root).is_symlink()
    assert BEGIN in real.read_bytes()
    assert real.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in real.parent.iterdir()] == ["mine.md"]


def test_what_a_killed_writer_left_lying_is_cleared_away(root):
    (root / ".progress.md.new").write_bytes(b"half a pa")

    remake(root)

    assert not (root / ".progress.md.new").exists()
    assert len(table(root)) == 1


# --- the summary ---------------------------------------------------------------------------------


def summary(root):
    return root / ".kata" / "summary.json"


def is_summed_up(root):
    """Whether the next run will be spared from reading the whole record."""
    if not record(root).exists():
        return False
    with record(root).open("rb") as file:
        return summaries.load(summary(root), file, entries.clock()) is not None


def in_full(root):
    """The standings, told from all entries at once and without a summary."""
    events = {}
    for each in read(root)[0]:
        if each.event in ("run", "give-up"):
            events.setdefault(each.exercise, []).append(each)
    return {stem: told(events[stem], entries.clock()) for stem in events}


def told(events, now):
    runs = [each for each in events if each.event == "run"]
    last = (runs or events)[-1]
    won = [each.event == "run" and each.state == "passed" for each in events]
    times = [each.at for each in events if each.at <= now]
    return summaries.Standing(
        stem=last.exercise,
        state="passed" if any(won) else last.state,
        now=last.state,
        passed=last.passed,
        total=last.total,
        tries=len(runs),
        first=min(times, default=None),
        last=max(times, default=None),
        gave_up="give-up" in [e.event for e in events[: [*won, True].index(True)]],
    )


def line_of(each):
    return msgspec.json.encode(each) + b"\n"


CHANGES = {
    "run": lambda root, new: record_run(root, new),
    "run ahead": lambda root, new: record_run(root, later(new, 5000)),
    "run behind": lambda root, new: record_run(root, later(new, -5000)),
    "note": lambda root, new: note(root, 31, "mine"),
    "append": lambda root, new: change(root, lambda old: old + line_of(new)),
    "append twice": lambda root, new: change(root, lambda old: old + 2 * line_of(new)),
    "append ahead": lambda root, new: change(root, lambda old: old + line_of(later(new, 5000))),
    "insert": lambda root, new: change(root, lambda old: line_of(new) + old),
    "damage": lambda root, new: change(root, lambda old: old + b"{\n"),
    "tear": lambda root, new: change(root, lambda old: old[:-9]),
    "edit": lambda root, new: change(root, lambda old: old.replace(b'"failed"', b'"passed"', 1)),
    "CRLF": lambda root, new: change(root, lambda old: old.replace(b"\n", b"\r\n")),
    "BOM": lambda root, new: change(root, lambda old: entries.BOM + old),
    "empty": lambda root, new: change(root, lambda old: b""),
    "no summary": lambda root, new: summary(root).unlink(missing_ok=True),
    "half a summary": lambda root, new: change(root, lambda old: old[:-5], summary(root)),
    "no record": lambda root, new: record(root).unlink(missing_ok=True),
}


def later(each, hours):
    return msgspec.structs.replace(each, at=each.at + timedelta(hours=hours))


def change(root, how, path=None):
    path = path or record(root)
    if path.exists():
        path.write_bytes(how(path.read_bytes()))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*CHANGES, *["run"] * 9]),
            st.sampled_from(["passed", "failed", "begun", "unwritten"]),
            st.sampled_from([STEM, OTHER, "ex55_of_another_year"]),
            st.sampled_from(["run", "run", "give-up", "hint"]),
            st.sampled_from([0.0, 0.1, 1.0, 30.0, 4000.0, -2.0, -4000.0]),
        ),
        max_size=14,
    )
)
def test_a_summary_says_what_the_whole_record_says_whatever_happens_to_either(
    tmp_path_factory, history
):
    root, hours = make_root(tmp_path_factory.mktemp("history")), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(entries, "clock", lambda: NOON + timedelta(hours=hours))
        for number, (what, state, stem, event, pause) in enumerate(history):
            hours += pause
            new = entry(state, hours, stem, passed=number, total=number, event=event)
            said = CHANGES[what](root, new)

            assert standings(root) == in_full(root)
            assert said is None or said == read(root)[1]
            if said is not None:
                assert table(root) == rows(root, in_full(root))


def test_a_run_of_the_future_stands_below_the_last_line_in_the_table_too(root, set_clock):
    set_clock(NOON)
    append_lines(root, entry("passed", -1), entry("failed", -2, stem=OTHER), entry("failed", -2))

    record_run(root, entry("begun", YEAR))

    assert table(root) == rows(root, in_full(root))
    assert "| passed |" in table(root)[1]


def test_a_run_reads_no_more_than_the_ends_of_a_long_record(root, monkeypatch):
    append_lines(root, *[entry("failed", hours / 99, passed=hours) for hours in range(999)])
    record_run(root, entry(hours=20))
    monkeypatch.setattr(entries, "parsed", None)

    record_run(root, entry("failed", hours=21))
    note(root, 31, "mine")
    give_up(root, OTHER, NOON + timedelta(hours=22))

    found = standings(root)[STEM]
    assert (found.state, found.now, found.tries) == ("passed", "failed", 1001)
    assert len(table(root)) == 3


def test_a_summary_is_kept_also_where_only_a_note_was_made_of_a_merged_record(root):
    append_lines(root, entry(), entry(hours=1))
    assert not is_summed_up(root)

    note(root, 31, "mine")

    assert is_summed_up(root)


def test_a_summary_of_another_version_is_not_read(root):
    record_run(root, entry())
    data = json.loads(summary(root).read_bytes())
    summary(root).write_text(json.dumps(data | {"format": 0, "standings": {}}))

    assert standings(root)[STEM].tries == 1


def test_an_edit_that_leaves_size_and_ends_alike_is_noticed(root):
    append_lines(root, *[entry("failed", hours / 99, passed=hours) for hours in range(99)])
    record_run(root, entry("failed", hours=20))
    lines = record(root).read_bytes().splitlines(keepends=True)
    lines[50] = lines[50].replace(b'"failed"', b'"passed"')

    record(root).write_bytes(b"".join(lines))

    assert standings(root)[STEM].state == "passed"


# --- kills ---------------------------------------------------------------------------------------
# A process that has imported little is quick to fork, and may be: pytest's own, with torch, is not.

ABOVE = b"# Mine\n\ncaf\xe9 \xff, and more of it\r\n" + b"word " * 4_000 + b"\n"
BELOW = b"\n- a note of mine\r\n  with \xfe"


def besieged(root, how):
    """Run `how` in a process of its own; returns the counts that it prints."""
    command = [sys.executable, __file__, how, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_line_leaves_the_old_page_or_the_new_one(root):
    kills = besieged(root, "step")

    assert kills["run"] > 80
    assert kills["note"] > 50


def test_kills_of_two_writers_lose_nothing_and_leave_nothing_behind(root):
    """KATA_KILLS=300 python -m pytest …: more of them."""
    counts = besieged(root, "siege")

    assert counts["kills"] >= KILLS
    assert counts["notes"] > KILLS / 4
    assert counts["runs"] > KILLS / 20
    assert counts["half pages"] > 0
    assert counts["summaries"] > 0


def forked(work):
    """A child that does the work and ends, whatever happens in it."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def step(root):
    """Kill a writer at its first line in what writes, at its second, and so on to its end."""
    write_page(root, ABOVE + BEGIN + b"\n" + END + b"\n" + BELOW + b"\n")
    number = 0
    while stepped(root, lambda: record_run(root, entry("failed")), number, rows=1):
        number += 1
    kills = {"run": number}
    number, item = 0, "- 2026-11-22 · 31: mine\n".encode()
    while stepped(root, lambda: note(root, 31, "mine", NOON), number, item=item):
        number += 1
    return {**kills, "note": number}


def stepped(root, write, number, rows=0, item=b""):
    """Whether the writer had a line of that number to be killed at; what it left is checked."""
    record(root).unlink(missing_ok=True)
    record_run(root, entry(hours=-1))
    before = page(root).read_bytes()
    lines = count()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (progress.__file__, summaries.__file__):
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced():
        sys.settrace(trace)
        write()

    status = os.waitpid(forked(traced), 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0
    found, warnings = read(root)
    assert len(found) in ((1, 1 + rows) if killed else (1 + rows,))
    assert not warnings
    assert standings(root) == in_full(root)
    after = page(root).read_bytes()
    if after != before or not killed:
        assert after.startswith(ABOVE + BEGIN)
        assert after.rpartition(END)[2] == before.rpartition(END)[2] + item
        assert tries(root) == 1 + rows
    record_run(root, entry("failed", hours=1))
    assert tries(root) == len(found) + 1
    assert standings(root) == in_full(root)
    assert left_behind(root) == set()
    return killed


def siege(root):
    """Two writers at once, each killed at a moment of its own; after both, all is checked."""
    write_page(root, ABOVE + BEGIN + b"\n" + END + b"\n" + BELOW)
    remake(root)
    returned = {"run": set(), "note": set()}
    half_pages = summaries = 0
    rng = random.Random(31)
    for number in range((KILLS + 1) // 2):
        pipe, into = os.pipe()
        writers = [forked(partial(loop, root, f"{number}-{name}", into)) for name in "ab"]
        os.close(into)
        if number % 4:  # on a busy machine most would else be killed before they began
            select.select([pipe], [], [], 5)
        start = time.monotonic()
        for delay, writer in sorted((rng.uniform(0, 0.02), writer) for writer in writers):
            time.sleep(max(0.0, start + delay - time.monotonic()))
            os.kill(writer, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(writer, 0)[1])
        with os.fdopen(pipe) as reports:
            for kind, name in map(str.split, reports):
                returned[kind].add(name)
        check(root, returned)
        half_pages += (root / ".progress.md.new").exists()
        summaries += is_summed_up(root)
    record_run(root, entry(hours=99))
    assert is_summed_up(root)
    assert tries(root) == len(read(root)[0])
    assert left_behind(root) == set()
    returns = {f"{kind}s": len(names) for kind, names in returned.items()}
    return {"kills": 2 * number + 2, "half pages": half_pages, "summaries": summaries, **returns}


def loop(root, name, into):
    for number in count():
        note(root, 31, f"{name}-{number}", NOON)
        os.write(into, f"note {name}-{number}\n".encode())
        record_run(root, entry("failed", hours=number, mistake=f"{name}-{number}"))
        os.write(into, f"run {name}-{number}\n".encode())


def check(root, returned):
    """Nothing whose call returned is lost or doubled, and the page is whole."""
    written = Counter(run.mistake for run in read(root)[0])
    assert returned["run"] <= written.keys()
    assert max(written.values(), default=1) == 1
    assert len(returned["run"]) <= tries(root) <= len(written)
    assert standings(root) == in_full(root)

    text = page(root).read_bytes()
    assert text.startswith(ABOVE + BEGIN)
    own, _, notes = text.partition(END + b"\n")[2].partition(BELOW)
    found = Counter(re.findall("- 2026-11-22 · 31: (.+)", notes.decode()))
    assert own == b""
    assert len(notes.splitlines()) - bool(notes) == len(found)
    assert returned["note"] <= found.keys()


def tries(root):
    return int(table(root)[-1].split("|")[4])


if __name__ == "__main__":
    # A kill loses nothing of a finished write, so a true fsync only makes this slow on a busy disk.
    # A short pause in its place has more kills hit a page that is not yet in its place.
    os.fsync = lambda _: time.sleep(0.001)
    entries.clock = lambda: LATER
    print(json.dumps({"step": step, "siege": siege}[sys.argv[1]](Path(sys.argv[2]))))
