# SPDX-License-Identifier: GPL-2.0-only
"""Results as a picture: per scenario, what each phase cost and who zeroed the memory.

Only measured values are drawn. The left panel has the median task-clock of each phase
and arm, with whiskers from the first to the third quartile (one disturbed repetition
would otherwise set the scale; the tables have mean and standard deviation). The right panel has
bytes: zeroed by the guest (solid) and by the host (hatched; the growth of resident
memory) as one stacked bar, and a diamond at the bytes handed out as known to be zero.
The two panels belong together: where a bar on the left is short because nobody has
zeroed anything yet, the bar on the right is missing too.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostzero.bench.names import SCENARIO_TITLES, Arm, Phase, Scenario
from hostzero.bench.plot_counts import DRAWERS
from hostzero.bench.results import Results, Series
from hostzero.document import write_atomically
from hostzero.errors import UsageError
from hostzero.stats import summarize

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour blindness; and by lightness in print.
ARM_COLOURS: Final = {
    Arm.NEVER_REPORTED: "#999999",
    Arm.BASELINE: "#D55E00",
    Arm.OPTIMIZED: "#0072B2",
    Arm.NO_ZEROING: "#F0E442",
}
_EDGE: Final = "#333333"
_HOST_ALPHA: Final = 0.35
_HOST_HATCH: Final = "////"

_GROUP_WIDTH: Final = 0.84
_MIB: Final = 1 << 20


def write_plot(results: Results, path: Path) -> None:
    """Draw `results` into a .png or .svg file, whole or not at all.

    Raises:
        UsageError: there is nothing to draw.
        HostzeroError: the file cannot be written.
    """
    if not results.scenarios() and not results.counts:
        raise UsageError(f"--plot {path}: there are no results to draw")
    import matplotlib as mpl

    image = io.BytesIO()
    kind = path.suffix.lower().lstrip(".")
    # No date and no random names in an SVG: the same results make the same file.
    with mpl.rc_context({"svg.hashsalt": "hostzero"}):
        draw(results).savefig(image, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, image.getvalue())


def draw(results: Results) -> Figure:
    """Return the figure: one row per scenario, time on the left and bytes on the right.

    Below them one row per scenario that counts; see `plot_counts`.
    """
    # A Figure without pyplot has no window, no global state, and always renders with Agg.
    from matplotlib.figure import Figure

    scenarios, counted = results.scenarios(), results.counted_scenarios()
    rows = len(scenarios) + len(counted)
    figure = Figure(figsize=(13, 0.9 + 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    for (time_axes, byte_axes), scenario in zip(panels, scenarios, strict=False):
        _draw_scenario(time_axes, byte_axes, scenario, results.in_scenario(scenario))
    for row, scenario in zip(panels[len(scenarios) :], counted, strict=True):
        DRAWERS[scenario](row, results.counted_in(scenario))
        for axes in row:
            _tidy(axes)
    if scenarios:
        _explain_times(figure, results)
    return figure


def _explain_times(figure: Figure, results: Results) -> None:
    handles = _legend(results)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel(
        "populate never touches the memory: in the arms that skip zeroing, the host's fault and zeroing "
        "are still to come; the touch and fill phases contain them.",
        fontsize=9,
    )


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _draw_scenario(time_axes: Axes, byte_axes: Axes, scenario: Scenario, series: Sequence[Series]) -> None:
    phases = [phase for phase in Phase if any(one.phase == phase for one in series)]
    arms = [arm for arm in Arm if any(one.arm == arm for one in series)]
    width = _GROUP_WIDTH / len(arms)
    for arm_index, arm in enumerate(arms):
        offset = (arm_index - (len(arms) - 1) / 2) * width
        cells = [(phases.index(one.phase) + offset, one) for one in series if one.arm == arm]
        _draw_times(time_axes, arm, cells, width)
        _draw_bytes(byte_axes, arm, cells, width)
    runs = max(len(one) for one in series)
    time_axes.set_title(f"{scenario}: {SCENARIO_TITLES[scenario]}", loc="left", fontsize=11)
    time_axes.set_ylabel(f"task-clock, ms\n(median, quartiles, n={runs})")
    unmeasured = [phase for phase in phases if any(_lacks_host_part(one, phase) for one in series)]
    note = f" (host's part not measured: {', '.join(unmeasured)})" if unmeasured else ""
    byte_axes.set_title(f"who zeroed, in the same phase{note}", loc="left", fontsize=11)
    byte_axes.set_ylabel("MiB (median)")
    for axes in (time_axes, byte_axes):
        axes.set_xticks(range(len(phases)), [str(phase) for phase in phases])
        _tidy(axes)
        axes.margins(y=0.14)
        axes.set_ylim(bottom=0)


def _lacks_host_part(series: Series, phase: Phase) -> bool:
    return series.phase == phase and series.host_faulted_bytes is None


def _draw_times(axes: Axes, arm: Arm, cells: Sequence[tuple[float, Series]], width: float) -> None:
    medians = [summarize(one.task_clock_ms).median for _, one in cells]
    quartiles = [_quartiles(one.task_clock_ms) for _, one in cells]
    bars = axes.bar(
        [x for x, _ in cells],
        medians,
        width * 0.94,
        color=ARM_COLOURS[arm],
        edgecolor=_EDGE,
        linewidth=0.5,
        yerr=[
            [median - low for median, (low, _) in zip(medians, quartiles, strict=True)],
            [high - median for median, (_, high) in zip(medians, quartiles, strict=True)],
        ],
        error_kw={"linewidth": 0.9, "capsize": 2, "ecolor": _EDGE},
    )
    axes.bar_label(bars, [_short(median) for median in medians], padding=2, fontsize=7.5)


def _draw_bytes(axes: Axes, arm: Arm, cells: Sequence[tuple[float, Series]], width: float) -> None:
    colour = ARM_COLOURS[arm]
    for x, one in cells:
        guest, host = _mib(one.guest_zeroed_bytes), _mib(one.host_faulted_bytes)
        axes.bar(x, guest, width * 0.94, color=colour, edgecolor=_EDGE, linewidth=0.5)
        axes.bar(
            x,
            host,
            width * 0.94,
            bottom=guest,
            color=(colour, _HOST_ALPHA),
            hatch=_HOST_HATCH,
            edgecolor=_EDGE,
            linewidth=0.5,
        )
        known = _mib(one.known_zero_bytes)
        if known:
            axes.plot(x, known, "D", markersize=5, markerfacecolor="white", markeredgecolor="black")


def _legend(results: Results) -> list[Artist]:
    # On the left colour tells the arm; on the right colour tells the arm and the filling tells who zeroed.
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    arms = [arm for arm in Arm if any(one.arm == arm for one in results.series)]
    entries: list[Artist] = [
        Patch(facecolor=ARM_COLOURS[arm], edgecolor=_EDGE, label=str(arm)) for arm in arms
    ]
    grey = "#bbbbbb"
    entries += [
        Patch(facecolor=grey, edgecolor=_EDGE, label="right: zeroed by the guest"),
        Patch(facecolor=(grey, _HOST_ALPHA), edgecolor=_EDGE, hatch=_HOST_HATCH, label="zeroed by the host"),
        Line2D(
            [], [], linestyle="", marker="D", markersize=5, markerfacecolor="white", markeredgecolor="black"
        ),
    ]
    entries[-1].set_label("handed out as known zero")
    return entries


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _mib(values: Sequence[int] | None) -> float:
    return summarize(values).median / _MIB if values else 0.0


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
