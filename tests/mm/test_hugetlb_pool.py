# SPDX-License-Identifier: GPL-2.0-only
"""Pools of huge pages: lists, counters, and where a page goes whose last user has gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, ZoneSpec, verify
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_ZERO
from hostzero.mm.hugetlb_pool import (
    HPG_freed,
    HPG_restore_reserve,
    HPG_temporary,
    HPG_zeroed,
    adjust_pool_surplus,
    dequeue_hugetlb_folio_nodemask,
    enqueue_hugetlb_folio,
    folio_hstate,
    remove_hugetlb_folio,
    remove_pool_hugetlb_folio,
    return_huge_folio,
)
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PG_hwpoison, PGTY_hugetlb
from hostzero.mm.page_free import free_frozen_pages_zeroed, put_page, put_page_zeroed
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, free_lists, is_marked_zero, page_bytes
from tests.mm.guest import verify as check
from tests.mm.huge import alloc, alloc_surplus, counters, hpg_zeroed, in_pool, pool
from tests.mm.processes import free_pages

TWO_NODES = (ZoneSpec("Normal", 0, 2048, 0), ZoneSpec("Normal", 2048, 4096, 1))


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with a pool of three pages."""
    return pool(boot(16), 3)


def test_a_free_huge_page_is_a_typed_compound_page_without_references(mm: MemoryManager) -> None:
    for pfn in in_pool(mm):
        page = mm.mem.mem_map[pfn]
        assert (int(page.page_type), int(page.order), int(page._refcount)) == (PGTY_hugetlb, 9, 0)
        assert int(page.private) == HPG_freed
        assert folio_hstate(mm.mem, pfn) == 0
    assert mm.hugetlb.counters() == counters(3, 3)
    check(mm)


def test_the_page_freed_last_is_taken_first(mm: MemoryManager) -> None:
    first, second, third = in_pool(mm)
    assert dequeue_hugetlb_folio_nodemask(mm.mem, 0, 0) == first
    assert dequeue_hugetlb_folio_nodemask(mm.mem, 0, 0) == second
    assert int(mm.mem.mem_map[first]._refcount) == 1
    assert mm.hugetlb.counters() == counters(3, 1)
    assert put_page(mm.mem, first, 0)
    assert in_pool(mm) == [first, third]
    check(mm)


def test_a_page_of_the_persistent_pool_stays_in_it(mm: MemoryManager) -> None:
    free = free_pages(mm)
    pfn = alloc(mm)
    assert put_page(mm.mem, pfn, 0)
    assert pfn in in_pool(mm)
    assert mm.hugetlb.counters() == counters(3, 3)
    assert free_pages(mm) == free
    check(mm)


def test_any_page_leaves_while_its_node_has_surplus_pages(mm: MemoryManager) -> None:
    mm.hugetlb.set_nr_overcommit(1)
    taken = [alloc(mm) for _ in range(4)]
    assert mm.hugetlb.counters() == counters(4, 0, surp=1)
    free = free_pages(mm)
    put_page(mm.mem, taken[0], 0)  # a persistent one, but that makes no difference
    assert free_pages(mm) == free + 512
    assert mm.hugetlb.counters() == counters(3, 0)
    put_page(mm.mem, taken[3], 0)
    assert mm.hugetlb.counters() == counters(3, 1)
    check(mm)


def test_a_temporary_page_never_enters_the_pool(mm: MemoryManager) -> None:
    pfn = alloc(mm)
    mm.mem.mem_map[pfn].private |= HPG_temporary
    put_page(mm.mem, pfn, 0)
    assert mm.hugetlb.counters() == counters(2, 2)
    assert int(mm.mem.mem_map[pfn].page_type) != PGTY_hugetlb
    check(mm)


def test_freeing_gives_a_reservation_back(mm: MemoryManager) -> None:
    pfn = alloc(mm)
    mm.mem.mem_map[pfn].private |= HPG_restore_reserve
    put_page(mm.mem, pfn, 0)
    assert mm.hugetlb.counters() == counters(3, 3, rsvd=1)
    assert int(mm.mem.mem_map[pfn].private) == HPG_freed
    check(mm)


def test_a_page_that_is_reserved_again_stays_though_there_are_surplus_pages(mm: MemoryManager) -> None:
    mm.hugetlb.set_nr_overcommit(1)
    taken = [alloc(mm) for _ in range(4)]
    mm.mem.mem_map[taken[0]].private |= HPG_restore_reserve
    put_page(mm.mem, taken[0], 0)
    assert mm.hugetlb.counters() == counters(4, 1, rsvd=1, surp=1)
    check(mm)


def test_freeing_forgets_that_a_page_was_zero(mm: MemoryManager) -> None:
    """HPG table: free_huge_folio. The page may have been mapped and written."""
    pfn = alloc(mm, GFP_ZERO)
    mm.mem.mem_map[pfn].private |= HPG_zeroed
    dirty(mm, pfn, 9)
    put_page(mm.mem, pfn, 0)
    assert not hpg_zeroed(mm, pfn)
    check(mm)


def test_a_surplus_page_leaves_without_any_bit(mm: MemoryManager) -> None:
    mm.hugetlb.set_nr_overcommit(1)
    pfn = alloc_surplus(mm, GFP_ZERO)
    assert hpg_zeroed(mm, pfn)
    mm.mem.mem_map[pfn]._refcount = 1
    put_page(mm.mem, pfn, 0)
    mm.drain_all_pages()
    assert not is_marked_zero(mm.mem, pfn)
    assert mm.hugetlb.counters() == counters(3, 3)
    check(mm)


def test_only_the_last_reference_frees(mm: MemoryManager) -> None:
    pfn = alloc(mm)
    mm.mem.mem_map[pfn]._refcount += 1
    assert not put_page(mm.mem, pfn, 0)
    assert mm.hugetlb.counters() == counters(3, 2)
    assert put_page(mm.mem, pfn, 0)
    assert mm.hugetlb.counters() == counters(3, 3)


def test_a_zero_hint_at_the_last_put_means_nothing_to_a_huge_page(mm: MemoryManager) -> None:
    """Patch 35: hugetlb folios take the normal way, to their pool or, as surplus, to the buddy."""
    pfn = alloc(mm)
    page_bytes(mm, pfn, 512)[:] = 0
    assert put_page_zeroed(mm.mem, pfn, 0)
    assert pfn in in_pool(mm)
    assert not hpg_zeroed(mm, pfn)
    mm.hugetlb.set_nr_overcommit(1)
    taken = [alloc(mm) for _ in range(4)]
    page_bytes(mm, taken[3], 512)[:] = 0
    assert put_page_zeroed(mm.mem, taken[3], 0)
    mm.drain_all_pages()
    assert not is_marked_zero(mm.mem, taken[3])
    check(mm)


def test_broken_pages_are_passed_over(mm: MemoryManager) -> None:
    first, second, third = in_pool(mm)
    mm.mem.mem_map[first].flags_f |= PG_hwpoison
    mm.mem.mem_map[second].flags_f |= PG_hwpoison
    assert dequeue_hugetlb_folio_nodemask(mm.mem, 0, 0) == third
    assert dequeue_hugetlb_folio_nodemask(mm.mem, 0, 0) == NO_PAGE


def test_pages_come_from_the_nearest_node(boot: Boot) -> None:
    mm = pool(boot(16, zones=TWO_NODES), 4)
    assert [len(in_pool(mm, node=node)) for node in (0, 1)] == [2, 2]
    nodes = [dequeue_hugetlb_folio_nodemask(mm.mem, 0, 1) // 2048 for _ in range(4)]
    assert nodes == [1, 1, 0, 0]
    assert dequeue_hugetlb_folio_nodemask(mm.mem, 0, 1) == NO_PAGE
    check(mm)


def test_a_pool_shrinks_evenly(boot: Boot) -> None:
    mm = pool(boot(16, zones=TWO_NODES), 4)
    for left in ((1, 2), (1, 1), (0, 1), (0, 0)):
        pfn = remove_pool_hugetlb_folio(mm.mem, 0, False)
        free_frozen_pages_zeroed(mm.mem, _cleared(mm, pfn), 9, 0)
        assert tuple(len(in_pool(mm, node=node)) for node in (0, 1)) == left
        check(mm)
    assert remove_pool_hugetlb_folio(mm.mem, 0, False) == NO_PAGE


def _cleared(mm: MemoryManager, pfn: int) -> int:
    page_bytes(mm, pfn, 512)[:] = 0
    return pfn


def test_only_a_node_with_surplus_pages_gives_one_up(boot: Boot) -> None:
    mm = pool(boot(16, zones=TWO_NODES), 4)
    assert remove_pool_hugetlb_folio(mm.mem, 0, True) == NO_PAGE
    assert adjust_pool_surplus(mm.mem, 0, 1)
    assert mm.hugetlb.counters() == counters(4, 4, surp=1)
    pfn = remove_pool_hugetlb_folio(mm.mem, 0, True)
    assert pfn < 2048
    assert remove_pool_hugetlb_folio(mm.mem, 0, True) == NO_PAGE
    assert mm.hugetlb.counters() == counters(3, 3)


def test_no_more_pages_turn_into_surplus_than_there_are(mm: MemoryManager) -> None:
    for _ in range(3):
        assert adjust_pool_surplus(mm.mem, 0, 1)
    assert not adjust_pool_surplus(mm.mem, 0, 1)
    for _ in range(3):
        assert adjust_pool_surplus(mm.mem, 0, -1)
    assert not adjust_pool_surplus(mm.mem, 0, -1)
    check(mm)


def test_a_page_in_use_can_be_removed(mm: MemoryManager) -> None:
    """What hwpoison handling does: the folio belongs to nobody's pool any more."""
    pfn = alloc(mm)
    remove_hugetlb_folio(mm.mem, 0, pfn, False)
    assert mm.hugetlb.counters() == counters(2, 2)
    assert mm.free_pages(Pfn(pfn), 9)
    check(mm)


def test_a_mapped_page_must_not_be_freed(mm: MemoryManager) -> None:
    pfn = alloc(mm)
    mm.mem.mem_map[pfn]._mapcount = 0
    with pytest.raises(VmBug, match="in use"):
        put_page(mm.mem, pfn, 0)


def test_a_page_with_references_must_not_be_enqueued(mm: MemoryManager) -> None:
    pfn = alloc(mm)
    with pytest.raises(VmBug, match="references"):
        enqueue_hugetlb_folio(mm.mem, 0, pfn)
    with pytest.raises(VmBug, match="in use"):
        return_huge_folio(mm.mem, pfn)


def test_a_folio_of_no_pools_size_is_a_defect(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 3)
    with pytest.raises(VmBug, match="no pool"):
        folio_hstate(mm.mem, pfn)


# ------------------------------------------------------------------ what verify finds


def claim_zero(mm: MemoryManager, pfn: int) -> None:
    mm.mem.mem_map[pfn].private |= HPG_zeroed


def set_field(name: str, value: int) -> Callable[[MemoryManager, int], None]:
    def damage(mm: MemoryManager, pfn: int) -> None:
        mm.mem.mem_map[pfn][name] = value

    return damage


def count(name: str, by: int) -> Callable[[MemoryManager, int], None]:
    def damage(mm: MemoryManager, pfn: int) -> None:
        mm.mem.hstate[0][name] += by

    return damage


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (claim_zero, verify.FALSE_ZERO),
        (set_field("_refcount", 1), verify.STILL_OWNED),
        (set_field("_mapcount", 0), verify.STILL_OWNED),
        (set_field("mapping", 1), verify.STILL_OWNED),
        (set_field("page_type", 0), verify.BAD_HUGE_PAGE),
        (set_field("order", 8), verify.BAD_HUGE_PAGE),
        (set_field("private", 0), verify.BAD_HUGE_PAGE),
        (set_field("lru_prev", 7), verify.BAD_LINKS),
        (count("free_huge_pages", 1), verify.BAD_HUGE_COUNT),
        (count("free_huge_pages_node", 1), verify.BAD_HUGE_COUNT),
        (count("nr_huge_pages", 1), verify.BAD_HUGE_COUNT),
        (count("surplus_huge_pages", 1), verify.BAD_HUGE_COUNT),
        (count("resv_huge_pages", 4), verify.BAD_HUGE_COUNT),
        (count("resv_huge_pages", -1), verify.BAD_HUGE_COUNT),
    ],
)
def test_verify_sees_damage_to_a_pool(
    mm: MemoryManager, damage: Callable[[MemoryManager, int], None], problem: int
) -> None:
    check(mm)
    damage(mm, in_pool(mm)[1])
    with pytest.raises(VmBug, match=verify.PROBLEMS[problem]):
        check(mm)


def test_verify_sees_a_huge_page_that_no_pool_counts(mm: MemoryManager) -> None:
    pfn = alloc(mm)
    mm.mem.hstate[0].nr_huge_pages -= 1
    mm.mem.hstate[0].nr_huge_pages_node[0] -= 1
    assert pfn not in {block for blocks in free_lists(mm.mem).values() for block in blocks}
    with pytest.raises(VmBug, match=verify.PROBLEMS[verify.BAD_HUGE_COUNT]):
        check(mm)
