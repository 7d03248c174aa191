"""Which files are taken as a submission."""

from __future__ import annotations

import stat
from pathlib import Path

LARGEST = 1 << 20  # bytes


def refusal(path: Path) -> str:
    """Why this is no file to judge; empty if it is one. A link may be to the solution itself."""
    try:
        found = path.lstat()
    except OSError as error:
        return f"there is no submission {path} ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return f"a submission is a regular file, and {path} is {_kind(found.st_mode)}"
    if found.st_size > LARGEST:
        return f"a submission has at most {LARGEST:,} bytes, and {path} has {found.st_size:,}"
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError as error:
        return f"a submission is UTF-8, and {path} is not, at byte {error.start}"
    except OSError as error:
        return f"{path} can't be read ({error.strerror})"
    return ""


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):  # fmt: skip
        if test(mode):
            return name
    return "a device"
