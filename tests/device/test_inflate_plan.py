# SPDX-License-Identifier: GPL-2.0-only
"""Plans of inflate requests against a slow twin that goes page by page over plain sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device.byte_ranges import ByteRanges
from hostzero.device.geometry import RamSpan
from hostzero.device.inflate_plan import InflatePlan, SkippedPages, plain_discards, plan_inflate
from hostzero.device.partial_pages import PartialPages
from hostzero.device.pfn_runs import PfnRun, sort_pfns
from hostzero.units import PAGE_SIZE

# 4 KiB pages at 2..9, host pages of four from 17 on (the last one cut), host pages of two at 40.
SPANS = (RamSpan(2, 10), RamSpan(16, 31, sub_pages=4, phase=1), RamSpan(40, 44, sub_pages=2))
REQUESTS = st.lists(st.integers(0, 46), min_size=1, max_size=40)
WRITES = st.lists(
    st.tuples(st.integers(0, 46 * PAGE_SIZE), st.sampled_from([1, 8, PAGE_SIZE, PAGE_SIZE + 1])), max_size=3
)
HISTORY = st.lists(st.tuples(REQUESTS, WRITES), min_size=1, max_size=4)


def _plan(pfns: list[int], writes: list[tuple[int, int]], partial: PartialPages) -> InflatePlan:
    return plan_inflate(sort_pfns(np.array(pfns, dtype=np.int64)).unique, SPANS, ByteRanges(writes), partial)


class _Twin:
    """The same decisions, page by page."""

    def __init__(self) -> None:
        self.balloon: set[int] = set()

    def host_page(self, pfn: int) -> set[int] | None:
        for span in SPANS:
            if span.first <= pfn < span.end:
                first = pfn
                while (first - span.phase) % span.sub_pages:
                    first -= 1
                return set(range(first, first + span.sub_pages))
        return None

    def dropped(self, pfns: list[int], writes: list[tuple[int, int]]) -> set[int]:
        """Return the pages that the request lets the host drop."""
        written = {
            page
            for start, length in writes
            for page in range(start // PAGE_SIZE, (start + length - 1) // PAGE_SIZE + 1)
        }
        ram = {pfn for span in SPANS for pfn in range(span.first, span.end)}
        usable = (set(pfns) & ram) - written
        self.balloon |= usable
        dropped: set[int] = set()
        for pfn in usable:
            host_page = self.host_page(pfn)
            assert host_page is not None
            if host_page <= self.balloon and not host_page & written:
                dropped |= host_page
        return dropped


@given(HISTORY)
def test_discards_and_verdicts_equal_the_slow_twin(
    history: list[tuple[list[int], list[tuple[int, int]]]],
) -> None:
    twin, partial = _Twin(), PartialPages()
    for pfns, writes in history:
        dropped = twin.dropped(pfns, writes)
        plan = _plan(pfns, writes, partial)
        assert {page for run in plan.discards for page in range(run.first, run.end)} == dropped
        # All proven: exactly the pages of this request that were dropped may be claimed.
        zero = set(plan.pfns[plan.zero_mask(plan.discards)].tolist())
        assert zero == dropped & set(pfns)


@given(HISTORY, st.data())
def test_claims_are_a_subset_of_what_was_proven(
    history: list[tuple[list[int], list[tuple[int, int]]]], data: st.DataObject
) -> None:
    partial = PartialPages()
    for pfns, writes in history:
        plan = _plan(pfns, writes, partial)
        proven = [run for run in plan.discards if data.draw(st.booleans())]
        zero = set(plan.pfns[plan.zero_mask(proven)].tolist())
        assert zero == {page for run in proven for page in range(run.first, run.end)} & set(pfns)


@given(HISTORY)
def test_runs_are_disjoint_whole_host_pages_in_order(
    history: list[tuple[list[int], list[tuple[int, int]]]],
) -> None:
    partial = PartialPages()
    for pfns, writes in history:
        discards = _plan(pfns, writes, partial).discards
        assert all(below.end <= above.first for below, above in itertools.pairwise(discards))
        for run in discards:
            span = next(span for span in SPANS if span.first <= run.first < span.end)
            assert run.end <= span.end
            assert run.pages % span.sub_pages == 0
            assert span.host_page(run.first) == run.first


@given(REQUESTS, WRITES)
def test_every_page_of_a_request_is_dropped_or_skipped_for_one_reason(
    pfns: list[int], writes: list[tuple[int, int]]
) -> None:
    plan = _plan(pfns, writes, PartialPages())
    dropped = int(plan.zero_mask(plan.discards).sum())
    assert dropped + sum(plan.skipped) == len(set(pfns))
    assert plan.skipped.outside_ram == len([pfn for pfn in set(pfns) if _Twin().host_page(pfn) is None])


def test_neighbouring_host_pages_are_one_discard() -> None:
    assert _plan([40, 41, 42, 43], [], PartialPages()).discards == [PfnRun(40, 4)]


def test_regions_that_touch_are_two_discards() -> None:
    """Two regions may be two mappings on the host, and a discard covers one of them."""
    spans = (RamSpan(0, 4), RamSpan(4, 8))
    plan = plan_inflate(np.arange(2, 6, dtype=np.int64), spans, ByteRanges(), PartialPages())
    assert plan.discards == [PfnRun(2, 2), PfnRun(4, 2)]


def test_only_the_completing_request_is_claimed() -> None:
    partial = PartialPages()
    first = _plan([17, 18], [], partial)
    assert first.discards == []
    assert first.skipped.partial_host_page == 2
    second = _plan([20, 19], [], partial)
    assert second.discards == [PfnRun(17, 4)]
    assert second.zero_mask(second.discards).tolist() == [True, True]


@pytest.mark.parametrize("written", [17, 20])
def test_a_host_page_in_which_the_device_writes_is_left_whole(written: int) -> None:
    partial = PartialPages()
    _plan([17, 18], [], partial)
    assert _plan([19, 20], [(written * PAGE_SIZE + 100, 1)], partial).discards == []


def test_a_page_in_which_the_device_writes_is_not_claimed_whatever_was_proven() -> None:
    plan = _plan([2, 3, 4, 12], [(3 * PAGE_SIZE, 1)], PartialPages())
    assert plan.zero_mask([PfnRun(0, 46)]).tolist() == [True, False, True, False]


@given(st.lists(st.integers(0, 46), max_size=12, unique=True), WRITES)
def test_a_plain_request_has_the_discards_of_its_plan_and_skips_nothing(
    pfns: list[int], writes: list[tuple[int, int]]
) -> None:
    descending = sorted(pfns, reverse=True)
    found = plain_discards(descending, SPANS, ByteRanges(writes))
    plan = _plan(descending, writes, PartialPages())
    if found is not None:
        assert found == plan.discards
        assert plan.skipped == SkippedPages(0, 0, 0)
    elif not writes:
        # All of an ordinary span, and nothing else, is what it is for.
        assert not descending or not all(2 <= pfn < 10 for pfn in descending)
