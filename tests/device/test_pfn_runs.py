# SPDX-License-Identifier: GPL-2.0-only
"""PFNs become sorted runs, and verdicts become a bitmap: each against a slow twin."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device.pfn_runs import PfnRun, descending_runs, join_runs, mark_runs, sort_pfns, zero_bitmap

# Small numbers collide and adjoin; the large ones are what a hostile guest writes.
PFNS = st.lists(st.one_of(st.integers(0, 40), st.integers(0xFFFF_FFF0, 0xFFFF_FFFF)), max_size=60)


def _array(pfns: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(pfns, dtype=np.int64)


@given(PFNS)
def test_sorted_without_duplicates_and_none_lost(pfns: list[int]) -> None:
    request = sort_pfns(_array(pfns))
    assert request.unique.tolist() == sorted(set(pfns))
    assert [int(request.unique[position]) for position in request.position] == pfns


@given(PFNS)
def test_runs_hold_exactly_the_pfns(pfns: list[int]) -> None:
    runs = join_runs(sort_pfns(_array(pfns)).unique)
    assert [pfn for run in runs for pfn in range(run.first, run.end)] == sorted(set(pfns))


@given(PFNS)
def test_runs_are_as_few_as_possible(pfns: list[int]) -> None:
    runs = join_runs(sort_pfns(_array(pfns)).unique)
    assert all(run.pages > 0 for run in runs)
    assert all(below.end < above.first for below, above in itertools.pairwise(runs))


def test_runs_of_nothing_are_none() -> None:
    assert join_runs(_array([])) == []


@given(PFNS, st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=5))
def test_marked_are_those_in_a_run(pfns: list[int], spans: list[tuple[int, int]]) -> None:
    unique = sort_pfns(_array(pfns)).unique
    inside = {pfn for first, pages in spans for pfn in range(first, first + pages)}
    mask = mark_runs(unique, [PfnRun(*span) for span in spans])
    assert mask.tolist() == [pfn in inside for pfn in unique.tolist()]


@given(PFNS, st.sets(st.integers(0, 40)))
def test_bitmap_equals_its_slow_twin(pfns: list[int], zero: set[int]) -> None:
    """Bit n is in byte n // 8 and has the value 1 << n % 8, one bit after the other."""
    request = sort_pfns(_array(pfns))
    verdicts = np.array([pfn in zero for pfn in request.unique.tolist()], dtype=np.bool_)
    expected = bytearray((len(pfns) + 7) // 8)
    for n, pfn in enumerate(pfns):
        if pfn in zero:
            expected[n // 8] |= 1 << n % 8
    assert zero_bitmap(request, verdicts) == bytes(expected)


@given(PFNS)
def test_descending_pfns_make_the_same_runs_and_others_make_none(pfns: list[int]) -> None:
    descending = sorted(set(pfns), reverse=True)
    assert descending_runs(descending) == join_runs(sort_pfns(_array(descending)).unique)
    if pfns != descending:
        assert descending_runs(pfns) is None
