"""Known mistakes and accepted versions: the reference with a few words changed."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import msgspec

from kata.course import cache
from kata.course.catalog import Exercise


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
    path = cache.folder(exercise.root, digest) / f"{exercise.stem}.py"
    if not (path.exists() and path.read_bytes() == source):  # a crash may have left it empty
        cache.write(path, source)
    return path
