# SPDX-License-Identifier: GPL-2.0-only
"""Walking every list of a small guest, and entering what is there into the present shape."""

from __future__ import annotations

import numpy as np

from hostzero.check.small.layout import (
    BAD_BLOCK,
    BAD_COUNT,
    BAD_LINKS,
    BALLOON,
    CODE,
    DEFERRED,
    DONE,
    FREE,
    MARK_REPORTED,
    MARK_ZEROED,
    NOBODYS,
    NOW,
    NR_CHANGED,
    ORDER_SHIFT,
    PARKED,
    PLACE_SHIFT,
    T_BALLOON,
    T_CMA,
    T_CPUS,
    T_DEFERRED,
    T_FREE,
    T_HIGHATOMIC,
    TWICE,
    WRONG_TYPE,
    Scene,
    fail,
)
from hostzero.jit import COMPILER_ON, compiled
from hostzero.mm.list import list_next
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_NR_PAGES,
    Memory,
    free_list,
    get_pageblock_migratetype,
    pcp_list,
    pcp_of,
)
from hostzero.mm.page_flags import PG_reported, PG_zeroed, PGTY_buddy, PGTY_none, PGTY_offline
from hostzero.mm.pcplist import pindex_to_order

if COMPILER_ON:

    @compiled
    def first_busy_head(mem: Memory, head: int, end: int) -> int:
        """Return the first list head in `[head, end)` whose list is not empty, or `end`."""
        while head < end and mem.mem_map[head].lru_next == head:
            head += 1
        return head

else:

    def first_busy_head(mem: Memory, head: int, end: int) -> int:
        """Return the first list head in `[head, end)` whose list is not empty, or `end`."""
        (busy,) = (mem.mem_map["lru_next"][head:end] != np.arange(head, end)).nonzero()
        return int(head + busy[0]) if len(busy) else end


@compiled
def _walk_list(
    mem: Memory, scene: Scene, base: int, head: int, kind: int, order: int, migratetype: int
) -> int:
    # Enters the blocks of one list into the present shape; returns how many pages there were, or -1.
    m = mem.mem_map
    nr_pages = mem.vm[0].nr_pages
    past = nr_pages - base  # the other half begins at 0 or at nr_pages
    pages = 0
    before = head
    pfn = list_next(mem, head)
    while pfn != head:
        if pfn < 0 or pfn >= nr_pages or m[pfn].lru_prev != before:
            fail(scene, BAD_LINKS, pfn, 0, head)
            return -1
        own = order
        if kind == DEFERRED:
            own = np.int64(m[pfn].private)  # type: ignore[assignment]
        if own < 0 or own >= NR_PAGE_ORDERS or (pfn & ((1 << own) - 1)) != 0 or pfn + (1 << own) > nr_pages:
            fail(scene, BAD_BLOCK, pfn, own, head)
            return -1
        page_type = PGTY_none
        if kind == FREE:
            page_type = PGTY_buddy
        if kind == BALLOON:
            page_type = PGTY_offline
        if m[pfn].page_type != page_type or (kind == FREE and m[pfn].private != own):
            fail(scene, BAD_BLOCK, pfn, own, head)
            return -1
        for page in range(pfn, pfn + (1 << own), PAGEBLOCK_NR_PAGES):
            if kind == FREE and get_pageblock_migratetype(mem, page) != migratetype:
                fail(scene, WRONG_TYPE, page, own, head)
                return -1
        if scene.shape[base + pfn] != 0:
            fail(scene, TWICE, pfn, own, head)
            return -1
        flags = np.int64(m[pfn].flags_f)
        info = kind | own << ORDER_SHIFT | head << PLACE_SHIFT
        if (flags & PG_zeroed) != 0:
            info |= MARK_ZEROED
        if (flags & PG_reported) != 0:
            info |= MARK_REPORTED
        scene.shape[base + pfn] = info
        if scene.shape[past + pfn] != info:
            scene.changed[scene.ctl[NR_CHANGED]] = pfn
            scene.ctl[NR_CHANGED] += 1
        pages += 1 << own
        before = pfn
        pfn = list_next(mem, pfn)
    if m[head].lru_prev != before:
        fail(scene, BAD_LINKS, head, 0, head)
        return -1
    return pages


@compiled
def walk(mem: Memory, scene: Scene) -> int:
    """Turn the present shape into the past and take the present from the lists.

    Returns DONE, or the code of what is wrong with the lists or their counters. Afterwards
    `scene.changed` holds the heads that are new or have changed.
    """
    vm = mem.vm[0]
    nr_pages = vm.nr_pages
    scene.ctl[NOW] = 1 - scene.ctl[NOW]
    base = scene.ctl[NOW] * nr_pages
    scene.shape[base : base + nr_pages] = 0
    scene.tally[:] = 0
    scene.ctl[NR_CHANGED] = 0
    buddy_end = vm.pcp_heads
    pcp_end = vm.hugetlb_heads
    deferred = vm.trylock_heads
    end = vm.balloon_head + 1
    head = first_busy_head(mem, nr_pages, end)
    while head < end:
        order = 0
        migratetype = 0
        if head < buddy_end:
            kind = FREE
            order = (head - nr_pages) // MIGRATE_TYPES
            migratetype = (head - nr_pages) % MIGRATE_TYPES
        elif head < pcp_end:
            kind = PARKED
            order = pindex_to_order((head - buddy_end) % NR_PCP_LISTS)
        elif head == deferred:
            kind = DEFERRED
        elif head == end - 1:
            kind = BALLOON
        else:
            return fail(scene, NOBODYS, mem.mem_map[head].lru_next, 0, head)
        pages = _walk_list(mem, scene, base, head, kind, order, migratetype)
        if pages < 0:
            return scene.problem[CODE]
        if kind == FREE:
            scene.tally[order] += pages >> order
            if migratetype != MIGRATE_ISOLATE:
                scene.tally[T_FREE] += pages
            if migratetype == MIGRATE_CMA:
                scene.tally[T_CMA] += pages
            if migratetype == MIGRATE_HIGHATOMIC:
                scene.tally[T_HIGHATOMIC] += pages
        elif kind == PARKED:
            scene.tally[T_CPUS + (head - buddy_end) // NR_PCP_LISTS] += pages
        elif kind == DEFERRED:
            scene.tally[T_DEFERRED] = pages
        else:
            scene.tally[T_BALLOON] = pages
        head = first_busy_head(mem, head + 1, end)
    return _check_counters(mem, scene)


@compiled
def _check_counters(mem: Memory, scene: Scene) -> int:
    vm = mem.vm[0]
    zone = mem.zone[0]
    tally = scene.tally
    for order in range(NR_PAGE_ORDERS):
        if tally[order] != zone.nr_free[order]:
            return fail(scene, BAD_COUNT, -1, order, free_list(mem, 0, order, 0))
    if tally[T_FREE] != zone.nr_free_pages or tally[T_CMA] != zone.nr_free_cma:
        return fail(scene, BAD_COUNT, -1, -1, -1)
    if tally[T_HIGHATOMIC] != zone.nr_free_highatomic:
        return fail(scene, BAD_COUNT, -1, -1, -1)
    for cpu in range(vm.nr_cpus):
        if tally[T_CPUS + cpu] != mem.pcp[pcp_of(mem, 0, cpu)].count:
            return fail(scene, BAD_COUNT, -1, -1, pcp_list(mem, 0, cpu, 0))
    if tally[T_DEFERRED] != zone.nr_trylock_free:
        return fail(scene, BAD_COUNT, -1, -1, vm.trylock_heads)
    if tally[T_BALLOON] != vm.nr_balloon_pages:
        return fail(scene, BAD_COUNT, -1, -1, vm.balloon_head)
    return DONE
