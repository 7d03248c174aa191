"""WITHOUT: the library's own version of what a kata asks for fails when an attempt reaches it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kata.attempt.outcome import Reached

_forbidden: Sequence[str] = ()  # during an attempt: what its spec file forbids
_reached: list[str] = []  # and what the attempt reached of it


@contextmanager
def forbidding(names: Sequence[str]) -> Iterator[list[str]]:
    global _forbidden, _reached
    before, (_forbidden, _reached) = (_forbidden, _reached), (names, [])
    try:
        yield _reached
    finally:
        _forbidden, _reached = before


_guarded: list[tuple[Any, str, Any]] = []  # where a guard stands, and what stood there; or None


def forbid(names: Sequence[str]) -> None:
    """Make each dotted name fail when an attempt of a spec that lists it reaches it.

    Names that were forbidden before are as they were. A module that is not imported yet is
    passed over.
    """
    while _guarded:  # others look at these functions too: transformers, how torch makes tensors
        holder, attribute, original = _guarded.pop()
        if original is None:
            delattr(holder, attribute)
        else:
            setattr(holder, attribute, original)
    for name in names:
        holder_name, _, attribute = name.rpartition(".")
        holder = _resolve(holder_name)
        original = getattr(holder, attribute, None)
        if inspect.isclass(original):  # it stays a class, which others may inherit from
            holder, attribute, original = original, "__init__", original.__init__
            if original is object.__init__:  # all is done by __new__
                original = _nothing
        if original is None or hasattr(original, "forbidden"):
            continue
        _guarded.append((holder, attribute, vars(holder).get(attribute)))
        setattr(holder, attribute, _guard(name, original))


def _nothing(*_: Any, **__: Any) -> None: ...


def _resolve(dotted: str) -> Any:
    head, *rest = dotted.split(".")
    found: Any = sys.modules.get(head)
    for part in rest:
        found = getattr(found, part, None)
    return found


def _guard(name: str, original: Any) -> Any:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if name in _forbidden:
            _reached.append(f"{name} is what this exercise asks you to write; do without it")
            raise Reached(_reached[0])
        return original(*args, **kwargs)

    guarded.forbidden = True  # type: ignore[attr-defined]
    guarded.__name__ = getattr(original, "__name__", name)
    guarded.__doc__ = original.__doc__
    guarded.__wrapped__ = original  # type: ignore[attr-defined]
    return guarded
