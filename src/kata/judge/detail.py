"""Why a spec failed, as data, out of what it raised."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from kata.attempt import outcome, wire
from kata.attempt.outcome import Attempted
from kata.judge.limits import OutOfTime
from kata.judge.report import Detail
from kata.summary import summary
from kata.testing import Mismatch

if TYPE_CHECKING:
    from kata.judge.bench import Bench

WANTED = re.compile(
    r"Regex pattern did not match\.\s+Expected regex: (.*)\n\s+Actual message: (.*)"
)


def detail_of(bench: Bench, error: BaseException) -> Detail:
    """Why a spec failed, out of what it raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    spec_file = str(bench.exercise.spec)
    problem = outcome.problem(error, {str(bench.path)})
    at = [f for f in outcome.frames(error) if f.file == spec_file]
    detail = Detail("raised", problem.message, frames=problem.frames)
    detail.where = f"{spec_file}:{at[-1].line}" if at else spec_file
    own = [past for past in bench.record if past.spec == bench.attempt.spec]
    if own:
        detail.call = call_of(bench, own[-1])
        if len(own) > 1:  # which of them the judgement is about is not known
            detail.call += f", the last of {len(own)} calls"
    if isinstance(error, Mismatch):
        detail.kind, detail.message, detail.mismatch = "mismatch", error.sentence, error.detail
        detail.mismatch["cause"] = error.cause
    elif isinstance(error, pytest.fail.Exception):
        detail.kind = "no-raise" if "DID NOT RAISE" in problem.message else "assertion"
        detail.message = problem.message.replace("DID NOT RAISE", "expected an error:")
    elif wanted := WANTED.match(problem.message):
        detail.kind = "assertion"
        detail.message = f"the error should say {wanted[1]}, and says: {wanted[2]}"
    elif isinstance(error, outcome.Reached):
        detail.kind = "reached"
    elif isinstance(error, outcome.ArgumentChanged):
        detail.kind = "changed"
    elif isinstance(error, AssertionError) and not problem.frames:
        detail.kind = "assertion"
    elif isinstance(error, OutOfTime):
        detail.kind = "time"
    elif isinstance(error, wire.NotPlainData):
        detail.message = f"the result: {problem.message}"
    else:
        detail.message = f"{problem.types[0]}: {problem.message}"
    return detail


def call_of(bench: Bench, past: Attempted) -> str:
    """The attempt as a call: `attend(q: float64[3, 4], mask: None)`."""
    import inspect

    args, kwargs = wire.decode(past.job.call)
    names = list(inspect.signature(getattr(bench.spec, past.job.run)).parameters)[1:]
    names += [""] * (len(args) - len(names))
    named = [*zip(names, args, strict=False), *kwargs.items()]
    shown = ", ".join(f"{n}: {summary(v, values=False)}" if n else summary(v) for n, v in named)
    ranks = f" on {past.job.ranks} ranks" if past.job.ranks else ""
    return f"{past.job.run}({shown}){ranks}"
