"""A learner's file as a module, compiled anew each time; earlier exercises from one folder."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from kata.course.catalog import STEM


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles from the source, always: the .pyc of a file saved twice in a second is stale."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        linecache.checkcache(path)
        return self.source_to_code(self.get_data(path), path)


class _Parts(importlib.abc.MetaPathFinder):
    """`import ex40_rope` finds the file in one folder, wherever Python was started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        file = self.folder / f"{fullname}.py"
        if not STEM.fullmatch(fullname) or not file.exists():
            return None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_SourceLoader(fullname, str(file))
        )


def use_parts(folder: Path) -> None:
    """From here on, exercises import earlier ones from this folder."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Parts)]
    sys.meta_path.insert(0, _Parts(folder.resolve()))
    for name in [n for n in sys.modules if STEM.fullmatch(n)]:
        del sys.modules[name]


def compiled(path: Path) -> None:
    """Raise what is wrong with a file before it runs: it can't be read, or isn't Python."""
    loader = _SourceLoader(path.stem, str(path))
    loader.source_to_code(loader.get_data(str(path)), str(path))


def load(path: Path, name: str | None = None) -> ModuleType:
    """A fresh module of a file, under a name that no `import` uses."""
    name = name or f"{path.stem}__{path.parent.name}"
    loader = _SourceLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module
