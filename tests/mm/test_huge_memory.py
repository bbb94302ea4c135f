# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.errors import OutOfMemory
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_UNINITIALIZED,
)
from hostzero.mm.page_flags import PG_head
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, dirty_free_memory, is_marked_zero, page_bytes, verify
from tests.mm.processes import (
    HUGE,
    FakeHost,
    contents,
    fragment,
    free_pages,
    is_huge,
    mapped,
    occupy,
    pfn_at,
    release_blocks,
)
from tests.mm.spy import spy


@pytest.fixture
def dirty_mm(mm: MemoryManager) -> MemoryManager:
    """A guest whose free memory is dirty."""
    dirty_free_memory(mm)
    return mm


def test_a_write_maps_a_zeroed_huge_page(dirty_mm: MemoryManager) -> None:
    mm = dirty_mm
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.write(addr + 77777, b"abc")
        assert is_huge(mm, process, addr)
        assert process.rss == HUGE
        assert mm.vm_stats().thp_fault_alloc == 1
        assert mm.vm_stats().pgfault == 1
        expected = bytearray(HUGE)
        expected[77777:77780] = b"abc"
        assert mapped(mm, process, addr) == expected
        assert process.read(addr + 77770, 20) == expected[77770:77790]
        verify(mm)


def test_a_huge_page_is_one_folio(dirty_mm: MemoryManager) -> None:
    mm = dirty_mm
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.write(addr + 5 * PAGE_SIZE, b"x")
        head = pfn_at(mm, process, addr)
        assert head is not None
        page = mm.mem.mem_map[head]
        assert int(page.flags_f) & PG_head
        assert (int(page.order), int(page._refcount), int(page._mapcount)) == (9, 1, 0)
        assert int(page.index) == addr >> 12
        tails = mm.mem.mem_map[head + 1 : head + 512]
        assert (mm.mem.compound_head[head + 1 : head + 512] == head << 1 | 1).all()
        assert (tails._refcount == 0).all()
    assert int(mm.mem.mem_map[head].flags_f) & PG_head == 0
    verify(mm)


@pytest.mark.parametrize(
    ("thp", "advice", "huge"),
    [
        ("always", None, True),
        ("always", MADV_HUGEPAGE, True),
        ("always", MADV_NOHUGEPAGE, False),
        ("madvise", None, False),
        ("madvise", MADV_HUGEPAGE, True),
        ("madvise", MADV_NOHUGEPAGE, False),
        ("never", None, False),
        ("never", MADV_HUGEPAGE, False),
        ("never", MADV_NOHUGEPAGE, False),
    ],
)
def test_who_gets_huge_pages(boot: Boot, thp: str, advice: int | None, huge: bool) -> None:
    """/sys/kernel/mm/transparent_hugepage/enabled against madvise."""
    mm = boot(8, thp=thp)
    dirty_free_memory(mm)
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        if advice is not None:
            process.madvise(addr, HUGE, advice)
        process.write(addr, b"x")
        assert is_huge(mm, process, addr) == huge
        assert process.rss == (HUGE if huge else PAGE_SIZE)
        # Not allowed is no fallback: there was nothing to fall back from.
        assert mm.vm_stats().thp_fault_fallback == 0
        seen = HUGE if huge else PAGE_SIZE
        assert mapped(mm, process, addr, seen) == b"x" + bytes(seen - 1)


def test_the_last_advice_counts(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
        process.madvise(addr, HUGE, MADV_HUGEPAGE)
        process.write(addr, b"x")
        assert is_huge(mm, process, addr)


def test_only_whole_2_mib_inside_the_mapping_become_huge(dirty_mm: MemoryManager) -> None:
    """An unaligned mapping of 4 MiB has one aligned 2 MiB piece; its edges get small pages."""
    mm = dirty_mm
    with mm.spawn() as process:
        start = (1 << 30) + HUGE // 2
        process.mmap(2 * HUGE, MAP_FIXED, start)
        for at in (start, (1 << 30) + HUGE, (1 << 30) + 2 * HUGE):
            process.write(at, b"x")
        assert not is_huge(mm, process, start)
        assert is_huge(mm, process, (1 << 30) + HUGE)
        assert not is_huge(mm, process, (1 << 30) + 2 * HUGE)
        assert process.rss == HUGE + 2 * PAGE_SIZE
        for at in (start, (1 << 30) + HUGE, (1 << 30) + 2 * HUGE):
            assert process.read(at, 2 * PAGE_SIZE) == b"x" + bytes(2 * PAGE_SIZE - 1)
        assert mapped(mm, process, (1 << 30) + HUGE) == b"x" + bytes(HUGE - 1)


def test_without_a_free_block_small_pages_do(dirty_mm: MemoryManager) -> None:
    """Fragmented memory: order 9 fails, the fault falls back to order 0 and is zeroed all the same."""
    mm = dirty_mm
    fragment(mm)
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.madvise(addr, HUGE, MADV_POPULATE_WRITE)
        assert not is_huge(mm, process, addr)
        assert process.rss == HUGE
        assert mapped(mm, process, addr) == bytes(HUGE)
        stats = mm.vm_stats()
        assert (stats.thp_fault_alloc, stats.thp_fault_fallback) == (0, 1)
        verify(mm)


def test_uninitialized_mappings_keep_old_bytes(dirty_mm: MemoryManager) -> None:
    """The floor of the benchmark: no zeroing, and no hint consumed."""
    mm = dirty_mm
    before = mm.vm_stats().zeroed_bytes
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_UNINITIALIZED)
        process.touch(addr + HUGE - PAGE_SIZE, PAGE_SIZE)
        assert is_huge(mm, process, addr)
        assert process.read(addr, PAGE_SIZE) == contents(0x5A)
        # The page tables are zeroed pages even so: top, two levels.
        assert mm.vm_stats().zeroed_bytes - before == 3 * PAGE_SIZE


def test_a_reported_block_becomes_a_huge_page_unzeroed(dirty_mm: MemoryManager) -> None:
    mm = dirty_mm
    FakeHost(mm, capacity=1, order=9).register()
    mm.page_reporting.flush(100)
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.write(addr, b"")
        before = mm.vm_stats()
        process.write(addr + 123456, b"y")
        after = mm.vm_stats()
        assert is_huge(mm, process, addr)
        assert after.known_zero_bytes - before.known_zero_bytes >= HUGE
        assert after.zeroed_bytes == before.zeroed_bytes + 2 * PAGE_SIZE  # two page tables
        assert mapped(mm, process, addr).count(0) == HUGE - 1
        head = pfn_at(mm, process, addr)
        assert head is not None
        assert not is_marked_zero(mm.mem, head)
    # What a process wrote to is not known zero when it comes back.
    assert not is_marked_zero(mm.mem, head)
    verify(mm)


# ------------------------------------------------------------------ splitting


@pytest.mark.parametrize("part", [(0, 1), (511, 1), (100, 7), (0, 511), (1, 511)])
def test_a_part_of_a_huge_page_goes_alone(dirty_mm: MemoryManager, part: tuple[int, int]) -> None:
    """Unmapping a part splits: the rest keeps its bytes and its pages, the part is freed."""
    mm = dirty_mm
    first, count = part
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.touch(addr, PAGE_SIZE)
        head = pfn_at(mm, process, addr)
        assert head is not None
        for page in range(512):
            page_bytes(mm, head + page)[0] = 0
            page_bytes(mm, head + page)[page] = 1 + page % 255
        free = free_pages(mm)
        process.munmap(addr + first * PAGE_SIZE, count * PAGE_SIZE)
        assert free_pages(mm) == free + count - 1  # the table of small pages
        assert process.rss == HUGE - count * PAGE_SIZE
        verify(mm)
        for page in set(range(512)) - set(range(first, first + count)):
            at = addr + page * PAGE_SIZE
            expected = bytearray(PAGE_SIZE)
            expected[page] = 1 + page % 255
            assert mapped(mm, process, at, PAGE_SIZE) == expected
            record = mm.mem.mem_map[head + page]
            assert pfn_at(mm, process, at) == head + page
            assert (int(record._refcount), int(record._mapcount)) == (1, 0)
            assert int(record.index) == at >> 12
            assert (int(record.flags_f) & PG_head, int(record.order)) == (0, 0)
            assert int(record.mapping) == process._mm_id
            assert int(mm.mem.compound_head[head + page]) == 0
        assert mm.vm_stats().bad_pages == 0
    verify(mm)


def test_a_dropped_part_reads_as_zero_again(dirty_mm: MemoryManager) -> None:
    mm = dirty_mm
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.fill(addr, HUGE, 0xEE)
        process.madvise(addr + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        assert process.read(addr, 3 * PAGE_SIZE) == (contents(0xEE) + contents(0) + contents(0xEE))
        process.write(addr + PAGE_SIZE, b"n")
        assert process.read(addr + PAGE_SIZE, PAGE_SIZE) == b"n" + bytes(PAGE_SIZE - 1)
        verify(mm)


def test_a_split_without_a_page_for_its_table(dirty_mm: MemoryManager) -> None:
    """Unmapping fails with OutOfMemory, everything stays readable, and exit needs no page."""
    mm = dirty_mm
    before = free_pages(mm)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.fill(addr, HUGE, 0xCD)
    taken = occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
    with pytest.raises(OutOfMemory, match="splitting a huge page"):
        process.munmap(addr + PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(OutOfMemory, match="splitting a huge page"):
        process.madvise(addr, PAGE_SIZE, MADV_DONTNEED)
    assert mapped(mm, process, addr) == contents(0xCD, HUGE)
    assert mm.vm_stats().oom_kill == 2
    verify(mm)
    process.exit()
    for pfn in taken:
        mm.free_pages(Pfn(pfn))
    assert free_pages(mm) == before
    verify(mm)


def test_an_oom_notifier_can_save_a_split(dirty_mm: MemoryManager) -> None:
    mm = dirty_mm
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.fill(addr, HUGE, 0xCD)
    taken = occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)

    def give_back() -> int:
        for pfn in taken[:16]:
            mm.free_pages(Pfn(pfn))
        return 16

    mm.register_oom_notifier(give_back)
    process.munmap(addr + PAGE_SIZE, PAGE_SIZE)
    assert process.rss == HUGE - PAGE_SIZE
    assert mm.vm_stats().oom_kill == 0
    verify(mm)


def test_a_huge_page_under_two_mappings_goes_whole(dirty_mm: MemoryManager) -> None:
    """madvise cut the mapping, not the page: unmapping both sides needs no page for a split."""
    mm = dirty_mm
    process = mm.spawn()
    addr = process.mmap(2 * HUGE)
    process.write(addr, b"x")
    process.madvise(addr, PAGE_SIZE, MADV_NOHUGEPAGE)
    assert is_huge(mm, process, addr)
    occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
    free = free_pages(mm)
    process.munmap(addr, HUGE)
    assert free_pages(mm) == free + 512 + 2
    verify(mm)


def test_exit_of_a_cut_mapping_needs_no_memory(dirty_mm: MemoryManager) -> None:
    mm = dirty_mm
    before = free_pages(mm)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.write(addr, b"x")
    process.madvise(addr + HUGE // 2, PAGE_SIZE, MADV_NOHUGEPAGE)
    taken = occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
    process.exit()
    for pfn in taken:
        mm.free_pages(Pfn(pfn))
    assert free_pages(mm) == before
    verify(mm)


def test_a_failed_unmap_leaks_no_tables(boot: Boot) -> None:
    """The first mapping goes, the second cannot be split: after exit every page is back."""
    mm = boot(8)
    before = free_pages(mm)
    process = mm.spawn()
    process.mmap(PAGE_SIZE, MAP_FIXED, 0)
    process.write(0, b"x")
    process.mmap(HUGE, MAP_FIXED, 5 << 30)
    process.write(5 << 30, b"x")
    taken = occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
    mm.mem.zone[0].watermark_min += 4  # what the first mapping gives back must not do for the split
    mm.mem.zone[0].watermark_low += 4
    with pytest.raises(OutOfMemory):
        process.munmap(0, (5 << 30) + PAGE_SIZE)
    process.exit()
    for pfn in taken:
        mm.free_pages(Pfn(pfn))
    assert free_pages(mm) == before
    verify(mm)


# ------------------------------------------------------------------ the fault address

FAULTS = f"""
with booted(8) as mm:
    start()
    process = mm.spawn()
    huge = process.mmap(2 << 20, {MAP_FIXED}, 0)
    process.write(5 * 4096 + 123, b"x")
    small = process.mmap(1 << 20, {MAP_FIXED}, 1 << 30)
    process.write(small + 9 * 4096 + 77, b"x")
    process.munmap(0, 2 << 20)
    process.mmap(2 << 20, {MAP_FIXED}, 0)
    process.write(1, b"x")
"""


def test_the_raw_fault_address_travels_to_the_zeroing() -> None:
    """Patches 7, 15 and 18: not the aligned address; and address 0 is an address, not "none"."""
    assert [(what, order, addr) for what, order, addr, _ in spy(FAULTS)] == [
        ("hook", 9, 5 * PAGE_SIZE),
        ("zero", 9, 5 * PAGE_SIZE),
        ("hook", 0, (1 << 30) + 9 * PAGE_SIZE),
        ("zero", 0, (1 << 30) + 9 * PAGE_SIZE),
        ("hook", 9, 0),
        ("zero", 9, 0),
    ]


def test_the_zeroing_is_complete_wherever_the_fault_was(boot: Boot) -> None:
    """Every position of the fault in the folio zeroes every page of it."""
    mm = boot(8)
    with mm.spawn() as process:
        for page in (0, 1, 2, 255, 510, 511):
            dirty_free_memory(mm)
            addr = process.mmap(HUGE)
            process.write(addr + page * PAGE_SIZE + 4095, b"\x01")
            assert is_huge(mm, process, addr)
            found = mapped(mm, process, addr)
            assert found.count(0) == HUGE - 1
            assert found[page * PAGE_SIZE + 4095] == 1
            process.munmap(addr, HUGE)


def test_blocks_of_a_fragmented_guest_come_back_as_huge_pages(mm: MemoryManager) -> None:
    stay = fragment(mm)
    for pfn in stay:
        mm.free_pages(Pfn(pfn))
    mm.drain_all_pages()
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.write(addr, b"x")
        assert is_huge(mm, process, addr)
    occupy(mm)
    release_blocks(mm, [(1024, 9)])
    dirty(mm, 1024, 9)
    assert mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 9) == 1024
