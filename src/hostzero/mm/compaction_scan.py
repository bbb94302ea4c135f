# SPDX-License-Identifier: GPL-2.0-only
"""Compaction's two scanners and the free blocks that it holds (kernel: `mm/compaction.c`).

One scanner goes up from the start of a zone and isolates movable folios, the other comes
down from the end and isolates free blocks for them; they stop where they meet. Both see
`mem.cc`, of which there is one: compaction never runs inside compaction.

Pageblocks are not marked to be skipped, as Linux marks them; a failure defers the next
attempt all the same (`compaction`), and the scanners go on where they were.
"""

from __future__ import annotations

from hostzero.jit import compiled, inline
from hostzero.mm.balloon import balloon_page_isolate
from hostzero.mm.buddy import FPI_NONE, buddy_order
from hostzero.mm.gfp import __GFP_MOVABLE, USER_ADDR_NONE
from hostzero.mm.list import list_add, list_add_tail, list_del, list_empty, list_first
from hostzero.mm.migrate_folio import folio_isolate
from hostzero.mm.mmzone import (
    COMPACT_CLUSTER_MAX,
    MIGRATE_CMA,
    MIGRATE_MOVABLE,
    NO_PAGE,
    NR_PAGE_ORDERS,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    compact_freepages,
    compact_migratepages,
    compact_movable_ops,
    get_pageblock_migratetype,
)
from hostzero.mm.page_flags import PageBuddy, PGTY_offline, compound_head, compound_order
from hostzero.mm.page_free import __free_frozen_pages
from hostzero.mm.page_isolation import __isolate_free_page
from hostzero.mm.prep import __free_pages_prepare, post_alloc_hook, prep_compound_page

MIGRATE_ASYNC = 0
MIGRATE_SYNC_LIGHT = 1
MIGRATE_SYNC = 2


@inline
def pageblock_start_pfn(pfn: int) -> int:
    return pfn & ~(PAGEBLOCK_NR_PAGES - 1)


@inline
def is_via_compact_memory(order: int) -> bool:
    """Return whether nobody waits for a block: all of the zone is compacted (kernel: same name)."""
    return order < 0


@inline
def skip_isolation_on_order(order: int, target_order: int) -> bool:
    """Return whether moving a folio of `order` would gain nothing (kernel: same name)."""
    return order >= PAGEBLOCK_ORDER or (not is_via_compact_memory(target_order) and order >= target_order)


@inline
def suitable_migration_source(mem: Memory, block: int) -> bool:
    """Return whether folios may be taken out of a pageblock (kernel: same name).

    Asynchronous compaction keeps to blocks of the wanted type, which it can leave whole.
    """
    cc = mem.cc[0]
    if cc.mode != MIGRATE_ASYNC or cc.direct_compaction == 0:
        return True
    migratetype = get_pageblock_migratetype(mem, block)
    if cc.migratetype == MIGRATE_MOVABLE:
        return migratetype == MIGRATE_MOVABLE or migratetype == MIGRATE_CMA
    return migratetype == cc.migratetype


@inline
def suitable_migration_target(mem: Memory, block: int) -> bool:
    """Return whether folios may be moved into a pageblock (kernel: same name).

    Not if it starts with a free block that is large enough to be what is wanted.
    """
    if PageBuddy(mem, block):
        wanted = mem.cc[0].order if mem.cc[0].order > 0 else PAGEBLOCK_ORDER
        if buddy_order(mem, block) >= wanted:
            return False
    migratetype = get_pageblock_migratetype(mem, block)
    return migratetype == MIGRATE_MOVABLE or migratetype == MIGRATE_CMA


@compiled
def isolate_migratepages_block(mem: Memory, start: int, end: int) -> int:
    """Isolate up to `COMPACT_CLUSTER_MAX` pages of a pageblock; return where the scan stopped.

    Balloon pages are left alone unless the caller can call their driver (`cc.movable_ops`).
    """
    cc = mem.cc[0]
    pfn = start
    while pfn < end and cc.nr_migratepages < COMPACT_CLUSTER_MAX:
        if PageBuddy(mem, pfn):
            pfn += 1 << buddy_order(mem, pfn)
            continue
        if compound_head(mem, pfn) != pfn:
            pfn += 1
            continue
        order = compound_order(mem, pfn)
        if mem.mem_map[pfn].page_type == PGTY_offline:
            if cc.movable_ops != 0 and balloon_page_isolate(mem, pfn):
                list_add_tail(mem, pfn, compact_movable_ops(mem))
                cc.nr_migratepages += 1
        elif not (order > 0 and skip_isolation_on_order(order, cc.order)) and folio_isolate(mem, pfn):
            list_add_tail(mem, pfn, compact_migratepages(mem))
            cc.nr_migratepages += 1 << order
        pfn += 1 << order
    return min(pfn, end)


@compiled
def isolate_migratepages(mem: Memory) -> int:
    """Isolate folios of the next suitable pageblock; return how many pages (kernel: same name)."""
    cc = mem.cc[0]
    low = cc.migrate_pfn
    block = pageblock_start_pfn(low)
    while block + PAGEBLOCK_NR_PAGES <= cc.free_pfn:
        if suitable_migration_source(mem, block):
            cc.migrate_pfn = isolate_migratepages_block(mem, low, block + PAGEBLOCK_NR_PAGES)
            return cc.nr_migratepages
        block += PAGEBLOCK_NR_PAGES
        low = block
    cc.migrate_pfn = low
    return 0


@compiled
def isolate_freepages_block(mem: Memory, start: int, end: int) -> int:
    """Isolate a pageblock's free blocks until there are enough; return where the scan stopped.

    Source: same name. `__isolate_free_page` refuses at the zone's minimum watermark, and takes
    the zero hint off: whoever is moved here brings contents of its own.
    """
    cc = mem.cc[0]
    pfn = start
    while pfn < end:
        if not PageBuddy(mem, pfn):
            pfn += 1
            continue
        order = buddy_order(mem, pfn)
        if not __isolate_free_page(mem, pfn, order):
            break
        mem.mem_map[pfn].private = order
        list_add_tail(mem, pfn, compact_freepages(mem, order))
        cc.nr_freepages += 1 << order
        pfn += 1 << order
        if cc.nr_freepages >= cc.nr_migratepages:
            break
    return pfn


@compiled
def isolate_freepages(mem: Memory) -> None:
    """Isolate free blocks, coming down from the end of the zone, for all isolated folios."""
    cc = mem.cc[0]
    at = cc.free_pfn
    block = pageblock_start_pfn(at)
    end = min(block + PAGEBLOCK_NR_PAGES, mem.zone[cc.zone].end_pfn)
    low = pageblock_start_pfn(cc.migrate_pfn) + PAGEBLOCK_NR_PAGES
    while block >= low:
        if suitable_migration_target(mem, block):
            at = isolate_freepages_block(mem, at, end)
            if cc.nr_freepages >= cc.nr_migratepages:
                if at >= end:
                    at = block - PAGEBLOCK_NR_PAGES
                break
            if at < end:
                break  # the zone can spare no more
        end = block
        block -= PAGEBLOCK_NR_PAGES
        at = block
    cc.free_pfn = at


@compiled
def compaction_alloc(mem: Memory, order: int) -> int:
    """Return a frozen block to move a folio of `order` to, or NO_PAGE (kernel: same name).

    The compound metadata comes before `post_alloc_hook`, which may zero by folio (patch 11), and
    the hook hears that nothing is known of the contents: isolation took the hint off.
    """
    cc = mem.cc[0]
    scanned = False
    current = order
    while True:
        while current < NR_PAGE_ORDERS and list_empty(mem, compact_freepages(mem, current)):
            current += 1
        if current < NR_PAGE_ORDERS:
            break
        if scanned:
            return NO_PAGE
        isolate_freepages(mem)
        scanned = True
        current = order
    pfn = list_first(mem, compact_freepages(mem, current))
    list_del(mem, pfn)
    while current > order:
        current -= 1
        upper = pfn + (1 << current)
        mem.mem_map[upper].private = current
        list_add(mem, upper, compact_freepages(mem, current))
    if order > 0:
        prep_compound_page(mem, pfn, order)
    post_alloc_hook(mem, pfn, order, __GFP_MOVABLE, USER_ADDR_NONE, False)
    cc.nr_freepages -= 1 << order
    cc.nr_migratepages -= 1 << order
    return pfn


@compiled
def compaction_free(mem: Memory, pfn: int, order: int) -> None:
    """Take an unused target back among the free blocks that compaction holds (kernel: same name)."""
    if not __free_pages_prepare(mem, pfn, order, FPI_NONE):
        return
    mem.mem_map[pfn].private = order
    list_add(mem, pfn, compact_freepages(mem, order))
    mem.cc[0].nr_freepages += 1 << order
    mem.cc[0].nr_migratepages += 1 << order


@compiled
def release_free_list(mem: Memory) -> int:
    """Free every block that compaction still holds; return the highest, or NO_PAGE.

    Source: same name: the blocks become allocated pages first, so that poison and counters
    stay as they are with every page.
    """
    highest = NO_PAGE
    for order in range(NR_PAGE_ORDERS):
        head = compact_freepages(mem, order)
        while not list_empty(mem, head):
            pfn = list_first(mem, head)
            list_del(mem, pfn)
            post_alloc_hook(mem, pfn, order, __GFP_MOVABLE, USER_ADDR_NONE, False)
            __free_frozen_pages(mem, pfn, order, FPI_NONE, mem.cc[0].cpu)
            highest = max(highest, pfn)
    mem.cc[0].nr_freepages = 0
    return highest
