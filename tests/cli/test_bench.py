# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero bench`` from arguments to files, with the measuring part played.

What it measures is tested in tests/bench; here only what goes in and what comes out.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from hostzero.bench.names import TIMED, Scenario
from hostzero.bench.options import BenchOptions
from hostzero.bench.progress import Progress
from hostzero.bench.results import AllocatorResults, Results
from hostzero.cli.main import run
from hostzero.errors import OutOfMemory
from tests.bench.synthetic import make_allocator_results, make_results

MIB = 1 << 20


class Played:
    """Stands for hostzero.bench.run and hostzero.bench.allocator, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[BenchOptions | int] = []
        self.error: BaseException | None = None

    def run_bench(self, options: BenchOptions, progress: Progress) -> Results:
        self.asked.append(options)
        progress.scenario("thp", 1)
        if self.error:
            raise self.error
        return make_results(options.scenarios, repetitions=options.repetitions)

    def run_allocator(self, repetitions: int, progress: Progress) -> AllocatorResults:
        self.asked.append(repetitions)
        return make_allocator_results()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    for module, function in (("run", "run_bench"), ("allocator", "run_allocator")):
        fake = types.ModuleType(f"hostzero.bench.{module}")
        setattr(fake, function, getattr(played, function))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr("hostzero.host.available_memory", lambda: 1 << 40)
    return played


def test_the_defaults_are_a_full_run(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 0
    assert played.asked == [BenchOptions()]
    shown = capsys.readouterr()
    assert "thp: 2 MiB pages from reported blocks" in shown.out
    assert shown.err == "thp: 1 steps\n"


def test_every_option_arrives(played: Played) -> None:
    arguments = (
        "--scenario 4k --scenario thp --scenario 4k --memory 512M --size 64MiB --repetitions 2 --seed 7"
    )
    assert run(["bench", *arguments.split(), "--backing", "memfd"]) == 0
    assert played.asked == [
        BenchOptions(
            scenarios=(Scenario.SMALL_PAGES, Scenario.THP),
            memory=512 * MIB,
            size=64 * MIB,
            repetitions=2,
            seed=7,
            backing="memfd",
        )
    ]


def test_quick_is_small_and_yields_to_what_was_given(played: Played) -> None:
    assert run(["bench", "--quick", "--repetitions", "5"]) == 0
    assert played.asked == [
        BenchOptions(scenarios=(Scenario.THP,), memory=1024 * MIB, size=128 * MIB, repetitions=5, quick=True)
    ]


def test_json_and_plot_are_written(played: Played, tmp_path: Path) -> None:
    assert run(["bench", "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.svg")]) == 0
    document = json.loads((tmp_path / "o.json").read_text())
    assert (document["version"], len(document["results"])) == (1, len(TIMED) * 16)
    assert (tmp_path / "o.svg").read_bytes().startswith(b"<?xml")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["o.json", "o.svg"]


def test_json_to_standard_output_is_nothing_but_json(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["version"] == 1
    assert "What the numbers leave out" in shown.err


def test_markdown_to_standard_output_is_nothing_but_markdown(
    played: Played, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "--markdown", "-"]) == 0
    shown = capsys.readouterr()
    assert "What the numbers leave out" in shown.err
    assert "What the numbers leave out" not in shown.out
    assert "|" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_wide_tables_unless_told_otherwise(
    played: Played, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run(["bench", "--scenario", "thp"]) == 0
    assert "who zeroed" not in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["bench", "--scenario", "thp"]) == 0
    assert "who zeroed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size 2G", "--size 2G: more than three quarters of --memory 2G; at most 1536M fits"),
        ("--size 3M", "--size 3M: must be a multiple of 2M above zero"),
        ("--size x", "--size: 'x' is not a size: write a whole number and K, M, G or T, as in 256M"),
        ("--repetitions 0", "--repetitions 0: must be from 1 to 10000"),
        ("--plot /tmp/a.pdf", "--plot /tmp/a.pdf: the name must end in .png or .svg"),
        ("--json /none/a.json", "--json /none/a.json: there is no directory /none"),
        ("--allocator --size 4M --seed 1 --plot a.png", None),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    played: Played, capsys: pytest.CaptureFixture[str], arguments: str, message: str | None
) -> None:
    message = message or "--allocator measures the allocator alone: leave out --size, --seed, --plot"
    assert run(["bench", *arguments.split()]) == 2
    assert capsys.readouterr() == ("", f"hostzero bench: error: {message}\n")
    assert played.asked == []


def test_memory_that_the_host_lacks_is_refused(
    played: Played, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostzero.host.available_memory", lambda: 1 << 30)
    assert run(["bench"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hostzero bench: error: --memory 2G: ")
    assert "1024M" in shown
    assert played.asked == []


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OutOfMemory("no page of order 9"), 1, "hostzero bench: error: no page of order 9"),
        (KeyboardInterrupt(), 130, "hostzero bench: interrupted"),
    ],
)
def test_a_run_that_does_not_end_leaves_no_file(
    played: Played,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    status: int,
    line: str,
) -> None:
    played.error = error
    arguments = ["bench", "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")]
    assert run(arguments) == status
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert list(tmp_path.iterdir()) == []


def test_the_allocator_alone(played: Played, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["bench", "--allocator", "--quick", "--json", str(tmp_path / "a.json")]) == 0
    assert played.asked == [3]
    assert "allocate order 0, ns" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["order9_free_ns"] == [71.0, 72.0, 73.0]
