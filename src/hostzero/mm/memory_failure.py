# SPDX-License-Identifier: GPL-2.0-only
"""Memory that the hardware gave up: taken out of use, page by page (kernel: `mm/memory-failure.c`).

A page with `PG_hwpoison` is never handed out again. What becomes of zero hints, decided here
because the sources are silent:

* `take_page_off_buddy` cuts the block by hand, as in Linux, and carries no flag over: the whole
  block's hint is dropped before, so that neither the broken page nor a remainder has one. The
  remainders' bytes may well be zero, but memory next to a failure is no place to trust.
* `put_page_back_buddy` frees without `__free_pages_prepare`, so a hint that some earlier life left
  on the page would survive, over contents that nobody knows. It is cleared here, and the page is
  zeroed or poisoned where `init_on_free` or poisoning promise that of every free page.
* A page parked on a per-CPU list is in nobody's hands and on no free list either, where Linux
  gives up after some attempts. Here the lists are drained first, as soft offlining does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostzero.errors import MmError, UsageError
from hostzero.jit import compiled
from hostzero.mm.buddy import (
    FPI_NONE,
    __free_one_page,
    account_freepages,
    buddy_order,
    del_page_from_free_list,
    set_buddy_order,
)
from hostzero.mm.buddy import __add_to_free_list as _add_to_free_list
from hostzero.mm.flag_steps import TestSetPageHWPoison, ZoneLock, change_flags, locked, run
from hostzero.mm.huge_memory import __split_huge_pmd as _split_huge_pmd
from hostzero.mm.huge_memory import split_folio
from hostzero.mm.hugetlb_pool import HPG_hwpoison_tail
from hostzero.mm.mmzone import (
    NR_PAGE_ORDERS,
    Memory,
    get_pageblock_migratetype,
    page_zone,
)
from hostzero.mm.page_flags import (
    MAGIC_HWPOISON,
    PAGE_FLAGS_CHECK_AT_PREP,
    PageBuddy,
    PageHWPoison,
    PG_hwpoison,
    PG_reserved,
    PGTY_hugetlb,
    PGTY_none,
    __ClearPageZeroed,
    compound_head,
    compound_order,
)
from hostzero.mm.page_free import put_page
from hostzero.mm.pcplist import drain_all_pages
from hostzero.mm.pgtable import NO_ENTRY, PAGE_PSE, entry, entry_pfn, pmd_offset, pte_word
from hostzero.mm.prep import overwrite_freed_pages
from hostzero.mm.swapops import pte_present
from hostzero.units import PAGE_SHIFT

if TYPE_CHECKING:
    from hostzero.mm.manager import MemoryManager

# enum mf_result
MF_IGNORED: Final = 0  # the kernel's own page: it is marked, and kept out once it is freed
MF_FAILED: Final = 1  # nothing could be done
MF_DELAYED: Final = 2
MF_RECOVERED: Final = 3  # out of use


@compiled
def break_down_buddy_pages(
    mem: Memory, zone: int, pfn: int, target: int, high: int, migratetype: int
) -> None:
    """Give back a block but for one page, in the largest blocks (kernel: same name)."""
    while high > 0:
        high -= 1
        upper = pfn + (1 << high)
        rest = upper
        if target >= upper:
            rest = pfn
            pfn = upper
        _add_to_free_list(mem, rest, zone, high, migratetype, False)
        set_buddy_order(mem, rest, high)
        account_freepages(mem, zone, 1 << high, migratetype)


@compiled
def take_page_off_buddy(mem: Memory, pfn: int) -> bool:
    """Take one page out of the free block that holds it; False if it is not free (kernel: same name).

    `PG_reported` ends with the deletion and `PG_zeroed` right after it, for the whole block.
    """
    for order in range(NR_PAGE_ORDERS):
        head = pfn & ~((1 << order) - 1)
        if PageBuddy(mem, head) and buddy_order(mem, head) >= order:
            zone = page_zone(mem, head)
            migratetype = get_pageblock_migratetype(mem, head)
            high = buddy_order(mem, head)
            del_page_from_free_list(mem, head, zone, high, migratetype)
            __ClearPageZeroed(mem, head)
            break_down_buddy_pages(mem, zone, head, pfn, high, migratetype)
            mem.mem_map[pfn].private = MAGIC_HWPOISON
            return True
        if mem.mem_map[head]._refcount > 0:
            break
    return False


@compiled
def put_page_back_buddy(mem: Memory, pfn: int) -> bool:
    """Put a broken page that nobody owns on its free list; return whether it was (kernel: same name).

    Linux does so for pages taken off a free list; here pages that were kept out when they
    were freed come back too.
    """
    page = mem.mem_map[pfn]
    if page.private != MAGIC_HWPOISON or page._refcount > 1:
        return False
    page._refcount = 0
    page.private = 0
    page.mapping = 0
    # Prepare does not see this page, and what it holds by now is unknown.
    page.flags_f &= ~(PG_hwpoison | PAGE_FLAGS_CHECK_AT_PREP)
    overwrite_freed_pages(mem, pfn, 0, FPI_NONE)
    __free_one_page(mem, pfn, page_zone(mem, pfn), 0, get_pageblock_migratetype(mem, pfn), FPI_NONE)
    return True


@compiled
def is_free_buddy_page(mem: Memory, pfn: int) -> bool:
    """Return whether a page is part of a block on a free list (kernel: same name)."""
    for order in range(NR_PAGE_ORDERS):
        head = pfn & ~((1 << order) - 1)
        if PageBuddy(mem, head) and buddy_order(mem, head) >= order:
            return True
    return False


class MemoryFailure:
    """One guest's broken pages, and the addresses at which processes will miss them.

    Attributes:
        lock: the zone lock, under which the poison bit is set (patch 2).
    """

    def __init__(self, mm: MemoryManager) -> None:
        """Start with no page broken."""
        self._mm = mm
        self.lock = ZoneLock()
        self._lost: dict[int, set[int]] = {}

    @property
    def num_poisoned_pages(self) -> int:
        """How many pages are broken (kernel: `HardwareCorrupted` in /proc/meminfo)."""
        return int(self._mm.mem.vm[0].num_poisoned_pages)

    def memory_failure(self, pfn: int) -> int:
        """Deal with a page that the hardware reported broken; return one of `MF_*` (kernel: same name).

        A free page leaves its block. A user's page is unmapped, and its process finds a bus error
        there (`check`); a huge page is split first. A balloon page, a page table and whatever else
        is the kernel's stays in use, marked, and will not be handed out once it is freed.

        Raises:
            MmError: -EHWPOISON, the page is known to be broken.
            UsageError: there is no such page.
        """
        mem = self._mm.mem
        if not 0 <= pfn < self._mm.nr_pages:
            raise UsageError(f"there is no page {pfn:#x}: the guest has {self._mm.nr_pages:#x}")
        head = int(compound_head(mem, pfn))
        was_marked = run(locked(TestSetPageHWPoison(mem, pfn), self.lock))
        if was_marked and not (pfn == head and self._marked_for_a_tail(head)):
            raise MmError(f"memory_failure: -EHWPOISON: page {pfn:#x} is known to be broken")
        mem.vm[0].num_poisoned_pages += 1
        if int(mem.mem_map[head].page_type) == PGTY_hugetlb:
            # The head stands for the folio (folio_set_hugetlb_hwpoison): its pool passes it over.
            if pfn == head:
                mem.mem_map[head].private &= ~HPG_hwpoison_tail
            elif not run(locked(TestSetPageHWPoison(mem, head), self.lock)):
                mem.mem_map[head].private |= HPG_hwpoison_tail
            return MF_IGNORED
        if int(mem.mem_map[head]._refcount) == 0:
            return self._free_page(pfn)
        if self._is_anonymous(head):
            return self._user_page(pfn, head)
        return MF_IGNORED

    def unpoison_memory(self, pfn: int) -> bool:
        """Take a broken page back into use, for tests of the guest (kernel: same name).

        Returns whether there was a mark to take off. A page that nobody owns goes back to its free
        list, of unknown contents; a page still in use only loses its mark.
        """
        mem = self._mm.mem
        if not 0 <= pfn < self._mm.nr_pages or not PageHWPoison(mem, pfn):
            return False
        head = int(compound_head(mem, pfn))
        if pfn == head and self._marked_for_a_tail(head):
            return False
        if not put_page_back_buddy(mem, pfn):
            run(locked(change_flags(mem, pfn, clear=PG_hwpoison), self.lock))
            self._mark_head_for_tails(head)
        mem.vm[0].num_poisoned_pages -= 1
        return True

    def check(self, mm_id: int, start: int, end: int) -> None:
        """Stop an access to what a process lost (kernel: VM_FAULT_HWPOISON).

        Raises:
            MmError: SIGBUS, a page of `[start, end)` was lost.
        """
        lost = [addr for addr in self._lost.get(mm_id, ()) if start <= addr < end]
        if lost:
            raise MmError(f"SIGBUS: the memory at {min(lost):#x} was lost to a hardware error")

    def forget(self, mm_id: int, start: int, end: int) -> None:
        """Forget what was lost in `[start, end)`, which is being unmapped."""
        lost = self._lost.get(mm_id)
        if lost:
            lost -= {addr for addr in lost if start <= addr < end}

    def _marked_for_a_tail(self, head: int) -> bool:
        page = self._mm.mem.mem_map[head]
        return page.page_type == PGTY_hugetlb and bool(int(page.private) & HPG_hwpoison_tail)

    def _mark_head_for_tails(self, head: int) -> None:
        # After a page of a huge folio was taken back into use: which of the others are broken?
        mem = self._mm.mem
        page = mem.mem_map[head]
        if page.page_type != PGTY_hugetlb or (PageHWPoison(mem, head) and not self._marked_for_a_tail(head)):
            return
        tails = range(head + 1, head + (1 << int(compound_order(mem, head))))
        if any(PageHWPoison(mem, tail) for tail in tails):
            run(locked(TestSetPageHWPoison(mem, head), self.lock))
            page.private |= HPG_hwpoison_tail
        else:
            run(locked(change_flags(mem, head, clear=PG_hwpoison), self.lock))
            page.private &= ~HPG_hwpoison_tail

    def _free_page(self, pfn: int) -> int:
        mem = self._mm.mem
        if not is_free_buddy_page(mem, pfn):
            drain_all_pages(mem)
        if not take_page_off_buddy(mem, pfn):
            return MF_IGNORED  # a part of a kernel block without references of its own
        mem.mem_map[pfn]._refcount = 1
        return MF_RECOVERED

    def _is_anonymous(self, head: int) -> bool:
        page = self._mm.mem.mem_map[head]
        return page.mapping != 0 and page.page_type == PGTY_none and not int(page.flags_f) & PG_reserved

    def _user_page(self, pfn: int, head: int) -> int:
        mem = self._mm.mem
        mm_id = int(mem.mem_map[head].mapping)
        addr = (int(mem.mem_map[head].index) + pfn - head) << PAGE_SHIFT
        pmd = int(pmd_offset(mem, int(mem.mms[mm_id - 1].pgd), addr))
        if pmd == NO_ENTRY or int(entry(mem, pmd)) == 0:
            return MF_FAILED
        zone = int(page_zone(mem, pfn))
        node = int(mem.zone[zone].node)
        if int(entry(mem, pmd)) & PAGE_PSE and not _split_huge_pmd(mem, pmd, addr, node, 0):
            return MF_FAILED  # MF_MSG_UNSPLIT_THP
        if (head := int(compound_head(mem, pfn))) and int(compound_order(mem, head)):
            split_folio(mem, head, 0)
        word = int(pte_word(mem, pmd, addr))
        value = int(entry(mem, word))
        if not pte_present(value) or int(entry_pfn(value)) != pfn:  # a slot has a number too
            return MF_FAILED
        mem.ram[word] = 0
        mem.mem_map[pfn]._mapcount = -1
        put_page(mem, pfn, 0)  # kept out by prepare
        self._lost.setdefault(mm_id, set()).add(addr)
        return MF_RECOVERED
