# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.errors import BadAddress, MmError, OutOfMemory, UsageError
from hostzero.mm import MemoryManager, Process
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_NORETRY
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_UNINITIALIZED,
    MMAP_BASE,
)
from hostzero.mm.pgtable import TASK_SIZE
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, page_bytes, verify
from tests.mm.processes import HUGE, MIB, FakeHost, contents, free_pages, mapped, occupy, pages, pfn_at


@pytest.fixture
def process(mm: MemoryManager) -> Process:
    """A process of a guest whose free memory is dirty."""
    dirty_free_memory(mm)
    return mm.spawn()


# ------------------------------------------------------------------ mmap


def test_placement(process: Process) -> None:
    """Small mappings back to back, large ones on 2 MiB boundaries, holes used again."""
    first = process.mmap(PAGE_SIZE)
    second = process.mmap(5000)
    large = process.mmap(HUGE + PAGE_SIZE)
    third = process.mmap(PAGE_SIZE)
    assert first == MMAP_BASE
    assert second == MMAP_BASE + PAGE_SIZE
    assert large == MMAP_BASE + HUGE
    assert third == second + 2 * PAGE_SIZE
    process.munmap(first, PAGE_SIZE)
    assert process.mmap(1) == first
    assert process.mmap(HUGE) == large + 2 * HUGE


def test_a_fixed_mapping_in_the_way_is_stepped_over(process: Process) -> None:
    process.mmap(4 * PAGE_SIZE, MAP_FIXED, MMAP_BASE - 2 * PAGE_SIZE)
    assert process.mmap(PAGE_SIZE) == MMAP_BASE + 2 * PAGE_SIZE
    assert process.mmap(HUGE) == MMAP_BASE + HUGE


def test_no_room_left(process: Process) -> None:
    process.mmap(TASK_SIZE - MMAP_BASE - HUGE)
    assert process.mmap(HUGE) == TASK_SIZE - HUGE
    with pytest.raises(MmError, match="-ENOMEM"):
        process.mmap(PAGE_SIZE)


def test_address_zero_is_an_address(process: Process) -> None:
    assert process.mmap(2 * PAGE_SIZE, MAP_FIXED, 0) == 0
    assert process.read(0, 8) == bytes(8)
    process.write(0, b"null")
    assert process.read(0, 6) == b"null\0\0"
    process.munmap(0, PAGE_SIZE)
    with pytest.raises(BadAddress, match="0x0 is not mapped"):
        process.read(0, 1)
    assert process.read(PAGE_SIZE, 4) == bytes(4)


def test_uninitialized_memory_is_what_it_says(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(PAGE_SIZE, MAP_UNINITIALIZED)
    process.write(addr, b"x")
    assert process.read(addr, PAGE_SIZE) == b"x" + contents(0x5A, PAGE_SIZE - 1)
    zeroed = process.mmap(PAGE_SIZE)
    process.write(zeroed, b"x")
    assert process.read(zeroed, PAGE_SIZE) == b"x" + bytes(PAGE_SIZE - 1)


Call = Callable[[Process], object]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p: p.mmap(0), MmError, "length 0"),
        (lambda p: p.mmap(-1), MmError, "length"),
        (lambda p: p.mmap(TASK_SIZE + 1), MmError, "length"),
        (lambda p: p.mmap(4096, 0x20), MmError, "unknown flags 0x20"),
        (lambda p: p.mmap(4096, MAP_FIXED, 1), MmError, "0x1 is unaligned"),
        (lambda p: p.mmap(4096, MAP_FIXED, -4096), MmError, "outside of user space"),
        (lambda p: p.mmap(8192, MAP_FIXED, TASK_SIZE - 4096), MmError, "outside of user space"),
        (lambda p: p.mmap(8192, MAP_FIXED, MMAP_BASE - 4096), MmError, "-EEXIST"),
        (lambda p: p.munmap(1, 4096), MmError, "-EINVAL"),
        (lambda p: p.munmap(0, 0), MmError, "-EINVAL"),
        (lambda p: p.munmap(TASK_SIZE, 4096), MmError, "-EINVAL"),
        (lambda p: p.madvise(MMAP_BASE, 4096, 999), MmError, "unknown advice 999"),
        (lambda p: p.madvise(0, 4096, 999), MmError, "unknown advice 999"),
        (lambda p: p.madvise(0, 4096, MADV_DONTNEED), BadAddress, "0x0 is not mapped"),
        (lambda p: p.madvise(MMAP_BASE, 8193, MADV_DONTNEED), BadAddress, "0x7f0000002000 is not mapped"),
        (lambda p: p.madvise(MMAP_BASE + 1, 4096, MADV_DONTNEED), MmError, "-EINVAL"),
        (lambda p: p.touch(MMAP_BASE, 3 * 4096), BadAddress, "0x7f0000002000"),
        (lambda p: p.fill(MMAP_BASE - 4096, 8192, 1), BadAddress, "0x7efffffff000"),
        (lambda p: p.read(MMAP_BASE + 8191, 2), BadAddress, "0x7f0000002000"),
        (lambda p: p.write(MMAP_BASE + 8190, b"abc"), BadAddress, "0x7f0000002000"),
        (lambda p: p.write(MMAP_BASE - 1, b"ab"), BadAddress, "0x7efffffff000"),
        (lambda p: p.read(-1, 1), BadAddress, "not in user space"),
        (lambda p: p.read(TASK_SIZE - 1, 2), BadAddress, "not in user space"),
        (lambda p: p.find_nonzero(MMAP_BASE, 0), MmError, "-EINVAL"),
    ],
)
def test_bad_calls_change_nothing(
    mm: MemoryManager, process: Process, call: Call, error: type[Exception], text: str
) -> None:
    """One clear error each; nothing was mapped, faulted in or written."""
    process.mmap(2 * PAGE_SIZE)
    process.write(MMAP_BASE, contents(0x11, 2 * PAGE_SIZE))
    free, rss = free_pages(mm), process.rss
    with pytest.raises(error, match=text):
        call(process)
    assert (free_pages(mm), process.rss) == (free, rss)
    assert process.read(MMAP_BASE, 2 * PAGE_SIZE) == contents(0x11, 2 * PAGE_SIZE)


def test_nothing_to_copy_is_no_access(process: Process) -> None:
    assert process.read(12345, 0) == b""
    process.write(12345, b"")


# ------------------------------------------------------------------ munmap, exit


def test_munmap_over_holes(mm: MemoryManager, process: Process) -> None:
    """Three mappings with holes between; one call takes the end of one to the start of another."""
    base = 1 << 30
    for at in (base, base + 8 * PAGE_SIZE, base + 16 * PAGE_SIZE):
        process.mmap(4 * PAGE_SIZE, MAP_FIXED, at)
        process.fill(at, 4 * PAGE_SIZE, 0x42)
    free = free_pages(mm)
    process.munmap(base + 2 * PAGE_SIZE, 16 * PAGE_SIZE)
    assert free_pages(mm) == free + 2 + 4 + 2
    assert process.read(base, 2 * PAGE_SIZE) == contents(0x42, 2 * PAGE_SIZE)
    assert process.read(base + 18 * PAGE_SIZE, 2 * PAGE_SIZE) == contents(0x42, 2 * PAGE_SIZE)
    for page in (2, 3, 8, 11, 16, 17):
        with pytest.raises(BadAddress):
            process.read(base + page * PAGE_SIZE, 1)
    process.munmap(base + 2 * PAGE_SIZE, 16 * PAGE_SIZE)
    verify(mm)


def test_a_hole_in_the_middle_can_be_mapped_again(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(4 * PAGE_SIZE)
    process.fill(addr, 4 * PAGE_SIZE, 0x42)
    process.munmap(addr + PAGE_SIZE, 2 * PAGE_SIZE)
    assert process.mmap(2 * PAGE_SIZE) == addr + PAGE_SIZE
    assert process.read(addr, 4 * PAGE_SIZE) == (contents(0x42) + contents(0, 2 * PAGE_SIZE) + contents(0x42))


def test_exit_gives_everything_back(mm: MemoryManager) -> None:
    """Pages, split pages, tables and the top table: as many free pages as before spawn."""
    dirty_free_memory(mm)
    before = free_pages(mm)
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE)
        process.write(addr, b"x")
        process.munmap(addr + PAGE_SIZE, PAGE_SIZE)
        process.mmap(PAGE_SIZE, MAP_FIXED, 0)
        process.write(0, b"x")
        process.read(process.mmap(PAGE_SIZE, MAP_FIXED, TASK_SIZE - PAGE_SIZE), 1)
        process.madvise(addr + HUGE, HUGE, MADV_NOHUGEPAGE)
        process.madvise(addr + HUGE, 32 * PAGE_SIZE, MADV_POPULATE_WRITE)
        verify(mm)
    assert free_pages(mm) == before
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


def test_after_exit_calls_are_refused(mm: MemoryManager) -> None:
    process = mm.spawn()
    addr = process.mmap(PAGE_SIZE)
    process.exit()
    process.exit()
    assert process.rss == 0
    for call in (
        lambda: process.mmap(PAGE_SIZE),
        lambda: process.munmap(addr, PAGE_SIZE),
        lambda: process.read(addr, 1),
        lambda: process.touch(addr, PAGE_SIZE),
    ):
        with pytest.raises(MmError, match="exited"):
            call()


def test_processes_do_not_see_each_other(mm: MemoryManager) -> None:
    one, other = mm.spawn(), mm.spawn()
    assert one.mmap(PAGE_SIZE) == other.mmap(PAGE_SIZE) == MMAP_BASE
    one.write(MMAP_BASE, b"one")
    assert other.read(MMAP_BASE, 3) == bytes(3)
    other.write(MMAP_BASE, b"two")
    assert one.read(MMAP_BASE, 3) == b"one"
    assert pfn_at(mm, one, MMAP_BASE) != pfn_at(mm, other, MMAP_BASE)
    with pytest.raises(UsageError, match="no CPU 1"):
        mm.spawn(cpu=1)


# ------------------------------------------------------------------ madvise


def test_populate_faults_the_range_in_zeroed(mm: MemoryManager, process: Process) -> None:
    """Any alignment to 2 MiB: exactly the range, or more only where a huge page reaches over."""
    addr = process.mmap(2 * HUGE)
    process.madvise(addr, 2 * HUGE, MADV_NOHUGEPAGE)
    process.madvise(addr + HUGE - 8 * PAGE_SIZE, 24 * PAGE_SIZE, MADV_POPULATE_WRITE)
    assert process.rss == 24 * PAGE_SIZE
    assert mapped(mm, process, addr + HUGE - 8 * PAGE_SIZE, 24 * PAGE_SIZE) == bytes(24 * PAGE_SIZE)
    assert pfn_at(mm, process, addr + HUGE - 9 * PAGE_SIZE) is None
    assert pfn_at(mm, process, addr + HUGE + 16 * PAGE_SIZE) is None


def test_populate_over_several_mappings(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(2 * PAGE_SIZE)
    assert process.mmap(2 * PAGE_SIZE, MAP_UNINITIALIZED) == addr + 2 * PAGE_SIZE
    process.madvise(addr, 4 * PAGE_SIZE, MADV_POPULATE_WRITE)
    assert mapped(mm, process, addr, 4 * PAGE_SIZE) == (
        contents(0, 2 * PAGE_SIZE) + contents(0x5A, 2 * PAGE_SIZE)
    )


def test_dropped_pages_come_back_as_zeros(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(4 * PAGE_SIZE)
    process.fill(addr, 4 * PAGE_SIZE, 0x77)
    free = free_pages(mm)
    process.madvise(addr + PAGE_SIZE, 2 * PAGE_SIZE, MADV_DONTNEED)
    assert free_pages(mm) == free + 2
    assert process.read(addr, 4 * PAGE_SIZE) == (contents(0x77) + contents(0, 2 * PAGE_SIZE) + contents(0x77))


def test_advice_cuts_mappings_but_not_their_memory(mm: MemoryManager, process: Process) -> None:
    addr = process.mmap(4 * PAGE_SIZE)
    process.fill(addr, 4 * PAGE_SIZE, 0x77)
    for advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE):
        process.madvise(addr + PAGE_SIZE, PAGE_SIZE, advice)
    assert process.read(addr, 4 * PAGE_SIZE) == contents(0x77, 4 * PAGE_SIZE)
    with pytest.raises(MmError, match="-EEXIST"):
        process.mmap(PAGE_SIZE, MAP_FIXED, addr + PAGE_SIZE)


# ------------------------------------------------------------------ out of memory


def test_out_of_memory(boot: Boot) -> None:
    """Populating more than there is fails; what was faulted in is right, and exit frees it."""
    mm = boot(4, thp="never")
    dirty_free_memory(mm)
    before = free_pages(mm)
    with mm.spawn() as process:
        addr = process.mmap(8 * MIB)
        with pytest.raises(OutOfMemory, match="no page for address 0x7f"):
            process.madvise(addr, 8 * MIB, MADV_POPULATE_WRITE)
        assert mm.vm_stats().oom_kill == 1
        assert 0 < process.rss < 4 * MIB
        assert mapped(mm, process, addr, process.rss) == bytes(process.rss)
        verify(mm)
    assert free_pages(mm) == before
    verify(mm)


def test_a_write_that_runs_out_of_memory_writes_nothing(boot: Boot) -> None:
    mm = boot(4)
    process = mm.spawn()
    addr = process.mmap(64 * PAGE_SIZE)
    process.write(addr, contents(0x21))
    occupy(mm)
    with pytest.raises(OutOfMemory):
        process.write(addr + 100, contents(0x99, 32 * PAGE_SIZE))
    with pytest.raises(OutOfMemory):
        process.fill(addr, 32 * PAGE_SIZE, 0x99)
    assert process.read(addr, PAGE_SIZE) == contents(0x21)
    verify(mm)


def test_oom_notifiers_let_a_fault_go_on(boot: Boot) -> None:
    """The balloon gives pages back while memory runs out; each is zeroed, and the last one fails."""
    mm = boot(4)
    dirty_free_memory(mm)
    inflated = mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_NORETRY, 24)
    for pfn in inflated:
        page_bytes(mm, int(pfn))[:] = 0x66
    mm.balloon.enqueue(inflated)
    process = mm.spawn()
    addr = process.mmap(64 * PAGE_SIZE)
    process.write(addr, b"x")
    occupy(mm)
    calls = []

    def deflate() -> int:
        calls.append(mm.balloon.count)
        out = mm.balloon.dequeue(8)
        mm.balloon.release(out)
        return len(out)

    unregister = mm.register_oom_notifier(deflate)
    process.madvise(addr, 21 * PAGE_SIZE, MADV_POPULATE_WRITE)
    assert calls == [24, 16, 8]
    assert mapped(mm, process, addr, 21 * PAGE_SIZE) == b"x" + bytes(21 * PAGE_SIZE - 1)
    with pytest.raises(OutOfMemory):
        process.madvise(addr, 64 * PAGE_SIZE, MADV_POPULATE_WRITE)
    assert calls == [24, 16, 8, 0]
    assert mm.vm_stats().oom_kill == 1
    unregister()
    with pytest.raises(OutOfMemory):
        process.touch(addr, 64 * PAGE_SIZE)
    assert len(calls) == 4
    verify(mm)


def test_spawning_without_memory(boot: Boot) -> None:
    mm = boot(4)
    taken = occupy(mm)
    with pytest.raises(OutOfMemory, match="page table"):
        mm.spawn()
    mm.register_oom_notifier(lambda: int(mm.free_pages(Pfn(taken[0]))))
    mm.spawn().exit()
    assert free_pages(mm) == 1


# ------------------------------------------------------------------ everything at once


def test_a_page_s_whole_way(boot: Boot) -> None:
    """Written, freed, reported, handed out again as known zero, through page tables all the way."""
    mm = boot(8)
    dirty_free_memory(mm)
    host = FakeHost(mm, capacity=1, order=9).register()
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.fill(addr, HUGE, 0xEE)
    process.munmap(addr, HUGE)
    mm.drain_all_pages()
    assert mm.page_reporting.flush(UINT_MAX) > 0
    before = mm.vm_stats()
    again = process.mmap(HUGE)
    process.madvise(again, HUGE, MADV_POPULATE_WRITE)
    assert mapped(mm, process, again) == bytes(HUGE)
    assert mm.vm_stats().known_zero_bytes - before.known_zero_bytes >= HUGE
    assert host.blocks()
    mm.balloon.enqueue(pages())
    process.exit()
    verify(mm)
