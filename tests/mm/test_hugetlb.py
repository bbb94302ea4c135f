# SPDX-License-Identifier: GPL-2.0-only
"""Allocating huge pages: surplus, reservations, who zeroes, and the table of `HPG_zeroed`."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_ZERO, USER_ADDR_NONE
from hostzero.mm.hugetlb import (
    NEEDS_GIGANTIC,
    account_surplus_hugetlb_folio,
    alloc_buddy_frozen_folio,
    alloc_hugetlb_folio_nodemask,
    alloc_hugetlb_folio_reserve,
    alloc_pool_huge_folio,
    alloc_surplus_hugetlb_folio,
    gather_surplus_pages,
    return_unused_surplus_pages,
    vma_hugecache_offset,
)
from hostzero.mm.hugetlb_pool import HPG_freed, HPG_restore_reserve, HPG_temporary, HPG_zeroed
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_free import put_page
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, dirty_free_memory, is_marked_zero, page_bytes, reads_zero, verify
from tests.mm.huge import alloc, alloc_surplus, counters, hpg_zeroed, in_pool, mapping, pool, zeroed_by_host
from tests.mm.processes import HUGE, fragment, free_pages

TWO_NODES = (ZoneSpec("Normal", 0, 2048, 0), ZoneSpec("Normal", 2048, 4096, 1))


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest of 12 MiB with an empty pool, dirty memory, and leave to take two surplus pages."""
    return pool(boot(12), 0, overcommit=2)


def one_reservation(mm: MemoryManager) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Reserve a page for the first of a mapping."""
    assert gather_surplus_pages(mm.mem, 0, 1, 0, 0)
    return np.array([1, 0, 0, 0], dtype=np.int64)


# ------------------------------------------------------------------ surplus pages


def test_surplus_pages_are_limited(mm: MemoryManager) -> None:
    assert alloc_surplus(mm) >= 0
    assert alloc_surplus(mm) >= 0
    assert mm.hugetlb.counters() == counters(2, 0, surp=2)
    assert alloc_surplus(mm) == NO_PAGE
    assert int(mm.mem.vm[0].htlb_buddy_alloc_success) == 2
    assert int(mm.mem.vm[0].htlb_buddy_alloc_fail) == 0
    verify(mm)


def test_without_a_free_block_there_is_no_surplus_page(mm: MemoryManager) -> None:
    fragment(mm)
    assert alloc_surplus(mm) == NO_PAGE
    assert int(mm.mem.vm[0].htlb_buddy_alloc_fail) == 1
    assert mm.hugetlb.counters() == counters(0, 0)
    verify(mm)


def test_a_surplus_page_that_is_one_too_many_by_now_goes_back(mm: MemoryManager) -> None:
    """The lock is dropped while a page is allocated; who comes second rolls back. HPG table: race."""
    free = free_pages(mm)
    pfn = int(alloc_buddy_frozen_folio(mm.mem, 0, GFP_ZERO, USER_ADDR_NONE, 0, 0))
    mm.hugetlb.set_nr_overcommit(0)
    assert account_surplus_hugetlb_folio(mm.mem, 0, pfn, GFP_ZERO, 0) == NO_PAGE
    assert mm.hugetlb.counters() == counters(0, 0)
    assert free_pages(mm) == free
    mm.drain_all_pages()
    assert not is_marked_zero(mm.mem, pfn)
    assert int(mm.mem.mem_map[pfn].private) & ~15 == 0  # an order, no HPG bit
    verify(mm)


def test_a_gigantic_surplus_page_is_left_to_python(boot: Boot) -> None:
    mm = boot(16, gigantic_order=11)
    assert alloc_surplus_hugetlb_folio(mm.mem, 1, 0, USER_ADDR_NONE, 0, 0) == NO_PAGE
    mm.hugetlb.set_nr_overcommit(1, 11)
    assert alloc_surplus_hugetlb_folio(mm.mem, 1, 0, USER_ADDR_NONE, 0, 0) == NEEDS_GIGANTIC


@pytest.mark.parametrize("gfp", [0, GFP_ZERO])
def test_a_surplus_page_is_marked_zero_if_zeros_were_asked_for(mm: MemoryManager, gfp: int) -> None:
    """HPG table: alloc_surplus_hugetlb_folio, and never on memory that nobody zeroed (mutant 42)."""
    before = mm.vm_stats().zeroed_bytes
    pfn = alloc_surplus(mm, gfp)
    assert hpg_zeroed(mm, pfn) == reads_zero(mm, pfn, 9) == (gfp == GFP_ZERO)
    assert mm.vm_stats().zeroed_bytes - before == (HUGE if gfp else 0)


# ------------------------------------------------------------------ reservations


def test_a_reservation_fills_the_pool_with_what_it_lacks(boot: Boot) -> None:
    mm = pool(boot(12), 1, overcommit=2)
    assert gather_surplus_pages(mm.mem, 0, 3, 0, 0)
    assert mm.hugetlb.counters() == counters(3, 3, rsvd=3, surp=2)
    assert not gather_surplus_pages(mm.mem, 0, 1, 0, 0)
    assert mm.hugetlb.counters() == counters(3, 3, rsvd=3, surp=2)
    verify(mm)
    return_unused_surplus_pages(mm.mem, 0, 3, 0)
    assert mm.hugetlb.counters() == counters(1, 1)
    verify(mm)


def test_a_reservation_that_fails_takes_nothing(mm: MemoryManager) -> None:
    free = free_pages(mm)
    assert not gather_surplus_pages(mm.mem, 0, 3, 0, 0)
    assert mm.hugetlb.counters() == counters(0, 0)
    assert free_pages(mm) == free
    verify(mm)


def test_a_reservation_zeroes_nothing(mm: MemoryManager) -> None:
    """v8, HPG table: gather_surplus_pages, persistent pool. Zeroing belongs to the fault (mutant 43)."""
    before = mm.vm_stats().zeroed_bytes
    assert gather_surplus_pages(mm.mem, 0, 1, 0, 0)
    assert alloc_pool_huge_folio(mm.mem, 0, 0)
    assert mm.vm_stats().zeroed_bytes == before
    assert [hpg_zeroed(mm, pfn) for pfn in in_pool(mm)] == [False, False]
    assert [int(mm.mem.mem_map[pfn].private) for pfn in in_pool(mm)] == [HPG_freed, HPG_freed]


def test_a_reservation_forgets_what_the_host_zeroed(mm: MemoryManager) -> None:
    """The price of v8's choice: reported memory that a reservation takes is zeroed again."""
    zeroed_by_host(mm)
    before = mm.vm_stats()
    resv = one_reservation(mm)
    assert mm.vm_stats().dropped_hint_bytes - before.dropped_hint_bytes == HUGE
    pfn = alloc(mm, GFP_ZERO, resv=resv)
    assert mm.vm_stats().zeroed_bytes - before.zeroed_bytes == HUGE
    assert reads_zero(mm, pfn, 9)


def test_reserved_pages_are_for_whom_they_are_reserved(boot: Boot) -> None:
    mm = pool(boot(12), 1)
    resv = one_reservation(mm)
    assert alloc(mm) == NO_PAGE
    pfn = alloc(mm, resv=resv)
    assert pfn >= 0
    assert resv.tolist() == [0, 0, 0, 0]
    assert mm.hugetlb.counters() == counters(1, 0)
    assert int(mm.mem.mem_map[pfn].private) == HPG_restore_reserve
    verify(mm)


def test_a_copy_for_the_owner_of_reservations_uses_none(boot: Boot) -> None:
    """cow: MAP_CHG_ENFORCED; the reservation is for the page that will be faulted later."""
    mm = pool(boot(12), 2)
    resv = one_reservation(mm)
    assert alloc(mm, resv=resv, cow=True) >= 0
    assert mm.hugetlb.counters() == counters(2, 1, rsvd=1)
    assert alloc(mm, resv=resv, cow=True) == NO_PAGE
    assert resv.tolist() == [1, 0, 0, 0]
    verify(mm)


def test_giving_up_reservations_frees_no_persistent_page(boot: Boot) -> None:
    mm = pool(boot(12), 3, overcommit=1)
    assert gather_surplus_pages(mm.mem, 0, 4, 0, 0)
    return_unused_surplus_pages(mm.mem, 0, 2, 0)
    assert mm.hugetlb.counters() == counters(3, 3, rsvd=2)
    return_unused_surplus_pages(mm.mem, 0, 2, 0)
    assert mm.hugetlb.counters() == counters(3, 3)
    verify(mm)


# ------------------------------------------------------------------ alloc_hugetlb_folio (patch 20)


@pytest.mark.parametrize("nr", [0, 1])
def test_a_folio_asked_for_with_zeros_is_zero(boot: Boot, nr: int) -> None:
    """Fresh: by the allocator; from the pool: here."""
    mm = pool(boot(12), nr, overcommit=1 - nr)
    before = mm.vm_stats().zeroed_bytes
    pfn = alloc(mm, GFP_ZERO, offset=HUGE + 5 * PAGE_SIZE)
    assert reads_zero(mm, pfn, 9)
    assert mm.vm_stats().zeroed_bytes - before == HUGE  # once
    assert int(mm.mem.mem_map[pfn]._refcount) == 1


@pytest.mark.parametrize("nr", [0, 1])
def test_a_folio_asked_for_without_zeros_is_left_as_it_is(boot: Boot, nr: int) -> None:
    """Copies, userfaultfd and migration write every byte themselves: gfp 0."""
    mm = pool(boot(12), nr, overcommit=1 - nr)
    before = mm.vm_stats().zeroed_bytes
    pfn = alloc(mm, 0)
    assert mm.vm_stats().zeroed_bytes == before
    assert (page_bytes(mm, pfn, 512) == 0x5A).all()


def test_a_page_of_the_pool_known_to_be_zero_is_not_zeroed(boot: Boot) -> None:
    """No way leads there in v8; the mark is set by hand. Patch 20: one question for both sources."""
    mm = pool(boot(12), 1)
    (pfn,) = in_pool(mm)
    page_bytes(mm, pfn, 512)[:] = 0
    mm.mem.mem_map[pfn].private |= HPG_zeroed
    verify(mm)
    before = mm.vm_stats().zeroed_bytes
    assert alloc(mm, GFP_ZERO) == pfn
    assert mm.vm_stats().zeroed_bytes == before
    assert not hpg_zeroed(mm, pfn)


@pytest.mark.parametrize("gfp", [0, GFP_ZERO])
@pytest.mark.parametrize("nr", [0, 1])
def test_the_mark_never_leaves_the_allocation(boot: Boot, gfp: int, nr: int) -> None:
    """HPG table: cleared always, after deciding; also if nobody asked."""
    mm = pool(boot(12), nr, overcommit=1 - nr)
    for pfn in in_pool(mm):
        page_bytes(mm, pfn, 512)[:] = 0
        mm.mem.mem_map[pfn].private |= HPG_zeroed
    pfn = alloc(mm, gfp)
    assert int(mm.mem.mem_map[pfn].private) == 0
    dirty(mm, pfn, 9)
    put_page(mm.mem, pfn, 0)
    verify(mm)


def test_what_the_host_zeroed_reaches_a_fault_that_allocates(mm: MemoryManager) -> None:
    """Surplus pages come from the buddy lists and keep what is known there, if nobody reserved them."""
    zeroed_by_host(mm)
    before = mm.vm_stats()
    pfn = alloc(mm, GFP_ZERO)
    after = mm.vm_stats()
    assert after.zeroed_bytes == before.zeroed_bytes
    assert after.known_zero_bytes - before.known_zero_bytes == HUGE
    assert reads_zero(mm, pfn, 9)
    verify(mm)


def test_the_reservation_is_looked_up_by_huge_page(boot: Boot) -> None:
    """user_addr is aligned inside: the last byte of page 2 uses the reservation of page 2."""
    mm = pool(boot(12), 1)
    one_reservation(mm)
    resv = np.array([0, 0, 1, 0], dtype=np.int64)
    assert alloc(mm, resv=resv, offset=3 * HUGE) == NO_PAGE
    assert alloc(mm, resv=resv, offset=3 * HUGE - 1) >= 0
    assert resv.tolist() == [0, 0, 0, 0]


def test_a_mapping_of_the_middle_of_a_file_uses_its_reservations(boot: Boot) -> None:
    mm = pool(boot(12), 1)
    one_reservation(mm)
    vma = mapping(2)
    vma[0].vm_pgoff = 512
    assert vma_hugecache_offset(mm.mem, vma, int(vma[0].vm_start) + HUGE + 1) == 2
    resv = np.array([0, 0, 1, 0], dtype=np.int64)
    assert alloc(mm, vma=vma, resv=resv, offset=HUGE + 1) >= 0
    assert resv.tolist() == [0, 0, 0, 0]


def test_a_folio_comes_from_the_mappings_node(boot: Boot) -> None:
    mm = pool(boot(16, zones=TWO_NODES), 2, overcommit=1)
    assert alloc(mm, vma=mapping(node=1)) >= 2048
    assert alloc(mm, vma=mapping(node=1)) < 2048  # from the pool rather than fresh
    assert alloc(mm, vma=mapping(node=1)) >= 2048
    assert mm.hugetlb.counters() == counters(3, 0, surp=1)
    assert mm.mem.hstate[0].surplus_huge_pages_node[:2].tolist() == [0, 1]
    verify(mm)


def test_the_pool_is_empty(mm: MemoryManager) -> None:
    assert [alloc(mm) >= 0 for _ in range(3)] == [True, True, False]


def test_with_init_on_alloc_a_page_of_the_pool_is_zeroed_all_the_same(boot: Boot) -> None:
    """It was zero when it entered the pool; what happened to it since nobody has noted."""
    mm = boot(12, init_on_alloc=True)
    dirty_free_memory(mm)
    mm.hugetlb.set_nr_hugepages(1)
    assert not hpg_zeroed(mm, in_pool(mm)[0])
    before = mm.vm_stats().zeroed_bytes
    put_page(mm.mem, alloc(mm, GFP_ZERO), 0)
    dirty(mm, in_pool(mm)[0], 9)
    assert reads_zero(mm, alloc(mm, GFP_ZERO), 9)
    assert mm.vm_stats().zeroed_bytes - before == 2 * HUGE


# ------------------------------------------------------------------ the other doors of the pool


def test_a_reserved_page_can_be_taken_without_a_mapping(boot: Boot) -> None:
    mm = pool(boot(12), 2)
    assert alloc_hugetlb_folio_reserve(mm.mem, 0, 0) == (NO_PAGE, False)  # nothing is reserved
    one_reservation(mm)
    (first, _) = in_pool(mm)
    assert alloc_hugetlb_folio_reserve(mm.mem, 0, 0) == (first, False)
    assert mm.hugetlb.counters() == counters(2, 1)
    assert int(mm.mem.mem_map[first].private) == 0
    verify(mm)


def test_taking_a_reserved_page_says_whether_it_is_zero(boot: Boot) -> None:
    """Patch 21 and its row of the HPG table: tested and cleared. The mark is set by hand."""
    mm = pool(boot(12), 1)
    one_reservation(mm)
    (pfn,) = in_pool(mm)
    mm.mem.mem_map[pfn].private |= HPG_zeroed
    assert alloc_hugetlb_folio_reserve(mm.mem, 0, 0) == (pfn, True)
    assert not hpg_zeroed(mm, pfn)


def test_a_target_of_migration_is_not_zeroed_and_its_mark_left_alone(boot: Boot) -> None:
    """HPG table: cleared when it is freed. What is migrated there overwrites it."""
    mm = pool(boot(12), 1)
    (pfn,) = in_pool(mm)
    page_bytes(mm, pfn, 512)[:] = 0
    mm.mem.mem_map[pfn].private |= HPG_zeroed
    assert alloc_hugetlb_folio_nodemask(mm.mem, 0, 0, 0) == pfn
    assert hpg_zeroed(mm, pfn)
    dirty(mm, pfn, 9)
    put_page(mm.mem, pfn, 0)
    assert not hpg_zeroed(mm, pfn)
    verify(mm)


def test_a_fresh_target_of_migration_does_not_make_the_pool_larger(boot: Boot) -> None:
    mm = pool(boot(12), 1)
    one_reservation(mm)
    before = mm.vm_stats().zeroed_bytes
    pfn = alloc_hugetlb_folio_nodemask(mm.mem, 0, 0, 0)
    assert mm.vm_stats().zeroed_bytes == before
    assert int(mm.mem.mem_map[pfn].private) == HPG_temporary
    assert mm.hugetlb.counters() == counters(2, 1, rsvd=1)
    verify(mm)
    put_page(mm.mem, pfn, 0)
    assert mm.hugetlb.counters() == counters(1, 1, rsvd=1)
    fragment(mm)
    assert alloc_hugetlb_folio_nodemask(mm.mem, 0, 0, 0) == NO_PAGE


def test_pool_pages_are_movable_memory(mm: MemoryManager) -> None:
    alloc_pool_huge_folio(mm.mem, 0, 0)
    (pfn,) = in_pool(mm)
    assert int(mm.mem.pageblock[pfn // 512]) == GFP_HIGHUSER_MOVABLE >> 3 & 3


def test_persistent_pages_are_never_reported(boot: Boot) -> None:
    """They are not free to the buddy allocator; surplus pages are, once they are freed."""
    mm = pool(boot(24), 2, overcommit=1)
    used = [alloc(mm) for _ in range(3)]
    for pfn in used[:1] + used[2:]:
        put_page(mm.mem, pfn, 0)
    put_page(mm.mem, used[1], 0)
    assert mm.hugetlb.counters() == counters(2, 2)
    kept = in_pool(mm)
    mm.drain_all_pages()
    host = zeroed_by_host(mm)
    reported = {page for pfn, order in host.blocks() for page in range(pfn, pfn + (1 << order))}
    assert not reported.intersection(kept)
    (gone,) = set(used).difference(kept)
    assert gone in reported
    verify(mm)
