# SPDX-License-Identifier: GPL-2.0-only
"""From a page to the entries that map it (kernel: `mm/rmap.c`).

An anonymous folio belongs to one address space, `mem.mms[mapping - 1]`, and its first page
is user page number `index` there: there is no fork, so that is all of it. A PMD-sized folio
is mapped by one huge entry or by 512 small ones, every other folio by one entry a page.
"""

from __future__ import annotations

from hostzero.jit import compiled, inline
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NR_MMS, Memory
from hostzero.mm.pgtable_walk import (
    NO_ENTRY,
    PAGE_PRESENT,
    PAGE_PSE,
    entry,
    entry_pfn,
    pmd_offset,
    pte_word,
)
from hostzero.units import PAGE_SHIFT


@inline
def entry_maps(value: int, pfn: int) -> bool:
    """Return whether a present entry points to `pfn`; a swap entry maps nothing."""
    return (value & PAGE_PRESENT) != 0 and entry_pfn(value) == pfn


@compiled
def folio_pmd(mem: Memory, pfn: int, order: int) -> int:
    """Return the word of the PMD entry over a folio's user addresses, or NO_ENTRY."""
    page = mem.mem_map[pfn]
    owner = page.mapping
    if owner <= 0 or owner > NR_MMS or mem.mms[owner - 1].pgd == 0:
        return NO_ENTRY
    if (page.index & ((1 << order) - 1)) != 0:
        # Folios are placed at multiples of their size; one that is not may span tables.
        return NO_ENTRY
    pmd = pmd_offset(mem, mem.mms[owner - 1].pgd, page.index << PAGE_SHIFT)
    if pmd == NO_ENTRY or (entry(mem, pmd) & PAGE_PRESENT) == 0:
        return NO_ENTRY
    return pmd


@compiled
def folio_mappings(mem: Memory, pfn: int, order: int) -> int:
    """Return how many entries map the folio of `order` that `pfn` heads (kernel: `folio_mapcount`)."""
    pmd = folio_pmd(mem, pfn, order)
    if pmd == NO_ENTRY:
        return 0
    value = entry(mem, pmd)
    if (value & PAGE_PSE) != 0:
        return 1 if order == HPAGE_PMD_ORDER and entry_pfn(value) == pfn else 0
    word = pte_word(mem, pmd, mem.mem_map[pfn].index << PAGE_SHIFT)
    found = 0
    for i in range(1 << order):
        if entry_maps(entry(mem, word + i), pfn + i):
            found += 1
    return found


@compiled
def remap_folio(mem: Memory, old: int, new: int, order: int) -> None:
    """Make every entry that maps `old` map `new`, with its permissions as they are.

    Source: `try_to_migrate` and `remove_migration_ptes` in one step. The kernel puts a
    migration entry in between, for other CPUs to wait at; here nothing runs in between.
    """
    pmd = folio_pmd(mem, old, order)
    if pmd == NO_ENTRY:
        return
    move = (new - old) << PAGE_SHIFT
    value = entry(mem, pmd)
    if (value & PAGE_PSE) != 0:
        if entry_pfn(value) == old:
            mem.ram[pmd] = value + move
        return
    word = pte_word(mem, pmd, mem.mem_map[old].index << PAGE_SHIFT)
    for i in range(1 << order):
        value = entry(mem, word + i)
        if entry_maps(value, old + i):
            mem.ram[word + i] = value + move
