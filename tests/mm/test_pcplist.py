# SPDX-License-Identifier: GPL-2.0-only
"""Per-CPU lists: which blocks they hold, in which order, and what a parked page says of itself."""

from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    NR_PCP_LISTS,
    PAGEBLOCK_NR_PAGES,
)
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison
from hostzero.mm.pcplist import nr_pcp_alloc, order_to_pindex, pcp_allowed_order, pindex_to_order
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists, is_marked_zero, pcp_lists, verify

BATCH = 8
HIGH = 24


@pytest.fixture
def cpus(boot: Boot) -> MemoryManager:
    """A guest with two CPUs and lists of the length that a guest of a few GiB has, scaled down."""
    mm = boot(8, nr_cpus=2)
    mm.drain_all_pages()
    mm.mem.pcp["batch"], mm.mem.pcp["high"] = BATCH, HIGH
    return mm


def count(mm: MemoryManager, cpu: int = 0) -> int:
    return int(mm.mem.pcp[cpu]["count"])


def free_as_zero(mm: MemoryManager, pfn: int, order: int = 0, cpu: int = 0) -> None:
    mm.mem.mem_map[pfn]._refcount = 0
    mm.free_frozen_pages_zeroed(Pfn(pfn), order, cpu=cpu)


def where(mm: MemoryManager) -> list[tuple[int, int]]:
    """Return the order and page of every free block, whatever its type."""
    return sorted((order, pfn) for (_, order, _), blocks in free_lists(mm.mem).items() for pfn in blocks)


def test_small_orders_and_huge_pages_have_lists() -> None:
    assert [order for order in range(11) if pcp_allowed_order(order)] == [0, 1, 2, 3, 9]


def test_each_order_and_type_has_its_list_but_huge_pages_share_two() -> None:
    small = [order_to_pindex(migratetype, order) for order in range(4) for migratetype in range(3)]
    assert small == list(range(12))
    huge = [
        order_to_pindex(migratetype, 9)
        for migratetype in (MIGRATE_UNMOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE)
    ]
    assert huge == [12, 12, 13]
    assert [pindex_to_order(pindex) for pindex in range(NR_PCP_LISTS)] == [0] * 3 + [1] * 3 + [2] * 3 + [
        3
    ] * 3 + [9] * 2


@pytest.mark.parametrize(
    ("batch", "order", "blocks"),
    [(1, 0, 1), (1, 3, 1), (63, 0, 63), (63, 1, 31), (63, 3, 7), (4, 3, 2), (63, 9, 2)],
)
def test_a_refill_takes_fewer_blocks_the_larger_they_are(batch: int, order: int, blocks: int) -> None:
    assert nr_pcp_alloc(batch, order) == blocks


def test_a_refill_is_handed_out_in_the_order_of_the_buddy_lists(cpus: MemoryManager) -> None:
    first = cpus.alloc_pages(GFP_HIGHUSER_MOVABLE)
    parked = pcp_lists(cpus.mem)
    assert list(parked) == [(0, 1)]
    assert len(parked[0, 1]) == BATCH - 1 == count(cpus)
    assert [cpus.alloc_pages(GFP_HIGHUSER_MOVABLE) for _ in range(BATCH - 1)] == parked[0, 1]
    assert parked[0, 1][0] == first + 1
    assert count(cpus) == 0
    verify(cpus)


def test_the_page_freed_last_is_allocated_first_on_its_cpu_only(cpus: MemoryManager) -> None:
    pages = [cpus.alloc_pages(GFP_KERNEL) for _ in range(3)]
    for pfn in pages:
        cpus.free_pages(pfn, cpu=1)
    assert pcp_lists(cpus.mem)[1, 0] == pages[::-1]
    assert count(cpus, 1) == 3
    assert cpus.alloc_pages(GFP_KERNEL, cpu=0) not in pages
    assert cpus.alloc_pages(GFP_KERNEL, cpu=1) == pages[-1]


def test_parked_pages_are_not_counted_as_free_in_the_zone(cpus: MemoryManager) -> None:
    before = int(cpus.mem.zone[0].nr_free_pages)
    cpus.alloc_pages(GFP_KERNEL, 2)
    assert int(cpus.mem.zone[0].nr_free_pages) == before - (2 << 2)
    assert count(cpus) == 1 << 2


def test_a_list_that_is_too_long_gives_the_oldest_pages_back(cpus: MemoryManager) -> None:
    pages = [cpus.alloc_pages(GFP_KERNEL) for _ in range(HIGH)]
    cpus.drain_all_pages()
    for pfn in pages[:-1]:
        cpus.free_pages(pfn)
    assert count(cpus) == HIGH - 1
    cpus.free_pages(pages[-1])
    assert count(cpus) == HIGH - BATCH
    assert pcp_lists(cpus.mem) == {(0, 0): pages[: BATCH - 1 : -1]}
    verify(cpus)


def test_the_list_that_grew_is_shortened_first(cpus: MemoryManager) -> None:
    kernel = [cpus.alloc_pages(GFP_KERNEL) for _ in range(12)]
    user = [cpus.alloc_pages(GFP_HIGHUSER_MOVABLE) for _ in range(12)]
    cpus.drain_all_pages()
    for pfn in kernel + user:
        cpus.free_pages(pfn)
    parked = pcp_lists(cpus.mem)
    assert (len(parked[0, 0]), len(parked[0, 1])) == (12, 12 - BATCH)


def test_shortening_goes_on_with_the_next_lists_if_one_is_not_enough(cpus: MemoryManager) -> None:
    kernel = [cpus.alloc_pages(GFP_KERNEL) for _ in range(HIGH - 1)]
    huge = cpus.alloc_pages(GFP_HIGHUSER_MOVABLE, 9)
    cpus.drain_all_pages()
    for pfn in kernel:
        cpus.free_pages(pfn)
    cpus.free_pages(huge, 9)
    # 512 + 23 - 24 + 8 pages have to go: the huge page, and 7 of the next list.
    assert pcp_lists(cpus.mem) == {(0, 0): kernel[:6:-1]}
    verify(cpus)


def test_draining_empties_every_cpu(cpus: MemoryManager) -> None:
    before = where(cpus)
    for cpu in range(2):
        for order in (0, 3, 9):
            cpus.free_pages(cpus.alloc_pages(GFP_HIGHUSER_MOVABLE, order, cpu=cpu), order, cpu=cpu)
    assert count(cpus, 0) > 0
    assert count(cpus, 1) > 0
    cpus.drain_all_pages()
    assert (count(cpus, 0), count(cpus, 1)) == (0, 0)
    assert pcp_lists(cpus.mem) == {}
    assert where(cpus) == before
    verify(cpus)


def test_a_parked_page_keeps_its_mark(cpus: MemoryManager) -> None:
    zero, written = cpus.alloc_pages(GFP_KERNEL, 3), cpus.alloc_pages(GFP_KERNEL, 3)
    free_as_zero(cpus, zero, 3)
    cpus.free_pages(written, 3)
    assert pcp_lists(cpus.mem)[0, 9][:2] == [written, zero]
    assert is_marked_zero(cpus.mem, zero)
    assert not is_marked_zero(cpus.mem, written)


@pytest.mark.parametrize("both", [True, False])
def test_a_drained_page_brings_its_mark_along(cpus: MemoryManager, both: bool) -> None:
    """Nobody who drains knows whose page it was; the halves merge to zero if both say so."""
    block = cpus.alloc_pages(GFP_KERNEL, 2)  # its upper half stays with its owner
    free_as_zero(cpus, block)
    if both:
        free_as_zero(cpus, block + 1)
    cpus.drain_all_pages()
    assert free_lists(cpus.mem)[0, 1 if both else 0, MIGRATE_UNMOVABLE][0] == block
    assert is_marked_zero(cpus.mem, block)
    assert not is_marked_zero(cpus.mem, block + 1)
    verify(cpus)


def test_the_mark_is_cleared_when_the_page_is_taken(cpus: MemoryManager) -> None:
    """Patch 22: read, then cleared, before the page is checked; it must not leak as PG_private."""
    pfn = cpus.alloc_pages(GFP_KERNEL)
    free_as_zero(cpus, pfn)
    assert cpus.alloc_pages(GFP_KERNEL) == pfn
    assert int(cpus.mem.mem_map[pfn].flags_f) == 0
    assert cpus.vm_stats().dropped_hint_bytes == 4096
    assert cpus.vm_stats().bad_pages == 0


@pytest.mark.parametrize("damage", [PG_dirty, PG_hwpoison])
def test_a_bad_page_takes_its_hint_along(cpus: MemoryManager, damage: int) -> None:
    """The next candidate must not inherit it."""
    good, bad = cpus.alloc_pages(GFP_KERNEL), cpus.alloc_pages(GFP_KERNEL)
    cpus.free_pages(good)
    free_as_zero(cpus, bad)
    cpus.mem.mem_map[bad].flags_f |= damage
    assert cpus.alloc_pages(GFP_KERNEL | 1 << 8) == good
    stats = cpus.vm_stats()
    assert (stats.bad_pages, stats.known_zero_bytes, stats.dropped_hint_bytes) == (1, 0, 0)
    assert not is_marked_zero(cpus.mem, bad)
    assert count(cpus) == BATCH - 2


def test_cma_pages_share_the_movable_list_and_are_sorted_out_when_drained(boot: Boot) -> None:
    mm = boot(8, cma_pages=2 * PAGEBLOCK_NR_PAGES)
    mm.drain_all_pages()
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    assert int(mm.mem.pageblock[pfn // PAGEBLOCK_NR_PAGES]) == MIGRATE_CMA
    mm.free_pages(pfn)
    assert pcp_lists(mm.mem) == {(0, MIGRATE_MOVABLE): [pfn]}
    mm.drain_all_pages()
    assert int(mm.mem.zone[0].nr_free_cma) == 2 * PAGEBLOCK_NR_PAGES
    verify(mm)
