# SPDX-License-Identifier: GPL-2.0-only
"""The files of `mutants/` fit the source, and every patch has one; they are read, chosen and copied."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hostzero.check.teeth.mutants import KINDS, MUTANTS, PACKAGE, ROOT, Mutant, chosen, copied, read, read_all
from hostzero.errors import UsageError
from tests.test_series import ROWS, Row, functions_in

ALL = read_all()
every_mutant = pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.file)


def source_of(mutant: Mutant) -> str:
    return (ROOT / PACKAGE / mutant.module).read_text()


@every_mutant
def test_a_mutant_says_what_it_is(mutant: Mutant) -> None:
    assert re.fullmatch(rf"{mutant.patch:02}-[a-z0-9]+(-[a-z0-9]+)*", mutant.file)
    assert 1 <= mutant.patch <= 37
    assert mutant.kind in KINDS
    for text in (mutant.name, mutant.source, mutant.breaks):
        assert text
        assert text == text.strip()
        assert "\n" not in text


@every_mutant
def test_a_mutant_fits_its_file_in_one_place(mutant: Mutant) -> None:
    source = source_of(mutant)
    assert source.count(mutant.old) == 1
    assert mutant.old != mutant.new
    changed = mutant.apply(source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    compile(changed, mutant.module, "exec")


@every_mutant
def test_a_mutants_tests_exist(mutant: Mutant) -> None:
    assert len(set(mutant.tests)) == len(mutant.tests)
    for test in mutant.tests:
        file, _, name = test.partition("[")[0].partition("::")
        assert name.startswith("test_")
        assert name in functions_in(ROOT / file), test


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL)
    assert len({(mutant.module, mutant.old, mutant.new) for mutant in ALL}) == len(ALL)


@pytest.mark.parametrize("patch", range(1, 38))
def test_every_patch_has_a_mutant(patch: int) -> None:
    assert [mutant for mutant in ALL if mutant.patch == patch]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_every_test_in_the_map_is_seen_to_fail(row: Row) -> None:
    """A row's tests are among those that some mutant of its patch makes fail."""
    seen = {test.partition("[")[0] for mutant in ALL if mutant.patch == row.number for test in mutant.tests}
    assert set(row.tests) <= seen


# ---- reading, choosing, copying


GOOD = """
name = "a name"
patch = 25
source = "a source"
breaks = "a rule"
kind = "corrupts"
file = "units.py"
old = "PAGE_SHIFT"
new = "PAGE_SIZE"
tests = ["tests/test_units.py::test_x"]
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "25-x.toml").write_text(GOOD)
    assert read(tmp_path / "25-x.toml").apply("1 << PAGE_SHIFT") == "1 << PAGE_SIZE"


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace('kind = "corrupts"\n', ""),
        GOOD + "more = 1\n",
        GOOD.replace("patch = 25", 'patch = "25"'),
        GOOD.replace('["tests/test_units.py::test_x"]', "[]"),
        GOOD.replace('old = "PAGE_SHIFT"', "old = 1"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "25-x.toml").write_text(text)
    with pytest.raises(ValueError, match=r"25-x\.toml"):
        read(tmp_path / "25-x.toml")


@pytest.mark.parametrize("source", ["", "PAGE_SHIFT + PAGE_SHIFT"])
def test_a_change_in_no_place_or_two_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "25-x.toml").write_text(GOOD)
    with pytest.raises(ValueError, match="occurs"):
        read(tmp_path / "25-x.toml").apply(source)


def test_mutants_are_chosen_by_patch_or_name() -> None:
    assert chosen(ALL, [], []) == ALL
    assert {mutant.patch for mutant in chosen(ALL, [25, 26], [])} == {25, 26}
    assert [mutant.file for mutant in chosen(ALL, [], [ALL[0].file])] == [ALL[0].file]
    assert chosen(ALL, [38], []) == []
    assert len(list(MUTANTS.glob("*.toml"))) == len(ALL)


def test_mutants_are_chosen_by_kind_too() -> None:
    losing = chosen(ALL, kinds=["loses"])
    assert losing
    assert {mutant.kind for mutant in losing} == {"loses"}
    assert chosen(ALL, [25], kinds=["loses"]) == [mutant for mutant in losing if mutant.patch == 25]


def test_without_a_checkout_there_are_no_mutants(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need a checkout"):
        read_all(tmp_path / "mutants")


def test_a_copy_is_gone_at_the_end_whatever_happens(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).mkdir(parents=True)
    (tmp_path / PACKAGE / "units.py").write_text("PAGE_SHIFT = 12\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    places = []

    def interrupted() -> None:
        with copied("hostzero-test-", [Path("pyproject.toml")], tmp_path) as copy:
            places.append(copy)
            assert (copy / PACKAGE / "units.py").read_text() == "PAGE_SHIFT = 12\n"
            assert list((copy / PACKAGE / "__pycache__").glob("units.*.pyc"))
            assert (copy / "pyproject.toml").is_file()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not places[0].exists()
