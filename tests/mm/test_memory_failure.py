# SPDX-License-Identifier: GPL-2.0-only
"""Broken pages: taken from wherever they are, never handed out, and no zero hint about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hostzero.errors import MmError, OutOfMemory, UsageError
from hostzero.mm import MemoryManager
from hostzero.mm.buddy import FPI_TRYLOCK, FPI_ZEROED
from hostzero.mm.flag_steps import ZoneLock
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.memory_failure import (
    MF_FAILED,
    MF_IGNORED,
    MF_RECOVERED,
    is_free_buddy_page,
    put_page_back_buddy,
    take_page_off_buddy,
)
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
)
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison, PG_reported, PG_zeroed
from hostzero.mm.page_free import __free_frozen_pages as _free_frozen_pages
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, free_lists, is_marked_zero, page_bytes, pcp_lists, reads_zero, verify
from tests.mm.huge import in_pool, pool
from tests.mm.processes import HUGE, FakeHost, free_pages, is_huge, occupy, pages, pfn_at


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """The smallest guest that boots."""
    return boot(4)


def broken(mm: MemoryManager, pfn: int) -> bool:
    return bool(int(mm.mem.mem_map[pfn].flags_f) & PG_hwpoison)


def all_pages(mm: MemoryManager) -> list[int]:
    """Take every page that the guest would hand out; they stay taken."""
    taken = occupy(mm)
    assert not [pfn for pfn in taken if broken(mm, pfn)]
    return taken


def covering(mm: MemoryManager, pfn: int) -> tuple[int, int] | None:
    """Return the free block that holds a page as `(head, order)`."""
    for (_, order, _), blocks in free_lists(mm.mem).items():
        for head in blocks:
            if head <= pfn < head + (1 << order):
                return head, order
    return None


def fail(mm: MemoryManager, pfn: int) -> int:
    return mm.memory_failure.memory_failure(pfn)


# ------------------------------------------------------------------ free pages


@pytest.mark.parametrize("at", [0, 1, 255, 256, 511])
@pytest.mark.parametrize("mark", [0, PG_zeroed, PG_reported, PG_zeroed | PG_reported])
def test_a_free_page_leaves_its_block_and_takes_the_hint_along(boot: Boot, at: int, mark: int) -> None:
    """`take_page_off_buddy` carries no flag over: not to the remainders, not on the broken page."""
    mm = boot(8)
    mm.mem.vm[0].page_reporting_enabled = 1
    head, order = 1536, 9
    assert covering(mm, head) == (head, order)
    page_bytes(mm, head, 1 << order)[:] = 0
    mm.mem.mem_map[head].flags_f |= mark
    before = free_pages(mm)
    pfn = head + at
    assert fail(mm, pfn) == MF_RECOVERED
    assert free_pages(mm) == before - 1
    assert covering(mm, pfn) is None
    assert int(mm.mem.mem_map[pfn].flags_f) == PG_hwpoison
    parts = [(start, o) for (_, o, _), b in free_lists(mm.mem).items() for start in b]
    inside = [(start, o) for start, o in parts if head <= start < head + (1 << order)]
    assert sorted(o for _, o in inside) == list(range(order))
    assert not [start for start, _ in inside if int(mm.mem.mem_map[start].flags_f)]
    verify(mm)
    assert pfn not in all_pages(mm)


def test_a_page_parked_on_a_per_cpu_list_is_found(mm: MemoryManager) -> None:
    """Known zero or not: it is drained first, and its hint ends there."""
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    page_bytes(mm, pfn)[:] = 0
    mm.mem.mem_map[pfn]._refcount = 0
    mm.free_frozen_pages_zeroed(pfn)
    assert pcp_lists(mm.mem)
    assert is_marked_zero(mm.mem, pfn)
    assert fail(mm, pfn) == MF_RECOVERED
    assert int(mm.mem.mem_map[pfn].flags_f) == PG_hwpoison
    verify(mm)
    assert pfn not in all_pages(mm)


def test_a_second_failure_of_a_page_changes_nothing(mm: MemoryManager) -> None:
    assert fail(mm, 700) == MF_RECOVERED
    with pytest.raises(MmError, match="-EHWPOISON"):
        fail(mm, 700)
    assert mm.memory_failure.num_poisoned_pages == 1
    verify(mm)


@pytest.mark.parametrize("pfn", [-1, 1024])
def test_a_page_must_exist(mm: MemoryManager, pfn: int) -> None:
    with pytest.raises(UsageError):
        fail(mm, pfn)
    assert not mm.memory_failure.unpoison_memory(pfn)


def test_only_free_pages_can_be_taken_off(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 2)
    for page in range(pfn, pfn + 4):
        assert not is_free_buddy_page(mm.mem, page)
        assert not take_page_off_buddy(mm.mem, page)
        assert not put_page_back_buddy(mm.mem, page)
    verify(mm)


def test_the_bit_is_set_under_the_zone_lock(mm: MemoryManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch 2, mutant 46: `test_flag_steps` shows what is lost without."""
    held: list[tuple[bool, bool]] = []

    class Watched(ZoneLock):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            held.append((value, broken(mm, 700)))

    monkeypatch.setattr(mm.memory_failure, "lock", Watched())
    held.clear()
    fail(mm, 700)
    assert held == [(True, False), (False, True)]


# ------------------------------------------------------------------ users' pages


def test_a_users_page_is_unmapped_and_the_process_learns_of_it(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(8 * PAGE_SIZE)
        process.fill(addr, 8 * PAGE_SIZE, 7)
        pfn = pfn_at(mm, process, addr + 3 * PAGE_SIZE)
        assert pfn is not None
        assert fail(mm, pfn) == MF_RECOVERED
        assert pfn_at(mm, process, addr + 3 * PAGE_SIZE) is None
        assert process.rss == 7 * PAGE_SIZE
        for access in (
            lambda: process.read(addr, 8 * PAGE_SIZE),
            lambda: process.write(addr + 3 * PAGE_SIZE + 5, b"x"),
            lambda: process.touch(addr + 3 * PAGE_SIZE, PAGE_SIZE),
        ):
            with pytest.raises(MmError, match="SIGBUS"):
                access()
        assert process.read(addr + 4 * PAGE_SIZE, 1) == b"\7"
        # Given up and mapped again, the address has a fresh page.
        process.madvise(addr + 3 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        assert process.read(addr + 3 * PAGE_SIZE, 1) == b"\0"
        process.write(addr + 3 * PAGE_SIZE, b"x")
        assert pfn_at(mm, process, addr + 3 * PAGE_SIZE) != pfn
        verify(mm)
    with mm.spawn() as process:  # the same slot, another process
        addr = process.mmap(8 * PAGE_SIZE)
        process.fill(addr, 8 * PAGE_SIZE, 7)
    verify(mm)
    assert pfn not in all_pages(mm)


@pytest.mark.parametrize("at", [0, 5, 511])
def test_a_huge_page_is_split_and_loses_one_page(boot: Boot, at: int) -> None:
    mm = boot(8)
    with mm.spawn() as process:
        addr = process.mmap(HUGE)
        process.fill(addr, HUGE, 7)
        assert is_huge(mm, process, addr)
        head = pfn_at(mm, process, addr)
        assert head is not None
        assert fail(mm, head + at) == MF_RECOVERED
        assert process.rss == HUGE - PAGE_SIZE
        assert pfn_at(mm, process, addr + at * PAGE_SIZE) is None
        other = addr + (at + 1) % 512 * PAGE_SIZE
        assert process.read(other, 2) == b"\7\7"
        with pytest.raises(MmError, match="SIGBUS"):
            process.read(addr + at * PAGE_SIZE, 1)
    mm.drain_all_pages()
    verify(mm)
    assert head + at not in all_pages(mm)


@pytest.mark.parametrize("at", [0, 6, 15])
def test_a_folio_of_another_size_is_split_too(boot: Boot, at: int) -> None:
    mm = boot(8, anon_orders=(4,), thp="madvise")
    with mm.spawn() as process:
        addr = process.mmap(16 * PAGE_SIZE, MAP_FIXED, 16 * PAGE_SIZE)
        process.fill(addr, 16 * PAGE_SIZE, 7)
        pfn = pfn_at(mm, process, addr)
        assert pfn is not None
        assert fail(mm, pfn + at) == MF_RECOVERED
        assert process.rss == 15 * PAGE_SIZE
        verify(mm)
    mm.drain_all_pages()
    verify(mm)
    assert pfn + at not in all_pages(mm)


def test_a_huge_page_that_cannot_be_split_is_kept_out_when_it_is_freed(boot: Boot) -> None:
    """No table for the split: the page stays mapped and marked, and its 511 neighbours come back."""
    mm = boot(8)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.fill(addr, HUGE, 7)
    head = pfn_at(mm, process, addr)
    assert head is not None
    taken = occupy(mm)
    assert fail(mm, head + 9) == MF_FAILED
    assert is_huge(mm, process, addr)
    before = free_pages(mm)
    process.exit()
    mm.drain_all_pages()
    tables = 3
    assert free_pages(mm) - before == 511 + tables
    assert covering(mm, head + 9) is None
    assert covering(mm, head + 8) is not None
    mm.free_pages_bulk(pages(*taken))
    mm.drain_all_pages()
    verify(mm)
    assert head + 9 not in all_pages(mm)


# ------------------------------------------------------------------ the kernel's pages


def test_a_balloon_page_stays_in_the_balloon_and_out_of_the_free_lists(mm: MemoryManager) -> None:
    """Known zero or not: deflating it frees nothing."""
    pfns = mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, 4)
    for pfn in pfns:
        page_bytes(mm, int(pfn))[:] = 0
    mm.balloon.enqueue(pfns)
    mm.balloon.set_zeroed(pfns, np.ones(4, dtype=np.bool_))
    assert fail(mm, int(pfns[2])) == MF_IGNORED
    assert mm.balloon.count == 4
    verify(mm)
    before = free_pages(mm)
    mm.balloon.release(mm.balloon.dequeue(4))
    assert free_pages(mm) == before + 3
    assert int(mm.mem.mem_map[int(pfns[2])].flags_f) == PG_hwpoison
    verify(mm)
    assert int(pfns[2]) not in all_pages(mm)


def test_a_page_table_is_used_to_its_end_and_never_again(mm: MemoryManager) -> None:
    process = mm.spawn()
    addr = process.mmap(PAGE_SIZE)
    process.write(addr, b"x")
    table = process._pgd
    assert fail(mm, table) == MF_IGNORED
    assert process.read(addr, 1) == b"x"
    process.exit()
    verify(mm)
    assert table not in all_pages(mm)


@pytest.mark.parametrize("compound", [0, GFP_COMP])
@pytest.mark.parametrize("at", [0, 5, 15])
@pytest.mark.parametrize(
    "config", [{}, {"init_on_free": True}, {"page_poisoning": True}, {"debug_vm": False}]
)
def test_a_kernel_block_is_freed_without_its_broken_page(
    boot: Boot, compound: int, at: int, config: dict[str, Any]
) -> None:
    """Freed as known zero even: 15 pages come back, and none of them claims anything."""
    mm = boot(4, **config)
    pfn = mm.alloc_pages(GFP_KERNEL | compound, 4)
    dirty(mm, pfn, 4)
    assert fail(mm, pfn + at) == MF_IGNORED
    before = free_pages(mm)
    mm.mem.mem_map[pfn]._refcount = 0
    mm.free_frozen_pages_zeroed(pfn, 4)
    assert free_pages(mm) == before + 15
    assert covering(mm, pfn + at) is None
    assert not any(is_marked_zero(mm.mem, page) for page in range(pfn, pfn + 16))
    if config.get("init_on_free"):
        assert all(reads_zero(mm, page) for page in range(pfn, pfn + 16) if page != pfn + at)
    verify(mm)
    assert pfn + at not in all_pages(mm)


def test_a_page_that_breaks_while_it_is_isolated_is_not_handed_out(boot: Boot) -> None:
    """During a report it is on no list; when the block is put back it stays out, and only it does."""
    mm = boot(8, debug_vm=False)
    host = FakeHost(mm, order=9, capacity=1).register()
    isolated: list[int] = []

    def during(entries: list[tuple[int, int]]) -> None:
        if not isolated:
            isolated.append(entries[0][0] + 3)
            assert fail(mm, isolated[0]) == MF_IGNORED

    host.during = during
    before = free_pages(mm)
    mm.page_reporting.flush(1)
    assert free_pages(mm) == before - 1
    assert mm.vm_stats().bad_pages == 0
    verify(mm)
    assert isolated[0] not in all_pages(mm)
    assert mm.memory_failure.unpoison_memory(Pfn(isolated[0]))
    assert free_pages(mm) == 1


@pytest.mark.parametrize("breaks", ["before", "while it waits"])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_deferred_block_is_freed_without_its_broken_page(boot: Boot, breaks: str, zeroed: bool) -> None:
    """The zone lock is held at the free: the lists must not move before it is released."""
    mm = boot(8, debug_vm=False)
    pfn, other = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5), mm.alloc_pages(GFP_KERNEL)
    before, freed = free_pages(mm), mm.vm_stats().pgfree
    if breaks == "before":
        assert fail(mm, pfn + 7) == MF_IGNORED
    mm.mem.mem_map[pfn]._refcount = 0
    with mm.zone_lock():
        lists = free_lists(mm.mem)
        _free_frozen_pages(mm.mem, pfn, 5, FPI_TRYLOCK | (FPI_ZEROED if zeroed else 0), 0)
        assert free_lists(mm.mem) == lists
        verify(mm)
    if breaks != "before":
        assert fail(mm, pfn + 7) == MF_IGNORED
    mm.free_pages(mm.alloc_pages(GFP_KERNEL, 5), 5)  # takes the lock
    assert free_pages(mm) == before + 31
    assert covering(mm, pfn + 7) is None
    assert not any(is_marked_zero(mm.mem, page) for page in range(pfn, pfn + 32))
    verify(mm)
    assert mm.memory_failure.unpoison_memory(Pfn(pfn + 7))
    assert free_pages(mm) == before + 32
    # Of a block that waited all of it was counted as freed.
    counted = mm.vm_stats().pgfree - freed - 32
    assert counted == (31 if breaks == "before" else 32)
    mm.free_pages(other)


# ------------------------------------------------------------------ back into use


def test_a_page_that_is_put_back_claims_nothing(mm: MemoryManager) -> None:
    """`put_page_back_buddy` bypasses prepare: a mark from whatever life must not come along."""
    pfn = 700
    before = free_pages(mm)
    assert fail(mm, pfn) == MF_RECOVERED
    dirty(mm, pfn)
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed | PG_dirty
    assert mm.memory_failure.unpoison_memory(pfn)
    assert free_pages(mm) == before
    block = covering(mm, pfn)
    assert block is not None
    assert not is_marked_zero(mm.mem, block[0])
    verify(mm)
    assert not mm.memory_failure.unpoison_memory(pfn)
    assert mm.memory_failure.num_poisoned_pages == 0
    assert pfn in all_pages(mm)


@pytest.mark.parametrize(("config", "byte"), [({"init_on_free": True}, 0), ({"page_poisoning": True}, 0xAA)])
def test_a_page_that_is_put_back_holds_what_free_pages_hold(
    boot: Boot, config: dict[str, Any], byte: int
) -> None:
    """`post_alloc_hook` zeroes nothing under `init_on_free`: the page must be zero on its list."""
    mm = boot(4, **config)
    assert fail(mm, 700) == MF_RECOVERED
    dirty(mm, 700)
    assert mm.memory_failure.unpoison_memory(700)
    assert (page_bytes(mm, 700) == byte).all()
    verify(mm)


def test_a_page_put_back_does_not_taint_a_known_zero_neighbour(mm: MemoryManager) -> None:
    """The merge sees one half without the mark, and the whole loses it."""
    assert fail(mm, 701) == MF_RECOVERED
    dirty(mm, 701)
    block = covering(mm, 700)
    assert block == (700, 0)
    page_bytes(mm, 700)[:] = 0
    mm.mem.mem_map[700].flags_f |= PG_zeroed
    verify(mm)
    assert mm.memory_failure.unpoison_memory(701)
    assert not is_marked_zero(mm.mem, 700)
    verify(mm)
    zeroed = [int(mm.alloc_pages(GFP_KERNEL | GFP_ZERO)) for _ in range(100)]
    assert all(reads_zero(mm, pfn) for pfn in zeroed)


def test_a_page_still_in_use_only_loses_its_mark(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 2)
    assert fail(mm, pfn + 1) == MF_IGNORED
    assert mm.memory_failure.unpoison_memory(pfn + 1)
    assert not broken(mm, pfn + 1)
    mm.free_pages(pfn, 2)
    verify(mm)
    assert pfn + 1 in all_pages(mm)


def test_a_page_that_was_freed_while_broken_comes_back_whole(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        addr = process.mmap(PAGE_SIZE)
        process.madvise(addr, PAGE_SIZE, MADV_NOHUGEPAGE)
        process.fill(addr, PAGE_SIZE, 7)
        pfn = pfn_at(mm, process, addr)
        assert pfn is not None
        before = free_pages(mm)
        assert fail(mm, pfn) == MF_RECOVERED
        assert free_pages(mm) == before
        assert mm.memory_failure.unpoison_memory(Pfn(pfn))
        assert free_pages(mm) == before + 1
        verify(mm)


# ------------------------------------------------------------------ huge pages


@pytest.mark.parametrize("part", [0, 300])
def test_a_pool_passes_over_a_huge_page_with_a_broken_part(boot: Boot, part: int) -> None:
    mm = pool(boot(16), 2)
    broken, whole = in_pool(mm)
    assert mm.memory_failure.memory_failure(Pfn(broken + part)) == MF_IGNORED
    with mm.spawn() as process:
        addr = process.mmap(HUGE, MAP_HUGETLB)
        process.touch(addr, HUGE)
        assert pfn_at(mm, process, addr) == whole
        with pytest.raises(OutOfMemory, match="SIGBUS"):
            process.touch(process.mmap(HUGE, MAP_HUGETLB | MAP_NORESERVE), HUGE)
    verify(mm)


def test_one_broken_tail_costs_one_page_when_the_pool_is_given_up(boot: Boot) -> None:
    """The mark on the head stands for the folio; it must neither count nor outlive the pool."""
    mm = pool(boot(16), 2)
    before = free_pages(mm)
    head, other = in_pool(mm)
    tail = head + 300
    assert fail(mm, tail) == fail(mm, head + 400) == MF_IGNORED
    assert not mm.memory_failure.unpoison_memory(Pfn(head))
    assert mm.memory_failure.unpoison_memory(Pfn(head + 400))
    assert broken(mm, head)
    assert mm.memory_failure.num_poisoned_pages == 1
    mm.hugetlb.set_nr_hugepages(0)
    assert not broken(mm, head)
    assert free_pages(mm) == before + 1023
    verify(mm)
    assert mm.memory_failure.unpoison_memory(Pfn(tail))
    assert (free_pages(mm), mm.memory_failure.num_poisoned_pages) == (before + 1024, 0)
    assert other


def test_a_head_that_breaks_after_its_tail_and_a_tail_after_its_head(boot: Boot) -> None:
    mm = pool(boot(16), 2)
    head, _ = in_pool(mm)
    assert fail(mm, head + 1) == fail(mm, head) == MF_IGNORED
    with pytest.raises(MmError, match="-EHWPOISON"):
        fail(mm, head)
    assert mm.memory_failure.num_poisoned_pages == 2
    assert mm.memory_failure.unpoison_memory(Pfn(head))
    assert broken(mm, head)  # for the tail, now
    assert mm.memory_failure.unpoison_memory(Pfn(head + 1))
    assert not broken(mm, head)
    assert mm.memory_failure.num_poisoned_pages == 0


def test_a_slot_with_the_number_of_a_broken_page_is_left_alone(boot: Boot) -> None:
    """A page unmapped out of a larger folio breaks; at its address there is a swap entry by now."""
    mm = boot(16, anon_orders=(2,), thp="never", swap_size=8 * HUGE // 2)
    with mm.spawn() as process:
        addr = process.mmap(4 * PAGE_SIZE)
        process.fill(addr, 4 * PAGE_SIZE, 7)
        pfn = pfn_at(mm, process, addr)
        assert pfn is not None
        assert pfn % 4 == 0
        process.madvise(addr, PAGE_SIZE, MADV_DONTNEED)
        process.fill(addr, PAGE_SIZE, 9)
        mm.mem.vm[0].swap_next = pfn
        process.madvise(addr, PAGE_SIZE, MADV_PAGEOUT)
        assert mm.mem.swap_map[pfn] == 1
        assert fail(mm, pfn) == MF_FAILED
        assert process.read(addr, 2 * PAGE_SIZE) == bytes([9]) * PAGE_SIZE + bytes([7]) * PAGE_SIZE
    verify(mm)
