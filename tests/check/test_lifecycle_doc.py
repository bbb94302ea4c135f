# SPDX-License-Identifier: GPL-2.0-only
"""`docs/safety.md` shows the table as the source has it today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hostzero.check.lifecycle import LIFECYCLE, Row
from hostzero.check.lifecycle_doc import BEGIN, END, places_of, replace_table, to_markdown, write_table
from hostzero.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
SAFETY = ROOT / "docs" / "safety.md"


def test_the_table_in_the_docs_is_that_of_the_source() -> None:
    """After an edit that moves lines: `make safety`."""
    text = SAFETY.read_text()
    assert replace_table(text, to_markdown()) == text


def test_each_link_leads_to_a_line_that_names_what_the_row_is_about() -> None:
    links = re.findall(r"\]\(\.\./(src/hostzero/[a-z_/]+\.py)#L(\d+)\)", to_markdown())
    assert len(links) == sum(len(row.where) for row in LIFECYCLE)
    statements = [statement for row in LIFECYCLE for statement in row.statements]
    for (file, line), statement in zip(links, statements, strict=True):
        assert (statement or "def ") in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_a_place_is_shown_by_its_module_and_function() -> None:
    row = Row(
        "r",
        "event",
        "effect",
        ("mm.buddy.expand", "driver.inflate.Inflation.fill_balloon"),
        ("", "set_zeroed("),
    )
    (split, inflate) = places_of(row)
    assert split[:2] == ("buddy.expand", "mm/buddy.py")
    assert inflate[:2] == ("driver.inflate.fill_balloon", "driver/inflate.py")
    assert (
        to_markdown([row])
        .splitlines()[2]
        .startswith("| r | event | `PG_zeroed` | effect | [`buddy.expand`](")
    )


def test_only_what_is_between_the_marks_is_replaced() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_table(text, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replace_table(f"{BEGIN}\n{END}", "") == f"{BEGIN}\n{END}"


@pytest.mark.parametrize(
    "text",
    ["", f"{BEGIN}\n", f"{END}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{END}", f"{BEGIN}\n{BEGIN}\n{END}"],
)
def test_a_document_without_its_two_marks_is_left_alone(text: str) -> None:
    with pytest.raises(UsageError, match="must be marked"):
        replace_table(text, "")


def test_a_document_is_written_if_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "safety.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    assert write_table(path)
    assert not write_table(path)
    assert to_markdown() in path.read_text()


def test_the_command_that_make_runs(tmp_path: Path) -> None:
    path = tmp_path / "safety.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    command = [sys.executable, "-m", "hostzero.check.lifecycle_doc", str(path)]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said == [
        f"{path}: the lifecycle table was written anew\n",
        f"{path}: the lifecycle table is as it should be\n",
    ]
