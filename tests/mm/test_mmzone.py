# SPDX-License-Identifier: GPL-2.0-only
"""Records, list heads, pageblocks and the default zones."""

from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.hugetlb_pool import deferred_list
from hostzero.mm.mmzone import (
    MAX_NUMNODES,
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_NAMES,
    MIGRATE_RECLAIMABLE,
    MIGRATE_TYPES,
    MIGRATE_UNMOVABLE,
    NR_HSTATES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGE_DTYPE,
    PAGEBLOCK_NR_PAGES,
    compact_freepages,
    compact_migratepages,
    compact_movable_ops,
    default_zones,
    free_list,
    get_pageblock_migratetype,
    hugepage_freelist,
    migratetype_is_mergeable,
    nr_list_heads,
    page_zone,
    pcp_list,
    pcp_of,
    set_pageblock_migratetype,
    trylock_free_pages,
)
from tests.mm.conftest import Boot

ZONES = (ZoneSpec("DMA32", 0, 1024), ZoneSpec("Normal", 1024, 2048))


def test_a_page_record_is_one_cache_line() -> None:
    assert PAGE_DTYPE.itemsize == 64


def test_every_list_has_its_own_head_behind_the_last_page(boot: Boot) -> None:
    mem = boot(zones=ZONES, nr_cpus=3).mem
    heads = [
        free_list(mem, zone, order, migratetype)
        for zone in range(2)
        for order in range(NR_PAGE_ORDERS)
        for migratetype in range(MIGRATE_TYPES)
    ]
    heads += [
        pcp_list(mem, zone, cpu, pindex)
        for cpu in range(3)
        for zone in range(2)
        for pindex in range(NR_PCP_LISTS)
    ]
    heads += [hugepage_freelist(mem, h, node) for h in range(NR_HSTATES) for node in range(MAX_NUMNODES)]
    heads.append(deferred_list(mem))
    heads += [trylock_free_pages(mem, zone) for zone in range(2)]
    heads += [compact_freepages(mem, order) for order in range(NR_PAGE_ORDERS)]
    heads += [compact_migratepages(mem), compact_movable_ops(mem)]
    heads.append(int(mem.vm[0].balloon_head))
    assert sorted(heads) == list(range(2048, 2048 + nr_list_heads(2, 3)))
    assert len(mem.mem_map) == 2048 + nr_list_heads(2, 3)


def test_each_cpu_has_a_record_for_each_zone(boot: Boot) -> None:
    mem = boot(zones=ZONES, nr_cpus=3).mem
    indices = [pcp_of(mem, zone, cpu) for cpu in range(3) for zone in range(2)]
    assert sorted(indices) == list(range(len(mem.pcp)))


def test_a_page_knows_its_zone(boot: Boot) -> None:
    mem = boot(zones=ZONES).mem
    assert [page_zone(mem, pfn) for pfn in (0, 1023, 1024, 2047)] == [0, 0, 1, 1]


def test_a_pageblock_has_one_migrate_type(mm: MemoryManager) -> None:
    before = mm.mem.pageblock.copy()
    set_pageblock_migratetype(mm.mem, PAGEBLOCK_NR_PAGES + 7, MIGRATE_CMA)
    types = [get_pageblock_migratetype(mm.mem, pfn) for pfn in (511, 512, 1023, 1024)]
    assert types == [before[0], MIGRATE_CMA, MIGRATE_CMA, before[2]]


@pytest.mark.parametrize(
    ("migratetype", "mergeable"),
    [
        (MIGRATE_UNMOVABLE, True),
        (MIGRATE_MOVABLE, True),
        (MIGRATE_RECLAIMABLE, True),
        (MIGRATE_HIGHATOMIC, False),
        (MIGRATE_CMA, False),
        (MIGRATE_ISOLATE, False),
    ],
)
def test_reserves_do_not_merge_with_other_pageblocks(migratetype: int, mergeable: bool) -> None:
    assert migratetype_is_mergeable(migratetype) == mergeable
    assert len(MIGRATE_NAMES) == MIGRATE_TYPES


def test_memory_below_4_gib_is_one_zone() -> None:
    assert default_zones(1 << 20) == (ZoneSpec("DMA32", 0, 1 << 20),)


def test_memory_above_4_gib_is_a_second_zone() -> None:
    boundary = 1 << 20
    assert default_zones(boundary + 512) == (
        ZoneSpec("DMA32", 0, boundary),
        ZoneSpec("Normal", boundary, boundary + 512),
    )
