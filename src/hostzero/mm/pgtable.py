# SPDX-License-Identifier: GPL-2.0-only
"""Page tables in guest RAM: four levels of 512 words, as on x86-64.

Kernel: `arch/x86/include/asm/pgtable*.h`, `mm/memory.c` (`__pte_alloc` and its like). A
table is an order-0 page from the allocator, asked for with `__GFP_ZERO`, so it takes
the same way through `post_alloc_hook` as a user's page. An entry's place is named by
its word number in guest RAM.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hostzero.jit import compiled, inline
from hostzero.mm.cachealias import flush_dcache_folio
from hostzero.mm.gfp import __GFP_ZERO, GFP_KERNEL_ACCOUNT, USER_ADDR_NONE
from hostzero.mm.mmzone import NO_PAGE, WORDS_PER_PAGE, Memory
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import PGTY_none, PGTY_table
from hostzero.mm.page_free import put_page
from hostzero.units import PAGE_SHIFT, PMD_SHIFT

PAGE_PRESENT: Final = 1 << 0
PAGE_RW: Final = 1 << 1
PAGE_USER: Final = 1 << 2
PAGE_ACCESSED: Final = 1 << 5
PAGE_DIRTY: Final = 1 << 6
PAGE_PSE: Final = 1 << 7  # a PMD entry that maps a 2 MiB page

PGDIR_SHIFT: Final = 39
PUD_SHIFT: Final = 30
PTRS_PER_TABLE: Final = 512
TASK_SIZE: Final = 1 << 47

NO_ENTRY: Final = -1
_PFN_MASK: Final = ((1 << 52) - 1) & ~((1 << PAGE_SHIFT) - 1)
_TABLE_FLAGS: Final = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED


@inline
def entry(mem: Memory, word: int) -> int:
    """Return a table entry as a signed word (entries stay below 2^52)."""
    return np.int64(mem.ram[word])  # type: ignore[return-value]


@inline
def entry_pfn(value: int) -> int:
    """Return the page that an entry points to."""
    return (value & _PFN_MASK) >> PAGE_SHIFT


@inline
def table_word(table: int, addr: int, shift: int) -> int:
    """Return the word of a table's entry for an address."""
    return table * WORDS_PER_PAGE + ((addr >> shift) & (PTRS_PER_TABLE - 1))


@compiled
def alloc_table(mem: Memory, node: int, cpu: int) -> int:
    """Allocate a zeroed table page, or return NO_PAGE (kernel: `pagetable_alloc`)."""
    pfn = alloc_pages(mem, GFP_KERNEL_ACCOUNT | __GFP_ZERO, 0, USER_ADDR_NONE, node, cpu)
    if pfn != NO_PAGE:
        mem.mem_map[pfn].page_type = PGTY_table
        flush_dcache_folio(mem, pfn, 0)
    return pfn


@compiled
def table_alloc(mem: Memory, word: int, node: int, cpu: int) -> bool:
    """Make an empty entry point to a new table; False without a page for it.

    Source: `__p4d_alloc` to `__pte_alloc`, which differ in nothing that matters here.
    """
    table = alloc_table(mem, node, cpu)
    if table == NO_PAGE:
        return False
    mem.ram[word] = (table << PAGE_SHIFT) | _TABLE_FLAGS
    return True


@compiled
def free_table(mem: Memory, pfn: int, cpu: int) -> None:
    """Free a table page (kernel: `pagetable_free`)."""
    mem.mem_map[pfn].page_type = PGTY_none
    put_page(mem, pfn, cpu)


@compiled
def pmd_offset(mem: Memory, pgd: int, addr: int) -> int:
    """Return the word of the PMD entry of an address, or NO_ENTRY without tables for it."""
    value = entry(mem, table_word(pgd, addr, PGDIR_SHIFT))
    if value == 0:
        return NO_ENTRY
    value = entry(mem, table_word(entry_pfn(value), addr, PUD_SHIFT))
    if value == 0:
        return NO_ENTRY
    return table_word(entry_pfn(value), addr, PMD_SHIFT)


@inline
def pmd_alloc(mem: Memory, pgd: int, addr: int, node: int, cpu: int) -> int:
    """Return the word of the PMD entry of an address, allocating the tables above it.

    Source: `p4d_alloc`, `pud_alloc`, `pmd_alloc`. NO_ENTRY means that there was no page.
    """
    table = pgd
    for shift in (PGDIR_SHIFT, PUD_SHIFT):
        word = table_word(table, addr, shift)
        if mem.ram[word] == 0 and not table_alloc(mem, word, node, cpu):
            return NO_ENTRY
        table = entry_pfn(entry(mem, word))
    return table_word(table, addr, PMD_SHIFT)


@inline
def pte_word(mem: Memory, pmd: int, addr: int) -> int:
    """Return the word of an address's PTE; the PMD entry must point to a table."""
    return table_word(entry_pfn(entry(mem, pmd)), addr, PAGE_SHIFT)


@compiled
def table_is_empty(mem: Memory, table: int) -> bool:
    """Return whether no entry of a table is in use."""
    start = table * WORDS_PER_PAGE
    for word in range(start, start + PTRS_PER_TABLE):
        if mem.ram[word] != 0:
            return False
    return True


@compiled
def free_empty_tables(mem: Memory, pgd: int, start: int, end: int, cpu: int) -> None:
    """Free the tables under `[start, end)` that have become empty (kernel: `free_pgtables`)."""
    addr = start & ~((1 << PMD_SHIFT) - 1)
    while addr < end:
        pud = table_word(pgd, addr, PGDIR_SHIFT)
        if mem.ram[pud] == 0:
            addr = ((addr >> PGDIR_SHIFT) + 1) << PGDIR_SHIFT
            continue
        pud_table = entry_pfn(entry(mem, pud))
        pmd_entry = table_word(pud_table, addr, PUD_SHIFT)
        if mem.ram[pmd_entry] != 0:
            pmd_table = entry_pfn(entry(mem, pmd_entry))
            # One PUD's worth, so that the tables above are looked at once.
            limit = min(end, ((addr >> PUD_SHIFT) + 1) << PUD_SHIFT)
            while addr < limit:
                word = table_word(pmd_table, addr, PMD_SHIFT)
                value = entry(mem, word)
                if value != 0 and (value & PAGE_PSE) == 0 and table_is_empty(mem, entry_pfn(value)):
                    mem.ram[word] = 0
                    free_table(mem, entry_pfn(value), cpu)
                addr += 1 << PMD_SHIFT
            if table_is_empty(mem, pmd_table):
                mem.ram[pmd_entry] = 0
                free_table(mem, pmd_table, cpu)
        else:
            addr = ((addr >> PUD_SHIFT) + 1) << PUD_SHIFT
        if table_is_empty(mem, pud_table):
            mem.ram[pud] = 0
            free_table(mem, pud_table, cpu)
