# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero bench`` as a user runs it: another process, small sizes, real files, a real interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostzero.bench.names import TIMED

TINY = ("--memory", "80M", "--size", "8M", "--repetitions", "1")

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hostzero.cli.main import main
main()
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "bench", *map(str, arguments)]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@pytest.mark.compiled_only
def test_a_run_writes_its_files_and_shows_its_tables(tmp_path: Path) -> None:
    done = bench(*TINY, "--json", tmp_path / "o.json", "--plot", tmp_path / "o.svg")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "o.json").read_text())
    assert len(document["results"]) == len(TIMED) * 4 * 4
    assert all(len(one["task_clock_ms"]) == 1 for one in document["results"])
    assert len(document["comparisons"]) == len(TIMED) * 4 * 3
    assert (tmp_path / "o.svg").read_bytes().startswith(b"<?xml")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["o.json", "o.svg"]
    for scenario in TIMED:
        assert f"\n{scenario}: task-clock of one arm over another" in done.stdout
    progress = [line for line in done.stderr.splitlines() if not line.startswith("compiling")]
    assert progress == [f"{scenario}: 16 steps" for scenario in TIMED]


@pytest.mark.compiled_only
def test_standard_output_is_nothing_but_json_if_asked(tmp_path: Path) -> None:
    done = bench(
        "--memory",
        "32M",
        "--size",
        "8M",
        "--repetitions",
        "2",
        "--scenario",
        "balloon",
        "--backing",
        "memfd",
        "--json",
        "-",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {one["scenario"] for one in document["results"]} == {"balloon"}
    assert document["config"]["backing"] == "memfd"
    assert "What the numbers leave out" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--memory 80M --size 64M", "--size 64M: more than three quarters of --memory 80M; at most 60M fits"),
        ("--memory 64M --size 8M", "--memory 64M: a guest under 72M reports no free pages"),
        ("--memory 16M --size 8M --scenario balloon", "--size 8M: with 16M beside it, too large a balloon"),
        ("--memory 80M --size 3M", "--size 3M: must be a multiple of 2M above zero"),
        ("--memory 100T", "--memory 100T: with 256M beside it, more than the"),
        (
            "--scenario swap",
            "Invalid value for '--scenario': 'swap' is not one of 'thp', '4k', 'balloon'",
        ),
        (
            "--scenario fragmented --memory 80M --size 22M",
            "--size 22M: --scenario fragmented asks for it several times over; at most 20M fits",
        ),
        ("--repetitions many", "Invalid value for '--repetitions': 'many' is not a valid integer."),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(tmp_path: Path, arguments: str, says: str) -> None:
    done = bench(*arguments.split(), "--json", tmp_path / "o.json", "--plot", tmp_path / "o.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hostzero bench: error: {says}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.compiled_only
def test_an_interrupt_ends_with_130_and_leaves_the_old_file(tmp_path: Path) -> None:
    """Sent when the first scenario has begun, of a run that would take an hour."""
    (tmp_path / "o.json").write_text("old")
    arguments = command(
        *TINY, "--repetitions", "10000", "--json", tmp_path / "o.json", "--plot", tmp_path / "o.png"
    )
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("thp: "):
                break
        os.kill(running.pid, signal.SIGINT)
        shown, rest = running.communicate(timeout=60)
    assert (running.returncode, shown, rest) == (130, "", "hostzero bench: interrupted\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["o.json"]
    assert (tmp_path / "o.json").read_text() == "old"


@pytest.mark.compiled_only
def test_an_interrupt_without_an_old_file_leaves_none(tmp_path: Path) -> None:
    arguments = command(*TINY, "--repetitions", "10000", "--scenario", "4k", "--json", tmp_path / "o.json")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("4k: "):
                break
        os.kill(running.pid, signal.SIGINT)
        shown, rest = running.communicate(timeout=60)
    assert (running.returncode, shown, rest) == (130, "", "hostzero bench: interrupted\n")
    assert list(tmp_path.iterdir()) == []
