# SPDX-License-Identifier: GPL-2.0-only
"""Records, comparisons, and the document written and read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hostzero.bench.counters import Sample
from hostzero.bench.names import COMPARISONS, Arm, Phase, Scenario
from hostzero.bench.results import PageCounts, Results, Series
from hostzero.document import to_json
from hostzero.errors import UsageError
from tests.bench.synthetic import make_allocator_results, make_results

MS = 1_000_000
LISTS = (
    "task_clock_ms",
    "wall_ms",
    "host_faults",
    "host_faulted_bytes",
    "guest_zeroed_bytes",
    "known_zero_bytes",
    "host_returned_bytes",
    "instructions",
    "cache_misses",
    "disturbed",
)


def one_series(*wall_ms: int, task_clock_ms: int = 10) -> Series:
    series = Series(Scenario.THP, Arm.BASELINE, Phase.POPULATE)
    for wall in wall_ms:
        series.add(Sample(task_clock_ms * MS, wall * MS, 128), PageCounts(1, 2, 3, 4))
    return series


def test_a_repetition_goes_into_every_list() -> None:
    series = Series(Scenario.THP, Arm.OPTIMIZED, Phase.CHURN)
    series.add(Sample(1 * MS, 2 * MS, 3, 4, 5), PageCounts(6, 7, 8, 9))
    assert series.task_clock_ms == [1.0]
    assert series.wall_ms == [2.0]
    assert series.host_faults == [3]
    assert (series.instructions, series.cache_misses) == ([4], [5])
    assert (series.guest_zeroed_bytes, series.known_zero_bytes) == ([6], [7])
    assert (series.host_returned_bytes, series.host_faulted_bytes) == ([8], [9])
    assert series.disturbed == [False]
    assert len(series) == 1


def test_a_disturbed_repetition_is_kept_and_marked() -> None:
    series = one_series(10, 30, 10)
    assert series.disturbed == [False, True, False]
    assert series.wall_ms == [10.0, 30.0, 10.0]


def test_one_missing_count_makes_the_column_unavailable() -> None:
    series = Series(Scenario.THP, Arm.BASELINE, Phase.POPULATE)
    for instructions in (5, None, 7):
        series.add(Sample(MS, MS, 0, instructions, 1), PageCounts(0, 0, 0))
    assert series.instructions is None
    assert series.cache_misses == [1, 1, 1]
    assert series.host_faulted_bytes is None


def test_series_for_makes_each_cell_once() -> None:
    results = Results(host={}, config={})
    first = results.series_for(Scenario.THP, Arm.BASELINE, Phase.POPULATE)
    assert results.series_for(Scenario.THP, Arm.BASELINE, Phase.POPULATE) is first
    assert results.series_for(Scenario.THP, Arm.BASELINE, Phase.CHURN) is not first
    assert len(results.series) == 2


def test_a_scenario_is_ordered_by_phase_and_arm_whatever_ran_first() -> None:
    results = make_results([Scenario.THP], repetitions=1)
    results.series.reverse()
    cells = [(series.phase, series.arm) for series in results.in_scenario(Scenario.THP)]
    assert cells == [(phase, arm) for phase in Phase for arm in Arm]


def test_an_empty_cell_is_not_shown() -> None:
    results = Results(host={}, config={})
    results.series_for(Scenario.THP, Arm.BASELINE, Phase.POPULATE)
    assert results.in_scenario(Scenario.THP) == []


def test_comparisons_are_those_declared_in_every_phase() -> None:
    comparisons = make_results([Scenario.THP]).comparisons()
    assert [(one.phase, one.arm, one.against) for one in comparisons] == [
        (phase, arm, against) for phase in Phase for arm, against in COMPARISONS
    ]


def test_a_comparison_divides_task_clocks_pair_by_pair() -> None:
    """optimized / baseline in populate+fill is 34.8 / 54.5 in every pair, through the drift."""
    comparisons = make_results([Scenario.THP]).comparisons()
    ratio = next(
        one.over_all
        for one in comparisons
        if (one.phase, one.arm, one.against) == (Phase.POPULATE_FILL, Arm.OPTIMIZED, Arm.BASELINE)
    )
    assert ratio.ratio == pytest.approx(34.8 / 54.5)
    assert ratio.ci95 == pytest.approx((34.8 / 54.5, 34.8 / 54.5))
    assert ratio.n == 10


def test_a_pair_is_undisturbed_only_if_both_are() -> None:
    """One baseline repetition in ten is disturbed; the never-reported arm never is."""
    for one in make_results([Scenario.THP]).comparisons():
        assert one.over_all.n == 10
        assert one.undisturbed.n == (9 if one.against == Arm.BASELINE else 10)


def test_an_arm_alone_is_compared_with_nothing() -> None:
    results = Results(host={}, config={}, series=[one_series(10)])
    assert results.comparisons() == []


def test_document_has_the_published_shape() -> None:
    document = make_results([Scenario.THP], hardware=True).to_document()
    assert list(document) == ["version", "host", "config", "results", "comparisons", "counts"]
    assert document["version"] == 1
    assert "wall - task-clock" in document["config"]["disturbance_rule"]
    for entry in document["results"]:
        assert set(entry) == {"scenario", "arm", "phase", *LISTS}
        assert {len(entry[name]) for name in LISTS} == {10}
    for comparison in document["comparisons"]:
        assert set(comparison) == {
            "scenario",
            "phase",
            "arm",
            "against",
            "ratio",
            "ci95",
            "n",
            "zeros",
            "undisturbed",
        }
        assert set(comparison["undisturbed"]) == {"ratio", "ci95", "n", "zeros"}


def test_counters_that_the_machine_lacks_are_null() -> None:
    entry = make_results([Scenario.THP]).to_document()["results"][0]
    assert entry["instructions"] is None
    assert entry["cache_misses"] is None


def test_document_through_json_and_back_is_the_same() -> None:
    document = make_results().to_document()
    assert Results.from_document(json.loads(to_json(document))).to_document() == document


def test_a_single_repetition_has_a_ratio_without_interval() -> None:
    comparison = make_results([Scenario.THP], repetitions=1).to_document()["comparisons"][0]
    assert comparison["ratio"] == pytest.approx(1 / 35)
    assert comparison["ci95"] is None
    assert comparison["n"] == 1


def test_unknown_keys_are_ignored() -> None:
    document = make_results([Scenario.THP], repetitions=1).to_document()
    document["later"] = document["results"][0]["later"] = 1
    assert len(Results.from_document(document).series) == 16


def _broken(**change: Any) -> dict[str, Any]:
    document = make_results([Scenario.THP], repetitions=2).to_document()
    document["results"][0].update(change)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "not a benchmark document of version 1"),
        ({"version": 2}, "not a benchmark document of version 1"),
        ({"version": 1}, "results"),
        (_broken(arm="fastest"), "fastest"),
        (_broken(wall_ms=[1.0]), "thp/never-reported/populate: wall_ms has 1 entries for 2 repetitions"),
    ],
    ids=["no object", "later version", "no results", "unknown arm", "short list"],
)
def test_what_is_no_document_is_named(document: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Results.from_document(document)


def test_a_missing_list_is_named() -> None:
    document = _broken()
    del document["results"][0]["host_faults"]
    with pytest.raises(UsageError, match="host_faults"):
        Results.from_document(document)


def test_allocator_document() -> None:
    document = make_allocator_results().to_document()
    assert document["version"] == 1
    assert document["host"]["kernel"] == "6.1"
    assert document["order0_alloc_ns"] == [35.0, 36.0, 37.0]
    assert set(document) - {"version", "host"} == {
        "order0_alloc_ns",
        "order0_free_ns",
        "order9_alloc_ns",
        "order9_free_ns",
        "memset_4k_ns",
        "control_share_order0",
        "control_share_order9",
    }
