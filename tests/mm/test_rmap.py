# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager, Process
from hostzero.mm.mmap import MADV_DONTNEED
from hostzero.mm.pgtable_walk import NO_ENTRY
from hostzero.mm.rmap import folio_mappings, folio_pmd, remap_folio
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.processes import HUGE, pfn_at, table_entries


@pytest.fixture
def process(mm: MemoryManager) -> Process:
    return mm.spawn()


def head_of(mm: MemoryManager, process: Process, addr: int) -> int:
    pfn = pfn_at(mm, process, addr)
    assert pfn is not None
    return pfn


def test_a_small_page_is_mapped_once(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(2 * PAGE_SIZE)
    process.touch(addr, 2 * PAGE_SIZE)
    assert folio_mappings(mm.mem, head_of(mm, process, addr), 0) == 1
    assert folio_mappings(mm.mem, head_of(mm, process, addr + PAGE_SIZE), 0) == 1


def test_a_huge_page_is_mapped_by_one_entry(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(HUGE)
    process.touch(addr, HUGE)
    head = head_of(mm, process, addr)
    assert folio_mappings(mm.mem, head, 9) == 1
    assert folio_mappings(mm.mem, head, 8) == 0, "a huge entry maps a huge folio or none"


def test_the_parts_of_a_split_huge_page_are_mapped_one_by_one(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(HUGE)
    process.touch(addr, HUGE)
    head = head_of(mm, process, addr)
    process.madvise(addr + 5 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    assert folio_mappings(mm.mem, head, 0) == 1
    # As a folio of that size: every page but the one that is gone.
    assert folio_mappings(mm.mem, head, 9) == 511


@pytest.mark.parametrize("pages", ["zero page", "page table", "kernel page", "free page"])
def test_pages_without_owner_are_mapped_by_nobody(mm: MemoryManager, process: Process, pages: str) -> None:
    addr = process.mmap(PAGE_SIZE)
    process.read(addr, 1)
    pfn = {
        "zero page": int(mm.mem.vm[0].empty_zero_page),
        "page table": (table_entries(mm, process, addr)[0] % (1 << 52)) >> 12,
        "kernel page": int(mm.alloc_pages(0)),
        "free page": mm.nr_pages - 1,
    }[pages]
    assert folio_pmd(mm.mem, pfn, 0) == NO_ENTRY
    assert folio_mappings(mm.mem, pfn, 0) == 0


@pytest.mark.parametrize("owner", [-1, 0, 999, 1024, 1025, 1 << 40])
def test_an_owner_that_does_not_exist_maps_nothing(mm: MemoryManager, process: Process, owner: int) -> None:
    addr = process.mmap(PAGE_SIZE)
    process.touch(addr, PAGE_SIZE)
    pfn = head_of(mm, process, addr)
    mm.mem.mem_map[pfn].mapping = owner
    assert folio_mappings(mm.mem, pfn, 0) == 0


def test_a_folio_off_its_alignment_is_not_followed_over_the_end_of_a_table(
    mm: MemoryManager, process: Process
) -> None:
    addr = process.mmap(HUGE)
    process.touch(addr, HUGE)
    head = head_of(mm, process, addr)
    mm.mem.mem_map[head].index += 1
    assert folio_mappings(mm.mem, head, 9) == 0


def test_another_page_at_the_address_is_no_mapping(mm: MemoryManager, process: Process) -> None:
    """After the page was unmapped, the address may hold another one."""
    addr = process.mmap(PAGE_SIZE)
    process.touch(addr, PAGE_SIZE)
    pfn = head_of(mm, process, addr)
    mm.mem.mem_map[pfn]._refcount += 1
    process.madvise(addr, PAGE_SIZE, MADV_DONTNEED)
    assert folio_mappings(mm.mem, pfn, 0) == 0
    process.touch(addr, PAGE_SIZE)
    assert folio_mappings(mm.mem, pfn, 0) == 0


def test_a_swap_entry_maps_nothing(mm: MemoryManager, process: Process) -> None:
    """An entry that is not present may have any page's number in it."""
    addr = process.mmap(PAGE_SIZE)
    process.touch(addr, PAGE_SIZE)
    pfn = head_of(mm, process, addr)
    table = (table_entries(mm, process, addr)[2] % (1 << 52)) >> 12
    mm.mem.ram[table * 512 + (addr >> 12) % 512] -= 1  # PRESENT is bit 0
    assert folio_mappings(mm.mem, pfn, 0) == 0
    mm.mem.ram[table * 512 + (addr >> 12) % 512] += 1


def test_remapping_keeps_an_entry_s_permissions(boot: Boot) -> None:
    mm = boot(thp="never")
    process = mm.spawn()
    addr = process.mmap(2 * PAGE_SIZE)
    process.touch(addr, 2 * PAGE_SIZE)
    pfn, other = head_of(mm, process, addr), head_of(mm, process, addr + PAGE_SIZE)
    before = table_entries(mm, process, addr)[-1]
    remap_folio(mm.mem, pfn, 77, 0)
    assert table_entries(mm, process, addr)[-1] == before - (pfn << 12) + (77 << 12)
    assert head_of(mm, process, addr + PAGE_SIZE) == other
    mm.mem.mem_map[77].mapping, mm.mem.mem_map[77].index = mm.mem.mem_map[pfn].mapping, addr >> 12
    remap_folio(mm.mem, 77, pfn, 0)
    assert table_entries(mm, process, addr)[-1] == before
