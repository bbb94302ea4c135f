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
from hostzero.mm.cachealias import has_kernel_lines
from hostzero.mm.clear_page import first_word_not
from hostzero.mm.debug import describe_bug
from hostzero.mm.list import list_next
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NO_PAGE,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    free_list,
    get_pageblock_migratetype,
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
)
from hostzero.mm.pcplist import pindex_to_order

# What a check found; compiled code returns the number, `verify_memory` the text.
NO_PROBLEM: Final = 0
BAD_LINKS: Final = 1
LISTED_TWICE: Final = 2
BAD_BLOCK: Final = 3
WRONG_LIST: Final = 4
STILL_OWNED: Final = 5
BAD_NR_FREE: Final = 6
BAD_FREE_PAGES: Final = 7
BAD_PCP_COUNT: Final = 8
FALSE_ZERO: Final = 9
UNMERGED: Final = 10
UNLISTED: Final = 11
BAD_BALLOON_COUNT: Final = 12

PROBLEMS: Final = {
    BAD_LINKS: "a list's links do not match",
    LISTED_TWICE: "a page is on two lists, or inside a block that is on one",
    BAD_BLOCK: "a block on a list has another type or order than the list's, or is unaligned",
    WRONG_LIST: "a block is on the list of another zone or migrate type than its own",
    STILL_OWNED: "a listed page has flags, references or mappings that it must not have there",
    BAD_NR_FREE: "nr_free does not match the lists",
    BAD_FREE_PAGES: "nr_free_pages, nr_free_cma or nr_free_highatomic does not match the lists",
    BAD_PCP_COUNT: "a per-CPU count does not match its lists",
    FALSE_ZERO: "a page that claims to be zero holds a non-zero byte, or one that a cache line hides",
    UNMERGED: "two free buddies were not merged",
    UNLISTED: "a page claims to be zero or free that is on no free list",
    BAD_BALLOON_COUNT: "the balloon's count does not match its list",
}
"""What each number means, as `verify_memory` says it."""


@compiled
def _check_block(mem: Memory, seen: object, pfn: int, order: int, free_type: int, contents: bool) -> int:
    # A block on any list: not seen before, clean, and zero if it says so.
    m = mem.mem_map
    if (pfn & ((1 << order) - 1)) != 0 or pfn + (1 << order) > mem.vm[0].nr_pages:
        return BAD_BLOCK
    if m[pfn].page_type != free_type:
        return BAD_BLOCK
    if free_type == PGTY_buddy and m[pfn].private != order:
        return BAD_BLOCK
    for page in range(pfn, pfn + (1 << order)):
        if seen[page] != 0:  # type: ignore[index]
            return LISTED_TWICE
        seen[page] = 1  # type: ignore[index]
        allowed = PG_zeroed | PG_reported if page == pfn else 0
        if (m[page].flags_f & PAGE_FLAGS_CHECK_AT_PREP & ~allowed) != 0:
            return STILL_OWNED
        if m[page]._refcount != 0 or m[page]._mapcount != -1:
            return STILL_OWNED
        if m[page].mapping != 0 or m[page].memcg_data != 0:
            return STILL_OWNED
        if mem.compound_head[page] != 0 or (page != pfn and m[page].page_type != PGTY_none):
            return STILL_OWNED
    if contents and PageZeroed(mem, pfn):
        if first_word_not(mem, pfn, 1 << order, 0) >= 0 or has_kernel_lines(mem, pfn, 1 << order):
            return FALSE_ZERO
    return NO_PROBLEM


@compiled
def _check_free_lists(mem: Memory, seen: object, contents: bool) -> int:
    m = mem.mem_map
    vm = mem.vm[0]
    for zone in range(vm.nr_zones):
        pages = 0
        cma = 0
        highatomic = 0
        for order in range(NR_PAGE_ORDERS):
            blocks = 0
            for migratetype in range(MIGRATE_TYPES):
                head = free_list(mem, zone, order, migratetype)
                before = head
                pfn = list_next(mem, head)
                while pfn != head:
                    vm.bug_pfn = pfn
                    if pfn < 0 or pfn >= vm.nr_pages or m[pfn].lru_prev != before:
                        return BAD_LINKS
                    if m[pfn].zone != zone:
                        return WRONG_LIST
                    problem = _check_block(mem, seen, pfn, order, PGTY_buddy, contents)
                    if problem != NO_PROBLEM:
                        return problem
                    # A block that spans pageblocks must not hide one of another type (CMA).
                    for page in range(pfn, pfn + (1 << order), PAGEBLOCK_NR_PAGES):
                        if get_pageblock_migratetype(mem, page) != migratetype:
                            return WRONG_LIST
                    blocks += 1
                    if migratetype != MIGRATE_ISOLATE:
                        pages += 1 << order
                    if migratetype == MIGRATE_CMA:
                        cma += 1 << order
                    if migratetype == MIGRATE_HIGHATOMIC:
                        highatomic += 1 << order
                    buddy = pfn ^ (1 << order)
                    if (
                        order < PAGEBLOCK_ORDER
                        and buddy + (1 << order) <= vm.nr_pages
                        and m[buddy].page_type == PGTY_buddy
                        and m[buddy].private == order
                        and m[buddy].zone == zone
                    ):
                        return UNMERGED
                    before = pfn
                    pfn = list_next(mem, pfn)
                if m[head].lru_prev != before:
                    return BAD_LINKS
            if blocks != mem.zone[zone].nr_free[order]:
                vm.bug_pfn = NO_PAGE
                return BAD_NR_FREE
        z = mem.zone[zone]
        if pages != z.nr_free_pages or cma != z.nr_free_cma or highatomic != z.nr_free_highatomic:
            vm.bug_pfn = NO_PAGE
            return BAD_FREE_PAGES
    return NO_PROBLEM


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
                        return BAD_LINKS
                    if m[pfn].zone != zone:
                        return WRONG_LIST
                    problem = _check_block(mem, seen, pfn, order, PGTY_none, contents)
                    if problem != NO_PROBLEM:
                        return problem
                    pages += 1 << order
                    before = pfn
                    pfn = list_next(mem, pfn)
                if m[head].lru_prev != before:
                    return BAD_LINKS
            if pages != mem.pcp[pcp_of(mem, zone, cpu)].count:
                vm.bug_pfn = NO_PAGE
                return BAD_PCP_COUNT
    return NO_PROBLEM


@compiled
def _check_balloon(mem: Memory, seen: object, contents: bool) -> int:
    m = mem.mem_map
    vm = mem.vm[0]
    head = vm.balloon_head
    count = 0
    before = head
    pfn = list_next(mem, head)
    while pfn != head:
        vm.bug_pfn = pfn
        if pfn < 0 or pfn >= vm.nr_pages or m[pfn].lru_prev != before:
            return BAD_LINKS
        if seen[pfn] != 0:  # type: ignore[index]
            return LISTED_TWICE
        seen[pfn] = 2  # type: ignore[index]
        if m[pfn].page_type != PGTY_offline or m[pfn]._refcount < 1:
            return STILL_OWNED
        if contents and PageZeroed(mem, pfn):
            if first_word_not(mem, pfn, 1, 0) >= 0 or has_kernel_lines(mem, pfn, 1):
                return FALSE_ZERO
        count += 1
        before = pfn
        pfn = list_next(mem, pfn)
    if m[head].lru_prev != before:
        return BAD_LINKS
    if count != vm.nr_balloon_pages:
        vm.bug_pfn = NO_PAGE
        return BAD_BALLOON_COUNT
    return NO_PROBLEM


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
            return UNLISTED
        if m[pfn]._refcount == 0 and mem.compound_head[pfn] == 0 and PageZeroed(mem, pfn):
            return UNLISTED
    return NO_PROBLEM


@compiled
def check_memory(mem: Memory, seen: object, contents: bool) -> int:
    """Return NO_PROBLEM, or the first of `PROBLEMS` found; its page, if any, is in `vm.bug_pfn`.

    `seen` is a zeroed byte per page. `contents` compares every zero claim with the bytes.
    """
    problem = _check_free_lists(mem, seen, contents)
    if problem == NO_PROBLEM:
        problem = _check_pcp_lists(mem, seen, contents)
    if problem == NO_PROBLEM:
        problem = _check_balloon(mem, seen, contents)
    if problem == NO_PROBLEM:
        problem = _check_unlisted(mem, seen)
    return problem


def verify_memory(mem: Memory, *, contents: bool = True) -> None:
    """Check all lists, counters and zero claims of a memory manager.

    Args:
        mem: the arrays to check.
        contents: also read the bytes of every page that claims to be zero. This faults in
            what the host dropped, so a measurement leaves it out.

    Raises:
        VmBug: the first problem found, with the page unless it is about a counter.
    """
    seen = np.zeros(int(mem.vm[0].nr_pages), dtype=np.uint8)
    problem = int(check_memory(mem, seen, contents))
    if problem:
        raise VmBug(describe_bug(mem, VmBug(PROBLEMS[problem])))
