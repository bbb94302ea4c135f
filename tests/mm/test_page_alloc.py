# SPDX-License-Identifier: GPL-2.0-only
"""The way of an allocation through zones and watermarks, references, and zero hints end to end."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import OutOfMemory, VmBug
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.buddy import __rmqueue_smallest
from hostzero.mm.fallback import (
    ALLOC_CMA,
    ALLOC_HIGHATOMIC,
    ALLOC_MIN_RESERVE,
    ALLOC_NON_BLOCK,
    ALLOC_OOM,
    ALLOC_WMARK_HIGH,
    ALLOC_WMARK_LOW,
    ALLOC_WMARK_MIN,
    reserve_highatomic_pageblock,
)
from hostzero.mm.gfp import (
    __GFP_DIRECT_RECLAIM,
    __GFP_DMA32,
    __GFP_HIGH,
    GFP_ATOMIC,
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NOMEMALLOC,
    GFP_NOWAIT,
    GFP_THISNODE,
    GFP_ZERO,
    USER_ADDR_NONE,
)
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    PAGEBLOCK_NR_PAGES,
)
from hostzero.mm.page_alloc import alloc_pages, rmqueue_buddy
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison, PG_zeroed
from hostzero.mm.page_free import free_pages_bulk, put_page, put_page_testzero
from hostzero.mm.watermark import __zone_watermark_ok, watermark, zone_allowed
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import (
    block_start,
    dirty,
    dirty_free_memory,
    free_lists,
    is_marked_zero,
    page_bytes,
    pcp_lists,
    reads_zero,
    verify,
)

DMA32_AND_NORMAL = (ZoneSpec("DMA32", 0, 512), ZoneSpec("Normal", 512, 1024))
TWO_NODES = (ZoneSpec("Node 0", 0, 512, 0), ZoneSpec("Node 1", 512, 1024, 1))


@pytest.fixture
def small(boot: Boot) -> MemoryManager:
    """The smallest guest that boots, soon used up."""
    return boot(4)


def references(mm: MemoryManager, pfn: int) -> int:
    return int(mm.mem.mem_map[pfn]._refcount)


def zero_and_free(mm: MemoryManager, pfn: int, order: int = 0) -> None:
    page_bytes(mm, pfn, 1 << order)[:] = 0
    mm.mem.mem_map[pfn]._refcount = 0
    mm.free_frozen_pages_zeroed(Pfn(pfn), order)


def use_up(mm: MemoryManager, gfp: int = GFP_KERNEL) -> list[Pfn]:
    """Allocate single pages until a request is refused."""
    pages: list[Pfn] = []
    while (pfn := int(alloc_pages(mm.mem, gfp, 0, USER_ADDR_NONE, 0, 0))) != NO_PAGE:
        pages.append(Pfn(pfn))
    return pages


def nr_free(mm: MemoryManager, zone: int = 0) -> int:
    return int(mm.mem.zone[zone].nr_free_pages)


# ---- references


def test_a_page_comes_with_one_reference_and_goes_with_the_last(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    assert references(mm, pfn) == 1
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.free_pages(pfn)
    assert mm.free_pages(pfn)
    assert pcp_lists(mm.mem)[0, 0][0] == pfn


def test_dropping_a_reference_that_nobody_has_is_a_bug(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.free_pages(pfn)
    with pytest.raises(VmBug, match="the page has no reference"):
        put_page_testzero(mm.mem, pfn)


def test_a_folio_is_freed_whole_by_its_last_reference(mm: MemoryManager) -> None:
    free = nr_free(mm)
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 5)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not put_page(mm.mem, pfn, 0)
    assert mm.free_pages(pfn, 5)
    assert nr_free(mm) == free
    verify(mm)


def test_a_block_that_is_no_folio_keeps_only_its_first_page_for_a_second_reference(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 6)
    free = nr_free(mm)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.free_pages(pfn, 6)
    mm.drain_all_pages()
    assert nr_free(mm) == free + 63
    assert mm.free_pages(pfn)
    mm.drain_all_pages()
    assert nr_free(mm) == free + 64
    verify(mm)


def test_a_folio_with_a_second_reference_stays_whole(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 6)
    free = nr_free(mm)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.free_pages(pfn, 6)
    mm.drain_all_pages()
    assert nr_free(mm) == free


def test_bulk_gives_many_blocks_and_takes_them_back(mm: MemoryManager) -> None:
    free = nr_free(mm)
    pfns = mm.alloc_pages_bulk(GFP_KERNEL | GFP_ZERO, 37)
    assert len(set(pfns.tolist())) == 37
    assert {references(mm, pfn) for pfn in pfns} == {1}
    mm.mem.mem_map[pfns[0]]._refcount = 2
    free_pages_bulk(mm.mem, pfns, 0, 0)
    mm.drain_all_pages()
    assert references(mm, pfns[0]) == 1
    mm.free_pages(Pfn(int(pfns[0])))
    mm.drain_all_pages()
    assert nr_free(mm) == free
    verify(mm)


def test_bulk_stops_where_memory_ends(small: MemoryManager) -> None:
    pfns = small.alloc_pages_bulk(GFP_KERNEL, 5000)
    assert len(np.unique(pfns)) == len(pfns)
    assert 512 < len(pfns) < 1024


def test_bulk_allocations_have_no_user_address(mm: MemoryManager) -> None:
    """v4 of patch 7: with any address, order 1 without __GFP_COMP would be a bug here."""
    assert len(mm.alloc_pages_bulk(GFP_KERNEL | GFP_ZERO, 3, order=1)) == 3


# ---- zero hints


@pytest.mark.parametrize("order", range(11))
def test_a_block_freed_as_zero_is_not_zeroed_again(boot: Boot, order: int) -> None:
    mm = boot(12)
    # Its buddy stays with its owner, so that the block stays what it is.
    pfn = mm.alloc_pages(GFP_KERNEL, min(order + 1, 10))
    dirty_free_memory(mm)
    dirty(mm, pfn, order)
    zero_and_free(mm, pfn, order)
    verify(mm)
    before, got = mm.vm_stats(), -1
    while got != pfn:  # or memory is used up: an error
        before = mm.vm_stats()
        got = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, order)
        assert reads_zero(mm, got, order)
        assert not is_marked_zero(mm.mem, got)
    after = mm.vm_stats()
    assert after.known_zero_bytes - before.known_zero_bytes == PAGE_SIZE << order
    assert after.zeroed_bytes == before.zeroed_bytes
    verify(mm)


@pytest.mark.parametrize("order", [0, 3, 4, 10])
def test_every_page_cut_from_a_zero_block_is_known_zero(boot: Boot, order: int) -> None:
    """Host-zeroed memory is worth most in pieces: patch 26, all the way to the owner."""
    mm = boot(12)
    mm.drain_all_pages()
    dirty_free_memory(mm)
    pfn = mm.alloc_pages(GFP_KERNEL, 10)
    zero_and_free(mm, pfn, 10)
    before = mm.vm_stats().known_zero_bytes
    seen = [mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, order) for _ in range(1 << (10 - order))]
    inside = [page for page in seen if pfn <= page < pfn + 1024]
    assert len(inside) > 0
    assert mm.vm_stats().known_zero_bytes - before == len(inside) * (PAGE_SIZE << order)
    assert all(reads_zero(mm, page, order) for page in seen)
    verify(mm)


def test_a_last_reference_frees_a_folio_as_zero(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 3)
    assert mm.put_page_zeroed(pfn)
    assert is_marked_zero(mm.mem, pfn)
    verify(mm)


def test_a_hint_is_lost_while_somebody_else_holds_the_folio(mm: MemoryManager) -> None:
    """Patch 35: the other holder may still write, and frees it as an ordinary page."""
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 3)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.put_page_zeroed(pfn)
    assert references(mm, pfn) == 1
    assert not is_marked_zero(mm.mem, pfn)
    dirty(mm, pfn, 3)
    assert put_page(mm.mem, pfn, 0)
    assert not is_marked_zero(mm.mem, pfn)
    verify(mm)


def test_an_ordinary_last_put_sets_no_mark_even_on_zeros(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 3)
    assert mm.put_page_zeroed(pfn)
    assert mm.alloc_pages(GFP_KERNEL | GFP_COMP, 3) == pfn
    assert put_page(mm.mem, pfn, 0)
    assert not is_marked_zero(mm.mem, pfn)


def test_the_mark_is_cleared_when_a_block_leaves_the_buddy_lists(mm: MemoryManager) -> None:
    """`rmqueue_buddy` reads and clears it, before the check that counts PG_private as bad."""
    mm.drain_all_pages()
    for pfn in free_lists(mm.mem)[0, 9, MIGRATE_UNMOVABLE]:
        mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    pfn, zeroed = rmqueue_buddy(mm.mem, 0, 9, MIGRATE_UNMOVABLE, ALLOC_WMARK_LOW)
    assert zeroed
    assert not is_marked_zero(mm.mem, pfn)
    assert mm.vm_stats().bad_pages == 0


@pytest.mark.parametrize("damage", [PG_dirty, PG_hwpoison])
def test_a_bad_block_takes_its_hint_along(mm: MemoryManager, damage: int) -> None:
    mm.drain_all_pages()
    bad = free_lists(mm.mem)[0, 5, MIGRATE_UNMOVABLE][0]
    mm.mem.mem_map[bad].flags_f |= PG_zeroed
    mm.mem.mem_map[bad + 7].flags_f |= damage
    before = mm.vm_stats()
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5)
    after = mm.vm_stats()
    assert not bad <= pfn < bad + 32
    assert reads_zero(mm, pfn, 5)
    assert (after.bad_pages, after.known_zero_bytes) == (1, before.known_zero_bytes)
    assert not is_marked_zero(mm.mem, bad)


def test_an_isolated_pageblock_gets_its_pages_back_at_once(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO)
    mm.drain_all_pages()
    block = block_start(pfn)
    mm.mem.pageblock[block // PAGEBLOCK_NR_PAGES] = MIGRATE_ISOLATE
    zero_and_free(mm, pfn)
    assert free_lists(mm.mem)[0, 0, MIGRATE_ISOLATE] == [pfn]
    assert is_marked_zero(mm.mem, pfn)


# ---- watermarks


def test_each_watermark_is_raised_by_the_boost(mm: MemoryManager) -> None:
    mm.mem.zone[0].watermark_boost = 7
    zone = mm.mem.zone[0]
    for flags, mark in (
        (ALLOC_WMARK_MIN, zone.watermark_min),
        (ALLOC_WMARK_LOW, zone.watermark_low),
        (ALLOC_WMARK_HIGH, zone.watermark_high),
    ):
        assert watermark(mm.mem, 0, flags) == int(mark) + 7


@pytest.mark.parametrize(
    ("flags", "lowest"),
    [
        (0, 101),
        (ALLOC_MIN_RESERVE, 51),
        (ALLOC_MIN_RESERVE | ALLOC_NON_BLOCK, 39),
        (ALLOC_NON_BLOCK, 101),
        (ALLOC_OOM, 51),
    ],
)
def test_reserves_open_step_by_step(mm: MemoryManager, flags: int, lowest: int) -> None:
    """A mark of 100 pages: half for __GFP_HIGH, a quarter less without blocking, half for an OOM victim."""
    for free in (lowest - 1, lowest):
        mm.mem.zone[0].nr_free_pages = free
        assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, flags) == (free == lowest)


def test_lowmem_reserve_adds_to_the_mark(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_pages = 110
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 9, 0)
    assert not __zone_watermark_ok(mm.mem, 0, 0, 100, 10, 0)


def test_the_requests_own_pages_do_not_count(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_pages = 108
    assert __zone_watermark_ok(mm.mem, 0, 3, 100, 0, 0)
    mm.mem.zone[0].nr_free_pages = 107
    assert not __zone_watermark_ok(mm.mem, 0, 3, 100, 0, 0)


def test_cma_and_highatomic_pages_do_not_count_for_who_may_not_use_them(mm: MemoryManager) -> None:
    zone = mm.mem.zone[0]
    zone.nr_free_pages, zone.nr_free_cma = 150, 50
    assert not __zone_watermark_ok(mm.mem, 0, 0, 100, 0, 0)
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, ALLOC_CMA)
    zone.nr_free_cma, zone.nr_free_highatomic = 0, 50
    assert not __zone_watermark_ok(mm.mem, 0, 0, 100, 0, 0)
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, ALLOC_HIGHATOMIC)
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, ALLOC_NON_BLOCK)


@pytest.mark.parametrize(
    ("migratetype", "flags", "usable"),
    [
        (MIGRATE_UNMOVABLE, 0, True),
        (MIGRATE_CMA, 0, False),
        (MIGRATE_CMA, ALLOC_CMA, True),
        (MIGRATE_HIGHATOMIC, 0, False),
        (MIGRATE_HIGHATOMIC, ALLOC_HIGHATOMIC, True),
        (MIGRATE_HIGHATOMIC, ALLOC_OOM, True),
        (MIGRATE_ISOLATE, ALLOC_HIGHATOMIC | ALLOC_CMA, False),
    ],
)
def test_a_large_block_must_exist_where_the_request_may_look(
    mm: MemoryManager, migratetype: int, flags: int, usable: bool
) -> None:
    mem = mm.mem
    pfn = mm.alloc_pages(GFP_KERNEL, 9)
    for (_, order, other), blocks in free_lists(mem).items():
        for _ in blocks:
            if order >= 4:
                __rmqueue_smallest(mem, 0, order, other)
    mm.drain_all_pages()
    mem.pageblock[pfn // PAGEBLOCK_NR_PAGES] = migratetype
    assert not __zone_watermark_ok(mem, 0, 9, -5000, 0, flags)
    mm.free_pages(pfn, 9)
    mm.drain_all_pages()
    assert __zone_watermark_ok(mem, 0, 9, -5000, 0, flags) == usable
    assert __zone_watermark_ok(mem, 0, 0, -5000, 0, flags)


def test_a_kernel_stops_at_the_minimum_and_atomic_requests_go_on(small: MemoryManager) -> None:
    """GFP_ATOMIC may use 5/8 of the reserve, a blocking __GFP_HIGH half of it, NOWAIT none."""
    low = int(small.mem.zone[0].watermark_min)
    use_up(small)
    assert nr_free(small) == low
    assert alloc_pages(small.mem, GFP_NOWAIT, 0, USER_ADDR_NONE, 0, 0) == NO_PAGE
    use_up(small, GFP_KERNEL | __GFP_HIGH)
    half = low - low // 2
    assert nr_free(small) == half
    assert alloc_pages(small.mem, GFP_ATOMIC | GFP_NOMEMALLOC, 0, USER_ADDR_NONE, 0, 0) == NO_PAGE
    use_up(small, GFP_ATOMIC)
    assert nr_free(small) == half - half // 4
    verify(small)


def test_a_request_that_may_block_takes_back_what_is_parked_elsewhere(boot: Boot) -> None:
    mm = boot(4, nr_cpus=2)
    mm.mem.pcp["high"] = 100_000
    pages = use_up(mm)
    for pfn in pages[:50]:
        mm.free_pages(pfn, cpu=1)
    stalls = mm.vm_stats().allocstall
    assert alloc_pages(mm.mem, GFP_NOWAIT, 0, USER_ADDR_NONE, 0, 0) == NO_PAGE
    assert mm.alloc_pages(GFP_KERNEL) in pages[:50]
    assert mm.vm_stats().allocstall == stalls + 1
    assert (1, 0) not in pcp_lists(mm.mem)


def test_failures_are_counted(small: MemoryManager) -> None:
    use_up(small)
    failed = small.vm_stats().alloc_fail
    with pytest.raises(OutOfMemory, match="no free block of order 1"):
        small.alloc_pages(GFP_NOWAIT, 1)
    assert small.vm_stats().alloc_fail == failed + 1


@pytest.fixture
def reserving(mm: MemoryManager) -> MemoryManager:
    """A guest whose first free pageblock is reserved, and all others taken."""
    mm.mem.zone[0].managed_pages = 100 * PAGEBLOCK_NR_PAGES
    mm.drain_all_pages()
    reserve_highatomic_pageblock(mm.mem, 0, 512, 2)
    return mm


def test_a_large_atomic_request_under_pressure_reserves_its_pageblock(mm: MemoryManager) -> None:
    mm.mem.zone[0].managed_pages = 100 * PAGEBLOCK_NR_PAGES
    mm.mem.zone[0].watermark_low = 100_000
    pfn = mm.alloc_pages(GFP_ATOMIC, 2)
    assert int(mm.mem.pageblock[pfn // PAGEBLOCK_NR_PAGES]) == MIGRATE_HIGHATOMIC
    single = mm.alloc_pages(GFP_ATOMIC)
    assert block_start(single) != block_start(pfn)
    mm.free_pages(pfn, 2)
    mm.drain_all_pages()
    verify(mm)


@pytest.mark.parametrize(
    ("gfp", "order", "served"),
    [
        (GFP_KERNEL | GFP_NOMEMALLOC, 2, False),
        (GFP_ATOMIC, 2, True),
        (GFP_ATOMIC, 0, True),
        (GFP_NOWAIT, 0, True),
    ],
)
def test_who_may_use_the_highatomic_reserve(
    reserving: MemoryManager, gfp: int, order: int, served: bool
) -> None:
    """Large atomic requests go there first; small non-blocking ones when nothing else is left."""
    mem = reserving.mem
    for (_, size, migratetype), blocks in free_lists(mem).items():
        for _ in blocks:
            if migratetype != MIGRATE_HIGHATOMIC:
                __rmqueue_smallest(mem, 0, size, migratetype)
    mem.zone[0].watermark_min = 0
    mem.zone[0].watermark_low = 0
    pfn = alloc_pages(mem, gfp & ~__GFP_DIRECT_RECLAIM, order, USER_ADDR_NONE, 0, 0)
    assert (512 <= pfn < 1024) == served


def test_a_blocking_request_releases_the_reserve_before_it_fails(reserving: MemoryManager) -> None:
    mem = reserving.mem
    for (_, size, migratetype), blocks in free_lists(mem).items():
        for _ in blocks:
            if migratetype != MIGRATE_HIGHATOMIC:
                __rmqueue_smallest(mem, 0, size, migratetype)
    pfn = reserving.alloc_pages(GFP_HIGHUSER_MOVABLE, 3)
    assert 512 <= pfn < 1024
    assert int(mem.zone[0].nr_reserved_highatomic) == 0


# ---- zones and nodes


def test_a_node_is_served_from_its_own_zones_first(boot: Boot) -> None:
    mm = boot(4, zones=TWO_NODES)
    assert mm.alloc_pages(GFP_KERNEL, node=0) < 512 <= mm.alloc_pages(GFP_KERNEL, node=1)


@pytest.mark.parametrize("gfp", [GFP_KERNEL, GFP_ATOMIC])
@pytest.mark.parametrize("order", [0, 2, 5])
def test_thisnode_means_no_other(boot: Boot, gfp: int, order: int) -> None:
    mm = boot(4, zones=TWO_NODES)
    while int(alloc_pages(mm.mem, gfp | GFP_THISNODE, order, USER_ADDR_NONE, 1, 0)) != NO_PAGE:
        pass
    assert 0 <= int(alloc_pages(mm.mem, gfp, order, USER_ADDR_NONE, 1, 0)) < 512
    verify(mm)


def test_dma32_excludes_zones_above_4_gib(boot: Boot) -> None:
    mm = boot(4, zones=DMA32_AND_NORMAL)
    mm.mem.zone[1].end_pfn = (4 << 30 >> 12) + 1
    assert zone_allowed(mm.mem, 0, __GFP_DMA32, 0)
    assert not zone_allowed(mm.mem, 1, __GFP_DMA32, 0)
    assert mm.alloc_pages(GFP_KERNEL) >= 512
    assert mm.alloc_pages(GFP_KERNEL | __GFP_DMA32) < 512
    assert mm.alloc_pages(GFP_NOWAIT | __GFP_DMA32) < 512


def test_a_lower_zone_keeps_pages_for_those_who_need_it(boot: Boot) -> None:
    mm = boot(4, zones=DMA32_AND_NORMAL)
    mm.mem.zone[1].end_pfn = (4 << 30 >> 12) + 1
    mm.mem.zone[0].lowmem_reserve = 100
    use_up(mm)
    assert nr_free(mm, 0) == int(mm.mem.zone[0].watermark_min) + 100
    assert mm.alloc_pages(GFP_KERNEL | __GFP_DMA32) < 512
