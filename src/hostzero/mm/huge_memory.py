# SPDX-License-Identifier: GPL-2.0-only
"""Transparent huge pages: the PMD fault, unmapping, splitting (kernel: `mm/huge_memory.c`).

A huge page of which a part is unmapped is split at once; Linux queues it for a later split.
"""

from __future__ import annotations

from hostzero.jit import compiled, far, inline
from hostzero.mm.anon_folio import (
    USER_PTE,
    alloc_charged_folio,
    anon_gfp,
    thp_vma_suitable_order,
    vma_thp_gfp_mask,
)
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE, Memory
from hostzero.mm.page_flags import PG_head, compound_order
from hostzero.mm.page_free import put_page
from hostzero.mm.pgtable import (
    PAGE_ACCESSED,
    PAGE_PRESENT,
    PAGE_PSE,
    PAGE_RW,
    PAGE_USER,
    alloc_table,
    entry,
    entry_pfn,
    table_word,
)
from hostzero.mm.vma import VM_HUGEPAGE, VM_NOHUGEPAGE
from hostzero.units import PAGE_SHIFT, PMD_SIZE


@inline
def thp_vma_allowable(mem: Memory, vma: object, addr: int) -> bool:
    """Return whether a PMD-sized page may back `addr` (kernel: `thp_vma_allowable_order`)."""
    v = vma[0]  # type: ignore[index]
    vm = mem.vm[0]
    if (v.vm_flags & VM_NOHUGEPAGE) != 0 or vm.thp_never != 0:
        return False
    if (v.vm_flags & VM_HUGEPAGE) == 0 and vm.thp_always == 0:
        return False
    return thp_vma_suitable_order(vma, addr, HPAGE_PMD_ORDER)


@compiled
def vma_alloc_anon_folio_pmd(mem: Memory, vma: object, addr: int, cpu: int) -> int:
    """Allocate and charge a PMD-sized folio for `addr`, or return NO_PAGE.

    Source: same name; patch 18: `addr` is the raw fault address; patch 19: the allocator zeroes.
    """
    gfp = vma_thp_gfp_mask(vma) | anon_gfp(vma)
    return alloc_charged_folio(mem, vma, gfp, HPAGE_PMD_ORDER, addr, cpu)


@compiled
def do_huge_pmd_anonymous_page(mem: Memory, vma: object, pmd: int, addr: int, cpu: int) -> int:
    """Map a PMD-sized page over `addr`; return its head, or NO_PAGE to fall back (kernel: same name)."""
    pfn = vma_alloc_anon_folio_pmd(mem, vma, addr, cpu)
    if pfn == NO_PAGE:
        return NO_PAGE
    page = mem.mem_map[pfn]
    page._refcount = 1
    page._mapcount = 0
    page.mapping = vma[0].mm_id  # type: ignore[index]
    page.index = (addr & ~(PMD_SIZE - 1)) >> PAGE_SHIFT
    mem.ram[pmd] = (pfn << PAGE_SHIFT) | USER_PTE | PAGE_PSE
    mem.vm[0].thp_fault_alloc += 1
    return pfn


@compiled
def zap_huge_pmd(mem: Memory, pmd: int, cpu: int) -> None:
    """Unmap and free a whole huge page (kernel: same name)."""
    pfn = entry_pfn(entry(mem, pmd))
    mem.ram[pmd] = 0
    mem.mem_map[pfn]._mapcount = -1
    put_page(mem, pfn, cpu)


@far
def __split_huge_pmd(mem: Memory, pmd: int, addr: int, node: int, cpu: int) -> bool:
    """Replace a huge mapping by 512 small ones of the same pages; False without a table.

    Source: `__split_huge_pmd_locked`. The folio is split with its mapping.
    """
    table = alloc_table(mem, node, cpu)
    if table == NO_PAGE:
        return False
    head = entry_pfn(entry(mem, pmd))
    word = table_word(table, 0, PAGE_SHIFT)
    for i in range(1 << HPAGE_PMD_ORDER):
        mem.mem_map[head + i]._mapcount = 0
        mem.ram[word + i] = ((head + i) << PAGE_SHIFT) | USER_PTE
    split_folio(mem, head, cpu)
    mem.ram[pmd] = (table << PAGE_SHIFT) | PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED
    return True


@far
def split_folio(mem: Memory, head: int, cpu: int) -> None:
    """Make each page of a folio a page of its own, with a reference if it is mapped.

    Source: `__folio_split`. Each page keeps the owner and its share of the charge; those that
    nobody maps any more are freed.
    """
    m = mem.mem_map
    count = 1 << compound_order(mem, head)
    mapping = m[head].mapping
    index = m[head].index
    memcg_data = m[head].memcg_data
    m[head].flags_f &= ~PG_head
    m[head].order = 0
    for i in range(count):
        page = m[head + i]
        mem.compound_head[head + i] = 0
        page._refcount = 1
        page.mapping = mapping
        page.index = index + i
        page.memcg_data = memcg_data
    for pfn in range(head, head + count):
        if m[pfn]._mapcount < 0:
            put_page(mem, pfn, cpu)
