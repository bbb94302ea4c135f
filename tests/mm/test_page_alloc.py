# SPDX-License-Identifier: GPL-2.0-only
"""The way of an allocation through zones and watermarks, references, and zero hints end to end."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import OutOfMemory
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.buddy import __rmqueue_smallest
from hostzero.mm.fallback import (
    ALLOC_WMARK_LOW,
    reserve_highatomic_pageblock,
)
from hostzero.mm.gfp import (
    __GFP_DIRECT_RECLAIM,
    __GFP_DMA32,
    __GFP_HIGH,
    GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NOMEMALLOC,
    GFP_NOWAIT,
    GFP_THISNODE,
    GFP_ZERO,
    USER_ADDR_NONE,
)
from hostzero.mm.mmzone import (
    MIGRATE_HIGHATOMIC,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    PAGEBLOCK_NR_PAGES,
)
from hostzero.mm.page_alloc import alloc_pages, rmqueue_buddy
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison, PG_zeroed
from hostzero.mm.page_free import free_pages_bulk
from hostzero.mm.watermark import zone_allowed
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import (
    block_start,
    free_lists,
    is_marked_zero,
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


def use_up(mm: MemoryManager, gfp: int = GFP_KERNEL) -> list[Pfn]:
    """Allocate single pages until a request is refused."""
    pages: list[Pfn] = []
    while (pfn := int(alloc_pages(mm.mem, gfp, 0, USER_ADDR_NONE, 0, 0))) != NO_PAGE:
        pages.append(Pfn(pfn))
    return pages


def nr_free(mm: MemoryManager, zone: int = 0) -> int:
    return int(mm.mem.zone[zone].nr_free_pages)


# ---- references


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


def test_the_mark_is_cleared_when_a_block_leaves_the_buddy_lists(mm: MemoryManager) -> None:
    """`rmqueue_buddy` reads and clears it, before the check that counts PG_private as bad."""
    mm.drain_all_pages()
    for pfn in free_lists(mm.mem)[0, 9, MIGRATE_UNMOVABLE]:
        mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    pfn, zeroed = rmqueue_buddy(mm.mem, 0, 9, MIGRATE_UNMOVABLE, ALLOC_WMARK_LOW, GFP_KERNEL)
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


# ---- watermarks


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
