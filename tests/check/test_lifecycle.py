# SPDX-License-Identifier: GPL-2.0-only
"""The table of who may touch a zero claim is complete, and so is what the docs show of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostzero.check.lifecycle import HPG_ZEROED, LIFECYCLE, PG_ZEROED, ROW_IDS, Row, unknown_rows
from hostzero.check.lifecycle_doc import PACKAGE, line_of, places_of

TOUCHES = (
    "__SetPageZeroed",
    "__ClearPageZeroed",
    "SetPageZeroed",
    "ClearPageZeroed",
    "PageZeroed",
    "folio_clear_hugetlb_zeroed",
    "folio_test_hugetlb_zeroed",
    "HPG_zeroed",
)
MAY_LOOK = {
    "page_flags.": "what the functions are made of",
    "hugetlb_pool.folio_": "the same, for huge pages",
    "verify.": "reads claims to compare them with the bytes, as tests ask for",
    "placement.": "reads them to choose a block; takes it off by `page_del_and_expand`",
}


def functions_that_touch_a_claim() -> Iterator[str]:
    for path in sorted((PACKAGE / "mm").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(inner, ast.Name) and inner.id in TOUCHES for inner in ast.walk(node)
            ):
                yield f"{path.stem}.{node.name}"


def test_whatever_touches_a_claim_is_in_the_table() -> None:
    """A new place that sets, clears or reads one must say which row of the table it is."""
    named = {place.removeprefix("mm.") for row in LIFECYCLE for place in row.where}
    found = set(functions_that_touch_a_claim())
    assert len(found) > 20
    missing = {name for name in found - named if not name.startswith(tuple(MAY_LOOK))}
    assert missing == set()


@pytest.mark.parametrize("row", LIFECYCLE, ids=lambda row: row.id)
def test_each_place_of_a_row_is_there(row: Row) -> None:
    for shown, file, line in places_of(row):
        assert shown.rpartition(".")[2] in (PACKAGE / file).read_text()
        assert line > 1


def test_ids_are_short_names_and_occur_once() -> None:
    assert len(set(ROW_IDS)) == len(ROW_IDS) > 30
    assert all(part.isalpha() and part.islower() for name in ROW_IDS for part in name.split("-"))
    assert len({(row.event, row.flag) for row in LIFECYCLE}) == len(LIFECYCLE)


def test_huge_pages_of_a_pool_have_a_claim_of_their_own() -> None:
    assert {row.flag for row in LIFECYCLE if row.id.startswith("hugetlb-")} == {HPG_ZEROED}
    assert {row.flag for row in LIFECYCLE if not row.id.startswith("hugetlb-")} == {PG_ZEROED}


def test_a_misspelt_row_is_found() -> None:
    assert unknown_rows(["split", "spilt", "alloc", "alocc"]) == ["alocc", "spilt"]
    assert unknown_rows(ROW_IDS) == []


SOURCE = '''
def first():
    """Says clear(page) and does it."""
    if True:
        clear(page)
    clear(page)


class Holder:
    def second(self):
        return clear
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "mm").mkdir()
    (tmp_path / "mm" / "pages.py").write_text(SOURCE)
    return tmp_path


def test_a_line_is_the_def_or_the_first_statement_that_says_so(package: Path) -> None:
    assert line_of("mm.pages.first", package=package) == 2
    assert line_of("mm.pages.first", "clear(page)", package) == 5
    assert line_of("mm.pages.Holder.second", "return clear", package) == 11


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("mm.pages.third", ""),
        ("mm.pages.second", ""),
        ("mm.pages.Holder", ""),
        ("mm.pages.Holder.first", ""),
        ("mm.pages.first", "does it"),
        ("mm.pages.first", "return clear"),
    ],
)
def test_what_is_not_there_has_no_line(package: Path, place: str, statement: str) -> None:
    with pytest.raises(LookupError, match="pages"):
        line_of(place, statement, package)
