"""Names of mistakes: when the known one is said to explain a spec, and when nothing is said."""

import numpy as np
import pytest
import torch

from kata.attempt import wire
from kata.attempt.outcome import Attempted, Done, Frame, Job, Problem
from kata.course.variants import Variant
from kata.judge.likeness import same, telling
from kata.judge.naming import explain

SCALE, SHIFT, SIGN = (Variant(says, ()) for says in ("scale", "shift", "sign"))
X = torch.tensor([1.2345, 2.3456, 3.4567, 4.5678], dtype=torch.float64)


def gave(result):
    return [Done(wire.encode(result))]


def raised(kind, message, function="f"):
    return [Done(problem=Problem([kind], message, [Frame("ex.py", 1, function, "")]))]


class Run:
    """Specs of one attempt each or more: the reference, the learner's code and known mistakes."""

    def __init__(self):
        self.record, self.outcomes, self.asked = [], [], []

    def attempt(self, spec, reference, mine, seconds=0.0, **known):
        """`known` by the mistake's `says`; what isn't given does what the reference does."""
        number = len(self.record)
        done = [Done(d.result, d.problem, seconds=seconds) for d in mine]
        self.record.append(Attempted(Job(spec, "run", b"", number), done))
        self.outcomes.append({"": reference} | known)

    def names(self, *failed, known=(SCALE, SHIFT)):
        def replay(variant, past):
            says, outcomes = variant.says if variant else "", self.outcomes[past.job.seed]
            self.asked.append((says, past.job.seed))
            return outcomes.get(says, outcomes[""])

        found = explain(known, self.record, list(failed), replay)
        return {spec: variant.says for spec, variant in found.items()}


def test_a_mistake_is_named_under_the_spec_that_it_explains():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X))
    run.attempt("b", gave(X), gave(X))

    assert run.names("a") == {"a": "scale"}


def test_two_faults_have_two_names():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X))
    run.attempt("b", gave(X), gave(X + 7), shift=gave(X + 7))

    assert run.names("a", "b") == {"a": "scale", "b": "shift"}


def test_an_unknown_fault_has_no_name():
    run = Run()
    run.attempt("a", gave(X), gave(5 * X), scale=gave(3 * X))

    assert run.names("a") == {}


def test_a_mistake_must_do_the_same_in_every_attempt_of_the_spec():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X))
    run.attempt("a", gave(X), gave(5 * X))

    assert run.names("a") == {}


@pytest.mark.parametrize("failed", [["a"], ["a", "b"]])
def test_what_a_mistake_changes_and_the_code_does_not_speaks_against_it(failed):
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X))
    run.attempt("b", gave(X), gave(X if failed == ["a"] else 5 * X), scale=gave(3 * X))

    assert run.names(*failed) == {}


def test_what_a_mistake_and_the_code_change_alike_does_not():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X))
    run.attempt("b", gave(X), gave(X + 7), scale=gave(X + 7))  # the spec looks at another thing

    assert run.names("a") == {"a": "scale"}


@pytest.mark.parametrize(
    ("reference", "mine"),
    [
        (torch.tensor([4]), torch.tensor([5])),
        (True, False),
        (X.shape[0], 5),
        (X, X[:0]),
        (X, torch.full((4,), torch.nan)),
        (X, torch.full((4,), torch.inf)),
        (X, torch.zeros(4, dtype=torch.float64)),
        ("one", "two"),
        (None, 3),
    ],
)
def test_what_many_faults_share_names_a_mistake_only_if_it_explains_all(reference, mine):
    run = Run()
    run.attempt("a", gave(reference), gave(mine), scale=gave(mine))
    assert run.names("a") == {"a": "scale"}

    run.attempt("b", gave(X), gave(5 * X))
    assert run.names("a", "b") == {}


def test_an_error_names_a_mistake_only_if_it_explains_all():
    run = Run()
    run.attempt("a", gave(X), raised("TypeError", "no x"), scale=raised("TypeError", "no x"))
    assert run.names("a") == {"a": "scale"}

    run.attempt("b", gave(X), gave(5 * X))
    assert run.names("a", "b") == {}


def test_equal_numbers_of_another_shape_tell_something():
    run = Run()
    run.attempt("a", gave(X), gave(X[None]), scale=gave(X[None]))
    run.attempt("b", gave(X), gave(5 * X))

    assert run.names("a", "b") == {"a": "scale"}


def test_two_mistakes_that_cannot_be_told_apart_have_no_name():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X), shift=gave(3 * X))

    assert run.names("a") == {}


def test_of_two_mistakes_the_one_that_explains_more_is_named():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X), shift=gave(3 * X))
    run.attempt("b", gave(X), gave(X + 7), shift=gave(X + 7))

    assert run.names("a", "b") == {"a": "shift", "b": "shift"}


def test_of_two_mistakes_that_explain_as_much_the_one_is_named_that_agrees_in_other_specs_too():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X), shift=gave(3 * X))
    run.attempt("b", gave(X), gave(X + 7), shift=gave(X + 7))

    assert run.names("a") == {"a": "shift"}


def test_most_mistakes_are_replayed_once():
    run = Run()
    for _ in range(9):
        run.attempt("a", gave(X), gave(3 * X), scale=gave(3 * X), shift=gave(X + 7))
        run.attempt("b", gave(X), gave(X))

    assert run.names("a") == {"a": "scale"}
    assert [seed for says, seed in run.asked if says == "shift"] == [16]


def test_what_takes_long_is_replayed_last():
    run = Run()
    run.attempt("a", gave(X), gave(3 * X), seconds=9.0, scale=gave(3 * X), shift=gave(3 * X))
    run.attempt("b", gave(X), gave(X), shift=gave(X + 7))

    assert run.names("a") == {"a": "scale"}
    assert ("shift", 0) not in run.asked


# --- likeness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "alike"),
    [
        ("folder/b: shape [2, 3] into 6 at 0x7f0", True),
        ("folder/a: shape [2, 3] into 8", False),
        ("folder/a: no such x", False),
    ],
)
def test_errors_are_alike_if_they_say_the_same_but_for_paths(message, alike):
    known = raised("RuntimeError", "folder/a/x: shape [2, 3] into 6 at 0x3e1")

    assert same(known, raised("RuntimeError", message), in_failed=True) == alike
    assert same(known, raised("RuntimeError", message), in_failed=False)
    assert not same(known, raised("ValueError", message), in_failed=False)


def test_errors_out_of_two_functions_are_not_alike():
    known = raised("RuntimeError", "no", "forward")

    assert not same(known, raised("RuntimeError", "no", "__init__"))


def test_gradients_that_differ_in_numbers_are_not_alike():
    said = "Jacobian mismatch: numerical [1.23], analytical [{}]"
    known = raised("GradcheckError", said.format(0.6151))

    assert same(known, raised("GradcheckError", said.format(0.61510001)))
    assert not same(known, raised("GradcheckError", said.format(2.46)))


@pytest.mark.parametrize(
    ("mine", "reference", "n"),
    [
        (3 * X, X, 4),
        ([{"x": 3 * X[:2]}], [{"x": X[:2]}], 2),
        (torch.cat([X[:1], 3 * X[1:]]), X, 3),
        (X + 1e-9, X, 0),
        (X[None], X, 4),
        (torch.full((4,), 1.2345), X, 1),
        (torch.arange(4.0), X, 0),
        (np.float32(0.1234567), np.float32(1.0), 1),
        (X.bfloat16() * 3, X, 0),
        (X.long(), X, 0),
    ],
)
def test_numbers_of_many_digits_tell_something(mine, reference, n):
    assert telling(gave(mine), gave(reference)) == n
    assert telling(gave(mine), raised("TypeError", "no")) >= n
