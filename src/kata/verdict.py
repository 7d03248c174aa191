"""What the learner reads."""

from __future__ import annotations

from kata.report import Detail


def plain(detail: Detail) -> str:
    """Why a spec failed, as plain text."""
    lines = [detail.message]
    there = detail.mismatch
    if "index" in there:
        at = there["index"] or "the number itself"
        lines.append(
            f"  first at {at}: yours {there['yours_there']}, expected {there['expected_there']}"
        )
    if there:
        lines += [f"  yours     {there['yours']}", f"  expected  {there['expected']}"]
    if detail.call:
        lines.append(f"  in {detail.call}")
    lines += [f"  {f.file}:{f.line} in {f.function}\n      {f.text}" for f in detail.frames]
    return "\n".join([*lines, f"  spec {detail.where}"])
