# SPDX-License-Identifier: GPL-2.0-only
"""What the scenarios that count found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from hostzero.bench.cover_letter import ORDER0_KNOWN_ZERO
from hostzero.bench.fragment import RECIPE
from hostzero.bench.names import SCENARIO_TITLES, Scenario
from hostzero.render import NONE, WIDE, new_table, print_note, print_table
from hostzero.stats import summarize

if TYPE_CHECKING:
    from rich.console import Console

    from hostzero.bench.results import Counts, Results

_MIB: Final = 1 << 20

FRAGMENTED_NOTES: Final = (
    (
        "unusable: the share of free memory in blocks below order 9, after reporting (the kernel's unusable "
        "free space index for order 9). covered: the share of the guest that the recipe's churn went through."
    ),
    (
        "known zero: of the allocations that wanted zeros, the share served from known-zero pages. The "
        f"letter gives {ORDER0_KNOWN_ZERO:.0%} for order 0, of a guest whose fragmentation it does not name."
    ),
    (
        "fallbacks: pageblocks claimed and pages stolen from other migrate types while the small pages were "
        "taken. free 2 MiB: pages of that size in free blocks before, with the small pages held, and after "
        "everything of the workload was freed."
    ),
    (
        "populate: one program, all pages want zeros. mixed: half of the pages do not. Both take --size in "
        "single pages; then a program takes --size in 2 MiB pages."
    ),
    "order: the smallest block that is reported (page_reporting_order); Linux's default is 9.",
)

MEMCG_NOTES: Final = (
    (
        "zeroed in vain: zeroed, then freed because the charge to the cgroup failed. known zero: what the "
        "guest would have zeroed and did not have to."
    ),
    (
        "one-process: populates twice its limit and is refused once: two failed charges, of the 2 MiB "
        "folio and then of the 4 KiB page. sparse: with less than 2 MiB left, "
        "touches one page in each of --size / 2 MiB ranges; each fault tries a 2 MiB folio first. The "
        "pattern meets the limit as often as can be; it is not a typical one."
    ),
    (
        "zeroing: by the allocator before the charge (the series), or by the fault handler after it, but "
        "for order 0, which Linux zeroes before the charge too."
    ),
)


def print_counts(results: Results, console: Console) -> None:
    """Print every scenario that counts; a narrow console gets its columns as two tables."""
    for scenario in results.counted_scenarios():
        title = f"{scenario}: {SCENARIO_TITLES[scenario]}"
        names, keys = COLUMNS[scenario], KEYS[scenario]
        values = list(range(keys, len(names)))
        half = len(values) // 2
        parts = [values] if console.width >= WIDE else [[*values[:half], values[-1]], values[half:]]
        for part in parts:
            _print_part(console, title, results.counted_in(scenario), [*range(keys), *part])
        for note in NOTES[scenario]:
            print_note(console, note)
        console.print()


def _print_part(console: Console, title: str, cases: Sequence[Counts], columns: Sequence[int]) -> None:
    scenario = cases[0].scenario
    table = new_table(*(COLUMNS[scenario][column] for column in columns), left=1)
    for counts in cases:
        cells = CELLS[scenario](counts)
        table.add_row(*(cells[column] for column in columns))
    print_table(console, title, table)


def share(counts: Counts, name: str) -> str:
    """Return "mean ± standard deviation" of a share in per cent, or a dash where it is undefined."""
    values = counts.defined(name)
    if not values:
        return NONE
    summary = summarize([value * 100 for value in values])
    return f"{summary.mean:.1f}" + ("" if summary.stdev is None else f" ± {summary.stdev:.1f}")


def mean(counts: Counts, name: str, *, scale: float = 1.0, digits: int = 1) -> str:
    """Return "mean ± standard deviation" of a count; a whole number without a spread stands alone."""
    values = [value / scale for value in counts.defined(name)]
    if not values:
        return NONE
    summary = summarize(values)
    if not summary.stdev:
        return f"{summary.mean:.0f}" if summary.mean == round(summary.mean) else f"{summary.mean:.{digits}f}"
    return f"{summary.mean:.{digits}f} ± {summary.stdev:.{digits}f}"


def fragmented_cells(counts: Counts) -> tuple[str, ...]:
    """Return one case of the fragmented scenario as cells, in the order of `FRAGMENTED_COLUMNS`."""
    case = counts.case
    fallbacks = [
        claims + steals
        for claims, steals in zip(
            counts.defined("fallback_claims"), counts.defined("fallback_steals"), strict=True
        )
    ]
    return (
        f"{case['workload']}",
        f"{case['reporting_order']}",
        f"{float(case['covered']) * 100:.1f}",
        share(counts, "unusable"),
        f"{case['placement']}",
        share(counts, "order0_share"),
        share(counts, "order9_share"),
        f"{summarize(fallbacks).mean:.1f}",
        "/".join(f"{summarize(counts.defined(f'free_2m_{when}')).mean:.1f}" for when in _WHEN),
        f"{len(counts)}",
    )


FRAGMENTED_COLUMNS: Final = (
    "workload",
    "order",
    "covered\n%",
    "unusable\n%",
    "placement",
    "order 0\nknown\nzero %",
    "order 9\nknown\nzero %",
    "fall-\nbacks",
    "free 2 MiB\nbefore/held/after",
    "n",
)
_WHEN: Final = ("before", "held", "after")


def memcg_cells(counts: Counts) -> tuple[str, ...]:
    """Return one case of the memcg-limit scenario as cells, in the order of `MEMCG_COLUMNS`."""
    return (
        f"{counts.case['pattern']}",
        f"{counts.case['arm']}",
        f"{counts.case['zeroing']}",
        mean(counts, "zeroed_in_vain_bytes", scale=_MIB),
        mean(counts, "guest_zeroed_bytes", scale=_MIB),
        mean(counts, "known_zero_bytes", scale=_MIB),
        mean(counts, "got_bytes", scale=_MIB),
        mean(counts, "failed_charges"),
        mean(counts, "task_clock_ms", digits=2),
        f"{len(counts)}",
    )


MEMCG_COLUMNS: Final = (
    "pattern",
    "arm",
    "zeroing",
    "in vain\nMiB",
    "zeroed\nMiB",
    "known zero\nMiB",
    "got\nMiB",
    "failed\ncharges",
    "task-clock ms\nmean ± sd",
    "n",
)

COLUMNS: Final[Mapping[Scenario, tuple[str, ...]]] = MappingProxyType(
    {Scenario.FRAGMENTED: FRAGMENTED_COLUMNS, Scenario.MEMCG_LIMIT: MEMCG_COLUMNS}
)
CELLS: Final[Mapping[Scenario, Callable[[Counts], tuple[str, ...]]]] = MappingProxyType(
    {Scenario.FRAGMENTED: fragmented_cells, Scenario.MEMCG_LIMIT: memcg_cells}
)
KEYS: Final[Mapping[Scenario, int]] = MappingProxyType({Scenario.FRAGMENTED: 5, Scenario.MEMCG_LIMIT: 3})
"""How many columns name the case."""

STEPS: Final[Mapping[Scenario, Sequence[str]]] = MappingProxyType({Scenario.FRAGMENTED: RECIPE})
"""What is done to a guest before it is asked, where that takes explaining."""

NOTES: Final[Mapping[Scenario, Sequence[str]]] = MappingProxyType(
    {Scenario.FRAGMENTED: FRAGMENTED_NOTES, Scenario.MEMCG_LIMIT: MEMCG_NOTES}
)
