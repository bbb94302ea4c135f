# SPDX-License-Identifier: GPL-2.0-only
"""Freeing pages: the ways of a block from its owner to a free list.

Kernel: `mm/page_alloc.c` and `mm/swap.c`, Linux 7.2, with `FPI_ZEROED` (patches 33 to 35).
"Frozen" pages have no reference left; the functions without the word drop one.
"""

from __future__ import annotations

from hostzero.errors import VmBug
from hostzero.jit import compiled, inline
from hostzero.mm.buddy import FPI_NONE, FPI_ZEROED, split_large_buddy
from hostzero.mm.debug import VM_BUG_ON_PAGE
from hostzero.mm.hugetlb_pool import folio_test_hugetlb, return_huge_folio
from hostzero.mm.memcontrol import mem_cgroup_uncharge
from hostzero.mm.mmzone import (
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_PCPTYPES,
    Memory,
    get_pageblock_migratetype,
    page_zone,
)
from hostzero.mm.page_flags import __SetPageZeroed, compound_order
from hostzero.mm.pcplist import free_frozen_page_commit, pcp_allowed_order
from hostzero.mm.prep import __free_pages_prepare, fpi_zeroed_holds


@compiled
def __free_pages_ok(mem: Memory, pfn: int, order: int, fpi_flags: int) -> None:
    """Free a block that has no per-CPU list (kernel: same name; patch 33)."""
    if not __free_pages_prepare(mem, pfn, order, fpi_flags):
        return
    if fpi_zeroed_holds(mem, fpi_flags):
        __SetPageZeroed(mem, pfn)
    split_large_buddy(mem, page_zone(mem, pfn), pfn, order, fpi_flags, False)


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
            split_large_buddy(mem, zone, pfn, order, fpi_flags, False)
            return
        # CMA and highatomic pages share the movable list; the drain sorts them again.
        migratetype = MIGRATE_MOVABLE
    free_frozen_page_commit(mem, zone, pfn, migratetype, order, cpu)


@compiled
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
    as zero: whoever holds another reference may still write, and the hint is lost. A huge
    folio goes its own way, on which the hint has no place.
    """
    if not put_page_testzero(mem, pfn):
        return False
    if folio_test_hugetlb(mem, pfn):
        free_huge_folio(mem, pfn, cpu)
        return True
    mem_cgroup_uncharge(mem, pfn)
    __free_frozen_pages(mem, pfn, compound_order(mem, pfn), FPI_ZEROED, cpu)
    return True


@compiled
def put_page(mem: Memory, pfn: int, cpu: int) -> bool:
    """Drop a reference to a folio; return whether it was freed (kernel: `folio_put`)."""
    if not put_page_testzero(mem, pfn):
        return False
    if folio_test_hugetlb(mem, pfn):
        free_huge_folio(mem, pfn, cpu)
        return True
    mem_cgroup_uncharge(mem, pfn)
    __free_frozen_pages(mem, pfn, compound_order(mem, pfn), FPI_NONE, cpu)
    return True
