# SPDX-License-Identifier: GPL-2.0-only
"""Contiguous allocation out of memory that is in use: what is movable moves, the rest decides."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.mm import MemoryManager
from hostzero.mm.cma import cma_alloc_frozen_compound, cma_release_frozen
from hostzero.mm.contig import alloc_contig_frozen_pages, alloc_contig_frozen_range, free_contig_frozen_range
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import MIGRATE_ISOLATE, NO_PAGE, get_pageblock_migratetype
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, page_bytes, reads_zero, verify
from tests.mm.processes import HUGE, FakeHost, is_huge, mapped, pages, pfn_at

FOLIO = GFP_KERNEL | GFP_COMP


def no_isolated_pageblock(mm: MemoryManager) -> bool:
    starts = range(0, mm.nr_pages, 512)
    return all(int(get_pageblock_migratetype(mm.mem, pfn)) != MIGRATE_ISOLATE for pfn in starts)


def used_below(mm: MemoryManager) -> MemoryManager:
    """Take the first pageblock, which cannot be had because page 0 is the firmware's."""
    assert max(mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, 511)) == 511
    return mm


@pytest.mark.parametrize("zero", [0, GFP_ZERO])
def test_small_user_pages_move_away_with_their_bytes(boot: Boot, zero: int) -> None:
    mm = used_below(boot(16, thp="never"))
    dirty_free_memory(mm)
    with mm.spawn() as process:
        addr = process.mmap(64 * PAGE_SIZE)
        for page in range(64):
            process.write(addr + page * PAGE_SIZE, bytes([page + 1]) * PAGE_SIZE)
        first = pfn_at(mm, process, addr)
        assert first is not None
        start = first - first % 512
        before = mapped(mm, process, addr, 64 * PAGE_SIZE)
        assert alloc_contig_frozen_range(mm, start, start + 512, FOLIO | zero)
        moved = [pfn_at(mm, process, addr + page * PAGE_SIZE) for page in range(64)]
        assert not [pfn for pfn in moved if pfn is None or start <= pfn < start + 512]
        assert mapped(mm, process, addr, 64 * PAGE_SIZE) == before
        assert zero == 0 or reads_zero(mm, start, 9)
        verify(mm)
        page_bytes(mm, start, 512)[:] = 0xEE
        assert mapped(mm, process, addr, 64 * PAGE_SIZE) == before
        free_contig_frozen_range(mm, start, 9)
    assert no_isolated_pageblock(mm)
    verify(mm)


def test_a_huge_page_moves_whole(boot: Boot) -> None:
    mm = boot(16)
    dirty_free_memory(mm)
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.write(addr + 5 * PAGE_SIZE, b"here")
        first = pfn_at(mm, process, addr)
        assert first is not None
        before = mapped(mm, process, addr)
        assert alloc_contig_frozen_range(mm, first, first + 512, FOLIO | GFP_ZERO)
        assert pfn_at(mm, process, addr) != first
        assert is_huge(mm, process, addr)
        assert mapped(mm, process, addr) == before
        assert reads_zero(mm, first, 9)
        verify(mm)


def test_what_is_pinned_stays_and_everything_is_as_before(boot: Boot) -> None:
    mm = used_below(boot(8, thp="never"))
    with mm.spawn() as process:
        addr = process.mmap(4 * PAGE_SIZE)
        process.write(addr, b"1" * 4 * PAGE_SIZE)
        pfn = pfn_at(mm, process, addr)
        assert pfn is not None
        mm.mem.mem_map[pfn]._refcount += 1
        assert not alloc_contig_frozen_range(mm, pfn, pfn + 1, GFP_KERNEL)
        assert pfn_at(mm, process, addr) == pfn
        assert no_isolated_pageblock(mm)
        mm.mem.mem_map[pfn]._refcount -= 1
        assert alloc_contig_frozen_range(mm, pfn, pfn + 1, GFP_KERNEL)
        assert pfn_at(mm, process, addr) != pfn
        verify(mm)


def test_without_room_for_the_moved_pages_there_is_no_run(boot: Boot) -> None:
    mm = boot(8, thp="never")
    with mm.spawn() as process:
        addr = process.mmap(1500 * PAGE_SIZE)
        for page in range(1500):
            process.write(addr + page * PAGE_SIZE, b"x")
        taken = []
        while len(got := mm.alloc_pages_bulk(GFP_KERNEL, 64)):
            taken += got.tolist()
        assert alloc_contig_frozen_pages(mm, 9, FOLIO) == NO_PAGE
        assert bytes(mapped(mm, process, addr, PAGE_SIZE)[:1]) == b"x"
        assert no_isolated_pageblock(mm)
        verify(mm)
        mm.free_pages_bulk(pages(*taken))


def test_the_cma_areas_guests_make_room(boot: Boot) -> None:
    """Movable pages use CMA pageblocks until the area's owner wants them."""
    mm = boot(16, cma_pages=3072, thp="never")
    dirty_free_memory(mm)
    with mm.spawn() as process:
        addr = process.mmap(200 * PAGE_SIZE)
        for page in range(200):
            process.write(addr + page * PAGE_SIZE, bytes([page + 1]) * PAGE_SIZE)
        base = mm.cma.base_pfn
        inside = [
            pfn for page in range(200) if (pfn := pfn_at(mm, process, addr + page * PAGE_SIZE) or 0) >= base
        ]
        assert inside
        before = mapped(mm, process, addr, 200 * PAGE_SIZE)
        got: list[int] = []
        while (pfn := cma_alloc_frozen_compound(mm, 9, GFP_ZERO)) != NO_PAGE:
            assert reads_zero(mm, pfn, 9)
            got.append(pfn)
        assert any(pfn <= page < pfn + 512 for pfn in got for page in inside)
        assert mapped(mm, process, addr, 200 * PAGE_SIZE) == before
        verify(mm)
        for pfn in got:
            assert cma_release_frozen(mm, pfn, 9)
    verify(mm)


def test_a_balloon_page_stays_without_a_driver_that_can_move_it(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    mm.balloon.enqueue(np.array([pfn]))
    assert not alloc_contig_frozen_range(mm, pfn, pfn + 1, GFP_KERNEL)
    assert mm.balloon.count == 1
    assert no_isolated_pageblock(mm)
    verify(mm)


def test_targets_are_taken_without_their_hint(boot: Boot) -> None:
    """A target that the host zeroed is not known to be zero any more when the bytes are on it."""
    mm = used_below(boot(16, thp="never"))
    with mm.spawn() as process:
        addr = process.mmap(8 * PAGE_SIZE)
        process.write(addr, b"z" * 8 * PAGE_SIZE)
        pfn = pfn_at(mm, process, addr)
        assert pfn is not None
        FakeHost(mm, capacity=1, order=0).register()
        mm.page_reporting.flush((1 << 32) - 1)
        before = mm.vm_stats().dropped_hint_bytes
        assert alloc_contig_frozen_range(mm, pfn, pfn + 8, GFP_KERNEL)
        assert mm.vm_stats().dropped_hint_bytes == before + 8 * PAGE_SIZE
        assert mapped(mm, process, addr, 8 * PAGE_SIZE) == b"z" * 8 * PAGE_SIZE
        verify(mm)
