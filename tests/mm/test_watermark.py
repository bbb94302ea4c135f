# SPDX-License-Identifier: GPL-2.0-only
"""Whether a zone may serve a request: marks, reserves, and blocks of a type that the request may use."""

from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager
from hostzero.mm.buddy import __rmqueue_smallest
from hostzero.mm.fallback import (
    ALLOC_CMA,
    ALLOC_HIGHATOMIC,
    ALLOC_MIN_RESERVE,
    ALLOC_NON_BLOCK,
    ALLOC_OOM,
    ALLOC_WMARK_HIGH,
    ALLOC_WMARK_LOW,
    ALLOC_WMARK_MIN,
)
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_UNMOVABLE,
    PAGEBLOCK_NR_PAGES,
)
from hostzero.mm.watermark import __zone_watermark_ok, watermark
from tests.mm.guest import free_lists


def test_each_watermark_is_raised_by_the_boost(mm: MemoryManager) -> None:
    mm.mem.zone[0].watermark_boost = 7
    zone = mm.mem.zone[0]
    for flags, mark in (
        (ALLOC_WMARK_MIN, zone.watermark_min),
        (ALLOC_WMARK_LOW, zone.watermark_low),
        (ALLOC_WMARK_HIGH, zone.watermark_high),
    ):
        assert watermark(mm.mem, 0, flags) == int(mark) + 7


@pytest.mark.parametrize(
    ("flags", "lowest"),
    [
        (0, 101),
        (ALLOC_MIN_RESERVE, 51),
        (ALLOC_MIN_RESERVE | ALLOC_NON_BLOCK, 39),
        (ALLOC_NON_BLOCK, 101),
        (ALLOC_OOM, 51),
    ],
)
def test_reserves_open_step_by_step(mm: MemoryManager, flags: int, lowest: int) -> None:
    """A mark of 100 pages: half for __GFP_HIGH, a quarter less without blocking, half for an OOM victim."""
    for free in (lowest - 1, lowest):
        mm.mem.zone[0].nr_free_pages = free
        assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, flags) == (free == lowest)


def test_lowmem_reserve_adds_to_the_mark(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_pages = 110
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 9, 0)
    assert not __zone_watermark_ok(mm.mem, 0, 0, 100, 10, 0)


def test_the_requests_own_pages_do_not_count(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_pages = 108
    assert __zone_watermark_ok(mm.mem, 0, 3, 100, 0, 0)
    mm.mem.zone[0].nr_free_pages = 107
    assert not __zone_watermark_ok(mm.mem, 0, 3, 100, 0, 0)


def test_cma_and_highatomic_pages_do_not_count_for_who_may_not_use_them(mm: MemoryManager) -> None:
    zone = mm.mem.zone[0]
    zone.nr_free_pages, zone.nr_free_cma = 150, 50
    assert not __zone_watermark_ok(mm.mem, 0, 0, 100, 0, 0)
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, ALLOC_CMA)
    zone.nr_free_cma, zone.nr_free_highatomic = 0, 50
    assert not __zone_watermark_ok(mm.mem, 0, 0, 100, 0, 0)
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, ALLOC_HIGHATOMIC)
    assert __zone_watermark_ok(mm.mem, 0, 0, 100, 0, ALLOC_NON_BLOCK)


@pytest.mark.parametrize(
    ("migratetype", "flags", "usable"),
    [
        (MIGRATE_UNMOVABLE, 0, True),
        (MIGRATE_CMA, 0, False),
        (MIGRATE_CMA, ALLOC_CMA, True),
        (MIGRATE_HIGHATOMIC, 0, False),
        (MIGRATE_HIGHATOMIC, ALLOC_HIGHATOMIC, True),
        (MIGRATE_HIGHATOMIC, ALLOC_OOM, True),
        (MIGRATE_ISOLATE, ALLOC_HIGHATOMIC | ALLOC_CMA, False),
    ],
)
def test_a_large_block_must_exist_where_the_request_may_look(
    mm: MemoryManager, migratetype: int, flags: int, usable: bool
) -> None:
    mem = mm.mem
    pfn = mm.alloc_pages(GFP_KERNEL, 9)
    for (_, order, other), blocks in free_lists(mem).items():
        for _ in blocks:
            if order >= 4:
                __rmqueue_smallest(mem, 0, order, other)
    mm.drain_all_pages()
    mem.pageblock[pfn // PAGEBLOCK_NR_PAGES] = migratetype
    assert not __zone_watermark_ok(mem, 0, 9, -5000, 0, flags)
    mm.free_pages(pfn, 9)
    mm.drain_all_pages()
    assert __zone_watermark_ok(mem, 0, 9, -5000, 0, flags) == usable
    assert __zone_watermark_ok(mem, 0, 0, -5000, 0, flags)
