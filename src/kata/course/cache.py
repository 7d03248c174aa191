"""Where files are kept that can be made again: .cache/kata of the project, or a folder of yours."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from functools import cache
from pathlib import Path


def folder(root: Path, *names: str) -> Path:
    """A folder below .cache/kata; in a read-only checkout one of this user for temporary files.

    It never raises. Where nothing can be written, writing into it does: see `write`.
    """
    kept = root.joinpath(".cache", "kata", *names)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):  # False also for root where the disk is read-only
            return kept
    except OSError:
        pass
    try:
        project = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        elsewhere = _temporary().joinpath(project, *names)
        elsewhere.mkdir(parents=True, exist_ok=True)
        return elsewhere
    except OSError:
        return kept


def write(path: Path, data: bytes) -> None:
    """Put a file in its place whole: others may write the same one or read it.

    OSError where there is no room. A cache that can't be written must cost nobody a verdict.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@cache
def _temporary() -> Path:
    """This user's folder for temporary files; nobody else can write there, or have put it there."""
    path = Path(tempfile.gettempdir()) / f"kata-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()  # code from there is run: no link, and no folder that others can write
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return path
    return Path(tempfile.mkdtemp(prefix="kata-"))
