# SPDX-License-Identifier: GPL-2.0-only
"""Made-up results in the shape and size of real ones, the same every time."""

from __future__ import annotations

from collections.abc import Iterable

from hostzero.bench.counters import Sample
from hostzero.bench.names import Arm, Phase, Scenario
from hostzero.bench.results import AllocatorResults, PageCounts, Results

MIB = 1 << 20
MS = 1_000_000

# Milliseconds per phase and arm: populate, populate+touch, populate+fill, churn.
TIMES = {
    Arm.NEVER_REPORTED: (19.0, 19.6, 38.2, 60.0),
    Arm.BASELINE: (35.0, 35.8, 54.5, 66.0),
    Arm.OPTIMIZED: (1.0, 29.6, 34.8, 62.0),
    Arm.NO_ZEROING: (0.8, 28.9, 34.1, 41.0),
}
SKIPPING = (Arm.OPTIMIZED, Arm.NO_ZEROING)
HOST: dict[str, object] = {"kernel": "6.1", "hardware_counters": "not available: the counters stay at zero"}


def make_results(
    scenarios: Iterable[Scenario] = (Scenario.THP, Scenario.SMALL_PAGES, Scenario.BALLOON),
    *,
    repetitions: int = 10,
    hardware: bool = False,
) -> Results:
    """Return results with every arm and phase; repetition 3 of each baseline is disturbed."""
    results = Results(host=dict(HOST), config={"memory": 2 << 30, "size": 256 * MIB})
    for scenario in scenarios:
        slow = 4.0 if scenario == Scenario.SMALL_PAGES else 1.0
        for repetition in range(repetitions):
            for arm, times in TIMES.items():
                for phase, milliseconds in zip(Phase, times, strict=True):
                    _add(results, scenario, arm, phase, milliseconds * slow, repetition, hardware)
    return results


def make_counts(*, repetitions: int = 3) -> Results:
    """Return results of the scenarios that count, with a share that is undefined once."""
    results = Results(host=dict(HOST), config={"memory": 2 << 30, "size": 256 * MIB})
    for repetition in range(repetitions):
        for workload in ("populate", "mixed"):
            for order in (9, 5):
                for step, covered in enumerate((0.0, 0.125, 0.25)):
                    for placement in ("linux", "zero-aware"):
                        case = {
                            "workload": workload,
                            "placement": placement,
                            "reporting_order": order,
                            "covered": covered,
                        }
                        results.counts_for(Scenario.FRAGMENTED, case).add(
                            {
                                "unusable": covered + 0.01 * repetition,
                                "free_2m_before": 1000 - 100 * step,
                                "order0_share": 0.9 - 0.4 * step,
                                "fallback_claims": 1,
                                "fallback_steals": repetition,
                                "free_2m_held": 900 - 100 * step,
                                "order9_share": None if step == 2 else 1.0,
                                "free_2m_after": 999 - 100 * step,
                                "task_clock_ms": 5.0,
                            }
                        )
        for zeroing, wasted in (("allocator", 256), ("caller", 0)):
            results.counts_for(
                Scenario.MEMCG_LIMIT, {"pattern": "sparse", "arm": "baseline", "zeroing": zeroing}
            ).add(
                {
                    "zeroed_in_vain_bytes": wasted * MIB,
                    "guest_zeroed_bytes": (wasted + 1) * MIB,
                    "known_zero_bytes": 0,
                    "failed_charges": 128,
                    "got_bytes": 128 * 4096,
                    "task_clock_ms": 20.0 + repetition,
                }
            )
    return results


def make_allocator_results() -> AllocatorResults:
    """Return allocator results of three repetitions."""
    return AllocatorResults(
        order0_alloc_ns=[35.0, 36.0, 37.0],
        order0_free_ns=[34.0, 34.0, 34.0],
        order9_alloc_ns=[960.0, 970.0, 980.0],
        order9_free_ns=[71.0, 72.0, 73.0],
        memset_4k_ns=[290.0, 293.0, 296.0],
        control_share_order0=[0.08, 0.09, 0.10],
        control_share_order9=[0.004, 0.004, 0.004],
        host=dict(HOST),
    )


def _add(
    results: Results, scenario: Scenario, arm: Arm, phase: Phase, ms: float, repetition: int, hardware: bool
) -> None:
    # The machine drifts by 1 % per repetition, the same for every arm.
    task_clock = round(ms * (1 + repetition / 100) * MS)
    disturbed = arm == Arm.BASELINE and repetition == 3
    skips = arm in SKIPPING
    touched = phase != Phase.POPULATE
    faulted = arm != Arm.NEVER_REPORTED and (touched or not skips)
    page = 4096 if scenario == Scenario.SMALL_PAGES else 2 * MIB
    results.series_for(scenario, arm, phase).add(
        Sample(
            task_clock_ns=task_clock,
            wall_ns=task_clock + (20 * MS if disturbed else 10_000),
            host_faults=256 * MIB // page if faulted else 0,
            instructions=round(ms * 70_000) if hardware else None,
            cache_misses=round(ms * 5_000) if hardware else None,
        ),
        PageCounts(
            guest_zeroed=0 if skips else 256 * MIB,
            known_zero=256 * MIB if arm == Arm.OPTIMIZED else 0,
            host_returned=0 if arm == Arm.NEVER_REPORTED else 2000 * MIB,
            host_faulted=256 * MIB if faulted else 0,
        ),
    )
