# SPDX-License-Identifier: GPL-2.0-only
"""Boot: lay out zones, fill `mem_map`, compute watermarks, free all memory.

Kernel: `mm/mm_init.c`, `__setup_per_zone_wmarks`, `zone_batchsize` (`mm/page_alloc.c`).
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from hostzero.jit import FAR_SLOTS, compiled, link
from hostzero.mm.buddy import FPI_TO_TAIL, split_large_buddy
from hostzero.mm.list import LIST_POISON
from hostzero.mm.mmzone import (
    COMPACT_DTYPE,
    HSTATE_DTYPE,
    MAX_NUMNODES,
    MAX_PAGE_ORDER,
    MEMCG_DTYPE,
    MIGRATE_CMA,
    MIGRATE_MOVABLE,
    MIGRATE_TYPES,
    MM_DTYPE,
    NO_PAGE,
    NR_HSTATES,
    NR_MEMCGS,
    NR_MMS,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGE_DTYPE,
    PAGEBLOCK_NR_PAGES,
    PCP_DTYPE,
    UNLIMITED,
    VM_DTYPE,
    WORDS_PER_PAGE,
    ZONE_DTYPE,
    Memory,
    ZoneSpec,
    nr_list_heads,
)
from hostzero.mm.page_flags import PG_reserved, PGTY_none
from hostzero.mm.records import as_records
from hostzero.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_WATERMARK_SCALE_FACTOR = 10  # in 1/10,000 of a zone (kernel: vm.watermark_scale_factor)
_LOWMEM_RESERVE_RATIO = 256  # kernel: sysctl_lowmem_reserve_ratio of DMA32
_MIN_FREE_KBYTES = (128, 262144)
_MAX_PCP_BATCH_BYTES = 256 << 10


@compiled
def memmap_init(mem: Memory, zone: int, start: int, end: int) -> None:
    """Initialise the page records of a zone (kernel: `memmap_init_range`)."""
    for pfn in range(start, end):
        page = mem.mem_map[pfn]
        page.flags_f = 0
        page._refcount = 0
        page._mapcount = -1
        page.private = 0
        page.lru_next = LIST_POISON
        page.lru_prev = LIST_POISON
        page.mapping = 0
        page.index = 0
        page.page_type = PGTY_none
        page.zone = zone
        page.order = 0
        page.memcg_data = 0


@compiled
def init_list_heads(mem: Memory, count: int) -> None:
    """Make every list head behind the last page an empty list."""
    first = mem.vm[0].nr_pages
    for head in range(first, first + count):
        mem.mem_map[head].lru_next = head
        mem.mem_map[head].lru_prev = head


@compiled
def memblock_free_pages(mem: Memory, zone: int, start: int, end: int) -> None:
    """Hand a range of boot memory to the buddy lists in the largest aligned blocks.

    A block that spans pageblocks goes pageblock by pageblock: one of them may be CMA.
    """
    pfn = start
    while pfn < end:
        order = MAX_PAGE_ORDER
        while (pfn & ((1 << order) - 1)) != 0 or pfn + (1 << order) > end:
            order -= 1
        split_large_buddy(mem, zone, pfn, order, FPI_TO_TAIL, False)
        pfn += 1 << order


def zone_batchsize(managed_pages: int) -> int:
    """Return how many pages a per-CPU list moves at once (kernel: same name)."""
    batch = min(managed_pages >> 12, _MAX_PCP_BATCH_BYTES // PAGE_SIZE)
    if batch <= 1:
        return 1
    batch += batch // 2
    return 1 << (batch.bit_length() - 1)


def setup_per_zone_wmarks(mem: Memory) -> None:
    """Compute every zone's watermarks and per-CPU limits from its managed pages."""
    zones = mem.zone
    total = int(zones.managed_pages.sum())
    lowest, highest = _MIN_FREE_KBYTES
    total_kbytes = total << (PAGE_SHIFT - 10)
    min_free_kbytes = min(max(isqrt(total_kbytes * 16), lowest), highest)
    pages_min = min_free_kbytes >> (PAGE_SHIFT - 10)
    for index in range(len(zones)):
        zone = zones[index]
        managed = int(zone.managed_pages)
        share = pages_min * managed // max(total, 1)
        step = max(share // 4, managed * _WATERMARK_SCALE_FACTOR // 10_000)
        zone.watermark_min = share
        zone.watermark_low = share + step
        zone.watermark_high = share + 2 * step
        higher = sum(
            int(zones[other].managed_pages)
            for other in range(index + 1, len(zones))
            if zones[other].node == zone.node
        )
        zone.lowmem_reserve = higher // _LOWMEM_RESERVE_RATIO
        zone.pcp_batch = zone_batchsize(managed)
        zone.pcp_high = max((share + step) // int(mem.vm[0].nr_cpus), int(zone.pcp_batch) * 4)
        for cpu in range(int(mem.vm[0].nr_cpus)):
            pcp = mem.pcp[cpu * len(zones) + index]
            pcp.batch = zone.pcp_batch
            pcp.high = zone.pcp_high


def build_zonelists(zones: Sequence[ZoneSpec]) -> NDArray[np.int64]:
    """Return, by node, the zones to try: own node first, within a node the highest first."""
    nodes = max(zone.node for zone in zones) + 1
    lists = np.empty((nodes, len(zones)), dtype=np.int64)
    for node in range(nodes):
        lists[node] = sorted(
            range(len(zones)),
            key=lambda z: ((zones[z].node - node) % nodes, -z),
        )
    return lists


def build_bind_zonelists(lists: NDArray[np.int64], zones: Sequence[ZoneSpec]) -> NDArray[np.int64]:
    """Return the zonelists of every set of nodes: row `nodemask * nodes + node` (kernel: `bind_zonelist`).

    A row holds the zones of the mask's nodes in the order in which `node` reaches them, then -1.
    Mask 0 restricts nothing, so the first rows are the nodes' own lists. `mempolicy` names rows.
    """
    nodes = len(lists)
    rows = np.full((nodes << nodes, lists.shape[1]), NO_PAGE, dtype=np.int64)
    rows[:nodes] = lists
    for nodemask in range(1, 1 << nodes):
        for node in range(nodes):
            allowed = [zone for zone in lists[node] if nodemask >> zones[zone].node & 1]
            rows[nodemask * nodes + node, : len(allowed)] = allowed
    return rows


def _resident(shape: int, dtype: np.dtype[Any]) -> Any:
    # np.zeros is lazy; control structures that fault while a benchmark runs would be
    # counted as the guest's. Writing every byte makes them resident now.
    array = np.empty(shape, dtype=dtype)
    array.view(np.uint8).fill(0)
    return as_records(array)


def build_memory(
    ram: NDArray[np.uint64],
    zones: Sequence[ZoneSpec],
    nr_cpus: int,
    cma_pages: int,
    reserved_pages: int,
    *,
    aliasing: bool = False,
    swap_pages: int = 0,
) -> Memory:
    """Return the arrays of a booted memory manager, all but the reserved pages free.

    Args:
        ram: guest RAM as 64-bit words; its length decides how many pages there are.
        zones: the zones in ascending order of address, without gaps.
        nr_cpus: how many CPUs have per-CPU lists.
        cma_pages: how many pages at the end of the last zone are CMA; whole pageblocks.
        reserved_pages: how many pages from 0 on never become free, as the firmware's.
        aliasing: the machine's caches alias, and `Memory.kernel_lines` is needed.
        swap_pages: how many pages the swap area holds.
    """
    nr_pages = zones[-1].end
    zonelists = build_zonelists(zones)
    heads = nr_list_heads(len(zones), nr_cpus)
    vm = _resident(1, VM_DTYPE)
    mem = Memory(
        mem_map=_resident(nr_pages + heads, PAGE_DTYPE),
        compound_head=np.full(nr_pages, 0, dtype=np.int64),
        zone=_resident(len(zones), ZONE_DTYPE),
        pcp=_resident(nr_cpus * len(zones), PCP_DTYPE),
        pageblock=np.full(-(-nr_pages // PAGEBLOCK_NR_PAGES), MIGRATE_MOVABLE, dtype=np.int64),
        zonelists=build_bind_zonelists(zonelists, zones),
        vm=vm,
        far=np.full(FAR_SLOTS, 0, dtype=np.int64),
        ram=ram,
        mms=_resident(NR_MMS, MM_DTYPE),
        memcg=_resident(NR_MEMCGS, MEMCG_DTYPE),
        hstate=_resident(NR_HSTATES, HSTATE_DTYPE),
        swap_map=np.full(swap_pages, 0, dtype=np.int64),
        swap_area=np.full(swap_pages * WORDS_PER_PAGE, 0, dtype=np.uint64),
        cc=_resident(1, COMPACT_DTYPE),
        kernel_lines=np.full(nr_pages if aliasing else 0, 0, dtype=np.int64),
    )
    link(mem)
    vm[0].nr_pages = nr_pages
    vm[0].nr_zones = len(zones)
    vm[0].nr_cpus = nr_cpus
    vm[0].pcp_heads = nr_pages + len(zones) * NR_PAGE_ORDERS * MIGRATE_TYPES
    vm[0].hugetlb_heads = int(vm[0].pcp_heads) + nr_cpus * len(zones) * NR_PCP_LISTS
    vm[0].nr_swap_pages = swap_pages
    vm[0].trylock_heads = int(vm[0].hugetlb_heads) + NR_HSTATES * MAX_NUMNODES + 1
    vm[0].compact_heads = int(vm[0].trylock_heads) + len(zones)
    vm[0].nr_nodes = len(zonelists)
    vm[0].balloon_head = nr_pages + heads - 1
    mem.memcg[0].parent = -1
    mem.memcg[0].max_pages = UNLIMITED
    mem.memcg[0].in_use = 1
    vm[0].bug_pfn = NO_PAGE
    vm[0].ram_base = ram.ctypes.data
    init_list_heads(mem, heads)
    for index, spec in enumerate(zones):
        zone = mem.zone[index]
        zone.node, zone.start_pfn, zone.end_pfn = spec.node, spec.start, spec.end
        memmap_init(mem, index, spec.start, spec.end)
    if cma_pages:
        mem.pageblock[(nr_pages - cma_pages) // PAGEBLOCK_NR_PAGES :] = MIGRATE_CMA
    mem.mem_map[:reserved_pages].flags_f |= PG_reserved
    for index, spec in enumerate(zones):
        start = max(spec.start, reserved_pages)
        memblock_free_pages(mem, index, start, spec.end)
        mem.zone[index].managed_pages = spec.end - start
    setup_per_zone_wmarks(mem)
    return mem
