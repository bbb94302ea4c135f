# SPDX-License-Identifier: GPL-2.0-only
"""Transparent huge pages: the PMD fault, unmapping, splitting (kernel: `mm/huge_memory.c`).

`user_addr` is the raw fault address, not the aligned one (patch 18), and zeroing is the
allocator's (patch 19). A huge page of which a part is unmapped is split at once; Linux
queues it for a later split.
"""

from __future__ import annotations

from hostzero.jit import compiled, inline
from hostzero.mm.gfp import __GFP_DIRECT_RECLAIM, __GFP_ZERO, GFP_TRANSHUGE_LIGHT
from hostzero.mm.mempolicy import vma_zonelist
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE, Memory
from hostzero.mm.page_alloc import __alloc_frozen_pages
from hostzero.mm.page_flags import PG_head
from hostzero.mm.page_free import put_page
from hostzero.mm.pgtable import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
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

_USER_FLAGS = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY


@inline
def thp_vma_allowable(mem: Memory, vma: object, addr: int) -> bool:
    """Return whether a PMD-sized page may back `addr` (kernel: `thp_vma_allowable_order`)."""
    v = vma[0]  # type: ignore[index]
    vm = mem.vm[0]
    if (v.vm_flags & VM_NOHUGEPAGE) != 0 or vm.thp_never != 0:
        return False
    if (v.vm_flags & VM_HUGEPAGE) == 0 and vm.thp_always == 0:
        return False
    start = addr & ~(PMD_SIZE - 1)
    return start >= v.vm_start and start + PMD_SIZE <= v.vm_end


@compiled
def do_huge_pmd_anonymous_page(mem: Memory, vma: object, pmd: int, addr: int, vma_gfp: int, cpu: int) -> int:
    """Map a PMD-sized page over `addr`; return its head, or NO_PAGE to fall back.

    Source: same name, `vma_alloc_anon_folio_pmd`. `vma_gfp` says whether the mapping
    wants zeros.
    """
    v = vma[0]  # type: ignore[index]
    gfp = GFP_TRANSHUGE_LIGHT | (vma_gfp & __GFP_ZERO)
    if (v.vm_flags & VM_HUGEPAGE) != 0:
        gfp |= __GFP_DIRECT_RECLAIM  # defrag=madvise, the default
    node = vma_zonelist(mem, vma, addr, HPAGE_PMD_ORDER)
    pfn = __alloc_frozen_pages(mem, gfp, HPAGE_PMD_ORDER, addr, node, cpu)
    if pfn == NO_PAGE:
        return NO_PAGE
    page = mem.mem_map[pfn]
    page._refcount = 1
    page._mapcount = 0
    page.mapping = v.mm_id
    page.index = (addr & ~(PMD_SIZE - 1)) >> PAGE_SHIFT
    mem.ram[pmd] = (pfn << PAGE_SHIFT) | _USER_FLAGS | PAGE_PSE
    mem.vm[0].thp_fault_alloc += 1
    return pfn


@compiled
def zap_huge_pmd(mem: Memory, pmd: int, cpu: int) -> None:
    """Unmap and free a whole huge page (kernel: same name)."""
    pfn = entry_pfn(entry(mem, pmd))
    mem.ram[pmd] = 0
    mem.mem_map[pfn]._mapcount = -1
    put_page(mem, pfn, cpu)


@compiled
def __split_huge_pmd(mem: Memory, pmd: int, addr: int, node: int, cpu: int) -> bool:
    """Replace a huge mapping by 512 small ones of the same pages; False without a table.

    Source: `__split_huge_pmd_locked`, `__folio_split`. Each sub-page becomes a page of its
    own with the reference and the owner that the folio had.
    """
    table = alloc_table(mem, node, cpu)
    if table == NO_PAGE:
        return False
    head = entry_pfn(entry(mem, pmd))
    first_index = (addr & ~(PMD_SIZE - 1)) >> PAGE_SHIFT
    m = mem.mem_map
    m[head].flags_f &= ~PG_head
    m[head].order = 0
    mapping = m[head].mapping
    word = table_word(table, 0, PAGE_SHIFT)
    for i in range(1 << HPAGE_PMD_ORDER):
        page = m[head + i]
        mem.compound_head[head + i] = 0
        page._refcount = 1
        page._mapcount = 0
        page.mapping = mapping
        page.index = first_index + i
        mem.ram[word + i] = ((head + i) << PAGE_SHIFT) | _USER_FLAGS
    mem.ram[pmd] = (table << PAGE_SHIFT) | PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED
    return True
