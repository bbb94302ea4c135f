# SPDX-License-Identifier: GPL-2.0-only
"""The scenarios that count, as pictures: one row of panels each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from hostzero.bench.cover_letter import ORDER0_KNOWN_ZERO
from hostzero.bench.names import SCENARIO_TITLES, Scenario
from hostzero.stats import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hostzero.bench.results import Counts

COLOURS: Final = {"linux": "#D55E00", "zero-aware": "#0072B2", "allocator": "#D55E00", "caller": "#0072B2"}
_STYLES: Final = ("-", "--", ":")
_MARKERS: Final = ("o", "s", "^")
_MIB: Final = 1 << 20


def draw_fragmented(axes: Sequence[Axes], cases: Sequence[Counts]) -> None:
    """Draw the known-zero share of order 0 and order 9 over the measured degree, a panel a workload.

    Points are means over the seeds, bars the standard deviation in both directions; the dashed
    line is the cover letter's figure. Order 9 is drawn once, for Linux's placement.
    """
    workloads = list(dict.fromkeys(str(one.case["workload"]) for one in cases))
    for panel, workload in zip(axes, workloads, strict=False):
        shown = [one for one in cases if one.case["workload"] == workload]
        orders = list(dict.fromkeys(one.case["reporting_order"] for one in shown))
        placements = list(dict.fromkeys(str(one.case["placement"]) for one in shown))
        for place, order in enumerate(orders):
            for placement in placements:
                line = [
                    one
                    for one in shown
                    if (one.case["reporting_order"], one.case["placement"]) == (order, placement)
                ]
                label = f"order 0, {placement}, reported from order {order}"
                _draw_line(
                    panel, line, "order0_share", label, COLOURS[placement], _STYLES[place], _MARKERS[place]
                )
        line = [
            one
            for one in shown
            if (one.case["reporting_order"], one.case["placement"]) == (orders[0], "linux")
        ]
        _draw_line(
            panel,
            line,
            "order9_share",
            f"order 9, linux, reported from order {orders[0]}",
            "#999999",
            "-",
            "D",
        )
        panel.axhline(ORDER0_KNOWN_ZERO * 100, color="#333333", linestyle=(0, (6, 4)), linewidth=1)
        panel.annotate(
            f"the cover letter's {ORDER0_KNOWN_ZERO:.0%} (order 0; degree not given)",
            (0.01, ORDER0_KNOWN_ZERO * 100 - 1),
            xycoords=("axes fraction", "data"),
            va="top",
            fontsize=7.5,
        )
        runs = max(map(len, shown))
        panel.set_title(
            f"{Scenario.FRAGMENTED}, workload {workload} (n={runs} seeds)", loc="left", fontsize=11
        )
        panel.set_xlabel("degree of fragmentation: free memory in blocks below order 9, %", fontsize=9)
        panel.set_ylabel("known zero, % of allocations\nthat wanted zeros (mean ± sd)")
        panel.set_ylim(-3, 106)
        # Below the panel: lines cross wherever there is room inside.
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _draw_line(
    axes: Axes, line: Sequence[Counts], name: str, label: str, colour: str, style: str, marker: str
) -> None:
    points = [one for one in line if one.defined(name)]
    if not points:
        return
    degrees = [summarize([value * 100 for value in one.defined("unusable")]) for one in points]
    shares = [summarize([value * 100 for value in one.defined(name)]) for one in points]
    axes.errorbar(
        [degree.mean for degree in degrees],
        [share.mean for share in shares],
        xerr=[degree.stdev or 0.0 for degree in degrees],
        yerr=[share.stdev or 0.0 for share in shares],
        label=label,
        color=colour,
        linestyle=style,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        capsize=2,
    )


def draw_memcg_limit(axes: Sequence[Axes], cases: Sequence[Counts]) -> None:
    """Draw the bytes zeroed in vain, and the CPU time of the same stretch."""
    names = [f"{one.case['pattern']}\n{one.case['arm']}\n{one.case['zeroing']}" for one in cases]
    colours = [COLOURS[str(one.case["zeroing"])] for one in cases]
    for panel, name, scale, label in (
        (axes[0], "zeroed_in_vain_bytes", _MIB, "zeroed in vain, MiB"),
        (axes[1], "task_clock_ms", 1, "task-clock, ms"),
    ):
        summaries = [summarize([value / scale for value in one.defined(name)]) for one in cases]
        bars = panel.bar(
            range(len(cases)),
            [summary.mean for summary in summaries],
            color=colours,
            yerr=[summary.stdev or 0.0 for summary in summaries],
            error_kw={"linewidth": 0.9, "capsize": 2},
        )
        panel.bar_label(bars, [f"{summary.mean:.1f}" for summary in summaries], padding=2, fontsize=7.5)
        panel.set_xticks(range(len(cases)), names, fontsize=7)
        panel.set_ylabel(f"{label}\n(mean ± sd, n={max(map(len, cases))})")
        panel.margins(y=0.14)
    axes[0].set_title(
        f"{Scenario.MEMCG_LIMIT}: {SCENARIO_TITLES[Scenario.MEMCG_LIMIT]}", loc="left", fontsize=11
    )


DRAWERS: Final[Mapping[Scenario, Callable[[Sequence[Axes], Sequence[Counts]], None]]] = MappingProxyType(
    {Scenario.FRAGMENTED: draw_fragmented, Scenario.MEMCG_LIMIT: draw_memcg_limit}
)
"""What draws each scenario that counts, into a row of two panels."""
