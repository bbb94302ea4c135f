# SPDX-License-Identifier: GPL-2.0-only
"""Pool sizes, gigantic pages, and what processes ask of hugetlb.

Kernel: `mm/hugetlb.c`, `mm/hugetlb_sysfs.c`, `mm/hugetlb_cma.c`. Per-page work on pages that
the buddy allocator has is compiled (`hugetlb`, `hugetlb_fault`); gigantic pages come from
contiguous ranges or the CMA area, which Python manages, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hostzero.errors import BadAddress, MemcgOutOfMemory, MmError, OutOfMemory, UsageError
from hostzero.mm.cachealias import flush_dcache_folio
from hostzero.mm.cma import cma_alloc_frozen_compound, cma_release_frozen
from hostzero.mm.contig import alloc_contig_frozen_pages_user, free_contig_frozen_range
from hostzero.mm.gfp import __GFP_MOVABLE, GFP_THISNODE, GFP_ZERO, USER_ADDR_NONE
from hostzero.mm.hugetlb import (
    HTLB_ALLOC_MASK,
    account_surplus_hugetlb_folio,
    add_pool_folio,
    alloc_pool_huge_folio,
    free_pool_huge_folio,
    gather_surplus_pages,
    next_node_to_alloc,
    return_unused_surplus_pages,
)
from hostzero.mm.hugetlb_fault import (
    FAULT_BEYOND_FILE,
    FAULT_CHARGE,
    FAULT_DONE,
    FAULT_GIGANTIC,
    FAULT_GIGANTIC_ZERO,
    FAULT_OOM,
    count_hugetlb,
    populate_hugetlb,
    unmap_hugepage_range,
)
from hostzero.mm.hugetlb_pool import (
    HPG_cma,
    HPG_freed,
    adjust_pool_surplus,
    defer_gigantic,
    enqueue_hugetlb_folio,
    take_deferred,
)
from hostzero.mm.hugetlbfs import HugetlbFile, HugetlbMapping
from hostzero.mm.mempolicy import MPOL_BIND, vma_node
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, MAX_PAGE_ORDER, NO_PAGE
from hostzero.mm.page_flags import PGTY_hugetlb, PGTY_none
from hostzero.mm.page_free import free_huge_folio
from hostzero.mm.vma import VM_HUGETLB, VM_NORESERVE, VM_SHARED
from hostzero.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from hostzero.mm.manager import MemoryManager

MAX_GIGANTIC_ORDER = 18  # 1 GiB: what the entries of one PMD table map
_ANY_NODE = -1  # a mask of all nodes
GFP_GIGANTIC = HTLB_ALLOC_MASK & ~__GFP_MOVABLE  # gigantic pages do not migrate


@dataclass(frozen=True)
class HugePages:
    """The counters of one pool, in pages, as in `/proc/meminfo`.

    `total` and `free` are of all pages, surplus ones included; `rsvd` of `free` are reserved.
    """

    total: int
    free: int
    rsvd: int
    surp: int


class Hugetlb:
    """The huge page pools of one guest: 2 MiB, and the gigantic size if it has one."""

    def __init__(self, manager: MemoryManager) -> None:
        """Set up empty pools.

        Raises:
            UsageError: the gigantic order is not one.
        """
        self._manager = manager
        self.mem = manager.mem
        self.ram_bytes = manager.ram_bytes
        self._mappings: dict[int, HugetlbMapping] = {}
        self._last_number = 0
        gigantic = manager.config.gigantic_order
        if gigantic and not MAX_PAGE_ORDER < gigantic <= MAX_GIGANTIC_ORDER:
            raise UsageError(f"gigantic_order {gigantic} is neither 0 nor in (10, {MAX_GIGANTIC_ORDER}]")
        self.mem.hstate[0].order = HPAGE_PMD_ORDER
        self.mem.hstate[1].order = gigantic

    def counters(self, order: int = HPAGE_PMD_ORDER) -> HugePages:
        """Return the counters of the pool of `order`."""
        hs = self.mem.hstate[self.size_to_hstate(order)]
        return HugePages(
            total=int(hs.nr_huge_pages),
            free=int(hs.free_huge_pages),
            rsvd=int(hs.resv_huge_pages),
            surp=int(hs.surplus_huge_pages),
        )

    def set_nr_hugepages(self, count: int, order: int = HPAGE_PMD_ORDER, *, cpu: int = 0) -> int:
        """Resize the persistent pool; return the size reached (kernel: `set_max_huge_pages`).

        Pages in use cannot be freed: they become surplus pages, and go when they are freed.

        Raises:
            UsageError: the count is negative, or there is no pool of that order.
        """
        h = self.size_to_hstate(order)
        if count < 0:
            raise UsageError(f"a pool of {count} pages cannot be")
        mem, hs = self.mem, self.mem.hstate[h]
        while hs.surplus_huge_pages and count > self._persistent(h) and adjust_pool_surplus(mem, h, -1):
            pass
        while count > self._persistent(h) and self._alloc_pool_folio(h, cpu):
            pass
        needed = int(hs.resv_huge_pages) + int(hs.nr_huge_pages) - int(hs.free_huge_pages)
        while self._persistent(h) > max(count, needed) and free_pool_huge_folio(mem, h, False, cpu):
            pass
        while count < self._persistent(h) and adjust_pool_surplus(mem, h, 1):
            pass
        hs.max_huge_pages = self._persistent(h)
        self.free_deferred()
        return self._persistent(h)

    def set_nr_overcommit(self, count: int, order: int = HPAGE_PMD_ORDER) -> None:
        """Set how many surplus pages there may be (`nr_overcommit_hugepages`)."""
        if count < 0:
            raise UsageError(f"{count} surplus pages cannot be")
        self.mem.hstate[self.size_to_hstate(order)].nr_overcommit_huge_pages = count

    def create_file(self, size: int, order: int = HPAGE_PMD_ORDER) -> HugetlbFile:
        """Create a file of `size` bytes without pages or reservations (`memfd_create`, `ftruncate`).

        Raises:
            UsageError: the size is not whole pages of that order.
        """
        h = self.size_to_hstate(order)
        page_size = PAGE_SIZE << order
        if size < 0 or size % page_size:
            raise UsageError(f"a file of {size} bytes is not whole pages of {page_size}")
        return HugetlbFile(self, h, size // page_size)

    def size_to_hstate(self, order: int) -> int:
        """Return the pool of an order (kernel: `size_to_hstate`).

        Raises:
            UsageError: there is none.
        """
        for h in range(len(self.mem.hstate)):
            if order and self.mem.hstate[h].order == order:
                return h
        raise UsageError(f"the guest has no huge pages of order {order}")

    # What processes ask.

    def mmap(
        self, vma: Any, file: HugetlbFile, offset: int, vmas: Callable[[int], list[Any]], *, cpu: int
    ) -> None:
        """Make `vma` a mapping of a file and reserve its pages (kernel: `hugetlbfs_file_mmap`).

        `vmas` returns the pieces of a mapping that its process still has, by number.

        Raises:
            OutOfMemory: -ENOMEM, the pages cannot be reserved.
            MmError: -EINVAL for an offset that is not whole huge pages, -EBADF for a closed file.
        """
        if not (file.is_open or file.anonymous):
            raise MmError("mmap: -EBADF: the file is closed")
        if offset < 0 or offset % file.page_size:
            raise MmError(f"mmap: -EINVAL: offset {offset} is not whole pages of {file.page_size} bytes")
        v = vma[0]
        shared = bool(v.vm_flags & VM_SHARED)
        first = offset // file.page_size
        last = first + (int(v.vm_end) - int(v.vm_start)) // file.page_size
        self._last_number += 1
        number = self._last_number
        mapping = HugetlbMapping(file, shared=shared, pages=last, vmas=lambda: vmas(number))
        pages = len(file.pages)
        file.grow(last)  # a mapping that can be written extends its file
        if not v.vm_flags & VM_NORESERVE:
            try:
                if shared:
                    file.reserve(first, last, node=int(v.node), cpu=cpu)
                else:
                    self.acct_memory(file.h, last - first, node=int(v.node), cpu=cpu)
                    mapping.resv[first:last] = 1
            except OutOfMemory:
                file.pages, file.resv = file.pages[:pages].copy(), file.resv[:pages].copy()
                raise
        v.hstate, v.file, v.vm_pgoff = file.h, number, offset >> PAGE_SHIFT
        v.vm_flags |= VM_HUGETLB
        self._mappings[number] = mapping
        file.map(mapping)

    def populate(self, vma: Any, start: int, end: int, *, write: bool, cpu: int) -> None:
        """Fault in pages of a mapping.

        Raises:
            OutOfMemory: there is no huge page (SIGBUS in a real guest), or none for a page table.
            BadAddress: the file ends before (SIGBUS too).
        """
        mapping = self._mappings[int(vma[0].file)]
        at = start

        def fault(fresh: int) -> tuple[int, int]:
            nonlocal at
            at, code = populate_hugetlb(
                self.mem, vma, mapping.resv, mapping.file.pages, at, end, write, fresh, cpu
            )
            return at, code

        node = int(vma_node(self.mem, vma, start, mapping.file.order))
        bound = vma[0].policy == MPOL_BIND
        self.resolve(fault, int(vma[0].hstate), node, int(vma[0].nodemask) if bound else _ANY_NODE)

    def resolve(
        self, fault: Callable[[int], tuple[int, int]], h: int, node: int, nodemask: int = _ANY_NODE
    ) -> None:
        """Run `fault` until it is done, giving it the pages that compiled code cannot allocate.

        `fault` takes a gigantic page or NO_PAGE, and returns the address that it is about and
        a code of `hugetlb_fault`. Gigantic pages come from `node`, or another of `nodemask`.

        Raises:
            OutOfMemory: there is no huge page (SIGBUS in a real guest), or none for a page table.
            MemcgOutOfMemory: the process's cgroup is at its limit.
            BadAddress: the address is beyond the end of the file (SIGBUS too).
        """
        fresh = NO_PAGE
        while True:
            addr, code = fault(fresh)
            self._free_unused(fresh)
            fresh = NO_PAGE
            if code == FAULT_DONE:
                return
            if code == FAULT_BEYOND_FILE:
                raise BadAddress(f"SIGBUS: address {addr:#x} is beyond the end of the file")
            if code == FAULT_CHARGE:
                raise MemcgOutOfMemory(f"no huge page for address {addr:#x}: {self._limit(h)}")
            if code == FAULT_OOM:
                if not self._manager.out_of_memory():
                    raise OutOfMemory(f"no page for the page table of address {addr:#x}")
                continue
            if code in (FAULT_GIGANTIC, FAULT_GIGANTIC_ZERO):
                fresh = self._alloc_gigantic(
                    h, GFP_ZERO if code == FAULT_GIGANTIC_ZERO else 0, addr, node, nodemask
                )
            if fresh == NO_PAGE:
                raise OutOfMemory(f"SIGBUS: no huge page for address {addr:#x}")

    def acct_memory(self, h: int, delta: int, *, node: int = 0, cpu: int = 0) -> None:
        """Reserve `delta` pages more, or give up `-delta` (kernel: `hugetlb_acct_memory`).

        Raises:
            OutOfMemory: -ENOMEM, the pool has too few and may not grow; nothing was reserved.
        """
        if not delta:
            return
        if delta < 0:
            return_unused_surplus_pages(self.mem, h, -delta, cpu)
        elif self._is_gigantic(h):
            self._gather_gigantic(h, delta, node, cpu)
        elif not gather_surplus_pages(self.mem, h, delta, node, cpu):
            raise OutOfMemory(f"mmap: -ENOMEM: {delta} huge pages cannot be reserved")
        self.free_deferred()

    def free_deferred(self) -> None:
        """Free the gigantic pages that have left their pool (kernel: `free_hpage_workfn`)."""
        while (pfn := int(take_deferred(self.mem))) != NO_PAGE:
            order = int(self.mem.mem_map[pfn].order)
            from_cma = bool(self.mem.mem_map[pfn].private & HPG_cma)
            self.mem.mem_map[pfn].private = 0
            if from_cma:
                cma_release_frozen(self._manager, pfn, order)
            else:
                free_contig_frozen_range(self._manager, pfn, order)

    def unmap(self, vma: Any, start: int, end: int, *, cpu: int) -> None:
        """Unmap the whole huge pages of a range, which starts with one."""
        mapping = self._mappings[int(vma[0].file)]
        end -= end % mapping.file.page_size
        unmap_hugepage_range(self.mem, vma, mapping.resv, start, end, cpu)
        self.free_deferred()

    def close(self, vma: Any) -> None:
        """Forget a piece of a mapping that has gone (kernel: `hugetlb_vm_op_close`)."""
        number = int(vma[0].file)
        mapping = self._mappings[number]
        if not mapping.shared:
            first = int(vma[0].vm_pgoff) >> mapping.file.order
            last = first + (int(vma[0].vm_end) - int(vma[0].vm_start)) // mapping.file.page_size
            held = int(mapping.resv[first:last].sum())
            mapping.resv[first:last] = 0
            self.acct_memory(mapping.file.h, -held)
        if not mapping.vmas():
            del self._mappings[number]
            mapping.file.unmap(mapping)

    def usage(self, vma: Any) -> int:
        """Return how many bytes of a mapping are mapped."""
        return int(count_hugetlb(self.mem, vma)) * self.page_size(vma)

    def page_size(self, vma: Any) -> int:
        """Return the size of any mapping's pages in bytes (kernel: `vma_kernel_pagesize`)."""
        return PAGE_SIZE if vma[0].hstate < 0 else PAGE_SIZE << int(self.mem.hstate[vma[0].hstate].order)

    def valid_order(self, order: int) -> int:
        """Return `order` if there is a pool of it.

        Raises:
            MmError: -EINVAL, there is none.
        """
        try:
            self.size_to_hstate(order)
        except UsageError as error:
            raise MmError(f"mmap: -EINVAL: {error}") from error
        return order

    def anon_file(self, length: int, page_size: int) -> HugetlbFile:
        """Return the file under an anonymous mapping: nobody else has it (kernel: `hugetlb_file_setup`)."""
        order = (page_size // PAGE_SIZE).bit_length() - 1
        return HugetlbFile(self, self.size_to_hstate(order), length // page_size, anonymous=True)

    def _limit(self, h: int) -> str:
        # Whose charge failed is noted in its address space; asked once.
        (at,) = self.mem.mms.memcg_in_oom.nonzero()
        memcg = int(self.mem.mms[int(at[0])].memcg_in_oom) - 1
        self.mem.mms.memcg_in_oom[at] = 0
        return self._manager.memcg.describe_limit(memcg, 1 << int(self.mem.hstate[h].order))

    def _persistent(self, h: int) -> int:
        return int(self.mem.hstate[h].nr_huge_pages) - int(self.mem.hstate[h].surplus_huge_pages)

    def _is_gigantic(self, h: int) -> bool:
        return bool(self.mem.hstate[h].order > MAX_PAGE_ORDER)

    def _alloc_pool_folio(self, h: int, cpu: int) -> bool:
        if not self._is_gigantic(h):
            return bool(alloc_pool_huge_folio(self.mem, h, cpu))
        for _ in range(int(self.mem.vm[0].nr_nodes)):
            pfn = self._alloc_gigantic(h, 0, USER_ADDR_NONE, int(next_node_to_alloc(self.mem, h)))
            if pfn != NO_PAGE:
                add_pool_folio(self.mem, h, pfn)
                return True
        return False

    def _alloc_gigantic(self, h: int, gfp: int, user_addr: int, node: int, nodemask: int = _ANY_NODE) -> int:
        """Allocate a gigantic folio outside of the pool, or NO_PAGE (kernel: `alloc_gigantic_frozen_folio`).

        Patch 9: both ways get the caller's `__GFP_ZERO`, so that `HPG_zeroed` is true of what
        was allocated; the address tells a contiguous range where the page will be touched. The
        CMA area has no address, so its zeros may lie in lines of the kernel's that hide the page
        from a user (`cachealias`): they are written back, as for any page that a kernel gets.
        """
        gfp |= GFP_GIGANTIC
        order = int(self.mem.hstate[h].order)
        bits, pfn = HPG_cma, NO_PAGE
        if self._manager.config.cma_pages and nodemask >> int(self.mem.zone[-1].node) & 1:
            pfn = cma_alloc_frozen_compound(self._manager, order, gfp)
            if pfn != NO_PAGE:
                flush_dcache_folio(self.mem, pfn, order)
        if pfn == NO_PAGE:
            bits = 0
            nr_nodes = int(self.mem.vm[0].nr_nodes)
            for near in range(nr_nodes):
                nid = (node + near) % nr_nodes
                if pfn == NO_PAGE and nodemask >> nid & 1:
                    pfn = alloc_contig_frozen_pages_user(
                        self._manager, order, gfp | GFP_THISNODE, nid, user_addr
                    )
        if pfn != NO_PAGE:
            self.mem.mem_map[pfn].page_type = PGTY_hugetlb
            self.mem.mem_map[pfn].private = bits
        return int(pfn)

    def _gather_gigantic(self, h: int, delta: int, node: int, cpu: int) -> None:
        # gather_surplus_pages for pages that compiled code cannot allocate.
        hs = self.mem.hstate[h]
        fresh: list[int] = []
        while hs.resv_huge_pages + delta > hs.free_huge_pages + len(fresh):
            if hs.surplus_huge_pages >= hs.nr_overcommit_huge_pages:
                break
            pfn = self._alloc_gigantic(h, 0, USER_ADDR_NONE, node)
            if pfn == NO_PAGE or account_surplus_hugetlb_folio(self.mem, h, pfn, 0, cpu) == NO_PAGE:
                break
            fresh.append(pfn)
        enough = hs.resv_huge_pages + delta <= hs.free_huge_pages + len(fresh)
        for pfn in fresh:
            if enough:
                enqueue_hugetlb_folio(self.mem, h, pfn)
            else:
                free_huge_folio(self.mem, pfn, cpu)
        if not enough:
            self.free_deferred()
            raise OutOfMemory(f"mmap: -ENOMEM: {delta} gigantic pages cannot be reserved")
        hs.resv_huge_pages += delta

    def _free_unused(self, fresh: int) -> None:
        # A page of the pool became free meanwhile, and the fault took that.
        if fresh != NO_PAGE:
            page = self.mem.mem_map[fresh]
            if page.page_type == PGTY_hugetlb and page._refcount == 0 and not page.private & HPG_freed:
                page.page_type = PGTY_none
                defer_gigantic(self.mem, fresh)
            self.free_deferred()
