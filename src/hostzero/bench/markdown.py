# SPDX-License-Identifier: GPL-2.0-only
"""A run's summary as Markdown: what a README quotes, made by the run itself.

Every figure stands with its spread and n; the tables of `table` and the JSON document
have everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from hostzero.bench.cover_letter import FIGURES, SETTING
from hostzero.bench.names import ARM_MEANINGS, GENERAL_CAVEATS, PHASE_CAVEATS, SCENARIO_TITLES, Arm, Phase
from hostzero.bench.table_counts import CELLS, COLUMNS, KEYS, NOTES, STEPS
from hostzero.host import machine_line
from hostzero.stats import PairedRatio, summarize
from hostzero.units import format_size

if TYPE_CHECKING:
    from hostzero.bench.names import Scenario
    from hostzero.bench.results import Results, Series

_ARMS: Final = (Arm.NEVER_REPORTED, Arm.BASELINE, Arm.OPTIMIZED, Arm.NO_ZEROING)


def to_markdown(results: Results, date: str) -> str:
    """Return the summary of a run that was made on `date`."""
    return "\n".join(_lines(results, date)) + "\n"


def _lines(results: Results, date: str) -> Iterator[str]:
    counters = results.host.get("hardware_counters")
    yield f"Measured {date}. Machine: {machine_line(results.host)}; hardware counters: {counters}."
    if results.scenarios():
        yield from _times(results)
    for scenario in results.counted_scenarios():
        yield ""
        yield from _counts_table(results, scenario)


def _times(results: Results) -> Iterator[str]:
    yield ""
    yield (
        "Task-clock in milliseconds, mean ± standard deviation; n and, in brackets, how many repetitions "
        "were disturbed. The ratio is optimized over baseline, paired by repetition, with its 95 % interval."
    )
    for scenario in results.scenarios():
        yield ""
        yield from _table(results, scenario)
    yield ""
    for arm in _ARMS:
        yield f"- **{arm}**: {ARM_MEANINGS[arm]}."
    for phase in Phase:
        yield f"- **{phase}** {PHASE_CAVEATS[phase]}"
    for caveat in GENERAL_CAVEATS:
        yield f"- {caveat}"


def _table(results: Results, scenario: Scenario) -> Iterator[str]:
    config = results.config
    letter = FIGURES.get(scenario)
    cells = {(series.phase, series.arm): series for series in results.in_scenario(scenario)}
    ratios = {
        comparison.phase: comparison.over_all
        for comparison in results.comparisons()
        if (comparison.scenario, comparison.arm, comparison.against)
        == (scenario, Arm.OPTIMIZED, Arm.BASELINE)
    }
    sizes = f"{_size(config, 'size')} of a {_size(config, 'memory')} guest, {config.get('backing')} memory"
    yield f"**{scenario}**: {SCENARIO_TITLES[scenario]}; {sizes}"
    yield ""
    yield "| phase | " + " | ".join(_ARMS) + " | ratio | n |" + (" cover letter (v8) |" if letter else "")
    yield "|---|" + "--:|" * (len(_ARMS) + 2) + ("---|" if letter else "")
    for phase in Phase:
        row = [cells.get((phase, arm)) for arm in _ARMS]
        line = f"| {phase} | " + " | ".join(_milliseconds(series) for series in row)
        line += f" | {_ratio(ratios.get(phase))} | {_counts(row)} |"
        if letter:
            clock = letter[0]
            figure = f"{clock.baseline} → {clock.optimized} ({clock.change})"
            line += f" {figure} |" if phase is Phase.POPULATE else " not measured |"
        yield line
    if letter:
        yield ""
        yield f"The last column is the cover letter's own: {SETTING}."


def _counts_table(results: Results, scenario: Scenario) -> Iterator[str]:
    config, columns, keys = results.config, COLUMNS[scenario], KEYS[scenario]
    sizes = f"{_size(config, 'size')} of a {_size(config, 'memory')} guest"
    yield f"**{scenario}**: {SCENARIO_TITLES[scenario]}; {sizes}"
    yield ""
    yield (
        "| "
        + " | ".join(
            " ".join(column.split()) for column in (name.replace("fall-\n", "fall") for name in columns)
        )
        + " |"
    )
    yield "|" + "---|" * keys + "--:|" * (len(columns) - keys)
    for counts in results.counted_in(scenario):
        yield "| " + " | ".join(CELLS[scenario](counts)) + " |"
    yield ""
    for note in NOTES[scenario]:
        yield f"- {note}"
    steps = STEPS.get(scenario, ())
    if steps:
        yield ""
        yield "The guest, every choice drawn from the seed of the repetition:"
        yield ""
    for number, step in enumerate(steps, start=1):
        yield f"{number}. {step}"


def _size(config: Mapping[str, object], name: str) -> str:
    value = config.get(name)
    return format_size(value) if isinstance(value, int) else "?"


def _milliseconds(series: Series | None) -> str:
    if series is None or not len(series):
        return "–"
    summary = summarize(series.task_clock_ms)
    digits = 2 if summary.mean < 10 else 1
    spread = "" if summary.stdev is None else f" ± {summary.stdev:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}"


def _ratio(ratio: PairedRatio | None) -> str:
    if ratio is None or ratio.ratio is None:
        return "–"
    if ratio.ci95 is None:
        return f"{ratio.ratio:.3f}"
    return f"{ratio.ratio:.3f} [{ratio.ci95[0]:.3f}, {ratio.ci95[1]:.3f}]"


def _counts(row: list[Series | None]) -> str:
    present = [series for series in row if series is not None]
    repetitions = max((len(series) for series in present), default=0)
    disturbed = sum(sum(series.disturbed) for series in present)
    return f"{repetitions} ({disturbed} of {sum(len(series) for series in present)})"
