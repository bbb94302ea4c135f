# SPDX-License-Identifier: GPL-2.0-only
"""Pools of huge pages: free lists, counters, and what the bits of a huge folio say.

Kernel: `mm/hugetlb.c` and `include/linux/hugetlb.h`, the part below allocation. A pool
(`struct hstate`) has one page size. Its folios are compound pages of type hugetlb; in
`private` of the head are the HPG bits. A free folio has no reference and is on the list
of its node; one in use is on no list (Linux keeps a list of those for cgroup accounting).

`HPG_zeroed` (patch 20) says that every byte of the folio is zero. It is the pool's own
knowledge, a level above `PG_zeroed`, which ends where the buddy allocator hands a page out.
Who sets and clears it is in the table of docs/safety.md: rows `hugetlb-set` to `hugetlb-free`.
"""

from __future__ import annotations

from typing import Final

from hostzero.errors import VmBug
from hostzero.jit import compiled, far, inline
from hostzero.mm.debug import VM_BUG_ON_PAGE
from hostzero.mm.list import list_add, list_add_tail, list_del, list_empty, list_first, list_next
from hostzero.mm.mmzone import (
    MAX_NUMNODES,
    MAX_PAGE_ORDER,
    NO_PAGE,
    NR_HSTATES,
    Memory,
    hugepage_freelist,
    page_zone,
)
from hostzero.mm.page_flags import PageHWPoison, PG_hwpoison, PGTY_hugetlb, PGTY_none, compound_order

# Bit positions as in enum hugetlb_page_flags; HPG_zeroed comes after them.
HPG_restore_reserve: Final = 1 << 0  # freeing the folio gives back a reservation
HPG_temporary: Final = 1 << 2  # never to enter the pool
HPG_freed: Final = 1 << 3  # on a free list
HPG_cma: Final = 1 << 6  # from the CMA area, to which it returns
HPG_zeroed: Final = 1 << 7  # every byte is zero (patch 20)
HPG_hwpoison_tail: Final = 1 << 8  # not Linux's: the head is marked broken for a tail's sake only


@inline
def folio_test_hugetlb(mem: Memory, pfn: int) -> bool:
    """Return whether a page heads a folio of a huge page pool."""
    return mem.mem_map[pfn].page_type == PGTY_hugetlb


@inline
def folio_test_hugetlb_zeroed(mem: Memory, pfn: int) -> bool:
    """Return whether every byte of a huge folio is known to be zero (patch 20)."""
    return (mem.mem_map[pfn].private & HPG_zeroed) != 0


@inline
def folio_clear_hugetlb_zeroed(mem: Memory, pfn: int) -> None:
    """Forget what was known of a huge folio's contents."""
    mem.mem_map[pfn].private &= ~HPG_zeroed


@inline
def folio_nid(mem: Memory, pfn: int) -> int:
    """Return the node that a page belongs to."""
    return mem.zone[page_zone(mem, pfn)].node


@inline
def folio_hstate(mem: Memory, pfn: int) -> int:
    """Return the pool of a huge folio, which its size tells (kernel: `folio_hstate`)."""
    order = compound_order(mem, pfn)
    for h in range(NR_HSTATES):
        if order > 0 and mem.hstate[h].order == order:
            return h
    raise VmBug("folio_hstate: there is no pool of this folio's size")


@inline
def hstate_is_gigantic(mem: Memory, h: int) -> bool:
    """Return whether the pool's pages are larger than any block of the buddy allocator."""
    return mem.hstate[h].order > MAX_PAGE_ORDER


@inline
def available_huge_pages(mem: Memory, h: int) -> int:
    """Return how many free pages of a pool nobody has reserved (kernel: same name)."""
    return mem.hstate[h].free_huge_pages - mem.hstate[h].resv_huge_pages


@inline
def persistent_huge_pages(mem: Memory, h: int) -> int:
    """Return how many pages the pool keeps when they are free (kernel: same name)."""
    return mem.hstate[h].nr_huge_pages - mem.hstate[h].surplus_huge_pages


@inline
def deferred_list(mem: Memory) -> int:
    """Return the list of gigantic folios that wait to be freed (kernel: `hpage_freelist`)."""
    return mem.vm[0].hugetlb_heads + NR_HSTATES * MAX_NUMNODES


@inline
def init_new_hugetlb_folio(mem: Memory, pfn: int) -> None:
    """Make a fresh compound page a huge folio, with no bit set (kernel: same name)."""
    mem.mem_map[pfn].page_type = PGTY_hugetlb
    mem.mem_map[pfn].private = 0


@inline
def account_new_hugetlb_folio(mem: Memory, h: int, pfn: int) -> None:
    """Count a new folio into its pool (kernel: same name)."""
    mem.hstate[h].nr_huge_pages += 1
    mem.hstate[h].nr_huge_pages_node[folio_nid(mem, pfn)] += 1


@compiled
def enqueue_hugetlb_folio(mem: Memory, h: int, pfn: int) -> None:
    """Put a folio without references at the head of its node's free list (kernel: same name)."""
    if VM_BUG_ON_PAGE(mem, mem.mem_map[pfn]._refcount != 0, pfn):
        raise VmBug("enqueue_hugetlb_folio: the folio has references")
    nid = folio_nid(mem, pfn)
    list_add(mem, pfn, hugepage_freelist(mem, h, nid))
    mem.hstate[h].free_huge_pages += 1
    mem.hstate[h].free_huge_pages_node[nid] += 1
    mem.mem_map[pfn].private |= HPG_freed


@inline
def unlink_free_hugetlb_folio(mem: Memory, h: int, pfn: int, nid: int) -> None:
    """Take a folio off its free list; its other bits stay."""
    list_del(mem, pfn)
    mem.mem_map[pfn].private &= ~HPG_freed
    mem.hstate[h].free_huge_pages -= 1
    mem.hstate[h].free_huge_pages_node[nid] -= 1


@compiled
def dequeue_hugetlb_folio_node_exact(mem: Memory, h: int, nid: int) -> int:
    """Take the first usable folio of one node, with one reference, or NO_PAGE (kernel: same name)."""
    head = hugepage_freelist(mem, h, nid)
    pfn = list_first(mem, head)
    while pfn != head:
        if not PageHWPoison(mem, pfn):
            unlink_free_hugetlb_folio(mem, h, pfn, nid)
            mem.mem_map[pfn]._refcount = 1
            return pfn
        pfn = list_next(mem, pfn)
    return NO_PAGE


@far
def dequeue_hugetlb_folio_nodemask(mem: Memory, h: int, nid: int) -> int:
    """Take a free folio from the nearest node that has one, or NO_PAGE (kernel: same name).

    `nid` is a row of `Memory.zonelists`, which may end early.
    """
    for k in range(mem.vm[0].nr_zones):
        if mem.zonelists[nid, k] < 0:
            return NO_PAGE
        node = mem.zone[mem.zonelists[nid, k]].node
        if mem.hstate[h].free_huge_pages_node[node] == 0:
            continue
        pfn = dequeue_hugetlb_folio_node_exact(mem, h, node)
        if pfn != NO_PAGE:
            return pfn
    return NO_PAGE


@far
def remove_hugetlb_folio(mem: Memory, h: int, pfn: int, adjust_surplus: bool) -> None:
    """Take a folio out of its pool; it is an ordinary frozen compound page then (kernel: same name).

    A head that was marked broken for a tail's sake loses that mark: from here on each page
    answers for itself (kernel: `folio_clear_hugetlb_hwpoison`).
    """
    nid = folio_nid(mem, pfn)
    hs = mem.hstate[h]
    if (mem.mem_map[pfn].private & HPG_freed) != 0:
        unlink_free_hugetlb_folio(mem, h, pfn, nid)
    if adjust_surplus:
        hs.surplus_huge_pages -= 1
        hs.surplus_huge_pages_node[nid] -= 1
    hs.nr_huge_pages -= 1
    hs.nr_huge_pages_node[nid] -= 1
    page = mem.mem_map[pfn]
    if (page.private & HPG_hwpoison_tail) != 0:
        page.private &= ~HPG_hwpoison_tail
        page.flags_f &= ~PG_hwpoison
    page.page_type = PGTY_none


@compiled
def remove_pool_hugetlb_folio(mem: Memory, h: int, acct_surplus: bool) -> int:
    """Take a free folio out of the pool, the nodes in turn, or return NO_PAGE (kernel: same name)."""
    hs = mem.hstate[h]
    for _ in range(mem.vm[0].nr_nodes):
        nid = hs.next_nid_to_free
        hs.next_nid_to_free = (nid + 1) % mem.vm[0].nr_nodes
        head = hugepage_freelist(mem, h, nid)
        if acct_surplus and hs.surplus_huge_pages_node[nid] == 0:
            continue
        if not list_empty(mem, head):
            pfn = list_first(mem, head)
            remove_hugetlb_folio(mem, h, pfn, acct_surplus)
            return pfn
    return NO_PAGE


@compiled
def adjust_pool_surplus(mem: Memory, h: int, delta: int) -> bool:
    """Turn one page of some node into a surplus page, or back (kernel: same name)."""
    hs = mem.hstate[h]
    for nid in range(mem.vm[0].nr_nodes):
        surplus = hs.surplus_huge_pages_node[nid]
        if (delta < 0 and surplus > 0) or (delta > 0 and surplus < hs.nr_huge_pages_node[nid]):
            hs.surplus_huge_pages += delta
            hs.surplus_huge_pages_node[nid] += delta
            return True
    return False


@compiled
def defer_gigantic(mem: Memory, pfn: int) -> None:
    """Leave a gigantic folio that has left its pool to `Hugetlb.free_deferred`.

    Source: `update_and_free_hugetlb_folio`, which does the same in atomic context. Here the
    reason is that contiguous ranges and the CMA area are managed outside compiled code.
    """
    list_add_tail(mem, pfn, deferred_list(mem))


@compiled
def take_deferred(mem: Memory) -> int:
    """Take the next gigantic folio that waits to be freed, or return NO_PAGE."""
    head = deferred_list(mem)
    if list_empty(mem, head):
        return NO_PAGE
    pfn = list_first(mem, head)
    list_del(mem, pfn)
    return pfn


@far
def return_huge_folio(mem: Memory, pfn: int) -> bool:
    """Give a folio without references back to its pool; True if it left the pool instead.

    Source: `free_huge_folio` without the step back to the buddy lists, which belongs to
    `page_free.free_huge_folio`. A temporary folio leaves, and any folio while its node has
    surplus ones, unless it is reserved again: Linux lets that one go too, and is left with a
    reservation for which the pool has no page.

    Nothing is known of the contents any more (patch 20): the folio may have been mapped, and
    what never was is not worth telling apart.
    """
    h = folio_hstate(mem, pfn)
    page = mem.mem_map[pfn]
    if VM_BUG_ON_PAGE(mem, page._refcount != 0 or page._mapcount != -1, pfn):
        raise VmBug("free_huge_folio: the folio is in use")
    page.mapping = 0
    page.private &= ~HPG_zeroed
    restore_reserve = (page.private & HPG_restore_reserve) != 0
    if restore_reserve:
        page.private &= ~HPG_restore_reserve
        mem.hstate[h].resv_huge_pages += 1
    if (page.private & HPG_temporary) != 0:
        remove_hugetlb_folio(mem, h, pfn, False)
    elif not restore_reserve and mem.hstate[h].surplus_huge_pages_node[folio_nid(mem, pfn)] > 0:
        remove_hugetlb_folio(mem, h, pfn, True)
    else:
        enqueue_hugetlb_folio(mem, h, pfn)
        return False
    if hstate_is_gigantic(mem, h):
        defer_gigantic(mem, pfn)
        return False
    return True
