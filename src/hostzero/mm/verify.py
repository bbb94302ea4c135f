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
from hostzero.mm.hugetlb_pool import HPG_freed, folio_nid, folio_test_hugetlb_zeroed
from hostzero.mm.list import list_next
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NO_PAGE,
    NR_HSTATES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    free_list,
    get_pageblock_migratetype,
    hugepage_freelist,
    pcp_list,
    pcp_of,
    trylock_free_pages,
)
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PageZeroed,
    PG_reported,
    PG_zeroed,
    PGTY_buddy,
    PGTY_hugetlb,
    PGTY_none,
    PGTY_offline,
    compound_order,
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
BAD_HUGE_PAGE: Final = 13
BAD_HUGE_COUNT: Final = 14
BAD_CHARGE: Final = 15
BAD_SWAP_COUNT: Final = 16
BAD_DEFERRED_COUNT: Final = 17

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
    BAD_HUGE_PAGE: "a free huge page is in use, or not of its pool",
    BAD_HUGE_COUNT: "a huge page pool's counters do not match its pages",
    BAD_CHARGE: "a cgroup's usage is not what its pages are charged with",
    BAD_SWAP_COUNT: "nr_swap_pages does not match the slots in use",
    BAD_DEFERRED_COUNT: "a zone's count of deferred pages does not match its list",
}
"""What each number means, as `verify_memory` says it."""

_NO_TYPE: Final = -1
_OWN_ORDER: Final = -1


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
def _check_free_block(mem: Memory, pfn: int, order: int, migratetype: int) -> int:
    # What holds of blocks on the buddy lists only.
    m = mem.mem_map
    # A block that spans pageblocks must not hide one of another type (CMA).
    for page in range(pfn, pfn + (1 << order), PAGEBLOCK_NR_PAGES):
        if get_pageblock_migratetype(mem, page) != migratetype:
            return WRONG_LIST
    buddy = pfn ^ (1 << order)
    if (
        order < PAGEBLOCK_ORDER
        and buddy + (1 << order) <= mem.vm[0].nr_pages
        and m[buddy].page_type == PGTY_buddy
        and m[buddy].private == order
        and m[buddy].zone == m[pfn].zone
    ):
        return UNMERGED
    return NO_PROBLEM


@compiled
def _check_list(
    mem: Memory, seen: object, head: int, zone: int, order: int, migratetype: int, contents: bool
) -> tuple[int, int]:
    # Walks one list of blocks without owners; returns the problem and how many pages there were.
    # `migratetype` is _NO_TYPE for what is not on a buddy list, `order` _OWN_ORDER if blocks say it.
    m = mem.mem_map
    vm = mem.vm[0]
    pages = 0
    before = head
    pfn = list_next(mem, head)
    while pfn != head:
        vm.bug_pfn = pfn
        if pfn < 0 or pfn >= vm.nr_pages or m[pfn].lru_prev != before:
            return BAD_LINKS, 0
        if m[pfn].zone != zone:
            return WRONG_LIST, 0
        block_order = m[pfn].private if order == _OWN_ORDER else order
        if block_order < 0 or block_order >= NR_PAGE_ORDERS:
            return BAD_BLOCK, 0
        free_type = PGTY_none if migratetype == _NO_TYPE else PGTY_buddy
        problem = _check_block(mem, seen, pfn, block_order, free_type, contents)
        if problem == NO_PROBLEM and migratetype != _NO_TYPE:
            problem = _check_free_block(mem, pfn, block_order, migratetype)
        if problem != NO_PROBLEM:
            return problem, 0
        pages += 1 << block_order
        before = pfn
        pfn = list_next(mem, pfn)
    if m[head].lru_prev != before:
        return BAD_LINKS, 0
    return NO_PROBLEM, pages


@compiled
def _check_free_lists(mem: Memory, seen: object, contents: bool) -> int:
    vm = mem.vm[0]
    for zone in range(vm.nr_zones):
        pages = 0
        cma = 0
        highatomic = 0
        for order in range(NR_PAGE_ORDERS):
            blocks = 0
            for migratetype in range(MIGRATE_TYPES):
                head = free_list(mem, zone, order, migratetype)
                problem, listed = _check_list(mem, seen, head, zone, order, migratetype, contents)
                if problem != NO_PROBLEM:
                    return problem
                blocks += listed >> order
                if migratetype != MIGRATE_ISOLATE:
                    pages += listed
                if migratetype == MIGRATE_CMA:
                    cma += listed
                if migratetype == MIGRATE_HIGHATOMIC:
                    highatomic += listed
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
    vm = mem.vm[0]
    for cpu in range(vm.nr_cpus):
        for zone in range(vm.nr_zones):
            pages = 0
            for pindex in range(NR_PCP_LISTS):
                head = pcp_list(mem, zone, cpu, pindex)
                order = pindex_to_order(pindex)
                problem, listed = _check_list(mem, seen, head, zone, order, _NO_TYPE, contents)
                if problem != NO_PROBLEM:
                    return problem
                pages += listed
            if pages != mem.pcp[pcp_of(mem, zone, cpu)].count:
                vm.bug_pfn = NO_PAGE
                return BAD_PCP_COUNT
    return NO_PROBLEM


@compiled
def _check_deferred(mem: Memory, seen: object, contents: bool) -> int:
    vm = mem.vm[0]
    for zone in range(vm.nr_zones):
        head = trylock_free_pages(mem, zone)
        problem, pages = _check_list(mem, seen, head, zone, _OWN_ORDER, _NO_TYPE, contents)
        if problem != NO_PROBLEM:
            return problem
        if pages != mem.zone[zone].nr_trylock_free:
            vm.bug_pfn = NO_PAGE
            return BAD_DEFERRED_COUNT
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
def _check_hugetlb(mem: Memory, seen: object, contents: bool) -> int:
    m = mem.mem_map
    vm = mem.vm[0]
    for h in range(NR_HSTATES):
        hs = mem.hstate[h]
        free = 0
        surplus = 0
        total = 0
        for nid in range(vm.nr_nodes):
            head = hugepage_freelist(mem, h, nid)
            count = 0
            before = head
            pfn = list_next(mem, head)
            while pfn != head:
                vm.bug_pfn = pfn
                if pfn < 0 or pfn >= vm.nr_pages or m[pfn].lru_prev != before:
                    return BAD_LINKS
                if seen[pfn] != 0:  # type: ignore[index]
                    return LISTED_TWICE
                seen[pfn] = 3  # type: ignore[index]
                if m[pfn].page_type != PGTY_hugetlb or compound_order(mem, pfn) != hs.order:
                    return BAD_HUGE_PAGE
                if folio_nid(mem, pfn) != nid or (m[pfn].private & HPG_freed) == 0:
                    return BAD_HUGE_PAGE
                if m[pfn]._refcount != 0 or m[pfn]._mapcount != -1 or m[pfn].mapping != 0:
                    return STILL_OWNED
                if contents and folio_test_hugetlb_zeroed(mem, pfn):
                    if first_word_not(mem, pfn, 1 << hs.order, 0) >= 0:
                        return FALSE_ZERO
                count += 1
                before = pfn
                pfn = list_next(mem, pfn)
            vm.bug_pfn = NO_PAGE
            if m[head].lru_prev != before:
                return BAD_LINKS
            if count != hs.free_huge_pages_node[nid]:
                return BAD_HUGE_COUNT
            free += count
            surplus += hs.surplus_huge_pages_node[nid]
            total += hs.nr_huge_pages_node[nid]
        if free != hs.free_huge_pages or surplus != hs.surplus_huge_pages or total != hs.nr_huge_pages:
            return BAD_HUGE_COUNT
        if hs.resv_huge_pages < 0 or hs.resv_huge_pages > free or surplus < 0 or surplus > total:
            return BAD_HUGE_COUNT
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
        problem = _check_deferred(mem, seen, contents)
    if problem == NO_PROBLEM:
        problem = _check_balloon(mem, seen, contents)
    if problem == NO_PROBLEM:
        problem = _check_hugetlb(mem, seen, contents)
    if problem == NO_PROBLEM:
        problem = _check_unlisted(mem, seen)
    return problem


def _check_hugetlb_types(mem: Memory) -> int:
    # Each page of a pool is counted in it, in use or not.
    pages = mem.mem_map[: int(mem.vm[0].nr_pages)]
    orders = pages.order[pages.page_type == PGTY_hugetlb]
    for h in range(NR_HSTATES):
        if np.count_nonzero(orders == mem.hstate[h].order) != mem.hstate[h].nr_huge_pages:
            mem.vm[0].bug_pfn = NO_PAGE
            return BAD_HUGE_COUNT
    return NO_PROBLEM


def _check_accounts(mem: Memory) -> int:
    # Cgroups and the swap area: counters beside the lists. Not compiled, but whole arrays at once.
    nr_pages = int(mem.vm[0].nr_pages)
    mem.vm[0].bug_pfn = NO_PAGE
    data = mem.mem_map["memcg_data"][:nr_pages]
    (charged,) = np.nonzero(data)
    pages = np.left_shift(1, mem.mem_map["order"][charged].astype(np.int64))
    usage = np.zeros(len(mem.memcg), dtype=np.int64)
    for memcg in np.unique(data[charged]) - 1:
        at = int(memcg)
        while at > 0:
            usage[at] += int(pages[data[charged] == memcg + 1].sum())
            at = int(mem.memcg[at].parent)
    if np.any(usage != np.where(mem.memcg["in_use"] != 0, mem.memcg["usage"], 0)):
        return BAD_CHARGE
    if int(mem.vm[0].nr_swap_pages) != np.count_nonzero(mem.swap_map == 0):
        return BAD_SWAP_COUNT
    return NO_PROBLEM


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
    problem = int(check_memory(mem, seen, contents)) or _check_hugetlb_types(mem) or _check_accounts(mem)
    if problem:
        raise VmBug(describe_bug(mem, VmBug(PROBLEMS[problem])))
