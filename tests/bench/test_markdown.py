# SPDX-License-Identifier: GPL-2.0-only
"""The Markdown summary: every figure with its spread and n, the cover letter's labelled as such."""

from __future__ import annotations

from hostzero.bench.markdown import to_markdown
from hostzero.bench.names import GENERAL_CAVEATS, Arm, Phase, Scenario
from hostzero.stats import summarize
from tests.bench.synthetic import make_results


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_phase_has_each_arm_with_mean_and_deviation() -> None:
    results = make_results()
    table = rows(to_markdown(results, "2026-01-02"))
    header = table[0]
    populate = next(row for row in table if row[0] == Phase.POPULATE)
    series = results.series_for(results.scenarios()[0], Arm.BASELINE, Phase.POPULATE)
    summary = summarize(series.task_clock_ms)
    cell = populate[header.index(Arm.BASELINE)]
    assert summary.stdev is not None
    mean, _, deviation = cell.partition(" ± ")
    assert abs(float(mean) - summary.mean) <= 0.05
    assert abs(float(deviation) - summary.stdev) <= 0.05


def test_the_ratio_is_the_one_of_the_document() -> None:
    results = make_results()
    scenario = results.scenarios()[0]
    wanted = next(
        one.over_all
        for one in results.comparisons()
        if (one.scenario, one.phase, one.arm, one.against)
        == (scenario, Phase.POPULATE, Arm.OPTIMIZED, Arm.BASELINE)
    )
    table = rows(to_markdown(results, "2026-01-02"))
    populate = next(row for row in table if row[0] == Phase.POPULATE)
    assert wanted.ratio is not None
    assert populate[table[0].index("ratio")].startswith(f"{wanted.ratio:.3f} [")


def test_the_letters_figure_stands_at_populate_only_and_is_labelled() -> None:
    results = make_results()
    assert Scenario.THP in results.scenarios()
    text = to_markdown(results, "2026-01-02")
    table = rows(text)
    column = table[0].index("cover letter (v8)")
    by_phase = {row[0]: row[column] for row in table[1:5]}
    assert "232 ± 20 ms → 51 ± 26 ms" in by_phase[Phase.POPULATE]
    assert all(by_phase[phase] == "not measured" for phase in list(Phase)[1:])
    assert "the cover letter's own" in text


def test_date_machine_and_caveats_are_there() -> None:
    text = to_markdown(make_results(), "2026-01-02")
    assert text.startswith("Measured 2026-01-02. Machine: ")
    for caveat in GENERAL_CAVEATS:
        assert caveat in text
