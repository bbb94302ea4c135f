# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.mm import MemoryManager, Process, pgtable
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MAP_FIXED, MMAP_BASE
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PGTY_none, PGTY_table
from hostzero.mm.pgtable import NO_ENTRY, PTRS_PER_TABLE, TASK_SIZE
from hostzero.units import PAGE_SIZE
from tests.mm.guest import dirty_free_memory, page_bytes, verify
from tests.mm.processes import HUGE, free_pages, is_huge, occupy, release, table_entries

GIB = 1 << 30


@pytest.fixture
def process(mm: MemoryManager) -> Process:
    """A process of a guest whose free memory is dirty."""
    dirty_free_memory(mm)
    return mm.spawn()


def table_of(entry: int) -> int:
    return (entry % (1 << 52)) >> 12


def test_four_levels_lead_to_a_page(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(PAGE_SIZE)
    free = free_pages(mm)
    process.write(addr, b"x")
    entries = table_entries(mm, process, addr)
    assert len(entries) == 4
    assert free_pages(mm) == free - 4  # three tables under the top one, and the page
    # Present, writable, user, accessed; the page itself dirty as well. Bits as on x86-64.
    assert [entry % 4096 for entry in entries] == [0b0010_0111, 0b0010_0111, 0b0010_0111, 0b0110_0111]
    assert page_bytes(mm, table_of(entries[-1])).tobytes() == b"x" + bytes(PAGE_SIZE - 1)


def test_a_huge_page_needs_one_table_less(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(HUGE)
    free = free_pages(mm)
    process.write(addr, b"x")
    entries = table_entries(mm, process, addr)
    assert len(entries) == 3
    assert entries[2] % 4096 == 0b1110_0111
    assert table_of(entries[2]) % 512 == 0
    assert free_pages(mm) == free - 2 - 512


def test_tables_are_zeroed_pages_of_their_own_type(mm: MemoryManager, process: Process) -> None:
    """Dirty memory: but for the one entry in use, every word of every table is zero."""
    addr = process.mmap(PAGE_SIZE)
    process.write(addr, b"x")
    entries = table_entries(mm, process, addr)
    for table in [int(process._pgd), *map(table_of, entries[:-1])]:
        assert int(mm.mem.mem_map[table].page_type) == PGTY_table
        assert int(mm.mem.mem_map[table]._refcount) == 1
        assert (mm.mem.ram[table * 512 : (table + 1) * 512] != 0).sum() == 1


def test_each_level_indexes_its_own_nine_bits(mm: MemoryManager, process: Process) -> None:
    """Addresses that differ in one level's bits share the tables above and none below."""
    base = 5 << 39 | 6 << 30 | 7 << 21 | 8 << 12
    for shared, addr in [
        (0, base + (1 << 39)),
        (1, base + (1 << 30)),
        (2, base + (1 << 21)),
        (3, base + (1 << 12)),
    ]:
        for at in (base, addr):
            process.mmap(PAGE_SIZE, MAP_FIXED, at)
            process.write(at, b"x")
        one, other = (list(map(table_of, table_entries(mm, process, at))) for at in (base, addr))
        assert one[:shared] == other[:shared]
        assert not set(one[shared:]) & set(other[shared:])
        for at in (base, addr):
            process.munmap(at, PAGE_SIZE)
    assert list(map(int, mm.mem.ram[process._pgd * 512 :][:512])) == [0] * 512


@pytest.mark.parametrize("addr", [0, PAGE_SIZE, MMAP_BASE, TASK_SIZE - PAGE_SIZE])
def test_both_ends_of_the_address_space(mm: MemoryManager, process: Process, addr: int) -> None:
    process.mmap(PAGE_SIZE, MAP_FIXED, addr)
    process.write(addr, b"edge")
    assert process.read(addr, 6) == b"edge\0\0"
    free = free_pages(mm)
    process.munmap(addr, PAGE_SIZE)
    assert free_pages(mm) == free + 4
    verify(mm)


def test_tables_go_when_their_last_entry_does(mm: MemoryManager, process: Process) -> None:
    """Neighbours keep the tables they share: one table a step, then all the rest."""
    addrs = [GIB, GIB + PAGE_SIZE, GIB + HUGE, 2 * GIB]
    for addr in addrs:
        process.mmap(PAGE_SIZE, MAP_FIXED, addr)
        process.write(addr, b"x")
    freed = []
    for addr in addrs:
        before = free_pages(mm)
        process.munmap(addr, PAGE_SIZE)
        freed.append(free_pages(mm) - before)
        verify(mm)
    assert freed == [1, 2, 3, 4]


def test_a_freed_table_is_an_ordinary_page(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(PAGE_SIZE)
    process.write(addr, b"x")
    tables = list(map(table_of, table_entries(mm, process, addr)[:-1]))
    process.munmap(addr, PAGE_SIZE)
    assert all(int(mm.mem.mem_map[table].page_type) == PGTY_none for table in tables)
    assert all(int(mm.mem.mem_map[table]._refcount) == 0 for table in tables)


def test_unmapping_frees_tables_between_far_mappings(mm: MemoryManager, process: Process) -> None:
    """One munmap over both ends of the address space; nothing is left but the top table."""
    before = free_pages(mm)
    for addr in (0, 3 * GIB, 1 << 39, TASK_SIZE - HUGE):
        process.mmap(PAGE_SIZE, MAP_FIXED, addr)
        process.write(addr, b"x")
    process.munmap(0, TASK_SIZE)
    assert free_pages(mm) == before
    verify(mm)


def test_a_table_in_use_survives_its_neighbourhood(mm: MemoryManager, process: Process) -> None:
    """A range that covers a whole table frees it only if nothing outside keeps an entry."""
    addr = process.mmap(2 * HUGE)
    process.madvise(addr, 2 * HUGE, MADV_NOHUGEPAGE)
    process.write(addr + HUGE - PAGE_SIZE, b"low")
    process.write(addr + HUGE, b"high")
    assert not is_huge(mm, process, addr)
    process.munmap(addr, HUGE - PAGE_SIZE)
    assert process.read(addr + HUGE - PAGE_SIZE, 3) == b"low"
    assert process.read(addr + HUGE, 4) == b"high"
    verify(mm)


def test_addresses_without_tables_have_no_entry(mm: MemoryManager, process: Process) -> None:
    assert pgtable.pmd_offset(mm.mem, process._pgd, MMAP_BASE) == NO_ENTRY
    process.mmap(PAGE_SIZE, MAP_FIXED, MMAP_BASE)
    process.write(MMAP_BASE, b"x")
    assert pgtable.pmd_offset(mm.mem, process._pgd, MMAP_BASE + GIB) == NO_ENTRY
    word = pgtable.pmd_offset(mm.mem, process._pgd, MMAP_BASE + HUGE)
    assert word % PTRS_PER_TABLE == 1
    assert int(mm.mem.ram[word]) == 0


def test_no_page_for_a_table(mm: MemoryManager, process: Process) -> None:
    taken = occupy(mm)
    assert pgtable.alloc_table(mm.mem, 0, 0) == NO_PAGE
    word = process._pgd * 512
    assert not pgtable.table_alloc(mm.mem, word, 0, 0)
    assert int(mm.mem.ram[word]) == 0
    release(mm, taken[:1])
    assert pgtable.table_alloc(mm.mem, word, 0, 0)
    assert table_of(int(mm.mem.ram[word])) == taken[0]
    assert page_bytes(mm, taken[0]).tobytes() == bytes(PAGE_SIZE)
