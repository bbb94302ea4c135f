# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check`` with nothing played: the unchanged source survives, and what is counted adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostzero.check.lifecycle import ROW_IDS
from hostzero.cli.main import run


def test_a_short_search_of_the_unchanged_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run(["check", "--search", "allocator", "--seconds", "1", "--seed", "1", "--json", "report.json"]) == 0
    )
    document = json.loads(Path("report.json").read_text())
    (search,) = document["searches"]
    assert (document["ok"], document["recording_file"], search["name"]) == (True, None, "allocator")
    assert search["operations"] > 0
    assert list(document["coverage"]) == list(ROW_IDS)
    assert {name: count for name, count in document["coverage"].items() if count} == search["rows"]
    assert f"{search['operations']:,}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
