# SPDX-License-Identifier: GPL-2.0-only
"""Known values, worked out by hand, and properties of the ratio."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.stats import PairedRatio, paired_ratio, summarize

times = st.floats(min_value=1e-3, max_value=1e6)


def test_summary_of_known_values() -> None:
    """Mean 5, squared deviations 9+1+1+1+0+0+4+16 = 32, over n - 1 = 7."""
    summary = summarize([2, 4, 4, 4, 5, 5, 7, 9])
    assert summary.n == 8
    assert summary.mean == 5
    assert summary.stdev == pytest.approx(math.sqrt(32 / 7))
    assert summary.median == 4.5
    assert (summary.minimum, summary.maximum) == (2, 9)


def test_a_single_value_has_no_deviation() -> None:
    assert summarize([3.5]) == (1, 3.5, None, 3.5, 3.5, 3.5)


def test_nothing_cannot_be_summarized() -> None:
    with pytest.raises(ValueError, match="empty"):
        summarize([])


def test_ratio_of_known_pairs() -> None:
    """Ratios 1/2, 1/4, 1/8: logarithms -1, -2, -3 times ln 2; mean -2, deviation 1; t(2) = 4.3027."""
    ratio = paired_ratio([1, 1, 1], [2, 4, 8])
    half = 4.302652729749464 * math.log(2) / math.sqrt(3)
    assert ratio.ratio == pytest.approx(0.25)
    assert ratio.ci95 == pytest.approx((0.25 * math.exp(-half), 0.25 * math.exp(half)))
    assert (ratio.n, ratio.zeros) == (3, 0)


def test_equal_ratios_leave_no_interval_to_speak_of() -> None:
    """Drift that falls on both arms cancels, whatever its size."""
    ratio = paired_ratio([1, 10, 100], [2, 20, 200])
    assert ratio.ratio == pytest.approx(0.5)
    assert ratio.ci95 == pytest.approx((0.5, 0.5))


def test_one_pair_has_a_ratio_and_no_interval() -> None:
    assert paired_ratio([1], [4]) == PairedRatio(0.25, None, 1, 0)


def test_pairs_with_a_zero_are_left_out_and_counted() -> None:
    assert paired_ratio([0, 1, 3], [5, 0, 6]) == PairedRatio(0.5, None, 1, 2)


@pytest.mark.parametrize(("one", "other", "zeros"), [([], [], 0), ([0, 0], [0, 1], 2)])
def test_no_usable_pair_gives_no_ratio(one: list[float], other: list[float], zeros: int) -> None:
    assert paired_ratio(one, other) == PairedRatio(None, None, 0, zeros)


def test_series_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        paired_ratio([1, 2], [1])


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_value_that_cannot_be_measured_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        paired_ratio([1.0, bad], [1.0, 1.0])


@given(st.lists(st.tuples(times, times), min_size=2, max_size=20))
def test_swapping_the_arms_inverts_ratio_and_interval(pairs: list[tuple[float, float]]) -> None:
    there = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    back = paired_ratio([b for _, b in pairs], [a for a, _ in pairs])
    assert there.ratio is not None
    assert back.ratio is not None
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.ci95 is not None
    assert back.ci95 is not None
    assert math.log(there.ci95[0]) == pytest.approx(-math.log(back.ci95[1]), abs=1e-6)
    assert there.ci95[0] <= there.ratio * (1 + 1e-12)
    assert there.ratio <= there.ci95[1] * (1 + 1e-12)
