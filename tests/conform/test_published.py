# SPDX-License-Identifier: GPL-2.0-only
"""The reports on QEMU's own device that are in the docs: of this suite, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostzero.conform.suite import all_cases

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("version", ["7.2", "11.1"])
def test_a_published_report_is_of_this_suite_and_in_the_table(version: str) -> None:
    report: dict[str, Any] = json.loads((DOCS / f"conformance-qemu-{version}.json").read_text())
    assert [(case["id"], case["clause"]) for case in report["cases"]] == [
        (case.id, case.clause) for case in all_cases()
    ]
    counts = report["counts"]
    release = report["facts"]["device"].split("version ")[1].split()[0]
    row = f"| QEMU {release} | {len(report['cases'])} | {counts['pass']} | {counts['fail']} "
    row += f"| {counts['should'] + counts['known deviation']} | {counts['not applicable']} |"
    assert row in (DOCS / "conformance.md").read_text().splitlines()
