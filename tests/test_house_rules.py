# SPDX-License-Identifier: GPL-2.0-only
"""The rules of the house that no linter knows: floors, who may print, and the licence line."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hostzero"

# A room imports only from floors below its own, or from itself. See docs/architecture.md.
FLOORS = {
    "errors": 0,
    "units": 0,
    "clock": 0,
    "jit": 0,
    "ram": 1,
    "mm": 2,
    "virtio": 2,
    "driver": 3,
    "device": 3,
    "machine": 4,
    "vhost_user": 4,
    "warmup": 5,
    "document": 5,
    "render": 5,
    "host": 5,
    "stats": 5,
    "qmp": 5,
    "termination": 5,
    "bench": 6,
    "check": 6,
    "conform": 6,
    "vm": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}
# A host sees guest memory, never the guest's structures.
FORBIDDEN = {("device", "mm")}

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "tests_vm").rglob("*.py")])


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "hostzero" and len(parts) > 1:
                yield parts[1]


def may_import(room: str, other: str) -> bool:
    if room == other or FLOORS[room] == 0:
        return FLOORS[other] == FLOORS[room]
    return FLOORS[other] < FLOORS[room] and (room, other) not in FORBIDDEN


def parsed(source: str) -> ast.AST:
    # Python 3.11 counts the depth of all trees that are being made together (gh-106905): one that is made
    # while garbage is collected, which may parse as well, fails now and then.
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def violations(room: str, source: str) -> list[str]:
    return [other for other in rooms_imported(parsed(source)) if not may_import(room, other)]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_a_room_imports_only_from_floors_below(module: Path) -> None:
    assert violations(room_of(module), module.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("device", "from hostzero.mm import MemoryManager", ["mm"]),
        ("device", "from hostzero.driver.balloon import VirtioBalloon", ["driver"]),
        ("mm", "import hostzero.virtio.features", ["virtio"]),
        ("ram", "from hostzero import bench, units", ["bench"]),
        ("virtio", "def late():\n    from hostzero.machine import Machine", ["machine"]),
        ("clock", "from hostzero.ram import Ram", ["ram"]),
        ("driver", "from hostzero.mm.gfp import GFP_KERNEL\nimport hostzero.driver.stats", []),
    ],
)
def test_the_rule_finds_what_it_is_for(room: str, source: str, found: list[str]) -> None:
    assert violations(room, source) == found


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_every_source_names_its_licence_first(source: Path) -> None:
    assert source.read_text().startswith("# SPDX-License-Identifier: GPL-2.0-only\n")
