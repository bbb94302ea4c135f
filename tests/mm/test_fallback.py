# SPDX-License-Identifier: GPL-2.0-only
"""Other migrate types' blocks: in which order, claimed or stolen, and the reserves."""

from __future__ import annotations

import pytest

from hostzero.errors import OutOfMemory
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.buddy import __rmqueue_smallest
from hostzero.mm.fallback import (
    ALLOC_CMA,
    ALLOC_NOFRAGMENT,
    ALLOC_WMARK_LOW,
    __move_freepages_block,
    __rmqueue_fallback,
    block_within_zone,
    fallback_type,
    find_suitable_fallback,
    reserve_highatomic_pageblock,
    should_try_claim_block,
    unreserve_highatomic_pageblock,
)
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    PAGEBLOCK_NR_PAGES,
)
from hostzero.mm.page_flags import PG_head, PG_reported, PG_zeroed
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import block_start, free_lists, verify

U, M, R = MIGRATE_UNMOVABLE, MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE


def type_of(mm: MemoryManager, pfn: int) -> int:
    return int(mm.mem.pageblock[pfn // PAGEBLOCK_NR_PAGES])


def set_type(mm: MemoryManager, pfn: int, new: int) -> None:
    """Move a whole pageblock and its free blocks to another type."""
    start = block_start(pfn)
    __move_freepages_block(mm.mem, 0, start, type_of(mm, start), new)
    mm.mem.pageblock[start // PAGEBLOCK_NR_PAGES] = new


@pytest.fixture
def movable(boot: Boot) -> MemoryManager:
    """A guest in which every free page is movable and on the buddy lists, page 0 aside."""
    mm = boot(8)
    mm.free_pages(Pfn(int(mm.mem.vm[0].empty_zero_page)))
    mm.drain_all_pages()
    for block in range(4):
        if type_of(mm, block * 512) != M:
            __move_freepages_block(mm.mem, 0, block * 512, type_of(mm, block * 512), M)
            mm.mem.pageblock[block] = M
    for name in ("fallback_claims", "fallback_steals"):
        mm.mem.vm[0][name] = 0
    verify(mm)
    return mm


def leave_only(mm: MemoryManager, keep: range) -> None:
    """Take every free block outside of some pages off the lists."""
    for (_, order, migratetype), blocks in free_lists(mm.mem).items():
        taken = [__rmqueue_smallest(mm.mem, 0, order, migratetype) for _ in blocks]
        for pfn in taken:
            mm.mem.mem_map[pfn]._refcount = 1
            if pfn in keep:
                mm.free_pages(Pfn(pfn), order)
    mm.drain_all_pages()


def stats(mm: MemoryManager) -> tuple[int, int]:
    counted = mm.vm_stats()
    return counted.fallback_claims, counted.fallback_steals


@pytest.mark.parametrize(("own", "others"), [(U, (R, M)), (M, (R, U)), (R, (U, M))])
def test_types_fall_back_in_the_kernels_order(own: int, others: tuple[int, int]) -> None:
    assert (fallback_type(own, 0), fallback_type(own, 1)) == others


@pytest.mark.parametrize(
    ("order", "own", "claims"),
    [(0, U, True), (0, R, True), (0, M, False), (3, M, False), (4, M, True), (9, M, True)],
)
def test_kernel_pages_always_claim_and_movable_ones_only_large(order: int, own: int, claims: bool) -> None:
    assert should_try_claim_block(order, own) == claims


def test_the_first_type_with_a_block_is_found(movable: MemoryManager) -> None:
    mem = movable.mem
    assert find_suitable_fallback(mem, 0, 9, U, True) == M
    set_type(movable, 512, R)
    assert find_suitable_fallback(mem, 0, 9, U, True) == R
    assert find_suitable_fallback(mem, 0, 9, M, True) == R
    assert find_suitable_fallback(mem, 0, 9, R, True) == -1
    assert find_suitable_fallback(mem, 0, 0, M, True) == -2
    set_type(movable, 1024, MIGRATE_CMA)
    assert find_suitable_fallback(mem, 0, 10, U, True) == -1


@pytest.mark.parametrize("flags", [0, PG_zeroed, PG_reported, PG_zeroed | PG_reported])
def test_a_whole_pageblock_is_claimed_with_its_flags(movable: MemoryManager, flags: int) -> None:
    """Patches 3 and 26: the parts given back keep both flags, the head only PG_zeroed."""
    mem = movable.mem
    mem.vm[0].page_reporting_enabled = 1
    mem.mem_map[1024].flags_f = flags
    assert __rmqueue_fallback(mem, 0, 8, U, ALLOC_WMARK_LOW) == 1024
    assert (type_of(movable, 1024), type_of(movable, 1536)) == (U, U)
    lists = free_lists(mem)
    assert (lists[0, 8, U], lists[0, 9, U]) == ([1280], [1536])
    assert [int(mem.mem_map[pfn].flags_f) for pfn in (1024, 1280, 1536)] == [flags & PG_zeroed, flags, flags]
    assert stats(movable) == (1, 0)
    mem.mem_map[1024].flags_f = 0
    mem.ram[:] = 0
    verify(movable)


def test_the_largest_block_is_claimed_first(movable: MemoryManager) -> None:
    """It is the one whose pageblock holds the least of the other type."""
    assert __rmqueue_fallback(movable.mem, 0, 0, U, ALLOC_WMARK_LOW) == 1024


def test_a_pageblock_that_is_half_free_is_claimed_and_its_blocks_keep_their_flags(
    movable: MemoryManager,
) -> None:
    mem = movable.mem
    leave_only(movable, range(256, 512))
    mem.mem_map[256].flags_f = PG_zeroed
    assert __rmqueue_fallback(mem, 0, 0, U, ALLOC_WMARK_LOW) == 256
    assert type_of(movable, 256) == U
    assert int(mem.mem_map[384].flags_f) == PG_zeroed
    assert stats(movable) == (1, 0)


def test_blocks_that_move_to_another_type_go_to_the_tail_with_their_flags(movable: MemoryManager) -> None:
    mem = movable.mem
    set_type(movable, 512, R)
    assert free_lists(mem)[0, 9, R] == [512]
    leave_only(movable, range(512, 2048))
    first = __rmqueue_smallest(mem, 0, 9, M)
    mem.mem_map[first]._refcount = 1
    mem.mem_map[first + 512].flags_f = PG_zeroed
    assert free_lists(mem)[0, 9, M] == [first + 512]
    moved = __move_freepages_block(mem, 0, first + 512, M, R)
    assert moved == 512
    assert free_lists(mem)[0, 9, R] == [512, first + 512]
    assert int(mem.mem_map[first + 512].flags_f) == PG_zeroed


def test_moving_blocks_counts_cma_pages(movable: MemoryManager) -> None:
    zone = movable.mem.zone[0]
    free = int(zone.nr_free_pages)
    set_type(movable, 512, MIGRATE_CMA)
    assert (int(zone.nr_free_pages), int(zone.nr_free_cma)) == (free, 512)
    verify(movable)


def crowd(mm: MemoryManager, *, mapped: int, free: range) -> None:
    """Leave `free` pages of the first pageblock, and map so many of the others."""
    leave_only(mm, free)
    mm.mem.mem_map.mapping[128 : 128 + mapped] = 1


def test_a_movable_pageblock_with_few_kernel_pages_is_only_stolen_from(movable: MemoryManager) -> None:
    """64 pages are free and 148 of the others are not movable: less than half is free or alike."""
    crowd(movable, mapped=300, free=range(64, 128))
    assert __rmqueue_fallback(movable.mem, 0, 0, U, ALLOC_WMARK_LOW) == 64
    assert type_of(movable, 64) == M
    assert stats(movable) == (0, 1)
    assert (0, 0, M) in free_lists(movable.mem)


@pytest.mark.parametrize(("order", "claimed"), [(8, False), (0, True)])
def test_every_page_of_a_mapped_folio_is_movable(movable: MemoryManager, order: int, claimed: bool) -> None:
    """Only its head says that it is mapped: 64 pages are free, and 256 + 10 or 1 + 10 are movable."""
    crowd(movable, mapped=10, free=range(64, 128))
    head = movable.mem.mem_map[256]
    head.mapping, head.order, head.flags_f = 1, order, PG_head if order else 0
    assert __rmqueue_fallback(movable.mem, 0, 0, U, ALLOC_WMARK_LOW) == 64
    assert (type_of(movable, 64) == U) == claimed


def test_kernel_pages_in_a_movable_pageblock_count_as_alike(movable: MemoryManager) -> None:
    crowd(movable, mapped=100, free=range(64, 128))
    assert __rmqueue_fallback(movable.mem, 0, 0, U, ALLOC_WMARK_LOW) == 64
    assert type_of(movable, 64) == U
    assert stats(movable) == (1, 0)


@pytest.mark.parametrize(("mapped", "claimed"), [(250, True), (100, False)])
def test_a_large_movable_request_counts_movable_pages_as_alike(
    movable: MemoryManager, mapped: int, claimed: bool
) -> None:
    crowd(movable, mapped=mapped, free=range(64, 128))
    set_type(movable, 0, U)
    assert __rmqueue_fallback(movable.mem, 0, 4, M, ALLOC_WMARK_LOW) == 64
    assert type_of(movable, 64) == (M if claimed else U)
    assert stats(movable) == ((1, 0) if claimed else (0, 1))


def test_nothing_is_known_between_unmovable_and_reclaimable(movable: MemoryManager) -> None:
    crowd(movable, mapped=0, free=range(64, 128))
    set_type(movable, 0, R)
    assert __rmqueue_fallback(movable.mem, 0, 0, U, ALLOC_WMARK_LOW) == 64
    assert type_of(movable, 64) == R
    assert stats(movable) == (0, 1)


def test_a_small_movable_request_steals_from_the_smallest_block(movable: MemoryManager) -> None:
    leave_only(movable, range(8, 32))
    set_type(movable, 0, U)
    assert sorted(order for _, order, _ in free_lists(movable.mem)) == [3, 4]
    assert __rmqueue_fallback(movable.mem, 0, 1, M, ALLOC_WMARK_LOW) == 8
    assert type_of(movable, 8) == U
    assert free_lists(movable.mem) == {(0, 1, U): [10], (0, 2, U): [12], (0, 4, U): [16]}


def test_a_stolen_block_keeps_its_mark_for_the_reader(movable: MemoryManager) -> None:
    leave_only(movable, range(8, 16))
    set_type(movable, 0, U)
    movable.mem.mem_map[8].flags_f = PG_zeroed
    __rmqueue_fallback(movable.mem, 0, 1, M, ALLOC_WMARK_LOW)
    assert [int(movable.mem.mem_map[pfn].flags_f) for pfn in (8, 10, 12)] == [PG_zeroed] * 3


def test_without_fragmentation_only_whole_pageblocks_are_claimed(movable: MemoryManager) -> None:
    flags = ALLOC_WMARK_LOW | ALLOC_NOFRAGMENT
    leave_only(movable, range(256, 512))
    assert __rmqueue_fallback(movable.mem, 0, 0, U, flags) == NO_PAGE
    assert stats(movable) == (0, 0)


def test_nothing_left_is_no_page(movable: MemoryManager) -> None:
    leave_only(movable, range(0))
    assert __rmqueue_fallback(movable.mem, 0, 0, U, ALLOC_WMARK_LOW) == NO_PAGE


def test_only_movable_requests_use_cma(boot: Boot) -> None:
    """Everything else is taken first; then CMA, before any other type's blocks are touched."""
    mm = boot(8, cma_pages=PAGEBLOCK_NR_PAGES)
    leave_only(mm, range(1536, 2048))
    assert list(free_lists(mm.mem)) == [(0, 9, MIGRATE_CMA)]
    assert __rmqueue_fallback(mm.mem, 0, 0, U, ALLOC_WMARK_LOW) == NO_PAGE
    assert __rmqueue_fallback(mm.mem, 0, 0, M, ALLOC_WMARK_LOW) == NO_PAGE
    assert __rmqueue_fallback(mm.mem, 0, 0, M, ALLOC_WMARK_LOW | ALLOC_CMA) == 1536
    with pytest.raises(OutOfMemory):
        mm.alloc_pages(GFP_KERNEL)
    assert mm.alloc_pages(GFP_HIGHUSER_MOVABLE) == 1537
    assert type_of(mm, 1536) == MIGRATE_CMA


def test_cma_is_used_first_once_it_is_most_of_what_is_free(boot: Boot) -> None:
    mm = boot(8, cma_pages=2 * PAGEBLOCK_NR_PAGES)
    zone = mm.mem.zone[0]
    assert int(zone.nr_free_cma) > int(zone.nr_free_pages) // 2
    assert mm.alloc_pages(GFP_HIGHUSER_MOVABLE) >= 1024
    assert mm.alloc_pages(GFP_KERNEL) < 1024
    mm = boot(8, cma_pages=PAGEBLOCK_NR_PAGES)
    assert mm.alloc_pages(GFP_HIGHUSER_MOVABLE) < 1536


def test_a_pageblock_belongs_to_a_zone_only_as_a_whole(boot: Boot) -> None:
    mm = boot(8, zones=(ZoneSpec("DMA32", 0, 1024), ZoneSpec("Normal", 1024, 2048)))
    assert block_within_zone(mm.mem, 0, 1023)
    assert not block_within_zone(mm.mem, 0, 1024)
    assert not block_within_zone(mm.mem, 1, 1023)
    assert block_within_zone(mm.mem, 1, 2047)


@pytest.fixture
def large(movable: MemoryManager) -> MemoryManager:
    """A guest whose zone believes to be large enough for a highatomic reserve of two pageblocks."""
    movable.mem.zone[0].managed_pages = 100 * (2 * PAGEBLOCK_NR_PAGES)
    return movable


def test_a_small_zone_reserves_nothing(movable: MemoryManager) -> None:
    movable.mem.zone[0].managed_pages = 100 * PAGEBLOCK_NR_PAGES - 1
    reserve_highatomic_pageblock(movable.mem, 0, 600, 2)
    assert type_of(movable, 600) == M
    assert int(movable.mem.zone[0].nr_reserved_highatomic) == 0


def test_a_reserve_takes_pageblocks_up_to_its_limit(large: MemoryManager) -> None:
    for pfn in (600, 1100, 1600):
        reserve_highatomic_pageblock(large.mem, 0, pfn, 2)
    assert [type_of(large, pfn) for pfn in (0, 512)] == [M, MIGRATE_HIGHATOMIC]
    assert int(large.mem.zone[0].nr_reserved_highatomic) == 2 * PAGEBLOCK_NR_PAGES
    assert type_of(large, 1600) == M


def test_the_limit_is_rounded_up_to_a_pageblock(large: MemoryManager) -> None:
    large.mem.zone[0].managed_pages = 100 * PAGEBLOCK_NR_PAGES + 100
    reserve_highatomic_pageblock(large.mem, 0, 100, 2)
    reserve_highatomic_pageblock(large.mem, 0, 600, 2)
    assert [type_of(large, pfn) for pfn in (0, 512)] == [MIGRATE_HIGHATOMIC] * 2


@pytest.mark.parametrize("order", [9, 10])
def test_a_huge_request_reserves_nothing(large: MemoryManager, order: int) -> None:
    reserve_highatomic_pageblock(large.mem, 0, 512, order)
    assert type_of(large, 512) == M


def test_a_reserve_is_not_made_of_cma(large: MemoryManager) -> None:
    set_type(large, 512, MIGRATE_CMA)
    reserve_highatomic_pageblock(large.mem, 0, 600, 2)
    assert type_of(large, 600) == MIGRATE_CMA


def test_a_reserve_takes_the_free_blocks_along_and_gives_them_back(large: MemoryManager) -> None:
    mem = large.mem
    reserve_highatomic_pageblock(mem, 0, 600, 2)
    assert free_lists(mem)[0, 9, MIGRATE_HIGHATOMIC] == [512]
    assert int(mem.zone[0].nr_free_highatomic) == PAGEBLOCK_NR_PAGES
    verify(large)
    assert unreserve_highatomic_pageblock(mem, 0, U)
    assert type_of(large, 512) == U
    assert free_lists(mem)[0, 9, U] == [512]
    assert int(mem.zone[0].nr_reserved_highatomic) == 0
    assert not unreserve_highatomic_pageblock(mem, 0, U)
    verify(large)


def test_two_reserved_pageblocks_that_merged_are_given_back_as_two(large: MemoryManager) -> None:
    mem = large.mem
    pfn = __rmqueue_smallest(mem, 0, 10, M)
    for page in (pfn, pfn + 512):
        reserve_highatomic_pageblock(mem, 0, page, 2)
    mem.mem_map[pfn]._refcount = 1
    large.free_pages(Pfn(pfn), 10)
    assert free_lists(mem)[0, 10, MIGRATE_HIGHATOMIC] == [pfn]
    assert unreserve_highatomic_pageblock(mem, 0, M)
    assert (type_of(large, pfn), type_of(large, pfn + 512)) == (M, M)
    assert int(mem.zone[0].nr_reserved_highatomic) == 0
    verify(large)


def test_a_reserve_without_a_free_page_stays(large: MemoryManager) -> None:
    mem = large.mem
    reserve_highatomic_pageblock(mem, 0, 600, 2)
    assert __rmqueue_smallest(mem, 0, 9, MIGRATE_HIGHATOMIC) == 512
    assert not unreserve_highatomic_pageblock(mem, 0, M)
    assert type_of(large, 512) == MIGRATE_HIGHATOMIC


def test_ordinary_requests_do_not_fall_back_to_a_reserve(large: MemoryManager) -> None:
    reserve_highatomic_pageblock(large.mem, 0, 600, 2)
    leave_only(large, range(0))
    assert __rmqueue_fallback(large.mem, 0, 0, U, ALLOC_WMARK_LOW) == NO_PAGE
