# SPDX-License-Identifier: GPL-2.0-only
"""What a page table's entry holds, and walking the tables that are there.

Kernel: `arch/x86/include/asm/pgtable*.h`. Four levels of 512 words in guest RAM, as on
x86-64; an entry's place is named by its word number there. Nothing here allocates, so that
migration and compaction, which the allocator calls, can find a page's mapping;
`pgtable` allocates and frees tables.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hostzero.jit import compiled, inline
from hostzero.mm.mmzone import WORDS_PER_PAGE, Memory
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
