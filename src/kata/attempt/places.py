"""Places: where attempts run. Nobody else knows that.

A place has the code under test (a file), and gives a Done for each process that took part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol

from kata.attempt import modules
from kata.attempt.outcome import Done, Job, Problem, problem
from kata.attempt.performing import perform
from kata.attempt.ranks import Launch

Launcher = Callable[[Launch], list[Done]]


class Place(Protocol):
    """`error`: what the last attempt raised, where it was raised in this process."""

    error: BaseException | None

    def prepare(self) -> None:
        """Start what takes time: it doesn't count as the spec's."""

    def load(self, run: bool = True) -> Problem | None:
        """Read the file, and run it; the problem if it can't be."""

    def perform(self, job: Job) -> list[Done]:
        """Attempt, and say what came of it."""

    def computed(self) -> float:
        """Seconds of processor time that the code has had, in all."""

    def close(self) -> None:
        """End what was started."""


class Here:
    """In this process, where breakpoints and tracebacks work; on ranks if a job asks for them."""

    def __init__(self, spec: ModuleType, path: Path, parts: Path, launch: Launcher) -> None:
        self.spec, self.path, self.parts, self.launch = spec, path, parts, launch
        self.error: BaseException | None = None
        self._module: ModuleType | None = None

    @property
    def module(self) -> ModuleType:
        """The code under test, read when it is first needed."""
        if self._module is None:
            self._module = modules.load(self.path)
        return self._module

    def prepare(self) -> None:
        pass

    def load(self, run: bool = True) -> Problem | None:
        try:
            modules.compiled(self.path)
            if run:
                _ = self.module
        except (Exception, SystemExit) as error:
            return problem(error, {str(self.path)})
        return None

    def perform(self, job: Job) -> list[Done]:
        self.error = None
        if job.ranks:
            return self.launch(
                Launch(job, str(self.spec.__file__), str(self.path), str(self.parts))
            )
        run = getattr(self.spec, job.run)
        done, self.error = perform(run, self.module, job.call, job.seed)
        return [done]

    def computed(self) -> float:
        return time.process_time()

    def close(self) -> None:
        pass
