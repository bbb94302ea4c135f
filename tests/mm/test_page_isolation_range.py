# SPDX-License-Identifier: GPL-2.0-only
"""Whole pageblocks taken out of circulation and back, and what becomes of types and marks."""

from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager, ZoneSpec, page_isolation
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, USER_ADDR_NONE
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    get_pageblock_migratetype,
    get_pageblock_type_before,
)
from hostzero.mm.page_alloc import alloc_from_zonelists
from hostzero.mm.page_flags import PG_reported, PG_zeroed, PGTY_hugetlb, PGTY_offline
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists, is_marked_zero, page_bytes, reads_zero, verify
from tests.mm.processes import FakeHost, is_reported, occupy, release, release_blocks

take_block = page_isolation.__isolate_free_page
put_block_back = page_isolation.__putback_isolated_page

OTHER = page_isolation.PB_ISOLATE_MODE_OTHER
CMA = page_isolation.PB_ISOLATE_MODE_CMA_ALLOC
BOTH = PG_reported | PG_zeroed


@pytest.fixture
def mm(mm: MemoryManager) -> MemoryManager:
    """A guest of 8 MiB whose upper half is one free movable block: the zero page is given back."""
    mm.free_pages(Pfn(int(mm.mem.vm[0].empty_zero_page)))
    mm.drain_all_pages()
    assert take_block(mm.mem, 1024, 10)  # from half a pageblock on that makes it movable
    put_block_back(mm.mem, 1024, 10)
    return mm


def isolate(mm: MemoryManager, start: int, end: int, mode: int = OTHER) -> bool:
    return bool(page_isolation.start_isolate_page_range(mm.mem, start, end, mode))


def undo(mm: MemoryManager, start: int, end: int) -> None:
    page_isolation.undo_isolate_page_range(mm.mem, start, end)


def types(mm: MemoryManager) -> list[int]:
    """Return every pageblock's migrate type as it is now."""
    return [int(get_pageblock_migratetype(mm.mem, 512 * block)) for block in range(len(mm.mem.pageblock))]


def blocks(mm: MemoryManager, order: int, migratetype: int) -> list[int]:
    return free_lists(mm.mem).get((0, order, migratetype), [])


def flags(mm: MemoryManager, pfn: int) -> int:
    return int(mm.mem.mem_map[pfn].flags_f)


def user_folio(mm: MemoryManager) -> Pfn:
    """Allocate a pageblock as a folio that a process could have mapped."""
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP, 9)
    mm.mem.mem_map[pfn].mapping = 1
    return pfn


def told(mm: MemoryManager) -> FakeHost:
    """Register a host, tell it of every large block, and check that each is known to be zero."""
    host = FakeHost(mm, capacity=1).register()
    mm.page_reporting.flush(UINT_MAX)
    assert (1024, 10) in host.blocks()
    assert flags(mm, 1024) & BOTH == BOTH
    return host


# ------------------------------------------------------------------ types and accounting


def test_an_isolated_pageblock_is_not_free_and_gets_its_type_back(boot: Boot) -> None:
    mm = boot(8, cma_pages=512)
    before, zone = types(mm), mm.mem.zone[0]
    free, cma = int(zone.nr_free_pages), int(zone.nr_free_cma)
    assert isolate(mm, 1024, 1536)
    assert isolate(mm, 1536, 2048, CMA)
    assert types(mm) == [*before[:2], MIGRATE_ISOLATE, MIGRATE_ISOLATE]
    assert [int(get_pageblock_type_before(mm.mem, pfn)) for pfn in (600, 1024, 1600)] == [
        before[1],
        MIGRATE_MOVABLE,
        MIGRATE_CMA,
    ]
    assert (int(zone.nr_free_pages), int(zone.nr_free_cma)) == (free - 1024, cma - 512)
    verify(mm)
    undo(mm, 1024, 2048)
    assert types(mm) == before
    assert (int(zone.nr_free_pages), int(zone.nr_free_cma)) == (free, cma)
    verify(mm)


@pytest.mark.parametrize("migratetype", [MIGRATE_UNMOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_HIGHATOMIC])
def test_every_type_survives_an_isolation(mm: MemoryManager, migratetype: int) -> None:
    occupy(mm)
    mm.mem.pageblock[2] = migratetype
    release_blocks(mm, [(1024, 9)])
    mm.mem.mem_map[1024:1536].mapping = 0
    zone = mm.mem.zone[0]
    highatomic = int(zone.nr_free_highatomic)
    assert isolate(mm, 1100, 1101)
    assert int(zone.nr_free_highatomic) == 0
    assert blocks(mm, 9, MIGRATE_ISOLATE) == [1024]
    verify(mm)
    undo(mm, 1100, 1101)
    assert int(get_pageblock_migratetype(mm.mem, 1024)) == migratetype
    assert int(zone.nr_free_highatomic) == highatomic
    assert blocks(mm, 9, migratetype) == [1024]
    verify(mm)


def test_nothing_is_allocated_from_an_isolated_range_and_frees_stay_in_it(mm: MemoryManager) -> None:
    start = user_folio(mm)
    assert isolate(mm, start, start + 512)
    got = occupy(mm)
    assert len(got) == 2047 - 512
    assert not [pfn for pfn in got if start <= pfn < start + 512]
    mm.free_pages(start, 9)
    assert blocks(mm, 9, MIGRATE_ISOLATE) == [start]
    assert mm.vm_stats().free_pages == 0
    verify(mm)
    undo(mm, start, start + 512)
    assert blocks(mm, 9, MIGRATE_MOVABLE) == [start]
    verify(mm)


# ------------------------------------------------------------------ what can be isolated


def test_all_of_a_range_is_isolated_or_nothing(mm: MemoryManager) -> None:
    """The last pageblock is in use: the two before it are given back, their free blocks whole."""
    occupy(mm)
    release_blocks(mm, [(512, 9), (1024, 9)])
    before = types(mm)
    assert not isolate(mm, 512, 2048)
    assert types(mm) == before
    assert sorted(blocks(mm, 9, MIGRATE_MOVABLE)) == [512, 1024]
    assert len(free_lists(mm.mem)) == 1
    verify(mm)


def test_an_isolated_pageblock_cannot_be_isolated_again(mm: MemoryManager) -> None:
    assert isolate(mm, 1536, 2048)
    assert not isolate(mm, 1024, 2048)
    assert types(mm)[2:] == [MIGRATE_MOVABLE, MIGRATE_ISOLATE]
    undo(mm, 1024, 2048)
    assert types(mm)[2:] == [MIGRATE_MOVABLE, MIGRATE_MOVABLE]
    verify(mm)


def test_a_range_is_rounded_to_pageblocks(mm: MemoryManager) -> None:
    assert isolate(mm, 1535, 1537)
    assert types(mm)[2:] == [MIGRATE_ISOLATE, MIGRATE_ISOLATE]
    undo(mm, 1535, 1537)
    assert MIGRATE_ISOLATE not in types(mm)
    verify(mm)


def test_a_range_over_two_zones_is_not_isolated(boot: Boot) -> None:
    mm = boot(8, zones=(ZoneSpec("DMA32", 0, 1536), ZoneSpec("Normal", 1536, 2048)))
    assert not isolate(mm, 1024, 2048)
    assert MIGRATE_ISOLATE not in types(mm)
    verify(mm)


def test_a_cma_pageblock_is_isolated_for_its_own_area_only(boot: Boot) -> None:
    mm = boot(8, cma_pages=512)
    assert not isolate(mm, 1536, 2048, OTHER)
    assert isolate(mm, 1536, 2048, CMA)
    undo(mm, 1536, 2048)
    verify(mm)


@pytest.mark.parametrize(
    ("page", "movable"),
    [
        ("kernel", False),
        ("mapped", True),
        ("balloon", True),
        ("parked", True),
        ("frozen folio", False),
        ("mapped folio", True),
        ("hugetlb folio", False),
    ],
)
def test_what_counts_as_unmovable(mm: MemoryManager, page: str, movable: bool) -> None:
    """Mapped and balloon pages can go, kernel pages cannot; of a folio the head decides."""
    occupy(mm)
    order = 3 if "folio" in page else 0
    release_blocks(mm, [(1024, order)])
    gfp = GFP_KERNEL | (GFP_COMP if order else 0)
    pfn = int(alloc_from_zonelists(mm.mem, gfp, order, USER_ADDR_NONE, 0, 0))
    assert pfn == 1024
    record = mm.mem.mem_map[pfn]
    record._refcount = 0 if page in ("parked", "frozen folio") else 1
    record.mapping = 1 if page in ("mapped", "mapped folio", "hugetlb folio") else 0
    record.page_type = {"balloon": PGTY_offline, "hugetlb folio": PGTY_hugetlb}.get(page, 0)
    for part in range(1 << order):
        found = page_isolation.has_unmovable_pages(mm.mem, pfn + part, pfn + (1 << order), OTHER)
        assert found == (NO_PAGE if movable else pfn + part)


def test_reserved_pages_are_unmovable(mm: MemoryManager) -> None:
    assert page_isolation.has_unmovable_pages(mm.mem, 0, 512, OTHER) == 0


def test_a_range_is_isolated_only_if_all_of_it_is_free(mm: MemoryManager) -> None:
    """test_pages_isolated has the last word: parked and used pages are not free."""
    check = page_isolation.test_pages_isolated
    start = user_folio(mm)
    assert not check(mm.mem, 1024, 2048)
    assert isolate(mm, start, 2048)
    assert not check(mm.mem, start, 2048)
    mm.free_pages(start, 9)
    assert check(mm.mem, start, 2048)
    undo(mm, start, 2048)
    assert not check(mm.mem, start, 2048)
    verify(mm)


def test_a_parked_page_is_not_isolated_before_the_lists_are_drained(mm: MemoryManager) -> None:
    occupy(mm)
    mm.mem.pcp.high = 64
    release(mm, [pfn for pfn in range(1024, 1536) if pfn != 1200])
    mm.free_pages(Pfn(1200))
    assert isolate(mm, 1024, 1536)
    assert not page_isolation.test_pages_isolated(mm.mem, 1024, 1536)
    mm.drain_all_pages()
    assert page_isolation.test_pages_isolated(mm.mem, 1024, 1536)
    verify(mm)


# ------------------------------------------------------------------ marks


@pytest.mark.parametrize(("start", "outside"), [(1024, 1536), (1536, 1024)])
def test_a_block_that_straddles_is_split_with_its_marks(mm: MemoryManager, start: int, outside: int) -> None:
    """Patches 3 and 30: neither part is reported again, and both are known to be zero."""
    host = told(mm)
    calls = len(host.calls)
    assert isolate(mm, start, start + 512)
    assert blocks(mm, 9, MIGRATE_ISOLATE) == [start]
    assert outside in blocks(mm, 9, MIGRATE_MOVABLE)
    assert [flags(mm, pfn) & BOTH for pfn in (1024, 1536)] == [BOTH, BOTH]
    verify(mm)
    assert mm.page_reporting.flush(UINT_MAX) == 0
    assert len(host.calls) == calls


def test_a_marked_block_that_only_changes_lists_keeps_its_marks(mm: MemoryManager) -> None:
    """From a list to the isolated one and back; nothing is reported again."""
    occupy(mm)
    release_blocks(mm, [(1024, 7), (1300, 2)])
    for zone in mm.mem.zone:
        zone.watermark_min = zone.watermark_low = 0
    FakeHost(mm, order=2).register()
    page_bytes(mm, 1024, 128)[:] = 0
    mm.mem.mem_map[1024].flags_f |= BOTH
    mm.mem.mem_map[1300].flags_f |= PG_reported
    # Everything else in the pageblock is somebody's movable page.
    mm.mem.mem_map[1152:1300].mapping = 1
    mm.mem.mem_map[1304:1536].mapping = 1
    assert isolate(mm, 1024, 1536)
    for migratetype in (MIGRATE_ISOLATE, MIGRATE_MOVABLE):
        assert (blocks(mm, 7, migratetype), blocks(mm, 2, migratetype)) == ([1024], [1300])
        assert (flags(mm, 1024) & BOTH, flags(mm, 1300) & BOTH) == (BOTH, PG_reported)
        verify(mm)
        undo(mm, 1024, 1536)


def test_a_block_over_two_isolated_pageblocks_is_split_on_the_way_back(mm: MemoryManager) -> None:
    FakeHost(mm).register()
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP, 10)
    assert pfn == 1024
    mm.mem.mem_map[pfn].mapping = 1
    assert isolate(mm, 1024, 2048)
    mm.free_pages(pfn, 10)
    assert blocks(mm, 10, MIGRATE_ISOLATE) == [1024]
    page_bytes(mm, 1024, 1024)[:] = 0
    mm.mem.mem_map[1024].flags_f |= BOTH
    undo(mm, 1024, 1536)
    assert sorted(blocks(mm, 9, MIGRATE_MOVABLE)) == [512, 1024]
    assert blocks(mm, 9, MIGRATE_ISOLATE) == [1536]
    assert [flags(mm, part) & BOTH for part in (1024, 1536)] == [BOTH, BOTH]
    verify(mm)


def test_unisolating_beside_a_free_pageblock_merges_and_loses_the_hint(mm: MemoryManager) -> None:
    """Lifecycle, unisolate: __isolate_free_page clears it; the larger block is reported anew."""
    host = told(mm)
    calls = len(host.calls)
    assert isolate(mm, 1024, 1536)
    undo(mm, 1024, 1536)
    assert 1024 in blocks(mm, 10, MIGRATE_MOVABLE)
    assert flags(mm, 1024) & BOTH == 0
    verify(mm)
    assert mm.page_reporting.flush(UINT_MAX) == 1
    assert host.calls[calls:] == [[(1024, 10)]]
    assert is_marked_zero(mm.mem, 1024)


# ------------------------------------------------------------------ reporting meanwhile


def test_a_pass_over_an_isolated_range_loses_nothing(mm: MemoryManager) -> None:
    """What was not reported while isolated is reported afterwards, and once."""
    assert isolate(mm, 1024, 2048)
    host = FakeHost(mm, capacity=1).register()
    mm.page_reporting.flush(UINT_MAX)
    assert not [pfn for pfn, _ in host.blocks() if pfn >= 1024]
    verify(mm)
    undo(mm, 1024, 2048)
    mm.page_reporting.flush(UINT_MAX)
    assert [entry for entry in host.blocks() if entry[0] >= 1024] == [(1024, 10)]
    assert len(host.blocks()) == len(set(host.blocks()))
    verify(mm)


def test_a_block_at_the_host_is_not_free_to_be_taken(mm: MemoryManager) -> None:
    """Isolation while a report is under way: the block comes back to the isolated list, marked."""
    host = FakeHost(mm, capacity=1)
    seen: list[bool] = []

    def isolate_meanwhile(entries: list[tuple[int, int]]) -> None:
        if entries == [(1024, 10)] and not seen:
            assert isolate(mm, 1024, 2048)
            seen.append(bool(page_isolation.test_pages_isolated(mm.mem, 1024, 2048)))

    host.during = isolate_meanwhile
    host.register()
    mm.page_reporting.flush(UINT_MAX)
    assert seen == [False]
    assert blocks(mm, 10, MIGRATE_ISOLATE) == [1024]
    assert is_reported(mm, 1024)
    assert is_marked_zero(mm.mem, 1024)
    assert reads_zero(mm, 1024, 10)
    verify(mm)
