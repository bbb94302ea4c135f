# SPDX-License-Identifier: GPL-2.0-only
"""Contiguous allocation: runs of pages that the buddy lists cannot give.

Kernel: `alloc_contig_frozen_range` and `alloc_contig_frozen_pages` (`mm/page_alloc.c`, Linux
7.2), patch 8 for `user_addr`. A range of pageblocks is isolated, what is in use there is
moved away, and the free blocks that make up the range are taken off the lists.

Such pages carry no zero hint. What was known of the blocks ended when they were isolated;
it is cleared once more at the door out of here, and the pages are prepared as not known to
be zero: a request for zeros is zeroed by `post_alloc_hook`, whatever the blocks were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hostzero.errors import UsageError
from hostzero.jit import compiled
from hostzero.mm.buddy import FPI_NONE, __free_one_page, buddy_order
from hostzero.mm.gfp import __GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_TRANSHUGE, USER_ADDR_NONE
from hostzero.mm.migrate import isolate_migratepages_range, migrate_pages
from hostzero.mm.mmzone import MIGRATE_ISOLATE, NO_PAGE, Memory, page_zone
from hostzero.mm.page_alloc import alloc_from_zonelists
from hostzero.mm.page_flags import PageHead, PageTail, __ClearPageZeroed, compound_order
from hostzero.mm.page_free import __free_contig_range, __free_frozen_pages
from hostzero.mm.page_isolation import (
    PB_ISOLATE_MODE_OTHER,
    __isolate_free_page,
    find_large_buddy,
    page_is_unmovable,
    start_isolate_page_range,
    test_pages_isolated,
    undo_isolate_page_range,
)
from hostzero.mm.pcplist import drain_all_pages
from hostzero.mm.prep import check_new_pages, post_alloc_hook, prep_new_page
from hostzero.mm.watermark import zone_allowed

if TYPE_CHECKING:
    from hostzero.mm.manager import MemoryManager

MAX_FOLIO_ORDER: Final = 18
"""The largest folio: 1 GiB (kernel: PUD_ORDER, with gigantic pages)."""

_MIGRATE_ATTEMPTS: Final = 5


@compiled
def pfn_range_valid_contig(mem: Memory, zone: int, start: int, nr_pages: int) -> bool:
    """Return whether a range looks as if it could be had (kernel: same name); a hint only."""
    pfn = start
    while pfn < start + nr_pages:
        if page_zone(mem, pfn) != zone:
            return False
        unmovable, step = page_is_unmovable(mem, pfn)
        if unmovable:
            return False
        pfn += step
    return True


@compiled
def next_contig_range(mem: Memory, zone: int, pfn: int, nr_pages: int) -> int:
    """Return the first aligned range of a zone from `pfn` on that looks promising, or NO_PAGE."""
    start = (max(pfn, mem.zone[zone].start_pfn) + nr_pages - 1) & ~(nr_pages - 1)
    while start + nr_pages <= mem.zone[zone].end_pfn:
        if pfn_range_valid_contig(mem, zone, start, nr_pages):
            return start
        start += nr_pages
    return NO_PAGE


@compiled
def contig_zone(mem: Memory, gfp: int, node: int, k: int) -> int:
    """Return the k-th zone of a node's zonelist, or -1 if `gfp` does not permit it."""
    zone = mem.zonelists[node, k]
    return zone if zone_allowed(mem, zone, gfp, node) else -1


@compiled
def isolate_freepages_range(mem: Memory, start: int, end: int, pfns: object, orders: object) -> int:
    """Take the free pages `[start, end)` off the lists; return how many blocks they are.

    Source: same name (`mm/compaction.c`). All of them are free and isolated, so this cannot
    fail; `pfns` and `orders` receive the blocks in order and need room for `end - start`.

    A block that reaches over an end is cut, and what is outside goes back to its list.
    Decided here: Linux prepares such a block whole, zeroes it even, and frees the outer part
    as if it had been used; and with `__GFP_COMP` it fails with a warning instead.
    """
    count = 0
    pfn = find_large_buddy(mem, start)
    while pfn < end:
        order = buddy_order(mem, pfn)
        block_end = pfn + (1 << order)
        __isolate_free_page(mem, pfn, order)
        while pfn < block_end:
            inside = pfn >= start and pfn < end
            limit = start if pfn < start else (min(end, block_end) if inside else block_end)
            part = order
            while (pfn & ((1 << part) - 1)) != 0 or pfn + (1 << part) > limit:
                part -= 1
            if inside:
                pfns[count] = pfn  # type: ignore[index]
                orders[count] = part  # type: ignore[index]
                count += 1
            else:
                # Not free for anyone yet: the pageblock is still isolated.
                __free_one_page(mem, pfn, page_zone(mem, pfn), part, MIGRATE_ISOLATE, FPI_NONE)
            pfn += 1 << part
    return count


@compiled
def split_free_frozen_pages(mem: Memory, pfns: object, orders: object, count: int, gfp: int) -> None:
    """Prepare isolated blocks as single pages without a reference (kernel: same name).

    The hint is cleared before use and `post_alloc_hook` hears of none. There is no user
    address either: the pages are no folio, and a fault is for one of them at most.
    """
    for i in range(count):
        pfn = pfns[i]  # type: ignore[index]
        order = orders[i]  # type: ignore[index]
        __ClearPageZeroed(mem, pfn)
        post_alloc_hook(mem, pfn, order, gfp, USER_ADDR_NONE, False)


@compiled
def prep_contig_folio(mem: Memory, pfns: object, count: int, order: int, gfp: int, user_addr: int) -> None:
    """Prepare isolated blocks as one compound page of `order`, which may exceed MAX_PAGE_ORDER.

    The hints are cleared before use. `prep_new_page` sets the compound metadata before it
    calls `post_alloc_hook` (patch 11): zeroing near `user_addr` last needs the size (patch 8).
    """
    for i in range(count):
        __ClearPageZeroed(mem, pfns[i])  # type: ignore[index]
    head = pfns[0]  # type: ignore[index]
    # As in Linux, a bad page is reported here and handed out all the same.
    check_new_pages(mem, head, order)
    prep_new_page(mem, head, order, gfp, user_addr, False)


@compiled
def free_contig_pages(mem: Memory, pfn: int, order: int, compound: bool, cpu: int) -> None:
    """Free a frozen run as what it is: one folio, or single pages."""
    if compound:
        __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)
        return
    __free_contig_range(mem, pfn, 1 << order, True, cpu)


def alloc_contig_migrate_range(manager: MemoryManager, start: int, end: int) -> None:
    """Move away what is in use in an isolated range (kernel: `__alloc_contig_migrate_range`).

    The targets come from the same node by preference; nothing is allocated from an isolated
    range, so none is inside it. What cannot be moved is tried again a few times, as in Linux.
    Whether everything has gone is not said here: `test_pages_isolated` decides.
    """
    mem = manager.mem
    node = int(mem.zone[int(page_zone(mem, start))].node)
    heads = np.empty(end - start, dtype=np.int64)

    def alloc_migration_target(order: int) -> int:
        gfp = GFP_TRANSHUGE if order else GFP_HIGHUSER_MOVABLE
        return int(alloc_from_zonelists(mem, gfp, order, USER_ADDR_NONE, node, 0))

    for _ in range(_MIGRATE_ATTEMPTS):
        found = int(isolate_migratepages_range(mem, start, end, heads))
        if found <= 0 or not migrate_pages(manager, heads[:found].tolist(), alloc_migration_target):
            break


def alloc_contig_frozen_range(
    manager: MemoryManager,
    start: int,
    end: int,
    gfp: int,
    *,
    mode: int = PB_ISOLATE_MODE_OTHER,
    user_addr: int = USER_ADDR_NONE,
) -> bool:
    """Allocate exactly the pages `[start, end)` without references; False if that is impossible.

    Source: same name, patch 8. With `__GFP_COMP` the range becomes one compound page, else
    single pages; zeroed if `__GFP_ZERO` says so, near `user_addr` last if it is a folio's. Of
    the other flags none matters here. On failure everything is as before, but what was
    moved away stays moved.

    Raises:
        UsageError: the range is not inside memory, or is to be a folio and is not a power of
            two in size and so aligned.
    """
    mem = manager.mem
    count = end - start
    if not 0 <= start < end <= manager.nr_pages:
        raise UsageError(f"there are no pages {start:#x} to {end:#x}: the guest has {manager.nr_pages:#x}")
    order = count.bit_length() - 1
    if gfp & __GFP_COMP and (count != 1 << order or start % count or order > MAX_FOLIO_ORDER):
        raise UsageError(f"pages {start:#x} to {end:#x} cannot be one folio")
    if not start_isolate_page_range(mem, start, end, mode):
        return False
    try:
        drain_all_pages(mem)
        alloc_contig_migrate_range(manager, start, end)
        if not test_pages_isolated(mem, find_large_buddy(mem, start), end):
            return False
        pfns = np.empty(count, dtype=np.int64)
        orders = np.empty(count, dtype=np.int64)
        blocks = isolate_freepages_range(mem, start, end, pfns, orders)
        if gfp & __GFP_COMP:
            prep_contig_folio(mem, pfns, blocks, order, gfp, user_addr)
        else:
            split_free_frozen_pages(mem, pfns, orders, blocks, gfp)
    finally:
        undo_isolate_page_range(mem, start, end)
    return True


def alloc_contig_frozen_pages_user(
    manager: MemoryManager, order: int, gfp: int, node: int, user_addr: int
) -> int:
    """Allocate `1 << order` aligned pages without references; return the first, or NO_PAGE.

    Source: patch 8, `alloc_contig_frozen_pages_user`. `order` may exceed MAX_PAGE_ORDER, up to
    `MAX_FOLIO_ORDER`. The zones of `node`'s zonelist are searched from their first page up, one
    aligned range after the other; `__GFP_THISNODE` keeps it to the node. Compound with
    `__GFP_COMP`; zeroed if and only if `__GFP_ZERO`, and then near `user_addr` last if compound.

    Raises:
        UsageError: there is no such order or node.
    """
    if not 0 <= order <= MAX_FOLIO_ORDER:
        raise UsageError(f"order {order} is not between 0 and {MAX_FOLIO_ORDER}")
    if not 0 <= node < int(manager.mem.vm[0].nr_nodes):
        raise UsageError(f"there is no node {node}: the guest has {int(manager.mem.vm[0].nr_nodes)}")
    mem = manager.mem
    for k in range(len(mem.zone)):
        zone = int(contig_zone(mem, gfp, node, k))
        if zone < 0:
            continue
        pfn = int(next_contig_range(mem, zone, 0, 1 << order))
        while pfn != NO_PAGE:
            if alloc_contig_frozen_range(manager, pfn, pfn + (1 << order), gfp, user_addr=user_addr):
                return pfn
            pfn = int(next_contig_range(mem, zone, pfn + (1 << order), 1 << order))
    return NO_PAGE


def alloc_contig_frozen_pages(manager: MemoryManager, order: int, gfp: int, node: int = 0) -> int:
    """Allocate as `alloc_contig_frozen_pages_user` does, without a user address."""
    return alloc_contig_frozen_pages_user(manager, order, gfp, node, USER_ADDR_NONE)


def free_contig_frozen_range(manager: MemoryManager, pfn: int, order: int, *, cpu: int = 0) -> None:
    """Free a run that `alloc_contig_frozen_pages` gave: a folio whole, else page by page.

    Raises:
        UsageError: `pfn` is no such run's first page, or the order is another than the folio's.
    """
    mem = manager.mem
    if not 0 <= order <= MAX_FOLIO_ORDER or not 0 <= pfn <= manager.nr_pages - (1 << order):
        raise UsageError(f"there is no run of order {order} at page {pfn:#x}")
    compound = bool(PageHead(mem, pfn))
    if PageTail(mem, pfn) or (compound and int(compound_order(mem, pfn)) != order):
        raise UsageError(f"page {pfn:#x} does not head a folio of order {order}")
    free_contig_pages(mem, pfn, order, compound, cpu)
