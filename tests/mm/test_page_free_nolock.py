# SPDX-License-Identifier: GPL-2.0-only
"""Frees that may not wait for a lock: deferred, and freed later by strangers, as what they are."""

from __future__ import annotations

import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.buddy import FPI_TRYLOCK, FPI_ZEROED
from hostzero.mm.gfp import GFP_COMP, GFP_KERNEL, GFP_ZERO
from hostzero.mm.page_flags import PG_dirty, PG_private
from hostzero.mm.page_free import __free_frozen_pages
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, is_marked_zero, page_bytes, pcp_lists, reads_zero, verify
from tests.mm.test_page_free import CONFIG_NAMES, CONFIGS, nr_free, zero_and_free


def deferred(mm: MemoryManager, zone: int = 0) -> int:
    """Pages that wait on `zone->trylock_free_pages`."""
    return int(mm.mem.zone[zone].nr_trylock_free)


def test_without_a_lock_in_the_way_a_nolock_free_is_a_free(mm: MemoryManager) -> None:
    free = nr_free(mm)
    pfn = mm.alloc_pages(GFP_KERNEL, 5)
    assert mm.free_pages_nolock(pfn, 5)
    assert (nr_free(mm), deferred(mm)) == (free, 0)
    pfn = mm.alloc_pages(GFP_KERNEL)
    assert mm.free_pages_nolock(pfn)
    assert pcp_lists(mm.mem)[0, 0][0] == pfn
    verify(mm)


def test_a_nolock_free_inside_the_zone_lock_waits_for_the_next_free(mm: MemoryManager) -> None:
    kept, first, second = (mm.alloc_pages(GFP_KERNEL, 5) for _ in range(3))
    free, unowned = nr_free(mm), mm.vm_stats().free_pages
    with mm.zone_lock():
        assert mm.free_pages_nolock(first, 5)
        assert mm.free_pages_nolock(second, 5)
        verify(mm)
    assert (nr_free(mm), deferred(mm)) == (free, 64)
    assert mm.vm_stats().free_pages == unowned + 64
    verify(mm)
    mm.free_pages(kept, 5)
    assert (nr_free(mm), deferred(mm)) == (free + 96, 0)
    verify(mm)


def test_a_nolock_free_leaves_older_ones_to_somebody_with_more_time(mm: MemoryManager) -> None:
    first, second = mm.alloc_pages(GFP_KERNEL, 5), mm.alloc_pages(GFP_KERNEL, 5)
    with mm.zone_lock():
        mm.free_pages_nolock(first, 5)
    mm.free_pages_nolock(second, 5)
    assert deferred(mm) == 32
    verify(mm)


def test_a_deferred_stranger_does_not_become_zero_with_the_callers_page(mm: MemoryManager) -> None:
    """`free_one_page` drains strangers' pages: the caller's FPI_ZEROED is about the caller's own."""
    stranger = mm.alloc_pages(GFP_KERNEL, 5)
    zero = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5)
    kept = [mm.alloc_pages(GFP_KERNEL, 5) for _ in range(2)]
    dirty(mm, stranger, 5)
    with mm.zone_lock():
        mm.free_pages_nolock(stranger, 5)
    zero_and_free(mm, zero, 5)
    assert deferred(mm) == 0
    assert not is_marked_zero(mm.mem, stranger)
    verify(mm)
    got = [mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5) for _ in range(3)]
    assert {stranger, zero} <= set(got)
    assert all(reads_zero(mm, pfn, 5) for pfn in got)
    assert len(kept) == 2


def test_a_deferred_zero_page_keeps_what_it_says_of_itself(mm: MemoryManager) -> None:
    zero = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5)
    kept, ordinary = mm.alloc_pages(GFP_KERNEL, 5), mm.alloc_pages(GFP_KERNEL, 8)
    mm.mem.mem_map[zero]._refcount = 0
    with mm.zone_lock():
        __free_frozen_pages(mm.mem, zero, 5, FPI_TRYLOCK | FPI_ZEROED, 0)
        verify(mm)
    assert deferred(mm) == 32
    mm.free_pages(ordinary, 8)
    assert is_marked_zero(mm.mem, zero)
    verify(mm)
    mm.free_pages(kept, 5)


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_a_deferred_page_went_through_prepare(boot: Boot, config: dict[str, bool]) -> None:
    """A stale PG_private is gone before the page waits; poison and zeros are written before."""
    mm = boot(4, **config)
    check = any(config.values())
    pfn, other = mm.alloc_pages(GFP_KERNEL, 5), mm.alloc_pages(GFP_KERNEL, 5)
    dirty(mm, pfn, 5)
    if not check:
        mm.mem.vm[0].debug_vm = 0
        mm.mem.mem_map[pfn].flags_f |= PG_private | PG_dirty
    with mm.zone_lock():
        mm.free_pages_nolock(pfn, 5)
    assert int(mm.mem.mem_map[pfn].flags_f) == 0
    if config["page_poisoning"]:
        assert (page_bytes(mm, pfn, 32) == 0xAA).all()
    elif config["init_on_free"]:
        assert reads_zero(mm, pfn, 5)
    mm.free_pages(other, 5)
    verify(mm)
    assert mm.vm_stats().poison_errors == 0


def test_a_list_that_is_locked_sends_small_pages_the_long_way(mm: MemoryManager) -> None:
    """A hook in the middle of a refill finds both locks taken; inside the zone lock alone it may park."""
    pfn = mm.alloc_pages(GFP_KERNEL)
    with mm.zone_lock(cpu=0):
        mm.free_pages_nolock(pfn)
    assert deferred(mm) == 1
    other = mm.alloc_pages(GFP_KERNEL)
    with mm.zone_lock():
        mm.free_pages_nolock(other)
    assert deferred(mm) == 1
    assert pcp_lists(mm.mem)[0, 0][0] == other
    verify(mm)


def test_a_nolock_free_does_not_drain_a_list_that_is_too_long(mm: MemoryManager) -> None:
    pfns = mm.alloc_pages_bulk(GFP_KERNEL, 300).tolist()
    mm.drain_all_pages()
    with mm.zone_lock():
        for pfn in pfns:
            mm.free_pages_nolock(pfn)
    parked = int(mm.mem.pcp["count"][0])
    assert parked == 300 > int(mm.mem.pcp["high"][0])
    mm.free_pages(mm.alloc_pages(GFP_KERNEL))
    assert int(mm.mem.pcp["count"][0]) < int(mm.mem.pcp["high"][0])
    verify(mm)


def test_each_zone_has_its_own_deferred_pages(boot: Boot) -> None:
    mm = boot(4, zones=(ZoneSpec("DMA32", 0, 512), ZoneSpec("Normal", 512, 1024)))
    pfn = mm.alloc_pages(GFP_KERNEL, 5)
    assert pfn >= 512
    with mm.zone_lock(1):
        mm.free_pages_nolock(pfn, 5)
    low = mm.mem.zonelists[0].tolist()
    assert (deferred(mm, 0), deferred(mm, 1), low) == (0, 32, [1, 0])
    verify(mm)


@pytest.mark.parametrize("order", [5, 8])
def test_an_ordinary_free_inside_the_zone_lock_is_a_deadlock(boot: Boot, order: int) -> None:
    mm = boot(8)
    pfn = mm.alloc_pages(GFP_KERNEL, order)
    with mm.zone_lock(), pytest.raises(VmBug, match="a deadlock"):
        mm.free_pages(pfn, order)


def test_allocating_inside_the_zone_lock_is_a_deadlock(mm: MemoryManager) -> None:
    mm.drain_all_pages()
    with mm.zone_lock():
        for order in (0, 5):
            with pytest.raises(VmBug, match="a deadlock"):
                mm.alloc_pages(GFP_KERNEL, order)
        with pytest.raises(VmBug, match="a deadlock"), mm.zone_lock():
            pass
    verify(mm)
    mm.alloc_pages(GFP_KERNEL, 5)


def test_a_nolock_free_drops_one_reference_of_many(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 5)
    mm.mem.mem_map[pfn]._refcount = 2
    with mm.zone_lock():
        assert not mm.free_pages_nolock(pfn, 5)
        assert deferred(mm) == 0
        assert mm.free_pages_nolock(pfn, 5)
    assert deferred(mm) == 32
    verify(mm)
