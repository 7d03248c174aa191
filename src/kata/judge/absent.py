"""What to do about a module that isn't there.

A stranger may own a misspelt package. So `pip install` is offered for what pyproject.toml lists
and for nothing else; any other name gets the nearest one that exists.
"""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

NO_MODULE = re.compile(r"No module named '([\w.]+)'")
OTHER_NAMES = {"scikit-learn": "sklearn"}  # distributions whose module is called otherwise
NEAR = 0.7  # of difflib, from 0 to 1


def plainly(message: str, root: Path) -> str:
    """Python's complaint of an absent module as a fact and what to do; other messages as they are.

    root: the project, whose pyproject.toml says what may be installed
    """
    found = NO_MODULE.search(message)
    return advice(found[1], root) if found else message


def advice(module: str, root: Path) -> str:
    """That a module isn't there, and how to have it or which one may be meant."""
    top, _, below = module.partition(".")
    if below and _is_there(top):
        *parents, last = module.split(".")
        known = [name.name for name in pkgutil.iter_modules(_folders(parents))]
        nearest = [f"{'.'.join(parents)}.{name}" for name in _nearest(last, known)]
    else:
        if listed := _listed(top, root):
            suits = listed.marker is None or listed.marker.evaluate()
            how = f"to install it: pip install {listed.name}"
            return f"there is no module {top}; " + (how if suits else f"it needs {listed.marker}")
        ours = [path.stem for path in (root / "solutions").glob("ex*.py")]
        ours += [_module(requirement) for requirement in _dependencies(root)]
        installed = [name.name for name in pkgutil.iter_modules()]
        nearest = _nearest(top, ours) + _nearest(top, [*sys.stdlib_module_names, *installed])
        nearest.sort(key=lambda name: _distance(top, name))
    meant = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"there is no module {module}{meant}"


def _nearest(name: str, known: list[str]) -> list[str]:
    public = [each for each in known if each[0] != "_"]
    near = difflib.get_close_matches(name, public, n=5, cutoff=NEAR)
    return sorted(near, key=lambda other: _distance(name, other))


def _distance(name: str, other: str) -> tuple[float, bool]:
    """Of two that are equally near, the first letter decides: it is seldom mistyped."""
    return -difflib.SequenceMatcher(None, name, other).ratio(), name[0] != other[0]


def _is_there(top: str) -> bool:
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _folders(names: list[str]) -> list[str]:
    """Where the modules of a package lie, without importing it."""
    spec = importlib.util.find_spec(names[0])
    found = (spec.submodule_search_locations if spec else None) or []
    return [str(Path(folder, *names[1:])) for folder in found]


def _listed(module: str, root: Path) -> Requirement | None:
    """The dependency of the project that brings this module."""
    return next((r for r in _dependencies(root) if _module(r) == module), None)


def _dependencies(root: Path) -> list[Requirement]:
    file = root / "pyproject.toml"
    project = tomllib.loads(file.read_text("utf-8")).get("project", {}) if file.exists() else {}
    return [Requirement(line) for line in project.get("dependencies", ())]


def _module(requirement: Requirement) -> str:
    return OTHER_NAMES.get(requirement.name, requirement.name.replace("-", "_"))
