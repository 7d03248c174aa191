"""Known mistakes and accepted versions: the reference with a few words changed. Names a mistake."""

from __future__ import annotations

import hashlib
import re
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from kata import wire
from kata.attempt import Attempted, Done, gravest
from kata.catalog import Exercise
from kata.testing import compare

VARYING = re.compile(r"\S*/\S*|\d+")  # of an error's message: paths and numbers
Replay = Callable[["Variant | None", Attempted], list[Done]]


class BadMistakes(ValueError):
    """A mistakes file that does not fit its solution; the message has file and text."""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of the solution: `swap` lists (old text, new text)."""

    says: str
    swap: tuple[tuple[str, str], ...]


class Variants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mistake: tuple[Variant, ...] = ()
    accept: tuple[Variant, ...] = ()


def load(exercise: Exercise) -> Variants:
    """The mistakes and the accepted versions of an exercise."""
    path = exercise.mistakes
    if not path.exists():
        return Variants()
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Variants)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BadMistakes(f"{path}: {error}") from error


def swapped(exercise: Exercise, variant: Variant) -> str:
    """The source of a version. Each old text must occur exactly once in the solution."""
    source = exercise.solution.read_text("utf-8")
    for old, _ in variant.swap:
        count = source.count(old)
        if count != 1:
            raise BadMistakes(
                f'{exercise.mistakes}: "{variant.says}" swaps {old!r}, which stands {count} '
                f"times in {exercise.solution.name}; it must stand there exactly once"
            )
    for old, new in variant.swap:
        source = source.replace(old, new)
    try:
        compile(source, str(exercise.mistakes), "exec")
    except SyntaxError as error:
        raise BadMistakes(
            f'{exercise.mistakes}: "{variant.says}" is not Python: {error}'
        ) from error
    return source


def write(exercise: Exercise, variant: Variant) -> Path:
    """The version as a real file (Triton and tracebacks need one), named by what it holds."""
    source = swapped(exercise, variant).encode()
    digest = hashlib.sha256(source).hexdigest()[:16]
    path = exercise.root / ".cache" / "kata" / digest / f"{exercise.stem}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    return path


def recognise(
    variants: Iterable[Variant],
    record: list[Attempted],
    failed: list[str],
    replay: Replay,
    seconds: float = 10.0,
) -> list[Variant]:
    """The known mistakes that give what the learner's code gave.

    A mistake is it if it gives the same results in every attempt of the run, where the reference
    does not; failing that, in every attempt of a failed spec: of several such the ones that agree
    with most attempts of the run. `replay(None, …)` is the reference.
    Gives up, with nothing, after `seconds`.
    """
    end = time.monotonic() + seconds
    done: dict[tuple[Variant | None, int], bool] = {}

    def agrees(variant: Variant | None, which: list[int]) -> bool:
        for i in which:
            if (variant, i) not in done:
                if time.monotonic() > end:
                    raise TimeoutError
                done[variant, i] = same(
                    replay(variant, record[i]), record[i].done, record[i].spec in failed
                )
            if not done[variant, i]:
                return False
        return True

    last = {past.spec: i for i, past in enumerate(record)}  # of a failed spec: what it fell over

    def cost(i: int) -> tuple[bool, bool, float]:
        spec = record[i].spec
        return spec not in failed, i != last[spec], max(d.seconds for d in record[i].done)

    every = sorted(range(len(record)), key=cost)
    variants = list(variants)
    try:
        differs = every and not agrees(None, every)
        if differs and (found := [v for v in variants if agrees(v, every)]):
            return found
        specs = [[i for i in every if record[i].spec == name] for name in failed]
        specs = [spec for spec in specs if spec and not agrees(None, spec)]
        likely = [v for v in variants if any(agrees(v, spec) for spec in specs)]
        agreeing = {v: sum(agrees(v, [i]) for i in every) for v in likely}
        return [v for v in likely if agreeing[v] == max(agreeing.values())]
    except TimeoutError:
        return []


def same(a: list[Done], b: list[Done], in_failed: bool = True) -> bool:
    """Whether two outcomes are alike: the same kind of error, or results equal up to rounding.

    In a failed spec the errors must say the same too, numbers and paths aside. In one that passed
    the error was asked for, and everybody has words of their own.
    """
    if len(a) != len(b):
        return False
    if (p := gravest(a)) and (q := gravest(b)):  # the other ranks may have been anywhere by then
        said = [VARYING.sub("", problem.message) for problem in (p, q)]
        return p.types[0] == q.types[0] and (not in_failed or said[0] == said[1])
    for x, y in zip(a, b, strict=True):
        if x.problem or y.problem or x.changed != y.changed:
            return False
        if compare(wire.decode(x.result), wire.decode(y.result), slack=10.0):
            return False
    return True
