# SPDX-License-Identifier: GPL-2.0-only
"""The lifecycle table as Markdown, each row with its lines of code: ``make safety``.

``python -m hostzero.check.lifecycle_doc docs/safety.md`` writes the table between the two marks
of that file again. The lines are found in the source, so an edit there moves them; a test fails
until the table has been written anew.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hostzero.check.lifecycle import LIFECYCLE, Row
from hostzero.document import write_atomically
from hostzero.errors import UsageError

PACKAGE: Final = Path(__file__).resolve().parent.parent
BEGIN: Final = "<!-- lifecycle table: written by `make safety`, not by hand -->"
END: Final = "<!-- end of the lifecycle table -->"
HEAD: Final = "| row | event | claim | what becomes of it | where |\n|---|---|---|---|---|"


def line_of(place: str, statement: str = "", package: Path = PACKAGE) -> int:
    """Return the line of a function's `def`, or of the first line in it that has `statement`.

    Args:
        place: "room.module.function", or "room.module.Class.method".
        statement: a piece of the line's text, as it is in the source; "" for the `def`.
        package: the directory of the package `hostzero`.

    Raises:
        LookupError: there is no such function, or no such text in it.
    """
    room, module, *names = place.split(".")
    lines, tree = _parsed(package / room / f"{module}.py")
    node: ast.Module | ast.ClassDef | ast.FunctionDef = tree
    for name in names:
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef) and inner.name == name:
                node = inner
                break
        else:
            raise LookupError(f"{place}: there is no {name}")
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(f"{place}: is no function")
    if not statement:
        return node.lineno
    # Not in its docstring, which may name what it does.
    first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
    for number in range(first.lineno, (node.end_lineno or first.lineno) + 1):
        if statement in lines[number - 1]:
            return number
    raise LookupError(f"{place}: has no line with {statement!r}")


@functools.cache
def _parsed(path: Path) -> tuple[Sequence[str], ast.Module]:
    text = path.read_text()
    return text.splitlines(), ast.parse(text)


def places_of(row: Row) -> list[tuple[str, str, int]]:
    """Return for each place of a row its name as the table shows it, its file and its line."""
    found = []
    for place, statement in zip(row.where, row.statements, strict=True):
        room, module, *names = place.split(".")
        shown = ".".join([module, names[-1]] if room == "mm" else [room, module, names[-1]])
        found.append((shown, f"{room}/{module}.py", line_of(place, statement)))
    return found


def to_markdown(rows: Sequence[Row] = LIFECYCLE) -> str:
    """Return the table, with links from a file in `docs/`."""
    lines = [HEAD]
    for row in rows:
        where = ", ".join(f"[`{name}`](../src/hostzero/{file}#L{at})" for name, file, at in places_of(row))
        lines.append(f"| {row.id} | {row.event} | `{row.flag}` | {row.effect} | {where} |")
    return "\n".join(lines) + "\n"


def replace_table(text: str, table: str) -> str:
    """Return a document with `table` between its two marks.

    Raises:
        UsageError: it does not have both marks, in their order, once.
    """
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise UsageError(f"the table's place must be marked by {BEGIN!r} and {END!r}, once each")
    return f"{before}{begin}{table}{end}{after}"


def write_table(path: Path) -> bool:
    """Write the table of a document again; return whether that changed it.

    Raises:
        UsageError: the document has no place for it.
        HostzeroError: it cannot be written.
    """
    old = path.read_text()
    new = replace_table(old, to_markdown())
    if new != old:
        write_atomically(path, new.encode())
    return new != old


if __name__ == "__main__":
    for name in sys.argv[1:]:
        said = "was written anew" if write_table(Path(name)) else "is as it should be"
        sys.stdout.write(f"{name}: the lifecycle table {said}\n")
