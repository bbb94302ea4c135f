# SPDX-License-Identifier: GPL-2.0-only
"""Whether a zone may serve a request (kernel: `mm/page_alloc.c`, `__zone_watermark_ok`)."""

from __future__ import annotations

from hostzero.jit import compiled, inline
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
)
from hostzero.mm.gfp import __GFP_DMA32, __GFP_THISNODE
from hostzero.mm.list import list_empty
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_PCPTYPES,
    NR_PAGE_ORDERS,
    Memory,
    free_list,
)
from hostzero.units import PAGE_SHIFT

_DMA32_PAGES = (4 << 30) >> PAGE_SHIFT


@inline
def zone_allowed(mem: Memory, zone: int, gfp: int, node: int) -> bool:
    """Return whether `gfp` permits pages of this zone."""
    if (gfp & __GFP_DMA32) != 0 and mem.zone[zone].end_pfn > _DMA32_PAGES:
        return False
    return (gfp & __GFP_THISNODE) == 0 or mem.zone[zone].node == node % mem.vm[0].nr_nodes


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
