# SPDX-License-Identifier: GPL-2.0-only
"""Taking free memory out of circulation: single blocks, and whole pageblocks.

Kernel: `__isolate_free_page`, `__putback_isolated_page`, `__move_freepages_block_isolate`
(`mm/page_alloc.c`), `mm/page_isolation.c`, Linux 7.2.

A block taken by `__isolate_free_page` is on no list. A zero hint ends there: whoever
isolates a block (page reporting, compaction, contiguous allocation) may not be the one who
knows whether it is still zero, and the alias must not leak to it as PG_private.

An isolated pageblock keeps its free blocks on lists, those of MIGRATE_ISOLATE, from which
nothing is allocated. They only changed lists, so they keep both marks.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import (
    FPI_NONE,
    FPI_PREPARED,
    FPI_SKIP_REPORT_NOTIFY,
    FPI_TO_TAIL,
    __free_one_page,
    buddy_order,
    del_page_from_free_list,
    find_buddy_page_pfn,
    page_reported,
    split_large_buddy,
)
from hostzero.mm.fallback import ALLOC_CMA, __move_freepages_block, block_within_zone
from hostzero.mm.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    NO_PAGE,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    clear_pageblock_isolate,
    get_pageblock_isolate,
    get_pageblock_migratetype,
    get_pageblock_type_before,
    migratetype_is_mergeable,
    page_zone,
    set_pageblock_isolate,
    set_pageblock_migratetype,
)
from hostzero.mm.page_flags import (
    PageBuddy,
    PageHead,
    PageTail,
    PG_reserved,
    PGTY_hugetlb,
    PGTY_offline,
    __ClearPageZeroed,
    compound_head,
    compound_order,
)
from hostzero.mm.prep import free_healthy_pages
from hostzero.mm.watermark import __zone_watermark_ok

PB_ISOLATE_MODE_CMA_ALLOC: Final = 1
"""A CMA pageblock is isolated for an allocation out of it: what is in it counts as movable."""

PB_ISOLATE_MODE_OTHER: Final = 2
"""Any other contiguous allocation: CMA pageblocks belong to somebody else."""


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
    """Put an isolated block back, at the cold end and without a new reporting request.

    A page of it that broke meanwhile stays out; the others go back one by one. A block of
    several pageblocks goes back one by one too, and merges again: one of them may have been isolated
    meanwhile (Linux puts the whole block on the list of the first).
    """
    if mem.vm[0].num_poisoned_pages != 0 and free_healthy_pages(mem, pfn, order, FPI_PREPARED):
        return
    zone = page_zone(mem, pfn)
    fpi_flags = FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL
    if order > PAGEBLOCK_ORDER:
        split_large_buddy(mem, zone, pfn, order, fpi_flags, False)
        return
    __free_one_page(mem, pfn, zone, order, get_pageblock_migratetype(mem, pfn), fpi_flags)


@compiled
def find_large_buddy(mem: Memory, start: int) -> int:
    """Return the head of the free block that begins before `start` and holds it, else `start`."""
    pfn = start
    for order in range(MAX_PAGE_ORDER + 1):
        pfn &= ~((1 << order) - 1)
        if PageBuddy(mem, pfn):
            return pfn if pfn + (1 << buddy_order(mem, pfn)) > start else start
    return start


@far
def __move_freepages_block_isolate(mem: Memory, pfn: int, isolate: bool) -> bool:
    """Move a pageblock's free blocks to the isolated lists or back; False if it cannot be done.

    Source: same name. A free block that is larger than the pageblock is taken off its list and
    freed again pageblock by pageblock; its marks go to the parts (patches 3 and 30), so
    `PG_reported` is read before the deletion, which clears it.
    """
    zone = page_zone(mem, pfn)
    start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
    if isolate == get_pageblock_isolate(mem, pfn) or not block_within_zone(mem, zone, pfn):
        return False
    large = find_large_buddy(mem, start)
    if PageBuddy(mem, large) and buddy_order(mem, large) > PAGEBLOCK_ORDER:
        order = buddy_order(mem, large)
        reported = page_reported(mem, large)
        del_page_from_free_list(mem, large, zone, order, get_pageblock_migratetype(mem, large))
        if isolate:
            set_pageblock_isolate(mem, start)
        else:
            clear_pageblock_isolate(mem, start)
        split_large_buddy(mem, zone, large, order, FPI_NONE, reported)
        return True
    other = get_pageblock_type_before(mem, start)
    if isolate:
        __move_freepages_block(mem, zone, start, other, MIGRATE_ISOLATE)
        set_pageblock_isolate(mem, start)
    else:
        __move_freepages_block(mem, zone, start, MIGRATE_ISOLATE, other)
        clear_pageblock_isolate(mem, start)
    return True


@inline
def page_is_unmovable(mem: Memory, pfn: int) -> tuple[bool, int]:
    """Return whether a page stands in the way of isolation, and how many pages that settles.

    Source: same name. LRU pages are here those that are mapped, pages with movable_ops those
    of the balloon. A page without reference counts as free: it may be parked on a per-CPU
    list, and whether it really is free is seen by `test_pages_isolated`. Decided here: pages
    of hugetlb pools count as unmovable. Linux can move them, but to move one huge page in
    order to make another gains nothing.
    """
    page = mem.mem_map[pfn]
    if (page.flags_f & PG_reserved) != 0:
        return True, 1
    if PageHead(mem, pfn) or PageTail(mem, pfn):
        head = compound_head(mem, pfn)
        if mem.mem_map[head].page_type == PGTY_hugetlb or mem.mem_map[head].mapping == 0:
            return True, 1
        return False, head + (1 << compound_order(mem, head)) - pfn
    if page._refcount == 0:
        return False, (1 << buddy_order(mem, pfn)) if PageBuddy(mem, pfn) else 1
    return page.mapping == 0 and page.page_type != PGTY_offline, 1


@compiled
def has_unmovable_pages(mem: Memory, start: int, end: int, mode: int) -> int:
    """Return the first page of a pageblock's part that cannot be moved away, or NO_PAGE.

    Source: same name. In a CMA pageblock nothing is looked at: for its own area everything
    counts as movable, for anybody else nothing does.
    """
    if get_pageblock_migratetype(mem, start) == MIGRATE_CMA:
        return NO_PAGE if mode == PB_ISOLATE_MODE_CMA_ALLOC else start
    pfn = start
    while pfn < end:
        unmovable, step = page_is_unmovable(mem, pfn)
        if unmovable:
            return pfn
        pfn += step
    return NO_PAGE


@far
def set_migratetype_isolate(mem: Memory, pfn: int, mode: int) -> bool:
    """Isolate a pageblock; False (-EBUSY) if it is already, or something in it cannot move.

    Source: same name. The whole pageblock is looked at, as Linux does for the first and last
    of a range, which are the only ones that the range may cover in part.
    """
    start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
    if not block_within_zone(mem, page_zone(mem, pfn), pfn) or get_pageblock_isolate(mem, pfn):
        return False
    if has_unmovable_pages(mem, start, start + PAGEBLOCK_NR_PAGES, mode) != NO_PAGE:
        return False
    return __move_freepages_block_isolate(mem, start, True)


@far
def unset_migratetype_isolate(mem: Memory, pfn: int) -> None:
    """Give an isolated pageblock its migrate type back (kernel: same name).

    A whole free pageblock whose neighbour is free and not isolated is taken off and put back,
    so that the two merge. That is an isolation like any other, and its zero hint is lost
    (series, lifecycle table: unisolate).
    """
    if not get_pageblock_isolate(mem, pfn):
        return
    start = pfn & ~(PAGEBLOCK_NR_PAGES - 1)
    if PageBuddy(mem, start):
        order = buddy_order(mem, start)
        if order >= PAGEBLOCK_ORDER and order < MAX_PAGE_ORDER:
            buddy = find_buddy_page_pfn(mem, start, order)
            if buddy != NO_PAGE and not get_pageblock_isolate(mem, buddy):
                __isolate_free_page(mem, start, order)
                clear_pageblock_isolate(mem, start)
                __putback_isolated_page(mem, start, order)
                return
    __move_freepages_block_isolate(mem, start, False)


@compiled
def undo_isolate_page_range(mem: Memory, start: int, end: int) -> None:
    """Make the isolated pageblocks of `[start, end)`, rounded outwards, ordinary again."""
    pfn = start & ~(PAGEBLOCK_NR_PAGES - 1)
    while pfn < end:
        unset_migratetype_isolate(mem, pfn)
        pfn += PAGEBLOCK_NR_PAGES


@compiled
def start_isolate_page_range(mem: Memory, start: int, end: int, mode: int) -> bool:
    """Isolate every pageblock of `[start, end)`, rounded outwards; all or none.

    Source: same name. From here on no page of the range is allocated, and what is freed into
    it stays there. Pages parked on per-CPU lists are the caller's to drain. False (-EBUSY) if
    a pageblock is isolated already, lies outside the zone of `start`, or holds a page that
    cannot be moved. No movable folio is larger than a pageblock, so none crosses the ends.
    """
    pfn = start & ~(PAGEBLOCK_NR_PAGES - 1)
    while pfn < end:
        if page_zone(mem, pfn) != page_zone(mem, start) or not set_migratetype_isolate(mem, pfn, mode):
            undo_isolate_page_range(mem, start, pfn)
            return False
        pfn += PAGEBLOCK_NR_PAGES
    return True


@compiled
def test_pages_isolated(mem: Memory, start: int, end: int) -> bool:
    """Return whether all pages of a range are free and their pageblocks isolated.

    Source: same name. This is the authority: whatever isolation took for movable or free is
    either on a free list by now, or the range is not to be had.
    """
    pfn = start
    while pfn < end:
        if not get_pageblock_isolate(mem, pfn) or not PageBuddy(mem, pfn):
            return False
        pfn += 1 << buddy_order(mem, pfn)
    return True
