# SPDX-License-Identifier: GPL-2.0-only
"""The records of the memory manager: pages, zones, per-CPU lists, pageblocks.

Kernel: `include/linux/mmzone.h`, `include/linux/mm_types.h`. Where the kernel follows
pointers, this follows indices: a page is its frame number, a list link is a frame
number, and a list head is a record of its own behind the last page of `mem_map`. A
list of pages and its head are thus linked by the same fields, as with `struct
list_head`, and no link is ever a special case.

`Memory` bundles the arrays; every compiled function takes it first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from hostzero.jit import inline
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_ORDER

MAX_PAGE_ORDER: Final = 10
NR_PAGE_ORDERS: Final = MAX_PAGE_ORDER + 1
PAGEBLOCK_ORDER: Final = PMD_ORDER
PAGEBLOCK_NR_PAGES: Final = 1 << PAGEBLOCK_ORDER
HPAGE_PMD_ORDER: Final = PMD_ORDER

MIGRATE_UNMOVABLE: Final = 0
MIGRATE_MOVABLE: Final = 1
MIGRATE_RECLAIMABLE: Final = 2
MIGRATE_PCPTYPES: Final = 3
MIGRATE_HIGHATOMIC: Final = 3
MIGRATE_CMA: Final = 4
MIGRATE_ISOLATE: Final = 5
MIGRATE_TYPES: Final = 6
MIGRATE_NAMES: Final = ("Unmovable", "Movable", "Reclaimable", "HighAtomic", "CMA", "Isolate")

PB_MIGRATETYPE_MASK: Final = 7  # a pageblock's migrate type now
PB_ISOLATE_SHIFT: Final = 3  # while it is isolated: above this, the type that it will have again

PAGE_ALLOC_COSTLY_ORDER: Final = 3
NR_LOWORDER_PCP_LISTS: Final = MIGRATE_PCPTYPES * (PAGE_ALLOC_COSTLY_ORDER + 1)
NR_PCP_THP: Final = 2
NR_PCP_LISTS: Final = NR_LOWORDER_PCP_LISTS + NR_PCP_THP

WORDS_PER_PAGE: Final = PAGE_SIZE // 8
NO_PAGE: Final = -1
"""What the kernel's NULL `struct page *` is here."""

PAGE_DTYPE: Final = np.dtype(
    [
        ("flags_f", np.int64),  # `page->flags.f`; a field named `flags` would hide behind numpy's own
        ("_refcount", np.int32),
        ("_mapcount", np.int32),  # -1: not mapped, as in the kernel
        ("private", np.int64),  # buddy order while free
        ("lru_next", np.int32),
        ("lru_prev", np.int32),
        ("mapping", np.int64),  # owner: address space id + 1, 0 for none
        ("index", np.int64),  # user page number of the first mapping
        ("page_type", np.int32),
        ("zone", np.int16),
        ("order", np.int16),  # of a compound page, in its head
        ("memcg_data", np.int64),  # cgroup charged with the folio + 1, 0 for none; in its head
    ],
    align=True,
)
"""`struct page` of a kernel with memory cgroups: 64 bytes, a cache line.

`compound_head`, which shares a word with `lru` there, has 8 more in `Memory.compound_head`.
"""

ZONE_DTYPE: Final = np.dtype(
    [
        ("node", np.int64),
        ("start_pfn", np.int64),
        ("end_pfn", np.int64),
        ("managed_pages", np.int64),
        ("watermark_min", np.int64),
        ("watermark_low", np.int64),
        ("watermark_high", np.int64),
        ("watermark_boost", np.int64),
        ("lowmem_reserve", np.int64),  # kept from requests that a higher zone could have served
        ("nr_free_pages", np.int64),
        ("nr_free_cma", np.int64),
        ("nr_reserved_highatomic", np.int64),
        ("nr_free_highatomic", np.int64),
        ("pcp_batch", np.int64),
        ("pcp_high", np.int64),
        ("nr_free", np.int64, (NR_PAGE_ORDERS,)),  # blocks by order, all migrate types
        ("locked", np.int64),  # `zone->lock` is held by whoever calls us (`MemoryManager.zone_lock`)
        ("nr_trylock_free", np.int64),  # pages on `zone->trylock_free_pages`
        # where compaction goes on, and how long it stays away after it failed
        ("compact_cached_migrate_pfn", np.int64),
        ("compact_cached_free_pfn", np.int64),  # 0: start over
        ("compact_considered", np.int64),
        ("compact_defer_shift", np.int64),
        ("compact_order_failed", np.int64),
    ],
    align=True,
)
"""`struct zone`."""

PCP_DTYPE: Final = np.dtype(
    [
        ("count", np.int64),
        ("high", np.int64),
        ("batch", np.int64),
        ("locked", np.int64),  # `pcp->lock` is held by whoever calls us
        ("fitting_misses", np.int64),  # how often more not to look for fitting blocks (`placement`)
    ],
    align=True,
)
"""`struct per_cpu_pages`; its lists are head records behind `mem_map`."""

VM_DTYPE: Final = np.dtype(
    [
        # configuration, fixed at boot
        ("nr_pages", np.int64),
        ("nr_zones", np.int64),
        ("nr_cpus", np.int64),
        ("pcp_heads", np.int64),  # first per-CPU list head behind mem_map
        ("balloon_head", np.int64),
        ("init_on_alloc", np.int64),
        ("init_on_free", np.int64),
        ("page_poisoning", np.int64),
        ("debug_vm", np.int64),
        ("thp_always", np.int64),
        ("thp_never", np.int64),
        ("anon_orders", np.int64),  # bit per order below PMD that anonymous folios may have (mTHP)
        ("placement", np.int64),  # 1: a request takes blocks that are zero as it wants (`placement`)
        ("zero_in_caller", np.int64),  # user pages are zeroed at the fault, as before the series
        ("cpu_dcache_aliasing", np.int64),
        ("cpu_icache_aliasing", np.int64),
        ("hugetlb_heads", np.int64),  # first hugetlb pool list head behind mem_map
        ("trylock_heads", np.int64),  # first `zone->trylock_free_pages` head behind mem_map
        ("nr_nodes", np.int64),
        ("compact_heads", np.int64),  # first list head of compaction behind mem_map
        ("empty_zero_page", np.int64),
        ("ram_base", np.int64),  # host address of page 0's first byte
        # page reporting (static keys and the state machine's word)
        ("page_reporting_enabled", np.int64),
        ("page_reporting_order", np.int64),
        ("page_reporting_host_zeroes", np.int64),
        ("page_reporting_state", np.int64),
        ("page_reporting_requests", np.int64),
        # what a failed assertion or a bad page was about
        ("bug_pfn", np.int64),
        ("nr_bad_pages", np.int64),
        ("nr_poison_errors", np.int64),
        ("num_poisoned_pages", np.int64),  # lost to hardware errors (`memory_failure`)
        # events (kernel: vmstat)
        ("pgalloc", np.int64),
        ("pgfree", np.int64),
        ("pgfault", np.int64),
        ("pgmajfault", np.int64),
        ("thp_fault_alloc", np.int64),
        ("thp_fault_fallback", np.int64),
        ("allocstall", np.int64),
        ("alloc_fail", np.int64),
        ("fallback_claims", np.int64),
        ("fallback_steals", np.int64),
        ("nr_balloon_pages", np.int64),
        ("nr_balloon_isolated", np.int64),  # off the balloon's list to be migrated
        ("balloon_migratable", np.int64),  # a driver can tell the host of a balloon page's new place
        ("capture_order", np.int64),  # what direct compaction waits for (`current->capture_control`); 0: none
        ("pgmigrate_success", np.int64),
        ("pgmigrate_fail", np.int64),
        ("compact_stall", np.int64),
        ("compact_success", np.int64),
        ("compact_fail", np.int64),
        ("pswpin", np.int64),
        ("pswpout", np.int64),
        ("nr_swap_pages", np.int64),  # free slots
        ("swap_next", np.int64),  # where the search for a slot goes on
        ("htlb_buddy_alloc_success", np.int64),
        ("htlb_buddy_alloc_fail", np.int64),
        ("memcg_charge_fail", np.int64),
        # what the benchmark is about, in bytes
        (
            "zeroed_bytes",
            np.int64,
        ),  # by post_alloc_hook, init_on_free, hugetlb or a fault
        ("known_zero_bytes", np.int64),  # zeroing that a zero hint made unnecessary
        ("dropped_hint_bytes", np.int64),  # hints of pages whose caller did not want zeros
        ("zeroed_in_vain_bytes", np.int64),  # zeroed, then freed because a charge failed
        ("zeroed_twice_bytes", np.int64),  # zeroed at the fault after the allocator had done so
        # allocations that had to be zero, by order, and those of them that a hint served
        ("zero_allocs", np.int64, (NR_PAGE_ORDERS,)),
        ("known_zero_allocs", np.int64, (NR_PAGE_ORDERS,)),
    ],
    align=True,
)
"""One record of configuration, static keys and event counters."""


NR_MMS: Final = 1024
"""How many processes can exist at once."""

MM_DTYPE: Final = np.dtype(
    [
        ("pgd", np.int64),  # page of the top table; 0 while the slot is free
        ("memcg", np.int64),  # cgroup that the process's pages are charged to
        ("memcg_in_oom", np.int64),  # that cgroup + 1 after a fault failed at its limit, else 0
    ],
    align=True,
)
"""`struct mm_struct`: what is needed to find a page's mapping from the page (reverse map)."""

NR_MEMCGS: Final = 64
UNLIMITED: Final = 1 << 62  # pages that a cgroup without a limit may use
MEMCG_DTYPE: Final = np.dtype(
    [
        ("parent", np.int64),  # -1: none (the root)
        ("usage", np.int64),  # pages
        ("max_pages", np.int64),  # a charge beyond fails; a field named `max` would hide behind numpy's own
        ("failcnt", np.int64),
        ("in_use", np.int64),
    ],
    align=True,
)
"""`struct mem_cgroup` with its page counter."""

MAX_NUMNODES: Final = 8
NR_HSTATES: Final = 2
HSTATE_DTYPE: Final = np.dtype(
    [
        ("order", np.int64),  # 0: the slot is unused
        ("nr_huge_pages", np.int64),
        ("free_huge_pages", np.int64),
        ("resv_huge_pages", np.int64),
        ("surplus_huge_pages", np.int64),
        ("nr_overcommit_huge_pages", np.int64),
        ("max_huge_pages", np.int64),
        ("next_nid_to_alloc", np.int64),
        ("next_nid_to_free", np.int64),
        ("nr_huge_pages_node", np.int64, (MAX_NUMNODES,)),
        ("free_huge_pages_node", np.int64, (MAX_NUMNODES,)),
        ("surplus_huge_pages_node", np.int64, (MAX_NUMNODES,)),
    ],
    align=True,
)
"""`struct hstate`; its free lists by node are head records behind `mem_map`."""


COMPACT_CLUSTER_MAX: Final = 32
"""Pages that compaction isolates before it moves them."""

COMPACT_DTYPE: Final = np.dtype(
    [
        ("active", np.int64),  # a zone is being compacted: there is one of this record
        ("zone", np.int64),
        ("order", np.int64),  # what is wanted; -1: as much as there is (compact_memory)
        ("migratetype", np.int64),
        ("mode", np.int64),
        ("direct_compaction", np.int64),
        ("movable_ops", np.int64),  # balloon pages may be isolated: the caller can call their driver
        ("whole_zone", np.int64),
        ("cpu", np.int64),
        ("migrate_pfn", np.int64),
        ("free_pfn", np.int64),
        ("last_migrated_pfn", np.int64),
        ("nr_migratepages", np.int64),
        ("nr_freepages", np.int64),
        ("nr_migrated", np.int64),
        ("capture_page", np.int64),
    ],
    align=True,
)
"""`struct compact_control` and `struct capture_control`; their lists are heads behind `mem_map`."""

NR_COMPACT_HEADS: Final = NR_PAGE_ORDERS + 2
"""List heads of compaction: isolated free blocks by order, folios to move, balloon pages to move."""


class Memory(NamedTuple):
    """The arrays that compiled code works on.

    `mem_map` has one record a page and the list heads behind them; `ram` is guest RAM
    as 64-bit words (512 a page); `zonelists[node, k]` is the k-th zone to try, and -1
    ends a list; rows behind the nodes' are `mempolicy`'s.

    `compound_head` holds the field of that name, `head << 1 | 1` in tail pages. It stands
    apart because a huge page writes it 511 times: side by side these are 4 KiB to write, in
    the records they are 511 cache lines and most of what allocating the page costs.
    """

    mem_map: Any
    compound_head: Any
    zone: Any
    pcp: Any  # [cpu * nr_zones + zone]
    pageblock: Any  # migrate type by pageblock; above it, while isolated, the type before
    zonelists: Any
    vm: Any
    ram: Any
    far: Any  # addresses of compiled functions (`jit.far`)
    mms: Any  # address spaces by mm_id - 1
    memcg: Any  # memory cgroups; 0 is the root
    hstate: Any  # hugetlb pools by page size
    swap_map: Any  # by slot of the swap area: 1 if it holds a page
    swap_area: Any  # the area as 64-bit words (512 a slot)
    cc: Any  # what compaction is doing
    kernel_lines: (
        Any  # by page: what the kernel's alias of an aliasing cache holds (`cachealias`); else empty
    )


@dataclass(frozen=True)
class ZoneSpec:
    """A zone as the boot code lays it out: pages `[start, end)` on `node`."""

    name: str
    start: int
    end: int
    node: int = 0


@inline
def free_list(mem: Memory, zone: int, order: int, migratetype: int) -> int:
    """Return the list head of one free area (kernel: `zone->free_area[o].free_list[mt]`)."""
    return mem.vm[0].nr_pages + (zone * NR_PAGE_ORDERS + order) * MIGRATE_TYPES + migratetype


@inline
def pcp_list(mem: Memory, zone: int, cpu: int, pindex: int) -> int:
    """Return the list head of one per-CPU list (kernel: `pcp->lists[pindex]`)."""
    return mem.vm[0].pcp_heads + (cpu * mem.vm[0].nr_zones + zone) * NR_PCP_LISTS + pindex


@inline
def hugepage_freelist(mem: Memory, h: int, node: int) -> int:
    """Return the list head of one node's free huge pages (kernel: `h->hugepage_freelists[nid]`)."""
    return mem.vm[0].hugetlb_heads + h * MAX_NUMNODES + node


@inline
def trylock_free_pages(mem: Memory, zone: int) -> int:
    """Return the list head of a zone's deferred frees (kernel: `zone->trylock_free_pages`)."""
    return mem.vm[0].trylock_heads + zone


@inline
def compact_freepages(mem: Memory, order: int) -> int:
    """Return the list head of the free blocks that compaction holds (kernel: `cc->freepages[order]`)."""
    return mem.vm[0].compact_heads + order


@inline
def compact_migratepages(mem: Memory) -> int:
    """Return the list head of the folios that compaction is about to move (kernel: `cc->migratepages`)."""
    return mem.vm[0].compact_heads + NR_PAGE_ORDERS


@inline
def compact_movable_ops(mem: Memory) -> int:
    """Return the list head of the balloon pages that compaction is about to move."""
    return mem.vm[0].compact_heads + NR_PAGE_ORDERS + 1


@inline
def page_zone(mem: Memory, pfn: int) -> int:
    """Return the zone of a page, widened: a 16-bit index would compile every caller twice."""
    return np.int64(mem.mem_map[pfn].zone)  # type: ignore[return-value]


@inline
def pcp_of(mem: Memory, zone: int, cpu: int) -> int:
    """Return the index into `Memory.pcp` of a CPU's lists for a zone."""
    return cpu * mem.vm[0].nr_zones + zone


@inline
def get_pageblock_migratetype(mem: Memory, pfn: int) -> int:
    """Return the migrate type of the pageblock that holds `pfn`; MIGRATE_ISOLATE while isolated."""
    return mem.pageblock[pfn >> PAGEBLOCK_ORDER] & PB_MIGRATETYPE_MASK


@inline
def set_pageblock_migratetype(mem: Memory, pfn: int, migratetype: int) -> None:
    """Give the pageblock that holds `pfn` another migrate type; ends an isolation, as in Linux."""
    mem.pageblock[pfn >> PAGEBLOCK_ORDER] = migratetype


@inline
def get_pageblock_isolate(mem: Memory, pfn: int) -> bool:
    """Return whether the pageblock that holds `pfn` is isolated (kernel: same name)."""
    return get_pageblock_migratetype(mem, pfn) == MIGRATE_ISOLATE


@inline
def set_pageblock_isolate(mem: Memory, pfn: int) -> None:
    """Isolate a pageblock; it remembers its migrate type.

    Linux has a bit of its own for this (`PB_migrate_isolate`); here the old type moves up,
    so that reading the type, which every free does, stays one operation.
    """
    block = pfn >> PAGEBLOCK_ORDER
    mem.pageblock[block] = MIGRATE_ISOLATE | mem.pageblock[block] << PB_ISOLATE_SHIFT


@inline
def clear_pageblock_isolate(mem: Memory, pfn: int) -> None:
    """Give an isolated pageblock the migrate type back that it had (kernel: same name)."""
    mem.pageblock[pfn >> PAGEBLOCK_ORDER] >>= PB_ISOLATE_SHIFT


@inline
def get_pageblock_type_before(mem: Memory, pfn: int) -> int:
    """Return the migrate type that a pageblock has when it is not isolated."""
    block = mem.pageblock[pfn >> PAGEBLOCK_ORDER]
    if get_pageblock_isolate(mem, pfn):
        return block >> PB_ISOLATE_SHIFT
    return block


@inline
def migratetype_is_mergeable(migratetype: int) -> bool:
    """Return whether blocks of this type may merge across pageblocks of another type."""
    return migratetype < MIGRATE_PCPTYPES


def nr_list_heads(nr_zones: int, nr_cpus: int) -> int:
    """Return how many list heads stand behind the last page.

    In this order: free areas, per-CPU lists, hugetlb pools, deferred frees, compaction, the balloon.
    """
    free_areas = nr_zones * NR_PAGE_ORDERS * MIGRATE_TYPES
    hugetlb = NR_HSTATES * MAX_NUMNODES + 1  # pools by node, and what waits to be freed
    return free_areas + nr_cpus * nr_zones * NR_PCP_LISTS + hugetlb + nr_zones + NR_COMPACT_HEADS + 1


def default_zones(nr_pages: int) -> tuple[ZoneSpec, ...]:
    """Return the zones of an x86-64 guest without CONFIG_ZONE_DMA: DMA32 below 4 GiB, Normal above."""
    boundary = (4 << 30) >> PAGE_SHIFT
    if nr_pages <= boundary:
        return (ZoneSpec("DMA32", 0, nr_pages),)
    return (ZoneSpec("DMA32", 0, boundary), ZoneSpec("Normal", boundary, nr_pages))
