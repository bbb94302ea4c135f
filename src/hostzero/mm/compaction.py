# SPDX-License-Identifier: GPL-2.0-only
"""Compaction: moving folios together so that large blocks become free (kernel: `mm/compaction.c`).

Two ways in. Direct compaction (`try_to_compact_pages`) is called by an allocation that found
no block, from compiled code: it passes balloon pages over, because only Python can call their
driver. `Compaction.compact_memory` is `/proc/sys/vm/compact_memory` and moves them too.

A direct compaction waits for one block: `buddy.compaction_capture` hands it the first that it
would take, before the block is on a list where somebody else could take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostzero.jit import compiled, far, inline
from hostzero.mm.balloon import balloon_page_putback
from hostzero.mm.compaction_scan import (
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    MIGRATE_SYNC_LIGHT,
    compaction_alloc,
    compaction_free,
    is_via_compact_memory,
    isolate_migratepages,
    pageblock_start_pfn,
    release_free_list,
)
from hostzero.mm.fallback import ALLOC_CMA, ALLOC_WMARK_MASK, find_suitable_fallback
from hostzero.mm.gfp import __GFP_IO, gfp_migratetype
from hostzero.mm.list import list_del, list_empty, list_first
from hostzero.mm.migrate_folio import folio_putback, folio_was_freed, migrate_folio
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_MOVABLE,
    NO_PAGE,
    NR_PAGE_ORDERS,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Memory,
    compact_migratepages,
    compact_movable_ops,
    free_list,
    pcp_of,
)
from hostzero.mm.page_flags import compound_order
from hostzero.mm.pcplist import drain_all_pages, free_pcppages_bulk
from hostzero.mm.watermark import __zone_watermark_ok, watermark, zone_allowed

if TYPE_CHECKING:
    from hostzero.mm.manager import MemoryManager

COMPACT_SKIPPED: Final = 1
COMPACT_DEFERRED: Final = 2
COMPACT_CONTINUE: Final = 4
COMPACT_COMPLETE: Final = 5
COMPACT_PARTIAL_SKIPPED: Final = 6
COMPACT_CONTENDED: Final = 7
COMPACT_SUCCESS: Final = 8
"""What became of an attempt (kernel: `enum compact_result`); the larger, the better."""

_MOVABLE_OPS: Final = 9  # not the kernel's: balloon pages are isolated, and Python must move them

COMPACT_PRIO_SYNC_LIGHT: Final = 1
COMPACT_PRIO_ASYNC: Final = 2

_COMPACT_MAX_DEFER_SHIFT = 6


@inline
def compaction_deferred(mem: Memory, zone: int, order: int) -> bool:
    """Return whether it is too early to try a zone again after it failed (kernel: same name)."""
    z = mem.zone[zone]
    if order < z.compact_order_failed:
        return False
    z.compact_considered += 1
    if z.compact_considered >= 1 << z.compact_defer_shift:
        z.compact_considered = 1 << z.compact_defer_shift
        return False
    return True


@inline
def defer_compaction(mem: Memory, zone: int, order: int) -> None:
    """Stay away from a zone for twice as many attempts as the last time (kernel: same name)."""
    z = mem.zone[zone]
    z.compact_considered = 0
    if z.compact_defer_shift < _COMPACT_MAX_DEFER_SHIFT:
        z.compact_defer_shift += 1
    if order < z.compact_order_failed:
        z.compact_order_failed = order


@inline
def compaction_defer_reset(mem: Memory, zone: int, order: int, alloc_success: bool) -> None:
    """Note that compaction helped, and whether the allocation has succeeded (kernel: same name)."""
    z = mem.zone[zone]
    if alloc_success:
        z.compact_considered = 0
        z.compact_defer_shift = 0
    if order >= z.compact_order_failed:
        z.compact_order_failed = order + 1


@inline
def reset_cached_positions(mem: Memory, zone: int) -> None:
    """Let the scanners start at the ends of the zone again (kernel: same name)."""
    z = mem.zone[zone]
    z.compact_cached_migrate_pfn = z.start_pfn
    z.compact_cached_free_pfn = pageblock_start_pfn(z.end_pfn - 1)


@inline
def compact_scanners_met(mem: Memory) -> bool:
    cc = mem.cc[0]
    return cc.free_pfn >> PAGEBLOCK_ORDER <= cc.migrate_pfn >> PAGEBLOCK_ORDER


@compiled
def compact_finished(mem: Memory) -> int:
    """Return COMPACT_CONTINUE, or how compaction of a zone has ended (kernel: same name)."""
    cc = mem.cc[0]
    if compact_scanners_met(mem):
        reset_cached_positions(mem, cc.zone)
        return COMPACT_COMPLETE if cc.whole_zone != 0 else COMPACT_PARTIAL_SKIPPED
    if is_via_compact_memory(cc.order):
        return COMPACT_CONTINUE
    if (cc.migrate_pfn & (PAGEBLOCK_NR_PAGES - 1)) != 0:
        # A pageblock is finished once begun: half of it moved away serves nobody.
        return COMPACT_CONTINUE
    for order in range(cc.order, NR_PAGE_ORDERS):
        if not list_empty(mem, free_list(mem, cc.zone, order, cc.migratetype)):
            return COMPACT_SUCCESS
        if cc.migratetype == MIGRATE_MOVABLE and not list_empty(
            mem, free_list(mem, cc.zone, order, MIGRATE_CMA)
        ):
            return COMPACT_SUCCESS
        if find_suitable_fallback(mem, cc.zone, order, cc.migratetype, True) >= 0:
            return COMPACT_SUCCESS
    return COMPACT_CONTINUE


@compiled
def migrate_isolated(mem: Memory) -> bool:
    """Move the isolated folios to free blocks; False if these have run out (kernel: `migrate_pages`).

    What cannot be moved is put back.
    """
    cc = mem.cc[0]
    vm = mem.vm[0]
    head = compact_migratepages(mem)
    enough = True
    while not list_empty(mem, head):
        pfn = list_first(mem, head)
        list_del(mem, pfn)
        order = compound_order(mem, pfn)
        if folio_was_freed(mem, pfn):
            cc.nr_migratepages -= 1 << order
            folio_putback(mem, pfn, cc.cpu)
            continue
        target = compaction_alloc(mem, order) if enough else NO_PAGE
        if target != NO_PAGE and migrate_folio(mem, target, pfn, cc.cpu):
            vm.pgmigrate_success += 1 << order
            cc.nr_migrated += 1 << order
            continue
        vm.pgmigrate_fail += 1 << order
        if target == NO_PAGE:
            enough = False
        else:
            compaction_free(mem, target, order)
        folio_putback(mem, pfn, cc.cpu)
    return enough


@compiled
def compact_zone_begin(
    mem: Memory, zone: int, order: int, migratetype: int, mode: int, movable_ops: bool, cpu: int
) -> None:
    """Set up `mem.cc` for one zone (kernel: `struct compact_control`, head of `compact_zone`)."""
    cc = mem.cc[0]
    z = mem.zone[zone]
    cc.active = 1
    cc.zone = zone
    cc.order = order
    cc.migratetype = migratetype
    cc.mode = mode
    cc.direct_compaction = 0 if is_via_compact_memory(order) else 1
    cc.movable_ops = 1 if movable_ops else 0
    cc.cpu = cpu
    cc.last_migrated_pfn = NO_PAGE
    cc.nr_migratepages = 0
    cc.nr_freepages = 0
    cc.nr_migrated = 0
    if z.compact_cached_free_pfn == 0 or is_via_compact_memory(order):
        reset_cached_positions(mem, zone)
    cc.migrate_pfn = z.compact_cached_migrate_pfn
    cc.free_pfn = z.compact_cached_free_pfn
    cc.whole_zone = 1 if cc.migrate_pfn == z.start_pfn else 0


@compiled
def compact_zone_run(mem: Memory) -> int:
    """Compact until there is what is wanted or the scanners meet (kernel: `compact_zone`).

    Returns `_MOVABLE_OPS` in between when balloon pages have been isolated: the caller moves
    them and calls again.
    """
    cc = mem.cc[0]
    while True:
        result = compact_finished(mem)
        if result != COMPACT_CONTINUE:
            return result
        cc.nr_migratepages = 0
        if isolate_migratepages(mem) > 0:
            cc.last_migrated_pfn = pageblock_start_pfn(cc.migrate_pfn - 1)
            enough = migrate_isolated(mem)
            if not list_empty(mem, compact_movable_ops(mem)):
                return _MOVABLE_OPS
            if not enough and not compact_scanners_met(mem):
                return COMPACT_CONTENDED
            if mem.vm[0].capture_order != 0 and cc.capture_page != NO_PAGE:
                return COMPACT_SUCCESS
        if cc.order > 0 and cc.last_migrated_pfn != NO_PAGE:
            # Once past a block of the wanted order, what was freed in it must not stay parked.
            if cc.last_migrated_pfn < cc.migrate_pfn & ~((1 << cc.order) - 1):
                index = pcp_of(mem, cc.zone, cc.cpu)
                free_pcppages_bulk(mem, cc.zone, cc.cpu, mem.pcp[index].count, 0)
                cc.last_migrated_pfn = NO_PAGE


@compiled
def compact_zone_end(mem: Memory) -> None:
    """Give back everything that compaction still holds and remember where it was."""
    cc = mem.cc[0]
    z = mem.zone[cc.zone]
    while not list_empty(mem, compact_migratepages(mem)):
        pfn = list_first(mem, compact_migratepages(mem))
        list_del(mem, pfn)
        folio_putback(mem, pfn, cc.cpu)
    while not list_empty(mem, compact_movable_ops(mem)):
        pfn = list_first(mem, compact_movable_ops(mem))
        list_del(mem, pfn)
        balloon_page_putback(mem, pfn)
    if not compact_scanners_met(mem):
        z.compact_cached_migrate_pfn = pageblock_start_pfn(cc.migrate_pfn)
        z.compact_cached_free_pfn = pageblock_start_pfn(cc.free_pfn)
    highest = release_free_list(mem)
    if highest != NO_PAGE and pageblock_start_pfn(highest) > z.compact_cached_free_pfn:
        z.compact_cached_free_pfn = pageblock_start_pfn(highest)
    cc.active = 0


@inline
def compaction_suit_allocation_order(mem: Memory, zone: int, order: int, alloc_flags: int) -> int:
    """Return whether a zone needs compaction for a request, and can have it (kernel: same name).

    COMPACT_SUCCESS: it need not; COMPACT_SKIPPED: too few pages are free to move others to.
    """
    mark = watermark(mem, zone, alloc_flags & ALLOC_WMARK_MASK)
    if __zone_watermark_ok(mem, zone, order, mark, 0, alloc_flags):
        return COMPACT_SUCCESS
    if not __zone_watermark_ok(mem, zone, 0, mark + (2 << order), 0, ALLOC_CMA):
        return COMPACT_SKIPPED
    return COMPACT_CONTINUE


@far
def compact_zone_order(
    mem: Memory, zone: int, order: int, migratetype: int, prio: int, alloc_flags: int, cpu: int
) -> int:
    """Compact a zone for a waiting allocation; `mem.cc.capture_page` is what it captured, if anything."""
    cc = mem.cc[0]
    result = compaction_suit_allocation_order(mem, zone, order, alloc_flags)
    if result != COMPACT_CONTINUE:
        return result
    mode = MIGRATE_ASYNC if prio == COMPACT_PRIO_ASYNC else MIGRATE_SYNC_LIGHT
    compact_zone_begin(mem, zone, order, migratetype, mode, False, cpu)
    mem.vm[0].capture_order = order
    result = compact_zone_run(mem)
    if cc.last_migrated_pfn != NO_PAGE:
        # Linux comes back for what is parked when it tries the allocation again.
        free_pcppages_bulk(mem, zone, cpu, mem.pcp[pcp_of(mem, zone, cpu)].count, 0)
    compact_zone_end(mem)
    mem.vm[0].capture_order = 0
    return COMPACT_SUCCESS if cc.capture_page != NO_PAGE else result


@far
def try_to_compact_pages(
    mem: Memory, gfp: int, order: int, alloc_flags: int, node: int, prio: int, cpu: int
) -> int:
    """Compact zone by zone until an allocation may succeed; return the best result.

    Source: same name. Nothing is tried for a request that is itself made on behalf of a
    compaction, by a driver that moves a balloon page (kernel: `PF_MEMALLOC`).
    """
    cc = mem.cc[0]
    best = COMPACT_SKIPPED
    if (gfp & __GFP_IO) == 0 or cc.active != 0:
        return best
    cc.capture_page = NO_PAGE
    for k in range(mem.vm[0].nr_zones):
        zone = mem.zonelists[node, k]
        if zone < 0:  # the end of a row for a set of nodes
            break
        if not zone_allowed(mem, zone, gfp, node):
            continue
        if compaction_deferred(mem, zone, order):
            best = max(best, COMPACT_DEFERRED)
            continue
        result = compact_zone_order(mem, zone, order, gfp_migratetype(gfp), prio, alloc_flags, cpu)
        best = max(best, result)
        if result == COMPACT_SUCCESS:
            compaction_defer_reset(mem, zone, order, False)
            break
        if prio != COMPACT_PRIO_ASYNC and result in (COMPACT_COMPLETE, COMPACT_PARTIAL_SKIPPED):
            defer_compaction(mem, zone, order)
    return best


@compiled
def take_captured_page(mem: Memory) -> int:
    """Return the block that direct compaction captured, or NO_PAGE; it is the caller's then."""
    pfn = mem.cc[0].capture_page
    mem.cc[0].capture_page = NO_PAGE
    return pfn


@compiled
def _take_movable_ops_page(mem: Memory) -> int:
    head = compact_movable_ops(mem)
    if list_empty(mem, head):
        return NO_PAGE
    pfn = list_first(mem, head)
    list_del(mem, pfn)
    return pfn


class Compaction:
    """Compaction on request of one guest."""

    def __init__(self, manager: MemoryManager) -> None:
        """Compact nothing yet."""
        self._manager = manager
        self._mem = manager.mem

    def compact_memory(self) -> int:
        """Compact every zone; return how many pages moved (kernel: `/proc/sys/vm/compact_memory`).

        Balloon pages move if their driver can tell the host. Per-CPU lists are drained before
        and after, which Linux leaves to who writes the file: parked pages split large blocks.
        Does nothing, and returns 0, if called while a zone is being compacted.
        """
        mem = self._mem
        if mem.cc[0].active:
            return 0
        drain_all_pages(mem)
        moved = 0
        for zone in range(len(mem.zone)):
            compact_zone_begin(mem, zone, -1, MIGRATE_MOVABLE, MIGRATE_SYNC, True, 0)
            try:
                while compact_zone_run(mem) == _MOVABLE_OPS:
                    self._migrate_balloon_pages()
            finally:
                compact_zone_end(mem)
            moved += int(mem.cc[0].nr_migrated)
        drain_all_pages(mem)
        return moved

    def _migrate_balloon_pages(self) -> None:
        mem, vm, balloon = self._mem, self._mem.vm[0], self._manager.balloon
        while (pfn := int(_take_movable_ops_page(mem))) != NO_PAGE:
            target = int(compaction_alloc(mem, 0))
            moved = False
            try:
                moved = target != NO_PAGE and balloon.migrate(target, pfn)
            finally:
                if moved:
                    vm.pgmigrate_success += 1
                    mem.cc[0].nr_migrated += 1
                else:
                    vm.pgmigrate_fail += 1
                    balloon.putback(pfn)
                    if target != NO_PAGE:
                        compaction_free(mem, target, 0)
