# SPDX-License-Identifier: GPL-2.0-only
"""Plots: the right kind of file, whole or not at all, and bars of the measured height."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from hostzero.bench.names import Arm, Phase, Scenario
from hostzero.bench.plot import ARM_COLOURS, draw, write_plot
from hostzero.bench.results import Results
from hostzero.errors import UsageError
from tests.bench.synthetic import make_results


@pytest.mark.parametrize(
    ("name", "magic"), [("out.png", b"\x89PNG\r\n\x1a\n"), ("OUT.SVG", b"<?xml"), ("out.svg", b"<?xml")]
)
def test_the_file_is_what_its_name_says(tmp_path: Path, name: str, magic: bytes) -> None:
    write_plot(make_results([Scenario.THP], repetitions=2), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(magic)
    assert ("<svg" in content.decode(errors="replace")) == name.lower().endswith("svg")
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results to draw"):
        write_plot(Results(host={}, config={}), tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def heights(results: Results, panel: int) -> list[float]:
    """Return the heights of all bars of a panel (0: time, 1: bytes), in the order they were drawn."""
    patches = draw(results).axes[panel].patches
    return [patch.get_height() for patch in patches if isinstance(patch, Rectangle)]


def test_time_bars_are_medians_arm_by_arm() -> None:
    bars = heights(make_results([Scenario.THP], repetitions=1), 0)
    assert bars == pytest.approx(
        [19.0, 19.6, 38.2, 60.0, 35.0, 35.8, 54.5, 66.0, 1.0, 29.6, 34.8, 62.0, 0.8, 28.9, 34.1, 41.0]
    )


def test_byte_bars_are_guest_then_host() -> None:
    """Baseline zeroes everything twice; optimized leaves populate empty and the rest to the host."""
    results = make_results([Scenario.THP], repetitions=3)
    results.series = [one for one in results.series if one.arm in {Arm.BASELINE, Arm.OPTIMIZED}]
    assert heights(results, 1) == [256, 256] * 4 + [0, 0] + [0, 256] * 3


def test_a_diamond_marks_what_was_known_zero_and_only_that() -> None:
    axes = draw(make_results([Scenario.THP], repetitions=2)).axes[1]
    assert [list(map(float, line.get_ydata())) for line in axes.lines] == [[256.0]] * len(Phase)  # type: ignore[arg-type]


def test_bytes_of_the_host_that_were_not_measured_are_named() -> None:
    results = make_results([Scenario.THP], repetitions=2)
    assert "not measured" not in draw(results).axes[1].get_title(loc="left")
    for one in results.series:
        one.host_faulted_bytes = None
    assert "not measured" in draw(results).axes[1].get_title(loc="left")


def test_every_scenario_has_a_row_of_its_own() -> None:
    titles = [axes.get_title(loc="left") for axes in draw(make_results(repetitions=2)).axes[::2]]
    assert [title.split(":")[0] for title in titles] == ["thp", "4k", "balloon"]


def test_every_arm_has_a_colour_of_its_own() -> None:
    assert len({ARM_COLOURS[arm] for arm in Arm}) == len(Arm)


def test_the_same_results_make_the_same_svg(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        write_plot(make_results([Scenario.THP], repetitions=2), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
