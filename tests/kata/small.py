"""A project of one exercise, for the runner's tests."""

from kata.course import catalog

SOLUTION = '''
"""Exercise 05: doubling."""

import torch


def double(x):
    """Twice x. Text raises TypeError."""
    # solution
    if isinstance(x, str):
        raise TypeError(f"x must be a tensor, got {x!r}")
    return 2 * x
'''

SPEC = """
import pytest
import torch
from hypothesis import given, strategies as st
from kata.testing import assert_close

pytestmark = pytest.mark.cpu
WITHOUT = ["torch.add"]

def double(ex, x):
    return ex.double(x)

def test_doubles_a_tensor(attempt, rng):
    x = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    assert_close(attempt(double, x), x + x)

def test_refuses_text(attempt):
    with pytest.raises(TypeError, match="tensor"):
        attempt(double, "x")

@given(n=st.integers(1, 5))
def test_keeps_the_length(attempt, n):
    assert attempt(double, torch.ones(n)).shape == (n,)
"""

MISTAKES = """
[[mistake]]
says = "It is tripled."
swap = [["2 * x", "3 * x"]]

[[mistake]]
says = "It is squared."
swap = [["2 * x", "x * x"]]

[[accept]]
says = "Adds it to itself."
swap = [["2 * x", "x + x"]]
"""


def make_project(root):
    """Its files in an empty folder; returns the exercise."""
    for name in ("exercises", "solutions", "tests", "mistakes", "lessons"):
        (root / name).mkdir()
    (root / "solutions/ex05_doubling.py").write_text(SOLUTION)
    (root / "exercises/ex05_doubling.py").write_text(SOLUTION)
    (root / "tests/test_ex05_doubling.py").write_text(SPEC)
    (root / "mistakes/ex05_doubling.toml").write_text(MISTAKES)
    (root / "lessons/ex05_doubling.md").write_text("# 05\n## After it passes\n- Treble.\n")
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-p kata.plugin"\n')
    return catalog.find(root, 5)
