# SPDX-License-Identifier: GPL-2.0-only
"""Boot: zones, watermarks, per-CPU limits, and which pages are free."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.list import LIST_POISON
from hostzero.mm.mm_init import (
    build_memory,
    build_zonelists,
    memmap_init,
    setup_per_zone_wmarks,
    zone_batchsize,
)
from hostzero.mm.mmzone import MIGRATE_CMA, MIGRATE_MOVABLE, PAGEBLOCK_NR_PAGES, Memory
from hostzero.mm.page_flags import PG_reserved, PGTY_none
from hostzero.mm.verify import verify_memory
from hostzero.ram import open_ram
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists

GIB_PAGES = 1 << 18


def build(pages: int, *zones: ZoneSpec, nr_cpus: int = 1, cma: int = 0, reserved: int = 1) -> Memory:
    ram = np.zeros(pages * 512, dtype=np.uint64)
    return build_memory(ram, zones or (ZoneSpec("DMA32", 0, pages),), nr_cpus, cma, reserved)


def test_all_but_the_reserved_pages_are_free_in_the_largest_aligned_blocks() -> None:
    mem = build(4096, reserved=5)
    assert free_lists(mem) == {
        (0, 0, MIGRATE_MOVABLE): [5],
        (0, 1, MIGRATE_MOVABLE): [6],
        **{(0, order, MIGRATE_MOVABLE): [1 << order] for order in range(3, 10)},
        (0, 10, MIGRATE_MOVABLE): [1024, 2048, 3072],
    }
    assert (int(mem.zone[0].managed_pages), int(mem.zone[0].nr_free_pages)) == (4091, 4091)
    assert [bool(flags & PG_reserved) for flags in mem.mem_map.flags_f[:6]] == [True] * 5 + [False]
    verify_memory(mem)


def test_zones_are_freed_apart_and_their_blocks_do_not_merge() -> None:
    mem = build(3072, ZoneSpec("DMA32", 0, 1536), ZoneSpec("Normal", 1536, 3072))
    lists = free_lists(mem)
    assert lists[0, 9, MIGRATE_MOVABLE] == [512, 1024]
    assert lists[1, 9, MIGRATE_MOVABLE] == [1536]
    assert lists[1, 10, MIGRATE_MOVABLE] == [2048]
    assert mem.zone.managed_pages.tolist() == [1535, 1536]
    verify_memory(mem)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_cma_pageblocks_are_at_the_end_and_apart(blocks: int) -> None:
    """A block of order 10 with one CMA pageblock must not go to the movable list as a whole."""
    mem = build(2048, cma=blocks * PAGEBLOCK_NR_PAGES)
    assert mem.pageblock.tolist() == [MIGRATE_MOVABLE] * (4 - blocks) + [MIGRATE_CMA] * blocks
    assert int(mem.zone[0].nr_free_cma) == blocks * PAGEBLOCK_NR_PAGES
    verify_memory(mem)


def test_a_fresh_page_record_belongs_to_nobody(mm: MemoryManager) -> None:
    mm.mem.mem_map[700:702] = mm.mem.mem_map[0]
    mm.mem.mem_map[700:702].lru_next = 5
    memmap_init(mm.mem, 3, 700, 701)
    page = mm.mem.mem_map[700]
    assert {name: int(page[name]) for name in page.dtype.names} == {
        "flags_f": 0,
        "_refcount": 0,
        "_mapcount": -1,
        "private": 0,
        "lru_next": LIST_POISON,
        "lru_prev": LIST_POISON,
        "mapping": 0,
        "index": 0,
        "page_type": PGTY_none,
        "zone": 3,
        "order": 0,
        "memcg_data": 0,
    }
    assert int(mm.mem.mem_map[701].lru_next) == 5


@pytest.mark.parametrize(
    ("managed", "batch"), [(1, 1), (8191, 1), (8192, 2), (2 * 8192, 4), (GIB_PAGES, 64), (64 * GIB_PAGES, 64)]
)
def test_a_batch_is_a_power_of_two_up_to_a_limit(managed: int, batch: int) -> None:
    """256 KiB, half more, rounded down: `vm.percpu_pagelist` of a large zone moves 64 pages here."""
    assert zone_batchsize(managed) == batch


def test_watermarks_of_a_gigabyte_are_those_of_linux() -> None:
    """min_free_kbytes = sqrt(16 × 1 GiB in KiB) = 4096; low and high each a quarter of min above."""
    mem = build(2048)
    mem.zone[0].managed_pages = GIB_PAGES
    setup_per_zone_wmarks(mem)
    zone = mem.zone[0]
    assert (int(zone.watermark_min), int(zone.watermark_low), int(zone.watermark_high)) == (1024, 1286, 1548)
    assert int(zone.lowmem_reserve) == 0


@pytest.mark.parametrize(("managed", "pages_min"), [(200, 32), (2048, 90), (1 << 40, 65536)])
def test_min_free_kbytes_has_limits(managed: int, pages_min: int) -> None:
    mem = build(2048)
    mem.zone[0].managed_pages = managed
    setup_per_zone_wmarks(mem)
    assert int(mem.zone[0].watermark_min) == pages_min


def test_zones_share_the_reserve_by_size_and_lower_ones_keep_some() -> None:
    mem = build(2048, ZoneSpec("DMA32", 0, 1024), ZoneSpec("Normal", 1024, 2048))
    mem.zone.managed_pages[:] = [GIB_PAGES, 3 * GIB_PAGES]
    setup_per_zone_wmarks(mem)
    assert mem.zone.watermark_min.tolist() == [512, 1536]
    assert mem.zone.lowmem_reserve.tolist() == [3 * GIB_PAGES // 256, 0]


def test_a_zone_of_another_node_needs_no_reserve_here() -> None:
    mem = build(2048, ZoneSpec("DMA32", 0, 1024, 0), ZoneSpec("Normal", 1024, 2048, 1))
    mem.zone.managed_pages[:] = GIB_PAGES
    setup_per_zone_wmarks(mem)
    assert mem.zone.lowmem_reserve.tolist() == [0, 0]


def test_cpus_share_the_low_watermark() -> None:
    mem = build(2048, nr_cpus=4)
    mem.zone[0].managed_pages = GIB_PAGES
    setup_per_zone_wmarks(mem)
    assert mem.pcp["high"].tolist() == [1286 // 4] * 4
    assert mem.pcp["batch"].tolist() == [64] * 4


def test_a_node_tries_its_own_zones_first_and_the_highest_of_them() -> None:
    zones = (
        ZoneSpec("DMA32", 0, 512, 0),
        ZoneSpec("Normal", 512, 1024, 0),
        ZoneSpec("Normal", 1024, 2048, 1),
    )
    assert build_zonelists(zones).tolist() == [[1, 0, 2], [2, 1, 0]]


def test_nodes_fall_back_round_the_ring() -> None:
    zones = tuple(ZoneSpec(f"Node {n}", n * 512, n * 512 + 512, n) for n in range(3))
    assert build_zonelists(zones).tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_the_guest_sees_the_bytes_of_its_ram(boot: Boot) -> None:
    mm = boot(4)
    assert int(mm.mem.vm[0].ram_base) == mm.ram.base
    mm.mem.ram[512] = 0x0102
    assert mm.ram_bytes[4096:4098].tolist() == [2, 1]


def test_records_are_resident_from_the_start() -> None:
    """A record that is written at boot cannot fault while a benchmark runs."""
    with open_ram(4 << 20) as ram:
        mem = build_memory(ram.array(np.dtype(np.uint64)), (ZoneSpec("DMA32", 0, 1024),), 1, 0, 1)
        assert all(array.flags.writeable for array in (mem.mem_map, mem.zone, mem.pcp, mem.vm))
        assert ram.resident() == 0
