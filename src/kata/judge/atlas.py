"""The atlas: what known versions do, by version and call, kept from run to run.

A known mistake does the same every time, so a verdict looks its outcomes up and replays only what
is not there. The proof fills the atlas, and so does `kata watch` while the learner types.

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
from typing import TypeVar

import msgspec

from kata.attempt.outcome import Done, Job

LIMIT = 512 << 20  # bytes of outcomes; beyond, those that were made first go
LARGEST = 1 << 20  # bytes of one outcome; what is larger is not kept
PATIENCE = 2.0  # seconds to wait for another process that writes
LIBRARIES = ("torch", "numpy", "jax", "transformers")

# Most mistakes do in most attempts what the reference does: an outcome is kept once.
TABLES = """
CREATE TABLE IF NOT EXISTS content (digest BLOB PRIMARY KEY, done BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcome (number INTEGER PRIMARY KEY, key BLOB UNIQUE, digest BLOB);
"""
T = TypeVar("T")


class Atlas:
    """Outcomes by key (see `key_of`). What is put is written by `flush`, in one transaction."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path, self.limit = path, limit
        self._new: dict[bytes, list[Done]] = {}
        self._known: dict[bytes, list[Done]] = {}
        self._database: sqlite3.Connection | None = None
        self._owner = 0  # a connection must not be used in a forked child

    def get(self, key: bytes) -> list[Done] | None:
        if found := self._known.get(key):
            return found
        query = "SELECT done FROM outcome JOIN content USING (digest) WHERE key = ?"
        row = self._ask(lambda database: database.execute(query, (key,)).fetchone())
        if row is None:
            return None
        self._known[key] = msgspec.msgpack.decode(row[0], type=list[Done])
        return self._known[key]

    def put(self, key: bytes, done: list[Done], lasting: bool = True) -> None:
        """Not lasting: for this process alone."""
        self._known[key] = done
        if lasting:
            self._new[key] = done

    def flush(self) -> None:
        """Write what is new. What can't be written now is lost, and will be made again."""
        rows = [(key, msgspec.msgpack.encode(done)) for key, done in self._new.items()]
        self._new = {}
        rows = [(key, done) for key, done in rows if len(done) <= LARGEST]
        if rows:
            self._ask(lambda database: self._write(database, rows))

    def _write(self, database: sqlite3.Connection, rows: list[tuple[bytes, bytes]]) -> None:
        with database:  # one transaction
            database.execute("BEGIN IMMEDIATE")
            for key, done in rows:
                digest = hashlib.sha256(done).digest()[:16]
                database.execute("INSERT OR IGNORE INTO content VALUES (?, ?)", (digest, done))
                database.execute(
                    "INSERT OR REPLACE INTO outcome (key, digest) VALUES (?, ?)", (key, digest)
                )
        if self._bytes(database) > self.limit:
            with database:
                self._evict(database)

    def _bytes(self, database: sqlite3.Connection) -> int:
        pages, free, size = (
            database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def _evict(self, database: sqlite3.Connection) -> None:
        """The older half goes; its pages are used again."""
        half = "SELECT (MIN(number) + MAX(number)) / 2 FROM outcome"
        database.execute(f"DELETE FROM outcome WHERE number <= ({half})")
        database.execute("DELETE FROM content WHERE digest NOT IN (SELECT digest FROM outcome)")

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """None where the file can't be used. One that is broken goes, for the next process."""
        try:
            return question(self._open())
        except sqlite3.OperationalError:  # locked, read-only, full
            return None
        except sqlite3.DatabaseError:
            with suppress(OSError):
                self.path.unlink()
            return None
        except OSError:
            return None

    def _open(self) -> sqlite3.Connection:
        if self._database is None or self._owner != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")  # after a power cut it may be broken
            database.executescript(TABLES)
            self._database, self._owner = database, os.getpid()
        return self._database


def key_of(surroundings: bytes, source: bytes, job: Job) -> bytes:
    """The key of what a version (its source) does when it is asked for a job."""
    digest = hashlib.sha256(surroundings + hashlib.sha256(source).digest())
    for part in (job.run.encode(), job.call, repr((job.seed, job.ranks)).encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.digest()[:16]


def surroundings(files: Iterable[Path]) -> bytes:
    """All else that an outcome depends on: the spec file, parts, the seam, the libraries."""
    seam = sorted((Path(__file__).parents[1] / "attempt").glob("*.py"))
    digest = hashlib.sha256(repr(_versions()).encode())
    for path in (*files, *seam):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


@cache
def _versions() -> list[str]:
    found = []
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found
