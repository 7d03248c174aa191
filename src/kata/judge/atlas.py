"""The atlas: a file of what known versions do in an attempt, kept from run to run.

A known mistake does the same every time, so a verdict looks its outcomes up and replays only what
is not there (see `replays`). The proof fills the atlas, and so does `kata watch` while the learner
types.

Nothing depends on it: where nothing can be written, on a read-only checkout or a full disk, it
lives in memory, and a broken file is begun anew.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, TypeVar

LIMIT = 1 << 30  # bytes; beyond, what was put in first goes
MEMORY = 256 << 20  # bytes that a process keeps at hand
LARGEST = 16 << 20  # bytes of one entry; what is larger is not kept
PATIENCE = 2.0  # seconds to wait for another process that writes
LIBRARIES = ("torch", "numpy", "jax", "transformers")

# Most mistakes do in most attempts what the reference does: equal outcomes are kept once.
TABLES = """
CREATE TABLE IF NOT EXISTS content (digest BLOB PRIMARY KEY, data BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entry (number INTEGER PRIMARY KEY, key BLOB UNIQUE, digest BLOB);
"""
T = TypeVar("T")


class Atlas:
    """Bytes by key. What is put is written by `flush`, in one transaction."""

    _opened: ClassVar[dict[Path, Atlas]] = {}

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path, self.limit, self._held = path, limit, 0
        self._new: dict[bytes, bytes] = {}
        self._known: dict[bytes, bytes] = {}
        self._database: sqlite3.Connection | None = None
        self._owner = 0  # a connection must not be used in a forked child

    @classmethod
    def of(cls, root: Path) -> Atlas:
        """The project's: one for all that this process judges."""
        path = root / ".cache" / "kata" / "atlas.sqlite"
        return cls._opened.setdefault(path, cls(path))

    def get(self, key: bytes) -> bytes | None:
        if (known := self._known.get(key)) is not None:
            return known
        query = "SELECT data FROM entry JOIN content USING (digest) WHERE key = ?"
        row = self._ask(lambda database: database.execute(query, (key,)).fetchone())
        if row is None:
            return None
        self._remember(key, row[0])
        return bytes(row[0])

    def put(self, key: bytes, data: bytes) -> None:
        self._remember(key, data)
        if len(data) <= LARGEST:
            self._new[key] = data

    def _remember(self, key: bytes, data: bytes) -> None:
        self._held += len(data)
        if self._held > MEMORY and not self._new:
            self._known.clear()
            self._held = len(data)
        self._known[key] = data

    def flush(self) -> None:
        """Write what is new. What can't be written now is lost, and will be made again."""
        rows, self._new = list(self._new.items()), {}
        if rows:
            self._ask(lambda database: self._write(database, rows))

    def _write(self, database: sqlite3.Connection, rows: list[tuple[bytes, bytes]]) -> None:
        digests = [hashlib.sha256(data).digest()[:16] for _, data in rows]
        entries = [(key, digest) for (key, _), digest in zip(rows, digests, strict=True)]
        contents = [(digest, data) for (_, data), digest in zip(rows, digests, strict=True)]
        database.execute("BEGIN IMMEDIATE")
        with database:  # commits, or takes all back
            database.executemany("INSERT OR IGNORE INTO content VALUES (?, ?)", contents)
            database.executemany("INSERT OR REPLACE INTO entry VALUES (NULL, ?, ?)", entries)
            if self._bytes(database) > self.limit:
                self._evict(database)

    def _bytes(self, database: sqlite3.Connection) -> int:
        pages, free, size = (
            database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def _evict(self, database: sqlite3.Connection) -> None:
        """The older half goes; its pages are used again."""
        half = "SELECT (MIN(number) + MAX(number)) / 2 FROM entry"
        database.execute(f"DELETE FROM entry WHERE number <= ({half})")
        database.execute("DELETE FROM content WHERE digest NOT IN (SELECT digest FROM entry)")

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """None where the file can't be used. One that is broken goes, for the next process."""
        try:
            return question(self._open())
        except sqlite3.OperationalError:  # locked, read-only, full
            return None
        except sqlite3.DatabaseError:
            self.remove()
            return None
        except OSError:
            return None

    def _open(self) -> sqlite3.Connection:
        if self._database is None or self._owner != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA mmap_size = {self.limit}")
            database.execute("PRAGMA synchronous = OFF")  # a power cut may break it, a kill not
            database.executescript(TABLES)
            self._database, self._owner = database, os.getpid()
        return self._database

    def remove(self) -> None:
        """The file goes, if it can."""
        self._database = None
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


def digest_of(*parts: object) -> bytes:
    """The digest of bytes, and of what has a plain repr."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        whole.update(hashlib.sha256(data).digest())
    return whole.digest()[:16]


def surroundings(files: Iterable[Path]) -> bytes:
    """What all outcomes depend on: these files, how attempts are made, the libraries."""
    package = Path(__file__).parents[1]
    own = [package / "testing.py", *sorted((package / "attempt").glob("*.py"))]
    return digest_of(_versions(), *(path.read_bytes() for path in (*files, *own)))


@cache
def _versions() -> list[str]:
    found = []
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found
