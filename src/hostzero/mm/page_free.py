# SPDX-License-Identifier: GPL-2.0-only
"""Freeing pages: the ways of a block from its owner to a free list.

Kernel: `mm/page_alloc.c` and `mm/swap.c`, Linux 7.2, with `FPI_ZEROED` (patches 33 to 35).
"Frozen" pages have no reference left; the functions without the word drop one.

A free that must not wait for a lock (`free_pages_nolock`, from a tracing hook) defers its block to
`zone->trylock_free_pages`. That one thing happens at a time here means that a lock is held only by
a caller further up, who says so with `MemoryManager.zone_lock`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hostzero.errors import VmBug
from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import FPI_NONE, FPI_PREPARED, FPI_TRYLOCK, FPI_ZEROED, split_large_buddy
from hostzero.mm.debug import VM_BUG_ON_PAGE, lockdep_assert_zone_not_held
from hostzero.mm.hugetlb_pool import folio_test_hugetlb, return_huge_folio
from hostzero.mm.list import list_del, list_empty, list_first
from hostzero.mm.memcontrol import mem_cgroup_uncharge
from hostzero.mm.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_PCPTYPES,
    NO_PAGE,
    Memory,
    get_pageblock_migratetype,
    page_zone,
    pcp_of,
    trylock_free_pages,
)
from hostzero.mm.page_flags import __SetPageZeroed, compound_order
from hostzero.mm.pcplist import free_frozen_page_commit, pcp_allowed_order
from hostzero.mm.prep import (
    __free_pages_prepare,
    add_page_to_zone_llist,
    fpi_zeroed_holds,
    free_healthy_pages,
)


@contextmanager
def zone_lock(mem: Memory, zone: int, cpu: int | None = None) -> Iterator[None]:
    """Be inside the zone lock, as a hook is that runs in the middle of the allocator.

    Args:
        mem: the memory manager's arrays.
        zone: whose lock.
        cpu: whose list of that zone is locked as well; a refill and a drain hold both.

    Raises:
        VmBug: a lock is held already. So does everything inside that would wait for one.
    """
    locks = [mem.zone[zone]]
    if cpu is not None:
        locks.append(mem.pcp[pcp_of(mem, zone, cpu)])
    if any(lock.locked for lock in locks):
        raise VmBug("the zone lock is taken by a caller that holds it: a deadlock")
    for lock in locks:
        lock.locked = 1
    try:
        yield
    finally:
        for lock in locks:
            lock.locked = 0


@compiled
def free_deferred_pages(mem: Memory, zone: int) -> None:
    """Free what was deferred, newest first (kernel: the loop in `free_one_page`).

    The kernel passes the flags of whoever happens to come along to these strangers' pages. Here
    they have none: a block is known to be zero if it says so itself, and not because the
    caller's page is (`FPI_ZEROED`). A page that broke while its block waited stays out.
    """
    head = trylock_free_pages(mem, zone)
    while not list_empty(mem, head):
        pfn = list_first(mem, head)
        order = mem.mem_map[pfn].private
        list_del(mem, pfn)
        mem.mem_map[pfn].private = 0
        mem.zone[zone].nr_trylock_free -= 1 << order
        if mem.vm[0].num_poisoned_pages != 0 and free_healthy_pages(mem, pfn, order, FPI_PREPARED):
            continue
        split_large_buddy(mem, zone, pfn, order, FPI_NONE, False)


@far
def free_one_page(mem: Memory, zone: int, pfn: int, order: int, fpi_flags: int) -> None:
    """Free a prepared block under the zone lock, and what was deferred before it (kernel: same name).

    With `FPI_TRYLOCK` the block is deferred if the lock is held, and deferred blocks are left
    to somebody who has more time.
    """
    if (fpi_flags & FPI_TRYLOCK) != 0:
        if mem.zone[zone].locked != 0:
            add_page_to_zone_llist(mem, zone, pfn, order)
            return
    else:
        lockdep_assert_zone_not_held(mem, zone)
        free_deferred_pages(mem, zone)
    split_large_buddy(mem, zone, pfn, order, fpi_flags, False)


@far
def __free_pages_ok(mem: Memory, pfn: int, order: int, fpi_flags: int) -> None:
    """Free a block that has no per-CPU list (kernel: same name; patch 33)."""
    if not __free_pages_prepare(mem, pfn, order, fpi_flags):
        return
    if fpi_zeroed_holds(mem, fpi_flags):
        __SetPageZeroed(mem, pfn)
    free_one_page(mem, page_zone(mem, pfn), pfn, order, fpi_flags)


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
            free_one_page(mem, zone, pfn, order, fpi_flags)
            return
        # CMA and highatomic pages share the movable list; the drain sorts them again.
        migratetype = MIGRATE_MOVABLE
    if mem.pcp[pcp_of(mem, zone, cpu)].locked != 0:
        free_one_page(mem, zone, pfn, order, fpi_flags)
        return
    free_frozen_page_commit(mem, zone, pfn, migratetype, order, fpi_flags, cpu)


@far
def free_huge_folio(mem: Memory, pfn: int, cpu: int) -> None:
    """Give a huge folio without references to its pool, or to the buddy lists (kernel: same name)."""
    order = compound_order(mem, pfn)
    if return_huge_folio(mem, pfn):
        __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)


@inline
def put_page_testzero(mem: Memory, pfn: int) -> bool:
    """Drop a reference; return whether it was the last (kernel: same name)."""
    if VM_BUG_ON_PAGE(mem, mem.mem_map[pfn]._refcount <= 0, pfn):
        raise VmBug("put_page_testzero: the page has no reference")
    mem.mem_map[pfn]._refcount -= 1
    return mem.mem_map[pfn]._refcount == 0


@inline
def ___free_pages(mem: Memory, pfn: int, order: int, fpi_flags: int, cpu: int) -> bool:
    """Drop a reference to a block; free it if that was the last (kernel: same name).

    Returns whether the block was freed. A block that is not compound and keeps a
    reference on its first page loses the others, as in the kernel.
    """
    compound = compound_order(mem, pfn) > 0
    if put_page_testzero(mem, pfn):
        __free_frozen_pages(mem, pfn, order, fpi_flags, cpu)
        return True
    if not compound:
        while order > 0:
            order -= 1
            __free_frozen_pages(mem, pfn + (1 << order), order, fpi_flags, cpu)
    return False


@compiled
def __free_pages(mem: Memory, pfn: int, order: int, cpu: int) -> bool:
    """Drop a reference to a block; return whether that freed it (kernel: same name)."""
    return ___free_pages(mem, pfn, order, FPI_NONE, cpu)


@compiled
def free_pages_nolock(mem: Memory, pfn: int, order: int, cpu: int) -> bool:
    """Drop a reference from a place that may hold any lock (kernel: same name).

    Returns whether that was the last one; the block may still be deferred.
    """
    return ___free_pages(mem, pfn, order, FPI_TRYLOCK, cpu)


@compiled
def free_pages_bulk(mem: Memory, pfns: object, order: int, cpu: int) -> None:
    """Drop a reference to each of many blocks of one order."""
    for i in range(len(pfns)):  # type: ignore[arg-type]
        pfn = pfns[i]  # type: ignore[index]
        if put_page_testzero(mem, pfn):
            __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)


@compiled
def free_prepared_contig_range(mem: Memory, pfn: int, count: int, cpu: int) -> None:
    """Free pages that went through prepare one by one, in the largest aligned blocks (kernel: same name)."""
    end = pfn + count
    while pfn < end:
        order = MAX_PAGE_ORDER
        while (pfn & ((1 << order) - 1)) != 0 or pfn + (1 << order) > end:
            order -= 1
        __free_frozen_pages(mem, pfn, order, FPI_PREPARED, cpu)
        pfn += 1 << order


@compiled
def __free_contig_range(mem: Memory, pfn: int, count: int, frozen: bool, cpu: int) -> None:
    """Free a range of single pages (kernel: `__free_contig_range_common`).

    Unless they are `frozen`, each loses one reference and stays if somebody has another. A page
    that must not be used again, or is still in use, ends a run; the runs between are freed whole.
    """
    start = NO_PAGE
    for page in range(pfn, pfn + count):
        good = (frozen or put_page_testzero(mem, page)) and __free_pages_prepare(mem, page, 0, FPI_NONE)
        if good and start == NO_PAGE:
            start = page
        # A block never spans two zones, and the largest one is freed on its own lists.
        if start != NO_PAGE and (not good or mem.mem_map[page].zone != mem.mem_map[start].zone):
            free_prepared_contig_range(mem, start, page - start, cpu)
            start = page if good else NO_PAGE
    if start != NO_PAGE:
        free_prepared_contig_range(mem, start, pfn + count - start, cpu)


@compiled
def free_frozen_pages_zeroed(mem: Memory, pfn: int, order: int, cpu: int) -> None:
    """Free a block that its owner knows to be zero (patch 33)."""
    __free_frozen_pages(mem, pfn, order, FPI_ZEROED, cpu)


@inline
def __folio_put(mem: Memory, pfn: int, fpi_flags: int, cpu: int) -> None:
    """Free a folio whose last reference has gone (kernel: same name)."""
    mem_cgroup_uncharge(mem, pfn)
    if folio_test_hugetlb(mem, pfn):
        free_huge_folio(mem, pfn, cpu)
        return
    __free_frozen_pages(mem, pfn, compound_order(mem, pfn), fpi_flags, cpu)


@compiled
def put_page_zeroed(mem: Memory, pfn: int, cpu: int) -> bool:
    """Drop a reference to a folio that is known to be zero; return whether it was freed.

    Source: patch 35, `put_page_zeroed` and `folio_put_zeroed`. Only the last put frees it
    as zero: whoever holds another reference may still write, and the hint is lost. A huge
    folio goes its own way, on which the hint has no place.
    """
    if not put_page_testzero(mem, pfn):
        return False
    __folio_put(mem, pfn, FPI_ZEROED, cpu)
    return True


@compiled
def put_page(mem: Memory, pfn: int, cpu: int) -> bool:
    """Drop a reference to a folio; return whether it was freed (kernel: `folio_put`)."""
    if not put_page_testzero(mem, pfn):
        return False
    __folio_put(mem, pfn, FPI_NONE, cpu)
    return True
