# SPDX-License-Identifier: GPL-2.0-only
"""Folios for anonymous memory: allocated, zeroed, charged, mapped by small entries.

Kernel: `alloc_anon_folio`, `folio_prealloc`, `map_anon_folio_pte_nopf` (`mm/memory.c`) and
`vma_alloc_zeroed_movable_folio` (`include/linux/highmem.h`). With the series a folio is asked
for with `__GFP_ZERO` and the raw fault address (patches 13, 15, 17, 18, 19): the allocator
zeroes it, or knows that it need not. So the zeroing comes before the charge, and a charge
that fails has it done in vain: `zeroed_in_vain_bytes`, the cover letter's second question.

With `user_zeroing="caller"` the same functions do what Linux 7.2 does without the series, as
something to compare with: a large folio is allocated as it is, charged, and zeroed here if
`user_alloc_needs_zeroing`. An order-0 folio is zeroed before its charge there too: x86 asks
the allocator (the override that patch 14 removes), and a machine whose caches alias has the
generic form, which zeroes between allocation and charge.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import compiled, inline
from hostzero.mm.buddy import FPI_NONE
from hostzero.mm.clear_page import folio_zero_user
from hostzero.mm.gfp import (
    __GFP_COMP,
    __GFP_DIRECT_RECLAIM,
    __GFP_ZERO,
    GFP_HIGHUSER_MOVABLE,
    GFP_TRANSHUGE_LIGHT,
)
from hostzero.mm.memcontrol import ROOT_MEMCG, mem_cgroup_charge
from hostzero.mm.mempolicy import vma_zonelist
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE, Memory
from hostzero.mm.page_alloc import __alloc_frozen_pages
from hostzero.mm.page_free import __free_frozen_pages
from hostzero.mm.pgtable import PAGE_ACCESSED, PAGE_DIRTY, PAGE_PRESENT, PAGE_RW, PAGE_USER
from hostzero.mm.vma import VM_HUGEPAGE, VM_NOHUGEPAGE, VM_UNINITIALIZED
from hostzero.units import PAGE_SHIFT

USER_PTE: Final = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY


@inline
def cpu_caches_alias(mem: Memory) -> bool:
    """Return whether a page must be zeroed through the user's own mapping of it."""
    return (mem.vm[0].cpu_dcache_aliasing | mem.vm[0].cpu_icache_aliasing) != 0


@inline
def user_alloc_needs_zeroing(mem: Memory) -> bool:
    """Return whether a fault handler must zero a user page itself (kernel: same name).

    True also whenever `init_on_alloc` is off, `init_on_free` or not: which is why patch 23
    takes the aliasing checks alone into the allocator, and why Linux 7.2 zeroes huge pages
    twice with `init_on_free`.
    """
    return cpu_caches_alias(mem) or mem.vm[0].init_on_alloc == 0


@inline
def anon_gfp(vma: object) -> int:
    """Return what a mapping asks for: zeros, unless it is an uninitialized one."""
    if (vma[0].vm_flags & VM_UNINITIALIZED) != 0:  # type: ignore[index]
        return 0
    return __GFP_ZERO


@inline
def vma_thp_gfp_mask(vma: object) -> int:
    """Return the flags for a mapping's large folios (kernel: same name, defrag=madvise)."""
    if (vma[0].vm_flags & VM_HUGEPAGE) != 0:  # type: ignore[index]
        return GFP_TRANSHUGE_LIGHT | __GFP_DIRECT_RECLAIM
    return GFP_TRANSHUGE_LIGHT


@inline
def vma_alloc_folio(mem: Memory, gfp: int, order: int, vma: object, addr: int, cpu: int) -> int:
    """Allocate a folio without a reference for a mapping, or return NO_PAGE.

    Source: same name (patches 6 and 7). `addr` is the raw fault address: both the place of
    the page that is zeroed last and, cut to the folio's size, the place in a memory policy.
    """
    if order > 0:
        gfp |= __GFP_COMP
    return __alloc_frozen_pages(mem, gfp, order, addr, vma_zonelist(mem, vma, addr, order), cpu)


@compiled
def clear_user_folio(mem: Memory, pfn: int, order: int, addr: int) -> None:
    """Zero a folio at the fault, as Linux 7.2 does without the series, if that is needed there."""
    if not user_alloc_needs_zeroing(mem):
        return
    vm = mem.vm[0]
    vm.zeroed_bytes += 1 << (order + PAGE_SHIFT)
    if (vm.init_on_alloc | vm.init_on_free) != 0:
        vm.zeroed_twice_bytes += 1 << (order + PAGE_SHIFT)
    folio_zero_user(mem, pfn, order, addr)


@inline
def folios_zeroed(mem: Memory, order: int) -> int:
    """Return how many blocks of an order the allocator has zeroed for their owners."""
    return mem.vm[0].zero_allocs[order] - mem.vm[0].known_zero_allocs[order]


@compiled
def alloc_charged_folio(mem: Memory, vma: object, gfp: int, order: int, addr: int, cpu: int) -> int:
    """Allocate a folio, charge it and see to its zeros; NO_PAGE if there is none or no charge.

    A folio whose charge failed goes back as any other: it has been zeroed, but nothing says
    so on its free list (patch 17). What that zeroing cost is counted; a folio that was known
    to be zero cost nothing. At order 0 nothing smaller can be tried, so the address space
    keeps the cgroup's number for the error (kernel: `current->memcg_in_oom`).
    """
    vm = mem.vm[0]
    mm = vma[0].mm_id - 1  # type: ignore[index]
    in_caller = vm.zero_in_caller != 0 and (gfp & __GFP_ZERO) != 0
    if in_caller and order == 0 and not cpu_caches_alias(mem):
        in_caller = False
    if in_caller:
        gfp &= ~__GFP_ZERO
    zeroed = folios_zeroed(mem, order)
    pfn = vma_alloc_folio(mem, gfp, order, vma, addr, cpu)
    if pfn == NO_PAGE:
        return NO_PAGE
    zeroed = folios_zeroed(mem, order) - zeroed
    if in_caller and order == 0:
        clear_user_folio(mem, pfn, 0, addr)
        zeroed = 1
    memcg = mem.mms[mm].memcg
    if not mem_cgroup_charge(mem, pfn, 1 << order, memcg):
        if zeroed != 0:
            vm.zeroed_in_vain_bytes += 1 << (order + PAGE_SHIFT)
        if order == 0:
            mem.mms[mm].memcg_in_oom = memcg + 1
        __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)
        return NO_PAGE
    if in_caller and order > 0:
        clear_user_folio(mem, pfn, order, addr)
    return pfn


@inline
def folio_prealloc(mem: Memory, vma: object, gfp: int, addr: int, cpu: int) -> int:
    """Allocate and charge an order-0 folio, or return NO_PAGE (kernel: same name).

    The usual case, no cgroup and the allocator zeroing, is answered right here.
    """
    vm = mem.vm[0]
    if mem.mms[vma[0].mm_id - 1].memcg != ROOT_MEMCG or (  # type: ignore[index]
        vm.zero_in_caller != 0 and cpu_caches_alias(mem)
    ):
        return alloc_charged_folio(mem, vma, gfp, 0, addr, cpu)
    return vma_alloc_folio(mem, gfp, 0, vma, addr, cpu)


@compiled
def vma_alloc_zeroed_movable_folio(mem: Memory, vma: object, addr: int, cpu: int) -> int:
    """Allocate and charge a zeroed order-0 folio, whatever the mapping asks for.

    Source: same name, patch 13; no architecture has a form of its own any more (patch 14).
    """
    return alloc_charged_folio(mem, vma, GFP_HIGHUSER_MOVABLE | __GFP_ZERO, 0, addr, cpu)


@inline
def thp_vma_suitable_order(vma: object, addr: int, order: int) -> bool:
    """Return whether the folio of `order` around `addr` lies inside the mapping (kernel: same name)."""
    v = vma[0]  # type: ignore[index]
    start = addr >> (order + PAGE_SHIFT) << (order + PAGE_SHIFT)
    return start >= v.vm_start and start + (1 << (order + PAGE_SHIFT)) <= v.vm_end


@inline
def anon_folio_orders(mem: Memory, vma: object) -> int:
    """Return the orders below PMD that a mapping may have, a bit each.

    Source: `thp_vma_allowable_orders` with `hugepages-*kB/enabled` at "always", which does not
    depend on what PMD-sized pages are allowed.
    """
    if (vma[0].vm_flags & VM_NOHUGEPAGE) != 0:  # type: ignore[index]
        return 0
    return mem.vm[0].anon_orders


@inline
def folio_first_word(word: int, addr: int, order: int) -> int:
    """Return the word of the first PTE of the folio around `addr`, whose own PTE is `word`."""
    return word - ((addr >> PAGE_SHIFT) & ((1 << order) - 1))


@compiled
def pte_range_none(mem: Memory, word: int, count: int) -> bool:
    """Return whether `count` PTEs from `word` on are empty (kernel: same name)."""
    for at in range(word, word + count):
        if mem.ram[at] != 0:
            return False
    return True


@compiled
def map_anon_folio_pte(mem: Memory, vma: object, pfn: int, order: int, word: int, addr: int) -> None:
    """Give a fresh folio to the address space, one reference and one entry a page.

    Source: `map_anon_folio_pte_nopf`. `word` is the PTE of `addr`, which may be anywhere in the
    folio. The head alone says whose it is; its `index` is the first page's.
    """
    count = 1 << order
    first = folio_first_word(word, addr, order)
    head = mem.mem_map[pfn]
    head._refcount = count
    head.mapping = vma[0].mm_id  # type: ignore[index]
    head.index = addr >> (PAGE_SHIFT + order) << order
    for i in range(count):
        mem.mem_map[pfn + i]._mapcount = 0
        mem.ram[first + i] = ((pfn + i) << PAGE_SHIFT) | USER_PTE


@compiled
def alloc_anon_folio(mem: Memory, vma: object, word: int, addr: int, cpu: int) -> tuple[int, int]:
    """Allocate and charge the largest folio that fits over `addr`; return it and its order.

    Source: same name; patches 15 and 17. The size to begin with is the largest that the mapping
    permits and whose entries are all empty. Without such a folio, or without a charge for it,
    the next size is tried, order 0 last; NO_PAGE if that fails too.
    """
    orders = anon_folio_orders(mem, vma)
    gfp = vma_thp_gfp_mask(vma) | anon_gfp(vma)
    empty = False
    for order in range(HPAGE_PMD_ORDER - 1, 0, -1):
        if (orders >> order) & 1 == 0 or not thp_vma_suitable_order(vma, addr, order):
            continue
        if not empty and not pte_range_none(mem, folio_first_word(word, addr, order), 1 << order):
            continue
        empty = True
        pfn = alloc_charged_folio(mem, vma, gfp, order, addr, cpu)
        if pfn != NO_PAGE:
            return pfn, order
    return alloc_charged_folio(mem, vma, GFP_HIGHUSER_MOVABLE | anon_gfp(vma), 0, addr, cpu), 0
