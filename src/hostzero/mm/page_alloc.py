# SPDX-License-Identifier: GPL-2.0-only
"""Allocating pages (kernel: `mm/page_alloc.c`, Linux 7.2).

The way of an allocation: `__alloc_frozen_pages` → `get_page_from_freelist` → `rmqueue` →
`prep_new_page` → `post_alloc_hook`; `user_addr` travels the whole way (patch 7).
"Frozen" pages have no reference; the functions without the word give one.
"""

from __future__ import annotations

from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import __rmqueue_smallest
from hostzero.mm.compaction import (
    COMPACT_DEFERRED,
    COMPACT_PRIO_ASYNC,
    COMPACT_PRIO_SYNC_LIGHT,
    COMPACT_SKIPPED,
    compaction_defer_reset,
    take_captured_page,
    try_to_compact_pages,
)
from hostzero.mm.debug import lockdep_assert_zone_not_held
from hostzero.mm.fallback import (
    ALLOC_CMA,
    ALLOC_HIGHATOMIC,
    ALLOC_MIN_RESERVE,
    ALLOC_NON_BLOCK,
    ALLOC_OOM,
    ALLOC_WMARK_LOW,
    ALLOC_WMARK_MIN,
    __rmqueue,
    own_migratetype,
    reserve_highatomic_pageblock,
    unreserve_highatomic_pageblock,
)
from hostzero.mm.gfp import (
    __GFP_DIRECT_RECLAIM,
    __GFP_DMA32,
    __GFP_HIGH,
    __GFP_IO,
    __GFP_NOMEMALLOC,
    __GFP_NORETRY,
    __GFP_THISNODE,
    gfp_migratetype,
)
from hostzero.mm.mmzone import (
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    NO_PAGE,
    PAGE_ALLOC_COSTLY_ORDER,
    Memory,
    page_zone,
)
from hostzero.mm.page_flags import PageZeroed, __ClearPageZeroed
from hostzero.mm.pcplist import (
    __rmqueue_pcplist,
    drain_all_pages,
    pcp_allowed_order,
    rmqueue_pcplist,
)
from hostzero.mm.placement import __rmqueue_fitting, wants_zeros
from hostzero.mm.prep import check_new_pages, prep_new_page
from hostzero.mm.watermark import __zone_watermark_ok, watermark, zone_allowed


@far
def rmqueue_buddy(
    mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int, gfp: int
) -> tuple[int, bool]:
    """Take a block straight from the buddy lists; return it and its zero hint.

    Source: same name; patch 22: the hint is read and cleared before the page is checked.
    """
    lockdep_assert_zone_not_held(mem, zone)
    while True:
        pfn = NO_PAGE
        if (alloc_flags & ALLOC_HIGHATOMIC) != 0:
            pfn = __rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn == NO_PAGE and mem.vm[0].placement != 0:
            own = own_migratetype(mem, zone, migratetype, alloc_flags)
            pfn = __rmqueue_fitting(mem, zone, order, own, wants_zeros(mem, gfp))
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


@compiled
def get_page_from_freelist(
    mem: Memory, gfp: int, order: int, alloc_flags: int, user_addr: int, node: int, cpu: int
) -> int:
    """Take a prepared page from the first zone that may give one, or return NO_PAGE.

    `node` is a row of the zonelists: a node, or what `mempolicy.vma_zonelist` returned.
    """
    migratetype = gfp_migratetype(gfp)
    preferred = True
    for k in range(mem.vm[0].nr_zones):
        zone = mem.zonelists[node, k]
        if zone < 0:
            break
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
            pfn, zeroed = rmqueue_pcplist(mem, zone, order, migratetype, alloc_flags, gfp, cpu)
        if pfn == NO_PAGE:
            pfn, zeroed = rmqueue_buddy(mem, zone, order, migratetype, alloc_flags, gfp)
        if pfn != NO_PAGE:
            prep_new_page(mem, pfn, order, gfp, user_addr, zeroed)
            if (alloc_flags & ALLOC_HIGHATOMIC) != 0 and order > 0:
                reserve_highatomic_pageblock(mem, zone, pfn, order)
            return pfn
    return NO_PAGE


@far
def __alloc_pages_direct_compact(
    mem: Memory, gfp: int, order: int, alloc_flags: int, user_addr: int, node: int, prio: int, cpu: int
) -> tuple[int, int]:
    """Compact and try again; return the page or NO_PAGE, and what compaction said.

    Source: same name; patch 22 for the captured page. It goes from `__free_one_page` to its
    owner without having been on a list, so what its free said of it holds: a zero mark is read
    and cleared here as `rmqueue_buddy` does, and serves the allocation. The series only
    demands that it must not survive as `PG_private`.
    """
    result = try_to_compact_pages(mem, gfp, order, alloc_flags, node, prio, cpu)
    if result == COMPACT_SKIPPED:
        return NO_PAGE, result
    mem.vm[0].compact_stall += 1
    pfn = take_captured_page(mem)
    if pfn != NO_PAGE:
        zeroed = PageZeroed(mem, pfn)
        __ClearPageZeroed(mem, pfn)
        prep_new_page(mem, pfn, order, gfp, user_addr, zeroed)
    else:
        pfn = get_page_from_freelist(mem, gfp, order, alloc_flags, user_addr, node, cpu)
    if pfn == NO_PAGE:
        mem.vm[0].compact_fail += 1
    else:
        compaction_defer_reset(mem, page_zone(mem, pfn), order, True)
        mem.vm[0].compact_success += 1
    return pfn, result


@far
def __alloc_pages_slowpath(mem: Memory, gfp: int, order: int, user_addr: int, node: int, cpu: int) -> int:
    """Try again nearer to the reserves, then with everything parked given back.

    Source: same name. There is no page cache here, so direct reclaim is what Linux does
    last: drain the per-CPU lists and release highatomic pageblocks. Compaction comes before
    it for costly orders and kernel pages, and after it for every order above 0. OOM notifiers
    run in `MemoryManager`, outside compiled code.
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
    can_compact = order > 0 and (gfp & __GFP_IO) != 0
    costly = order > PAGE_ALLOC_COSTLY_ORDER
    prio = COMPACT_PRIO_SYNC_LIGHT
    if can_compact and (costly or gfp_migratetype(gfp) != MIGRATE_MOVABLE):
        pfn, result = __alloc_pages_direct_compact(
            mem, gfp, order, alloc_flags, user_addr, node, COMPACT_PRIO_ASYNC, cpu
        )
        if pfn != NO_PAGE:
            return pfn
        if costly and (gfp & __GFP_NORETRY) != 0:
            if result == COMPACT_SKIPPED or result == COMPACT_DEFERRED:
                return NO_PAGE
            prio = COMPACT_PRIO_ASYNC
    mem.vm[0].allocstall += 1
    drain_all_pages(mem)
    for zone in range(mem.vm[0].nr_zones):
        unreserve_highatomic_pageblock(mem, zone, gfp_migratetype(gfp))
    pfn = get_page_from_freelist(mem, gfp, order, alloc_flags, user_addr, node, cpu)
    if pfn == NO_PAGE and can_compact:
        pfn, result = __alloc_pages_direct_compact(mem, gfp, order, alloc_flags, user_addr, node, prio, cpu)
    return pfn


@far
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
    of `zone_watermark_fast`; everything else, another placement too, takes the long way.
    """
    if order == 0 and (gfp & (__GFP_DMA32 | __GFP_THISNODE)) == 0 and mem.vm[0].placement == 0:
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
