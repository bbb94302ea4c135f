# SPDX-License-Identifier: GPL-2.0-only
"""Walking every list: is the allocator's state consistent, and every zero claim true?

Nothing in the kernel corresponds to this; it is what the tests ask after each operation.
A check returns a code and leaves the page in `vm.bug_pfn`; `verify_memory` turns that into
a `VmBug` that says what is wrong.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hostzero.errors import VmBug
from hostzero.jit import compiled
from hostzero.mm.clear_page import first_word_not
from hostzero.mm.debug import describe_page
from hostzero.mm.list import list_next
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_ORDER,
    Memory,
    free_list,
    pcp_list,
    pcp_of,
)
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PageZeroed,
    PG_reported,
    PG_zeroed,
    PGTY_buddy,
    PGTY_none,
    PGTY_offline,
    __ClearPageZeroed,
)
from hostzero.mm.pcplist import pindex_to_order

_PROBLEMS: Final = (
    "",
    "a list's links do not match",
    "a page is on two lists, or inside a block that is on one",
    "a block on a free list is not typed buddy, has another order, or is unaligned",
    "a block is on the list of another migrate type than its pageblock's",
    "a free page has flags of an owner, references or mappings",
    "nr_free does not match the lists",
    "nr_free_pages or nr_free_cma does not match the lists",
    "a per-CPU count does not match its lists",
    "a page that claims to be zero holds a non-zero byte",
    "two free buddies were not merged",
    "a page claims to be zero or free that is on no free list",
    "the balloon's count does not match its list",
)


@compiled
def _check_block(mem: Memory, seen: object, pfn: int, order: int, free_type: int, contents: bool) -> int:
    # A block on any list: not seen before, clean, and zero if it says so.
    m = mem.mem_map
    if (pfn & ((1 << order) - 1)) != 0 or m[pfn].page_type != free_type:
        return 3
    if free_type == PGTY_buddy and m[pfn].private != order:
        return 3
    for page in range(pfn, pfn + (1 << order)):
        if seen[page] != 0:  # type: ignore[index]
            return 2
        seen[page] = 1  # type: ignore[index]
        allowed = PG_zeroed | PG_reported if page == pfn else 0
        if (m[page].flags_f & PAGE_FLAGS_CHECK_AT_PREP & ~allowed) != 0:
            return 5
        if m[page]._refcount != 0 or m[page]._mapcount != -1 or m[page].mapping != 0:
            return 5
        if m[page].compound_head != 0 or (page != pfn and m[page].page_type != PGTY_none):
            return 5
    if contents and PageZeroed(mem, pfn) and first_word_not(mem, pfn, 1 << order, 0) >= 0:
        return 9
    return 0


@compiled
def _check_free_lists(mem: Memory, seen: object, contents: bool) -> int:
    m = mem.mem_map
    vm = mem.vm[0]
    for zone in range(vm.nr_zones):
        pages = 0
        cma = 0
        for order in range(NR_PAGE_ORDERS):
            blocks = 0
            for migratetype in range(MIGRATE_TYPES):
                head = free_list(mem, zone, order, migratetype)
                before = head
                pfn = list_next(mem, head)
                while pfn != head:
                    vm.bug_pfn = pfn
                    if pfn < 0 or pfn >= vm.nr_pages or m[pfn].lru_prev != before:
                        return 1
                    if m[pfn].zone != zone or mem.pageblock[pfn >> PAGEBLOCK_ORDER] != migratetype:
                        return 4
                    problem = _check_block(mem, seen, pfn, order, PGTY_buddy, contents)
                    if problem != 0:
                        return problem
                    blocks += 1
                    if migratetype != MIGRATE_ISOLATE:
                        pages += 1 << order
                    if migratetype == MIGRATE_CMA:
                        cma += 1 << order
                    buddy = pfn ^ (1 << order)
                    if (
                        order < PAGEBLOCK_ORDER
                        and buddy + (1 << order) <= vm.nr_pages
                        and m[buddy].page_type == PGTY_buddy
                        and m[buddy].private == order
                        and m[buddy].zone == zone
                    ):
                        return 10
                    before = pfn
                    pfn = list_next(mem, pfn)
                if m[head].lru_prev != before:
                    return 1
            if blocks != mem.zone[zone].nr_free[order]:
                return 6
        if pages != mem.zone[zone].nr_free_pages or cma != mem.zone[zone].nr_free_cma:
            return 7
    return 0


@compiled
def _check_pcp_lists(mem: Memory, seen: object, contents: bool) -> int:
    m = mem.mem_map
    vm = mem.vm[0]
    for cpu in range(vm.nr_cpus):
        for zone in range(vm.nr_zones):
            pages = 0
            for pindex in range(NR_PCP_LISTS):
                head = pcp_list(mem, zone, cpu, pindex)
                order = pindex_to_order(pindex)
                before = head
                pfn = list_next(mem, head)
                while pfn != head:
                    vm.bug_pfn = pfn
                    if pfn < 0 or pfn >= vm.nr_pages or m[pfn].lru_prev != before:
                        return 1
                    if m[pfn].zone != zone:
                        return 4
                    problem = _check_block(mem, seen, pfn, order, PGTY_none, contents)
                    if problem != 0:
                        return problem
                    pages += 1 << order
                    before = pfn
                    pfn = list_next(mem, pfn)
                if m[head].lru_prev != before:
                    return 1
            if pages != mem.pcp[pcp_of(mem, zone, cpu)].count:
                return 8
    return 0


@compiled
def _check_balloon(mem: Memory, seen: object, contents: bool) -> int:
    m = mem.mem_map
    vm = mem.vm[0]
    head = vm.balloon_head
    count = 0
    pfn = list_next(mem, head)
    while pfn != head:
        vm.bug_pfn = pfn
        if pfn < 0 or pfn >= vm.nr_pages or seen[pfn] != 0:  # type: ignore[index]
            return 2
        seen[pfn] = 2  # type: ignore[index]
        if m[pfn].page_type != PGTY_offline or m[pfn]._refcount < 1:
            return 5
        if contents and PageZeroed(mem, pfn) and first_word_not(mem, pfn, 1, 0) >= 0:
            return 9
        count += 1
        pfn = list_next(mem, pfn)
    return 0 if count == vm.nr_balloon_pages else 12


@compiled
def _check_unlisted(mem: Memory, seen: object) -> int:
    # Outside the lists nobody may claim to be free. PG_private is an owner's to use, so a
    # claim can only be recognised on a page without an owner.
    m = mem.mem_map
    for pfn in range(mem.vm[0].nr_pages):
        if seen[pfn] != 0:  # type: ignore[index]
            continue
        mem.vm[0].bug_pfn = pfn
        if m[pfn].page_type == PGTY_buddy:
            return 11
        if m[pfn]._refcount == 0 and m[pfn].compound_head == 0 and PageZeroed(mem, pfn):
            return 11
    return 0


@compiled
def check_memory(mem: Memory, seen: object, contents: bool) -> int:
    """Return 0, or the number of the first problem found; the page is in `vm.bug_pfn`.

    `seen` is a zeroed byte per page. `contents` compares every zero claim with the bytes.
    """
    problem = _check_free_lists(mem, seen, contents)
    if problem == 0:
        problem = _check_pcp_lists(mem, seen, contents)
    if problem == 0:
        problem = _check_balloon(mem, seen, contents)
    if problem == 0:
        problem = _check_unlisted(mem, seen)
    return problem


@compiled
def forget_zero_claims(mem: Memory) -> int:
    """Clear `PG_zeroed` on every free, parked and balloon page; return how many had it."""
    forgotten = 0
    m = mem.mem_map
    for pfn in range(mem.vm[0].nr_pages):
        unowned = m[pfn]._refcount == 0 or m[pfn].page_type == PGTY_offline
        if unowned and PageZeroed(mem, pfn):
            __ClearPageZeroed(mem, pfn)
            forgotten += 1
    return forgotten


def verify_memory(mem: Memory, *, contents: bool = True) -> None:
    """Check all lists, counters and zero claims of a memory manager.

    Args:
        mem: the arrays to check.
        contents: also read the bytes of every page that claims to be zero. This faults in
            what the host dropped, so a measurement leaves it out.

    Raises:
        VmBug: the first problem found, with the page.
    """
    seen = np.zeros(int(mem.vm[0].nr_pages), dtype=np.uint8)
    problem = int(check_memory(mem, seen, contents))
    if problem:
        raise VmBug(f"{_PROBLEMS[problem]}: {describe_page(mem, int(mem.vm[0].bug_pfn))}")
