# SPDX-License-Identifier: GPL-2.0-only
"""What the scenarios that count found: kept in the document, shown as tables, pictures and Markdown."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from hostzero.bench.cover_letter import ORDER0_KNOWN_ZERO
from hostzero.bench.fragment import RECIPE
from hostzero.bench.markdown import to_markdown
from hostzero.bench.names import COUNTED, Scenario
from hostzero.bench.plot import draw
from hostzero.bench.plot_counts import DRAWERS
from hostzero.bench.results import Results
from hostzero.bench.table import print_results
from hostzero.bench.table_counts import CELLS, COLUMNS, KEYS, NOTES
from hostzero.document import to_json
from hostzero.errors import UsageError
from hostzero.render import WIDE
from tests.bench.synthetic import make_counts, make_results


def rendered(results: Results, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_results(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ------------------------------------------------------------------ the document


def test_counts_through_json_and_back_are_the_same() -> None:
    document = make_counts().to_document()
    assert Results.from_document(json.loads(to_json(document))).to_document() == document


def test_a_document_from_before_there_were_counts_has_none() -> None:
    document = make_results([Scenario.THP], repetitions=1).to_document()
    del document["counts"]
    assert Results.from_document(document).counts == []


def test_a_short_list_of_counts_is_named() -> None:
    document = make_counts().to_document()
    document["counts"][0]["values"]["unusable"] = [0.1]
    with pytest.raises(UsageError, match="unusable has 1 entries for 3 repetitions"):
        Results.from_document(document)


def test_one_case_is_one_record() -> None:
    results = make_counts(repetitions=5)
    assert len(results.counts) == 2 * 2 * 3 * 2 + 2
    assert all(len(one) == 5 for one in results.counts)
    assert results.counted_scenarios() == list(COUNTED)
    assert results.scenarios() == []


def test_what_is_undefined_is_left_out_of_a_mean() -> None:
    (last,) = (
        one
        for one in make_counts().counted_in(Scenario.FRAGMENTED)
        if tuple(one.case.values()) == ("populate", "linux", 9, 0.25)
    )
    assert last.values["order9_share"] == [None] * 3
    assert last.defined("order9_share") == []
    assert CELLS[Scenario.FRAGMENTED](last)[6] == "–"


# ------------------------------------------------------------------ tables


@pytest.mark.parametrize("scenario", COUNTED)
def test_every_scenario_has_its_columns_cells_notes_and_picture(scenario: Scenario) -> None:
    (first, *_) = make_counts().counted_in(scenario)
    assert len(CELLS[scenario](first)) == len(COLUMNS[scenario]) > KEYS[scenario] > 0
    assert NOTES[scenario]
    assert scenario in DRAWERS


@pytest.mark.parametrize("width", [80, 100, WIDE, 160])
def test_nothing_is_cut_or_runs_over(width: int) -> None:
    text = rendered(make_counts(), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, WIDE])
def test_every_case_is_a_row_with_its_spread(width: int) -> None:
    text = rendered(make_counts(), width)
    rows = [line for line in text.splitlines() if line.startswith("populate ")]
    assert len(rows) == (24 if width == 80 else 12)
    assert "50.0 ± 0.0" in text  # the share of the middle case
    assert "13.5 ± 1.0" in text  # its degree: 12.5, 13.5 and 14.5 %
    assert "900.0/800.0/899.0" in text
    assert f"{ORDER0_KNOWN_ZERO:.0%}" in text
    assert "256" in text


def test_a_run_that_only_counts_has_no_word_on_time() -> None:
    text = rendered(make_counts(), WIDE)
    assert "What the numbers leave out" not in text


def test_times_and_counts_stand_together() -> None:
    results = make_results([Scenario.THP])
    results.counts = make_counts().counts
    text = rendered(results, WIDE)
    assert "thp: 2 MiB pages from reported blocks" in text
    assert "fragmented: who gets known-zero pages" in text
    assert "What the numbers leave out" in text
    assert len(draw(results).axes) == 3 * 2


# ------------------------------------------------------------------ pictures and Markdown


def test_the_degree_is_the_measured_one_and_the_letters_figure_is_marked() -> None:
    panels = draw(make_counts()).axes
    assert len(panels) == 4
    for panel, workload in zip(panels, ("populate", "mixed"), strict=False):
        assert workload in panel.get_title(loc="left")
        assert "n=3" in panel.get_title(loc="left")
        shares = next(line for line in panel.lines if len(line.get_xdata()) == 3)  # type: ignore[arg-type]
        assert list(shares.get_xdata()) == pytest.approx([1.0, 13.5, 26.0])  # type: ignore[arg-type]
        assert list(shares.get_ydata()) == pytest.approx([90.0, 50.0, 10.0])  # type: ignore[arg-type]
        assert any(list(line.get_ydata()) == [21.0, 21.0] for line in panel.lines)  # type: ignore[arg-type]
        assert any("cover letter's 21%" in text.get_text() for text in panel.texts)
        _, labels = panel.get_legend_handles_labels()
        assert len(labels) == 2 * 2 + 1


def test_the_markdown_has_a_row_for_every_case() -> None:
    text = to_markdown(make_counts(), "2026-01-02")
    assert "Task-clock" not in text
    rows = [line for line in text.splitlines() if line.startswith("| populate |")]
    assert len(rows) == 12
    (header,) = (line for line in text.splitlines() if line.startswith("| workload"))
    assert {row.count("|") for row in rows} == {header.count("|")}
    for note in (*NOTES[Scenario.FRAGMENTED], *RECIPE):
        assert note in text
