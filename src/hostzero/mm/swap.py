# SPDX-License-Identifier: GPL-2.0-only
"""The swap area: anonymous pages out to it and back (kernel: `mm/swapfile.c`, `mm/memory.c`).

The area is host memory beside guest RAM, as a guest's swap disk is. It is synchronous, so a
fault reads straight into the new folio and there is no swap cache. Coming back is the one
fault whose page the kernel fills: it asks for no zeros (patch 16), drops whatever hint its
folio had, and hands the raw fault address on all the same.

Pages go out when a program says so (`MADV_PAGEOUT`), never by themselves: nothing here
reclaims. A page that comes back is mapped writable at once, as no other process has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hostzero.jit import compiled, far, inline
from hostzero.mm.anon_folio import (
    alloc_charged_folio,
    anon_folio_orders,
    folio_first_word,
    map_anon_folio_pte,
    thp_vma_suitable_order,
    vma_thp_gfp_mask,
)
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE
from hostzero.mm.huge_memory import __split_huge_pmd, split_folio
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE, WORDS_PER_PAGE, Memory
from hostzero.mm.page_flags import PageHWPoison, compound_head, compound_order
from hostzero.mm.page_free import put_page
from hostzero.mm.pgtable import NO_ENTRY, PAGE_PSE, entry, entry_pfn, pmd_offset, pte_word
from hostzero.mm.swapops import SWP_AREA, pte_present, swp_entry_to_pte, swp_offset
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_SLOT: Final = -1


@compiled
def folio_alloc_swap(mem: Memory, order: int) -> int:
    """Take `1 << order` slots side by side, aligned to their number, or return NO_SLOT.

    Source: same name. The search goes on where the last one ended, once around.
    """
    vm = mem.vm[0]
    count = 1 << order
    total = len(mem.swap_map)
    if vm.nr_swap_pages < count:
        return NO_SLOT
    first = (vm.swap_next + count - 1) >> order << order
    for step in range(0, total, count):
        slot = first + step
        if slot + count > total:
            slot = (slot - total + count - 1) >> order << order
        if slot + count > total:
            return NO_SLOT
        taken = 0
        for i in range(slot, slot + count):
            taken += mem.swap_map[i]
        if taken == 0:
            for i in range(slot, slot + count):
                mem.swap_map[i] = 1
            vm.nr_swap_pages -= count
            vm.swap_next = slot + count
            return slot
    return NO_SLOT


@compiled
def swap_free(mem: Memory, slot: int) -> None:
    """Give a slot back (kernel: same name)."""
    mem.swap_map[slot] = 0
    mem.vm[0].nr_swap_pages += 1


@inline
def swap_write_page(mem: Memory, slot: int, pfn: int) -> None:
    """Copy a page to its slot (kernel: `swap_writeout`)."""
    to = slot * WORDS_PER_PAGE
    source = pfn * WORDS_PER_PAGE
    for i in range(WORDS_PER_PAGE):
        mem.swap_area[to + i] = mem.ram[source + i]


@inline
def swap_read_page(mem: Memory, slot: int, pfn: int) -> None:
    """Copy a slot to a page (kernel: `swap_read_folio`)."""
    source = slot * WORDS_PER_PAGE
    to = pfn * WORDS_PER_PAGE
    for i in range(WORDS_PER_PAGE):
        mem.ram[to + i] = mem.swap_area[source + i]


@compiled
def mapped_by_one_range(mem: Memory, word: int, end: int, head: int) -> bool:
    """Return whether the PTEs from `word` on, and nobody else, map all of a folio before `end`."""
    count = 1 << compound_order(mem, head)
    if word + count > end or mem.mem_map[head]._refcount != count:
        return False
    for i in range(count):
        value = entry(mem, word + i)
        if not pte_present(value) or entry_pfn(value) != head + i:
            return False
    return True


@far
def swap_out_folio(mem: Memory, word: int, head: int, slot: int, cpu: int) -> None:
    """Write a folio to its slots and free it; its PTEs, from `word` on, name the slots.

    Source: `try_to_unmap_one`, `pageout`. The folio goes when its last reference does.
    """
    count = 1 << compound_order(mem, head)
    for i in range(count):
        swap_write_page(mem, slot + i, head + i)
        mem.ram[word + i] = swp_entry_to_pte(SWP_AREA, slot + i)
        mem.mem_map[head + i]._mapcount = -1
    mem.vm[0].pswpout += count
    for _ in range(count):
        put_page(mem, head, cpu)


@far
def pageout_pte_range(mem: Memory, word: int, end: int, cpu: int) -> bool:
    """Swap out what the PTEs `[word, end)` map; False when the swap area is full.

    Source: `madvise_cold_or_pageout_pte_range`, `reclaim_pages`. A large folio goes whole if the
    range maps all of it and it finds slots side by side; else it is split first.
    """
    zero_pfn = mem.vm[0].empty_zero_page
    while word < end:
        value = entry(mem, word)
        pfn = entry_pfn(value)
        if not pte_present(value) or pfn == zero_pfn or PageHWPoison(mem, pfn):
            word += 1
            continue
        head = compound_head(mem, pfn)
        order = compound_order(mem, head)
        if order > 0:
            if pfn == head and mapped_by_one_range(mem, word, end, head):
                slot = folio_alloc_swap(mem, order)
                if slot != NO_SLOT:
                    swap_out_folio(mem, word, head, slot, cpu)
                    word += 1 << order
                    continue
            split_folio(mem, head, cpu)
            continue
        if mem.mem_map[pfn]._refcount != 1:  # somebody else is looking at it
            word += 1
            continue
        slot = folio_alloc_swap(mem, 0)
        if slot == NO_SLOT:
            return False
        swap_out_folio(mem, word, pfn, slot, cpu)
        word += 1
    return True


@compiled
def pageout_page_range(mem: Memory, pgd: int, start: int, end: int, node: int, cpu: int) -> None:
    """Swap out what is mapped in `[start, end)` as far as the area goes (kernel: `madvise_pageout`).

    A huge page is split first, where there is a page for the table. What cannot go stays.
    """
    addr = start
    while addr < end and mem.vm[0].nr_swap_pages > 0:
        limit = min(end, (addr & ~(PMD_SIZE - 1)) + PMD_SIZE)
        pmd = pmd_offset(mem, pgd, addr)
        if pmd == NO_ENTRY or mem.ram[pmd] == 0:
            addr = limit
            continue
        if (entry(mem, pmd) & PAGE_PSE) != 0 and not __split_huge_pmd(mem, pmd, addr, node, cpu):
            addr = limit
            continue
        word = pte_word(mem, pmd, addr)
        if not pageout_pte_range(mem, word, word + ((limit - addr) >> PAGE_SHIFT), cpu):
            return
        addr = limit


@compiled
def swap_pte_batch(mem: Memory, word: int, count: int, first_slot: int) -> bool:
    """Return whether `count` PTEs name as many slots in a row (kernel: same name, `can_swapin_thp`)."""
    for i in range(count):
        if entry(mem, word + i) != swp_entry_to_pte(SWP_AREA, first_slot + i):
            return False
    return True


@compiled
def alloc_swap_folio(mem: Memory, vma: object, word: int, addr: int, cpu: int) -> tuple[int, int]:
    """Allocate and charge a folio to read swapped pages into; return it and its order.

    Source: same name; patch 16: the raw fault address, and never `__GFP_ZERO`, because every
    byte is written by the read. A large folio is tried where its PTEs name as many slots in a
    row that are aligned as it is.
    """
    slot = swp_offset(entry(mem, word))
    page = addr >> PAGE_SHIFT
    orders = anon_folio_orders(mem, vma)
    for order in range(HPAGE_PMD_ORDER - 1, 0, -1):
        if (orders >> order) & 1 == 0:
            continue
        mask = (1 << order) - 1
        if (page & mask) != (slot & mask) or not thp_vma_suitable_order(vma, addr, order):
            continue
        if not swap_pte_batch(mem, folio_first_word(word, addr, order), mask + 1, slot & ~mask):
            continue
        pfn = alloc_charged_folio(mem, vma, vma_thp_gfp_mask(vma), order, addr, cpu)
        if pfn != NO_PAGE:
            return pfn, order
    return alloc_charged_folio(mem, vma, GFP_HIGHUSER_MOVABLE, 0, addr, cpu), 0


@compiled
def do_swap_page(mem: Memory, vma: object, word: int, addr: int, cpu: int) -> int:
    """Bring the page of a swap entry back; return the page that holds `addr`, or NO_PAGE.

    Source: same name. The slots are free afterwards: the folio is the only copy again.
    """
    pfn, order = alloc_swap_folio(mem, vma, word, addr, cpu)
    if pfn == NO_PAGE:
        return NO_PAGE
    count = 1 << order
    sub = (addr >> PAGE_SHIFT) & (count - 1)
    slot = swp_offset(entry(mem, word)) - sub
    for i in range(count):
        swap_read_page(mem, slot + i, pfn + i)
        swap_free(mem, slot + i)
    map_anon_folio_pte(mem, vma, pfn, order, word, addr)
    mem.vm[0].pswpin += count
    mem.vm[0].pgmajfault += 1
    return pfn + sub


class SwapArea:
    """A guest's swap area: how large it is, and how much of it is in use (`manager.swap`)."""

    def __init__(self, mem: Memory) -> None:
        """Look at the area that the guest was booted with."""
        self._mem = mem

    @property
    def total_bytes(self) -> int:
        """Size of the area (`SwapTotal` in /proc/meminfo)."""
        return len(self._mem.swap_map) << PAGE_SHIFT

    @property
    def used_bytes(self) -> int:
        """Bytes of it that hold a page."""
        return self.total_bytes - (int(self._mem.vm[0].nr_swap_pages) << PAGE_SHIFT)

    def slot(self, number: int) -> NDArray[np.uint8]:
        """Return what a slot holds, as bytes that can be written."""
        at = number * PAGE_SIZE
        content: NDArray[np.uint8] = self._mem.swap_area.view(np.uint8)[at : at + PAGE_SIZE]
        return content
