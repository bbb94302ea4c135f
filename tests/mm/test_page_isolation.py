# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager, page_isolation
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmzone import MIGRATE_CMA, MIGRATE_ISOLATE, MIGRATE_MOVABLE, MIGRATE_UNMOVABLE
from hostzero.mm.page_flags import PG_reported, PG_zeroed, PGTY_none
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists, is_marked_zero, page_bytes, verify
from tests.mm.processes import FakeHost, is_reported, occupy, release_blocks

isolate = page_isolation.__isolate_free_page
putback = page_isolation.__putback_isolated_page

BLOCK = 1024 + 64  # an order-4 block with nothing free beside it


@pytest.fixture
def one_block(mm: MemoryManager) -> MemoryManager:
    """A guest with one free block of order 4, and another far from it."""
    occupy(mm)
    release_blocks(mm, [(BLOCK, 4), (600, 3)])
    return mm


def test_an_isolated_block_is_on_no_list_and_not_counted(one_block: MemoryManager) -> None:
    mm = one_block
    before = int(mm.mem.zone[0].nr_free_pages)
    assert isolate(mm.mem, BLOCK, 4)
    assert int(mm.mem.zone[0].nr_free_pages) == before - 16
    assert (0, 4, MIGRATE_MOVABLE) not in free_lists(mm.mem)
    assert mm.mem.mem_map[BLOCK].page_type == PGTY_none
    assert mm.mem.mem_map[BLOCK].private == 0
    verify(mm)


def test_isolation_ends_both_marks(one_block: MemoryManager) -> None:
    """Lifecycle: __isolate_free_page clears PG_zeroed, the hint is lost."""
    mm = one_block
    FakeHost(mm).register()
    page_bytes(mm, BLOCK, 16)[:] = 0
    mm.mem.mem_map[BLOCK].flags_f |= PG_zeroed | PG_reported
    verify(mm)
    assert isolate(mm.mem, BLOCK, 4)
    assert not is_marked_zero(mm.mem, BLOCK)
    assert not is_reported(mm, BLOCK)
    putback(mm.mem, BLOCK, 4)
    assert not is_marked_zero(mm.mem, BLOCK)
    verify(mm)


def test_isolation_stops_at_the_minimum_watermark(one_block: MemoryManager) -> None:
    """free > min + (1 << order), or the block stays (kernel: __isolate_free_page)."""
    mm = one_block
    mm.mem.zone[0].watermark_min = int(mm.mem.zone[0].nr_free_pages) - 16
    lists = free_lists(mm.mem)
    assert not isolate(mm.mem, BLOCK, 4)
    assert free_lists(mm.mem) == lists
    mm.mem.zone[0].watermark_min -= 1
    assert isolate(mm.mem, BLOCK, 4)


def test_putback_goes_to_the_tail_and_requests_nothing(one_block: MemoryManager) -> None:
    mm = one_block
    release_blocks(mm, [(1024 + 256, 4)])
    FakeHost(mm, order=0).register()
    mm.mem.vm[0].page_reporting_state = 0
    requests = int(mm.mem.vm[0].page_reporting_requests)
    head, tail = free_lists(mm.mem)[0, 4, MIGRATE_MOVABLE]
    assert isolate(mm.mem, head, 4)
    putback(mm.mem, head, 4)
    assert free_lists(mm.mem)[0, 4, MIGRATE_MOVABLE] == [tail, head]
    assert int(mm.mem.vm[0].page_reporting_requests) == requests
    assert int(mm.mem.vm[0].page_reporting_state) == 0
    verify(mm)


def test_putback_merges_with_what_became_free_meanwhile(one_block: MemoryManager) -> None:
    mm = one_block
    assert isolate(mm.mem, BLOCK, 4)
    release_blocks(mm, [(BLOCK + 16, 4)])
    putback(mm.mem, BLOCK, 4)
    assert free_lists(mm.mem)[0, 5, MIGRATE_MOVABLE] == [BLOCK]
    verify(mm)


def test_putback_beside_a_pageblock_that_was_isolated_meanwhile(mm: MemoryManager) -> None:
    """Found by the search: the whole block went to the isolated list, the other pageblock with it."""
    occupy(mm)
    release_blocks(mm, [(1024, 10), (600, 3)])
    assert isolate(mm.mem, 1024, 10)
    assert page_isolation.start_isolate_page_range(mm.mem, 1024, 1536, page_isolation.PB_ISOLATE_MODE_OTHER)
    putback(mm.mem, 1024, 10)
    assert free_lists(mm.mem)[0, 9, MIGRATE_ISOLATE] == [1024]
    assert free_lists(mm.mem)[0, 9, MIGRATE_MOVABLE] == [1536]
    verify(mm)
    page_isolation.undo_isolate_page_range(mm.mem, 1024, 1536)
    assert free_lists(mm.mem)[0, 10, MIGRATE_MOVABLE] == [1024]
    verify(mm)


def test_an_isolated_pageblock_needs_no_watermark_and_is_not_counted(one_block: MemoryManager) -> None:
    mm = one_block
    page_isolation_type(mm, BLOCK, 4, MIGRATE_ISOLATE)
    mm.mem.zone[0].watermark_min = mm.nr_pages
    before = int(mm.mem.zone[0].nr_free_pages)
    assert isolate(mm.mem, BLOCK, 4)
    assert int(mm.mem.zone[0].nr_free_pages) == before
    putback(mm.mem, BLOCK, 4)
    assert int(mm.mem.zone[0].nr_free_pages) == before
    verify(mm)


def page_isolation_type(mm: MemoryManager, pfn: int, order: int, migratetype: int) -> None:
    # Retype a pageblock whose one free block is `pfn`, as isolation and CMA do: off, retype, on.
    assert isolate(mm.mem, pfn, order)
    mm.mem.pageblock[pfn >> 9] = migratetype
    putback(mm.mem, pfn, order)


@pytest.mark.parametrize("half", [0, 256])
def test_half_a_pageblock_turns_all_of_it_movable(mm: MemoryManager, half: int) -> None:
    """From order 8 on the pageblock becomes movable, the free pages of its other half with it."""
    occupy(mm, gfp=GFP_KERNEL)
    other = 256 - half
    mm.mem.pageblock[3] = MIGRATE_UNMOVABLE
    release_blocks(mm, [(1536 + half, 8), (1536 + other, 3), (1536 + other + 32, 4)])
    assert free_lists(mm.mem)[0, 8, MIGRATE_UNMOVABLE] == [1536 + half]
    assert isolate(mm.mem, 1536 + half, 8)
    assert int(mm.mem.pageblock[3]) == MIGRATE_MOVABLE
    assert free_lists(mm.mem)[0, 3, MIGRATE_MOVABLE] == [1536 + other]
    assert free_lists(mm.mem)[0, 4, MIGRATE_MOVABLE] == [1536 + other + 32]
    verify(mm)
    putback(mm.mem, 1536 + half, 8)
    verify(mm)


def test_a_small_block_leaves_its_pageblock_alone(mm: MemoryManager) -> None:
    occupy(mm, gfp=GFP_KERNEL)
    mm.mem.pageblock[3] = MIGRATE_UNMOVABLE
    release_blocks(mm, [(1536, 7), (1700, 2)])
    assert isolate(mm.mem, 1536, 7)
    assert int(mm.mem.pageblock[3]) == MIGRATE_UNMOVABLE
    verify(mm)


def test_a_cma_pageblock_stays_cma(boot: Boot) -> None:
    """Only types that may merge change hands."""
    mm = boot(8, cma_pages=512)
    before = int(mm.mem.zone[0].nr_free_cma)
    assert before == 512
    assert isolate(mm.mem, 1536, 9)
    assert int(mm.mem.pageblock[3]) == MIGRATE_CMA
    assert int(mm.mem.zone[0].nr_free_cma) == 0
    putback(mm.mem, 1536, 9)
    assert int(mm.mem.zone[0].nr_free_cma) == before
    verify(mm)
