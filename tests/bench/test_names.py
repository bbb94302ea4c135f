# SPDX-License-Identifier: GPL-2.0-only
"""Every name has its explanation, and the JSON document's words are what they were."""

from __future__ import annotations

from hostzero.bench.names import (
    ARM_MEANINGS,
    COMPARISONS,
    COUNTED,
    PHASE_CAVEATS,
    SCENARIO_TITLES,
    TIMED,
    Arm,
    Phase,
    Scenario,
)


def test_every_name_is_explained() -> None:
    assert set(SCENARIO_TITLES) == set(Scenario)
    assert set(ARM_MEANINGS) == set(Arm)
    assert set(PHASE_CAVEATS) == set(Phase)


def test_every_scenario_either_times_or_counts() -> None:
    assert (*TIMED, *COUNTED) == tuple(Scenario)


def test_the_words_of_version_1() -> None:
    """These stand in documents that people keep: changing one raises the version."""
    assert list(map(str, Scenario)) == [
        "thp",
        "4k",
        "balloon",
        "hugetlb",
        "hugetlb-reserved",
        "fragmented",
        "memcg-limit",
    ]
    assert list(map(str, Arm)) == ["never-reported", "baseline", "optimized", "no-zeroing"]
    assert list(map(str, Phase)) == ["populate", "populate+touch", "populate+fill", "churn"]


def test_the_optimized_arm_is_also_set_against_never_reporting() -> None:
    assert COMPARISONS == (
        ("optimized", "baseline"),
        ("optimized", "never-reported"),
        ("no-zeroing", "baseline"),
    )
