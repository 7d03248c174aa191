"""Stubs: what the learner gets of a solution."""

import ast
from pathlib import Path

import pytest

from kata.course import catalog
from kata.course.stubs import BadSolution, make_stub

ROOT = Path(__file__).parents[2]


def test_hides_from_the_comment_to_the_end_of_the_block():
    source = '''"""Exercise 05: x."""

def f(x):
    """Says."""
    # solution
    y = x

    return """text
at the margin"""


class A:
    def g(self):
        # solution
        if self:
            return 1
        return 2

    def h(self):
        return 3
'''
    assert (
        make_stub(source, 5)
        == '''"""Exercise 05: x."""

def f(x):
    """Says."""
    raise NotImplementedError("exercise 05 is not written yet")


class A:
    def g(self):
        raise NotImplementedError("exercise 05 is not written yet")

    def h(self):
        return 3
'''
    )


def test_leaves_out_private_names_that_only_hidden_lines_use():
    source = """import math

_SHOWN = 1

# How far.
_HIDDEN = 2


def f(x, y=_SHOWN):
    # solution
    return _helper(x)


def _helper(x):
    # solution
    return _inner(x) + _HIDDEN


def _inner(x):
    # solution
    return math.exp(x)
"""
    stub = make_stub(source, 5)

    assert "_SHOWN" in stub and "import math" in stub
    for name in ("_HIDDEN", "How far", "_helper", "_inner"):
        assert name not in stub
    assert stub.count("raise NotImplementedError") == 1


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f():\n    return 1\n", "no `# solution` comment"),
        ("# solution\nx = 1\n", "inside a function"),
    ],
)
def test_says_why_no_stub_can_be_made(source, complaint):
    with pytest.raises(BadSolution, match=complaint):
        make_stub(source, 5)


@pytest.mark.parametrize("exercise", catalog.exercises(ROOT), ids=lambda e: e.stem)
def test_stubs_keep_every_public_name_and_signature(exercise):
    def signatures(source):
        for node in ast.parse(source).body:
            if getattr(node, "name", "_").startswith("_"):
                continue
            yield ast.unparse(node).splitlines()[0]
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}({ast.unparse(inner.args)})"

    solution, stub = exercise.solution.read_text("utf-8"), exercise.stub.read_text("utf-8")
    assert list(signatures(stub)) == list(signatures(solution))
