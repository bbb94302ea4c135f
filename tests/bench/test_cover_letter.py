# SPDX-License-Identifier: GPL-2.0-only
"""The cover letter's figures agree with themselves, which a slip in copying would break."""

from __future__ import annotations

import pytest

from hostzero.bench.cover_letter import FIGURES, Figure

UNITS = {"K": 1e3, "M": 1e6}


def mean(cell: str) -> float:
    number = cell.partition(" ")[0]
    return float(number.rstrip("KM")) * UNITS.get(number[-1], 1)


@pytest.mark.parametrize("figure", [figure for figures in FIGURES.values() for figure in figures])
def test_the_change_follows_from_the_means(figure: Figure) -> None:
    change = (mean(figure.optimized) / mean(figure.baseline) - 1) * 100
    assert f"{change:+.0f} %" == figure.change
