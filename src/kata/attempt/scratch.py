"""Folders for the time of a run, which nobody leaves behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

YOUNG = 10.0  # seconds in which a folder may not be locked yet


class Scratch:
    """A folder that its users hold a lock on.

    Whoever outlives the others removes it: its maker, or the process that it was made for, which
    notices that its maker is gone. Where all were killed, whoever makes the next one does.
    """

    def __init__(self, what: str) -> None:
        sweep()
        self._hold(Path(tempfile.mkdtemp(prefix=f"kata-{what}-")))

    @classmethod
    def at(cls, path: Path) -> Scratch:
        """The same folder, in another process."""
        scratch = cls.__new__(cls)
        scratch._hold(path)
        return scratch

    def _hold(self, path: Path) -> None:
        self.path = path
        self._lock = os.open(path, os.O_RDONLY)  # the kernel lets go of it when its users end
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            os.close(self._lock)


def sweep() -> None:
    """Remove the folders that nobody holds."""
    for path in Path(tempfile.gettempdir()).glob("kata-*-*"):
        with suppress(OSError):  # held, somebody else's, or just removed
            if time.time() - path.stat().st_mtime < YOUNG:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
