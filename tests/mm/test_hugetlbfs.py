# SPDX-License-Identifier: GPL-2.0-only
"""Files of huge pages: what is shared, what is freed when, and pages for drivers (patch 21)."""

from __future__ import annotations

import pytest

from hostzero.errors import MmError, OutOfMemory
from hostzero.mm import MemoryManager, Process
from hostzero.mm.hugetlb_pool import HPG_zeroed
from hostzero.mm.hugetlbfs import HugetlbFile
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
)
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PG_hwpoison
from tests.mm.conftest import Boot
from tests.mm.guest import page_bytes, reads_zero, verify
from tests.mm.huge import GIGANTIC, GIGANTIC_SIZE, counters, head_at, hpg_zeroed, in_pool, pool
from tests.mm.processes import HUGE, FakeHost, free_pages, mapped, pfn_at


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with a pool of four pages."""
    return pool(boot(16), 4)


@pytest.fixture
def file(mm: MemoryManager) -> HugetlbFile:
    """An empty file of three pages."""
    return mm.hugetlb.create_file(3 * HUGE)


# ------------------------------------------------------------------ mappings of a file


def test_shared_mappings_see_the_same_bytes(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as one, mm.spawn() as other:
        a = one.mmap(2 * HUGE, MAP_SHARED, file=file)
        b = other.mmap(HUGE, MAP_SHARED, file=file, offset=HUGE)
        one.write(a + HUGE + 7, b"hello")
        assert other.read(b + 7, 5) == b"hello"
        other.write(b + 7, b"HE")
        assert one.read(a + HUGE + 7, 5) == b"HEllo"
        assert head_at(mm, one, a + HUGE) == head_at(mm, other, b) == int(file.pages[1])
        page = mm.mem.mem_map[int(file.pages[1])]
        assert (int(page._refcount), int(page._mapcount)) == (3, 1)
        assert (int(page.mapping), int(page.index)) == (0, 512)
        assert mapped(mm, one, a + HUGE).count(0) == HUGE - 5
        verify(mm)
    assert file.nr_pages == 1
    assert mm.hugetlb.counters() == counters(4, 3, rsvd=1)
    verify(mm)


def test_a_files_pages_outlive_its_mappings(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        process.fill(process.mmap(HUGE, MAP_SHARED, file=file), HUGE, 0x42)
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_SHARED, file=file)
        assert process.read(addr, 4) == b"\x42" * 4
        assert mm.hugetlb.counters() == counters(4, 3)
        file.close()
        file.close()
        assert process.read(addr + HUGE - 4, 4) == b"\x42" * 4
        verify(mm)
    assert mm.hugetlb.counters() == counters(4, 4)
    verify(mm)


def test_holes_are_reserved_once_however_often_they_are_mapped(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        process.mmap(2 * HUGE, MAP_SHARED, file=file)
        assert mm.hugetlb.counters() == counters(4, 4, rsvd=2)
        addr = process.mmap(3 * HUGE, MAP_SHARED, file=file)
        assert mm.hugetlb.counters() == counters(4, 4, rsvd=3)
        process.touch(addr, 3 * HUGE)
        assert mm.hugetlb.counters() == counters(4, 1)
        process.mmap(3 * HUGE, MAP_SHARED, file=file)
        assert mm.hugetlb.counters() == counters(4, 1)
        verify(mm)


def test_a_private_mapping_reserves_for_its_copies(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        file.fallocate(0, HUGE)
        addr = process.mmap(2 * HUGE, MAP_PRIVATE, file=file)
        assert mm.hugetlb.counters() == counters(4, 3, rsvd=2)
        process.touch(addr, 2 * HUGE)
        assert mm.hugetlb.counters() == counters(4, 1)
        assert file.nr_pages == 1
        verify(mm)
    assert mm.hugetlb.counters() == counters(4, 3)


def test_a_mapping_extends_its_file(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        process.mmap(HUGE, MAP_SHARED | MAP_NORESERVE, file=file, offset=4 * HUGE)
        assert file.size == 5 * HUGE


def test_a_mapping_must_start_on_a_page_of_an_open_file(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        for offset in (4096, -HUGE):
            with pytest.raises(MmError, match="-EINVAL"):
                process.mmap(HUGE, MAP_SHARED, file=file, offset=offset)
        file.close()
        with pytest.raises(MmError, match="-EBADF"):
            process.mmap(HUGE, MAP_SHARED, file=file)
        assert mm.hugetlb.counters() == counters(4, 4)


def test_a_shared_anonymous_mapping_is_a_file_of_its_own(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB | MAP_SHARED)
        process.fill(addr, HUGE, 0x31)
        process.madvise(addr, HUGE, MADV_DONTNEED)
        assert process.read(addr, 2) == b"\x31\x31"  # the file has it still
        verify(mm)
    assert mm.hugetlb.counters() == counters(4, 4)


# ------------------------------------------------------------------ fallocate, truncate


def test_fallocate_fills_holes_with_zeroed_pages(mm: MemoryManager, file: HugetlbFile) -> None:
    file.fallocate(HUGE - 1, 2)
    assert (file.pages[:2] != NO_PAGE).tolist() == [True, True]
    kept = file.pages[:2].tolist()
    page_bytes(mm, kept[0])[0] = 9
    file.fallocate(0, 4 * HUGE)
    assert file.size == 4 * HUGE
    assert file.pages[:2].tolist() == kept
    assert mm.hugetlb.counters() == counters(4, 0)
    assert all(reads_zero(mm, int(pfn), 9) for pfn in file.pages[1:])
    assert page_bytes(mm, kept[0])[0] == 9
    assert [int(mm.mem.mem_map[int(pfn)]._refcount) for pfn in file.pages] == [1] * 4
    with pytest.raises(OutOfMemory):
        file.fallocate(4 * HUGE, HUGE)
    verify(mm)


@pytest.mark.parametrize("mode", ["allocator", "caller"])
def test_fallocate_uses_what_the_host_zeroed(boot: Boot, mode: str) -> None:
    """Patch 20: hugetlbfs_fallocate passes __GFP_ZERO and a surplus page may be known zero."""
    mm = pool(boot(16, user_zeroing=mode), 0, overcommit=2)
    FakeHost(mm, capacity=1, order=9).register()
    mm.page_reporting.flush(100)
    file = mm.hugetlb.create_file(2 * HUGE)
    before = mm.vm_stats().zeroed_bytes
    file.fallocate(0, 2 * HUGE)
    assert mm.vm_stats().zeroed_bytes - before == (0 if mode == "allocator" else 2 * HUGE)
    assert all(reads_zero(mm, int(pfn), 9) for pfn in file.pages)
    verify(mm)


def test_fallocate_uses_the_files_reservations(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        process.mmap(3 * HUGE, MAP_SHARED, file=file)
        process.mmap(HUGE, MAP_HUGETLB)
        file.fallocate(0, 3 * HUGE)
        assert mm.hugetlb.counters() == counters(4, 1, rsvd=1)
        verify(mm)


def test_truncating_unmaps_and_frees(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as one, mm.spawn() as other:
        shared = one.mmap(3 * HUGE, MAP_SHARED, file=file)
        private = other.mmap(HUGE, MAP_NORESERVE, file=file, offset=HUGE)
        one.fill(shared, 2 * HUGE, 0x55)
        other.write(private, b"copy")
        assert mm.hugetlb.counters() == counters(4, 1, rsvd=1)
        file.truncate(HUGE)
        assert mm.hugetlb.counters() == counters(4, 3)
        assert pfn_at(mm, one, shared + HUGE) is None
        assert pfn_at(mm, other, private) is None  # private copies too
        assert one.read(shared, 1) == b"\x55"
        file.truncate(2 * HUGE)
        assert one.read(shared + HUGE, 8) == bytes(8)
        verify(mm)


def test_punching_a_hole_frees_whole_pages_and_zeroes_the_rest(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        addr = process.mmap(3 * HUGE, MAP_SHARED, file=file)
        process.fill(addr, 3 * HUGE, 0x66)
        file.punch_hole(HUGE - 5, HUGE + 8)
        assert (file.pages == NO_PAGE).tolist() == [False, True, False]
        assert process.read(addr + HUGE - 8, 8) == b"\x66" * 3 + bytes(5)
        assert process.read(addr + 2 * HUGE, 8) == bytes(3) + b"\x66" * 5
        assert pfn_at(mm, process, addr + HUGE) is None
        file.punch_hole(10, 20)
        assert process.read(addr, 40) == b"\x66" * 10 + bytes(20) + b"\x66" * 10
        file.punch_hole(2 * HUGE, 10 * HUGE)
        assert file.size == 3 * HUGE
        assert file.nr_pages == 1
        assert mm.hugetlb.counters() == counters(4, 3)
        verify(mm)


def test_what_a_file_cannot_do(mm: MemoryManager, file: HugetlbFile) -> None:
    for offset, length in ((0, 0), (-1, 5), (0, -HUGE)):
        with pytest.raises(MmError, match="-EINVAL"):
            file.fallocate(offset, length)
        with pytest.raises(MmError, match="-EINVAL"):
            file.punch_hole(offset, length)
    for size in (-HUGE, 5):
        with pytest.raises(MmError, match="-EINVAL"):
            file.truncate(size)
    file.close()
    with pytest.raises(MmError, match="-EBADF"):
        file.fallocate(0, HUGE)
    with pytest.raises(MmError, match="-EBADF"):
        file.truncate(HUGE)


def test_a_gigantic_file_gives_its_pages_back(boot: Boot) -> None:
    mm = boot(24, gigantic_order=GIGANTIC)
    free = free_pages(mm)
    mm.hugetlb.set_nr_overcommit(1, GIGANTIC)
    file = mm.hugetlb.create_file(GIGANTIC_SIZE, GIGANTIC)
    for _ in range(2):
        file.fallocate(0, 1)
        assert mm.hugetlb.counters(GIGANTIC) == counters(1, 0, surp=1)
        file.punch_hole(0, GIGANTIC_SIZE)
        assert free_pages(mm) == free
        verify(mm)


# ------------------------------------------------------------------ memfd_alloc_folio (patch 21)


def test_a_page_for_a_driver_is_zeroed(mm: MemoryManager, file: HugetlbFile) -> None:
    before = mm.vm_stats().zeroed_bytes
    pfn = int(file.memfd_alloc_folio(1))
    assert mm.vm_stats().zeroed_bytes - before == HUGE
    assert reads_zero(mm, pfn, 9)
    assert int(file.pages[1]) == pfn
    assert int(mm.mem.mem_map[pfn]._refcount) == 1
    assert mm.hugetlb.counters() == counters(4, 3)
    with mm.spawn() as process:
        addr = process.mmap(3 * HUGE, MAP_SHARED, file=file)
        assert head_at_after_touch(mm, process, addr + HUGE) == pfn
        verify(mm)


def head_at_after_touch(mm: MemoryManager, process: Process, addr: int) -> int:
    process.write(addr, b"x")
    return head_at(mm, process, addr)


def test_a_page_for_a_driver_that_is_known_to_be_zero_is_not_zeroed(
    mm: MemoryManager, file: HugetlbFile
) -> None:
    """Patch 21. The mark is set by hand: nothing in v8 sets it there (test_hugetlb_zeroed)."""
    pfn = in_pool(mm)[0]
    page_bytes(mm, pfn, 512)[:] = 0
    mm.mem.mem_map[pfn].private |= HPG_zeroed
    before = mm.vm_stats().zeroed_bytes
    assert file.memfd_alloc_folio(0) == pfn
    assert mm.vm_stats().zeroed_bytes == before
    assert not hpg_zeroed(mm, pfn)
    verify(mm)


def test_a_driver_uses_the_files_reservation_or_makes_one(mm: MemoryManager, file: HugetlbFile) -> None:
    with mm.spawn() as process:
        process.mmap(2 * HUGE, MAP_SHARED, file=file)
        process.mmap(2 * HUGE, MAP_HUGETLB)
        assert mm.hugetlb.counters() == counters(4, 4, rsvd=4)
        file.memfd_alloc_folio(0)
        assert mm.hugetlb.counters() == counters(4, 3, rsvd=3)
        with pytest.raises(OutOfMemory):
            file.memfd_alloc_folio(2)
        for index in (0, 3, -1):
            with pytest.raises(MmError, match="there already or beyond"):
                file.memfd_alloc_folio(index)
        assert mm.hugetlb.counters() == counters(4, 3, rsvd=3)
        verify(mm)


def test_a_driver_gets_no_broken_page(mm: MemoryManager, file: HugetlbFile) -> None:
    mm.mem.mem_map.flags_f[in_pool(mm)] |= PG_hwpoison
    with pytest.raises(OutOfMemory, match="no usable"):
        file.memfd_alloc_folio(0)
    assert mm.hugetlb.counters() == counters(4, 4)
    assert file.resv.tolist() == [0, 0, 0]


def test_a_mapping_that_is_refused_leaves_the_file_as_long_as_it_was(boot: Boot) -> None:
    """Linux extends the file after the pages are reserved."""
    mm = boot(8)
    file = mm.hugetlb.create_file(HUGE)
    with mm.spawn() as process:
        for flags in (MAP_SHARED, 0):
            with pytest.raises(OutOfMemory, match="cannot be reserved"):
                process.mmap(3 * HUGE, flags, file=file)
            assert file.size == HUGE
    file.close()
    verify(mm)
