"""The atlas: what known versions do is kept, looked up, and never in anybody's way."""

import os
import sqlite3
import subprocess
import sys
import time

import msgspec
import pytest

from kata.attempt import wire
from kata.attempt.outcome import Attempted, Done, Job
from kata.course import catalog, variants
from kata.judge import atlas as atlases
from kata.judge.atlas import Atlas, digest_of, surroundings
from kata.judge.child import Child, Request, judge_all
from kata.judge.replays import Replays, get_ready

NOT_DIVIDED = "The scores are not divided by √head_dim."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kata" / "atlas.sqlite"


def test_what_is_put_is_there_for_the_next_process(path):
    first = Atlas(path)
    first.put(b"a", b"one")
    assert first.get(b"a") == b"one"
    first.flush()

    second = Atlas(path)
    assert (second.get(b"a"), second.get(b"b")) == (b"one", None)
    second.put(b"a", b"two")
    second.flush()
    assert Atlas(path).get(b"a") == b"two"


def test_what_a_process_has_at_hand_is_bounded(path, monkeypatch):
    monkeypatch.setattr("kata.judge.atlas.MEMORY", 100)
    atlas = Atlas(path)
    for i in range(20):
        atlas.put(bytes([i]), bytes([i]) * 30)
        atlas.flush()
        assert sum(map(len, atlas._known.values())) <= 130
    assert all(atlas.get(bytes([i])) == bytes([i]) * 30 for i in range(20))


def test_equal_outcomes_are_kept_once(path):
    atlas = Atlas(path)
    for n in range(50):
        atlas.put(bytes([n]), b"x" * 100_000)
    atlas.flush()

    assert path.stat().st_size + path.with_name("atlas.sqlite-wal").stat().st_size < 500_000


def test_beyond_its_limit_what_is_oldest_goes(path):
    atlas = Atlas(path, limit=1 << 20)
    for n in range(100):
        atlas.put(bytes([n]), os.urandom(100_000))
        atlas.flush()

    fresh = Atlas(path)
    known = [n for n in range(100) if fresh.get(bytes([n]))]
    assert known and known[-1] == 99 and known == list(range(known[0], 100))
    fresh.get(b"")
    assert path.stat().st_size < 3 << 20


def test_what_is_too_large_is_not_kept(path):
    atlas = Atlas(path)
    atlas.put(b"a", bytes(atlases.LARGEST + 1))
    atlas.flush()

    assert Atlas(path).get(b"a") is None


def test_a_file_that_is_no_database_is_begun_anew(path):
    path.parent.mkdir()
    path.write_bytes(b"nonsense" * 999)

    atlas = Atlas(path)
    assert atlas.get(b"a") is None
    atlas.put(b"a", b"one")
    atlas.flush()
    assert Atlas(path).get(b"a") == b"one"


def test_where_nothing_can_be_written_it_lives_in_memory(path):
    path.parent.parent.joinpath("kata").write_text("a file, where a folder should be")

    atlas = Atlas(path)
    atlas.put(b"a", b"one")
    atlas.flush()
    assert atlas.get(b"a") == b"one" and atlas.get(b"b") is None


def test_whoever_holds_the_file_for_long_costs_the_others_no_more_than_their_patience(
    path, monkeypatch
):
    monkeypatch.setattr(atlases, "PATIENCE", 0.2)
    Atlas(path).get(b"")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")

    atlas, start = Atlas(path), time.monotonic()
    atlas.put(b"a", b"one")
    atlas.flush()
    assert atlas.get(b"a") == b"one" and time.monotonic() - start < 2


WRITER = """
import os, sys
from pathlib import Path
from kata.judge.atlas import Atlas
atlas = Atlas(Path(sys.argv[1]))
for n in range(10**6):
    atlas.put(f"{sys.argv[2]} {n}".encode(), os.urandom(1000))
    atlas.flush()
    print(n, flush=True)
"""


def test_many_may_write_at_once_and_be_killed(path):
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "abc"
    ]
    last = {}
    for writer, name in zip(writers, "abc", strict=True):
        for _ in range(30):
            last[name] = int(writer.stdout.readline())
    for writer in writers:
        writer.kill()
        writer.wait()
        writer.stdout.close()

    atlas = Atlas(path)
    for name, n in last.items():
        assert all(atlas.get(f"{name} {i}".encode()) for i in range(n + 1))
    atlas.put(b"after", b"all")
    atlas.flush()
    assert Atlas(path).get(b"after") == b"all"


def test_a_forked_child_has_a_connection_of_its_own(path):
    atlas = Atlas(path)
    atlas.put(b"a", b"one")
    atlas.flush()
    if (pid := os.fork()) == 0:
        atlas.put(b"b", b"two")
        atlas.flush()
        os._exit(0)
    os.waitpid(pid, 0)

    assert atlas.get(b"b") == b"two"


def test_keys_differ_in_all_that_an_outcome_depends_on(project, monkeypatch):
    spec = project / "tests" / "test_ex31_scaled_dot_product_attention.py"
    keys = {surroundings([spec])}
    spec.write_text(spec.read_text() + "\n")
    keys.add(surroundings([spec]))
    monkeypatch.setattr(atlases, "_versions", lambda: ["torch 0"])
    keys.add(surroundings([spec]))

    assert len(keys) == 3
    parts = [(b"a", "b"), (b"ab", ""), ("b", b"a"), (b"a", 1), (b"a", "1")]
    assert len({digest_of(*some) for some in parts}) == len(parts)


# --- replays -------------------------------------------------------------------------------------


class Somewhere:
    """A place that counts what is asked of it."""

    def __init__(self, asked, act=lambda: None):
        self.asked, self.act = asked, act

    def perform(self, job):
        self.asked.append(job)
        self.act()
        return [Done(wire.encode(len(self.asked)))]


def replays_of(project, asked, keeps=True, act=lambda: None):
    exercise = catalog.find(project, 31)
    make = lambda path: Somewhere(asked, act)  # noqa: E731
    return Replays(exercise, exercise.solution.parent, make, keeps), variants.load(exercise).mistake


PAST = Attempted(Job("spec", "run", b"call", 7), [Done(seconds=0.001)])


@pytest.mark.parametrize(("keeps", "n_asked"), [(True, 1), (False, 2)])
def test_a_mistake_is_replayed_once(project, keeps, n_asked):
    asked = []
    for _ in range(2):
        replays, (mistake, *_) = replays_of(project, asked, keeps)
        assert replays(mistake, PAST) == replays(mistake, PAST)
        replays.atlas.flush()

    assert len(asked) == n_asked


def test_another_mistake_call_seed_or_number_of_ranks_is_another_replay(project):
    asked = []
    replays, (one, two, *_) = replays_of(project, asked)
    job = PAST.job
    others = [{"run": "walk"}, {"call": b"other"}, {"seed": 8}, {"ranks": 2}]
    pasts = [PAST, *(Attempted(msgspec.structs.replace(job, **o), PAST.done) for o in others)]
    for version in (one, two, None):
        for past in pasts:
            replays(version, past)

    assert len(asked) == 15


def test_a_mistake_that_never_ends_is_out_of_time(project, monkeypatch):
    monkeypatch.setattr("kata.judge.replays.MORE", 0.2)

    def loop():
        while True:
            pass

    replays, (mistake, *_) = replays_of(project, [], act=loop)

    (done,) = replays(mistake, PAST)
    assert done.problem.types == ["OutOfTime"]


def test_that_a_machine_was_busy_elsewhere_is_not_kept(project, monkeypatch):
    monkeypatch.setattr("kata.judge.replays.MORE", 0.2)
    asked = []
    for _ in range(2):
        replays, (mistake, *_) = replays_of(project, asked, act=lambda: time.sleep(9))
        replays(mistake, PAST)
        replays.atlas.flush()

    assert len(asked) == 2


def test_ranks_have_time_to_be_forked_and_to_meet_before_they_are_out_of_it(project, monkeypatch):
    monkeypatch.setattr("kata.judge.replays.MORE", 0.2)
    replays, (mistake, *_) = replays_of(project, [], act=lambda: time.sleep(0.5))
    on_ranks = Attempted(msgspec.structs.replace(PAST.job, ranks=2), PAST.done)

    (done,) = replays(mistake, on_ranks)
    assert done.problem is None


# --- end to end ----------------------------------------------------------------------------------


def judged(request):
    ((_, report, _),) = judge_all([request], 1)
    return report


def test_names_need_no_replay_once_the_atlas_is_filled(project, monkeypatch):
    exercise = catalog.find(project, 31)
    wrong = project / "wrong.py"
    wrong.write_text(exercise.solution.read_text().replace(" / math.sqrt(q.shape[-1])", ""))
    request = Request(str(project), exercise.stem, str(wrong))
    assert judged(request.filling).state == "passed"

    def none(*_):
        raise AssertionError("replayed")

    monkeypatch.setattr(Replays, "_perform", none)
    report = judged(request)

    named = {spec.name: spec.mistakes for spec in report.specs if spec.status == "failed"}
    assert len(named) > 5 and set(map(tuple, named.values())) == {(NOT_DIVIDED,)}


def test_what_a_name_needs_is_ready_before_the_save(project, monkeypatch):
    exercise = catalog.find(project, 31)
    get_ready(exercise)

    replays, known = replays_of(project, [])
    monkeypatch.setattr(variants, "write", None)  # not called any more
    for mistake in known:
        replays(mistake, PAST)


def test_a_solution_that_changes_is_another_version(project):
    exercise = catalog.find(project, 31)
    asked = []
    replays, (mistake, *_) = replays_of(project, asked)
    replays(mistake, PAST)
    exercise.solution.write_text(exercise.solution.read_text() + "\n# other\n")
    replays, _ = replays_of(project, asked)
    replays(mistake, PAST)

    assert len(asked) == 2


def test_filling_may_be_ended_at_any_moment(project):
    request = Request(str(project), catalog.find(project, 31).stem)
    for seconds in (0.3, 0.6, 1.2):
        child = Child(request.filling)
        child.start()
        time.sleep(seconds)
        child.end()

    assert judged(request.filling).state == "passed"


def test_a_spec_whose_attempts_give_what_is_known_has_the_known_verdict(project):
    exercise = catalog.find(project, 31)
    options = ["--fill-atlas", "run"]
    first = judged(Request(str(project), exercise.stem, str(exercise.solution), options))
    for spec in first.specs:
        assert spec.status == "passed"

    exercise.solution.with_name("same.py").write_text(exercise.solution.read_text() + "\n# same\n")
    same = Request(str(project), exercise.stem, str(project / "solutions/same.py"), options)
    again = judged(same)
    assert [s.seconds for s in again.specs] == [s.seconds for s in first.specs]

    wrong = project / "wrong.py"
    wrong.write_text(exercise.solution.read_text().replace(" / math.sqrt(q.shape[-1])", ""))
    recalled = judged(Request(str(project), exercise.stem, str(wrong), options))
    plain = judged(Request(str(project), exercise.stem, str(wrong)))
    assert [(s.name, s.status, s.mistakes) for s in recalled.specs] == [
        (s.name, s.status, s.mistakes) for s in plain.specs
    ]
    assert plain.count("failed") > 5 and plain.count("passed") > 2
