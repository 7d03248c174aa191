"""The proof: what it claims, what it faults, and what it need not judge again."""

import pytest

from kata.author import proof
from kata.course import catalog, variants
from kata.judge.report import Report, SpecReport


@pytest.fixture
def exercise(project):
    return catalog.find(project, 31)


@pytest.fixture
def judged(monkeypatch):
    """The jobs that were judged: the reference and what is accepted pass, the others fail."""
    jobs = []

    def judge_all(requests, at_once, together):
        for which, request in enumerate(requests):
            jobs.append(request)
            yield which, report_of(request), 0.1

    monkeypatch.setattr(proof, "judge_all", judge_all)
    monkeypatch.setattr(proof, "warm", lambda imports: None)
    return jobs


says_of = {}  # by submission: how it goes, the mistake's name, and how spec b goes if otherwise


def report_of(request):
    status, says, *other = says_of.get(request.submission, ("passed", []))
    specs = [
        SpecReport("test_a", status, mistakes=says),
        SpecReport("test_b", *(other or [status]), mistakes=says),
    ]
    return Report(request.stem, request.submission, specs)


@pytest.fixture
def right(exercise):
    """Every claim is true."""
    says_of.clear()
    for claim in proof.claims(exercise, 0):
        says = claim.says.partition(": ")[2]
        if claim.says.startswith("the stub"):
            says_of[claim.job.submission] = "unwritten", []
        elif claim.says.startswith("rejects") or claim.alone:
            says_of[claim.job.submission] = "failed", [says]
    return [claim.job.submission for claim in proof.claims(exercise, 0) if claim.alone]


def test_every_mistake_is_claimed_alone_and_on_top_of_the_first_version_that_it_fits(exercise):
    known = variants.load(exercise)
    claims = list(proof.claims(exercise, 0))

    assert sum(claim.says.startswith("rejects: ") for claim in claims) == len(known.mistake)
    on_top = [claim for claim in claims if claim.alone]
    assert len(on_top) == proof.ON_TOP
    assert len({claim.job.submission for claim in claims}) == len(claims)


def test_the_seed_draws_which_mistakes_are_made_on_top(exercise):
    seen = [{c.alone.says for c in proof.claims(exercise, seed) if c.alone} for seed in range(20)]

    assert seen[0] == {c.alone.says for c in proof.claims(exercise, 0) if c.alone}
    assert seen[0] != seen[1]
    assert len(set().union(*seen)) > 20


def test_verdicts_are_used_again_until_what_they_depend_on_changes(exercise, judged, right):
    assert proof.main([exercise]) == 0
    n = len(judged)
    assert n > 40

    assert proof.main([exercise]) == 0
    assert len(judged) == n

    exercise.stub.write_text(exercise.stub.read_text() + "\n# other\n")
    assert proof.main([exercise]) == 0
    assert [job.submission for job in judged[n:]] == [str(exercise.stub)]

    exercise.spec.write_text(exercise.spec.read_text() + "\n# other\n")
    assert proof.main([exercise]) == 0
    assert len(judged) == 2 * n + 1


def test_fresh_judges_all_again(exercise, judged, right):
    proof.main([exercise])
    n = len(judged)

    assert proof.main([exercise], fresh=True) == 0
    assert len(judged) == 2 * n


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(proof, "ON_TOP", 24)
    monkeypatch.setattr(proof, "MANY", 1)


@pytest.mark.parametrize(("n_missed", "status"), [(0, 0), (1, 0), (2, 1)])
def test_on_top_a_few_may_have_no_name(exercise, many, judged, right, capsys, n_missed, status):
    for submission in right[:n_missed]:
        says_of[submission] = "failed", []

    assert proof.main([exercise]) == status
    out = capsys.readouterr().out
    assert f"{len(right) - n_missed} of {len(right)} mistakes named on top" in out
    assert out.count("not named") == n_missed


def test_a_false_name_on_top_is_a_fault(exercise, judged, right, capsys):
    says_of[right[0]] = "failed", ["Something else."]

    assert proof.main([exercise]) == 1
    assert "taken for: Something else." in capsys.readouterr().out


def test_what_passes_on_top_is_no_mistake_any_more(exercise, judged, right, capsys):
    says_of[right[0]] = "passed", []

    assert proof.main([exercise]) == 0
    assert f"{len(right) - 1} of {len(right) - 1} mistakes" in capsys.readouterr().out


def test_what_passes_a_spec_on_top_that_it_fails_alone_is_another_mistake(
    exercise, judged, right, capsys
):
    says_of[right[0]] = "failed", [], "passed"

    assert proof.main([exercise]) == 0
    assert f"{len(right) - 1} of {len(right) - 1} mistakes" in capsys.readouterr().out


def test_a_reference_that_takes_more_than_a_third_of_its_time_is_a_fault():
    slow, quick = (SpecReport("test_a", "passed", seconds, limit=6.0) for seconds in (2.1, 1.9))
    unlimited = SpecReport("test_b", "passed", 99.0)

    assert proof._passes_in_time(Report("", "", [quick, unlimited])) == []
    (fault,) = proof._passes_in_time(Report("", "", [slow]))
    assert fault == "a took 2.1 s, more than a third of its 6 s"
