# SPDX-License-Identifier: GPL-2.0-only
"""What a guest must do when it comes back from hibernation.

Kernel: `clear_or_poison_free_pages` (`kernel/power/snapshot.c`). The image holds the page
records but not the contents of free pages. Whatever was known of a free page is not
known any more: its zero mark, and also the pattern or the zeros that poisoning and
`init_on_free` promise for every free page without a mark. The series does not handle the
marks; a restored guest that kept them would hand out stale bytes as zero.
"""

from __future__ import annotations

from hostzero.jit import compiled, inline
from hostzero.mm.cachealias import discard_kernel_lines
from hostzero.mm.clear_page import clear_kernel_pages, kernel_poison_pages
from hostzero.mm.list import list_first, list_next
from hostzero.mm.mmzone import (
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    Memory,
    free_list,
    pcp_list,
    trylock_free_pages,
)
from hostzero.mm.page_flags import ClearPageZeroed, PageZeroed, __ClearPageZeroed
from hostzero.mm.pcplist import pindex_to_order


@inline
def forget_list(mem: Memory, head: int, order: int) -> int:
    """Drop the marks of one list's blocks and make their contents what free pages have.

    A negative `order` means that each block says its own.
    """
    forgotten = 0
    own_order = order < 0
    pfn = list_first(mem, head)
    while pfn != head:
        if own_order:
            order = mem.mem_map[pfn].private
        if PageZeroed(mem, pfn):
            __ClearPageZeroed(mem, pfn)
            forgotten += 1
        if mem.vm[0].cpu_dcache_aliasing != 0:
            discard_kernel_lines(mem, pfn, 1 << order)  # a machine that was off has empty caches
        if mem.vm[0].page_poisoning != 0:
            kernel_poison_pages(mem, pfn, 1 << order)
        if mem.vm[0].init_on_free != 0:
            clear_kernel_pages(mem, pfn, 1 << order)
        pfn = list_next(mem, pfn)
    return forgotten


@compiled
def forget_zero_claims(mem: Memory) -> int:
    """Drop every zero mark and clear or poison every free page; return how many had a mark."""
    vm = mem.vm[0]
    forgotten = 0
    for zone in range(vm.nr_zones):
        for order in range(NR_PAGE_ORDERS):
            for migratetype in range(MIGRATE_TYPES):
                forgotten += forget_list(mem, free_list(mem, zone, order, migratetype), order)
        for cpu in range(vm.nr_cpus):
            for pindex in range(NR_PCP_LISTS):
                forgotten += forget_list(mem, pcp_list(mem, zone, cpu, pindex), pindex_to_order(pindex))
        forgotten += forget_list(mem, trylock_free_pages(mem, zone), -1)
    pfn = list_first(mem, vm.balloon_head)
    while pfn != vm.balloon_head:
        if PageZeroed(mem, pfn):
            ClearPageZeroed(mem, pfn)
            forgotten += 1
        pfn = list_next(mem, pfn)
    return forgotten
