# SPDX-License-Identifier: GPL-2.0-only
"""Merging and splitting free blocks, and what becomes of their flags."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.buddy import (
    FPI_NONE,
    FPI_SKIP_REPORT_NOTIFY,
    FPI_TO_TAIL,
    PAGE_REPORTING_ACTIVE,
    PAGE_REPORTING_IDLE,
    PAGE_REPORTING_REQUESTED,
    __rmqueue_smallest,
    del_page_from_free_list,
    find_buddy_page_pfn,
    page_del_and_expand,
    split_large_buddy,
)
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    PAGEBLOCK_NR_PAGES,
)
from hostzero.mm.page_flags import PG_dirty, PG_reported, PG_zeroed, PGTY_none
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists, is_marked_zero, verify

MT = MIGRATE_RECLAIMABLE  # nothing else in the guest is of this type
ORDER = 10


class Area(NamedTuple):
    """Two neighbouring pageblocks that are off every list, to be freed piece by piece."""

    guest: MemoryManager
    pfn: int

    def free(
        self, page: int, order: int, *, flags: int = 0, fpi: int = FPI_NONE, reported: bool = False
    ) -> None:
        """Free a piece as a caller of `__free_one_page` does, which these pieces are too small to notice."""
        self.guest.mem.mem_map[self.pfn + page].flags_f = flags
        split_large_buddy(self.guest.mem, 0, self.pfn + page, order, fpi, reported)

    def lists(self) -> dict[tuple[int, int], list[int]]:
        """Return the area's blocks by order and migrate type, as offsets."""
        found: dict[tuple[int, int], list[int]] = {}
        for (_, order, migratetype), blocks in free_lists(self.guest.mem).items():
            mine = [block - self.pfn for block in blocks if self.pfn <= block < self.pfn + (1 << ORDER)]
            if mine:
                found[order, migratetype] = mine
        return found

    def flags(self, page: int) -> int:
        """Return the flags of a page."""
        return int(self.guest.mem.mem_map[self.pfn + page].flags_f)

    def set_type(self, page: int, migratetype: int) -> None:
        """Give a pageblock another type."""
        self.guest.mem.pageblock[(self.pfn + page) // PAGEBLOCK_NR_PAGES] = migratetype


@pytest.fixture
def area(mm: MemoryManager) -> Area:
    mem = mm.mem
    mm.free_pages(Pfn(int(mem.vm[0].empty_zero_page)))
    mm.drain_all_pages()
    pfn = __rmqueue_smallest(mem, 0, ORDER, MIGRATE_UNMOVABLE)
    mem.pageblock[pfn // PAGEBLOCK_NR_PAGES :][:2] = MT
    mem.vm[0].page_reporting_enabled, mem.vm[0].page_reporting_order = 1, 9
    return Area(mm, pfn)


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(
    ("low", "high", "merged"),
    [(PG_zeroed, PG_zeroed, PG_zeroed), (PG_zeroed, 0, 0), (0, PG_zeroed, 0), (0, 0, 0)],
)
def test_a_merged_block_is_zero_only_if_both_halves_were(
    area: Area, first: int, low: int, high: int, merged: int
) -> None:
    """Patch 25, whichever half comes first; no mark stays inside the merged block."""
    halves = {0: low, 4: high}
    for page in (first, 4 - first):
        area.free(page, 2, flags=halves[page])
    assert area.lists() == {(3, MT): [0]}
    assert (area.flags(0), area.flags(4)) == (merged, 0)
    if merged:
        page_del_and_expand(area.guest.mem, area.pfn, 0, 0, 3, MT)
        assert area.flags(4) == PG_zeroed


def test_a_stale_mark_inside_a_block_does_not_come_back_when_it_is_split(area: Area) -> None:
    area.free(0, 0)
    area.free(1, 0, flags=PG_zeroed)
    assert __rmqueue_smallest(area.guest.mem, 0, 0, MT) == area.pfn
    assert area.lists() == {(0, MT): [1]}
    assert area.flags(1) == 0


def test_a_merge_of_three_levels_needs_all_of_them_to_be_zero(area: Area) -> None:
    for page in (3, 1, 2, 0):
        area.free(page, 0, flags=PG_zeroed)
    assert area.lists() == {(2, MT): [0]}
    assert area.flags(0) == PG_zeroed
    for page in (4, 5, 6):
        area.free(page, 0, flags=PG_zeroed)
    area.free(7, 0)
    assert area.lists() == {(3, MT): [0]}
    assert [area.flags(page) for page in range(8)] == [0] * 8


def test_a_merged_block_is_not_reported(area: Area) -> None:
    area.free(0, 3)
    area.guest.mem.mem_map[area.pfn].flags_f |= PG_reported
    area.free(8, 3)
    assert area.lists() == {(4, MT): [0]}
    assert area.flags(0) == 0


def test_blocks_stop_merging_at_the_largest_order(area: Area) -> None:
    area.free(0, 10)
    assert area.lists() == {(10, MT): [0]}
    assert find_buddy_page_pfn(area.guest.mem, area.pfn, 9) == NO_PAGE


@pytest.mark.parametrize("reserve", [MIGRATE_CMA, MIGRATE_HIGHATOMIC, MIGRATE_ISOLATE])
def test_a_reserved_pageblock_does_not_merge_with_its_neighbour(area: Area, reserve: int) -> None:
    area.set_type(512, reserve)
    area.free(0, 9, flags=PG_zeroed)
    area.free(512, 9)
    assert area.lists() == {(9, MT): [0], (9, reserve): [512]}
    assert area.flags(0) == PG_zeroed


def test_two_pageblocks_of_a_reserve_merge(area: Area) -> None:
    area.set_type(0, MIGRATE_CMA)
    area.set_type(512, MIGRATE_CMA)
    area.free(0, 10)
    assert area.lists() == {(10, MIGRATE_CMA): [0]}


def test_mergeable_neighbours_merge_and_take_the_type_of_the_later(area: Area) -> None:
    area.set_type(512, MIGRATE_MOVABLE)
    area.free(0, 9)
    area.free(512, 9)
    assert area.lists() == {(10, MIGRATE_MOVABLE): [0]}
    assert area.guest.mem.pageblock[area.pfn // PAGEBLOCK_NR_PAGES] == MIGRATE_MOVABLE
    verify(area.guest)


def test_blocks_do_not_merge_across_zones(boot: Boot) -> None:
    mem = boot(8, zones=(ZoneSpec("DMA32", 0, 1536), ZoneSpec("Normal", 1536, 2048))).mem
    assert free_lists(mem)[0, 9, MIGRATE_MOVABLE] == [512, 1024]
    assert find_buddy_page_pfn(mem, 1024, 9) == NO_PAGE


def test_the_end_of_memory_has_no_buddy(boot: Boot) -> None:
    mem = boot(6).mem
    assert find_buddy_page_pfn(mem, 1024, 9) == NO_PAGE
    assert find_buddy_page_pfn(mem, 1536 - 4, 2) == NO_PAGE


def test_a_freed_block_goes_to_the_head_and_with_to_tail_to_the_tail(area: Area) -> None:
    for page, fpi in ((0, FPI_NONE), (16, FPI_NONE), (32, FPI_TO_TAIL)):
        area.free(page, 2, fpi=fpi)
    assert area.lists() == {(2, MT): [16, 0, 32]}


def test_a_block_that_will_probably_merge_goes_to_the_tail(area: Area) -> None:
    """The buddy of what it would merge to is free already: let it rest."""
    area.free(2, 1)
    area.free(32, 0)
    area.free(0, 0)
    assert area.lists()[0, MT] == [32, 0]


def test_the_largest_blocks_are_never_put_to_the_tail_for_that(area: Area) -> None:
    area.set_type(0, MIGRATE_CMA)
    area.free(512, 9)
    area.free(0, 9)
    assert area.lists() == {(9, MT): [512], (9, MIGRATE_CMA): [0]}


@pytest.mark.parametrize("flags", [0, PG_zeroed, PG_reported, PG_zeroed | PG_reported])
def test_a_split_hands_both_flags_to_every_remainder(area: Area, flags: int) -> None:
    """Patches 3 and 26: the head keeps only PG_zeroed, which the allocation path reads."""
    area.free(0, 4)
    area.guest.mem.mem_map[area.pfn].flags_f = flags
    page_del_and_expand(area.guest.mem, area.pfn, 0, 1, 4, MT)
    assert area.lists() == {(1, MT): [2], (2, MT): [4], (3, MT): [8]}
    assert [area.flags(page) for page in (2, 4, 8)] == [flags] * 3
    assert area.flags(0) == flags & PG_zeroed


def test_nothing_is_reported_while_reporting_is_off(area: Area) -> None:
    """The bit may be an owner's PG_uptodate then."""
    area.guest.mem.vm[0].page_reporting_enabled = 0
    area.free(0, 4)
    area.guest.mem.mem_map[area.pfn].flags_f = PG_reported
    page_del_and_expand(area.guest.mem, area.pfn, 0, 3, 4, MT)
    assert (area.flags(0), area.flags(8)) == (PG_reported, 0)


def test_remainders_go_to_the_head(area: Area) -> None:
    area.free(32, 1)
    area.free(0, 4)
    page_del_and_expand(area.guest.mem, area.pfn, 0, 1, 4, MT)
    assert area.lists()[1, MT] == [2, 32]


@pytest.mark.parametrize("flags", [0, PG_zeroed])
def test_a_large_block_is_freed_pageblock_by_pageblock_each_with_its_mark(area: Area, flags: int) -> None:
    """Patch 30: each part goes to its own type's list."""
    area.set_type(512, MIGRATE_CMA)
    area.free(0, 10, flags=flags)
    assert area.lists() == {(9, MT): [0], (9, MIGRATE_CMA): [512]}
    assert (area.flags(0), area.flags(512)) == (flags, flags)


@pytest.mark.parametrize("flags", [0, PG_zeroed])
def test_parts_of_a_large_block_that_merge_again_keep_its_mark(area: Area, flags: int) -> None:
    area.free(0, 10, flags=flags)
    assert area.lists() == {(10, MT): [0]}
    assert (area.flags(0), area.flags(512)) == (flags, 0)


def test_a_large_reported_block_hands_its_mark_to_its_parts(area: Area) -> None:
    """Patch 3, split_large_buddy: parts that stay apart are what the host was told of."""
    area.set_type(512, MIGRATE_CMA)
    area.free(0, 10, flags=PG_zeroed, reported=True)
    assert area.lists() == {(9, MT): [0], (9, MIGRATE_CMA): [512]}
    assert (area.flags(0), area.flags(512)) == (PG_reported | PG_zeroed, PG_reported | PG_zeroed)


@pytest.mark.parametrize("part", [0, 8])
def test_a_reported_block_that_merges_as_it_is_freed_is_not_reported(area: Area, part: int) -> None:
    """Patch 3, its later form: the mark is set after the free, so the larger block does not get it."""
    area.free(8 - part, 3)
    area.free(part, 3, reported=True)
    assert area.lists() == {(4, MT): [0]}
    assert (area.flags(0), area.flags(8)) == (0, 0)


def test_reported_parts_that_merge_again_are_not_reported(area: Area) -> None:
    area.free(0, 10, reported=True)
    assert area.lists() == {(10, MT): [0]}
    assert (area.flags(0), area.flags(512)) == (0, 0)


def test_the_smallest_sufficient_block_is_taken_from_the_head(area: Area) -> None:
    for page, order in ((0, 3), (16, 2), (32, 2)):
        area.free(page, order)
    assert __rmqueue_smallest(area.guest.mem, 0, 2, MT) == area.pfn + 32
    assert __rmqueue_smallest(area.guest.mem, 0, 2, MT) == area.pfn + 16
    assert __rmqueue_smallest(area.guest.mem, 0, 2, MT) == area.pfn
    assert area.lists() == {(2, MT): [4]}
    assert __rmqueue_smallest(area.guest.mem, 0, 3, MT) == NO_PAGE


def test_free_pages_are_counted_but_isolated_ones_are_not(area: Area) -> None:
    zone = area.guest.mem.zone[0]
    before = int(zone.nr_free_pages), int(zone.nr_free_cma)
    area.set_type(0, MIGRATE_ISOLATE)
    area.set_type(512, MIGRATE_CMA)
    area.free(0, 4)
    assert (int(zone.nr_free_pages), int(zone.nr_free_cma)) == before
    area.free(512, 5)
    assert (int(zone.nr_free_pages), int(zone.nr_free_cma)) == (before[0] + 32, before[1] + 32)
    del_page_from_free_list(area.guest.mem, area.pfn + 512, 0, 5, MIGRATE_CMA)
    assert (int(zone.nr_free_pages), int(zone.nr_free_cma)) == before


def test_a_deleted_block_is_no_buddy_any_more(area: Area) -> None:
    area.free(0, 4)
    blocks = int(area.guest.mem.zone[0].nr_free[4])
    del_page_from_free_list(area.guest.mem, area.pfn, 0, 4, MT)
    page = area.guest.mem.mem_map[area.pfn]
    assert (int(page.page_type), int(page.private)) == (PGTY_none, 0)
    assert int(area.guest.mem.zone[0].nr_free[4]) == blocks - 1
    assert area.lists() == {}


@pytest.mark.parametrize(
    ("order", "fpi", "state", "expected"),
    [
        (9, FPI_NONE, PAGE_REPORTING_IDLE, (PAGE_REPORTING_REQUESTED, 1)),
        (9, FPI_NONE, PAGE_REPORTING_ACTIVE, (PAGE_REPORTING_REQUESTED, 0)),
        (9, FPI_NONE, PAGE_REPORTING_REQUESTED, (PAGE_REPORTING_REQUESTED, 0)),
        (9, FPI_SKIP_REPORT_NOTIFY, PAGE_REPORTING_IDLE, (PAGE_REPORTING_IDLE, 0)),
        (8, FPI_NONE, PAGE_REPORTING_IDLE, (PAGE_REPORTING_IDLE, 0)),
    ],
)
def test_a_large_free_requests_reporting_once(
    area: Area, order: int, fpi: int, state: int, expected: tuple[int, int]
) -> None:
    vm = area.guest.mem.vm[0]
    vm.page_reporting_state = state
    area.free(0, order, fpi=fpi)
    assert (int(vm.page_reporting_state), int(vm.page_reporting_requests)) == expected


def test_the_order_after_merging_is_what_counts_for_reporting(area: Area) -> None:
    area.free(0, 8)
    assert int(area.guest.mem.vm[0].page_reporting_state) == PAGE_REPORTING_IDLE
    area.free(256, 8)
    assert int(area.guest.mem.vm[0].page_reporting_state) == PAGE_REPORTING_REQUESTED


def test_a_free_without_reporting_requests_nothing(area: Area) -> None:
    area.guest.mem.vm[0].page_reporting_enabled = 0
    area.free(0, 10)
    assert int(area.guest.mem.vm[0].page_reporting_state) == PAGE_REPORTING_IDLE


@pytest.mark.parametrize(
    ("page", "order", "flags", "text"),
    [
        (0, 0, PG_dirty, "flags of an owner are still set"),
        (1, 1, 0, "the block is not aligned to its order"),
    ],
)
def test_a_block_that_is_not_fit_to_be_free_is_a_bug(
    area: Area, page: int, order: int, flags: int, text: str
) -> None:
    with pytest.raises(VmBug, match=text):
        area.free(page, order, flags=flags)


def test_freeing_a_free_block_is_a_bug(area: Area) -> None:
    area.free(0, 0)
    with pytest.raises(VmBug, match="the page is free already"):
        area.free(0, 0)


def test_deleting_with_the_wrong_type_or_order_is_a_bug(area: Area) -> None:
    area.free(0, 3)
    with pytest.raises(VmBug, match="the pageblock has another migrate type"):
        del_page_from_free_list(area.guest.mem, area.pfn, 0, 3, MIGRATE_CMA)
    with pytest.raises(VmBug, match="not a free block of this order"):
        del_page_from_free_list(area.guest.mem, area.pfn, 0, 2, MT)
    assert int(area.guest.mem.vm[0].bug_pfn) == area.pfn


def test_without_debug_vm_nothing_is_asserted(area: Area) -> None:
    area.guest.mem.vm[0].debug_vm = 0
    area.free(0, 0, flags=PG_dirty)
    assert area.lists() == {(0, MT): [0]}


def test_marks_survive_a_free_by_nobody_in_particular(area: Area) -> None:
    """What a page says about itself does not depend on the flags of whoever drains it."""
    area.free(0, 1, flags=PG_zeroed, fpi=FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL)
    assert is_marked_zero(area.guest.mem, area.pfn)
