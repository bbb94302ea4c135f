# SPDX-License-Identifier: GPL-2.0-only
"""Page tables in guest RAM: allocating and freeing them.

Kernel: `mm/memory.c` (`__pte_alloc` and its like). A table is an order-0 page from the
allocator, asked for with `__GFP_ZERO`, so it takes the same way through `post_alloc_hook`
as a user's page. What an entry holds and how to walk is in `pgtable_walk`, whose names this
module offers as well.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import compiled, far, inline
from hostzero.mm.cachealias import flush_dcache_folio
from hostzero.mm.gfp import __GFP_ZERO, GFP_KERNEL_ACCOUNT, USER_ADDR_NONE
from hostzero.mm.mmzone import NO_PAGE, Memory
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import PGTY_none, PGTY_table
from hostzero.mm.page_free import put_page
from hostzero.mm.pgtable_walk import (
    NO_ENTRY,
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_PSE,
    PAGE_RW,
    PAGE_USER,
    PGDIR_SHIFT,
    PTRS_PER_TABLE,
    PUD_SHIFT,
    TASK_SIZE,
    entry,
    entry_pfn,
    pmd_offset,
    pte_word,
    table_is_empty,
    table_word,
)
from hostzero.units import PAGE_SHIFT, PMD_SHIFT

__all__ = [
    "NO_ENTRY",
    "PAGE_ACCESSED",
    "PAGE_DIRTY",
    "PAGE_PRESENT",
    "PAGE_PSE",
    "PAGE_RW",
    "PAGE_USER",
    "PGDIR_SHIFT",
    "PTRS_PER_TABLE",
    "PUD_SHIFT",
    "TASK_SIZE",
    "entry",
    "entry_pfn",
    "pmd_offset",
    "pte_word",
    "table_is_empty",
    "table_word",
    "alloc_table",
    "table_alloc",
    "free_table",
    "pmd_alloc",
    "free_empty_tables",
]

_TABLE_FLAGS: Final = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED


@far
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


@far
def free_table(mem: Memory, pfn: int, cpu: int) -> None:
    """Free a table page (kernel: `pagetable_free`)."""
    mem.mem_map[pfn].page_type = PGTY_none
    put_page(mem, pfn, cpu)


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


@far
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
