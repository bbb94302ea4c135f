# SPDX-License-Identifier: GPL-2.0-only
"""Page faults, unmapping, and user access through the page tables (kernel: `mm/memory.c`).

A user page is asked for with `__GFP_ZERO` and the raw fault address (patches 15 and
17): the allocator zeroes it, or knows that it need not. Nothing is zeroed here.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import compiled, inline
from hostzero.mm.clear_page import fill_pages
from hostzero.mm.gfp import __GFP_ZERO, GFP_HIGHUSER_MOVABLE
from hostzero.mm.huge_memory import (
    __split_huge_pmd,
    do_huge_pmd_anonymous_page,
    thp_vma_allowable,
    zap_huge_pmd,
)
from hostzero.mm.mempolicy import vma_zonelist
from hostzero.mm.mmzone import NO_PAGE, WORDS_PER_PAGE, Memory
from hostzero.mm.page_alloc import __alloc_frozen_pages
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
    pte_word,
    table_alloc,
)
from hostzero.mm.vma import VM_UNINITIALIZED
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE

VM_FAULT_OOM: Final = -1

_USER_PTE: Final = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY
_ZERO_PTE: Final = PAGE_PRESENT | PAGE_USER | PAGE_ACCESSED


@inline
def vma_gfp(vma: object) -> int:
    """Return the flags for a mapping's pages; an uninitialized mapping asks for no zeros."""
    if (vma[0].vm_flags & VM_UNINITIALIZED) != 0:  # type: ignore[index]
        return GFP_HIGHUSER_MOVABLE
    return GFP_HIGHUSER_MOVABLE | __GFP_ZERO


@inline
def map_anon_page(mem: Memory, vma: object, pfn: int, word: int, addr: int) -> None:
    """Give a fresh order-0 page to the address space at one PTE."""
    page = mem.mem_map[pfn]
    page._refcount = 1
    page._mapcount = 0
    page.mapping = vma[0].mm_id  # type: ignore[index]
    page.index = addr >> PAGE_SHIFT
    mem.ram[word] = (pfn << PAGE_SHIFT) | _USER_PTE


@inline
def handle_mm_fault(mem: Memory, vma: object, pmd: int, addr: int, write: bool, cpu: int) -> int:
    """Resolve a fault; return the page that holds `addr` now, or VM_FAULT_OOM.

    Source: `__handle_mm_fault`, `do_anonymous_page`, `do_wp_page`. A PMD-sized page is tried
    first where the mapping allows one; without such a page the fault falls back to
    order 0. A read maps the shared zero page; the first write to that replaces it.
    """
    mem.vm[0].pgfault += 1
    node = vma[0].node  # type: ignore[index]
    if mem.ram[pmd] == 0:
        if write and thp_vma_allowable(mem, vma, addr):
            pfn = do_huge_pmd_anonymous_page(mem, vma, pmd, addr, vma_gfp(vma), cpu)
            if pfn != NO_PAGE:
                return pfn + ((addr & (PMD_SIZE - 1)) >> PAGE_SHIFT)
            mem.vm[0].thp_fault_fallback += 1
        if not table_alloc(mem, pmd, node, cpu):
            return VM_FAULT_OOM
    word = pte_word(mem, pmd, addr)
    if not write:
        zero_pfn = mem.vm[0].empty_zero_page
        mem.ram[word] = (zero_pfn << PAGE_SHIFT) | _ZERO_PTE
        return zero_pfn
    gfp = vma_gfp(vma)
    if mem.ram[word] != 0:
        # Present but not writable: the zero page. The new page must read as the old one
        # did, whatever the mapping asked for (vma_alloc_zeroed_movable_folio, patch 13).
        gfp |= __GFP_ZERO
    pfn = __alloc_frozen_pages(mem, gfp, 0, addr, vma_zonelist(mem, vma, addr, 0), cpu)
    if pfn == NO_PAGE:
        return VM_FAULT_OOM
    map_anon_page(mem, vma, pfn, word, addr)
    return pfn


@inline
def follow_page(mem: Memory, pmd: int, addr: int, write: bool) -> tuple[int, int]:
    """Return the page mapped at an address and how many more follow it, or NO_PAGE.

    A mapping that does not permit the access counts as none.
    """
    if pmd == NO_ENTRY:
        return NO_PAGE, 0
    value = entry(mem, pmd)
    if value == 0:
        return NO_PAGE, 0
    if (value & PAGE_PSE) != 0:
        sub = (addr & (PMD_SIZE - 1)) >> PAGE_SHIFT
        return entry_pfn(value) + sub, (PMD_SIZE >> PAGE_SHIFT) - sub
    value = entry(mem, pte_word(mem, pmd, addr))
    if value == 0 or (write and (value & PAGE_RW) == 0):
        return NO_PAGE, 0
    return entry_pfn(value), 1


@compiled
def populate_range(mem: Memory, vma: object, start: int, end: int, write: bool, cpu: int) -> int:
    """Fault in the pages `[start, end)`; return the first address that failed, or `end`.

    Source: `faultin_page_range`. The page table is walked once a PMD.
    """
    addr = start
    while addr < end:
        pmd = pmd_alloc(mem, vma[0].pgd, addr, vma[0].node, cpu)  # type: ignore[index]
        if pmd == NO_ENTRY:
            return addr
        limit = min(end, (addr & ~(PMD_SIZE - 1)) + PMD_SIZE)
        while addr < limit:
            pfn, count = follow_page(mem, pmd, addr, write)
            if pfn == NO_PAGE:
                if handle_mm_fault(mem, vma, pmd, addr, write, cpu) == VM_FAULT_OOM:
                    return addr
                # A huge page is followed to its end at the next turn.
                count = 1
            addr += count << PAGE_SHIFT
    return end


@compiled
def touch_range(mem: Memory, pgd: int, bytes_: object, start: int, end: int) -> None:
    """Write one byte to each page of `[start, end)`, which must be mapped writable.

    `bytes_` is guest RAM as bytes: a byte written through a word would read the page
    first, and the host would serve two faults where a program has one.
    """
    addr = start
    while addr < end:
        pfn, count = follow_page(mem, pmd_offset(mem, pgd, addr), addr, True)
        for page in range(pfn, pfn + min(count, (end - addr) >> PAGE_SHIFT)):
            bytes_[page << PAGE_SHIFT] = 1  # type: ignore[index]
        addr += count << PAGE_SHIFT


@compiled
def fill_range(mem: Memory, pgd: int, start: int, end: int, byte: int) -> None:
    """Write `byte` to all of the pages `[start, end)`, which must be mapped writable."""
    addr = start
    while addr < end:
        pfn, count = follow_page(mem, pmd_offset(mem, pgd, addr), addr, True)
        count = min(count, (end - addr) >> PAGE_SHIFT)
        fill_pages(mem, pfn, count, byte)
        addr += count << PAGE_SHIFT


@compiled
def copy_user(mem: Memory, pgd: int, bytes_: object, addr: int, data: object, write: bool) -> None:
    """Copy between `data` and user memory, page by page, through the page tables.

    `bytes_` is guest RAM as bytes. The pages must be mapped for this access.
    """
    done = 0
    size = len(data)  # type: ignore[arg-type]
    while done < size:
        at = addr + done
        pfn, _ = follow_page(mem, pmd_offset(mem, pgd, at), at, write)
        offset = at & (PAGE_SIZE - 1)
        count = min(PAGE_SIZE - offset, size - done)
        base = (pfn << PAGE_SHIFT) + offset
        if write:
            for i in range(count):
                bytes_[base + i] = data[done + i]  # type: ignore[index]
        else:
            for i in range(count):
                data[done + i] = bytes_[base + i]  # type: ignore[index]
        done += count


@compiled
def find_nonzero(mem: Memory, pgd: int, start: int, end: int) -> int:
    """Return the first mapped address in the pages `[start, end)` that reads non-zero, or -1.

    Faults nothing in: what is not mapped is skipped. The granularity is the word.
    """
    addr = start
    while addr < end:
        pfn, count = follow_page(mem, pmd_offset(mem, pgd, addr), addr, False)
        if pfn == NO_PAGE:
            addr += PAGE_SIZE
            continue
        count = min(count, (end - addr) >> PAGE_SHIFT)
        first = pfn * WORDS_PER_PAGE
        for word in range(first, first + count * WORDS_PER_PAGE):
            if mem.ram[word] != 0:
                return addr + (word - first) * 8
        addr += count << PAGE_SHIFT
    return -1


@compiled
def count_mapped(mem: Memory, pgd: int, start: int, end: int) -> int:
    """Return how many pages are mapped in `[start, end)`, the shared zero page not counted."""
    mapped = 0
    addr = start
    while addr < end:
        pmd = pmd_offset(mem, pgd, addr)
        if pmd == NO_ENTRY or mem.ram[pmd] == 0:
            addr = (addr & ~(PMD_SIZE - 1)) + PMD_SIZE
            continue
        pfn, count = follow_page(mem, pmd, addr, True)
        if pfn == NO_PAGE:
            addr += PAGE_SIZE
            continue
        mapped += min(count, (end - addr) >> PAGE_SHIFT)
        addr += count << PAGE_SHIFT
    return mapped


@compiled
def zap_pte_range(mem: Memory, pmd: int, start: int, end: int, cpu: int) -> None:
    """Unmap and free the pages of one PTE table's part (kernel: same name)."""
    zero_pfn = mem.vm[0].empty_zero_page
    word = pte_word(mem, pmd, start)
    for at in range(word, word + ((end - start) >> PAGE_SHIFT)):
        value = entry(mem, at)
        if value == 0:
            continue
        mem.ram[at] = 0
        pfn = entry_pfn(value)
        if pfn == zero_pfn:
            continue
        mem.mem_map[pfn]._mapcount = -1
        put_page(mem, pfn, cpu)


@compiled
def zap_page_range(mem: Memory, pgd: int, start: int, end: int, node: int, cpu: int) -> bool:
    """Unmap and free everything in `[start, end)` (kernel: `zap_page_range_single`).

    A huge page of which only a part goes is split first; False if there is no page for
    the table that a split needs, and what was unmapped before that stays unmapped.
    """
    addr = start
    while addr < end:
        limit = min(end, (addr & ~(PMD_SIZE - 1)) + PMD_SIZE)
        pmd = pmd_offset(mem, pgd, addr)
        if pmd == NO_ENTRY or mem.ram[pmd] == 0:
            addr = limit
            continue
        if (entry(mem, pmd) & PAGE_PSE) != 0:
            if limit - addr == PMD_SIZE:
                zap_huge_pmd(mem, pmd, cpu)
                addr = limit
                continue
            if not __split_huge_pmd(mem, pmd, addr, node, cpu):
                return False
        zap_pte_range(mem, pmd, addr, limit, cpu)
        addr = limit
    return True
