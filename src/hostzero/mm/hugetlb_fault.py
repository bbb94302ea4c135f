# SPDX-License-Identifier: GPL-2.0-only
"""Faults in hugetlb mappings, and unmapping them (kernel: `mm/hugetlb.c`, `hugetlb_fault`).

The fault passes the raw address, `real_address & PAGE_MASK` (patch 20), so that a page is
zeroed with its faulting part last. `resv` are the reservations that hold for the mapping and
`cache` the file's pages by number (NO_PAGE: a hole); a private mapping reads the file and
copies what it writes, an anonymous one has a file of its own in which nothing ever is.

A folio larger than 2 MiB is mapped by one PMD entry for each 2 MiB; on x86-64 Linux maps
1 GiB by one PUD entry. A huge folio in a file has `mapping` 0: the way back is the file.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import compiled, inline
from hostzero.mm.gfp import __GFP_ZERO
from hostzero.mm.hugetlb import (
    CHARGE_FAILED,
    NEEDS_GIGANTIC,
    alloc_hugetlb_folio,
    huge_page_size,
    hugetlb_zero_user,
    vma_hugecache_offset,
)
from hostzero.mm.hugetlb_pool import HPG_restore_reserve
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE, WORDS_PER_PAGE, Memory
from hostzero.mm.page_free import put_page
from hostzero.mm.pgtable import (
    NO_ENTRY,
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_PSE,
    PAGE_RW,
    PAGE_USER,
    entry,
    entry_pfn,
    pmd_alloc,
    pmd_offset,
)
from hostzero.mm.vma import VM_NORESERVE, VM_SHARED, VM_UNINITIALIZED
from hostzero.units import PAGE_SHIFT

# What a fault returns.
FAULT_DONE: Final = 0
FAULT_OOM: Final = 1  # no page for a page table
FAULT_SIGBUS: Final = 2  # no huge page
FAULT_GIGANTIC: Final = 3  # call again with a gigantic page
FAULT_GIGANTIC_ZERO: Final = 4  # the same, with one that was allocated with __GFP_ZERO
FAULT_CHARGE: Final = 6  # the process's cgroup is at its limit
FAULT_BEYOND_FILE: Final = 5  # the file ends before the address (SIGBUS too)

_READABLE: Final = PAGE_PRESENT | PAGE_USER | PAGE_ACCESSED | PAGE_PSE
_WRITABLE: Final = _READABLE | PAGE_RW | PAGE_DIRTY


@inline
def set_huge_pte_at(mem: Memory, pmd: int, pfn: int, order: int, flags: int) -> None:
    """Map a huge folio: a PMD entry for each 2 MiB of it."""
    for i in range(1 << (order - HPAGE_PMD_ORDER)):
        mem.ram[pmd + i] = ((pfn + (i << HPAGE_PMD_ORDER)) << PAGE_SHIFT) | flags


@inline
def huge_pte_clear(mem: Memory, pmd: int, order: int) -> None:
    """Unmap a huge folio."""
    for i in range(1 << (order - HPAGE_PMD_ORDER)):
        mem.ram[pmd + i] = 0


@inline
def hugetlb_add_new_anon_rmap(mem: Memory, vma: object, pfn: int, haddr: int) -> None:
    """Make a folio the address space's own at one place (kernel: same name)."""
    page = mem.mem_map[pfn]
    page._mapcount = 0
    page.mapping = vma[0].mm_id  # type: ignore[index]
    page.index = haddr >> PAGE_SHIFT
    page.private &= ~HPG_restore_reserve


@inline
def hugetlb_add_to_page_cache(mem: Memory, cache: object, index: int, pfn: int, order: int) -> None:
    """Put a folio into a file, which holds a reference (kernel: same name)."""
    cache[index] = pfn  # type: ignore[index]
    page = mem.mem_map[pfn]
    page._refcount += 1
    page.index = index << order
    page.private &= ~HPG_restore_reserve


@inline
def fault_code(pfn: int, gfp: int) -> int:
    """Return what a fault returns that got no page when it asked with `gfp`."""
    if pfn == CHARGE_FAILED:
        return FAULT_CHARGE
    if pfn != NEEDS_GIGANTIC:
        return FAULT_SIGBUS
    return FAULT_GIGANTIC_ZERO if (gfp & __GFP_ZERO) != 0 else FAULT_GIGANTIC


@inline
def fault_gfp(mem: Memory, vma: object) -> int:
    """Return the flags for a fault's page; in caller mode the fault zeroes it itself."""
    if (vma[0].vm_flags & VM_UNINITIALIZED) != 0 or mem.vm[0].zero_in_caller != 0:  # type: ignore[index]
        return 0
    return __GFP_ZERO


@inline
def copy_user_large_folio(mem: Memory, to: int, source: int, order: int) -> None:
    """Copy a huge folio (kernel: same name, without its order of pages)."""
    distance = (source - to) * WORDS_PER_PAGE
    for word in range(to * WORDS_PER_PAGE, (to + (1 << order)) * WORDS_PER_PAGE):
        mem.ram[word] = mem.ram[word + distance]


@compiled
def hugetlb_wp(mem: Memory, vma: object, resv: object, pmd: int, addr: int, fresh: int, cpu: int) -> int:
    """Make a page that is mapped for reading writable, copying it if it is shared (kernel: same name).

    The copy is asked for without `__GFP_ZERO`: every byte of it is written here.
    """
    v = vma[0]  # type: ignore[index]
    order = mem.hstate[v.hstate].order
    haddr = addr & ~(huge_page_size(mem, v.hstate) - 1)
    old = entry_pfn(entry(mem, pmd))
    if mem.mem_map[old].mapping == v.mm_id and mem.mem_map[old]._mapcount == 0:
        set_huge_pte_at(mem, pmd, old, order, _WRITABLE)
        return FAULT_DONE
    pfn = alloc_hugetlb_folio(mem, vma, resv, addr, False, 0, fresh, cpu)
    if pfn < 0:
        return fault_code(pfn, 0)
    copy_user_large_folio(mem, pfn, old, order)
    hugetlb_add_new_anon_rmap(mem, vma, pfn, haddr)
    set_huge_pte_at(mem, pmd, pfn, order, _WRITABLE)
    mem.mem_map[old]._mapcount -= 1
    put_page(mem, old, cpu)
    return FAULT_DONE


@inline
def alloc_for_fault(mem: Memory, vma: object, resv: object, addr: int, fresh: int, cpu: int) -> int:
    """Allocate the page of a fault, zeroed by whom the configuration says.

    In caller mode this is Linux 7.2 without the series: the page is asked for without
    zeros and the fault zeroes it, whatever was known of it.
    """
    v = vma[0]  # type: ignore[index]
    already = mem.vm[0].zeroed_bytes
    pfn = alloc_hugetlb_folio(mem, vma, resv, addr, False, fault_gfp(mem, vma), fresh, cpu)
    if pfn >= 0 and mem.vm[0].zero_in_caller != 0 and (v.vm_flags & VM_UNINITIALIZED) == 0:
        mem.vm[0].zeroed_twice_bytes += mem.vm[0].zeroed_bytes - already
        hugetlb_zero_user(mem, pfn, mem.hstate[v.hstate].order, addr)
    return pfn


@compiled
def hugetlb_no_page(
    mem: Memory,
    vma: object,
    resv: object,
    cache: object,
    pmd: int,
    addr: int,
    write: bool,
    fresh: int,
    cpu: int,
) -> int:
    """Map a page where none is mapped: the file's, or a new one (kernel: same name)."""
    v = vma[0]  # type: ignore[index]
    order = mem.hstate[v.hstate].order
    haddr = addr & ~(huge_page_size(mem, v.hstate) - 1)
    index = vma_hugecache_offset(mem, vma, haddr)
    shared = (v.vm_flags & VM_SHARED) != 0
    if index >= len(cache):  # type: ignore[arg-type]
        return FAULT_BEYOND_FILE
    pfn = cache[index]  # type: ignore[index]
    if pfn == NO_PAGE:
        pfn = alloc_for_fault(mem, vma, resv, addr, fresh, cpu)
        if pfn < 0:
            return fault_code(pfn, fault_gfp(mem, vma))
        if not shared:
            hugetlb_add_new_anon_rmap(mem, vma, pfn, haddr)
            set_huge_pte_at(mem, pmd, pfn, order, _WRITABLE if write else _READABLE)
            return FAULT_DONE
        hugetlb_add_to_page_cache(mem, cache, index, pfn, order)
    else:
        mem.mem_map[pfn]._refcount += 1
    mem.mem_map[pfn]._mapcount += 1
    set_huge_pte_at(mem, pmd, pfn, order, _WRITABLE if shared else _READABLE)
    if write and not shared:
        return hugetlb_wp(mem, vma, resv, pmd, addr, fresh, cpu)
    return FAULT_DONE


@compiled
def hugetlb_fault(
    mem: Memory,
    vma: object,
    resv: object,
    cache: object,
    pmd: int,
    addr: int,
    write: bool,
    fresh: int,
    cpu: int,
) -> int:
    """Resolve a fault at `addr`, the page-aligned real address (kernel: same name)."""
    mem.vm[0].pgfault += 1
    if mem.ram[pmd] == 0:
        return hugetlb_no_page(mem, vma, resv, cache, pmd, addr, write, fresh, cpu)
    return hugetlb_wp(mem, vma, resv, pmd, addr, fresh, cpu)


@compiled
def populate_hugetlb(
    mem: Memory,
    vma: object,
    resv: object,
    cache: object,
    start: int,
    end: int,
    write: bool,
    fresh: int,
    cpu: int,
) -> tuple[int, int]:
    """Fault in `[start, end)`; return where it stopped and what the last fault returned.

    Source: `faultin_page_range`, `follow_page_mask`. `fresh` is for the first fault.
    """
    v = vma[0]  # type: ignore[index]
    size = huge_page_size(mem, v.hstate)
    addr = start
    while addr < end:
        haddr = addr & ~(size - 1)
        pmd = pmd_alloc(mem, v.pgd, haddr, v.node, cpu)
        if pmd == NO_ENTRY:
            return addr, FAULT_OOM
        value = entry(mem, pmd)
        if value == 0 or (write and (value & PAGE_RW) == 0):
            code = hugetlb_fault(mem, vma, resv, cache, pmd, addr, write, fresh, cpu)
            if code != FAULT_DONE:
                return addr, code
            fresh = NO_PAGE
        addr = haddr + size
    return end, FAULT_DONE


@compiled
def hugetlbfs_alloc(
    mem: Memory, vma: object, resv: object, cache: object, index: int, fresh: int, cpu: int
) -> int:
    """Fill a hole of a file as `fallocate` does; returns as a fault (kernel: `hugetlbfs_fallocate`).

    `vma` stands for a mapping of the whole file at address 0. The page is zeroed like that
    of a fault at its first address.
    """
    order = mem.hstate[vma[0].hstate].order  # type: ignore[index]
    pfn = alloc_for_fault(mem, vma, resv, index << (order + PAGE_SHIFT), fresh, cpu)
    if pfn < 0:
        return fault_code(pfn, fault_gfp(mem, vma))
    hugetlb_add_to_page_cache(mem, cache, index, pfn, order)
    mem.mem_map[pfn]._refcount -= 1  # the file's reference stays
    return FAULT_DONE


@compiled
def unmap_hugepage_range(mem: Memory, vma: object, resv: object, start: int, end: int, cpu: int) -> int:
    """Unmap whole huge pages and drop their references; return how many (kernel: `__unmap_hugepage_range`).

    A private mapping that reserved its pages gets the reservation back for a page that
    returns to the persistent pool, so that a later fault cannot fail.
    """
    v = vma[0]  # type: ignore[index]
    h = v.hstate
    size = huge_page_size(mem, h)
    owner = (v.vm_flags & (VM_SHARED | VM_NORESERVE)) == 0
    unmapped = 0
    addr = start
    while addr < end:
        pmd = pmd_offset(mem, v.pgd, addr)
        if pmd != NO_ENTRY and mem.ram[pmd] != 0:
            pfn = entry_pfn(entry(mem, pmd))
            huge_pte_clear(mem, pmd, mem.hstate[h].order)
            page = mem.mem_map[pfn]
            page._mapcount -= 1
            if owner and page.mapping == v.mm_id and mem.hstate[h].surplus_huge_pages == 0:
                page.private |= HPG_restore_reserve
                resv[vma_hugecache_offset(mem, vma, addr)] = 1  # type: ignore[index]
            put_page(mem, pfn, cpu)
            unmapped += 1
        addr += size
    return unmapped


@compiled
def count_hugetlb(mem: Memory, vma: object) -> int:
    """Return how many huge pages of a mapping are mapped (kernel: `hugetlb_usage`)."""
    v = vma[0]  # type: ignore[index]
    size = huge_page_size(mem, v.hstate)
    mapped = 0
    addr = v.vm_start
    while addr < v.vm_end:
        pmd = pmd_offset(mem, v.pgd, addr)
        if pmd != NO_ENTRY and mem.ram[pmd] != 0:
            mapped += 1
        addr += size
    return mapped
