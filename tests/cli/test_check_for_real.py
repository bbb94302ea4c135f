# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check`` with nothing played: the unchanged source survives, and what is counted adds up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostzero.check.lifecycle import ROW_IDS
from hostzero.cli.main import run

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hostzero.cli.main import main
main()
"""


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


def test_a_real_interrupt_says_what_was_done_and_leaves_no_file(tmp_path: Path) -> None:
    arguments = ["check", "--search", "allocator", "--seconds", "600", "--seed", "1", "--json", "report.json"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "searching for" in line:
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert err.endswith("hostzero check: interrupted\n")
    assert "interrupted; nothing found" in out
    assert list(tmp_path.iterdir()) == []


def test_a_short_matrix_of_mutants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make mutants` does with all of them: merging, marking, splitting, zeroing, and what is lost."""
    names = (
        "03-split-forgets-reported",
        "10-half-of-a-folio",
        "22-marks-survive-hibernation",
        "24-bit-of-the-neighbour",
        "25-either-half-suffices",
        "26-split-invents-a-mark",
    )
    page = tmp_path / "matrix.md"
    report = tmp_path / "matrix.json"
    chosen = [argument for name in names for argument in ("--name", name)]
    arguments = ["--seconds", "10", "--seed", "1", "--json", str(report), "--markdown", str(page)]
    assert run(["check", "--mutants", *chosen, *arguments]) == 0, capsys.readouterr().out
    document = json.loads(report.read_text())
    verdicts = {each["mutant"]["file"]: each["verdict"] for each in document["mutants"]}
    assert verdicts == dict.fromkeys(names, "killed")
    assert "SURVIVED" not in page.read_text()
