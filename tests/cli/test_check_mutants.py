# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check --mutants`` from arguments to exit status and files, with the matrix played."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hostzero.cli.main import run


class PlayedMatrix:
    """Stands for hostzero.check.teeth.matrix and hostzero.check.teeth.matrix_show."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.ok = True

    def make_options(self, **values: Any) -> SimpleNamespace:
        self.asked.append(values)
        return SimpleNamespace(**{"seconds": 20.0, "again": 120.0, **values})

    def run_matrix(
        self, options: SimpleNamespace, progress: Callable[[int, int, str], None]
    ) -> SimpleNamespace:
        progress(1, 1, "killed")
        return SimpleNamespace(ok=self.ok)


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PlayedMatrix:
    monkeypatch.chdir(tmp_path)
    played = PlayedMatrix()
    work = types.ModuleType("hostzero.check.teeth.matrix")
    work.MatrixOptions = played.make_options  # type: ignore[attr-defined]
    work.run_matrix = played.run_matrix  # type: ignore[attr-defined]
    show = types.ModuleType("hostzero.check.teeth.matrix_show")
    show.progress_line = lambda number, total, outcome: f"{number}/{total} {outcome}"  # type: ignore[attr-defined]
    show.to_json = lambda matrix: {"ok": matrix.ok}  # type: ignore[attr-defined]
    show.to_markdown = lambda _, date: f"made {date[:2]}\n"  # type: ignore[attr-defined]

    def print_matrix(_: SimpleNamespace, console: Console) -> None:
        console.print("the matrix")

    show.print_matrix = print_matrix  # type: ignore[attr-defined]
    for module in (work, show):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return played


def test_every_option_arrives_and_the_defaults_are_the_matrixs_own(
    matrix: PlayedMatrix, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--mutants"]) == 0
    arguments = "--patch 25 --patch 26 --name merge --kind corrupts --jobs 2 --seconds 5 --again 0 --seed 3"
    assert run(["check", "--mutants", *arguments.split()]) == 0
    assert matrix.asked == [
        {},
        {
            "patches": (25, 26),
            "names": ("merge",),
            "kinds": ("corrupts",),
            "jobs": 2,
            "seconds": 5,
            "again": 0,
            "seed": 3,
        },
    ]
    shown = capsys.readouterr()
    assert shown.out == "the matrix\n" * 2
    assert shown.err == "1/1 killed\n" * 2


def test_a_survivor_that_should_not_be_is_1(matrix: PlayedMatrix) -> None:
    matrix.ok = False
    assert run(["check", "--mutants", "--json", "m.json", "--markdown", "m.md"]) == 1
    assert json.loads(Path("m.json").read_text()) == {"ok": False}
    assert Path("m.md").read_text() == "made 20\n"


def test_json_on_standard_output_is_nothing_but_json(
    matrix: PlayedMatrix, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--mutants", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"ok": True}
    assert "the matrix" in shown.err


def test_markdown_on_standard_output_is_nothing_but_markdown(
    matrix: PlayedMatrix, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--mutants", "--markdown", "-"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "made 20\n"
    assert "the matrix" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seconds 0", "--seconds 0: must be above zero"),
        ("--seconds nan", "--seconds nan: must be above zero"),
        ("--again -1", "--again -1: must not be below zero; 0 leaves it out"),
        ("--again nan", "--again nan: must not be below zero; 0 leaves it out"),
        ("--jobs 0", "--jobs 0: must be above zero"),
        ("--markdown none/m.md", "--markdown none/m.md: there is no directory none"),
        ("--json .", "--json .: is a directory"),
    ],
)
def test_what_does_not_fit_is_refused(
    matrix: PlayedMatrix, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert run(["check", "--mutants", *arguments.split()]) == 2
    assert capsys.readouterr() == ("", f"hostzero check: error: {message}\n")
