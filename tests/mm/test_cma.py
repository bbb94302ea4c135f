# SPDX-License-Identifier: GPL-2.0-only
"""The CMA area: its folios, its bitmap, and whose `__GFP_ZERO` decides (patch 9)."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import UsageError
from hostzero.mm import MemoryManager
from hostzero.mm.cma import cma_alloc_frozen_compound, cma_release_frozen
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.mm.mmzone import MIGRATE_CMA, NO_PAGE, get_pageblock_migratetype
from hostzero.mm.page_flags import PG_private, compound_order
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, dirty_free_memory, page_bytes, reads_zero, verify
from tests.mm.processes import FakeHost, free_pages

BASE = 1024


@pytest.fixture
def cma(boot: Boot) -> MemoryManager:
    """A guest of 8 MiB whose upper half is CMA, all of it dirty."""
    mm = boot(8, cma_pages=1024)
    dirty_free_memory(mm)
    return mm


def test_the_area_is_the_end_of_memory(cma: MemoryManager) -> None:
    assert (cma.cma.base_pfn, cma.cma.count, cma.cma.available_count) == (BASE, 1024, 1024)
    assert not cma.cma.bitmap.any()


@pytest.mark.parametrize("order", [0, 4, 9, 10])
@pytest.mark.parametrize("gfp", [GFP_KERNEL, GFP_HIGHUSER_MOVABLE, GFP_KERNEL | GFP_ZERO])
def test_a_folio_is_zeroed_exactly_if_the_caller_said_so(cma: MemoryManager, order: int, gfp: int) -> None:
    """Patch 9 as of v8: the caller's __GFP_ZERO is passed on, and no other flag."""
    free = free_pages(cma)
    pfn = cma_alloc_frozen_compound(cma, order, gfp)
    assert pfn == BASE
    assert int(compound_order(cma.mem, pfn)) == order
    assert int(cma.mem.mem_map[pfn]._refcount) == 0
    if gfp & GFP_ZERO:
        assert reads_zero(cma, pfn, order)
    else:
        assert np.all(page_bytes(cma, pfn, 1 << order) == 0x5A)
    verify(cma)
    assert cma_release_frozen(cma, pfn, order)
    assert free_pages(cma) == free
    verify(cma)


def test_what_the_host_zeroed_is_zeroed_again_and_carries_no_mark(cma: MemoryManager) -> None:
    FakeHost(cma, capacity=1).register()
    cma.page_reporting.flush(UINT_MAX)
    before = cma.vm_stats()
    pfn = cma_alloc_frozen_compound(cma, 9, GFP_ZERO)
    assert cma.vm_stats().zeroed_bytes == before.zeroed_bytes + (512 << 12)
    assert cma.vm_stats().known_zero_bytes == before.known_zero_bytes
    assert int(cma.mem.mem_map[pfn].flags_f) & PG_private == 0
    verify(cma)


def test_the_pageblocks_stay_cma(cma: MemoryManager) -> None:
    pfn = cma_alloc_frozen_compound(cma, 9, 0)
    types = [int(get_pageblock_migratetype(cma.mem, block)) for block in (BASE, BASE + 512)]
    assert types == [MIGRATE_CMA, MIGRATE_CMA]
    cma_release_frozen(cma, pfn, 9)
    cma.drain_all_pages()
    assert int(cma.mem.zone[0].nr_free_cma) == 1024
    verify(cma)


def test_the_bitmap_says_what_the_owner_has(cma: MemoryManager) -> None:
    pfns = [cma_alloc_frozen_compound(cma, order, 0) for order in (3, 0, 9)]
    assert pfns == [BASE, BASE + 8, BASE + 512]
    assert np.flatnonzero(cma.cma.bitmap).tolist() == [*range(9), *range(512, 1024)]
    assert cma.cma.available_count == 1024 - 521
    assert cma_alloc_frozen_compound(cma, 9, 0) == NO_PAGE
    assert cma_alloc_frozen_compound(cma, 4, 0) == BASE + 16
    assert cma_release_frozen(cma, BASE, 3)
    assert cma_alloc_frozen_compound(cma, 3, 0) == BASE
    assert (cma.cma.nr_pages_succeeded, cma.cma.nr_pages_failed, cma.cma.nr_pages_released) == (545, 512, 8)
    verify(cma)


def test_a_run_that_cannot_be_cleared_is_left_and_its_bits_too(cma: MemoryManager) -> None:
    """Somebody holds a page of the first pageblock that cannot be moved: the second one serves."""
    cma.mem.zone.watermark_min = cma.mem.zone.watermark_low = 0
    taken = []
    while (pfn := cma.alloc_pages(GFP_HIGHUSER_MOVABLE)) < BASE or pfn >= BASE + 512:
        taken.append(pfn)
    assert cma_alloc_frozen_compound(cma, 10, 0) == NO_PAGE
    assert not cma.cma.bitmap.any()
    for page in taken:
        cma.free_pages(page)
    cma.drain_all_pages()
    assert cma_alloc_frozen_compound(cma, 9, 0) == BASE + 512
    assert np.flatnonzero(cma.cma.bitmap).tolist() == [*range(512, 1024)]
    verify(cma)


def test_only_the_areas_own_folios_can_be_released(cma: MemoryManager) -> None:
    assert not cma_release_frozen(cma, 512, 9)
    assert not cma_release_frozen(cma, 1536, 10)
    assert not cma_release_frozen(cma, BASE, -1)
    pfn = cma_alloc_frozen_compound(cma, 4, 0)
    with pytest.raises(UsageError, match="did not give out"):
        cma_release_frozen(cma, pfn, 5)
    assert cma_release_frozen(cma, pfn, 4)
    with pytest.raises(UsageError, match="did not give out"):
        cma_release_frozen(cma, pfn, 4)
    verify(cma)


def test_released_folios_are_not_known_to_be_zero(cma: MemoryManager) -> None:
    pfn = cma_alloc_frozen_compound(cma, 9, GFP_ZERO)
    dirty(cma, pfn, 9)
    cma_release_frozen(cma, pfn, 9)
    cma.drain_all_pages()
    verify(cma)
    assert cma_alloc_frozen_compound(cma, 9, GFP_ZERO) == pfn
    assert reads_zero(cma, pfn, 9)


def test_a_guest_without_an_area(mm: MemoryManager) -> None:
    assert mm.cma.count == 0
    assert cma_alloc_frozen_compound(mm, 0, 0) == NO_PAGE
    assert not cma_release_frozen(mm, mm.nr_pages - 1, 0)


def test_orders_beyond_the_area_and_below_zero(cma: MemoryManager) -> None:
    assert cma_alloc_frozen_compound(cma, 11, 0) == NO_PAGE
    with pytest.raises(UsageError, match="negative"):
        cma_alloc_frozen_compound(cma, -1, 0)


def test_alignment_is_by_page_number(boot: Boot) -> None:
    """The area starts at page 2560, which no folio of order 10 can."""
    mm = boot(16, cma_pages=1536)
    assert mm.cma.base_pfn == 2560
    assert cma_alloc_frozen_compound(mm, 10, 0) == 3072
    assert cma_alloc_frozen_compound(mm, 9, 0) == 2560
    verify(mm)
