# SPDX-License-Identifier: GPL-2.0-only
"""Where a request goes when its own migrate type has no free block.

Kernel: `mm/page_alloc.c`, `find_suitable_fallback` to `__rmqueue` (Linux 7.2). A block
is claimed whole if most of its pageblock is free or alike, else a page is stolen from
the smallest sufficient block. Claiming a whole pageblock keeps `PG_reported` and
`PG_zeroed` on the parts given back (patches 3 and 26).
"""

from __future__ import annotations

from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import (
    __rmqueue_smallest,
    account_freepages,
    buddy_order,
    del_page_from_free_list,
    expand,
    get_page_from_free_area,
    page_del_and_expand,
    page_reported,
    take_smallest,
)
from hostzero.mm.list import list_add_tail, list_del, list_empty
from hostzero.mm.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    NR_PAGE_ORDERS,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    free_list,
    get_pageblock_migratetype,
    set_pageblock_migratetype,
)
from hostzero.mm.page_flags import PageBuddy, PageZeroed, compound_order

ALLOC_WMARK_MIN = 0
ALLOC_WMARK_LOW = 1
ALLOC_WMARK_HIGH = 2
ALLOC_WMARK_MASK = 3
ALLOC_NO_WATERMARKS = 1 << 2
ALLOC_OOM = 1 << 3
ALLOC_NON_BLOCK = 1 << 4
ALLOC_MIN_RESERVE = 1 << 5
ALLOC_CMA = 1 << 7
ALLOC_NOFRAGMENT = 1 << 8
ALLOC_HIGHATOMIC = 1 << 9
ALLOC_RESERVES = ALLOC_NON_BLOCK | ALLOC_MIN_RESERVE | ALLOC_HIGHATOMIC | ALLOC_OOM

_SHOULD_NOT_CLAIM = -2
_NONE = -1

# A request at least this large claims the pageblock it came from.
_CLAIM_ORDER = PAGEBLOCK_ORDER // 2


@inline
def fallback_type(migratetype: int, index: int) -> int:
    """Return the `index`-th (0 or 1) type to fall back to (kernel: `fallbacks[][]`)."""
    if migratetype == MIGRATE_UNMOVABLE:
        return MIGRATE_RECLAIMABLE if index == 0 else MIGRATE_MOVABLE
    if migratetype == MIGRATE_MOVABLE:
        return MIGRATE_RECLAIMABLE if index == 0 else MIGRATE_UNMOVABLE
    return MIGRATE_UNMOVABLE if index == 0 else MIGRATE_MOVABLE


@inline
def should_try_claim_block(order: int, start_type: int) -> bool:
    """Return whether a fallback should claim the pageblock (kernel: same name).

    Kernel pages claim always: they cannot be moved away later. Movable ones claim
    only for large requests, because they can.
    """
    return order >= _CLAIM_ORDER or start_type in (MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE)


@inline
def find_suitable_fallback(mem: Memory, zone: int, order: int, migratetype: int, claimable: bool) -> int:
    """Return a type with a free block of `order`, -1 for none, -2 for not worth claiming."""
    if claimable and not should_try_claim_block(order, migratetype):
        return _SHOULD_NOT_CLAIM
    if mem.zone[zone].nr_free[order] == 0:
        return _NONE
    for index in range(2):
        candidate = fallback_type(migratetype, index)
        if not list_empty(mem, free_list(mem, zone, order, candidate)):
            return candidate
    return _NONE


@inline
def block_within_zone(mem: Memory, zone: int, pfn: int) -> bool:
    """Return whether the whole pageblock of `pfn` belongs to `zone`."""
    start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
    end = start + PAGEBLOCK_NR_PAGES
    return start >= mem.zone[zone].start_pfn and end <= mem.zone[zone].end_pfn


@compiled
def __move_freepages_block(mem: Memory, zone: int, start: int, old: int, new: int) -> int:
    """Move a pageblock's free blocks to another type's lists; return how many pages.

    They go to the tail, with their flags as they are (kernel: `__move_freepages_block`).
    """
    moved = 0
    pfn = start
    end = start + PAGEBLOCK_NR_PAGES
    while pfn < end:
        if not PageBuddy(mem, pfn):
            pfn += 1
            continue
        order = buddy_order(mem, pfn)
        list_del(mem, pfn)
        list_add_tail(mem, pfn, free_list(mem, zone, order, new))
        moved += 1 << order
        pfn += 1 << order
    account_freepages(mem, zone, -moved, old)
    account_freepages(mem, zone, moved, new)
    return moved


@compiled
def try_to_claim_block(
    mem: Memory, zone: int, pfn: int, current_order: int, order: int, start_type: int, block_type: int
) -> int:
    """Make a pageblock the requester's own if that is fair; return a page or NO_PAGE.

    Source: `try_to_claim_block`. From pageblock order on the block is taken off, retyped
    and cut, its parts keeping `PG_reported` and `PG_zeroed` (patches 3 and 26).
    """
    if current_order >= PAGEBLOCK_ORDER:
        reported = page_reported(mem, pfn)
        zeroed = PageZeroed(mem, pfn)
        del_page_from_free_list(mem, pfn, zone, current_order, block_type)
        for block in range(pfn, pfn + (1 << current_order), PAGEBLOCK_NR_PAGES):
            set_pageblock_migratetype(mem, block, start_type)
        added = expand(mem, pfn, zone, order, current_order, start_type, reported, zeroed)
        account_freepages(mem, zone, added, start_type)
        return pfn
    if not block_within_zone(mem, zone, pfn):
        return NO_PAGE
    start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
    free_pages = 0
    movable_pages = 0
    page = start
    while page < start + PAGEBLOCK_NR_PAGES:
        if PageBuddy(mem, page):
            free_pages += 1 << buddy_order(mem, page)
            page += 1 << buddy_order(mem, page)
            continue
        # The kernel counts LRU and movable-ops pages; here these are the mapped ones, of which
        # a folio's head alone says so.
        count = 1 << compound_order(mem, page)
        if mem.mem_map[page].mapping != 0:
            movable_pages += count
        page += count
    if start_type == MIGRATE_MOVABLE:
        alike_pages = movable_pages
    elif block_type == MIGRATE_MOVABLE:
        alike_pages = PAGEBLOCK_NR_PAGES - (free_pages + movable_pages)
    else:
        # The pages of an unmovable block may be reclaimable or not: nothing is known.
        alike_pages = 0
    if free_pages + alike_pages >= 1 << (PAGEBLOCK_ORDER - 1):
        __move_freepages_block(mem, zone, start, block_type, start_type)
        set_pageblock_migratetype(mem, start, start_type)
        return __rmqueue_smallest(mem, zone, order, start_type)
    return NO_PAGE


@compiled
def __rmqueue_claim(mem: Memory, zone: int, order: int, start_type: int, alloc_flags: int) -> int:
    """Try to claim a pageblock of another type, largest free block first."""
    min_order = order
    if order < PAGEBLOCK_ORDER and (alloc_flags & ALLOC_NOFRAGMENT) != 0:
        min_order = PAGEBLOCK_ORDER
    current = MAX_PAGE_ORDER
    while current >= min_order:
        candidate = find_suitable_fallback(mem, zone, current, start_type, True)
        if candidate == _SHOULD_NOT_CLAIM:
            break
        if candidate != _NONE:
            pfn = get_page_from_free_area(mem, zone, current, candidate)
            pfn = try_to_claim_block(mem, zone, pfn, current, order, start_type, candidate)
            if pfn != NO_PAGE:
                mem.vm[0].fallback_claims += 1
                return pfn
        current -= 1
    return NO_PAGE


@compiled
def __rmqueue_steal(mem: Memory, zone: int, order: int, start_type: int) -> int:
    """Take a page from another type's smallest sufficient block, which keeps its type."""
    for current in range(order, NR_PAGE_ORDERS):
        candidate = find_suitable_fallback(mem, zone, current, start_type, False)
        if candidate == _NONE:
            continue
        pfn = get_page_from_free_area(mem, zone, current, candidate)
        page_del_and_expand(mem, pfn, zone, order, current, candidate)
        mem.vm[0].fallback_steals += 1
        return pfn
    return NO_PAGE


@far
def __rmqueue_fallback(mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int) -> int:
    """Take a block although the own type has none: CMA, then claim, then steal.

    Source: the second half of `__rmqueue`. The own type is looked at once more, because the
    first half may have looked at CMA instead.
    """
    pfn = __rmqueue_smallest(mem, zone, order, migratetype)
    if pfn != NO_PAGE:
        return pfn
    if (alloc_flags & ALLOC_CMA) != 0:
        pfn = __rmqueue_smallest(mem, zone, order, MIGRATE_CMA)
        if pfn != NO_PAGE:
            return pfn
    pfn = __rmqueue_claim(mem, zone, order, migratetype, alloc_flags)
    if pfn == NO_PAGE and (alloc_flags & ALLOC_NOFRAGMENT) == 0:
        pfn = __rmqueue_steal(mem, zone, order, migratetype)
    return pfn


@inline
def own_migratetype(mem: Memory, zone: int, migratetype: int, alloc_flags: int) -> int:
    """Return the type whose lists a request looks at first (kernel: head of `__rmqueue`)."""
    if (alloc_flags & ALLOC_CMA) != 0 and mem.zone[zone].nr_free_cma > mem.zone[zone].nr_free_pages // 2:
        # Balance: movable pages use CMA areas once these hold most of the free memory.
        return MIGRATE_CMA
    return migratetype


@inline
def __rmqueue(mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int) -> int:
    """Take a block of the own type, or fall back (kernel: `__rmqueue`)."""
    pfn = take_smallest(mem, zone, order, own_migratetype(mem, zone, migratetype, alloc_flags))
    if pfn == NO_PAGE:
        pfn = __rmqueue_fallback(mem, zone, order, migratetype, alloc_flags)
    return pfn


@far
def reserve_highatomic_pageblock(mem: Memory, zone: int, pfn: int, order: int) -> None:
    """Set the pageblock of an atomic high-order allocation aside (kernel: same name).

    At most 1 % of the zone is reserved in this way, rounded up to whole pageblocks; a zone
    whose 1 % is less than a pageblock reserves nothing.
    """
    limit = mem.zone[zone].managed_pages // 100
    if limit < PAGEBLOCK_NR_PAGES or mem.zone[zone].nr_reserved_highatomic >= limit:
        return
    old = get_pageblock_migratetype(mem, pfn)
    if old > MIGRATE_RECLAIMABLE or order >= PAGEBLOCK_ORDER or not block_within_zone(mem, zone, pfn):
        return
    start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
    __move_freepages_block(mem, zone, start, old, MIGRATE_HIGHATOMIC)
    set_pageblock_migratetype(mem, pfn, MIGRATE_HIGHATOMIC)
    mem.zone[zone].nr_reserved_highatomic += PAGEBLOCK_NR_PAGES


@far
def unreserve_highatomic_pageblock(mem: Memory, zone: int, migratetype: int) -> bool:
    """Give one reserved pageblock with free pages back to ordinary use (kernel: same name)."""
    for order in range(NR_PAGE_ORDERS):
        pfn = get_page_from_free_area(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn == NO_PAGE:
            continue
        start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
        __move_freepages_block(mem, zone, start, MIGRATE_HIGHATOMIC, migratetype)
        # Two neighbouring reserved pageblocks may have merged into one free block.
        for block in range(start, start + max(1 << order, PAGEBLOCK_NR_PAGES), PAGEBLOCK_NR_PAGES):
            set_pageblock_migratetype(mem, block, migratetype)
            mem.zone[zone].nr_reserved_highatomic -= PAGEBLOCK_NR_PAGES
        return True
    return False
