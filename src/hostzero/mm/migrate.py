# SPDX-License-Identifier: GPL-2.0-only
"""Emptying a range of its pages: isolate what can be moved, and move it.

Kernel: `isolate_migratepages_range` (`mm/compaction.c`), `migrate_pages` (`mm/migrate.c`).
Anonymous folios are copied (`migrate_folio`); of a balloon page the driver tells the host,
which is why this is called from Python. A huge page for which there is no target of its size
is split and its pages are moved one by one, as in Linux.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import numpy as np

from hostzero.jit import compiled
from hostzero.mm.balloon import balloon_page_isolate, balloon_page_putback
from hostzero.mm.buddy import buddy_order
from hostzero.mm.huge_memory import __split_huge_pmd, split_folio
from hostzero.mm.migrate_folio import (
    folio_isolate,
    folio_putback,
    folio_was_freed,
    free_unused_target,
    migrate_folio,
)
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE, Memory, page_zone
from hostzero.mm.page_flags import PageBuddy, PGTY_offline, compound_head, compound_order
from hostzero.mm.pgtable_walk import NO_ENTRY, PAGE_PSE
from hostzero.mm.rmap import folio_pmd
from hostzero.units import PAGE_SHIFT

if TYPE_CHECKING:
    from hostzero.mm.manager import MemoryManager

UNMOVABLE: Final = -16
"""What `isolate_migratepages_range` returns for a page that cannot be moved (kernel: -EBUSY)."""


@compiled
def putback_movable_pages(mem: Memory, pfns: object, count: int, cpu: int) -> None:
    """Undo the isolation of the first `count` of `pfns` (kernel: same name)."""
    for i in range(count):
        pfn = pfns[i]  # type: ignore[index]
        if mem.mem_map[pfn].page_type == PGTY_offline:
            balloon_page_putback(mem, pfn)
        else:
            folio_putback(mem, pfn, cpu)


@compiled
def isolate_migratepages_range(mem: Memory, start: int, end: int, out: object) -> int:
    """Isolate every movable folio with a page in `[start, end)`; return how many.

    Source: same name, as contiguous allocation uses it. Free blocks and pages without a
    reference (parked on a per-CPU list, or frozen by an owner) are passed over: whoever wants
    the range finds out in the end whether all of it is free. A folio that reaches over an end
    of the range is isolated whole.

    Args:
        mem: the memory manager's arrays.
        start: the first page.
        end: behind the last page.
        out: filled with the heads of the isolated folios and balloon pages; int64, of shape
            (end - start,) or more.

    Returns:
        The number of heads in `out`, which belong to the caller: `migrate_pages` or
        `putback_movable_pages` takes them. `UNMOVABLE` if a page cannot be moved (-EBUSY):
        then nothing is isolated any more, and `vm.bug_pfn` is that page.
    """
    found = 0
    pfn = start
    while pfn < end:
        if PageBuddy(mem, pfn):
            pfn += 1 << buddy_order(mem, pfn)
            continue
        head = compound_head(mem, pfn)
        if mem.mem_map[head]._refcount == 0:
            pfn += 1
            continue
        if not balloon_page_isolate(mem, head) and not folio_isolate(mem, head):
            putback_movable_pages(mem, out, found, 0)
            mem.vm[0].bug_pfn = head
            return UNMOVABLE
        out[found] = head  # type: ignore[index]
        found += 1
        pfn = head + (1 << compound_order(mem, head))
    return found


def migrate_pages(
    manager: MemoryManager,
    pfns: Iterable[int],
    alloc_target: Callable[[int], int],
    free_target: Callable[[int, int], None] | None = None,
    *,
    cpu: int = 0,
) -> list[int]:
    """Move isolated folios and balloon pages elsewhere (kernel: same name).

    Args:
        manager: the guest.
        pfns: heads, isolated by `isolate_migratepages_range`.
        alloc_target: called with an order; returns a frozen block, compound if the order is not
            0, that carries no zero hint, or `NO_PAGE`.
        free_target: called with an unused target and its order; none frees it.
        cpu: whose lists the old pages are freed to.

    Returns:
        The heads that could not be moved: pinned meanwhile, without a target, or of a balloon
        that is busy or whose device failed. They are put back where they were.
    """
    mem, vm = manager.mem, manager.mem.vm[0]
    pending = [int(pfn) for pfn in reversed(list(pfns))]
    left: list[int] = []
    while pending:
        pfn = pending.pop()
        if folio_was_freed(mem, pfn):
            folio_putback(mem, pfn, cpu)
            continue
        order = int(compound_order(mem, pfn))
        target = int(alloc_target(order))
        if target == NO_PAGE and order > 0 and _split(manager, pfn, cpu):
            parts = range(pfn, pfn + (1 << order))
            pending += [part for part in reversed(parts) if folio_isolate(mem, part)]
            continue
        if target != NO_PAGE and _migrate(manager, target, pfn, free_target, cpu):
            vm.pgmigrate_success += 1 << order
            continue
        vm.pgmigrate_fail += 1 << order
        left.append(pfn)
        putback_movable_pages(mem, np.array([pfn]), 1, cpu)
    return left


def _migrate(
    manager: MemoryManager, target: int, pfn: int, free_target: Callable[[int, int], None] | None, cpu: int
) -> bool:
    mem = manager.mem
    order = int(compound_order(mem, pfn))
    moved = False
    try:
        if int(mem.mem_map[pfn].page_type) == PGTY_offline:
            moved = manager.balloon.migrate(target, pfn, cpu)
        else:
            moved = bool(migrate_folio(mem, target, pfn, cpu))
    finally:
        if not moved:
            if free_target is not None:
                free_target(target, order)
            else:
                free_unused_target(mem, target, order, cpu)
    return moved


def _split(manager: MemoryManager, pfn: int, cpu: int) -> bool:
    # Kernel: try_split_folio(). The isolation's reference goes with the split, which counts anew.
    mem = manager.mem
    order = int(compound_order(mem, pfn))
    pmd = int(folio_pmd(mem, pfn, order))
    if pmd == NO_ENTRY:
        return False
    if order < HPAGE_PMD_ORDER or not int(mem.ram[pmd]) & PAGE_PSE:
        split_folio(mem, pfn, cpu)
        return True
    addr = int(mem.mem_map[pfn].index) << PAGE_SHIFT
    node = int(mem.zone[int(page_zone(mem, pfn))].node)
    return bool(__split_huge_pmd(mem, pmd, addr, node, cpu))
