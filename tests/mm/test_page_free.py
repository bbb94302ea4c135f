# SPDX-License-Identifier: GPL-2.0-only
"""The ways of a block back to a free list: references, zero hints, frees that may not wait."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import MIGRATE_ISOLATE, PAGEBLOCK_NR_PAGES
from hostzero.mm.page_flags import PG_hwpoison, PG_private, PG_zeroed
from hostzero.mm.page_free import (
    __free_contig_range,
    put_page,
    put_page_testzero,
)
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import (
    block_start,
    dirty,
    dirty_free_memory,
    free_lists,
    is_marked_zero,
    page_bytes,
    pcp_lists,
    reads_zero,
    verify,
)


def references(mm: MemoryManager, pfn: int) -> int:
    return int(mm.mem.mem_map[pfn]._refcount)


def zero_and_free(mm: MemoryManager, pfn: int, order: int = 0) -> None:
    page_bytes(mm, pfn, 1 << order)[:] = 0
    mm.mem.mem_map[pfn]._refcount = 0
    mm.free_frozen_pages_zeroed(Pfn(pfn), order)


def nr_free(mm: MemoryManager, zone: int = 0) -> int:
    return int(mm.mem.zone[zone].nr_free_pages)


def test_a_page_comes_with_one_reference_and_goes_with_the_last(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    assert references(mm, pfn) == 1
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.free_pages(pfn)
    assert mm.free_pages(pfn)
    assert pcp_lists(mm.mem)[0, 0][0] == pfn


def test_dropping_a_reference_that_nobody_has_is_a_bug(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.free_pages(pfn)
    with pytest.raises(VmBug, match="the page has no reference"):
        put_page_testzero(mm.mem, pfn)


def test_a_folio_is_freed_whole_by_its_last_reference(mm: MemoryManager) -> None:
    free = nr_free(mm)
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 5)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not put_page(mm.mem, pfn, 0)
    assert mm.free_pages(pfn, 5)
    assert nr_free(mm) == free
    verify(mm)


def test_a_block_that_is_no_folio_keeps_only_its_first_page_for_a_second_reference(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 6)
    free = nr_free(mm)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.free_pages(pfn, 6)
    mm.drain_all_pages()
    assert nr_free(mm) == free + 63
    assert mm.free_pages(pfn)
    mm.drain_all_pages()
    assert nr_free(mm) == free + 64
    verify(mm)


def test_a_folio_with_a_second_reference_stays_whole(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 6)
    free = nr_free(mm)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.free_pages(pfn, 6)
    mm.drain_all_pages()
    assert nr_free(mm) == free


@pytest.mark.parametrize("order", range(11))
def test_a_block_freed_as_zero_is_not_zeroed_again(boot: Boot, order: int) -> None:
    mm = boot(12)
    # Its buddy stays with its owner, so that the block stays what it is.
    pfn = mm.alloc_pages(GFP_KERNEL, min(order + 1, 10))
    dirty_free_memory(mm)
    dirty(mm, pfn, order)
    zero_and_free(mm, pfn, order)
    verify(mm)
    before, got = mm.vm_stats(), -1
    while got != pfn:  # or memory is used up: an error
        before = mm.vm_stats()
        got = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, order)
        assert reads_zero(mm, got, order)
        assert not is_marked_zero(mm.mem, got)
    after = mm.vm_stats()
    assert after.known_zero_bytes - before.known_zero_bytes == PAGE_SIZE << order
    assert after.zeroed_bytes == before.zeroed_bytes
    verify(mm)


@pytest.mark.parametrize("order", [0, 3, 4, 10])
def test_every_page_cut_from_a_zero_block_is_known_zero(boot: Boot, order: int) -> None:
    """Host-zeroed memory is worth most in pieces: patch 26, all the way to the owner."""
    mm = boot(12)
    mm.drain_all_pages()
    dirty_free_memory(mm)
    pfn = mm.alloc_pages(GFP_KERNEL, 10)
    zero_and_free(mm, pfn, 10)
    before = mm.vm_stats().known_zero_bytes
    seen = [mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, order) for _ in range(1 << (10 - order))]
    inside = [page for page in seen if pfn <= page < pfn + 1024]
    assert len(inside) > 0
    assert mm.vm_stats().known_zero_bytes - before == len(inside) * (PAGE_SIZE << order)
    assert all(reads_zero(mm, page, order) for page in seen)
    verify(mm)


def test_a_last_reference_frees_a_folio_as_zero(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 3)
    assert mm.put_page_zeroed(pfn)
    assert is_marked_zero(mm.mem, pfn)
    verify(mm)


def test_a_hint_is_lost_while_somebody_else_holds_the_folio(mm: MemoryManager) -> None:
    """Patch 35: the other holder may still write, and frees it as an ordinary page."""
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 3)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.put_page_zeroed(pfn)
    assert references(mm, pfn) == 1
    assert not is_marked_zero(mm.mem, pfn)
    dirty(mm, pfn, 3)
    assert put_page(mm.mem, pfn, 0)
    assert not is_marked_zero(mm.mem, pfn)
    verify(mm)


def test_an_ordinary_last_put_sets_no_mark_even_on_zeros(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 3)
    assert mm.put_page_zeroed(pfn)
    assert mm.alloc_pages(GFP_KERNEL | GFP_COMP, 3) == pfn
    assert put_page(mm.mem, pfn, 0)
    assert not is_marked_zero(mm.mem, pfn)


def test_an_isolated_pageblock_gets_its_pages_back_at_once(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO)
    mm.drain_all_pages()
    block = block_start(pfn)
    mm.mem.pageblock[block // PAGEBLOCK_NR_PAGES] = MIGRATE_ISOLATE
    zero_and_free(mm, pfn)
    assert free_lists(mm.mem)[0, 0, MIGRATE_ISOLATE] == [pfn]
    assert is_marked_zero(mm.mem, pfn)


# ---- every configuration


CONFIGS = [
    {"init_on_alloc": alloc, "init_on_free": free, "page_poisoning": poison}
    for alloc in (False, True)
    for free in (False, True)
    for poison in (False, True)
]
CONFIG_NAMES = ["+".join(name for name, on in config.items() if on) or "plain" for config in CONFIGS]
DOORS = ["put_page_zeroed", "folio_put_zeroed", "free_frozen_pages_zeroed"]


def leave_by(mm: MemoryManager, door: str, pfn: int, order: int) -> None:
    if door == "free_frozen_pages_zeroed":
        mm.mem.mem_map[pfn]._refcount = 0
        mm.free_frozen_pages_zeroed(Pfn(pfn), order)
    else:
        assert getattr(mm, door)(Pfn(pfn))


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_freed_as_zero_is_known_to_be_zero_unless_poison_was_written(
    boot: Boot, config: dict[str, bool], door: str
) -> None:
    """Patches 33 to 35: by any door, with and without a per-CPU list; poisoning wins over init_on_free."""
    mm = boot(4, **config)
    poison = config["page_poisoning"]
    for order in (2, 5):
        pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, order)
        before = mm.vm_stats().zeroed_bytes
        leave_by(mm, door, pfn, order)
        assert mm.vm_stats().zeroed_bytes == before, "zero already: init_on_free has nothing to do"
        if order == 2:
            assert is_marked_zero(mm.mem, pfn) == (not poison)
        assert (page_bytes(mm, pfn, 1 << order) == (0xAA if poison else 0)).all()
        verify(mm)
    assert reads_zero(mm, mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 2), 2)
    assert mm.vm_stats().poison_errors == 0


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_a_surviving_reference_loses_the_hint_under_every_configuration(
    boot: Boot, config: dict[str, bool]
) -> None:
    """Patch 35: the other holder writes, and its own put is an ordinary one."""
    mm = boot(4, **config)
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 2)
    mm.mem.mem_map[pfn]._refcount = 2
    assert not mm.put_page_zeroed(pfn)
    dirty(mm, pfn, 2)
    assert put_page(mm.mem, pfn, 0)
    assert not is_marked_zero(mm.mem, pfn)
    verify(mm)
    assert reads_zero(mm, mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 2), 2)


# ---- ranges of single pages


def test_a_range_is_freed_in_the_largest_blocks(boot: Boot) -> None:
    """Each page is prepared by itself, once (`FPI_PREPARED`): 0xAA or zeros are written once a page."""
    mm = boot(8, init_on_free=True)
    free = nr_free(mm)
    pfn = mm.alloc_pages(GFP_KERNEL, 9)
    mm.mem.mem_map["_refcount"][pfn : pfn + 512] = 1
    page_bytes(mm, pfn, 512)[:] = 0x5A
    mm.mem.mem_map[pfn + 6]._refcount = 2
    before = mm.vm_stats()
    __free_contig_range(mm.mem, pfn, 512, False, 0)
    after = mm.vm_stats()
    assert after.zeroed_bytes - before.zeroed_bytes == 511 * PAGE_SIZE
    assert after.pgfree - before.pgfree == 511
    mm.drain_all_pages()
    assert references(mm, pfn + 6) == 1
    verify(mm)
    mm.free_pages(Pfn(pfn + 6))
    mm.drain_all_pages()
    assert nr_free(mm) == free
    verify(mm)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_page_of_a_range_keeps_an_owners_flag(boot: Boot, frozen: bool) -> None:
    mm = boot(8, debug_vm=False)
    pfn = mm.alloc_pages(GFP_KERNEL, 6)
    mm.mem.mem_map["_refcount"][pfn : pfn + 64] = int(not frozen)
    mm.mem.mem_map.flags_f[pfn : pfn + 64] |= PG_private
    mm.mem.mem_map[pfn + 9].flags_f |= PG_hwpoison
    dirty(mm, pfn, 6)
    __free_contig_range(mm.mem, pfn, 64, frozen, 0)
    assert not np.any(np.asarray(mm.mem.mem_map.flags_f[pfn : pfn + 64]) & PG_zeroed)
    assert mm.vm_stats().pgfree >= 63
    verify(mm)


def test_a_range_over_two_zones_is_freed_to_both(boot: Boot) -> None:
    mm = boot(4, zones=(ZoneSpec("DMA32", 0, 512), ZoneSpec("Normal", 512, 1024)))
    for mark in ("watermark_min", "watermark_low", "lowmem_reserve"):
        mm.mem.zone[mark] = 0
    mm.drain_all_pages()
    free = (nr_free(mm, 0), nr_free(mm, 1))
    zero_page = int(mm.mem.vm[0].empty_zero_page)
    assert 512 <= zero_page < 544
    mm.mem.mem_map[zero_page]._refcount += 1  # the range goes over it
    taken = mm.alloc_pages_bulk(GFP_KERNEL, 1024)
    inside = (taken >= 480) & (taken < 544)
    assert inside.sum() == 63
    mm.free_pages_bulk(taken[~inside])
    __free_contig_range(mm.mem, 480, 64, False, 0)
    mm.drain_all_pages()
    assert (nr_free(mm, 0), nr_free(mm, 1)) == free
    assert references(mm, zero_page) == 1
    verify(mm)
