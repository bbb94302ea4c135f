# SPDX-License-Identifier: GPL-2.0-only
"""Taking free blocks off the lists without allocating them, and putting them back.

Kernel: `__isolate_free_page` and `__putback_isolated_page` (`mm/page_alloc.c`). A zero hint
ends at isolation: whoever isolates a block (page reporting, compaction) may not be the
one who knows whether it is still zero, and the alias must not leak to it as PG_private.
"""

from __future__ import annotations

from hostzero.jit import inline
from hostzero.mm.buddy import FPI_SKIP_REPORT_NOTIFY, FPI_TO_TAIL, __free_one_page, del_page_from_free_list
from hostzero.mm.fallback import ALLOC_CMA, __move_freepages_block, block_within_zone
from hostzero.mm.mmzone import (
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    get_pageblock_migratetype,
    migratetype_is_mergeable,
    page_zone,
    set_pageblock_migratetype,
)
from hostzero.mm.page_flags import __ClearPageZeroed
from hostzero.mm.watermark import __zone_watermark_ok


@inline
def __isolate_free_page(mem: Memory, pfn: int, order: int) -> bool:
    """Take a free block off its list; False if the zone would fall below its minimum.

    Source: `__isolate_free_page`; the zero hint is cleared here (series, lifecycle table).
    """
    zone = page_zone(mem, pfn)
    migratetype = get_pageblock_migratetype(mem, pfn)
    if migratetype != MIGRATE_ISOLATE:
        mark = mem.zone[zone].watermark_min + (1 << order)
        if not __zone_watermark_ok(mem, zone, 0, mark, 0, ALLOC_CMA):
            return False
    del_page_from_free_list(mem, pfn, zone, order, migratetype)
    __ClearPageZeroed(mem, pfn)
    if order >= PAGEBLOCK_ORDER - 1:
        # Half a pageblock or more is free: the block becomes movable, if it may merge at all.
        # What else is free in it moves along: a list holds blocks of its own type only.
        for page in range(pfn, pfn + (1 << order), PAGEBLOCK_NR_PAGES):
            old = get_pageblock_migratetype(mem, page)
            if old == MIGRATE_MOVABLE or not migratetype_is_mergeable(old):
                continue
            if block_within_zone(mem, zone, page):
                start = page & ~(PAGEBLOCK_NR_PAGES - 1)
                __move_freepages_block(mem, zone, start, old, MIGRATE_MOVABLE)
                set_pageblock_migratetype(mem, page, MIGRATE_MOVABLE)
    return True


@inline
def __putback_isolated_page(mem: Memory, pfn: int, order: int) -> None:
    """Put an isolated block back, at the cold end and without a new reporting request."""
    migratetype = get_pageblock_migratetype(mem, pfn)
    zone = page_zone(mem, pfn)
    __free_one_page(mem, pfn, zone, order, migratetype, FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL)
