"""Why a spec failed, as data, out of what it raised."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kata.attempt import outcome, seam, wire
from kata.attempt.outcome import Attempted, Frame, Problem
from kata.judge import absent
from kata.judge.calls import call_of, judged_call
from kata.judge.limits import OutOfTime
from kata.judge.report import Detail
from kata.testing import Mismatch

if TYPE_CHECKING:
    from kata.judge.bench import Bench

WANTED = re.compile(
    r"Regex pattern did not match\.\s+Expected regex: (.*)\n\s+Actual message: (.*)"
)

PLACE = re.compile(r" \(/\S+\.(py|so)\)$")  # the file of a module that lacks a name


def detail_of(bench: Bench, error: BaseException) -> Detail:
    """Why a spec failed, out of what it raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    spec_file = str(bench.exercise.spec)
    problem = outcome.problem(error, {str(bench.path)})
    # Up to the attempt: what lies inside it is another process's, or was never done again.
    ours = itertools.takewhile(lambda f: f.file != seam.__file__, outcome.frames(error))
    at = [f for f in ours if f.file == spec_file]
    detail = Detail("raised", problem.message, frames=problem.frames)
    detail.where = f"{spec_file}:{at[-1].line}" if at else spec_file
    own = [past for past in bench.record if past.spec == bench.attempt.spec]
    detail.call = _call_shown(bench, own, error)
    if isinstance(error, Mismatch):
        detail.kind, detail.message, detail.mismatch = "mismatch", error.sentence, error.detail
        detail.mismatch["cause"] = error.cause
    elif isinstance(error, pytest.fail.Exception):
        detail.kind = "no-raise" if "DID NOT RAISE" in problem.message else "assertion"
        detail.message = problem.message.replace("DID NOT RAISE", "no error was raised, expected")
    elif wanted := WANTED.match(problem.message):
        detail.kind = "assertion"
        detail.message = f"the error says {wanted[2]}, and should say {wanted[1]}"
    elif isinstance(error, outcome.Reached):
        detail.kind = "reached"
    elif isinstance(error, outcome.ArgumentChanged):
        detail.kind = "changed"
    elif isinstance(error, AssertionError) and not problem.frames:
        detail.kind = "assertion"
    elif isinstance(error, OutOfTime) or problem.types[0] == "RankOutOfTime":
        detail.kind = "time"
    elif isinstance(error, wire.NotPlainData):
        detail.message = f"the result: {problem.message}"
    else:
        detail.message = _complaint(problem, own[-1:], bench.exercise.root)
    return detail


def unreadable(problem: Problem, path: Path, root: Path) -> Detail:
    """Why the code under test could not be read, so that no spec was tried."""
    frames = problem.frames or [Frame(str(path), 0, "", "")]
    return Detail("unreadable", _complaint(problem, (), root), frames=frames)


def _complaint(problem: Problem, last: Sequence[Attempted], root: Path) -> str:
    """An error in the words that a learner reads, and on which rank it was."""
    kind, message = problem.types[0], problem.message
    if kind == "ModuleNotFoundError":
        text = absent.plainly(message, root)
    elif kind in ("RankWaits", "RankDied", "InterpreterError", "WorkerDied"):
        text = message  # which is whole by itself
    else:
        text = f"{kind}: {PLACE.sub('', message)}" if message else kind
    if problem.rank is None or f"rank {problem.rank}" in message:
        return text
    raised = [done.problem for past in last for done in past.done]
    alike = [p for p in raised if p and (p.types[0], p.message) == (kind, message)]
    if len(alike) == len(raised) > 1:
        return f"on each of {len(raised)} ranks: {text}"
    return f"on rank {problem.rank}: {text}"


def _call_shown(bench: Bench, own: Sequence[Attempted], error: BaseException) -> str:
    """The call that was judged; where that isn't known, the last one, and that it is the last."""
    if not own:
        return ""
    judged = judged_call(getattr(bench.attempt, "given", ()), error)
    if judged is None and any(f.file == seam.__file__ for f in outcome.frames(error)):
        judged = own[-1]
    call = call_of(bench.spec, judged or own[-1])
    return call if judged or len(own) == 1 else f"{call}, the last of {len(own)} calls"
