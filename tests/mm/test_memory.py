# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostzero.jit import COMPILER_ON
from hostzero.mm import MemoryManager, Process, memory
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_UNINITIALIZED,
)
from hostzero.mm.pgtable import PAGE_DIRTY, PAGE_RW
from hostzero.units import PAGE_SIZE
from tests.mm.guest import booted, dirty_free_memory, page_bytes, reads_zero, verify
from tests.mm.mappings import verify_mappings
from tests.mm.processes import HUGE, contents, free_pages, is_huge, mapped, pfn_at, table_entries


@pytest.fixture
def process(mm: MemoryManager) -> Process:
    """A process of a guest whose free memory is dirty."""
    dirty_free_memory(mm)
    return mm.spawn()


def zero_page(mm: MemoryManager) -> int:
    return int(mm.mem.vm[0].empty_zero_page)


def test_untouched_memory_reads_as_zero_from_the_one_zero_page(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(8 * PAGE_SIZE)
    free = free_pages(mm)
    assert process.read(addr, 8 * PAGE_SIZE) == bytes(8 * PAGE_SIZE)
    assert [pfn_at(mm, process, addr + i * PAGE_SIZE) for i in range(8)] == [zero_page(mm)] * 8
    assert table_entries(mm, process, addr)[-1] & (PAGE_RW | PAGE_DIRTY) == 0
    assert free_pages(mm) == free - 3  # tables, no page
    assert process.rss == 0


def test_writing_to_what_was_read_leaves_the_zero_page_alone(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(2 * PAGE_SIZE)
    process.read(addr, 2 * PAGE_SIZE)
    process.write(addr + 100, b"mine")
    assert reads_zero(mm, zero_page(mm))
    assert pfn_at(mm, process, addr) != zero_page(mm)
    assert pfn_at(mm, process, addr + PAGE_SIZE) == zero_page(mm)
    assert process.read(addr, PAGE_SIZE) == bytes(100) + b"mine" + bytes(PAGE_SIZE - 104)
    assert process.rss == PAGE_SIZE
    process.munmap(addr, 2 * PAGE_SIZE)
    assert int(mm.mem.mem_map[zero_page(mm)]._refcount) == 1
    verify(mm)


def test_every_writer_replaces_the_zero_page(mm: MemoryManager, process: Process) -> None:
    """touch, fill, populate and write: none of them may write through a read mapping."""
    addr = process.mmap(4 * PAGE_SIZE)
    process.read(addr, 4 * PAGE_SIZE)
    process.touch(addr, PAGE_SIZE)
    process.fill(addr + PAGE_SIZE, PAGE_SIZE, 0x31)
    process.madvise(addr + 2 * PAGE_SIZE, PAGE_SIZE, MADV_POPULATE_WRITE)
    process.write(addr + 3 * PAGE_SIZE, b"w")
    assert reads_zero(mm, zero_page(mm))
    assert process.rss == 4 * PAGE_SIZE
    assert process.read(addr, 4 * PAGE_SIZE) == (
        b"\x01" + bytes(4095) + contents(0x31) + contents(0) + b"w" + bytes(4095)
    )


def test_a_read_mapping_of_an_uninitialized_area_still_turns_to_zeros(
    mm: MemoryManager, process: Process
) -> None:
    """A page that has been read as zero must not show old bytes after the first write."""
    addr = process.mmap(2 * PAGE_SIZE, MAP_UNINITIALIZED)
    assert process.read(addr, PAGE_SIZE) == bytes(PAGE_SIZE)
    process.write(addr, b"x")
    assert process.read(addr, PAGE_SIZE) == b"x" + bytes(PAGE_SIZE - 1)
    process.write(addr + PAGE_SIZE, b"x")
    assert process.read(addr + PAGE_SIZE, PAGE_SIZE) == b"x" + contents(0x5A, PAGE_SIZE - 1)


def test_bytes_are_guest_ram(mm: MemoryManager, process: Process) -> None:
    """What a program writes lies where its page tables say; what lies there, it reads."""
    addr = process.mmap(3 * PAGE_SIZE)
    data = bytes(range(256)) * 20
    process.write(addr + 4000, data)
    pfns = [pfn_at(mm, process, addr + i * PAGE_SIZE) for i in range(3)]
    found = b"".join(page_bytes(mm, pfn).tobytes() for pfn in pfns if pfn is not None)
    assert found == bytes(4000) + data + bytes(3 * PAGE_SIZE - 4000 - len(data))
    assert pfns[1] is not None
    page_bytes(mm, pfns[1])[5] = 0xFE
    assert process.read(addr + PAGE_SIZE + 5, 1) == b"\xfe"


def test_touch_writes_one_byte_to_each_page(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(HUGE)
    process.fill(addr, 2 * PAGE_SIZE, 0x99)
    process.touch(addr, 4 * PAGE_SIZE)
    assert process.read(addr, 4 * PAGE_SIZE) == (
        (b"\x01" + contents(0x99, PAGE_SIZE - 1)) * 2 + (b"\x01" + bytes(PAGE_SIZE - 1)) * 2
    )


def test_faults_are_counted_once_per_page(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(HUGE)
    process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
    process.touch(addr, 16 * PAGE_SIZE)
    process.touch(addr, 16 * PAGE_SIZE)
    assert mm.vm_stats().pgfault == 16
    process.read(addr, 20 * PAGE_SIZE)
    assert mm.vm_stats().pgfault == 20
    process.write(addr + 16 * PAGE_SIZE, b"x")
    assert mm.vm_stats().pgfault == 21


def test_populate_skips_what_is_there(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(2 * HUGE)
    process.write(addr + HUGE + 5, b"keep")
    assert process.rss == HUGE
    process.madvise(addr, 2 * HUGE, MADV_POPULATE_WRITE)
    assert process.rss == 2 * HUGE
    assert process.read(addr + HUGE, 16) == bytes(5) + b"keep" + bytes(7)
    assert mapped(mm, process, addr) == bytes(HUGE)


def test_find_nonzero_faults_nothing_in(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(HUGE)
    process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
    assert process.find_nonzero(addr, HUGE) is None
    process.write(addr + 9 * PAGE_SIZE + 8 * 33 + 3, b"\x80")
    free = free_pages(mm)
    assert process.find_nonzero(addr, HUGE) == addr + 9 * PAGE_SIZE + 8 * 33
    assert process.find_nonzero(addr, 9 * PAGE_SIZE) is None
    assert process.find_nonzero(addr + 10 * PAGE_SIZE, PAGE_SIZE) is None
    assert (free_pages(mm), process.rss) == (free, PAGE_SIZE)


def test_find_nonzero_in_huge_pages(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(2 * HUGE)
    process.write(addr, b"\0")
    process.write(addr + HUGE, b"\0")
    assert process.find_nonzero(addr, 2 * HUGE) is None
    process.write(addr + 2 * HUGE - 1, b"\x01")
    assert process.find_nonzero(addr, 2 * HUGE) == addr + 2 * HUGE - 8
    assert process.find_nonzero(addr, 2 * HUGE - PAGE_SIZE) is None


def test_resident_pages_are_counted_in_ranges(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(3 * HUGE)
    process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
    process.write(addr + 8 * PAGE_SIZE, b"x")
    process.read(addr + 9 * PAGE_SIZE, 1)
    process.write(addr + HUGE, b"x")

    def count(first: int, last: int) -> int:
        return int(
            memory.count_mapped(mm.mem, process._pgd, addr + first * PAGE_SIZE, addr + last * PAGE_SIZE)
        )

    assert count(0, 3 * 512) == 513
    assert count(0, 8) == 0
    assert count(8, 10) == 1
    assert count(0, 512 + 7) == 8
    assert count(512 + 500, 1024 + 100) == 12
    assert count(1024, 3 * 512) == 0


def test_zapping_counts_every_page_once(mm: MemoryManager, process: Process) -> None:
    """Small pages, zero pages, huge pages and holes in one range."""
    addr = process.mmap(3 * HUGE)
    process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
    process.write(addr + 3 * PAGE_SIZE, b"x")
    process.read(addr + 4 * PAGE_SIZE, 1)
    process.write(addr + 2 * HUGE, b"x")
    assert is_huge(mm, process, addr + 2 * HUGE)
    free = free_pages(mm)
    process.madvise(addr, 3 * HUGE, MADV_DONTNEED)
    assert free_pages(mm) == free + 513
    assert process.rss == 0
    assert pfn_at(mm, process, addr + 4 * PAGE_SIZE) is None
    verify(mm)


Access = tuple[str, int, int, int]

accesses = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "fill", "touch", "drop", "populate", "pageout"]),
        st.integers(0, 12 * PAGE_SIZE - 1),
        st.integers(1, 3 * PAGE_SIZE),
        st.integers(1, 255),
    ),
    max_size=12,
)


@settings(max_examples=60 if COMPILER_ON else 6)
@given(sequence=accesses, straddling=st.booleans(), orders=st.sampled_from([(), (1,), (2, 3)]))
def test_memory_reads_as_it_was_written(
    sequence: list[Access], straddling: bool, orders: tuple[int, ...]
) -> None:
    """Any accesses to twelve pages, across a 2 MiB boundary or not, against a bytearray."""
    size = 12 * PAGE_SIZE
    with booted(4, anon_orders=orders, swap_size=8 * PAGE_SIZE) as mm:
        dirty_free_memory(mm, 0xAA)
        process = mm.spawn()
        base = (1 << 30) - (6 * PAGE_SIZE if straddling else 0)
        process.mmap(size, MAP_FIXED, base)
        shadow = bytearray(size)
        for what, start, length, byte in sequence:
            end = min(start + length, size)
            low, high = start // PAGE_SIZE * PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE
            if what == "write":
                process.write(base + start, contents(byte, end - start))
                shadow[start:end] = contents(byte, end - start)
            elif what == "read":
                assert process.read(base + start, end - start) == shadow[start:end]
            elif what == "fill":
                process.fill(base + low, high - low, byte)
                shadow[low:high] = contents(byte, high - low)
            elif what == "touch":
                process.touch(base + low, high - low)
                shadow[low:high:PAGE_SIZE] = b"\x01" * ((high - low) // PAGE_SIZE)
            elif what == "drop":
                process.madvise(base + low, high - low, MADV_DONTNEED)
                shadow[low:high] = bytes(high - low)
            elif what == "pageout":
                process.madvise(base + low, high - low, MADV_PAGEOUT)
            else:
                process.madvise(base + low, high - low, MADV_POPULATE_WRITE)
        assert process.read(base, size) == shadow
        assert reads_zero(mm, zero_page(mm))
        verify(mm)
        verify_mappings(mm, [process])
