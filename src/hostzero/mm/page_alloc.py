# SPDX-License-Identifier: GPL-2.0-only
"""Allocating and freeing pages (kernel: `mm/page_alloc.c`, Linux 7.2).

The way of an allocation: `__alloc_frozen_pages` → `get_page_from_freelist` → `rmqueue` →
`prep_new_page` → `post_alloc_hook`; `user_addr` travels the whole way (patch 7).
"Frozen" pages have no reference; the functions without the word give one.
"""

from __future__ import annotations

from hostzero.errors import VmBug
from hostzero.jit import compiled, inline
from hostzero.mm.buddy import (
    FPI_NONE,
    FPI_ZEROED,
    __rmqueue_smallest,
    split_large_buddy,
)
from hostzero.mm.debug import VM_BUG_ON_PAGE
from hostzero.mm.fallback import (
    ALLOC_CMA,
    ALLOC_HIGHATOMIC,
    ALLOC_MIN_RESERVE,
    ALLOC_NON_BLOCK,
    ALLOC_OOM,
    ALLOC_RESERVES,
    ALLOC_WMARK_LOW,
    ALLOC_WMARK_MASK,
    ALLOC_WMARK_MIN,
    __rmqueue,
    reserve_highatomic_pageblock,
    unreserve_highatomic_pageblock,
)
from hostzero.mm.gfp import (
    __GFP_DIRECT_RECLAIM,
    __GFP_DMA32,
    __GFP_HIGH,
    __GFP_NOMEMALLOC,
    __GFP_THISNODE,
    gfp_migratetype,
)
from hostzero.mm.list import list_empty
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_PCPTYPES,
    NO_PAGE,
    NR_PAGE_ORDERS,
    Memory,
    free_list,
    get_pageblock_migratetype,
    page_zone,
)
from hostzero.mm.page_flags import PageZeroed, __ClearPageZeroed, __SetPageZeroed, compound_order
from hostzero.mm.pcplist import (
    __rmqueue_pcplist,
    drain_all_pages,
    free_frozen_page_commit,
    pcp_allowed_order,
)
from hostzero.mm.prep import __free_pages_prepare, check_new_pages, fpi_zeroed_holds, prep_new_page

_DMA32_PAGES = (4 << 30) >> 12


@inline
def watermark(mem: Memory, zone: int, alloc_flags: int) -> int:
    """Return the watermark that these flags hold the zone to, boost included."""
    which = alloc_flags & ALLOC_WMARK_MASK
    z = mem.zone[zone]
    if which == ALLOC_WMARK_MIN:
        return z.watermark_min + z.watermark_boost
    if which == ALLOC_WMARK_LOW:
        return z.watermark_low + z.watermark_boost
    return z.watermark_high + z.watermark_boost


@compiled
def __zone_watermark_ok(
    mem: Memory, zone: int, order: int, mark: int, reserve: int, alloc_flags: int
) -> bool:
    """Return whether a zone may serve a request without falling below `mark`.

    Source: same name. For order > 0 a sufficient block must exist as well.
    """
    z = mem.zone[zone]
    free_pages = z.nr_free_pages - ((1 << order) - 1)
    if (alloc_flags & ALLOC_RESERVES) == 0:
        free_pages -= z.nr_free_highatomic
    if (alloc_flags & ALLOC_CMA) == 0:
        free_pages -= z.nr_free_cma
    if (alloc_flags & ALLOC_MIN_RESERVE) != 0:
        mark -= mark // 2
        if (alloc_flags & ALLOC_NON_BLOCK) != 0:
            mark -= mark // 4
    if (alloc_flags & ALLOC_OOM) != 0:
        mark -= mark // 2
    if free_pages <= mark + reserve:
        return False
    if order == 0:
        return True
    for current in range(order, NR_PAGE_ORDERS):
        if z.nr_free[current] == 0:
            continue
        for migratetype in range(MIGRATE_PCPTYPES):
            if not list_empty(mem, free_list(mem, zone, current, migratetype)):
                return True
        if (alloc_flags & ALLOC_CMA) != 0 and not list_empty(mem, free_list(mem, zone, current, MIGRATE_CMA)):
            return True
        if (alloc_flags & (ALLOC_HIGHATOMIC | ALLOC_OOM)) != 0 and not list_empty(
            mem, free_list(mem, zone, current, MIGRATE_HIGHATOMIC)
        ):
            return True
    return False


@compiled
def rmqueue_buddy(mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int) -> tuple[int, bool]:
    """Take a block straight from the buddy lists; return it and its zero hint.

    Source: same name; patch 22: the hint is read and cleared before the page is checked.
    """
    while True:
        pfn = NO_PAGE
        if (alloc_flags & ALLOC_HIGHATOMIC) != 0:
            pfn = __rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn == NO_PAGE:
            pfn = __rmqueue(mem, zone, order, migratetype, alloc_flags)
        if pfn == NO_PAGE and (alloc_flags & (ALLOC_OOM | ALLOC_NON_BLOCK)) != 0:
            pfn = __rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn == NO_PAGE:
            return NO_PAGE, False
        zeroed = PageZeroed(mem, pfn)
        __ClearPageZeroed(mem, pfn)
        if not check_new_pages(mem, pfn, order):
            return pfn, zeroed


@inline
def zone_allowed(mem: Memory, zone: int, gfp: int, node: int) -> bool:
    """Return whether `gfp` permits pages of this zone."""
    if (gfp & __GFP_DMA32) != 0 and mem.zone[zone].end_pfn > _DMA32_PAGES:
        return False
    return (gfp & __GFP_THISNODE) == 0 or mem.zone[zone].node == node


@compiled
def get_page_from_freelist(
    mem: Memory, gfp: int, order: int, alloc_flags: int, user_addr: int, node: int, cpu: int
) -> int:
    """Take a prepared page from the first zone that may give one, or return NO_PAGE."""
    migratetype = gfp_migratetype(gfp)
    preferred = True
    for k in range(mem.vm[0].nr_zones):
        zone = mem.zonelists[node, k]
        if not zone_allowed(mem, zone, gfp, node):
            continue
        reserve = 0 if preferred else mem.zone[zone].lowmem_reserve
        preferred = False
        mark = watermark(mem, zone, alloc_flags)
        if not __zone_watermark_ok(mem, zone, order, mark, reserve, alloc_flags):
            continue
        pfn = NO_PAGE
        zeroed = False
        if pcp_allowed_order(order):
            pfn, zeroed = __rmqueue_pcplist(mem, zone, order, migratetype, alloc_flags, cpu)
        if pfn == NO_PAGE:
            pfn, zeroed = rmqueue_buddy(mem, zone, order, migratetype, alloc_flags)
        if pfn != NO_PAGE:
            prep_new_page(mem, pfn, order, gfp, user_addr, zeroed)
            if (alloc_flags & ALLOC_HIGHATOMIC) != 0 and order > 0:
                reserve_highatomic_pageblock(mem, zone, pfn, order)
            return pfn
    return NO_PAGE


@compiled
def __alloc_pages_slowpath(mem: Memory, gfp: int, order: int, user_addr: int, node: int, cpu: int) -> int:
    """Try again nearer to the reserves, then with everything parked given back.

    Source: same name. There is no page cache here, so direct reclaim is what Linux does
    last: drain the per-CPU lists and release highatomic pageblocks. OOM notifiers run in
    `MemoryManager`, outside compiled code.
    """
    alloc_flags = ALLOC_WMARK_MIN
    if gfp_migratetype(gfp) == MIGRATE_MOVABLE:
        alloc_flags |= ALLOC_CMA
    if (gfp & __GFP_HIGH) != 0:
        alloc_flags |= ALLOC_MIN_RESERVE
    if (gfp & __GFP_DIRECT_RECLAIM) == 0:
        if (gfp & __GFP_NOMEMALLOC) == 0:
            alloc_flags |= ALLOC_NON_BLOCK
            if order > 0 and (gfp & __GFP_HIGH) != 0:
                alloc_flags |= ALLOC_HIGHATOMIC
        return get_page_from_freelist(mem, gfp, order, alloc_flags, user_addr, node, cpu)
    pfn = get_page_from_freelist(mem, gfp, order, alloc_flags, user_addr, node, cpu)
    if pfn != NO_PAGE:
        return pfn
    mem.vm[0].allocstall += 1
    drain_all_pages(mem)
    for zone in range(mem.vm[0].nr_zones):
        unreserve_highatomic_pageblock(mem, zone, gfp_migratetype(gfp))
    return get_page_from_freelist(mem, gfp, order, alloc_flags, user_addr, node, cpu)


@compiled
def alloc_from_zonelists(mem: Memory, gfp: int, order: int, user_addr: int, node: int, cpu: int) -> int:
    """Allocate a block from any zone, or return NO_PAGE: the whole of `__alloc_frozen_pages`."""
    alloc_flags = ALLOC_WMARK_LOW
    if gfp_migratetype(gfp) == MIGRATE_MOVABLE:
        alloc_flags |= ALLOC_CMA
    pfn = get_page_from_freelist(mem, gfp, order, alloc_flags, user_addr, node, cpu)
    if pfn == NO_PAGE:
        pfn = __alloc_pages_slowpath(mem, gfp, order, user_addr, node, cpu)
        if pfn == NO_PAGE:
            mem.vm[0].alloc_fail += 1
    return pfn


@inline
def __alloc_frozen_pages(mem: Memory, gfp: int, order: int, user_addr: int, node: int, cpu: int) -> int:
    """Allocate a block without a reference, or return NO_PAGE (kernel: same name).

    An order-0 request that its CPU's list can serve is answered right here, behind the test
    of `zone_watermark_fast`; everything else takes the long way.
    """
    if order == 0 and (gfp & (__GFP_DMA32 | __GFP_THISNODE)) == 0:
        zone = mem.zonelists[node, 0]
        z = mem.zone[zone]
        spare = z.nr_free_pages - z.nr_free_cma - z.nr_free_highatomic
        if spare > z.watermark_low + z.watermark_boost:
            alloc_flags = ALLOC_WMARK_LOW
            if gfp_migratetype(gfp) == MIGRATE_MOVABLE:
                alloc_flags |= ALLOC_CMA
            pfn, zeroed = __rmqueue_pcplist(mem, zone, 0, gfp_migratetype(gfp), alloc_flags, cpu)
            if pfn != NO_PAGE:
                prep_new_page(mem, pfn, 0, gfp, user_addr, zeroed)
                return pfn
    return alloc_from_zonelists(mem, gfp, order, user_addr, node, cpu)


@compiled
def __free_pages_ok(mem: Memory, pfn: int, order: int, fpi_flags: int) -> None:
    """Free a block that has no per-CPU list (kernel: same name; patch 33)."""
    if not __free_pages_prepare(mem, pfn, order, fpi_flags):
        return
    if fpi_zeroed_holds(mem, fpi_flags):
        __SetPageZeroed(mem, pfn)
    split_large_buddy(mem, page_zone(mem, pfn), pfn, order, fpi_flags)


@inline
def __free_frozen_pages(mem: Memory, pfn: int, order: int, fpi_flags: int, cpu: int) -> None:
    """Free a block that has no reference left (kernel: same name; patch 33).

    `PG_zeroed` is set after prepare has cleared everything, never before: prepare is what
    keeps a filesystem's `PG_private` from passing as a claim.
    """
    if not pcp_allowed_order(order):
        __free_pages_ok(mem, pfn, order, fpi_flags)
        return
    if not __free_pages_prepare(mem, pfn, order, fpi_flags):
        return
    if fpi_zeroed_holds(mem, fpi_flags):
        __SetPageZeroed(mem, pfn)
    zone = page_zone(mem, pfn)
    migratetype = get_pageblock_migratetype(mem, pfn)
    if migratetype >= MIGRATE_PCPTYPES:
        if migratetype == MIGRATE_ISOLATE:
            split_large_buddy(mem, zone, pfn, order, fpi_flags)
            return
        # CMA and highatomic pages share the movable list; the drain sorts them again.
        migratetype = MIGRATE_MOVABLE
    free_frozen_page_commit(mem, zone, pfn, migratetype, order, cpu)


@inline
def put_page_testzero(mem: Memory, pfn: int) -> bool:
    """Drop a reference; return whether it was the last (kernel: same name)."""
    if VM_BUG_ON_PAGE(mem, mem.mem_map[pfn]._refcount <= 0, pfn):
        raise VmBug("put_page_testzero: the page has no reference")
    mem.mem_map[pfn]._refcount -= 1
    return mem.mem_map[pfn]._refcount == 0


@compiled
def alloc_pages(mem: Memory, gfp: int, order: int, user_addr: int, node: int, cpu: int) -> int:
    """Allocate a block with one reference, or return NO_PAGE (kernel: `alloc_pages`)."""
    pfn = __alloc_frozen_pages(mem, gfp, order, user_addr, node, cpu)
    if pfn != NO_PAGE:
        mem.mem_map[pfn]._refcount = 1
    return pfn


@compiled
def alloc_pages_bulk(mem: Memory, gfp: int, order: int, node: int, cpu: int, pfns: object) -> int:
    """Fill `pfns` with blocks of one order; return how many there were (kernel: same name).

    `user_addr` is `USER_ADDR_NONE` for each of them (patch 7, v4 fix).
    """
    for i in range(len(pfns)):  # type: ignore[arg-type]
        pfn = __alloc_frozen_pages(mem, gfp, order, -1, node, cpu)
        if pfn == NO_PAGE:
            return i
        mem.mem_map[pfn]._refcount = 1
        pfns[i] = pfn  # type: ignore[index]
    return len(pfns)  # type: ignore[arg-type]


@compiled
def __free_pages(mem: Memory, pfn: int, order: int, cpu: int) -> bool:
    """Drop a reference to a block; free it if that was the last (kernel: same name).

    Returns whether the block was freed. A block that is not compound and keeps a
    reference on its first page loses the others, as in the kernel.
    """
    compound = compound_order(mem, pfn) > 0
    if put_page_testzero(mem, pfn):
        __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)
        return True
    if not compound:
        while order > 0:
            order -= 1
            __free_frozen_pages(mem, pfn + (1 << order), order, FPI_NONE, cpu)
    return False


@compiled
def free_pages_bulk(mem: Memory, pfns: object, order: int, cpu: int) -> None:
    """Drop a reference to each of many blocks of one order."""
    for i in range(len(pfns)):  # type: ignore[arg-type]
        pfn = pfns[i]  # type: ignore[index]
        if put_page_testzero(mem, pfn):
            __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)


@compiled
def free_frozen_pages_zeroed(mem: Memory, pfn: int, order: int, cpu: int) -> None:
    """Free a block that its owner knows to be zero (patch 33)."""
    __free_frozen_pages(mem, pfn, order, FPI_ZEROED, cpu)


@compiled
def put_page_zeroed(mem: Memory, pfn: int, cpu: int) -> bool:
    """Drop a reference to a folio that is known to be zero; return whether it was freed.

    Source: patch 35, `put_page_zeroed` and `folio_put_zeroed`. Only the last put frees it
    as zero: whoever holds another reference may still write, and the hint is lost.
    """
    if not put_page_testzero(mem, pfn):
        return False
    __free_frozen_pages(mem, pfn, compound_order(mem, pfn), FPI_ZEROED, cpu)
    return True


@compiled
def put_page(mem: Memory, pfn: int, cpu: int) -> bool:
    """Drop a reference to a folio; return whether it was freed (kernel: `folio_put`)."""
    if not put_page_testzero(mem, pfn):
        return False
    __free_frozen_pages(mem, pfn, compound_order(mem, pfn), FPI_NONE, cpu)
    return True
