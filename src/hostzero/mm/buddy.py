# SPDX-License-Identifier: GPL-2.0-only
"""Free blocks: merging, splitting, and what becomes of their flags.

Kernel: `mm/page_alloc.c`, `__free_one_page` to `__rmqueue_smallest`. Patches 3, 25, 26
and 30 live here: a block that is split hands `PG_reported` and `PG_zeroed` to its
parts, and a merged block is known zero only if both of its halves were.
"""

from __future__ import annotations

from hostzero.errors import VmBug
from hostzero.jit import compiled, far, inline
from hostzero.mm.debug import VM_BUG_ON_PAGE
from hostzero.mm.list import list_add, list_add_tail, list_del, list_empty, list_first
from hostzero.mm.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    NO_PAGE,
    NR_PAGE_ORDERS,
    PAGEBLOCK_ORDER,
    Memory,
    free_list,
    get_pageblock_migratetype,
    migratetype_is_mergeable,
    set_pageblock_migratetype,
)
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PageBuddy,
    PageReported,
    PageZeroed,
    PG_zeroed,
    __ClearPageBuddy,
    __ClearPageReported,
    __ClearPageZeroed,
    __SetPageBuddy,
    __SetPageReported,
    __SetPageZeroed,
)

FPI_NONE = 0
FPI_SKIP_REPORT_NOTIFY = 1 << 0  # do not tell page reporting of this free
FPI_TO_TAIL = 1 << 1  # put the block at the cold end of its list
FPI_TRYLOCK = 1 << 2  # never wait for a lock: the caller may hold it
FPI_PREPARED = 1 << 3  # __free_pages_prepare has been called for each page already
FPI_ZEROED = 1 << 4  # the page is known to be zero (patch 33; bit 4 as on Linux 7.2)

PAGE_REPORTING_IDLE = 0
PAGE_REPORTING_REQUESTED = 1
PAGE_REPORTING_ACTIVE = 2


@inline
def page_reported(mem: Memory, pfn: int) -> bool:
    """Return whether a free block is reported; False while reporting is off."""
    return mem.vm[0].page_reporting_enabled != 0 and PageReported(mem, pfn)


@inline
def page_reporting_notify_free(mem: Memory, order: int) -> None:
    """Request a reporting pass after a large enough free (kernel: `__page_reporting_request`).

    Compiled code cannot queue work: the request stays in the record and
    `PageReporting` turns it into delayed work before time moves.
    """
    vm = mem.vm[0]
    if vm.page_reporting_enabled != 0 and order >= vm.page_reporting_order:
        if vm.page_reporting_state == PAGE_REPORTING_IDLE:
            vm.page_reporting_requests += 1
        vm.page_reporting_state = PAGE_REPORTING_REQUESTED


@inline
def account_freepages(mem: Memory, zone: int, nr_pages: int, migratetype: int) -> None:
    """Count pages into or out of a zone's free pages; isolated ones are not free."""
    if migratetype == MIGRATE_ISOLATE:
        return
    mem.zone[zone].nr_free_pages += nr_pages
    if migratetype == MIGRATE_CMA:
        mem.zone[zone].nr_free_cma += nr_pages
    elif migratetype == MIGRATE_HIGHATOMIC:
        mem.zone[zone].nr_free_highatomic += nr_pages


@inline
def buddy_order(mem: Memory, pfn: int) -> int:
    return mem.mem_map[pfn].private


@inline
def set_buddy_order(mem: Memory, pfn: int, order: int) -> None:
    mem.mem_map[pfn].private = order
    __SetPageBuddy(mem, pfn)


@inline
def find_buddy_page_pfn(mem: Memory, pfn: int, order: int) -> int:
    """Return the free buddy of a block, or NO_PAGE (kernel: `find_buddy_page_pfn`)."""
    buddy = pfn ^ (1 << order)
    if buddy + (1 << order) > mem.vm[0].nr_pages:
        return NO_PAGE
    page = mem.mem_map[buddy]
    if PageBuddy(mem, buddy) and page.private == order and page.zone == mem.mem_map[pfn].zone:
        return buddy
    return NO_PAGE


@inline
def __add_to_free_list(mem: Memory, pfn: int, zone: int, order: int, migratetype: int, to_tail: bool) -> None:
    head = free_list(mem, zone, order, migratetype)
    if to_tail:
        list_add_tail(mem, pfn, head)
    else:
        list_add(mem, pfn, head)
    mem.zone[zone].nr_free[order] += 1


@inline
def __del_page_from_free_list(mem: Memory, pfn: int, zone: int, order: int, migratetype: int) -> None:
    """Take a block off its list; `PG_reported` ends here, `PG_zeroed` stays for the reader."""
    if VM_BUG_ON_PAGE(mem, get_pageblock_migratetype(mem, pfn) != migratetype, pfn):
        raise VmBug("__del_page_from_free_list: the pageblock has another migrate type")
    if VM_BUG_ON_PAGE(mem, not PageBuddy(mem, pfn) or buddy_order(mem, pfn) != order, pfn):
        raise VmBug("__del_page_from_free_list: not a free block of this order")
    if page_reported(mem, pfn):
        __ClearPageReported(mem, pfn)
    list_del(mem, pfn)
    __ClearPageBuddy(mem, pfn)
    mem.mem_map[pfn].private = 0
    mem.zone[zone].nr_free[order] -= 1


@inline
def del_page_from_free_list(mem: Memory, pfn: int, zone: int, order: int, migratetype: int) -> None:
    __del_page_from_free_list(mem, pfn, zone, order, migratetype)
    account_freepages(mem, zone, -(1 << order), migratetype)


@inline
def get_page_from_free_area(mem: Memory, zone: int, order: int, migratetype: int) -> int:
    """Return the first block of one list, or NO_PAGE."""
    head = free_list(mem, zone, order, migratetype)
    if list_empty(mem, head):
        return NO_PAGE
    return list_first(mem, head)


@inline
def buddy_merge_likely(mem: Memory, pfn: int, order: int) -> bool:
    """Return whether the block above is likely to become free soon (kernel: same name)."""
    if order >= MAX_PAGE_ORDER - 1:
        return False
    higher = pfn & ~(1 << order)
    return find_buddy_page_pfn(mem, higher, order + 1) != NO_PAGE


@compiled
def compaction_capture(mem: Memory, pfn: int, zone: int, order: int, migratetype: int) -> bool:
    """Give a block on its way to a free list to the direct compaction that waits for one.

    Source: `compaction_capture`, `task_capc`. CMA and isolated pages are not for everybody, and
    a small kernel allocation must not take a movable pageblock's page. The block keeps
    `PG_zeroed` if it has it: `__alloc_pages_direct_compact` reads and clears it.
    """
    cc = mem.cc[0]
    if order != mem.vm[0].capture_order or zone != cc.zone or cc.capture_page != NO_PAGE:
        return False
    if migratetype == MIGRATE_CMA or migratetype == MIGRATE_ISOLATE:
        return False
    if order < PAGEBLOCK_ORDER and migratetype == MIGRATE_MOVABLE and cc.migratetype != MIGRATE_MOVABLE:
        return False
    cc.capture_page = pfn
    return True


@inline
def __free_one_page(mem: Memory, pfn: int, zone: int, order: int, migratetype: int, fpi_flags: int) -> None:
    """Put a block on a free list, merged with its buddies as far as they are free.

    Source: `__free_one_page`; patch 25 for `PG_zeroed`. A merged block keeps the claim
    only if both halves had it; both marks are dropped before the merge, so that none
    can lie inside the block and come back when the block is split.
    """
    if VM_BUG_ON_PAGE(mem, (mem.mem_map[pfn].flags_f & PAGE_FLAGS_CHECK_AT_PREP & ~PG_zeroed) != 0, pfn):
        raise VmBug("__free_one_page: flags of an owner are still set (PAGE_FLAGS_CHECK_AT_PREP)")
    if VM_BUG_ON_PAGE(mem, (pfn & ((1 << order) - 1)) != 0, pfn):
        raise VmBug("__free_one_page: the block is not aligned to its order")
    if VM_BUG_ON_PAGE(mem, PageBuddy(mem, pfn), pfn):
        raise VmBug("__free_one_page: the page is free already")
    account_freepages(mem, zone, 1 << order, migratetype)
    capturing = mem.vm[0].capture_order != 0
    while order < MAX_PAGE_ORDER:
        if capturing and compaction_capture(mem, pfn, zone, order, migratetype):
            # It never reaches a list.
            account_freepages(mem, zone, -(1 << order), migratetype)
            return
        buddy = find_buddy_page_pfn(mem, pfn, order)
        if buddy == NO_PAGE:
            break
        buddy_migratetype = migratetype
        if order >= PAGEBLOCK_ORDER:
            # Blocks that span pageblocks must not take CMA, isolated or highatomic
            # pageblocks along with ordinary ones.
            buddy_migratetype = get_pageblock_migratetype(mem, buddy)
            if migratetype != buddy_migratetype and not (
                migratetype_is_mergeable(migratetype) and migratetype_is_mergeable(buddy_migratetype)
            ):
                break
        both_zeroed = PageZeroed(mem, pfn) and PageZeroed(mem, buddy)
        __ClearPageZeroed(mem, pfn)
        __ClearPageZeroed(mem, buddy)
        __del_page_from_free_list(mem, buddy, zone, order, buddy_migratetype)
        if buddy_migratetype != migratetype:
            set_pageblock_migratetype(mem, buddy, migratetype)
        pfn = buddy & pfn
        if both_zeroed:
            __SetPageZeroed(mem, pfn)
        order += 1
    set_buddy_order(mem, pfn, order)
    to_tail = (fpi_flags & FPI_TO_TAIL) != 0
    if not to_tail:
        to_tail = buddy_merge_likely(mem, pfn, order)
    __add_to_free_list(mem, pfn, zone, order, migratetype, to_tail)
    if (fpi_flags & FPI_SKIP_REPORT_NOTIFY) == 0:
        page_reporting_notify_free(mem, order)


@inline
def expand(
    mem: Memory, pfn: int, zone: int, low: int, high: int, migratetype: int, reported: bool, zeroed: bool
) -> int:
    """Give the upper halves of a block back until it has order `low`; return the pages given.

    Source: `expand`; the halves inherit `PG_reported` (patch 3) and `PG_zeroed` (patch 26).
    """
    nr_added = 0
    while high > low:
        high -= 1
        upper = pfn + (1 << high)
        __add_to_free_list(mem, upper, zone, high, migratetype, False)
        set_buddy_order(mem, upper, high)
        if reported:
            __SetPageReported(mem, upper)
        if zeroed:
            __SetPageZeroed(mem, upper)
        nr_added += 1 << high
    return nr_added


@inline
def page_del_and_expand(mem: Memory, pfn: int, zone: int, low: int, high: int, migratetype: int) -> None:
    """Take a block off its list, cut to order `low` (kernel: same name; patches 3 and 26).

    `PG_reported` is read before the deletion, which clears it. The head keeps
    `PG_zeroed`: the allocation path reads and clears it.
    """
    reported = page_reported(mem, pfn)
    zeroed = PageZeroed(mem, pfn)
    __del_page_from_free_list(mem, pfn, zone, high, migratetype)
    nr_added = expand(mem, pfn, zone, low, high, migratetype, reported, zeroed)
    account_freepages(mem, zone, nr_added - (1 << high), migratetype)


@inline
def take_smallest(mem: Memory, zone: int, order: int, migratetype: int) -> int:
    """Take the smallest sufficient block of one migrate type, or return NO_PAGE.

    The body of `__rmqueue_smallest`, for the one caller that runs once a page.
    """
    current = order
    while current < NR_PAGE_ORDERS:
        pfn = get_page_from_free_area(mem, zone, current, migratetype)
        if pfn != NO_PAGE:
            page_del_and_expand(mem, pfn, zone, order, current, migratetype)
            return pfn
        current += 1
    return NO_PAGE


@compiled
def __rmqueue_smallest(mem: Memory, zone: int, order: int, migratetype: int) -> int:
    """Take the smallest sufficient block of one migrate type, or return NO_PAGE."""
    return take_smallest(mem, zone, order, migratetype)


@far
def split_large_buddy(mem: Memory, zone: int, pfn: int, order: int, fpi_flags: int, reported: bool) -> None:
    """Free a block pageblock by pageblock, each to its own migrate type's list.

    Source: `split_large_buddy`; patch 30 for `PG_zeroed`, which every part inherits before
    it is freed so that the merge rule sees it. `reported` says that the host was told of the
    block while it was free (patch 3, in its later form): a part is marked after it is back
    and only if it did not merge, because the host knows nothing of the larger block.
    """
    end = pfn + (1 << order)
    part_order = min(order, PAGEBLOCK_ORDER)
    zeroed = PageZeroed(mem, pfn)
    while pfn < end:
        if zeroed:
            __SetPageZeroed(mem, pfn)
        __free_one_page(mem, pfn, zone, part_order, get_pageblock_migratetype(mem, pfn), fpi_flags)
        if reported and PageBuddy(mem, pfn) and buddy_order(mem, pfn) == part_order:
            __SetPageReported(mem, pfn)
        pfn += 1 << part_order
