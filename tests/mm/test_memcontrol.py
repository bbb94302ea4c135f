# SPDX-License-Identifier: GPL-2.0-only
"""Charging folios to a tree of cgroups, and giving the charges back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.errors import MemcgOutOfMemory, MmError, OutOfMemory, UsageError
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE
from hostzero.mm.memcontrol import mem_cgroup_charge, mem_cgroup_uncharge
from hostzero.mm.mmap import MADV_DONTNEED, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE
from hostzero.mm.mmzone import NR_MEMCGS
from hostzero.mm.page_free import put_page, put_page_zeroed
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, is_marked_zero, verify
from tests.mm.processes import HUGE, MIB, free_pages, is_huge, occupy, pfn_at

KIB = 1 << 10


def folio(mm: MemoryManager, order: int) -> int:
    return int(mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP, order))


def usage(mm: MemoryManager, *memcgs: int) -> list[int]:
    return [mm.memcg.usage_bytes(memcg) // PAGE_SIZE for memcg in memcgs]


def tree(mm: MemoryManager) -> tuple[int, int, int]:
    """A cgroup of 16 pages with two below it that have no limit of their own."""
    top = mm.memcg.create(64 * KIB)
    return top, mm.memcg.create(None, parent=top), mm.memcg.create(None, parent=top)


def test_a_charge_counts_in_every_cgroup_above(mm: MemoryManager) -> None:
    top, left, right = tree(mm)
    first, second = folio(mm, 2), folio(mm, 0)
    assert mem_cgroup_charge(mm.mem, first, 4, left)
    assert mem_cgroup_charge(mm.mem, second, 1, right)
    assert usage(mm, top, left, right) == [5, 4, 1]
    assert [int(mm.mem.mem_map[pfn].memcg_data) for pfn in (first, second)] == [left + 1, right + 1]
    verify(mm)
    put_page(mm.mem, first, 0)
    assert usage(mm, top, left, right) == [1, 0, 1]
    put_page(mm.mem, second, 0)
    assert usage(mm, top, left, right) == [0, 0, 0]
    verify(mm)


def test_a_charge_that_a_parent_refuses_leaves_no_trace(mm: MemoryManager) -> None:
    """To the last page it fits; one more fails at the top, and the cgroup below forgets it again."""
    top, left, right = tree(mm)
    held, more = folio(mm, 4), folio(mm, 0)
    assert mem_cgroup_charge(mm.mem, held, 16, left)
    assert not mem_cgroup_charge(mm.mem, more, 1, right)
    assert usage(mm, top, left, right) == [16, 16, 0]
    assert [mm.memcg.failcnt(memcg) for memcg in (top, left, right)] == [1, 0, 0]
    assert int(mm.mem.mem_map[more].memcg_data) == 0
    assert mm.vm_stats().memcg_charge_fail == 1
    mem_cgroup_uncharge(mm.mem, held)
    assert mem_cgroup_charge(mm.mem, more, 1, right)
    for pfn in (held, more):
        put_page(mm.mem, pfn, 0)
    verify(mm)


def test_the_root_takes_everything_and_counts_nothing(mm: MemoryManager) -> None:
    pfn = folio(mm, 3)
    assert mem_cgroup_charge(mm.mem, pfn, 8, 0)
    assert int(mm.mem.mem_map[pfn].memcg_data) == 0
    assert int(mm.mem.memcg[0].usage) == 0


def test_only_the_last_put_gives_the_charge_back(mm: MemoryManager) -> None:
    """Known zero or not; a page that still had its charge would be bad to the free path."""
    memcg = mm.memcg.create(MIB)
    for put in (put_page, put_page_zeroed):
        pfn = folio(mm, 0)
        mem_cgroup_charge(mm.mem, pfn, 1, memcg)
        mm.mem.mem_map[pfn]._refcount = 2
        mm.mem.ram[pfn * 512 : pfn * 512 + 512] = 0
        assert not put(mm.mem, pfn, 0)
        assert usage(mm, memcg) == [1]
        assert put(mm.mem, pfn, 0)
        assert usage(mm, memcg) == [0]
        assert is_marked_zero(mm.mem, pfn) == (put is put_page_zeroed)
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


def test_a_page_freed_with_its_charge_is_a_bad_page(mm: MemoryManager) -> None:
    memcg = mm.memcg.create(MIB)
    pfn = folio(mm, 0)
    mem_cgroup_charge(mm.mem, pfn, 1, memcg)
    mm.free_pages(Pfn(pfn))
    assert mm.vm_stats().bad_pages == 1
    verify(mm)


# ------------------------------------------------------------------ the tree


def test_limits_can_change(mm: MemoryManager) -> None:
    """In whole pages, rounded down; a limit below the usage takes nothing away."""
    memcg = mm.memcg.create(3 * PAGE_SIZE - 1)
    held = [folio(mm, 0) for _ in range(4)]
    assert [mem_cgroup_charge(mm.mem, pfn, 1, memcg) for pfn in held] == [True, True, False, False]
    mm.memcg.set_max(memcg, 3 * PAGE_SIZE)
    assert [mem_cgroup_charge(mm.mem, pfn, 1, memcg) for pfn in held[2:]] == [True, False]
    mm.memcg.set_max(memcg, 0)
    assert usage(mm, memcg) == [3]
    assert not mem_cgroup_charge(mm.mem, held[3], 1, memcg)
    mm.memcg.set_max(memcg, None)
    assert mem_cgroup_charge(mm.mem, held[3], 1, memcg)


def test_what_a_removed_cgroup_had_becomes_its_parents(mm: MemoryManager) -> None:
    """The parent counted it all along; below the root nobody counts it any more."""
    top, left, _ = tree(mm)
    pfn = folio(mm, 1)
    mem_cgroup_charge(mm.mem, pfn, 2, left)
    mm.memcg.remove(left)
    assert usage(mm, top) == [2]
    assert int(mm.mem.mem_map[pfn].memcg_data) == top + 1
    verify(mm)
    again = mm.memcg.create(None)
    assert again == left
    assert usage(mm, again) == [0]
    for memcg in (again, 3, top):
        mm.memcg.remove(memcg)
    assert int(mm.mem.mem_map[pfn].memcg_data) == 0
    put_page(mm.mem, pfn, 0)
    verify(mm)


def test_a_cgroup_in_use_stays(mm: MemoryManager) -> None:
    top, left, right = tree(mm)
    with pytest.raises(MmError, match=f"-EBUSY: there are cgroups in cgroup {top}"):
        mm.memcg.remove(top)
    with mm.spawn() as process:
        process.memcg = left
        assert process.memcg == left
        with pytest.raises(MmError, match=f"-EBUSY: there are processes in cgroup {left}"):
            mm.memcg.remove(left)
    for memcg in (left, right, top):
        mm.memcg.remove(memcg)
    with mm.spawn() as another:
        assert another.memcg == 0


Call = Callable[[MemoryManager], object]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda mm: mm.memcg.create(-1), "-1 bytes"),
        (lambda mm: mm.memcg.create(MIB, parent=7), "no cgroup 7"),
        (lambda mm: mm.memcg.set_max(0, MIB), "root"),
        (lambda mm: mm.memcg.set_max(1, MIB), "no cgroup 1"),
        (lambda mm: mm.memcg.remove(0), "root"),
        (lambda mm: mm.memcg.usage_bytes(-1), "no cgroup -1"),
        (lambda mm: mm.memcg.failcnt(NR_MEMCGS), f"no cgroup {NR_MEMCGS}"),
        (lambda mm: setattr(mm.spawn(), "memcg", 1), "no cgroup 1"),
    ],
)
def test_what_does_not_exist_is_refused(mm: MemoryManager, call: Call, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        call(mm)


def test_there_is_room_for_so_many(mm: MemoryManager) -> None:
    for _ in range(NR_MEMCGS - 1):
        mm.memcg.create(None)
    with pytest.raises(MmError, match="-ENOMEM"):
        mm.memcg.create(None)


# ------------------------------------------------------------------ processes


def test_a_process_is_charged_from_its_next_fault_on(mm: MemoryManager) -> None:
    """Pages and huge pages, not page tables; moving a process moves none of its charges."""
    top, left, right = tree(mm)
    mm.memcg.set_max(top, None)
    process = mm.spawn()
    addr = process.mmap(3 * HUGE)
    process.madvise(addr + 2 * HUGE, HUGE, MADV_NOHUGEPAGE)
    process.write(addr, b"x")
    assert usage(mm, top) == [0]
    process.memcg = left
    process.write(addr + HUGE, b"x")
    process.touch(addr + 2 * HUGE, 3 * PAGE_SIZE)
    assert is_huge(mm, process, addr + HUGE)
    assert usage(mm, top, left, right) == [515, 515, 0]
    process.memcg = right
    process.touch(addr + 2 * HUGE, 5 * PAGE_SIZE)
    assert usage(mm, top, left, right) == [517, 515, 2]
    verify(mm)
    process.munmap(addr + 2 * HUGE + PAGE_SIZE, PAGE_SIZE)
    assert usage(mm, top, left, right) == [516, 514, 2]
    process.exit()
    assert usage(mm, top, left, right) == [0, 0, 0]
    verify(mm)


def test_the_parts_of_a_split_huge_page_share_its_charge(mm: MemoryManager) -> None:
    memcg = mm.memcg.create(None)
    process = mm.spawn()
    process.memcg = memcg
    addr = process.mmap(HUGE)
    process.write(addr, b"x")
    process.munmap(addr, 7 * PAGE_SIZE)
    assert usage(mm, memcg) == [505]
    verify(mm)
    process.madvise(addr + 8 * PAGE_SIZE, 100 * PAGE_SIZE, MADV_DONTNEED)
    assert usage(mm, memcg) == [405]
    process.exit()
    assert usage(mm, memcg) == [0]
    verify(mm)


def test_at_the_limit_the_error_names_the_cgroup_and_no_notifier_runs(boot: Boot) -> None:
    """The guest has memory; giving back the balloon would not help."""
    mm = boot(8, thp="never")
    top, left, _ = tree(mm)
    calls = []

    def notifier() -> int:
        calls.append(1)
        return 0

    mm.register_oom_notifier(notifier)
    process = mm.spawn()
    process.memcg = left
    addr = process.mmap(MIB)
    with pytest.raises(
        MemcgOutOfMemory, match=f"cgroup {top} is at its limit, 64 of 64 KiB in use"
    ) as caught:
        process.madvise(addr, MIB, MADV_POPULATE_WRITE)
    assert isinstance(caught.value, OutOfMemory)
    assert f"no page for address {addr + 16 * PAGE_SIZE:#x}" in str(caught.value)
    assert process.rss == 64 * KIB
    assert (calls, mm.vm_stats().oom_kill) == ([], 0)
    process.munmap(addr, PAGE_SIZE)
    process.write(addr + 20 * PAGE_SIZE, b"room for one")
    with pytest.raises(MemcgOutOfMemory):
        process.write(addr + 21 * PAGE_SIZE, b"and no more")
    verify(mm)


def test_running_out_of_memory_in_a_cgroup_is_not_its_limit(boot: Boot) -> None:
    """Even after the limit was met: then the guest's own notifiers are asked, as without cgroups."""
    mm = boot(4)
    memcg = mm.memcg.create(8 * PAGE_SIZE)
    process = mm.spawn()
    process.memcg = memcg
    addr = process.mmap(64 * PAGE_SIZE)
    with pytest.raises(MemcgOutOfMemory):
        process.touch(addr, 9 * PAGE_SIZE)
    mm.memcg.set_max(memcg, None)
    taken = occupy(mm)
    assert free_pages(mm) == 0
    with pytest.raises(OutOfMemory) as caught:
        process.touch(addr, 9 * PAGE_SIZE)
    assert not isinstance(caught.value, MemcgOutOfMemory)
    assert mm.vm_stats().oom_kill == 1
    mm.register_oom_notifier(lambda: int(mm.free_pages(Pfn(taken.pop()))))
    process.touch(addr, 9 * PAGE_SIZE)
    assert usage(mm, memcg) == [9]


def test_a_folio_refused_by_its_cgroup_is_freed_as_any_other(boot: Boot) -> None:
    """Patch 17: it has been zeroed, but no free list may say so; and a smaller one is tried."""
    mm = boot(8)
    dirty_free_memory(mm)
    memcg = mm.memcg.create(16 * PAGE_SIZE)
    process = mm.spawn()
    process.memcg = memcg
    addr = process.mmap(HUGE)
    process.write(addr + 5 * PAGE_SIZE, b"x")
    assert not is_huge(mm, process, addr)
    assert process.rss == PAGE_SIZE
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in range(mm.nr_pages))
    stats = mm.vm_stats()
    assert (stats.thp_fault_alloc, stats.thp_fault_fallback) == (0, 1)
    assert (stats.zeroed_in_vain_bytes, stats.memcg_charge_fail, mm.memcg.failcnt(memcg)) == (HUGE, 1, 1)
    pfn = pfn_at(mm, process, addr + 5 * PAGE_SIZE)
    assert pfn is not None
    assert int(mm.mem.mem_map[pfn].memcg_data) == memcg + 1
    verify(mm)
