# SPDX-License-Identifier: GPL-2.0-only
"""What people read: every search's work, every row, and all there is to know of a violation."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hostzero.check.lifecycle import ROW_IDS
from hostzero.check.recording import Recording
from hostzero.check.run import CheckOptions, Report
from hostzero.check.search import Findings
from hostzero.check.show import MOST_STEPS, print_replay, print_report, step_lines
from tests.check.played import VIOLATION, recording_of


def shown(report: Report, width: int = 118) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


def report_of(*findings: Findings) -> Report:
    return Report(CheckOptions(seed=7), [(f"the {f.search} search", f) for f in findings])


QUIET = Findings("allocator", 10, 2_500_000, None, Counter({"split": 12_345, "alloc": 2}), ["250,000/s"])
STATES = Findings("exhaustive", 20, 900_000, 500_000, Counter({"split": 1, "pcp": 4}), ["closed: zone of 16"])


def test_a_quiet_run_says_what_was_done_and_what_not() -> None:
    text = shown(report_of(QUIET, STATES))
    lines = [line.split() for line in text.splitlines()]
    assert ["allocator", "10.0", "2,500,000", "250,000", "–", "–", "2", "of", str(len(ROW_IDS))] in lines
    assert ["exhaustive", "20.0", "900,000", "45,000", "500,000", "25,000", "2", "of", "41"] in lines
    assert f"3 of {len(ROW_IDS)} exercised" in text
    assert "12,346" in text
    assert "exhaustive: closed: zone of 16" in text
    assert text.splitlines()[-1] == "nothing found in 30 s; seed 7"


@pytest.mark.parametrize("width", [40, 80, 118])
def test_every_row_of_the_table_is_either_counted_or_named_as_missing(width: int) -> None:
    counted, _, missing = shown(report_of(QUIET, STATES), width).partition("not exercised")
    named = missing.partition("allocator:")[0].replace("\n", " ").replace(",", " ").split()
    assert sorted([*named, "split", "alloc", "pcp"]) == sorted(ROW_IDS)
    assert all(f"{name} " in counted for name in ("split", "alloc", "pcp"))


def test_a_run_that_exercised_nothing_says_so() -> None:
    text = shown(report_of(Findings("wire")))
    assert f"0 of {len(ROW_IDS)} exercised" in text
    assert "drain-set, drain-not" in text


def test_a_run_that_exercised_everything_names_nothing_as_missing() -> None:
    text = shown(report_of(Findings("wire", rows=Counter(dict.fromkeys(ROW_IDS, 3)))))
    assert "not exercised" not in text
    assert all(name in text for name in ROW_IDS)


def test_a_violation_is_shown_with_all_that_is_known_of_it() -> None:
    found = Findings("wire", 5, 100, recording=recording_of("wire"), found_after=100)
    report = report_of(QUIET, found)
    report.recording_file = Path("found.json")
    text = shown(report)
    order = [
        "wire found, with seed 7 after 100 steps:",
        "corruption: a block known to be zero is not",
        "(somebody reads bytes that are not what they should be",
        "page   0x40 in a block of order 3",
        "free list of zone 0, order 3, movable",
        "PG_zeroed, set by the drain",
        "byte   0x1008 is 0xaa",
        "events of this page, the oldest first",
        "12: allocated, order 0, CPU 1",
        "14: freed",
        "3 steps that fail:",
        "guest: pages 64",
        "  1  alloc 0 1",
        "  3  free 64",
        "run it again: hostzero check --replay found.json",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "nothing found" not in text
    assert "not exercised" not in text  # it is no answer to anything now


def test_an_event_that_is_long_or_looks_like_markup_is_printed_as_it_is() -> None:
    event = "15: [bold]written[/bold] " + "x" * 200
    found = Findings("wire", recording=recording_of("wire", replace(VIOLATION, history=(event,))))
    assert f"    {event}\n" in shown(report_of(found), width=60)


def test_a_long_recording_is_cut_on_the_screen() -> None:
    steps = tuple(["alloc", at] for at in range(MOST_STEPS + 5))
    found = Findings("wire", recording=Recording("wire", {}, steps, VIOLATION))
    text = shown(report_of(found))
    assert f"{MOST_STEPS + 5} steps that fail:" in text
    assert f"alloc {MOST_STEPS - 1}\n  ... and 5 more, in the recording\n" in text
    assert "guest:" not in text


def test_an_interrupted_run_says_so() -> None:
    report = report_of(QUIET)
    report.interrupted = True
    assert shown(report).splitlines()[-1] == "interrupted; nothing found in 10 s; seed 7"


def test_steps_are_numbered_and_have_their_arguments_as_json() -> None:
    assert step_lines([["reset"], ["offer", "6", True], ["bytes", [1, 2], None]]) == [
        "  1  reset",
        '  2  offer "6" true',
        "  3  bytes [1, 2] null",
    ]
    assert step_lines([["a"]] * 10)[0] == "   1  a"


def replayed(found: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=118)
    print_replay(Path("found.json"), recording_of("wire"), found, console)  # type: ignore[arg-type]
    return stream.getvalue()


def test_a_replay_that_still_fails() -> None:
    text = replayed(VIOLATION)
    assert text.startswith("found.json: 3 steps of the search wire\n")
    assert "byte   0x1008 is 0xaa" in text
    assert text.endswith("still fails, as it was recorded\n")


def test_a_replay_that_fails_in_another_way_names_both() -> None:
    text = replayed(replace(VIOLATION, what="a page is on two lists", kind="rot"))
    assert "rot: a page is on two lists" in text
    assert text.endswith("fails in another way; it was corruption: a block known to be zero is not\n")


def test_a_replay_that_does_not_fail_any_more() -> None:
    assert replayed(None).endswith(
        "does not fail any more; it was corruption: a block known to be zero is not\n"
    )
