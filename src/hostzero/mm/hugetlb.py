# SPDX-License-Identifier: GPL-2.0-only
"""Allocating huge pages: surplus pages, reservations, and who zeroes (kernel: `mm/hugetlb.c`).

Patch 20: `alloc_hugetlb_folio` takes the caller's flags and the raw fault address. With
`__GFP_ZERO` its result is zero: a fresh page is zeroed by the allocator, which may know that
it need not; a page of the pool is zeroed here unless it has `HPG_zeroed`. Patch 5, which
removes a stub for kernels without hugetlb, has nothing to correspond to.

A reservation is one word a huge page in `resv`, an array of the file for shared mappings and
of the mapping for private ones: 1 while a page of the pool is set aside for it. Linux keeps
regions, and for private mappings the opposite (what was used up); the sums are the same.

In v8 a reservation allocates its pages without `__GFP_ZERO` (`gather_surplus_pages`), so what
the host zeroed is forgotten there, and the fault zeroes again. Only a surplus page that the
fault itself allocates, in a mapping with `MAP_NORESERVE`, keeps what was known.

Gigantic pages are allocated by Python (`hugetlb_sysfs`): where one is needed, compiled code
returns `NEEDS_GIGANTIC` and is called again with the page as `fresh`.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import FPI_NONE
from hostzero.mm.clear_page import folio_zero_user
from hostzero.mm.gfp import (
    __GFP_COMP,
    __GFP_NOWARN,
    __GFP_RETRY_MAYFAIL,
    __GFP_THISNODE,
    __GFP_ZERO,
    GFP_HIGHUSER_MOVABLE,
    USER_ADDR_NONE,
)
from hostzero.mm.hugetlb_pool import (
    HPG_restore_reserve,
    HPG_temporary,
    HPG_zeroed,
    account_new_hugetlb_folio,
    available_huge_pages,
    defer_gigantic,
    dequeue_hugetlb_folio_nodemask,
    enqueue_hugetlb_folio,
    folio_clear_hugetlb_zeroed,
    folio_nid,
    folio_test_hugetlb_zeroed,
    hstate_is_gigantic,
    init_new_hugetlb_folio,
    remove_pool_hugetlb_folio,
)
from hostzero.mm.list import list_next
from hostzero.mm.memcontrol import mem_cgroup_charge
from hostzero.mm.mempolicy import vma_zonelist
from hostzero.mm.mmzone import NO_PAGE, Memory
from hostzero.mm.page_alloc import __alloc_frozen_pages
from hostzero.mm.page_flags import compound_order
from hostzero.mm.page_free import __free_frozen_pages, free_huge_folio
from hostzero.units import PAGE_SHIFT, PAGE_SIZE

NEEDS_GIGANTIC: Final = -2
"""Instead of a page: none is free, a surplus one is allowed, and Python must allocate it."""

CHARGE_FAILED: Final = -3
"""Instead of a page: the process's cgroup is at its limit."""

HTLB_ALLOC_MASK: Final = GFP_HIGHUSER_MOVABLE | __GFP_COMP | __GFP_NOWARN | __GFP_RETRY_MAYFAIL


@inline
def huge_page_order(mem: Memory, h: int) -> int:
    """Return the order of a pool's pages."""
    return mem.hstate[h].order


@inline
def huge_page_size(mem: Memory, h: int) -> int:
    """Return the size of a pool's pages in bytes."""
    return PAGE_SIZE << mem.hstate[h].order


@inline
def vma_hugecache_offset(mem: Memory, vma: object, addr: int) -> int:
    """Return the number in its file of the huge page that holds `addr` (kernel: same name)."""
    v = vma[0]  # type: ignore[index]
    order = mem.hstate[v.hstate].order
    return ((addr - v.vm_start) >> (PAGE_SHIFT + order)) + (v.vm_pgoff >> order)


@far
def alloc_buddy_frozen_folio(mem: Memory, h: int, gfp: int, user_addr: int, nid: int, cpu: int) -> int:
    """Allocate a huge folio from the buddy lists, outside of the pool yet, or NO_PAGE.

    Source: same name, `only_alloc_fresh_hugetlb_folio`. `user_addr` is where the page will
    be touched, so that the allocator zeroes it in that order.
    """
    pfn = __alloc_frozen_pages(mem, HTLB_ALLOC_MASK | gfp, mem.hstate[h].order, user_addr, nid, cpu)
    if pfn == NO_PAGE:
        mem.vm[0].htlb_buddy_alloc_fail += 1
        return NO_PAGE
    mem.vm[0].htlb_buddy_alloc_success += 1
    init_new_hugetlb_folio(mem, pfn)
    return pfn


@compiled
def account_surplus_hugetlb_folio(mem: Memory, h: int, pfn: int, gfp: int, cpu: int) -> int:
    """Count a fresh folio as surplus; NO_PAGE if there are too many by now, and it is freed.

    Source: the second half of `alloc_surplus_hugetlb_folio`, after the lock was dropped to
    allocate. `HPG_zeroed` is set exactly if the allocator was asked for zeros (patch 20).
    """
    hs = mem.hstate[h]
    account_new_hugetlb_folio(mem, h, pfn)
    if (gfp & __GFP_ZERO) != 0:
        mem.mem_map[pfn].private |= HPG_zeroed
    if hs.surplus_huge_pages >= hs.nr_overcommit_huge_pages:
        mem.mem_map[pfn].private |= HPG_temporary
        free_huge_folio(mem, pfn, cpu)
        return NO_PAGE
    hs.surplus_huge_pages += 1
    hs.surplus_huge_pages_node[folio_nid(mem, pfn)] += 1
    return pfn


@far
def alloc_surplus_hugetlb_folio(mem: Memory, h: int, gfp: int, user_addr: int, nid: int, cpu: int) -> int:
    """Allocate a page beyond the persistent pool, without a reference (kernel: same name).

    Returns NO_PAGE if none is allowed or there is none, and NEEDS_GIGANTIC.
    """
    hs = mem.hstate[h]
    if hs.surplus_huge_pages >= hs.nr_overcommit_huge_pages:
        return NO_PAGE
    if hstate_is_gigantic(mem, h):
        return NEEDS_GIGANTIC
    pfn = alloc_buddy_frozen_folio(mem, h, gfp, user_addr, nid, cpu)
    if pfn == NO_PAGE:
        return NO_PAGE
    return account_surplus_hugetlb_folio(mem, h, pfn, gfp, cpu)


@far
def free_pool_huge_folio(mem: Memory, h: int, acct_surplus: bool, cpu: int) -> bool:
    """Take a free page out of the pool and free it; False if there is none.

    Source: `remove_pool_hugetlb_folio`, `update_and_free_hugetlb_folio`. A gigantic page
    goes to the deferred list.
    """
    pfn = remove_pool_hugetlb_folio(mem, h, acct_surplus)
    if pfn == NO_PAGE:
        return False
    if hstate_is_gigantic(mem, h):
        defer_gigantic(mem, pfn)
    else:
        __free_frozen_pages(mem, pfn, mem.hstate[h].order, FPI_NONE, cpu)
    return True


@far
def gather_surplus_pages(mem: Memory, h: int, delta: int, nid: int, cpu: int) -> bool:
    """Reserve `delta` more pages, allocating what the pool lacks (kernel: same name).

    The pages enter the pool before anyone faults on them, and are not asked to be zero:
    that would move the cost of zeroing from the fault to `mmap` (v8). False, and nothing
    changed, if there are too few. Gigantic pages: see `Hugetlb.acct_memory`.
    """
    hs = mem.hstate[h]
    chain = NO_PAGE
    allocated = 0
    while hs.resv_huge_pages + delta > hs.free_huge_pages + allocated:
        pfn = alloc_surplus_hugetlb_folio(mem, h, 0, USER_ADDR_NONE, nid, cpu)
        if pfn < 0:
            break
        mem.mem_map[pfn].lru_next = chain
        chain = pfn
        allocated += 1
    enough = hs.resv_huge_pages + delta <= hs.free_huge_pages + allocated
    if enough:
        hs.resv_huge_pages += delta
    while chain != NO_PAGE:
        following = list_next(mem, chain)
        if enough:
            enqueue_hugetlb_folio(mem, h, chain)
        else:
            free_huge_folio(mem, chain, cpu)
        chain = following
    return enough


@compiled
def return_unused_surplus_pages(mem: Memory, h: int, unused: int, cpu: int) -> None:
    """Give up `unused` reservations, and the surplus pages held for them (kernel: same name)."""
    from_pool = min(unused, mem.hstate[h].surplus_huge_pages)
    mem.hstate[h].resv_huge_pages -= unused
    for _ in range(from_pool):
        if not free_pool_huge_folio(mem, h, True, cpu):
            return


@inline
def hugetlb_zero_user(mem: Memory, pfn: int, order: int, user_addr: int) -> None:
    """Zero a huge folio outside of the allocator, and count it."""
    mem.vm[0].zeroed_bytes += PAGE_SIZE << order
    folio_zero_user(mem, pfn, order, user_addr)


@inline
def charge_hugetlb(mem: Memory, vma: object, pfn: int) -> bool:
    """Charge a folio to the cgroup of a mapping's process; False if that is at its limit.

    Source: `mem_cgroup_charge_hugetlb`, as if cgroups were mounted with
    `memory_hugetlb_accounting`. A mapping of no process (`fallocate`) charges the root.
    """
    mm_id = vma[0].mm_id  # type: ignore[index]
    if mm_id == 0:
        return True
    mm = mem.mms[mm_id - 1]
    if mem_cgroup_charge(mem, pfn, 1 << compound_order(mem, pfn), mm.memcg):
        return True
    mm.memcg_in_oom = mm.memcg + 1
    return False


@compiled
def alloc_hugetlb_folio(
    mem: Memory, vma: object, resv: object, user_addr: int, cow: bool, gfp: int, fresh: int, cpu: int
) -> int:
    """Allocate a huge folio for a page of a mapping, with one reference (kernel: same name; patch 20).

    Args:
        mem: the memory manager's arrays.
        vma: the mapping.
        resv: the reservations that hold for it.
        user_addr: the raw fault address; aligned here for reservation and node.
        cow: the page replaces one that the owner of the reservations shares with a child: none is used.
        gfp: `__GFP_ZERO` for a folio that is zero, or 0.
        fresh: a gigantic folio that Python allocated with `gfp`, or NO_PAGE.
        cpu: the CPU.

    Returns NO_PAGE when the pool is empty and may not grow (-ENOSPC), NEEDS_GIGANTIC, or
    CHARGE_FAILED (-ENOMEM): the page has gone back then, and so has its reservation. A page
    of the pool is zeroed after it was charged, a fresh one before (patch 20), in vain if the
    charge fails. `HPG_zeroed` is never seen outside.
    """
    v = vma[0]  # type: ignore[index]
    h = v.hstate
    hs = mem.hstate[h]
    addr = user_addr & ~(huge_page_size(mem, h) - 1)
    nodes = vma_zonelist(mem, vma, addr, hs.order)
    index = vma_hugecache_offset(mem, vma, addr)
    reserved = not cow and resv[index] != 0  # type: ignore[index]
    pfn = NO_PAGE
    zeroed_before = mem.vm[0].zeroed_bytes
    if reserved or available_huge_pages(mem, h) > 0:
        pfn = dequeue_hugetlb_folio_nodemask(mem, h, nodes)
    if pfn == NO_PAGE:
        if fresh != NO_PAGE:
            pfn = account_surplus_hugetlb_folio(mem, h, fresh, gfp, cpu)
        else:
            pfn = alloc_surplus_hugetlb_folio(mem, h, gfp, user_addr, nodes, cpu)
        if pfn < 0:
            return pfn
        mem.mem_map[pfn]._refcount = 1
    if reserved:
        mem.mem_map[pfn].private |= HPG_restore_reserve
        hs.resv_huge_pages -= 1
        resv[index] = 0  # type: ignore[index]
    if not charge_hugetlb(mem, vma, pfn):
        mem.vm[0].zeroed_in_vain_bytes += mem.vm[0].zeroed_bytes - zeroed_before
        if reserved:
            resv[index] = 1  # type: ignore[index]
        mem.mem_map[pfn]._refcount = 0
        free_huge_folio(mem, pfn, cpu)
        return CHARGE_FAILED
    if (gfp & __GFP_ZERO) != 0 and not folio_test_hugetlb_zeroed(mem, pfn):
        hugetlb_zero_user(mem, pfn, hs.order, user_addr)
    folio_clear_hugetlb_zeroed(mem, pfn)
    return pfn


@compiled
def alloc_hugetlb_folio_reserve(mem: Memory, h: int, nid: int) -> tuple[int, bool]:
    """Take a page that the caller has reserved from the pool; say whether it is zero (patch 21).

    In v8 the answer is never yes. A page gets `HPG_zeroed` only in
    `alloc_surplus_hugetlb_folio` with `__GFP_ZERO`, which only a fault asks for
    (`gather_surplus_pages` does not); that page goes to the fault and never to the pool, and if
    it is not wanted there (a failed charge, a lost race) it passes `free_huge_folio`, which
    forgets. v6 and v7 reached it, because there a reservation asked for zeros.
    `tests/mm/test_hugetlb_zeroed.py` tries every operation on a pool and finds none.

    Returns NO_PAGE without a reservation or a page.
    """
    if mem.hstate[h].resv_huge_pages == 0:
        return NO_PAGE, False
    pfn = dequeue_hugetlb_folio_nodemask(mem, h, nid)
    if pfn == NO_PAGE:
        return NO_PAGE, False
    mem.hstate[h].resv_huge_pages -= 1
    zeroed = folio_test_hugetlb_zeroed(mem, pfn)
    folio_clear_hugetlb_zeroed(mem, pfn)
    return pfn, zeroed


@compiled
def alloc_hugetlb_folio_nodemask(mem: Memory, h: int, nid: int, cpu: int) -> int:
    """Allocate a huge folio to migrate another one to, with one reference, or NO_PAGE.

    Source: same name, `alloc_migrate_hugetlb_folio`. Asks for no zeros (patch 20: gfp 0), and
    a fresh page is temporary: it must not make the pool larger.
    """
    pfn = NO_PAGE
    if available_huge_pages(mem, h) > 0:
        pfn = dequeue_hugetlb_folio_nodemask(mem, h, nid)
    if pfn == NO_PAGE and not hstate_is_gigantic(mem, h):
        pfn = alloc_buddy_frozen_folio(mem, h, 0, USER_ADDR_NONE, nid, cpu)
        if pfn != NO_PAGE:
            account_new_hugetlb_folio(mem, h, pfn)
            mem.mem_map[pfn].private |= HPG_temporary
            mem.mem_map[pfn]._refcount = 1
    return pfn


@inline
def next_node_to_alloc(mem: Memory, h: int) -> int:
    """Return the node that the next page of the pool comes from: each in turn (kernel: same name)."""
    nid = mem.hstate[h].next_nid_to_alloc
    mem.hstate[h].next_nid_to_alloc = (nid + 1) % mem.vm[0].nr_nodes
    return nid


@compiled
def add_pool_folio(mem: Memory, h: int, pfn: int) -> None:
    """Add a fresh folio to the persistent pool (kernel: `prep_and_add_allocated_folios`)."""
    account_new_hugetlb_folio(mem, h, pfn)
    enqueue_hugetlb_folio(mem, h, pfn)


@far
def alloc_pool_huge_folio(mem: Memory, h: int, cpu: int) -> bool:
    """Add a page to the persistent pool, the nodes in turn; False if there is none (kernel: same name).

    Not asked to be zero: the page may be used, and written, many times before it is freed.
    """
    for _ in range(mem.vm[0].nr_nodes):
        nid = next_node_to_alloc(mem, h)
        pfn = alloc_buddy_frozen_folio(mem, h, __GFP_THISNODE, USER_ADDR_NONE, nid, cpu)
        if pfn != NO_PAGE:
            add_pool_folio(mem, h, pfn)
            return True
    return False
