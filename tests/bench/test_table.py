# SPDX-License-Identifier: GPL-2.0-only
"""Tables as text: nothing cut at 80 columns, every number and every caveat there."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hostzero.bench import table
from hostzero.bench.names import Arm, Phase, Scenario
from hostzero.bench.results import AllocatorResults, Results
from hostzero.render import WIDE
from hostzero.stats import PairedRatio
from tests.bench.synthetic import make_allocator_results, make_results


def rendered(results: Results | AllocatorResults, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    if isinstance(results, Results):
        table.print_results(results, console)
    else:
        table.print_allocator(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, phase: str, arm: str) -> list[str]:
    """Return the cells after the arm in the first row of that phase and arm."""
    here = ""
    for line in text.splitlines():
        cells = line.split()
        if cells and cells[0] in set(Phase):
            here, cells = cells[0], cells[1:]
        if cells and (here, cells[0]) == (phase, arm) and "/" not in line:
            return cells[1:]
    raise AssertionError(f"no row {phase} {arm}")


@pytest.mark.parametrize("width", [80, 100, WIDE, 160])
def test_nothing_is_cut_or_runs_over(width: int) -> None:
    text = rendered(make_results(hardware=True), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_a_wide_terminal_has_every_column_in_one_row() -> None:
    """Baseline, populate+fill: 54.5 ms drifting by 0 to 9 %, one disturbed, all zeroed twice."""
    text = rendered(make_results([Scenario.THP]), 120)
    assert row(text, "populate+fill", "baseline") == [
        *("57.0", "±", "1.65", "57.0", "57.5", "128", "256", "256", "0", "2000", "10", "(1)")
    ]


def test_a_narrow_terminal_has_the_same_cells_in_two_tables() -> None:
    text = rendered(make_results([Scenario.THP]), 80)
    assert row(text, "populate", "optimized") == ["1.05", "±", "0.03", "1.04", "1.06", "10", "(0)"]
    bytes_part = text[text.index("who zeroed") :]
    assert row(bytes_part, "populate", "optimized") == ["0", "0", "0", "256", "2000"]


def test_comparisons_have_ratio_interval_change_and_pairs() -> None:
    text = rendered(make_results([Scenario.THP]), 120)
    assert "optimized / baseline         0.827 [0.827, 0.827]   -17 %  10    0.827 [0.827, 0.827]   9" in text
    assert "optimized / never-reported   1.510 [1.510, 1.510]   +51 %  10" in text


def test_the_cover_letters_figures_are_beside_ours_and_labelled() -> None:
    text = rendered(make_results([Scenario.THP]), 80)
    start = text.index("the cover letter's own figures (v8), not measured here")
    part = text[start:]
    for cell in ("232 ± 20 ms", "51 ± 26 ms", "-78 %", "1.20M ± 248K", "13.8M ± 1.0M", "n=10", "KVM"):
        assert cell in part


def test_a_scenario_that_the_cover_letter_has_not_gets_no_figures() -> None:
    assert "cover letter's own" not in rendered(make_results([Scenario.BALLOON]), 120)


def test_the_caveats_of_the_phases_that_ran_are_there() -> None:
    text = " ".join(rendered(make_results([Scenario.THP]), 100).split())
    assert "moved to the first touch, not removed" in text
    assert "no hardware page fault of its own" in text
    assert "wall - task-clock > max(1 ms, 5% of wall)" in text


def test_the_caveats_of_other_phases_and_arms_are_not() -> None:
    results = make_results([Scenario.THP])
    results.series = [one for one in results.series if (one.phase, one.arm) == (Phase.CHURN, Arm.BASELINE)]
    text = rendered(results, 100)
    assert "populate:" not in text
    assert "control:" not in text


def test_missing_hardware_counts_say_why() -> None:
    text = rendered(make_results([Scenario.THP]), 120)
    assert "instructions, cache-misses: not available: the counters stay at zero" in text
    assert "hardware counts" not in text


def test_hardware_counts_are_shown_where_they_exist() -> None:
    text = rendered(make_results([Scenario.THP], hardware=True), 120)
    part = text[text.index("thp: hardware counts") :]
    assert row(part, "populate", "baseline") == ["2.45M", "±", "0", "175K", "±", "0"]
    assert "not available" not in text


def test_an_outer_host_that_takes_memory_back_is_mentioned() -> None:
    results = make_results([Scenario.THP])
    assert "itself a guest" not in rendered(results, 120)
    results.host = {**results.host, "outer_reporting_order": 9}
    assert "itself a guest" in rendered(results, 120)


def test_a_single_repetition_shows_no_spread_and_no_interval() -> None:
    text = rendered(make_results([Scenario.THP], repetitions=1), 120)
    assert row(text, "populate", "baseline")[0:2] == ["35.0", "35.0"]
    assert "no-zeroing / baseline                       0.023" in text


def test_results_without_anything_render() -> None:
    assert "leave out" in rendered(Results(host={}, config={}), 80)


def test_allocator_table() -> None:
    text = rendered(make_allocator_results(), 80)
    assert "allocate order 0, ns       36.0 ± 1.0    36.0   35.0  3" in text
    assert "control share, order 0  9.0 % ± 1.0 %   9.0 %  8.0 %  3" in text


def test_allocator_without_values_shows_dashes() -> None:
    text = rendered(AllocatorResults([], [], [], [], [], [], []), 80)
    assert "allocate order 0, ns            –       –      –  0" in text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (PairedRatio(None, None, 0, 3), "–"),
        (PairedRatio(0.5, None, 1, 0), "0.500"),
        (PairedRatio(0.5, (0.25, 1.0), 9, 0), "0.500 [0.250, 1.000]"),
        (PairedRatio(12.34, (9.5, 16.0), 9, 0), "12.3 [9.500, 16.0]"),
    ],
)
def test_ratio_text(ratio: PairedRatio, text: str) -> None:
    assert table.ratio_text(ratio) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.8441, "0.84"), (9.994, "9.99"), (36.64, "36.6"), (231.7, "232"), (3228, "3228")]
)
def test_milliseconds(value: float, text: str) -> None:
    assert table.milliseconds(value) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [(None, "–"), ([], "–"), ([256 << 20], "256"), ([1 << 19], "0.5"), ([0, 0, 2 << 20], "0")],
)
def test_mebibytes(values: list[int] | None, text: str) -> None:
    assert table.mebibytes(values) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (None, "not available"),
        ([999], "999"),
        ([1200, 1200], "1.20K ± 0"),
        ([16_300_000], "16.3M"),
        ([288_000], "288K"),
    ],
)
def test_count_and_stdev(values: list[int] | None, text: str) -> None:
    assert table.count_and_stdev(values) == text
