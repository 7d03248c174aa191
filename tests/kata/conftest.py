"""What the runner's own tests share."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    """A small copy of the project: exercises 01 and 31."""
    for name in ("exercises", "solutions", "tests", "mistakes", "lessons", "figures"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).glob("*ex[03]1_*"):
            shutil.copy(path, tmp_path / name)
    return tmp_path
