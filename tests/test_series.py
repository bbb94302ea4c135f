# SPDX-License-Identifier: GPL-2.0-only
"""`docs/series.md` says who does what for each patch: whatever it names exists, and is the only one."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hostzero"


class Row(NamedTuple):
    """One line of the table."""

    number: int
    title: str
    what: str
    where: list[tuple[str, str]]
    tests: list[str]


def rows_of(text: str) -> list[Row]:
    """Return the table's rows; anything that looks like one and cannot be read is an error."""
    rows = []
    for line in text.splitlines():
        if not re.match(r"\| *\d", line):
            continue
        number, title, what, where, tests = (cell.strip() for cell in line.strip("|").split(" | "))
        places = re.fullmatch(r"(`[^`]+`)(, `[^`]+`)*", where)
        proofs = re.fullmatch(r"(`[^`]+`)(, `[^`]+`)*", tests)
        assert places, f"row {number}: {where}"
        assert proofs, f"row {number}: {tests}"
        pairs = [place.split(": ") for place in re.findall(r"`([^`]+)`", where)]
        assert all(len(pair) == 2 for pair in pairs), f"row {number}: {where}"
        found = [(module, function) for module, function in pairs]
        rows.append(Row(int(number), title, what, found, re.findall(r"`([^`]+)`", tests)))
    return rows


ROWS = rows_of((ROOT / "docs" / "series.md").read_text())


@functools.cache
def functions_in(path: Path) -> frozenset[str]:
    """Return the functions and methods that a file defines, methods as `Class.name`."""

    def names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name
            elif isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{prefix}{node.name}.")

    return frozenset(names(ast.parse(path.read_text()).body, "")) if path.is_file() else frozenset()


def missing(row: Row) -> list[str]:
    """Return everything that a row names and that does not exist."""
    nowhere = [f"{m}: {f}" for m, f in row.where if f not in functions_in(PACKAGE / m)]
    for test in row.tests:
        file, _, name = test.partition("::")
        name = name.replace("::", ".")
        is_test = name.rpartition(".")[2].startswith("test_")
        if not is_test or name not in functions_in(ROOT / file):
            nowhere.append(test)
    return nowhere


def test_there_is_one_row_for_each_patch_in_order() -> None:
    assert [row.number for row in ROWS] == list(range(1, 38))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_what_a_row_names_exists(row: Row) -> None:
    assert missing(row) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_a_row_says_something(row: Row) -> None:
    assert len(row.what.split()) >= 6
    assert row.title
    assert len(set(row.where)) == len(row.where)
    assert len(set(row.tests)) == len(row.tests)


def test_no_two_rows_say_the_same() -> None:
    assert len({row.title for row in ROWS}) == len({row.what for row in ROWS}) == len(ROWS)
    pairs = [(frozenset(row.where), frozenset(row.tests)) for row in ROWS]
    assert len(set(pairs)) == len(pairs)


GOOD = (
    "| 7 | a title | one two three four five six | `mm/prep.py: prep_new_page` "
    "| `tests/test_units.py::test_x` |"
)


@pytest.mark.parametrize(
    "line",
    [
        GOOD.replace("mm/prep.py: prep_new_page", "mm/prep.py: prep_old_page"),
        GOOD.replace("mm/prep.py", "mm/prepare.py"),
        GOOD.replace("prep_new_page", "functools"),
        GOOD,
        GOOD.replace("test_x", "PAGE_SIZE"),
        GOOD.replace("test_units.py", "test_nothing.py"),
    ],
)
def test_the_reader_misses_what_is_not_there(line: str) -> None:
    (row,) = rows_of(line)
    assert missing(row)


@pytest.mark.parametrize(
    "line",
    [
        GOOD.replace("`mm/prep.py: prep_new_page`", "mm/prep.py: prep_new_page"),
        GOOD.replace("mm/prep.py: prep_new_page", "mm/prep.py"),
        GOOD.replace("`tests/test_units.py::test_x`", ""),
        GOOD.replace("| one two three four five six ", ""),
    ],
)
def test_the_reader_refuses_what_it_cannot_read(line: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        rows_of(line)


# ---- one way for each purpose: patches 5, 6, 10, 13 and 14


def calls_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (caller, callee) for each call by name inside a function."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    if isinstance(node.func, ast.Name):
                        yield function.name, node.func.id
                    elif isinstance(node.func, ast.Attribute):
                        yield function.name, node.func.attr


def callers_of(*callees: str, outside: str = "") -> set[str]:
    """Return which functions of `mm/` call one of `callees`, those of one module left out."""
    found = set()
    for path in sorted((PACKAGE / "mm").rglob("*.py")):
        if path.name != outside:
            found |= {caller for caller, called in calls_in(ast.parse(path.read_text())) if called in callees}
    return found


ZERO_WRITERS = ("clear_pages", "clear_kernel_pages", "folio_zero_user")
MAY_WRITE_ZEROS = {
    "zero_new_pages": "what post_alloc_hook calls, and nobody else",
    "overwrite_freed_pages": "init_on_free",
    "forget_list": "init_on_free, after hibernation",
    "clear_user_folio": "the comparison arm: at the fault, as Linux did before the series",
    "hugetlb_zero_user": "huge pages of a pool, which left the allocator long ago",
}


def test_only_the_hook_zeroes_a_page_for_its_new_owner() -> None:
    """Patch 14: no fault handler has a way of its own to zero a page that it allocates."""
    assert callers_of(*ZERO_WRITERS, outside="clear_page.py") <= set(MAY_WRITE_ZEROS)
    assert callers_of("zero_new_pages") == {"post_alloc_hook"}


def test_the_hook_is_reached_through_preparation_alone() -> None:
    """Patches 11, 13 and 14: who hands out a page prepares it, and preparing it calls the hook."""
    callers = callers_of("post_alloc_hook")
    assert "prep_new_page" in callers
    # Contiguous allocation and compaction take blocks off the free lists by isolation.
    assert callers <= {"prep_new_page", "split_free_frozen_pages", "compaction_alloc", "release_free_list"}


@pytest.mark.parametrize(
    "name",
    [
        "vma_alloc_folio",
        "vma_alloc_zeroed_movable_folio",
        "alloc_hugetlb_folio",
        "folio_zero_user",
        "post_alloc_hook",
        "prep_new_page",
        "get_page_from_freelist",
    ],
)
def test_the_kernels_variants_are_one_function_here(name: str) -> None:
    """Patches 5, 6, 10 and 14: the kernel had one for each configuration or architecture."""
    defined = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if name in functions_in(path)
    ]
    rows = [row for row in ROWS if any(function == name for _, function in row.where)]
    expected = {module for row in rows for module, function in row.where if function == name}
    assert len(defined) <= 1
    assert set(defined) <= expected or not rows
    assert defined
