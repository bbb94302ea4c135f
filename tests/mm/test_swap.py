# SPDX-License-Identifier: GPL-2.0-only
"""Anonymous pages out to the swap area and back, and the slots that hold them meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import BadAddress, MemcgOutOfMemory, MmError, OutOfMemory, UsageError
from hostzero.mm import MemoryManager, Process
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MAP_FIXED,
    MAP_UNINITIALIZED,
)
from hostzero.mm.swap import NO_SLOT, folio_alloc_swap, swap_free
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, is_marked_zero, verify
from tests.mm.mappings import order_of, verify_mappings
from tests.mm.processes import (
    HUGE,
    MIB,
    FakeHost,
    contents,
    free_pages,
    is_huge,
    mapped,
    occupy,
    pfn_at,
    table_entries,
)
from tests.mm.spy import spy

BASE = 1 << 30


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with dirty memory and 1 MiB of swap, without huge pages."""
    mm = boot(8, thp="never", swap_size=MIB)
    dirty_free_memory(mm)
    return mm


def patterned(process: Process, pages: int, base: int = BASE) -> bytes:
    """Map some pages and write to each its own bytes; return them all."""
    process.mmap(pages * PAGE_SIZE, MAP_FIXED, base)
    data = b"".join(contents(page % 255 + 1) for page in range(pages))
    process.write(base, data)
    return data


# ------------------------------------------------------------------ out and back


def test_pages_come_back_as_they_went(mm: MemoryManager) -> None:
    """Out: the pages are free and the slots taken. Back, one by one as they are read: the reverse."""
    process = mm.spawn()
    data = patterned(process, 8)
    free = free_pages(mm)
    process.madvise(BASE, 8 * PAGE_SIZE, MADV_PAGEOUT)
    assert free_pages(mm) == free + 8
    assert (process.rss, mm.swap.used_bytes) == (0, 8 * PAGE_SIZE)
    assert mm.vm_stats().pswpout == 8
    verify_mappings(mm, [process])
    verify(mm)
    dirty_free_memory(mm, 0xEE)
    faults = mm.vm_stats().pgfault
    assert process.read(BASE + 3 * PAGE_SIZE, 2 * PAGE_SIZE) == data[3 * PAGE_SIZE : 5 * PAGE_SIZE]
    assert (process.rss, mm.swap.used_bytes) == (2 * PAGE_SIZE, 6 * PAGE_SIZE)
    assert (mm.vm_stats().pswpin, mm.vm_stats().pgfault) == (2, faults + 2)
    assert process.read(BASE, 8 * PAGE_SIZE) == data
    assert (process.rss, mm.swap.used_bytes) == (8 * PAGE_SIZE, 0)
    verify_mappings(mm, [process])
    verify(mm)


def test_every_access_brings_a_page_back(mm: MemoryManager) -> None:
    """A write to a part keeps the rest; touch and fill too; and a page is writable after it was read."""
    process = mm.spawn()
    data = bytearray(patterned(process, 4))
    process.madvise(BASE, 4 * PAGE_SIZE, MADV_PAGEOUT)
    process.write(BASE + 100, b"mine")
    process.touch(BASE + PAGE_SIZE, PAGE_SIZE)
    process.fill(BASE + 2 * PAGE_SIZE, PAGE_SIZE, 0x99)
    process.read(BASE + 3 * PAGE_SIZE, 1)
    process.write(BASE + 3 * PAGE_SIZE, b"w")
    data[100:104] = b"mine"
    data[PAGE_SIZE] = 1
    data[2 * PAGE_SIZE : 3 * PAGE_SIZE] = contents(0x99)
    data[3 * PAGE_SIZE] = ord("w")
    assert process.read(BASE, 4 * PAGE_SIZE) == data
    assert mm.swap.used_bytes == 0


def test_nothing_is_found_in_a_swapped_page_that_is_not_there(mm: MemoryManager) -> None:
    """find_nonzero looks where the page is, and brings nothing back."""
    process = mm.spawn()
    process.mmap(4 * PAGE_SIZE, MAP_FIXED, BASE)
    process.fill(BASE, 3 * PAGE_SIZE, 0)
    process.write(BASE + 2 * PAGE_SIZE + 803, b"!")
    process.madvise(BASE, 3 * PAGE_SIZE, MADV_PAGEOUT)
    assert process.find_nonzero(BASE, 2 * PAGE_SIZE) is None
    assert process.find_nonzero(BASE, 4 * PAGE_SIZE) == BASE + 2 * PAGE_SIZE + 800
    assert process.rss == 0


def test_what_is_not_a_page_stays(mm: MemoryManager) -> None:
    """The zero page, what was never touched, and what is out already."""
    process = mm.spawn()
    data = patterned(process, 2)
    process.mmap(4 * PAGE_SIZE, MAP_FIXED, BASE + 2 * PAGE_SIZE)
    process.read(BASE + 3 * PAGE_SIZE, 1)
    for _ in range(2):
        process.madvise(BASE, 6 * PAGE_SIZE, MADV_PAGEOUT)
        assert mm.swap.used_bytes == 2 * PAGE_SIZE
    assert pfn_at(mm, process, BASE + 3 * PAGE_SIZE) == int(mm.mem.vm[0].empty_zero_page)
    assert int(mm.mem.mem_map[int(mm.mem.vm[0].empty_zero_page)]._refcount) == 1
    assert process.read(BASE, 6 * PAGE_SIZE) == data + bytes(4 * PAGE_SIZE)
    verify_mappings(mm, [process])


def test_a_page_that_somebody_holds_stays(mm: MemoryManager) -> None:
    process = mm.spawn()
    patterned(process, 2)
    pfn = pfn_at(mm, process, BASE)
    assert pfn is not None
    mm.mem.mem_map[pfn]._refcount += 1
    process.madvise(BASE, 2 * PAGE_SIZE, MADV_PAGEOUT)
    assert (process.rss, mm.swap.used_bytes) == (PAGE_SIZE, PAGE_SIZE)
    assert pfn_at(mm, process, BASE) == pfn


def test_calls_that_are_refused(boot: Boot, mm: MemoryManager) -> None:
    process = mm.spawn()
    addr = process.mmap(PAGE_SIZE)
    with pytest.raises(BadAddress):
        process.madvise(addr, 2 * PAGE_SIZE, MADV_PAGEOUT)
    process._vmas[0][0].hstate = 0
    with pytest.raises(MmError, match="-EINVAL: hugetlb"):
        process.madvise(addr, PAGE_SIZE, MADV_PAGEOUT)
    process._vmas[0][0].hstate = -1
    for size in (-PAGE_SIZE, 1):
        with pytest.raises(UsageError, match="swap area"):
            boot(4, swap_size=size)


# ------------------------------------------------------------------ slots


@pytest.mark.parametrize("how", ["munmap", "drop", "exit"])
def test_slots_go_with_what_they_were_for(mm: MemoryManager, how: str) -> None:
    before = free_pages(mm)
    process = mm.spawn()
    patterned(process, 16)
    process.madvise(BASE, 16 * PAGE_SIZE, MADV_PAGEOUT)
    if how == "exit":
        process.exit()
        assert mm.swap.used_bytes == 0
        assert free_pages(mm) == before
        verify(mm)
        return
    call = process.munmap if how == "munmap" else lambda at, size: process.madvise(at, size, MADV_DONTNEED)
    call(BASE + 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert mm.swap.used_bytes == 13 * PAGE_SIZE
    verify_mappings(mm, [process])
    if how == "drop":
        assert process.read(BASE + 2 * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    call(BASE, 16 * PAGE_SIZE)
    assert mm.swap.used_bytes == 0
    verify(mm)


def test_without_room_in_the_area_pages_stay(mm: MemoryManager) -> None:
    """1 MiB holds 256 of 300 pages; then nothing goes out any more, and nothing is lost."""
    process = mm.spawn()
    process.mmap(300 * PAGE_SIZE, MAP_FIXED, BASE)
    for page in range(300):
        process.fill(BASE + page * PAGE_SIZE, PAGE_SIZE, page % 255 + 1)
    process.madvise(BASE, 300 * PAGE_SIZE, MADV_PAGEOUT)
    assert (process.rss, mm.swap.used_bytes) == (44 * PAGE_SIZE, MIB)
    process.madvise(BASE, 300 * PAGE_SIZE, MADV_PAGEOUT)
    assert process.rss == 44 * PAGE_SIZE
    for page in (0, 17, 255, 256, 299):
        assert process.read(BASE + page * PAGE_SIZE, PAGE_SIZE) == contents(page % 255 + 1)
    verify_mappings(mm, [process])


def test_a_guest_without_swap_keeps_its_pages(boot: Boot) -> None:
    mm = boot(8)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.write(addr, b"x")
    process.madvise(addr, HUGE, MADV_PAGEOUT)
    assert is_huge(mm, process, addr)
    assert (mm.swap.total_bytes, mm.swap.used_bytes) == (0, 0)


def test_slots_side_by_side_are_found_aligned(boot: Boot) -> None:
    """The search goes on where it ended, comes around once, and says when there are none."""
    mm = boot(4, swap_size=10 * PAGE_SIZE)
    slots = [int(folio_alloc_swap(mm.mem, order)) for order in (0, 2, 0, 1, 1, 0)]
    assert slots == [0, 4, 8, 2, NO_SLOT, 9]
    swap_free(mm.mem, 4)
    swap_free(mm.mem, 9)
    assert int(mm.mem.vm[0].nr_swap_pages) == 3
    assert int(folio_alloc_swap(mm.mem, 1)) == NO_SLOT
    swap_free(mm.mem, 5)
    assert [int(folio_alloc_swap(mm.mem, order)) for order in (2, 1, 0, 0, 0)] == [NO_SLOT, 4, 9, 1, NO_SLOT]


# ------------------------------------------------------------------ zeros and hints


def test_a_swapped_page_is_not_zeroed_when_it_comes_back(mm: MemoryManager) -> None:
    """Patch 16: every byte is read from the area. A hint is dropped, and the area's bytes win."""
    process = mm.spawn()
    data = patterned(process, 4)
    process.madvise(BASE, 4 * PAGE_SIZE, MADV_PAGEOUT)
    FakeHost(mm, capacity=1, order=0).register()
    mm.drain_all_pages()
    mm.page_reporting.flush(10_000)
    before = mm.vm_stats()
    assert process.read(BASE, 4 * PAGE_SIZE) == data
    after = mm.vm_stats()
    assert after.zeroed_bytes == before.zeroed_bytes
    assert after.known_zero_bytes == before.known_zero_bytes
    assert after.dropped_hint_bytes - before.dropped_hint_bytes == 4 * PAGE_SIZE
    pfn = pfn_at(mm, process, BASE)
    assert pfn is not None
    assert not is_marked_zero(mm.mem, pfn)
    verify(mm)


def test_a_zero_page_written_back_reads_as_zeros_in_any_mapping(mm: MemoryManager) -> None:
    process = mm.spawn()
    process.mmap(2 * PAGE_SIZE, MAP_FIXED | MAP_UNINITIALIZED, BASE)
    process.fill(BASE, 2 * PAGE_SIZE, 0)
    process.madvise(BASE, 2 * PAGE_SIZE, MADV_PAGEOUT)
    dirty_free_memory(mm)
    assert process.read(BASE, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)


FAULTS = f"""
from hostzero.mm.mmap import MADV_PAGEOUT
with booted(4, thp="never", anon_orders=(3,), swap_size=1 << 20) as mm:
    process = mm.spawn()
    process.mmap(1 << 20, {MAP_FIXED}, 1 << 30)
    process.fill(1 << 30, 9 << 12, 7)
    process.madvise(1 << 30, 9 << 12, MADV_PAGEOUT)
    start()
    process.read((1 << 30) + 5 * 4096 + 77, 1)
    process.write((1 << 30) + 8 * 4096 + 3, b"x")
"""


def test_the_raw_fault_address_reaches_the_allocator_without_a_wish_for_zeros() -> None:
    """Patch 16, of a large folio and of a page that was split off one."""
    assert spy(FAULTS) == [
        ("hook", 3, BASE + 5 * PAGE_SIZE, False),
        ("hook", 0, BASE + 8 * PAGE_SIZE, False),
    ]


# ------------------------------------------------------------------ large folios and huge pages


def test_a_large_folio_goes_and_comes_whole(boot: Boot) -> None:
    mm = boot(4, thp="never", anon_orders=(4,), swap_size=MIB)
    process = mm.spawn()
    data = patterned(process, 32)
    process.madvise(BASE, 32 * PAGE_SIZE, MADV_PAGEOUT)
    assert mm.swap.used_bytes == 32 * PAGE_SIZE
    verify(mm)
    dirty_free_memory(mm)
    faults = mm.vm_stats().pgfault
    assert process.read(BASE, 32 * PAGE_SIZE) == data
    assert (mm.vm_stats().pgfault, mm.vm_stats().pgmajfault) == (faults + 2, 2)
    pfn = pfn_at(mm, process, BASE + 20 * PAGE_SIZE)
    assert pfn is not None
    assert order_of(mm, pfn) == 4
    verify_mappings(mm, [process])


def test_a_part_of_a_large_folio_goes_alone(boot: Boot) -> None:
    """The folio is split: the part is free at once, the rest are pages of their own."""
    mm = boot(4, thp="never", anon_orders=(3,), swap_size=MIB)
    process = mm.spawn()
    data = patterned(process, 8)
    process.munmap(BASE, PAGE_SIZE)
    free = free_pages(mm)
    process.madvise(BASE + 2 * PAGE_SIZE, 2 * PAGE_SIZE, MADV_PAGEOUT)
    assert free_pages(mm) == free + 3  # two went out, and one had been unmapped
    assert mm.swap.used_bytes == 2 * PAGE_SIZE
    for page in (1, 4, 5, 6, 7):
        pfn = pfn_at(mm, process, BASE + page * PAGE_SIZE)
        assert pfn is not None
        assert order_of(mm, pfn) == 0
        assert int(mm.mem.mem_map[pfn].mapping) == process._mm_id
        assert int(mm.mem.mem_map[pfn].index) == (BASE >> 12) + page
    verify_mappings(mm, [process])
    verify(mm)
    assert process.read(BASE + PAGE_SIZE, 7 * PAGE_SIZE) == data[PAGE_SIZE:]
    process.exit()
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


def test_a_large_folio_without_slots_side_by_side_goes_in_parts(boot: Boot) -> None:
    mm = boot(4, thp="never", anon_orders=(2,), swap_size=8 * PAGE_SIZE)
    process = mm.spawn()
    data = patterned(process, 4)
    for slot in (1, 6):
        mm.mem.swap_map[slot] = 1
    mm.mem.vm[0].nr_swap_pages -= 2
    process.madvise(BASE, 4 * PAGE_SIZE, MADV_PAGEOUT)
    assert [table_entries(mm, process, BASE + page * PAGE_SIZE)[-1] >> 12 for page in range(4)] == [
        0,
        2,
        3,
        4,
    ]
    assert process.read(BASE, 4 * PAGE_SIZE) == data
    assert [order_of(mm, pfn_at(mm, process, BASE + page * PAGE_SIZE) or 0) for page in range(4)] == [0] * 4
    verify(mm)


@pytest.mark.parametrize("page", [0, 200, 511])
def test_a_huge_page_is_split_and_goes(boot: Boot, page: int) -> None:
    """A part of it, or all; the rest stays mapped by small entries."""
    mm = boot(8, swap_size=4 * MIB)
    process = mm.spawn()
    process.mmap(HUGE, MAP_FIXED, BASE)
    process.fill(BASE, HUGE, 0x42)
    process.write(BASE + page * PAGE_SIZE, b"here")
    process.madvise(BASE + page * PAGE_SIZE, PAGE_SIZE, MADV_PAGEOUT)
    assert (process.rss, mm.swap.used_bytes) == (HUGE - PAGE_SIZE, PAGE_SIZE)
    process.madvise(BASE, HUGE, MADV_PAGEOUT)
    assert (process.rss, mm.swap.used_bytes) == (0, HUGE)
    verify_mappings(mm, [process])
    assert process.read(BASE + page * PAGE_SIZE, PAGE_SIZE) == b"here" + contents(0x42, PAGE_SIZE - 4)
    process.exit()
    assert mm.swap.used_bytes == 0
    verify(mm)


def test_a_huge_page_that_cannot_be_split_stays(boot: Boot) -> None:
    mm = boot(8, swap_size=4 * MIB)
    process = mm.spawn()
    process.mmap(HUGE, MAP_FIXED, BASE)
    process.fill(BASE, HUGE, 0x42)
    occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
    process.madvise(BASE, HUGE, MADV_PAGEOUT)
    assert is_huge(mm, process, BASE)
    assert mm.swap.used_bytes == 0
    assert mapped(mm, process, BASE) == contents(0x42, HUGE)


# ------------------------------------------------------------------ failures


def test_coming_back_is_charged_and_may_fail(boot: Boot) -> None:
    """At the limit the large folio is refused first, then the page; the slots keep what they hold."""
    mm = boot(4, thp="never", anon_orders=(2,), swap_size=MIB)
    process = mm.spawn()
    process.memcg = memcg = mm.memcg.create(None)
    data = patterned(process, 8)
    process.madvise(BASE, 8 * PAGE_SIZE, MADV_PAGEOUT)
    assert mm.memcg.usage_bytes(memcg) == 0
    mm.memcg.set_max(memcg, 0)
    with pytest.raises(MemcgOutOfMemory):
        process.read(BASE, 1)
    assert mm.swap.used_bytes == 8 * PAGE_SIZE
    mm.memcg.set_max(memcg, 2 * PAGE_SIZE)
    assert process.read(BASE, 2 * PAGE_SIZE) == data[: 2 * PAGE_SIZE]
    assert mm.memcg.usage_bytes(memcg) == 2 * PAGE_SIZE
    assert mm.vm_stats().zeroed_in_vain_bytes == 0
    verify_mappings(mm, [process])
    mm.memcg.set_max(memcg, None)
    assert process.read(BASE, 8 * PAGE_SIZE) == data
    verify(mm)


def test_without_memory_a_page_stays_out(mm: MemoryManager) -> None:
    process = mm.spawn()
    data = patterned(process, 2)
    process.madvise(BASE, 2 * PAGE_SIZE, MADV_PAGEOUT)
    occupy(mm)
    with pytest.raises(OutOfMemory):
        process.read(BASE, 1)
    assert mm.swap.used_bytes == 2 * PAGE_SIZE
    other = np.flatnonzero(mm.mem.swap_map)
    assert [bytes(mm.swap.slot(int(slot))) for slot in other] == [data[:PAGE_SIZE], data[PAGE_SIZE:]]


def test_advice_against_huge_pages_holds_for_swap_too(boot: Boot) -> None:
    mm = boot(4, thp="never", anon_orders=(2,), swap_size=MIB)
    process = mm.spawn()
    data = patterned(process, 4)
    process.madvise(BASE, 4 * PAGE_SIZE, MADV_PAGEOUT)
    process.madvise(BASE, 4 * PAGE_SIZE, MADV_NOHUGEPAGE)
    assert process.read(BASE, PAGE_SIZE) == data[:PAGE_SIZE]
    assert process.rss == PAGE_SIZE
