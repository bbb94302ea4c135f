# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostzero.jit import COMPILER_ON
from hostzero.mm import MemoryManager, Process
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from hostzero.mm.migrate import UNMOVABLE, isolate_migratepages_range, migrate_pages
from hostzero.mm.mmap import MADV_DONTNEED, MADV_HUGEPAGE, MAP_FIXED
from hostzero.mm.mmzone import NO_PAGE
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import booted, is_marked_zero, page_bytes
from tests.mm.migration import check, holds, isolate, move, scatter, target
from tests.mm.processes import HUGE, free_pages, image, is_huge, pfn_at


def block_of(pfn: int | None) -> tuple[int, int]:
    assert pfn is not None
    return pfn - pfn % 512, pfn - pfn % 512 + 512


def pfns(mm: MemoryManager, process: Process, held: dict[int, bytes]) -> list[int]:
    found = [pfn_at(mm, process, addr) for addr in held]
    assert None not in found
    return [pfn for pfn in found if pfn is not None]


def free_of_users(mm: MemoryManager, start: int, end: int) -> bool:
    return not (mm.mem.mem_map[start:end]._refcount > 0).any()


def test_a_range_is_emptied_and_every_byte_survives(boot: Boot) -> None:
    mm = boot(thp="never")
    process = mm.spawn()
    _, held = scatter(process, 300, 40)
    before = pfns(mm, process, held)
    start, end = min(before), max(before) + 1
    moved = int(mm.mem.vm[0].pgmigrate_success)
    heads = isolate(mm, start, end)
    assert heads == sorted(before)
    # Taken beforehand: nothing keeps what becomes free in the range from being allocated again.
    targets = [pfn for _ in range(360) if (pfn := target(mm, 0)) >= end]
    assert migrate_pages(mm, heads, lambda order: targets.pop()) == []
    assert int(mm.mem.vm[0].pgmigrate_success) == moved + 40
    assert holds(process, held)
    assert not set(before) & set(pfns(mm, process, held))
    check(mm)


def test_a_huge_page_moves_whole(boot: Boot) -> None:
    mm = boot(16)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.write(addr + 3 * PAGE_SIZE, b"deep inside")
    old = block_of(pfn_at(mm, process, addr))
    assert move(mm, *old) == []
    assert is_huge(mm, process, addr)
    assert block_of(pfn_at(mm, process, addr)) != old
    assert process.read(addr + 3 * PAGE_SIZE, 11) == b"deep inside"
    assert int(mm.mem.vm[0].pgmigrate_success) == 512
    check(mm)


def test_a_range_that_cuts_a_huge_page_isolates_all_of_it(boot: Boot) -> None:
    mm = boot(16)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.touch(addr, HUGE)
    start, end = block_of(pfn_at(mm, process, addr))
    assert isolate(mm, start + 100, start + 200) == [start]
    assert migrate_pages(mm, [start], lambda order: target(mm, order)) == []
    assert free_of_users(mm, start, end)


def test_without_a_large_target_a_huge_page_is_split_and_its_pages_move(boot: Boot) -> None:
    mm = boot(16)
    process = mm.spawn()
    addr = process.mmap(HUGE)
    process.write(addr, b"first")
    process.write(addr + HUGE - 4, b"last")
    start, end = block_of(pfn_at(mm, process, addr))
    heads = isolate(mm, start, end)
    assert heads == [start]
    targets = [target(mm, 0) for _ in range(512)]
    assert migrate_pages(mm, heads, lambda order: NO_PAGE if order else targets.pop()) == []
    assert not is_huge(mm, process, addr)
    assert free_of_users(mm, start, end)
    assert (process.read(addr, 5), process.read(addr + HUGE - 4, 4)) == (b"first", b"last")
    assert int(mm.mem.vm[0].pgmigrate_success) == 512
    check(mm)
    process.exit()
    check(mm)


def test_without_a_large_target_a_folio_in_a_table_is_split_and_what_is_mapped_moves(boot: Boot) -> None:
    """16 pages of which one is unmapped: fifteen move, and the sixteenth is nobody's any more."""
    mm = boot(thp="never", anon_orders=(4,))
    process = mm.spawn()
    addr = process.mmap(16 * PAGE_SIZE, MAP_FIXED, 16 << 20)
    process.write(addr, b"first")
    process.madvise(addr + 8 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    head = pfn_at(mm, process, addr)
    assert head is not None
    assert int(mm.mem.mem_map[head].order) == 4
    heads = isolate(mm, head, head + 16)
    assert heads == [head]
    targets = [target(mm, 0) for _ in range(15)]
    assert migrate_pages(mm, heads, lambda order: NO_PAGE if order else targets.pop()) == []
    assert targets == []
    assert free_of_users(mm, head, head + 16)
    assert process.read(addr, 5) == b"first"
    check(mm)
    process.exit()
    check(mm)


def test_without_any_target_everything_stays_and_is_put_back(boot: Boot) -> None:
    mm = boot(thp="never")
    process = mm.spawn()
    _, held = scatter(process, 30, 30)
    before = pfns(mm, process, held)
    heads = isolate(mm, min(before), max(before) + 1)
    assert heads is not None
    assert migrate_pages(mm, heads, lambda order: NO_PAGE) == heads
    assert pfns(mm, process, held) == before
    assert (mm.mem.mem_map[before]._refcount == 1).all()
    assert int(mm.mem.vm[0].pgmigrate_fail) == 30
    assert holds(process, held)
    check(mm)


@pytest.mark.parametrize("what", ["kernel page", "page table", "pinned page", "compound kernel page"])
def test_what_cannot_move_is_told_and_nothing_stays_isolated(boot: Boot, what: str) -> None:
    mm = boot(thp="never")
    process = mm.spawn()
    _, held = scatter(process, 20, 20)
    before = pfns(mm, process, held)
    if what == "kernel page":
        stone = int(mm.alloc_pages(GFP_KERNEL))
    elif what == "compound kernel page":
        stone = int(mm.alloc_pages(GFP_KERNEL | (1 << 18), 2))
    elif what == "page table":
        stone = int(mm.mem.mms[0].pgd)
    else:
        stone = before[7]
        mm.mem.mem_map[stone]._refcount += 1
    saved = image(mm)
    out = np.zeros(mm.nr_pages, dtype=np.int64)
    assert isolate_migratepages_range(mm.mem, 1, mm.nr_pages, out) == UNMOVABLE
    first_stone = int(mm.mem.vm[0].bug_pfn)
    assert not is_free(mm, first_stone)
    after = image(mm)
    for old, new in zip(saved[:1], after[:1], strict=True):
        assert (old["_refcount"] == new["_refcount"]).all()
    low, high = stone - 1, stone + 1
    out[:] = 0
    assert isolate_migratepages_range(mm.mem, low, high, out) == UNMOVABLE
    assert int(mm.mem.vm[0].bug_pfn) in (stone, low)
    assert holds(process, held)
    check(mm)


def is_free(mm: MemoryManager, pfn: int) -> bool:
    return int(mm.mem.mem_map[pfn]._refcount) == 0


def test_free_and_parked_and_frozen_pages_are_passed_over(boot: Boot) -> None:
    mm = boot(thp="never")
    free = mm.nr_pages - 512
    assert isolate(mm, free, mm.nr_pages) == []
    frozen = target(mm, 3)
    parked = int(mm.alloc_pages(GFP_HIGHUSER_MOVABLE))
    mm.free_pages(Pfn(parked))
    assert isolate(mm, frozen, frozen + 8) == []
    assert isolate(mm, parked, parked + 1) == []


def test_a_folio_freed_meanwhile_needs_no_target(boot: Boot) -> None:
    mm = boot(thp="never")
    process = mm.spawn()
    addr, held = scatter(process, 4, 4)
    before = pfns(mm, process, held)
    heads = isolate(mm, min(before), max(before) + 1)
    assert heads is not None
    free = free_pages(mm)
    process.madvise(addr, 4 * PAGE_SIZE, MADV_DONTNEED)
    asked: list[int] = []
    assert migrate_pages(mm, heads, lambda order: asked.append(order) or NO_PAGE) == []  # type: ignore[func-returns-value]
    assert asked == []
    assert free_pages(mm) == free + 4
    check(mm)


def test_unused_targets_go_where_the_caller_says(boot: Boot) -> None:
    mm = boot(thp="never")
    process = mm.spawn()
    _, held = scatter(process, 3, 3)
    before = sorted(pfns(mm, process, held))
    heads = isolate(mm, before[0], before[-1] + 1)
    assert heads is not None
    mm.mem.mem_map[before[1]]._refcount += 1
    back: list[tuple[int, int]] = []
    left = migrate_pages(mm, heads, lambda o: target(mm, o), lambda pfn, order: back.append((pfn, order)))
    assert left == [before[1]]
    assert [order for _, order in back] == [0]
    assert int(mm.mem.mem_map[before[1]]._refcount) == 2
    assert holds(process, held)


def test_a_moved_page_s_mark_of_an_earlier_life_stays_with_neither_page(boot: Boot) -> None:
    """The target was known to be zero, the old page held data: afterwards nothing is known."""
    mm = boot(thp="never")
    process = mm.spawn()
    _, held = scatter(process, 1, 1)
    (old,) = pfns(mm, process, held)
    spare = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    page_bytes(mm, spare)[:] = 0
    mm.put_page_zeroed(spare)
    assert is_marked_zero(mm.mem, spare)
    assert move(mm, old, old + 1) == []
    assert pfns(mm, process, held) == [spare]
    assert not is_marked_zero(mm.mem, old)
    process.exit()
    assert not is_marked_zero(mm.mem, spare)
    check(mm)


SLOTS = 12


class Movers(RuleBasedStateMachine):
    """Processes write, drop and end while pages move; a dict says what every address must read as."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = booted(8, thp="madvise")
        self.mm = self.guest.__enter__()
        self.processes: list[tuple[Process, int, int]] = []
        self.model: dict[tuple[int, int], bytes] = {}

    @initialize()
    def boot(self) -> None:
        self.spawn()

    @precondition(lambda self: len(self.processes) < 3)
    @rule()
    def spawn(self) -> None:
        process = self.mm.spawn()
        small = process.mmap(SLOTS * PAGE_SIZE)
        huge = process.mmap(HUGE)
        process.madvise(huge, HUGE, MADV_HUGEPAGE)
        self.processes.append((process, small, huge))

    @rule(who=st.integers(0, 2), slot=st.integers(0, 2 * SLOTS - 1), data=st.binary(min_size=1, max_size=12))
    def write(self, who: int, slot: int, data: bytes) -> None:
        process, _, _ = self.processes[who % len(self.processes)]
        at = self.address(who, slot)
        process.write(at, data + bytes(12 - len(data)))
        self.model[id(process), at] = data + bytes(12 - len(data))

    def address(self, who: int, slot: int) -> int:
        _, small, huge = self.processes[who % len(self.processes)]
        return small + slot * PAGE_SIZE if slot < SLOTS else huge + (slot - SLOTS) * 40 * PAGE_SIZE

    @rule(who=st.integers(0, 2), slot=st.integers(0, 2 * SLOTS - 1))
    def drop(self, who: int, slot: int) -> None:
        process, _, _ = self.processes[who % len(self.processes)]
        at = self.address(who, slot)
        process.madvise(at, PAGE_SIZE, MADV_DONTNEED)
        self.model.pop((id(process), at), None)

    @precondition(lambda self: len(self.processes) > 1)
    @rule(who=st.integers(0, 2))
    def exit(self, who: int) -> None:
        process, _, _ = self.processes.pop(who % len(self.processes))
        process.exit()
        self.model = {key: data for key, data in self.model.items() if key[0] != id(process)}

    @rule(who=st.integers(0, 2), slot=st.integers(0, 2 * SLOTS - 1), large=st.booleans())
    def migrate(self, who: int, slot: int, large: bool) -> None:
        """Move one page, or the whole pageblock around it as far as it is movable."""
        process, _, _ = self.processes[who % len(self.processes)]
        pfn = pfn_at(self.mm, process, self.address(who, slot))
        if pfn is None or pfn == int(self.mm.mem.vm[0].empty_zero_page):
            return
        heads = isolate(self.mm, pfn, pfn + 1)
        if heads is not None:
            assert migrate_pages(
                self.mm, heads, lambda order: NO_PAGE if order and not large else target(self.mm, order)
            ) == ([] if self.mm.vm_stats().free_pages else heads)

    @rule()
    def compact(self) -> None:
        self.mm.compact_memory()

    @invariant()
    def everything_reads_as_written(self) -> None:
        check(self.mm)
        for who, (process, _, _) in enumerate(self.processes):
            for slot in range(2 * SLOTS):
                at = self.address(who, slot)
                expected = self.model.get((id(process), at), bytes(12))
                pfn = pfn_at(self.mm, process, at)
                read = page_bytes(self.mm, pfn)[:12].tobytes() if pfn is not None else bytes(12)
                assert read == expected

    def teardown(self) -> None:
        for process, _, _ in self.processes:
            process.exit()
        check(self.mm)
        self.guest.__exit__(None, None, None)


TestMovers: Any = Movers.TestCase
TestMovers.settings = settings(stateful_step_count=50 if COMPILER_ON else 12)
