# SPDX-License-Identifier: GPL-2.0-only
"""Which modules a search can run at all: those that it imports, and that they import.

A search that cannot run a changed module cannot see the change; looking for it there would only take
time from the searches that can.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path


def imported(source: str) -> Iterator[str]:
    """Yield the name of each thing that a module imports, wherever in it, but for type checkers."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            waiting += ast.iter_child_nodes(node)


@functools.cache
def reach(package: Path, module: str) -> frozenset[str]:
    """Return the files, below the package, of a module and of all that it imports.

    Args:
        package: the directory of the package `hostzero`.
        module: a name such as ``hostzero.check.wire.search``.
    """
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        if parts[0] != package.name:
            continue
        # Importing a module runs the packages around it, too.
        for end in range(1, len(parts) + 1):
            below = package.joinpath(*parts[1:end])
            for path in (
                below.with_suffix(".py") if end > 1 else below / "__init__.py",
                below / "__init__.py",
            ):
                name = path.relative_to(package).as_posix() if path.is_file() else ""
                if name and name not in reached:
                    reached.add(name)
                    waiting += imported(path.read_text())
    return frozenset(reached)
