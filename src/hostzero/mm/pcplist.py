# SPDX-License-Identifier: GPL-2.0-only
"""Per-CPU page lists in front of the buddy lists (kernel: `mm/page_alloc.c`, `pcp`).

Orders 0 to 3 and the PMD order have lists. A page keeps `PG_zeroed` while it is parked
here and when it is drained: what the page says about itself must not depend on who
drains it. `high` and `batch` stay at their boot values, as with
`vm.percpu_pagelist_high_fraction` set; Linux tunes them at run time.
"""

from __future__ import annotations

from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import FPI_NONE, FPI_TRYLOCK, __free_one_page
from hostzero.mm.debug import lockdep_assert_zone_not_held
from hostzero.mm.fallback import __rmqueue, own_migratetype
from hostzero.mm.list import list_add, list_add_tail, list_del, list_empty, list_first, list_last
from hostzero.mm.mmzone import (
    HPAGE_PMD_ORDER,
    MIGRATE_MOVABLE,
    MIGRATE_PCPTYPES,
    NO_PAGE,
    NR_LOWORDER_PCP_LISTS,
    NR_PCP_LISTS,
    PAGE_ALLOC_COSTLY_ORDER,
    Memory,
    get_pageblock_migratetype,
    pcp_list,
    pcp_of,
)
from hostzero.mm.page_flags import PageZeroed, __ClearPageZeroed
from hostzero.mm.placement import __rmqueue_fitting, fitting_end, wants_zeros
from hostzero.mm.prep import check_new_pages


@inline
def pcp_allowed_order(order: int) -> bool:
    """Return whether blocks of this order have per-CPU lists (kernel: same name)."""
    return order <= PAGE_ALLOC_COSTLY_ORDER or order == HPAGE_PMD_ORDER


@inline
def order_to_pindex(migratetype: int, order: int) -> int:
    """Return which per-CPU list a block belongs to (kernel: same name)."""
    if order == HPAGE_PMD_ORDER:
        return NR_LOWORDER_PCP_LISTS + (1 if migratetype == MIGRATE_MOVABLE else 0)
    return MIGRATE_PCPTYPES * order + migratetype


@inline
def pindex_to_order(pindex: int) -> int:
    """Return the order of a per-CPU list's blocks (kernel: same name)."""
    if pindex >= NR_LOWORDER_PCP_LISTS:
        return HPAGE_PMD_ORDER
    return pindex // MIGRATE_PCPTYPES


@inline
def nr_pcp_alloc(batch: int, order: int) -> int:
    """Return how many blocks one refill takes: fewer the larger they are."""
    if order > 0 and batch > 1:
        return max(batch >> order, 2)
    return batch


@far
def rmqueue_bulk(
    mem: Memory, zone: int, order: int, count: int, head: int, migratetype: int, alloc_flags: int
) -> int:
    """Move up to `count` blocks from the buddy lists to a per-CPU list; return how many."""
    lockdep_assert_zone_not_held(mem, zone)
    for moved in range(count):
        pfn = __rmqueue(mem, zone, order, migratetype, alloc_flags)
        if pfn == NO_PAGE:
            return moved
        # In physical order, which is what a later merge and a streaming user want.
        list_add_tail(mem, pfn, head)
    return count


@compiled
def rmqueue_bulk_fitting(
    mem: Memory, zone: int, order: int, count: int, head: int, migratetype: int, zeros: bool
) -> int:
    """Move up to `count` blocks that are zero as wanted to a per-CPU list; return how many.

    They go to the tail, in the order that a later merge wants; but those that are not known to be
    zero go to the head of a list that has others, so that each kind has an end.
    """
    to_tail = zeros or list_empty(mem, head)
    for moved in range(count):
        pfn = __rmqueue_fitting(mem, zone, order, migratetype, zeros)
        if pfn == NO_PAGE:
            return moved
        if to_tail:
            list_add_tail(mem, pfn, head)
        else:
            list_add(mem, pfn, head)
    return count


@compiled
def pcp_fitting(
    mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int, gfp: int, cpu: int
) -> int:
    """Return the parked block that fits the request best, fetching a batch first if none does.

    NO_PAGE if the list is empty still. Nothing is fetched that would fill the lists to `high`;
    a search that found nothing is not repeated for a batch's worth of requests.
    """
    head = pcp_list(mem, zone, cpu, order_to_pindex(migratetype, order))
    zeros = wants_zeros(mem, gfp)
    pfn = fitting_end(mem, head, zeros)
    if pfn != NO_PAGE:
        return pfn
    pcp = mem.pcp[pcp_of(mem, zone, cpu)]
    wanted = nr_pcp_alloc(pcp.batch, order)
    if list_empty(mem, head) or (pcp.fitting_misses == 0 and pcp.count + (wanted << order) < pcp.high):
        own = own_migratetype(mem, zone, migratetype, alloc_flags)
        moved = rmqueue_bulk_fitting(mem, zone, order, wanted, head, own, zeros)
        pcp.count += moved << order
        pcp.fitting_misses = pcp.batch if moved == 0 else 0
        pfn = fitting_end(mem, head, zeros)
        if pfn != NO_PAGE:
            return pfn
    elif pcp.fitting_misses > 0:
        pcp.fitting_misses -= 1
    return NO_PAGE if list_empty(mem, head) else list_first(mem, head)


@far
def rmqueue_pcplist_fitting(
    mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int, gfp: int, cpu: int
) -> tuple[int, bool]:
    """Take the parked block that fits the request best; return it and its zero hint (`placement`)."""
    head = pcp_list(mem, zone, cpu, order_to_pindex(migratetype, order))
    index = pcp_of(mem, zone, cpu)
    while True:
        pfn = pcp_fitting(mem, zone, order, migratetype, alloc_flags, gfp, cpu)
        if pfn == NO_PAGE:
            wanted = nr_pcp_alloc(mem.pcp[index].batch, order)
            moved = rmqueue_bulk(mem, zone, order, wanted, head, migratetype, alloc_flags)
            mem.pcp[index].count += moved << order
            if moved == 0:
                return NO_PAGE, False
            pfn = list_first(mem, head)
        list_del(mem, pfn)
        mem.pcp[index].count -= 1 << order
        zeroed = PageZeroed(mem, pfn)
        __ClearPageZeroed(mem, pfn)
        if not check_new_pages(mem, pfn, order):
            return pfn, zeroed


@inline
def __rmqueue_pcplist(
    mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int, cpu: int
) -> tuple[int, bool]:
    """Take a block from a per-CPU list, refilled if empty; return it and its zero hint.

    Source: same name; the hint is read and cleared here (patch 22), before the page is
    checked, and goes with the page if the check fails.
    """
    head = pcp_list(mem, zone, cpu, order_to_pindex(migratetype, order))
    index = pcp_of(mem, zone, cpu)
    while True:
        if list_empty(mem, head):
            wanted = nr_pcp_alloc(mem.pcp[index].batch, order)
            moved = rmqueue_bulk(mem, zone, order, wanted, head, migratetype, alloc_flags)
            mem.pcp[index].count += moved << order
            if moved == 0:
                return NO_PAGE, False
        pfn = list_first(mem, head)
        list_del(mem, pfn)
        mem.pcp[index].count -= 1 << order
        zeroed = PageZeroed(mem, pfn)
        __ClearPageZeroed(mem, pfn)
        if not check_new_pages(mem, pfn, order):
            return pfn, zeroed


@inline
def rmqueue_pcplist(
    mem: Memory, zone: int, order: int, migratetype: int, alloc_flags: int, gfp: int, cpu: int
) -> tuple[int, bool]:
    """Take a block from a per-CPU list by the placement in force; return it and its zero hint."""
    if mem.vm[0].placement != 0:
        return rmqueue_pcplist_fitting(mem, zone, order, migratetype, alloc_flags, gfp, cpu)
    return __rmqueue_pcplist(mem, zone, order, migratetype, alloc_flags, cpu)


@far
def free_pcppages_bulk(mem: Memory, zone: int, cpu: int, count: int, pindex: int) -> None:
    """Give at least `count` pages back to the buddy lists, coldest first, list by list."""
    lockdep_assert_zone_not_held(mem, zone)
    index = pcp_of(mem, zone, cpu)
    count = min(mem.pcp[index].count, count)
    pindex -= 1  # the loop advances before it looks
    while count > 0:
        pindex = pindex + 1 if pindex + 1 < NR_PCP_LISTS else 0
        head = pcp_list(mem, zone, cpu, pindex)
        order = pindex_to_order(pindex)
        while count > 0 and not list_empty(mem, head):
            pfn = list_last(mem, head)
            list_del(mem, pfn)
            count -= 1 << order
            mem.pcp[index].count -= 1 << order
            migratetype = get_pageblock_migratetype(mem, pfn)
            __free_one_page(mem, pfn, zone, order, migratetype, FPI_NONE)


@inline
def free_frozen_page_commit(
    mem: Memory, zone: int, pfn: int, migratetype: int, order: int, fpi_flags: int, cpu: int
) -> None:
    """Park a freed block on its per-CPU list and drain the list if it is too long.

    With `FPI_TRYLOCK` the list may grow past its mark until the next free: draining takes the
    zone lock.
    """
    index = pcp_of(mem, zone, cpu)
    pindex = order_to_pindex(migratetype, order)
    list_add(mem, pfn, pcp_list(mem, zone, cpu, pindex))
    pcp = mem.pcp[index]
    pcp.count += 1 << order
    if (fpi_flags & FPI_TRYLOCK) == 0 and pcp.count >= pcp.high:
        # Leave one batch parked: the next allocations will want it.
        free_pcppages_bulk(mem, zone, cpu, max(pcp.batch, pcp.count - pcp.high + pcp.batch), pindex)


@far
def drain_all_pages(mem: Memory) -> None:
    """Give every parked page of every CPU back to the buddy lists."""
    for cpu in range(mem.vm[0].nr_cpus):
        for zone in range(mem.vm[0].nr_zones):
            free_pcppages_bulk(mem, zone, cpu, mem.pcp[pcp_of(mem, zone, cpu)].count, 0)
