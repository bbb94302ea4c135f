# SPDX-License-Identifier: GPL-2.0-only
"""Pool sizes, gigantic pages, and the arguments of `mmap` and `munmap` that concern huge pages."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.errors import MmError, OutOfMemory, UsageError
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.hugetlb_sysfs import MAX_GIGANTIC_ORDER
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    Process,
)
from hostzero.mm.page_free import put_page
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, reads_zero, verify
from tests.mm.huge import (
    GIGANTIC,
    GIGANTIC_SIZE,
    MAP_GIGANTIC,
    alloc,
    counters,
    in_pool,
    pool,
    zeroed_by_host,
)
from tests.mm.processes import HUGE, fragment, free_pages

MAP_HUGE_2MB = 21 << 26


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with a pool of two pages."""
    return pool(boot(12), 2)


# ------------------------------------------------------------------ pool sizes


def test_a_pool_grows_and_shrinks(boot: Boot) -> None:
    mm = boot(16)
    free = free_pages(mm)
    for count in (3, 1, 4, 0):
        assert mm.hugetlb.set_nr_hugepages(count) == count
        assert mm.hugetlb.counters() == counters(count, count)
        assert free_pages(mm) == free - count * 512
        verify(mm)


def test_a_pool_grows_as_far_as_there_is_memory(boot: Boot) -> None:
    mm = boot(8)
    fragment(mm)
    assert mm.hugetlb.set_nr_hugepages(2) == 0
    assert int(mm.mem.hstate[0].max_huge_pages) == 0
    assert mm.vm_stats().oom_kill == 0


def test_growing_zeroes_nothing(boot: Boot) -> None:
    mm = boot(12)
    dirty_free_memory(mm)
    before = mm.vm_stats().zeroed_bytes
    mm.hugetlb.set_nr_hugepages(2)
    assert mm.vm_stats().zeroed_bytes == before
    assert not any(reads_zero(mm, pfn, 9) for pfn in in_pool(mm))


def test_pages_in_use_become_surplus(mm: MemoryManager) -> None:
    used = [alloc(mm), alloc(mm)]
    assert mm.hugetlb.set_nr_hugepages(0) == 0
    assert mm.hugetlb.counters() == counters(2, 0, surp=2)
    put_page(mm.mem, used[0], 0)
    assert mm.hugetlb.counters() == counters(1, 0, surp=1)
    verify(mm)
    assert mm.hugetlb.set_nr_hugepages(1) == 1  # the surplus page turns back
    assert mm.hugetlb.counters() == counters(1, 0)
    put_page(mm.mem, used[1], 0)
    assert mm.hugetlb.counters() == counters(1, 1)
    verify(mm)


def test_reserved_pages_stay_when_a_pool_shrinks(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB)
        mm.hugetlb.set_nr_hugepages(0)
        assert mm.hugetlb.counters() == counters(1, 1, rsvd=1, surp=1)
        process.touch(addr, HUGE)
        verify(mm)
    assert mm.hugetlb.counters() == counters(0, 0)
    verify(mm)


def test_a_pool_takes_from_all_nodes_in_turn(boot: Boot) -> None:
    nodes = (ZoneSpec("Normal", 0, 2048, 0), ZoneSpec("Normal", 2048, 5120, 1))
    mm = boot(20, zones=nodes)
    assert mm.hugetlb.set_nr_hugepages(4) == 4
    assert [len(in_pool(mm, node=node)) for node in (0, 1)] == [2, 2]
    assert mm.hugetlb.set_nr_hugepages(6) == 6  # node 0 has no more to give
    assert [len(in_pool(mm, node=node)) for node in (0, 1)] == [2, 4]
    verify(mm)


@pytest.mark.parametrize(
    "call",
    [
        lambda hugetlb: hugetlb.set_nr_hugepages(-1),
        lambda hugetlb: hugetlb.set_nr_overcommit(-1),
        lambda hugetlb: hugetlb.set_nr_hugepages(1, 11),
        lambda hugetlb: hugetlb.counters(0),
        lambda hugetlb: hugetlb.create_file(HUGE + PAGE_SIZE),
        lambda hugetlb: hugetlb.create_file(-HUGE),
    ],
)
def test_nonsense_is_refused(mm: MemoryManager, call: Callable[[object], object]) -> None:
    with pytest.raises(UsageError):
        call(mm.hugetlb)


@pytest.mark.parametrize("order", [9, 10, MAX_GIGANTIC_ORDER + 1, -1])
def test_a_gigantic_order_must_be_gigantic(boot: Boot, order: int) -> None:
    with pytest.raises(UsageError, match="gigantic_order"):
        boot(8, gigantic_order=order)


# ------------------------------------------------------------------ mmap


@pytest.mark.parametrize("flags", [0, MAP_PRIVATE, MAP_SHARED, MAP_HUGE_2MB])
def test_lengths_are_rounded_up_to_huge_pages(mm: MemoryManager, flags: int) -> None:
    with mm.spawn() as process:
        addr = process.mmap(HUGE + 1, MAP_HUGETLB | flags)
        assert addr % HUGE == 0
        assert mm.hugetlb.counters() == counters(2, 2, rsvd=2)
        process.write(addr + 2 * HUGE - 1, b"x")
        assert process.mmap(PAGE_SIZE) == addr + 2 * HUGE
    assert mm.hugetlb.counters() == counters(2, 2)


def test_a_small_mapping_does_not_disturb_the_alignment(boot: Boot) -> None:
    mm = pool(boot(12, gigantic_order=GIGANTIC), 1)
    with mm.spawn() as process:
        first = process.mmap(PAGE_SIZE)
        assert process.mmap(1, MAP_HUGETLB) == first + HUGE
        assert process.mmap(1, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE) == first + GIGANTIC_SIZE


@pytest.mark.parametrize(
    ("length", "flags", "addr"),
    [
        (0, MAP_HUGETLB, 0),
        (HUGE, MAP_HUGETLB | MAP_FIXED, PAGE_SIZE),
        (HUGE, MAP_HUGETLB | 0x100, 0),
        (HUGE, MAP_HUGETLB | 16 << 26, 0),  # 64 KiB
        (HUGE, MAP_HUGETLB | MAP_GIGANTIC, 0),  # the guest has none
        (1 << 48, MAP_HUGETLB, 0),
    ],
)
def test_bad_arguments_are_refused(mm: MemoryManager, length: int, flags: int, addr: int) -> None:
    with mm.spawn() as process:
        with pytest.raises(MmError, match="-EINVAL"):
            process.mmap(length, flags, addr)
        assert mm.hugetlb.counters() == counters(2, 2)


def test_a_mapping_that_cannot_be_reserved_is_none(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        with pytest.raises(OutOfMemory, match="-ENOMEM"):
            process.mmap(3 * HUGE, MAP_HUGETLB)
        assert mm.hugetlb.counters() == counters(2, 2)
        addr = process.mmap(2 * HUGE, MAP_HUGETLB)
        with pytest.raises(OutOfMemory, match="-ENOMEM"):
            process.mmap(HUGE, MAP_HUGETLB)
        process.mmap(HUGE, MAP_HUGETLB | MAP_NORESERVE)
        process.touch(addr, 2 * HUGE)
        verify(mm)


def cut_off_the_start(process: Process, addr: int) -> None:
    process.munmap(addr, PAGE_SIZE)


def cut_off_the_end(process: Process, addr: int) -> None:
    process.munmap(addr + PAGE_SIZE, 3 * HUGE)


def advise_a_part(process: Process, addr: int) -> None:
    process.madvise(addr, PAGE_SIZE, MADV_NOHUGEPAGE)


def drop_from_the_middle(process: Process, addr: int) -> None:
    process.madvise(addr + PAGE_SIZE, HUGE, MADV_DONTNEED)


@pytest.mark.parametrize("cut", [cut_off_the_start, cut_off_the_end, advise_a_part, drop_from_the_middle])
def test_a_huge_page_cannot_be_cut(mm: MemoryManager, cut: Callable[[Process, int], None]) -> None:
    """Linux refuses with -EINVAL (hugetlb_vm_op_split), and nothing has changed then."""
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB)
        process.mmap(HUGE, MAP_FIXED, addr + 2 * HUGE)
        process.fill(addr, 3 * HUGE, 0x42)
        with pytest.raises(MmError, match="-EINVAL"):
            cut(process, addr)
        assert len(process._vmas) == 2
        assert process.read(addr, 8) == process.read(addr + 3 * HUGE - 8, 8) == b"\x42" * 8
        assert process.hugetlb_usage == 2 * HUGE
        verify(mm)


def test_dropping_up_to_the_middle_of_a_page_keeps_that_page(mm: MemoryManager) -> None:
    """madvise_dontneed_free_valid_vma rounds the end down."""
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB)
        process.fill(addr, 2 * HUGE, 0x42)
        process.madvise(addr, HUGE + PAGE_SIZE, MADV_DONTNEED)
        assert process.hugetlb_usage == HUGE
        assert process.read(addr + HUGE, 8) == b"\x42" * 8
        assert process.read(addr, 8) == bytes(8)
        verify(mm)


def test_a_mapping_can_lose_its_middle(boot: Boot) -> None:
    """Both pieces still find their reservations and their pages."""
    mm = pool(boot(12), 3)
    with mm.spawn() as process:
        addr = process.mmap(3 * HUGE, MAP_HUGETLB)
        process.munmap(addr + HUGE, HUGE)
        assert mm.hugetlb.counters() == counters(3, 3, rsvd=2)
        process.fill(addr + 2 * HUGE, HUGE, 0x13)
        assert mm.hugetlb.counters() == counters(3, 2, rsvd=1)
        process.munmap(addr, HUGE)
        assert mm.hugetlb.counters() == counters(3, 2)
        assert process.read(addr + 2 * HUGE, 4) == b"\x13" * 4
        verify(mm)
    assert mm.hugetlb.counters() == counters(3, 3)


def test_huge_and_other_mappings_side_by_side(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB)
        process.mmap(HUGE, MAP_FIXED, addr + HUGE)
        process.madvise(addr, 2 * HUGE, MADV_POPULATE_WRITE)
        process.write(addr + HUGE - 2, b"over")
        assert process.read(addr + HUGE - 2, 4) == b"over"
        assert (process.rss, process.hugetlb_usage) == (HUGE, HUGE)
        process.munmap(addr, 2 * HUGE)
        assert (process.rss, process.hugetlb_usage) == (0, 0)
        verify(mm)


def test_reported_memory_is_used_without_zeroing_by_a_mapping_without_reservation(boot: Boot) -> None:
    """The cover letter's comparison, as v8 leaves it: with a reservation nothing is gained."""
    saved: dict[int, int] = {}
    for flags in (0, MAP_NORESERVE):
        mm = pool(boot(24), 0, overcommit=4)
        zeroed_by_host(mm)
        with mm.spawn() as process:
            addr = process.mmap(4 * HUGE, MAP_HUGETLB | flags)
            before = mm.vm_stats().zeroed_bytes
            process.madvise(addr, 4 * HUGE, MADV_POPULATE_WRITE)
            saved[flags] = 4 * HUGE - (mm.vm_stats().zeroed_bytes - before)
            assert process.find_nonzero(addr, 4 * HUGE) is None
    assert saved[0] < 0  # all of it and the page tables
    assert saved[MAP_NORESERVE] >= 4 * HUGE - 3 * PAGE_SIZE
