# SPDX-License-Identifier: GPL-2.0-only
"""Results as tables on a terminal or in a file, with what each number leaves out.

A terminal of `WIDE` columns gets one table per scenario; a narrower one gets the same
columns as two, time and bytes, so that no cell is folded at 80.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from hostzero.bench.cover_letter import FIGURES, SETTING
from hostzero.bench.disturbance import RULE
from hostzero.bench.names import (
    ARM_MEANINGS,
    GENERAL_CAVEATS,
    PHASE_CAVEATS,
    SCENARIO_TITLES,
    Arm,
    Phase,
    Scenario,
)
from hostzero.bench.results import AllocatorResults, Comparison, Results, Series
from hostzero.bench.table_counts import print_counts
from hostzero.render import (
    NONE,
    NOT_AVAILABLE,
    WIDE,
    new_table,
    percent,
    print_note,
    print_table,
)
from hostzero.stats import PairedRatio, summarize


class Column(NamedTuple):
    """One column of a scenario's table."""

    title: str
    cell: Callable[[Series], str]


_MEAN = Column("task-clock ms\nmean ± sd", lambda series: mean_and_stdev(series.task_clock_ms))
_MEDIAN = Column("median\nms", lambda series: milliseconds(summarize(series.task_clock_ms).median))
_WALL = Column("wall ms\nmedian", lambda series: milliseconds(summarize(series.wall_ms).median))
_FAULTS = Column("host\nfaults", lambda series: f"{summarize(series.host_faults).median:.0f}")
_FAULTED = Column("host\nzeroed\nMiB", lambda series: mebibytes(series.host_faulted_bytes))
_ZEROED = Column("guest\nzeroed\nMiB", lambda series: mebibytes(series.guest_zeroed_bytes))
_KNOWN = Column("known\nzero\nMiB", lambda series: mebibytes(series.known_zero_bytes))
_RETURNED = Column("returned\nto host\nMiB", lambda series: mebibytes(series.host_returned_bytes))
_COUNT = Column("n (dis-\nturbed)", lambda series: f"{len(series)} ({sum(series.disturbed)})")

_TIME_COLUMNS: Final = (_MEAN, _MEDIAN, _WALL, _COUNT)
_BYTE_COLUMNS: Final = (_FAULTS, _FAULTED, _ZEROED, _KNOWN, _RETURNED)
_WIDE_COLUMNS: Final = (_MEAN, _MEDIAN, _WALL, *_BYTE_COLUMNS, _COUNT)
_HARDWARE_COLUMNS: Final = (
    Column("instructions\nmean ± sd", lambda series: count_and_stdev(series.instructions)),
    Column("cache misses\nmean ± sd", lambda series: count_and_stdev(series.cache_misses)),
)


def print_results(results: Results, console: Console) -> None:
    """Print every scenario, the comparisons, the cover letter's figures and the caveats."""
    for scenario in results.scenarios():
        _print_scenario(results, scenario, console)
    print_counts(results, console)
    if results.scenarios() or not results.counts:
        _print_notes(results, console)


def print_allocator(results: AllocatorResults, console: Console) -> None:
    """Print what the allocator alone costs."""
    table = new_table("operation", "mean ± sd", "median", "least", "n")
    labels = {
        "order0_alloc_ns": "allocate order 0, ns",
        "order0_free_ns": "free order 0, ns",
        "order9_alloc_ns": "allocate order 9, ns",
        "order9_free_ns": "free order 9, ns",
        "memset_4k_ns": "memset of 4 KiB, ns",
        "control_share_order0": "control share, order 0",
        "control_share_order9": "control share, order 9",
    }
    for name, values in results.columns().items():
        if not values:
            table.add_row(labels[name], *[NONE] * 3, "0")
            continue
        summary = summarize(values)
        show = percent if name.startswith("control_share") else plain
        spread = "" if summary.stdev is None else f" ± {show(summary.stdev)}"
        table.add_row(
            labels[name],
            f"{show(summary.mean)}{spread}",
            show(summary.median),
            show(summary.minimum),
            str(summary.n),
        )
    print_table(console, "The allocator alone, in compiled loops", table)
    print_note(
        console,
        "Control share: the part of populating memory that is not zeroing (finding, splitting and marking "
        "pages). Calls from Python cost more: these loops are compiled.",
    )


def milliseconds(value: float) -> str:
    """Return a time with as many decimals as three digits leave."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def plain(value: float) -> str:
    """Return a number with one decimal below a hundred and none above."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mean_and_stdev(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" in milliseconds; a single value has no deviation."""
    summary = summarize(values)
    if summary.stdev is None:
        return milliseconds(summary.mean)
    return f"{milliseconds(summary.mean)} ± {milliseconds(summary.stdev)}"


def count_and_stdev(values: Sequence[int] | None) -> str:
    """Return "mean ± standard deviation" of counts, in thousands or millions."""
    if not values:
        return NOT_AVAILABLE
    summary = summarize(values)
    return _count(summary.mean) + ("" if summary.stdev is None else f" ± {_count(summary.stdev)}")


def mebibytes(values: Sequence[int] | None) -> str:
    """Return the median of byte counts in MiB, or a dash where they were not measured."""
    if not values:
        return NONE
    median = summarize(values).median / (1 << 20)
    return f"{median:.0f}" if median == round(median) else f"{median:.1f}"


def ratio_text(ratio: PairedRatio) -> str:
    """Return "ratio [low, high]", as much of it as there is."""
    if ratio.ratio is None:
        return NONE
    interval = "" if ratio.ci95 is None else f" [{_ratio(ratio.ci95[0])}, {_ratio(ratio.ci95[1])}]"
    return f"{_ratio(ratio.ratio)}{interval}"


def _print_scenario(results: Results, scenario: Scenario, console: Console) -> None:
    series = results.in_scenario(scenario)
    wide = console.width >= WIDE
    title = f"{scenario}: {SCENARIO_TITLES[scenario]}"
    if wide:
        print_table(console, title, _series_table(series, _WIDE_COLUMNS))
    else:
        print_table(console, f"{title}: time", _series_table(series, _TIME_COLUMNS))
        print_table(console, f"{title}: who zeroed", _series_table(series, _BYTE_COLUMNS))
    if any(one.instructions or one.cache_misses for one in series):
        print_table(console, f"{scenario}: hardware counts", _series_table(series, _HARDWARE_COLUMNS))
    comparisons = [one for one in results.comparisons() if one.scenario == scenario]
    if comparisons:
        title = f"{scenario}: task-clock of one arm over another, paired by repetition (letter: v8's own)"
        print_table(console, title, _comparison_table(comparisons, wide=wide))
    if scenario in FIGURES:
        title = f"{scenario}: the cover letter's own figures (v8), not measured here"
        print_table(console, title, _cover_letter_table(scenario))
        print_note(console, SETTING)
        console.print()


def _series_table(series: Iterable[Series], columns: Sequence[Column]) -> Table:
    table = new_table("phase", "arm", *(column.title for column in columns))
    table.columns[1].justify = "left"
    before: Phase | None = None
    for one in series:
        if before is not None and one.phase != before:
            table.add_section()
        phase = "" if one.phase == before else str(one.phase)
        table.add_row(phase, str(one.arm), *(column.cell(one) for column in columns))
        before = one.phase
    return table


def _comparison_table(comparisons: Iterable[Comparison], *, wide: bool) -> Table:
    extra = ["undisturbed pairs only", "n", "letter"] if wide else []
    table = new_table("phase", "arms", "ratio [95 % interval]", "change", "n", *extra)
    table.columns[1].justify = "left"
    before: Phase | None = None
    for one in comparisons:
        if before is not None and one.phase != before:
            table.add_section()
        table.add_row(
            "" if one.phase == before else str(one.phase),
            f"{one.arm} / {one.against}",
            ratio_text(one.over_all),
            _change(one.over_all),
            str(one.over_all.n),
            *([ratio_text(one.undisturbed), str(one.undisturbed.n), _letters_change(one)] if wide else []),
        )
        before = one.phase
    return table


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _change(ratio: PairedRatio) -> str:
    return NONE if ratio.ratio is None else f"{(ratio.ratio - 1) * 100:+.0f} %"


def _letters_change(one: Comparison) -> str:
    # The letter measured one cell of this table; its figures in full stand below it.
    measured = (Phase.POPULATE, Arm.OPTIMIZED, Arm.BASELINE)
    if one.scenario not in FIGURES or (one.phase, one.arm, one.against) != measured:
        return ""
    return FIGURES[one.scenario][0].change


def _cover_letter_table(scenario: Scenario) -> Table:
    table = new_table("populate", "baseline", "optimized", "change")
    for figure in FIGURES[scenario]:
        table.add_row(*figure)
    return table


def _print_notes(results: Results, console: Console) -> None:
    series = [one for scenario in results.scenarios() for one in results.in_scenario(scenario)]
    console.print("What the numbers leave out", style="bold")
    for phase in Phase:
        if any(one.phase == phase for one in series):
            print_note(console, f"{phase}: {PHASE_CAVEATS[phase]}")
    for caveat in GENERAL_CAVEATS:
        print_note(console, caveat)
    console.print("Arms", style="bold")
    for arm in ARM_MEANINGS:
        if any(one.arm == arm for one in series):
            print_note(console, f"{arm}: {ARM_MEANINGS[arm]}")
    console.print("Columns", style="bold")
    print_note(console, f"disturbed: {RULE}")
    print_note(
        console,
        "host zeroed: growth of the guest's resident memory in the phase, all of it zeroed by the host",
    )
    print_note(console, "returned: given to the host by reporting or the balloon, before the phase")
    if not any(one.instructions or one.cache_misses for one in series):
        print_note(console, f"instructions, cache-misses: {_why_no_counts(results)}")
    if results.host.get("outer_reporting_order") is not None:
        print_note(
            console,
            "This machine is itself a guest that reports free pages to its host: memory that lay discarded "
            "for a second or more is slow to come back, so discard and touch are kept close together.",
        )


def _why_no_counts(results: Results) -> str:
    reason = str(results.host.get("hardware_counters", NOT_AVAILABLE))
    return reason if reason.startswith(NOT_AVAILABLE) else NOT_AVAILABLE


def _count(value: float) -> str:
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if value >= size:
            scaled = value / size
            return (
                f"{scaled:.2f}{unit}"
                if scaled < 10
                else f"{scaled:.1f}{unit}"
                if scaled < 100
                else f"{scaled:.0f}{unit}"
            )
    return f"{value:.0f}"
