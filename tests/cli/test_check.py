# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check`` from arguments to exit status and files, with the searches played.

What they search is tested in tests/check; here only what goes in and what comes out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hostzero.check.recording import Recording
from hostzero.check.run import SEARCHES
from hostzero.check.teeth.matrix import MatrixOptions
from hostzero.cli.main import run
from hostzero.errors import UsageError
from tests.check.played import VIOLATION, Played, played, recording_of

__all__ = ["played"]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_nothing_found_is_0_and_leaves_no_file(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--seed", "7"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0] == "seed 7"
    assert "wire: 1,000 operations" in shown.err
    assert shown.out.splitlines()[-1].startswith("nothing found in ")
    assert files() == []


def test_the_defaults_are_all_searches_for_a_minute(played: Played) -> None:
    assert run(["check"]) == 0
    assert [name for name, _, _ in played.asked] == list(SEARCHES)
    assert played.asked[0][1].seconds == pytest.approx(12, abs=0.1)
    assert {(limits.pages, limits.depth) for _, limits, _ in played.asked} == {(None, None)}


def test_every_option_arrives(played: Played) -> None:
    arguments = "--seconds 8.5 --seed 3 --pages 32 --depth 5 --search wire --search wire"
    assert run(["check", *arguments.split()]) == 0
    ((name, limits, seed),) = played.asked
    assert (name, limits.seconds, limits.pages, limits.depth, seed) == ("wire", 8.5, 32, 5, 3)


def test_a_seed_is_drawn_and_said(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = set()
    for _ in range(3):
        assert run(["check"]) == 0
        said = re.match(r"seed (\d+)\n", capsys.readouterr().err)
        assert said
        seeds.add(int(said[1]))
    assert seeds == {seed for _, _, seed in played.asked}
    assert len(seeds) == 3


def test_what_is_found_is_1_and_can_be_replayed(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    played.parts["machine"].recording = recording_of("machine")
    played.parts["machine"].replays = VIOLATION
    assert run(["check", "--seed", "7"]) == 1
    shown = capsys.readouterr()
    assert "corruption: a block known to be zero is not" in shown.out
    assert "wire" not in [name for name, _, _ in played.asked]
    assert files() == ["hostzero-check-7.json"]
    command = re.search(r"run it again: hostzero (.*)\n", shown.out)
    assert command
    assert run(command[1].split()) == 1
    assert "still fails, as it was recorded" in capsys.readouterr().out
    assert played.replayed == [recording_of("machine")]
    assert files() == ["hostzero-check-7.json"]


def test_a_recording_never_takes_anothers_place(played: Played) -> None:
    played.parts["wire"].recording = recording_of("wire")
    Path("hostzero-check-7.json").write_text("another")
    Path("hostzero-check-7-2.json").write_text("another")
    assert run(["check", "--seed", "7"]) == 1
    assert Recording.load(Path("hostzero-check-7-3.json")) == recording_of("wire")
    assert Path("hostzero-check-7.json").read_text() == "another"


def test_a_recording_goes_where_it_is_told(played: Played) -> None:
    played.parts["wire"].recording = recording_of("wire")
    assert run(["check", "--output", "mine.json"]) == 1
    assert files() == ["mine.json"]


def test_a_recording_that_cannot_be_saved_does_not_take_the_violation_with_it(
    played: Played, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_recording: Recording, path: Path) -> None:
        raise UsageError(f"{path}: the recording cannot be written: No space left on device")

    monkeypatch.setattr(Recording, "save", refuse)
    played.parts["wire"].recording = recording_of("wire")
    assert run(["check", "--seed", "7", "--json", "report.json"]) == 1
    shown = capsys.readouterr()
    assert "byte   0x1008 is 0xaa" in shown.out
    assert "run it again" not in shown.out
    assert shown.err.endswith(
        "hostzero-check-7.json: the recording cannot be written: No space left on device\n"
    )
    assert json.loads(Path("report.json").read_text())["recording_file"] is None


def test_the_report_is_written(played: Played) -> None:
    played.parts["wire"].recording = recording_of("wire")
    assert run(["check", "--seed", "7", "--json", "report.json"]) == 1
    document = json.loads(Path("report.json").read_text())
    assert (document["format"], document["version"]) == ("hostzero-check-report", 1)
    assert (document["seed"], document["ok"]) == (7, False)
    assert document["recording_file"] == "hostzero-check-7.json"
    assert [search["name"] for search in document["searches"]] == list(SEARCHES)
    assert Recording.from_json(document["searches"][-1]["recording"]) == recording_of("wire")
    assert files() == ["hostzero-check-7.json", "report.json"]


def test_the_report_on_standard_output_is_nothing_but_json(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is True
    assert "Searches" in shown.err


@pytest.mark.parametrize("arguments", [[], ["--json", "-"], ["--json", "report.json"]])
def test_an_interrupt_is_130_with_what_was_done_and_without_files(
    played: Played, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    played.parts["exhaustive"].error = KeyboardInterrupt()
    assert run(["check", "--seed", "7", *arguments]) == 130
    shown = capsys.readouterr()
    tables = shown.err if "-" in arguments else shown.out
    assert "allocator" in tables
    assert "exhaustive: interrupted" in tables
    assert "interrupted; nothing found" in tables
    assert shown.err.endswith("hostzero check: interrupted\n")
    if "-" in arguments:
        assert shown.out == ""
    assert files() == []


def test_a_defect_of_a_search_keeps_its_traceback_and_leaves_no_file(played: Played) -> None:
    played.parts["allocator"].error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        run(["check", "--json", "report.json"])
    assert files() == []


def test_limits_that_a_search_refuses_are_a_wrong_call(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    played.parts["allocator"].error = UsageError("--pages 17: the search allocator takes a power of two")
    assert run(["check", "--pages", "17"]) == 2
    assert capsys.readouterr().err.endswith(
        "hostzero check: error: --pages 17: the search allocator takes a power of two\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seconds 0", "--seconds 0: must be above zero"),
        ("--seconds x", "Invalid value for '--seconds': 'x' is not a valid float."),
        ("--seed -1", "--seed -1: must be from 0 to 4294967295"),
        ("--pages 8", "--pages 8: must be from 16 to 1048576"),
        ("--depth 0", "--depth 0: must be at least 1"),
        ("--json none/r.json", "--json none/r.json: there is no directory none"),
        ("--output none/r.json", "--output none/r.json: there is no directory none"),
        ("--output .", "--output .: is a directory"),
        ("--output -", "--output -: a recording is a file, for --replay to read"),
        ("--output there.json", "--output there.json: is there already, and recordings are not overwritten"),
        ("--replay none.json", "none.json: cannot be read: No such file or directory"),
        ("--replay .", ".: cannot be read: Is a directory"),
        (
            "--replay there.json",
            "there.json: is no recording of hostzero check: Expecting value: line 1 column 1 (char 0)",
        ),
        (
            "--replay r.json --seed 0 --search wire --json -",
            "--replay runs a recording as it is: leave out --json, --search, --seed",
        ),
        ("--replay r.json --mutants", "--replay runs a recording as it is: leave out --mutants"),
        ("--patch 25 --jobs 2 --seed 1", "that is for --mutants: leave out --jobs, --patch"),
        (
            "--mutants --search wire --output r.json",
            "--mutants searches each mutant in the same way: leave out --output, --search",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    played: Played, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    Path("there.json").write_text("there")
    assert run(["check", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1] == f"hostzero check: error: {message}"
    assert played.prepared == []
    assert files() == ["there.json"]
    assert Path("there.json").read_text() == "there"


def test_a_search_that_is_not_there_is_refused(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--search", "wine"]) == 2
    assert "'wine' is not one of 'allocator', 'exhaustive', 'machine', 'wire'" in capsys.readouterr().err


def test_a_replay_that_does_not_fail_any_more_is_0(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    recording_of("wire").save(Path("r.json"))
    assert run(["check", "--replay", "r.json"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("r.json: 3 steps of the search wire\n")
    assert "does not fail any more" in shown
    assert played.asked == []


def test_a_replay_that_fails_in_another_way_is_1(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    recording_of("wire").save(Path("r.json"))
    played.parts["wire"].replays = replace(VIOLATION, kind="rot")
    assert run(["check", "--replay", "r.json"]) == 1
    assert "fails in another way" in capsys.readouterr().out


def test_a_recording_of_another_search_is_refused(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    recording_of("dowsing").save(Path("r.json"))
    assert run(["check", "--replay", "r.json"]) == 2
    assert "there is no search 'dowsing'" in capsys.readouterr().err


def test_what_shows_a_run_needs_neither_statistics_nor_plots() -> None:
    """Hundreds of mutants start it; a subprocess, because this one has imported everything."""
    program = (
        "import sys\n"
        "import hostzero.cli.check, hostzero.check.run, hostzero.check.progress, hostzero.check.show\n"
        "print([name for name in ('numpy', 'numba', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_help_has_the_defaults_of_a_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--help"]) == 0
    said, mutant = " ".join(capsys.readouterr().out.split()), MatrixOptions()
    assert f"and {mutant.seconds:g} for each mutant]" in said
    assert f"; {mutant.seed} for mutants]" in said
    assert f"searched compiled. [default: {mutant.again:g}]" in said
