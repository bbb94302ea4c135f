# SPDX-License-Identifier: GPL-2.0-only
"""Faults in huge mappings: what is mapped, what is zeroed and in which order, and what is given back."""

from __future__ import annotations

import pytest

from hostzero.errors import BadAddress, OutOfMemory
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_SHARED,
    MAP_UNINITIALIZED,
)
from hostzero.mm.page_free import put_page
from hostzero.mm.pgtable import PAGE_RW
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, is_marked_zero, page_bytes, verify
from tests.mm.huge import (
    counters,
    head_at,
    hpg_zeroed,
    in_pool,
    pool,
    run_uncompiled,
    zeroed_by_host,
)
from tests.mm.processes import HUGE, contents, free_pages, is_huge, mapped, occupy, pfn_at, table_entries


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with a persistent pool of two dirty pages, and leave to take one more."""
    return pool(boot(12), 2, overcommit=1)


def test_a_fault_maps_a_zeroed_huge_page(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB)
        process.write(addr + 77777, b"abc")
        assert is_huge(mm, process, addr)
        assert (process.hugetlb_usage, process.rss) == (HUGE, 0)
        assert mm.vm_stats().pgfault == 1
        expected = bytearray(HUGE)
        expected[77777:77780] = b"abc"
        assert mapped(mm, process, addr) == expected
        assert process.read(addr + 77770, 20) == expected[77770:77790]
        page = mm.mem.mem_map[head_at(mm, process, addr)]
        assert (int(page._refcount), int(page._mapcount), int(page.private)) == (1, 0, 0)
        assert (int(page.mapping), int(page.index)) == (process._mm_id, addr >> 12)
        verify(mm)
    assert mm.hugetlb.counters() == counters(2, 2)
    verify(mm)


def test_populate_faults_once_a_huge_page(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(3 * HUGE, MAP_HUGETLB)
        process.madvise(addr, 3 * HUGE, MADV_POPULATE_WRITE)
        process.madvise(addr, 3 * HUGE, MADV_POPULATE_WRITE)
        assert mm.vm_stats().pgfault == 3
        assert process.find_nonzero(addr, 3 * HUGE) is None
        process.fill(addr, 3 * HUGE, 0x77)
        process.touch(addr, HUGE)
        assert mm.vm_stats().pgfault == 3
        assert mapped(mm, process, addr, PAGE_SIZE) == b"\x01" + contents(0x77, PAGE_SIZE - 1)
        verify(mm)


@pytest.mark.parametrize("page", [0, 1, 2, 255, 510, 511])
def test_the_zeroing_is_complete_wherever_the_fault_was(mm: MemoryManager, page: int) -> None:
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB)
        process.write(addr + page * PAGE_SIZE + 4095, b"\x01")
        found = mapped(mm, process, addr)
        assert found.count(0) == HUGE - 1
        assert found[page * PAGE_SIZE + 4095] == 1


SPY = """
from hostzero.mm import hugetlb, prep
from hostzero.mm.mmap import MAP_FIXED, MAP_HUGETLB, MAP_NORESERVE
from tests.mm.guest import booted

seen = []
where = "allocator"
zero = prep.folio_zero_user

def spy(where):
    def spy_zero(mem, pfn, order, user_addr):
        seen.append((where, int(order), int(user_addr)))
        zero(mem, pfn, order, user_addr)
    return spy_zero

prep.folio_zero_user, hugetlb.folio_zero_user = spy("allocator"), spy("hugetlb")
for mode in ("allocator", "caller"):
    with booted(12, user_zeroing=mode) as mm:
        mm.hugetlb.set_nr_hugepages(1)
        mm.hugetlb.set_nr_overcommit(1)
        process = mm.spawn()
        process.mmap(4 << 20, MAP_FIXED | MAP_HUGETLB | MAP_NORESERVE, 0)
        process.write(5 * 4096 + 123, b"x")
        process.write((2 << 20) + 511 * 4096 + 9, b"x")
        process.exit()
print(seen)
"""


def test_the_real_fault_address_decides_what_is_zeroed_last() -> None:
    """Patch 20, mutant 44: not the aligned address, neither for a page of the pool nor for a fresh one."""
    pool_fault, fresh_fault = 5 * PAGE_SIZE, HUGE + 511 * PAGE_SIZE
    assert eval(run_uncompiled(SPY)) == [
        ("hugetlb", 9, pool_fault),
        ("allocator", 9, fresh_fault),
        # Linux 7.2 without the series: the fault zeroes, whatever the allocator did.
        ("hugetlb", 9, pool_fault),
        ("hugetlb", 9, fresh_fault),
    ]


# ------------------------------------------------------------------ who zeroes


def test_without_a_reservation_the_hosts_zeros_reach_the_process(boot: Boot) -> None:
    mm = pool(boot(12), 0, overcommit=2)
    zeroed_by_host(mm)
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB | MAP_NORESERVE)
        process.write(addr, b"")
        before = mm.vm_stats()
        process.madvise(addr, 2 * HUGE, MADV_POPULATE_WRITE)
        after = mm.vm_stats()
        assert after.known_zero_bytes - before.known_zero_bytes >= 2 * HUGE
        assert after.zeroed_bytes - before.zeroed_bytes <= 2 * PAGE_SIZE  # page tables
        assert process.find_nonzero(addr, 2 * HUGE) is None
        heads = [head_at(mm, process, addr), head_at(mm, process, addr + HUGE)]
        assert not any(hpg_zeroed(mm, pfn) or is_marked_zero(mm.mem, pfn) for pfn in heads)
        process.fill(addr, 2 * HUGE, 0x99)
    assert mm.hugetlb.counters() == counters(0, 0)
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in heads)
    verify(mm)


def test_a_persistent_page_is_zeroed_for_each_new_owner(boot: Boot) -> None:
    """Not covered by the series: the pool's pages are never reported, and nobody knows them zero."""
    mm = pool(boot(12), 1)
    zeroed_by_host(mm)
    for _ in range(2):
        with mm.spawn() as process:
            addr = process.mmap(HUGE, MAP_HUGETLB)
            before = mm.vm_stats().zeroed_bytes
            process.touch(addr, HUGE)
            assert mm.vm_stats().zeroed_bytes - before >= HUGE
            assert mapped(mm, process, addr) == (b"\x01" + bytes(PAGE_SIZE - 1)) * 512
            process.fill(addr, HUGE, 0xAB)


@pytest.mark.parametrize("reserve", [0, MAP_NORESERVE])
def test_in_caller_mode_the_fault_zeroes_what_was_known_to_be_zero(boot: Boot, reserve: int) -> None:
    """Linux 7.2 without the series: no __GFP_ZERO, and folio_zero_user always."""
    mm = pool(boot(12, user_zeroing="caller"), 0, overcommit=1)
    zeroed_by_host(mm)
    with mm.spawn() as process:
        before = mm.vm_stats()
        addr = process.mmap(HUGE, MAP_HUGETLB | reserve)
        process.write(addr + 9 * PAGE_SIZE, b"x")
        after = mm.vm_stats()
        assert HUGE <= after.zeroed_bytes - before.zeroed_bytes <= HUGE + 3 * PAGE_SIZE
        assert after.dropped_hint_bytes - before.dropped_hint_bytes == HUGE
        assert mapped(mm, process, addr).count(0) == HUGE - 1
        assert int(mm.mem.vm[0].zeroed_twice_bytes) == 0


def test_in_caller_mode_init_on_alloc_zeroes_twice(boot: Boot) -> None:
    mm = boot(12, user_zeroing="caller", init_on_alloc=True)
    dirty_free_memory(mm)
    mm.hugetlb.set_nr_overcommit(1)
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB | MAP_NORESERVE)
        process.write(addr, b"")
        process.touch(addr, PAGE_SIZE)
        assert int(mm.mem.vm[0].zeroed_twice_bytes) == HUGE
        assert mapped(mm, process, addr).count(0) == HUGE - 1


@pytest.mark.parametrize("mode", ["allocator", "caller"])
def test_uninitialized_mappings_keep_old_bytes(boot: Boot, mode: str) -> None:
    mm = pool(boot(12, user_zeroing=mode), 1)
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB | MAP_UNINITIALIZED)
        before = mm.vm_stats().zeroed_bytes
        process.touch(addr, PAGE_SIZE)
        assert mm.vm_stats().zeroed_bytes - before == 2 * PAGE_SIZE  # page tables
        assert mapped(mm, process, addr) == b"\x01" + contents(0x5A, HUGE - 1)


# ------------------------------------------------------------------ reading, writing, copying


def test_a_read_maps_a_page_that_a_write_keeps(mm: MemoryManager) -> None:
    """There is no shared huge zero page in hugetlb; the owner alone makes its page writable."""
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB)
        assert process.read(addr, 8) == bytes(8)
        head = head_at(mm, process, addr)
        assert table_entries(mm, process, addr)[-1] & PAGE_RW == 0
        process.write(addr, b"x")
        assert head_at(mm, process, addr) == head
        assert table_entries(mm, process, addr)[-1] & PAGE_RW
        assert mm.vm_stats().pgfault == 2
        verify(mm)


def test_a_private_write_copies_the_files_page(mm: MemoryManager) -> None:
    """hugetlb_wp: the copy is not zeroed first, for every byte of it is written (gfp 0)."""
    file = mm.hugetlb.create_file(HUGE)
    with mm.spawn() as writer, mm.spawn() as copier:
        shared = writer.mmap(HUGE, MAP_SHARED, file=file)
        writer.fill(shared, HUGE, 0xC3)
        private = copier.mmap(HUGE, file=file)
        assert copier.read(private, 1) == b"\xc3"
        theirs = head_at(mm, writer, shared)
        assert head_at(mm, copier, private) == theirs
        page = mm.mem.mem_map[theirs]
        assert (int(page._refcount), int(page._mapcount), int(page.mapping)) == (3, 1, 0)
        before = mm.vm_stats().zeroed_bytes
        copier.write(private + 5 * PAGE_SIZE, b"mine")
        assert mm.vm_stats().zeroed_bytes == before
        assert head_at(mm, copier, private) != theirs
        assert (int(page._refcount), int(page._mapcount)) == (2, 0)
        expected = bytearray(contents(0xC3, HUGE))
        assert mapped(mm, writer, shared) == expected
        expected[5 * PAGE_SIZE : 5 * PAGE_SIZE + 4] = b"mine"
        assert mapped(mm, copier, private) == expected
        verify(mm)
    file.close()
    assert mm.hugetlb.counters() == counters(2, 2)
    verify(mm)


def test_a_first_private_write_copies_at_once(mm: MemoryManager) -> None:
    file = mm.hugetlb.create_file(HUGE)
    file.fallocate(0, HUGE)
    page_bytes(mm, int(file.pages[0]), 512)[:] = 0x21
    with mm.spawn() as process:
        addr = process.mmap(HUGE, file=file)
        before = mm.vm_stats().zeroed_bytes
        process.write(addr, b"x")
        assert mm.vm_stats().pgfault == 1
        assert mm.vm_stats().zeroed_bytes - before < HUGE, "every byte of a copy is written anyway"
        assert mapped(mm, process, addr) == b"x" + contents(0x21, HUGE - 1)
        assert page_bytes(mm, int(file.pages[0]))[0] == 0x21
        verify(mm)


def test_a_copy_without_a_page_leaves_the_files_page_readable(boot: Boot) -> None:
    mm = pool(boot(12), 1)
    file = mm.hugetlb.create_file(HUGE)
    file.fallocate(0, HUGE)
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_NORESERVE, file=file)
        with pytest.raises(OutOfMemory, match="SIGBUS"):
            process.write(addr, b"x")
        assert process.read(addr, 1) == b"\0"
        with pytest.raises(OutOfMemory, match="SIGBUS"):
            process.write(addr, b"x")
        verify(mm)


# ------------------------------------------------------------------ when there is nothing


def test_an_empty_pool_is_a_sigbus(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(4 * HUGE, MAP_HUGETLB | MAP_NORESERVE)
        with pytest.raises(OutOfMemory, match=f"SIGBUS.*{addr + 3 * HUGE:#x}"):
            process.madvise(addr, 4 * HUGE, MADV_POPULATE_WRITE)
        assert process.hugetlb_usage == 3 * HUGE
        assert mm.vm_stats().oom_kill == 0
        verify(mm)


def test_beyond_the_files_end_is_a_sigbus(mm: MemoryManager) -> None:
    file = mm.hugetlb.create_file(2 * HUGE)
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_SHARED, file=file)
        file.truncate(HUGE)
        process.write(addr, b"x")
        with pytest.raises(BadAddress, match="SIGBUS"):
            process.read(addr + HUGE, 1)
        verify(mm)


def test_no_page_for_a_page_table_asks_the_oom_notifiers(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB)
        taken = occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
        with pytest.raises(OutOfMemory, match="page table"):
            process.write(addr, b"x")
        assert mm.vm_stats().oom_kill == 1

        def give_back() -> int:
            for pfn in taken[:16]:
                mm.free_pages(Pfn(pfn))
            return 16

        mm.register_oom_notifier(give_back)
        process.write(addr, b"x")
        assert process.read(addr, 2) == b"x\0"
        verify(mm)


# ------------------------------------------------------------------ unmapping


def test_unmapping_returns_pages_and_reservations(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(3 * HUGE, MAP_HUGETLB)
        assert mm.hugetlb.counters() == counters(3, 3, rsvd=3, surp=1)
        process.touch(addr, 2 * HUGE)
        assert mm.hugetlb.counters() == counters(3, 1, rsvd=1, surp=1)
        process.munmap(addr, HUGE)  # a surplus page is there, so the page leaves
        assert mm.hugetlb.counters() == counters(2, 1, rsvd=1)
        process.munmap(addr + 2 * HUGE, HUGE)  # never touched: its reservation goes
        assert mm.hugetlb.counters() == counters(2, 1)
        verify(mm)
    assert mm.hugetlb.counters() == counters(2, 2)
    verify(mm)


def test_a_dropped_page_of_the_persistent_pool_stays_reserved(mm: MemoryManager) -> None:
    """Or somebody else could take it, and the next touch would be a SIGBUS."""
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB)
        process.fill(addr, 2 * HUGE, 0xEE)
        process.madvise(addr, HUGE, MADV_DONTNEED)
        assert mm.hugetlb.counters() == counters(2, 1, rsvd=1)
        assert pfn_at(mm, process, addr) is None
        assert process.read(addr, 8) == bytes(8)
        assert mapped(mm, process, addr) == bytes(HUGE)
        assert mm.hugetlb.counters() == counters(2, 0)
        verify(mm)
    assert mm.hugetlb.counters() == counters(2, 2)
    verify(mm)


def test_a_mapping_without_reservations_gets_none_back(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE, MAP_HUGETLB | MAP_NORESERVE)
        process.touch(addr, 2 * HUGE)
        process.madvise(addr, 2 * HUGE, MADV_DONTNEED)
        assert mm.hugetlb.counters() == counters(2, 2)
        verify(mm)


def test_a_page_that_somebody_else_holds_stays(mm: MemoryManager) -> None:
    process = mm.spawn()
    addr = process.mmap(HUGE, MAP_HUGETLB)
    process.touch(addr, HUGE)
    head = head_at(mm, process, addr)
    mm.mem.mem_map[head]._refcount += 1  # pinned
    process.exit()
    assert head not in in_pool(mm)
    assert put_page(mm.mem, head, 0)
    assert head in in_pool(mm)
    verify(mm)


def test_exit_gives_every_page_back(mm: MemoryManager) -> None:
    free = free_pages(mm)
    process = mm.spawn()
    for at, flags in ((1 << 40, 0), (2 << 40, MAP_NORESERVE)):
        process.mmap(HUGE, MAP_HUGETLB | MAP_FIXED | flags, at)
        process.mmap(PAGE_SIZE, MAP_FIXED, at + HUGE)
        process.touch(at, HUGE + PAGE_SIZE)
    process.exit()
    assert mm.hugetlb.counters() == counters(2, 2)
    assert free_pages(mm) == free
    verify(mm)
