# SPDX-License-Identifier: GPL-2.0-only
"""After hibernation nothing is known of free pages, marked or not."""

from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager, MmConfig
from hostzero.mm.buddy import FPI_TRYLOCK, FPI_ZEROED
from hostzero.mm.gfp import GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import PAGEBLOCK_NR_PAGES
from hostzero.mm.page_flags import PGTY_buddy
from hostzero.mm.page_free import __free_frozen_pages
from hostzero.mm.verify import verify_memory
from hostzero.ram import open_ram
from hostzero.units import PAGE_SIZE

MEMORY = 8 * PAGEBLOCK_NR_PAGES * PAGE_SIZE
STALE = 0x5A


def spoil_free_pages(mm: MemoryManager) -> None:
    """Write into every free block, as a boot kernel does that loads an image."""
    pfn = 0
    while pfn < mm.nr_pages:
        page = mm.mem.mem_map[pfn]
        pages = 1 << int(page.private) if page.page_type == PGTY_buddy else 1
        if page.page_type == PGTY_buddy:
            mm.ram_bytes[pfn * PAGE_SIZE : (pfn + pages) * PAGE_SIZE] = STALE
        pfn += pages


@pytest.mark.parametrize(
    "config",
    [MmConfig(), MmConfig(init_on_free=True), MmConfig(init_on_alloc=True), MmConfig(page_poisoning=True)],
    ids=["plain", "init_on_free", "init_on_alloc", "page_poisoning"],
)
def test_a_restored_guest_hands_out_no_stale_byte(config: MmConfig) -> None:
    with open_ram(MEMORY) as ram:
        mm = MemoryManager(ram, config)
        pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 3)
        mm.ram_bytes[pfn * PAGE_SIZE : (pfn + 8) * PAGE_SIZE] = 0
        mm.free_pages(pfn, 3)
        mm.drain_all_pages()
        spoil_free_pages(mm)
        mm.forget_zero_claims()
        verify_memory(mm.mem)
        for order in (0, 3, 9):
            pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, order)
            assert not mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE].any()
        assert mm.vm_stats().poison_errors == 0
        del mm


def test_marks_are_forgotten_on_free_and_parked_pages() -> None:
    with open_ram(MEMORY) as ram:
        mm = MemoryManager(ram)
        parked = mm.alloc_pages(GFP_KERNEL | GFP_ZERO)
        large = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 10)
        waiting = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5)
        mm.mem.mem_map["_refcount"][[parked, large, waiting]] = 0
        mm.free_frozen_pages_zeroed(parked, 0)
        mm.free_frozen_pages_zeroed(large, 10)
        with mm.zone_lock():
            __free_frozen_pages(mm.mem, waiting, 5, FPI_TRYLOCK | FPI_ZEROED, 0)
        spoil_free_pages(mm)
        mm.ram_bytes[waiting * PAGE_SIZE : (waiting + 32) * PAGE_SIZE] = STALE
        assert mm.forget_zero_claims() == 3
        verify_memory(mm.mem)
        assert mm.forget_zero_claims() == 0
        del mm


@pytest.mark.parametrize(
    ("config", "value"), [(MmConfig(init_on_free=True), 0), (MmConfig(page_poisoning=True), 0xAA)]
)
def test_deferred_pages_get_back_what_free_pages_hold(config: MmConfig, value: int) -> None:
    """They are on no free list yet, and will be without another prepare."""
    with open_ram(MEMORY) as ram:
        mm = MemoryManager(ram, config)
        waiting, other = mm.alloc_pages(GFP_KERNEL, 5), mm.alloc_pages(GFP_KERNEL, 5)
        with mm.zone_lock():
            mm.free_pages_nolock(waiting, 5)
        contents = mm.ram_bytes[waiting * PAGE_SIZE : (waiting + 32) * PAGE_SIZE]
        contents[:] = STALE
        mm.forget_zero_claims()
        assert (contents == value).all()
        mm.free_pages(other, 5)
        verify_memory(mm.mem)
        del mm, contents


def test_an_owner_keeps_its_contents_and_its_private_flag() -> None:
    """Tails of a block that is not compound have no reference; they are owned all the same."""
    with open_ram(MEMORY) as ram:
        mm = MemoryManager(ram, MmConfig(init_on_free=True))
        pfn = mm.alloc_pages(GFP_KERNEL, 3)
        mm.ram_bytes[pfn * PAGE_SIZE : (pfn + 8) * PAGE_SIZE] = 7
        mm.forget_zero_claims()
        assert (mm.ram_bytes[pfn * PAGE_SIZE : (pfn + 8) * PAGE_SIZE] == 7).all()
        del mm
