"""Stubs are made from solutions: the comment `# solution` hides the rest of its block."""

from __future__ import annotations

import ast
import re

MARK = re.compile(r"^(?P<indent>[ ]+)# solution[ ]*$")


class BadSolution(ValueError):
    """A solution that no stub can be made from; the message has the line."""


def make_stub(source: str, number: int) -> str:
    """The stub of a solution.

    From each `# solution` to the end of its block stands `raise NotImplementedError(…)` instead.
    A top-level private name (`_like_this`) that only hidden lines use is left out.
    """
    lines = source.splitlines()
    hidden = _hidden_lines(source)
    if not hidden:
        raise BadSolution("no `# solution` comment: the stub would give the solution away")
    kept = [i for i in range(len(lines)) if i not in hidden]
    tree = ast.parse(source)
    while True:  # leaving one name out may leave another without a use
        gone = _unused_private(tree, kept, lines)
        if not gone:
            break
        kept = [i for i in kept if i not in gone]
    written: list[str] = []
    for i, line in enumerate(lines):
        match = MARK.match(line)
        if match and i - 1 not in hidden and i - 1 in kept:
            complaint = f"exercise {number:02d} is not written yet"
            written.append(f'{match["indent"]}raise NotImplementedError("{complaint}")')
        elif i in kept:
            written.append(line)
    text = "\n".join(written).rstrip() + "\n"
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise BadSolution(f"the stub would not be Python: {error}") from error
    return text


def _hidden_lines(source: str) -> set[int]:
    """The numbers of the lines from each mark to the end of its block."""
    lines = source.splitlines()
    blocks = [
        (block, isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
        for node in ast.walk(ast.parse(source))
        for block in (getattr(node, name, []) for name in ("body", "orelse", "finalbody"))
        if isinstance(block, list) and block
    ]
    hidden: set[int] = set()
    for start, line in enumerate(lines):
        if line.strip() != "# solution" or start in hidden:
            continue
        indent = len(line) - len(line.lstrip())
        after = [
            (min(s.lineno for s in block if s.lineno > start), block, inside)
            for block, inside in blocks
            if block[0].col_offset == indent and block[-1].lineno > start
        ]
        first, block, inside = min(after, key=lambda found: found[0], default=(0, [], False))
        if not inside:
            raise BadSolution(f"line {start + 1}: `# solution` must stand inside a function")
        hidden |= set(range(start, block[-1].end_lineno or first))
    return hidden


def _unused_private(tree: ast.Module, kept: list[int], lines: list[str]) -> set[int]:
    """The lines of kept top-level private definitions that no other kept line mentions."""
    gone: set[int] = set()
    for node in tree.body:
        name = _private_name(node)
        if name is None or node.lineno - 1 not in kept:
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1  # the comment above belongs to it
        own = set(range(first, node.end_lineno or node.lineno))
        others = (lines[i] for i in kept if i not in own)
        if not any(re.search(rf"\b{name}\b", text) for text in others):
            gone |= own
    return gone


def _private_name(node: ast.stmt) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        name = node.name
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        name = node.target.id
    else:
        return None
    return name if name.startswith("_") and not name.startswith("__") else None
