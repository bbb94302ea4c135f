# SPDX-License-Identifier: GPL-2.0-only
"""`MemoryManager`: one guest's memory manager, as the rest of the house sees it.

It owns the arrays, boots them, and offers the kernel's entry points to drivers and
processes. Work per page never happens here, only in the compiled modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import numpy as np

from hostzero.clock import Clock
from hostzero.errors import OutOfMemory, UsageError, VmBug
from hostzero.mm import page_alloc, page_free
from hostzero.mm.balloon import BalloonPages
from hostzero.mm.cachealias import evict
from hostzero.mm.cma import CmaArea
from hostzero.mm.compaction import Compaction
from hostzero.mm.debug import describe_bug
from hostzero.mm.gfp import (
    GFP_KERNEL,
    GFP_MOVABLE_MASK,
    GFP_NORETRY,
    GFP_RETRY_MAYFAIL,
    GFP_THISNODE,
    GFP_ZERO,
    USER_ADDR_NONE,
    gfpflags_allow_blocking,
)
from hostzero.mm.hugetlb_sysfs import Hugetlb
from hostzero.mm.memcontrol import MemoryCgroups
from hostzero.mm.memory_failure import MemoryFailure
from hostzero.mm.mm_init import build_memory, setup_per_zone_wmarks
from hostzero.mm.mmap import Process
from hostzero.mm.mmzone import (
    HPAGE_PMD_ORDER,
    MAX_NUMNODES,
    MAX_PAGE_ORDER,
    NO_PAGE,
    PAGE_ALLOC_COSTLY_ORDER,
    PAGEBLOCK_NR_PAGES,
    ZoneSpec,
    default_zones,
)
from hostzero.mm.oom_kill import OomNotifiers, nr_unowned_pages
from hostzero.mm.page_free import __free_pages as _free_pages  # a class body would mangle the name
from hostzero.mm.page_reporting import PageReporting
from hostzero.mm.pcplist import drain_all_pages
from hostzero.mm.snapshot import forget_zero_claims
from hostzero.mm.swap import SwapArea
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Pfn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hostzero.ram import Ram

P = ParamSpec("P")
R = TypeVar("R")

_RESERVED_PAGES = 1  # page 0 belongs to the firmware, as on a PC
_MIN_PAGES = 2 * PAGEBLOCK_NR_PAGES
_GFP_NO_OOM = GFP_NORETRY | GFP_RETRY_MAYFAIL | GFP_THISNODE


@dataclass(frozen=True)
class MmConfig:
    """How a guest kernel is built and booted.

    Attributes:
        nr_cpus: CPUs, each with its own page lists.
        init_on_alloc: zero every page at allocation (boot parameter of that name).
        init_on_free: zero every page when it is freed.
        page_poisoning: fill freed pages with 0xAA; wins over both of the above.
        debug_vm: check the kernel's debug assertions (CONFIG_DEBUG_VM).
        confidential: the host is not trusted (patch 32): its claims are not believed.
        thp: `/sys/kernel/mm/transparent_hugepage/enabled`.
        anon_orders: sizes below 2 MiB that anonymous memory may have, as orders
            (`/sys/kernel/mm/transparent_hugepage/hugepages-*kB/enabled`); Linux has 2 to 8.
        user_zeroing: who zeroes user pages: the allocator (the series), or the fault handler
            after it (Linux 7.2 without the series), to compare with.
        placement: which free block a request gets: the one that its list begins with (Linux), or,
            below the pageblock, one that is known zero if zeros are wanted and one that is not
            if they are not (`placement`).
        dcache_aliasing: the data cache may hold a page twice, under two virtual addresses.
        icache_aliasing: the same of the instruction cache.
        gigantic_order: a second huge page size, above any free block (18 on x86-64), or 0 for none.
        swap_size: bytes of the swap area; 0 means that nothing can be swapped out.
        cma_pages: pages at the end of memory that are CMA; whole pageblocks.
        zones: the zones, in ascending order; none means the layout of an x86-64 guest.
    """

    nr_cpus: int = 1
    init_on_alloc: bool = False
    init_on_free: bool = False
    page_poisoning: bool = False
    debug_vm: bool = True
    confidential: bool = False
    thp: Literal["always", "madvise", "never"] = "always"
    anon_orders: tuple[int, ...] = ()
    user_zeroing: Literal["allocator", "caller"] = "allocator"
    placement: Literal["linux", "zero-aware"] = "linux"
    dcache_aliasing: bool = False
    icache_aliasing: bool = False
    gigantic_order: int = 0
    swap_size: int = 0
    cma_pages: int = 0
    zones: tuple[ZoneSpec, ...] = ()

    @property
    def want_init_on_alloc(self) -> bool:
        """`init_on_alloc` after poisoning has had its say (kernel: `mem_debugging_and_hardening_init`)."""
        return self.init_on_alloc and not self.page_poisoning

    @property
    def want_init_on_free(self) -> bool:
        """`init_on_free` after poisoning has had its say."""
        return self.init_on_free and not self.page_poisoning


@dataclass(frozen=True)
class VmStats:
    """Counters of a guest: pages in `*_pages`, bytes in `*_bytes`, else events."""

    total_pages: int
    free_pages: int
    available_pages: int
    balloon_pages: int
    pgalloc: int
    pgfree: int
    pgfault: int
    pgmajfault: int
    thp_fault_alloc: int
    thp_fault_fallback: int
    allocstall: int
    alloc_fail: int
    oom_kill: int
    fallback_claims: int
    fallback_steals: int
    bad_pages: int
    poison_errors: int
    zeroed_bytes: int
    known_zero_bytes: int
    dropped_hint_bytes: int
    zeroed_in_vain_bytes: int
    zeroed_twice_bytes: int
    memcg_charge_fail: int
    pswpin: int
    pswpout: int


def _explains_bugs(function: Callable[P, R]) -> Callable[P, R]:
    # A failed assertion in compiled code carries a constant text; say which page it was.
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except VmBug as bug:
            manager = args[0]
            assert isinstance(manager, MemoryManager)
            raise VmBug(describe_bug(manager.mem, bug)) from bug

    return wrapper


class MemoryManager:
    """One guest's pages, from boot on.

    Attributes:
        ram: guest RAM on the host; page `pfn` is at byte `pfn * 4096`.
        mem: the arrays that compiled code works on (`mmzone.Memory`).
        ram_bytes: guest RAM as bytes, for copies between a program and its pages.
        balloon: the pages that are inside the balloon.
        cma: the CMA area, empty unless the configuration has one.
        compaction: compaction on request.
        page_reporting: the reporting state machine.
        hugetlb: the pools of huge pages.
        memcg: the memory cgroups.
        swap: the swap area.
        memory_failure: broken pages.
    """

    def __init__(self, ram: Ram, config: MmConfig | None = None, clock: Clock | None = None) -> None:
        """Boot a guest on `ram`; its former contents are kept, as at a reboot.

        Raises:
            UsageError: the configuration does not fit the memory; the text says how.
        """
        self.ram = ram
        self.config = config if config is not None else MmConfig()
        self.clock = clock if clock is not None else Clock()
        self.nr_pages = ram.size >> PAGE_SHIFT
        zones = self.config.zones or default_zones(self.nr_pages)
        _check_config(self.config, zones, self.nr_pages)
        self.ram_bytes = ram.array(np.dtype(np.uint8))
        self.mem = build_memory(
            ram.array(np.dtype(np.uint64)),
            zones,
            self.config.nr_cpus,
            self.config.cma_pages,
            _RESERVED_PAGES,
            aliasing=self.config.dcache_aliasing or self.config.icache_aliasing,
            swap_pages=self.config.swap_size >> PAGE_SHIFT,
        )
        vm = self.mem.vm[0]
        vm.init_on_alloc = int(self.config.want_init_on_alloc)
        vm.init_on_free = int(self.config.want_init_on_free)
        vm.page_poisoning = int(self.config.page_poisoning)
        vm.debug_vm = int(self.config.debug_vm)
        vm.thp_always = int(self.config.thp == "always")
        vm.thp_never = int(self.config.thp == "never")
        vm.anon_orders = sum(1 << order for order in set(self.config.anon_orders))
        vm.placement = int(self.config.placement == "zero-aware")
        vm.zero_in_caller = int(self.config.user_zeroing == "caller")
        vm.cpu_dcache_aliasing = int(self.config.dcache_aliasing)
        vm.cpu_icache_aliasing = int(self.config.icache_aliasing)
        if self.config.page_poisoning or self.config.want_init_on_free:
            self._prepare_boot_memory()
        self.balloon = BalloonPages(self.mem)
        self.cma = CmaArea(self.nr_pages, self.config.cma_pages)
        self.compaction = Compaction(self)
        self.page_reporting = PageReporting(self.mem, self.clock)
        self.hugetlb = Hugetlb(self)
        self.memcg = MemoryCgroups(self.mem)
        self.swap = SwapArea(self.mem)
        self._oom = OomNotifiers(self.mem)
        self.memory_failure = MemoryFailure(self)
        vm.empty_zero_page = self.alloc_pages(GFP_KERNEL | GFP_ZERO)

    def _prepare_boot_memory(self) -> None:
        # memblock memory passes through __free_pages_prepare in the kernel: with poisoning
        # or init_on_free every free page holds the pattern or zeros from boot on.
        value = 0xAA if self.config.page_poisoning else 0
        self.ram_bytes[_RESERVED_PAGES << PAGE_SHIFT :] = value

    @_explains_bugs
    def alloc_pages(self, gfp: int, order: int = 0, *, cpu: int = 0, node: int = 0) -> Pfn:
        """Allocate `1 << order` pages with one reference (kernel: `alloc_pages`).

        Raises:
            OutOfMemory: there is no such block, after the OOM notifiers where the kernel would
                call them (`__alloc_pages_may_oom`): not for requests that may not block or
                retry, nor for orders above PAGE_ALLOC_COSTLY_ORDER.
            UsageError: the order is not between 0 and MAX_PAGE_ORDER.
        """
        self._check_request(gfp, order, cpu, node)
        while True:
            pfn = int(page_alloc.alloc_pages(self.mem, gfp, order, USER_ADDR_NONE, node, cpu))
            if pfn != NO_PAGE:
                if self.config.dcache_aliasing:
                    evict(self.mem, pfn, 1 << order)  # the kernel sees its own lines first
                return Pfn(pfn)
            may_oom = (
                order <= PAGE_ALLOC_COSTLY_ORDER and gfpflags_allow_blocking(gfp) and not gfp & _GFP_NO_OOM
            )
            if not may_oom or not self.out_of_memory():
                raise OutOfMemory(f"no free block of order {order}")

    @_explains_bugs
    def alloc_pages_bulk(self, gfp: int, count: int, *, order: int = 0, cpu: int = 0) -> NDArray[np.int64]:
        """Allocate up to `count` blocks; the array returned may be shorter (kernel: same name)."""
        self._check_request(gfp, order, cpu)
        pfns = np.empty(count, dtype=np.int64)
        pfns = pfns[: int(page_alloc.alloc_pages_bulk(self.mem, gfp, order, 0, cpu, pfns))]
        if self.config.dcache_aliasing:
            for pfn in pfns:
                evict(self.mem, int(pfn), 1 << order)
        return pfns

    @_explains_bugs
    def free_pages(self, pfn: Pfn, order: int = 0, *, cpu: int = 0) -> bool:
        """Drop a reference; return whether the block was freed (kernel: `__free_pages`)."""
        return bool(_free_pages(self.mem, self._valid(pfn, cpu, order), order, cpu))

    @_explains_bugs
    def free_pages_nolock(self, pfn: Pfn, order: int = 0, *, cpu: int = 0) -> bool:
        """Drop a reference from a place that may hold any lock (kernel: `free_pages_nolock`).

        Returns whether it was the last. If the zone is locked, the block waits on
        `zone->trylock_free_pages` until somebody frees a block of that zone in the ordinary way.
        """
        return bool(page_free.free_pages_nolock(self.mem, self._valid(pfn, cpu, order), order, cpu))

    def zone_lock(self, zone: int = 0, *, cpu: int | None = None) -> AbstractContextManager[None]:
        """Be inside a zone's lock, as a tracing hook is (`page_free.zone_lock`)."""
        return page_free.zone_lock(self.mem, zone, cpu)

    @_explains_bugs
    def free_pages_bulk(self, pfns: NDArray[np.int64], order: int = 0, *, cpu: int = 0) -> None:
        """Drop a reference to each of many blocks of one order."""
        if len(pfns):
            for pfn in (pfns.min(), pfns.max()):
                self._valid(Pfn(int(pfn)), cpu, order)
            page_free.free_pages_bulk(self.mem, pfns, order, cpu)

    @_explains_bugs
    def put_page_zeroed(self, pfn: Pfn, *, cpu: int = 0) -> bool:
        """Drop a reference to a page known to be zero; return whether it was freed (patch 35)."""
        return bool(page_free.put_page_zeroed(self.mem, self._valid(pfn, cpu), cpu))

    folio_put_zeroed = put_page_zeroed

    @_explains_bugs
    def free_frozen_pages_zeroed(self, pfn: Pfn, order: int = 0, *, cpu: int = 0) -> None:
        """Free a block without references that is known to be zero (patch 33)."""
        page_free.free_frozen_pages_zeroed(self.mem, self._valid(pfn, cpu, order), order, cpu)

    @_explains_bugs
    def drain_all_pages(self) -> None:
        """Give every page parked on a per-CPU list back to the buddy lists."""
        drain_all_pages(self.mem)

    @_explains_bugs
    def compact_memory(self) -> int:
        """Compact all memory; return how many pages moved (kernel: `/proc/sys/vm/compact_memory`)."""
        return self.compaction.compact_memory()

    def spawn(self, *, cpu: int = 0, node: int = 0) -> Process:
        """Return a new process.

        Raises:
            OutOfMemory: there is no page for its page table, or there are too many processes.
        """
        self._check_place(cpu, node)
        (free,) = np.nonzero(self.mem.mms.pgd == 0)
        if not len(free):
            raise OutOfMemory(f"there are {len(self.mem.mms)} processes already, and no room for another")
        return Process(self, int(free[0]) + 1, cpu=cpu, node=node)

    def forget_zero_claims(self) -> int:
        """Drop every known-zero mark, clear or poison every free page; return how many had a mark.

        A guest restored from hibernation must call this before it allocates anything: the
        image does not hold the contents of free pages (see `snapshot`). The driver's
        `restore` does.
        """
        return int(forget_zero_claims(self.mem))

    def adjust_managed_page_count(self, pages: int) -> None:
        """Add to the pages that the guest believes to have (kernel: same name)."""
        largest = int(np.argmax(self.mem.zone.managed_pages))
        self.mem.zone[largest].managed_pages += pages

    def register_oom_notifier(self, callback: Callable[[], int]) -> Callable[[], None]:
        """Call `callback` when memory runs out; it returns how many pages it freed.

        Returns a function that takes the notifier off again.
        """
        return self._oom.register(callback)

    def out_of_memory(self) -> bool:
        """Run the OOM notifiers; return whether to try again (`oom_kill.OomNotifiers`)."""
        return self._oom.out_of_memory()

    def vm_stats(self) -> VmStats:
        """Return the guest's counters."""
        vm, zones = self.mem.vm[0], self.mem.zone
        free = nr_unowned_pages(self.mem)
        return VmStats(
            total_pages=int(zones.managed_pages.sum()),
            free_pages=free,
            available_pages=max(free - int(zones.watermark_low.sum()), 0),
            balloon_pages=int(vm.nr_balloon_pages),
            pgalloc=int(vm.pgalloc),
            pgfree=int(vm.pgfree),
            pgfault=int(vm.pgfault),
            pgmajfault=int(vm.pgmajfault),
            thp_fault_alloc=int(vm.thp_fault_alloc),
            thp_fault_fallback=int(vm.thp_fault_fallback),
            allocstall=int(vm.allocstall),
            alloc_fail=int(vm.alloc_fail),
            oom_kill=self._oom.kills,
            fallback_claims=int(vm.fallback_claims),
            fallback_steals=int(vm.fallback_steals),
            bad_pages=int(vm.nr_bad_pages),
            poison_errors=int(vm.nr_poison_errors),
            zeroed_bytes=int(vm.zeroed_bytes),
            known_zero_bytes=int(vm.known_zero_bytes),
            dropped_hint_bytes=int(vm.dropped_hint_bytes),
            zeroed_in_vain_bytes=int(vm.zeroed_in_vain_bytes),
            zeroed_twice_bytes=int(vm.zeroed_twice_bytes),
            memcg_charge_fail=int(vm.memcg_charge_fail),
            pswpin=int(vm.pswpin),
            pswpout=int(vm.pswpout),
        )

    def setup_per_zone_wmarks(self) -> None:
        """Recompute the watermarks after the managed pages changed (kernel: same name)."""
        setup_per_zone_wmarks(self.mem)

    def _check_request(self, gfp: int, order: int, cpu: int, node: int = 0) -> None:
        # Compiled code indexes with these and checks nothing.
        if not 0 <= order <= MAX_PAGE_ORDER:
            raise UsageError(f"order {order} is not between 0 and {MAX_PAGE_ORDER}")
        if gfp & GFP_MOVABLE_MASK == GFP_MOVABLE_MASK:
            raise UsageError(f"gfp {gfp:#x} asks for movable and reclaimable pages at once")
        self._check_place(cpu, node)

    def _check_place(self, cpu: int, node: int = 0) -> None:
        if not 0 <= cpu < self.config.nr_cpus:
            raise UsageError(f"there is no CPU {cpu}: the guest has {self.config.nr_cpus}")
        if not 0 <= node < int(self.mem.vm[0].nr_nodes):
            raise UsageError(f"there is no node {node}: the guest has {self.mem.vm[0].nr_nodes}")

    def _valid(self, pfn: Pfn, cpu: int, order: int = 0) -> int:
        self._check_place(cpu)
        if not 0 <= order <= MAX_PAGE_ORDER:
            raise UsageError(f"order {order} is not between 0 and {MAX_PAGE_ORDER}")
        if not 0 <= pfn <= self.nr_pages - (1 << order):
            raise UsageError(f"there is no page {pfn:#x} of order {order}: the guest has {self.nr_pages:#x}")
        return pfn


def _check_config(config: MmConfig, zones: tuple[ZoneSpec, ...], nr_pages: int) -> None:
    if nr_pages < _MIN_PAGES:
        raise UsageError(f"a guest needs at least {_MIN_PAGES >> 8} MiB, not {nr_pages >> 8} MiB")
    if config.nr_cpus < 1:
        raise UsageError(f"a guest needs at least one CPU, not {config.nr_cpus}")
    if not set(config.anon_orders) <= set(range(1, HPAGE_PMD_ORDER)):
        raise UsageError(f"anon_orders must be between 1 and {HPAGE_PMD_ORDER - 1}, not {config.anon_orders}")
    if config.swap_size < 0 or config.swap_size % PAGE_SIZE:
        raise UsageError(f"a swap area of {config.swap_size} bytes is not whole pages")
    at = 0
    for zone in zones:
        if zone.start != at or zone.end <= zone.start or zone.start % PAGEBLOCK_NR_PAGES:
            raise UsageError(
                f"zone {zone.name} must start at page {at}, a pageblock boundary, and not be empty"
            )
        if not 0 <= zone.node < MAX_NUMNODES:
            raise UsageError(f"node {zone.node} of zone {zone.name} is not between 0 and {MAX_NUMNODES - 1}")
        at = zone.end
    if at != nr_pages:
        raise UsageError(f"the zones end at page {at}, but the guest has {nr_pages}")
    last = zones[-1]
    if config.cma_pages % PAGEBLOCK_NR_PAGES or not 0 <= config.cma_pages < last.end - last.start:
        raise UsageError(f"{config.cma_pages} CMA pages are not whole pageblocks inside zone {last.name}")
