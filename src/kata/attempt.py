"""An attempt: a function of the spec, run on some module, gives plain data.

The arguments travel as bytes even inside one process. So every place behaves alike, the code under
test cannot touch the spec's own data, and an argument that it changed shows as bytes that differ.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import linecache
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import torch

from kata import catalog, wire
from kata.report import Frame

Run = Callable[..., Any]
UNWRITTEN = re.compile(r"exercise \d\d is not written yet")


class Problem(msgspec.Struct):
    """An exception as data. `types` are its class and the bases that every Python knows."""

    types: list[str]
    message: str
    frames: list[Frame] = []
    rank: int | None = None

    @property
    def unwritten(self) -> bool:
        return bool(UNWRITTEN.fullmatch(self.message))


class Done(msgspec.Struct):
    """What came of an attempt: a result, or a problem."""

    result: bytes = b""
    problem: Problem | None = None
    changed: list[str] = []
    reached: str = ""  # a forbidden function, even if the code caught our complaint
    seconds: float = 0.0


class Attempted(msgspec.Struct):
    """One line of the record: enough to do it again elsewhere."""

    spec: str
    run: str
    call: bytes
    seed: int
    ranks: int
    done: list[Done]


class ArgumentChanged(AssertionError):
    """The code under test wrote into its arguments."""


class Reached(AssertionError):
    """The code under test called what it was to write."""


# --- modules -------------------------------------------------------------------------------------


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
        if not catalog.STEM.fullmatch(fullname) or not file.exists():
            return None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_SourceLoader(fullname, str(file))
        )


def use_parts(folder: Path) -> None:
    """From here on, exercises import earlier ones from this folder."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Parts)]
    sys.meta_path.insert(0, _Parts(folder.resolve()))
    for name in [n for n in sys.modules if catalog.STEM.fullmatch(n)]:
        del sys.modules[name]


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


# --- performing ----------------------------------------------------------------------------------


def perform(
    run: Run, module: Any, call: bytes, seed: int, device: str = "cpu"
) -> tuple[Done, BaseException | None]:
    """Run once on a module. The random states are set from the seed, and put back afterwards."""
    args, kwargs = wire.decode(call)
    if device != "cpu":
        args, kwargs = _on(device, (args, kwargs))
        call = wire.encode((args, kwargs))
    start = time.perf_counter()
    try:
        with _seeded(seed), _forbidding(run.__globals__.get("WITHOUT", ())) as reached:
            result = run(module, *args, **kwargs)
        done = Done(wire.encode(result), seconds=time.perf_counter() - start)
    except (Exception, SystemExit) as error:
        files = {str(getattr(module, "__file__", ""))}
        done = Done(problem=problem(error, files), seconds=time.perf_counter() - start)
        return done, error
    done.changed = _changed(run, call, args, kwargs)
    done.reached = next(iter(reached), "")
    return done, None


def _on(device: str, data: Any) -> Any:
    """The same data with every tensor on a device."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, (list, tuple)):
        return type(data)(_on(device, x) for x in data)
    if isinstance(data, dict):
        return {key: _on(device, value) for key, value in data.items()}
    return data


def _changed(run: Run, call: bytes, args: Any, kwargs: Any) -> list[str]:
    if wire.encode((args, kwargs)) == call:
        return []
    names = list(inspect.signature(run).parameters)[1:]
    old_args, old_kwargs = wire.decode(call)
    names += [f"argument {i}" for i in range(len(names), len(args))]
    new = dict(zip(names, args, strict=False)) | kwargs
    old = dict(zip(names, old_args, strict=False)) | old_kwargs
    return [name for name in old if wire.encode(old[name]) != wire.encode(new[name])]


_generator = np.random.MT19937(0)  # lent to np.random: quicker than to copy its state twice


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    numbers = np.random.get_bit_generator()  # type: ignore[attr-defined]
    states = random.getstate(), numbers, torch.get_rng_state()
    random.seed(seed)
    np.random.set_bit_generator(_generator)  # type: ignore[attr-defined]
    np.random.seed(seed)
    # Not torch.manual_seed: without CUDA it formats a traceback at every call, for 1 ms.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])  # type: ignore[attr-defined]
        torch.set_rng_state(states[2])


def problem(error: BaseException, files: set[str], rank: int | None = None) -> Problem:
    """An exception as data, with the frames of the learner's files."""
    if isinstance(error, Elsewhere):
        return error.problem
    chain: BaseException | None = error
    while chain is not None:  # also inside a compiler's complaint, which quotes the line
        if unwritten := UNWRITTEN.search(str(chain)):
            return Problem(["NotImplementedError", "RuntimeError"], unwritten[0], [], rank)
        chain = chain.__cause__ or chain.__context__
    types = [
        c.__name__ for c in type(error).__mro__ if c is type(error) or c.__module__ == "builtins"
    ]
    own = [f for f in frames(error) if f.file in files or catalog.STEM.fullmatch(Path(f.file).stem)]
    if isinstance(error, SyntaxError) and error.filename:
        own = [Frame(error.filename, error.lineno or 0, "", (error.text or "").rstrip())]
    return Problem(
        types, str(error) if not isinstance(error, SyntaxError) else error.msg, own, rank
    )


def frames(error: BaseException) -> list[Frame]:
    """Where an exception went through, outermost first."""
    return [
        Frame(f.filename, f.lineno or 0, f.name, (f.line or "").strip())
        for f in traceback.extract_tb(error.__traceback__)
    ]


def gravest(done: Sequence[Done]) -> Problem | None:
    """Of several ranks' problems the one that the others follow from."""

    def rank(problem: Problem) -> int:
        if problem.types[0] == "RankWaits":
            return 2
        return int("gloo" in problem.message and "Connection" in problem.message)

    return min((d.problem for d in done if d.problem), key=rank, default=None)


class Elsewhere(Exception):
    """An exception that was raised in another process, as near as it can be rebuilt here."""

    problem: Problem


def rebuilt(problem: Problem) -> Exception:
    """An exception which `pytest.raises` takes for the original, if that was a built-in one."""
    bases = [getattr(builtins, n, None) for n in problem.types]
    base = next((b for b in bases if isinstance(b, type) and issubclass(b, Exception)), Exception)
    kinds = (Elsewhere,) if base is Exception else (Elsewhere, base)
    try:
        error: Exception = type(problem.types[0], kinds, {})(problem.message)
    except TypeError:  # one whose constructor wants more, such as UnicodeDecodeError
        error = type(problem.types[0], (Elsewhere,), {})(problem.message)
    error.problem = problem  # type: ignore[attr-defined]
    return error


# --- WITHOUT: the library's own version ----------------------------------------------------------

_forbidden: Sequence[str] = ()  # during an attempt: what its spec file forbids
_reached: list[str] = []  # and what the attempt reached of it


@contextmanager
def _forbidding(names: Sequence[str]) -> Iterator[list[str]]:
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


# --- the fixture ---------------------------------------------------------------------------------

Performer = Callable[[Run, bytes, int, int], tuple[list[Done], BaseException | None]]


class Attempt:
    """What specs call: `attempt(run, *args)` runs `run(ex, *args)` and returns plain data.

    `perform(run, call, seed, ranks)` is the place. Every attempt goes into `record`.
    """

    def __init__(self, perform: Performer, record: list[Attempted], seed: int) -> None:
        self._perform, self.record, self._seed = perform, record, seed
        self.begin("")

    def begin(self, spec: str) -> None:
        """What follows belongs to this spec."""
        self.spec, self.unwritten = spec, ""

    def __call__(self, run: Run, /, *args: Any, may_change: bool = False, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return self._attempt(run, args, kwargs, 0, may_change)[0]

    def ranks(self, n: int) -> Callable[..., list[Any]]:
        """Run on n ranks of one process group; returns a list, one result a rank."""

        def attempt_on_ranks(
            run: Run, /, *args: Any, may_change: bool = False, **kwargs: Any
        ) -> list[Any]:
            __tracebackhide__ = True
            return self._attempt(run, args, kwargs, n, may_change)

        return attempt_on_ranks

    def _attempt(self, run: Run, args: Any, kwargs: Any, ranks: int, may_change: bool) -> list[Any]:
        __tracebackhide__ = True
        if "<" in run.__qualname__ or "." in run.__qualname__:
            raise TypeError(
                f"attempt takes a function of the spec's module, got {run.__qualname__}"
            )
        call = wire.encode((args, kwargs))
        seed = self._seed + len(self.record)
        done, error = self._perform(run, call, seed, ranks)
        self.record.append(Attempted(self.spec, run.__name__, call, seed, ranks, done))
        if error is not None:
            grave = gravest(done)
            if grave and grave.unwritten:
                self.unwritten = grave.message
            raise error
        if reached := next((d.reached for d in done if d.reached), ""):
            raise Reached(reached)
        changed = sorted({name for d in done for name in d.changed})
        if changed and not may_change:
            raise ArgumentChanged(
                f"{run.__name__} must leave its argument {', '.join(changed)} as it was"
            )
        return [wire.decode(d.result) for d in done]
