# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.errors import OutOfMemory
from hostzero.mm import MemoryManager, Process, ZoneSpec, page_alloc
from hostzero.mm.buddy import FPI_NONE, __free_one_page
from hostzero.mm.compaction import (
    COMPACT_COMPLETE,
    COMPACT_CONTINUE,
    COMPACT_DEFERRED,
    COMPACT_PRIO_ASYNC,
    COMPACT_PRIO_SYNC_LIGHT,
    COMPACT_SKIPPED,
    COMPACT_SUCCESS,
    compact_zone_begin,
    compact_zone_end,
    compaction_deferred,
    defer_compaction,
    take_captured_page,
    try_to_compact_pages,
)
from hostzero.mm.gfp import (
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NORETRY,
    GFP_TRANSHUGE,
    GFP_ZERO,
)
from hostzero.mm.mmap import MADV_HUGEPAGE
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
)
from hostzero.mm.page_alloc import __alloc_pages_direct_compact as _direct_compact
from hostzero.mm.page_flags import PG_private
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists, is_marked_zero, page_bytes, reads_zero
from tests.mm.migration import check, compaction_is_idle, fragment_movable, holds, scatter
from tests.mm.processes import HUGE, fragment, free_pages, is_huge, occupy, pages, release

Guest = tuple[MemoryManager, Process, dict[int, bytes]]


@pytest.fixture
def scattered(boot: Boot) -> Guest:
    """A guest whose movable pages leave no block of order 9 free, although most of it is free."""
    mm = boot(8, thp="madvise")
    process = mm.spawn()
    # All of memory but the watermark, so that every pageblock has its share.
    _, held = scatter(process, free_pages(mm) - 160, 80)
    mm.drain_all_pages()
    assert int(mm.mem.zone[0].nr_free[9:].sum()) == 0
    return mm, process, held


def events(mm: MemoryManager) -> tuple[int, int, int]:
    vm = mm.mem.vm[0]
    return int(vm.compact_stall), int(vm.compact_success), int(vm.compact_fail)


def test_a_huge_page_fault_compacts_instead_of_falling_back(scattered: Guest) -> None:
    mm, process, held = scattered
    addr = process.mmap(HUGE)
    process.madvise(addr, HUGE, MADV_HUGEPAGE)
    process.touch(addr, HUGE)
    assert is_huge(mm, process, addr)
    assert events(mm) == (1, 1, 0)
    assert int(mm.mem.vm[0].pgmigrate_success) > 0
    assert holds(process, held)
    assert process.find_nonzero(addr + PAGE_SIZE, HUGE - PAGE_SIZE) == addr + PAGE_SIZE
    check(mm)
    process.exit()
    check(mm)


def test_a_zeroed_block_out_of_compaction_is_zero(scattered: Guest) -> None:
    mm, process, held = scattered
    pfn = mm.alloc_pages(GFP_TRANSHUGE | GFP_ZERO, 9)
    assert events(mm) == (1, 1, 0)
    assert reads_zero(mm, pfn, 9)
    assert int(mm.mem.mem_map[pfn].flags_f) & PG_private == 0
    assert holds(process, held)
    check(mm)


@pytest.mark.parametrize(
    "gfp", [GFP_TRANSHUGE & ~(1 << 10), GFP_TRANSHUGE & ~(1 << 6)], ids=["no-reclaim", "no-io"]
)
def test_who_may_not_wait_does_not_compact(scattered: Guest, gfp: int) -> None:
    mm, _, _ = scattered
    with pytest.raises(OutOfMemory):
        mm.alloc_pages(gfp, 9)
    assert events(mm) == (0, 0, 0)
    assert int(mm.mem.vm[0].pgmigrate_success) == 0


def test_kernel_pages_in_the_way_make_it_fail_and_defer(boot: Boot) -> None:
    """Each failure doubles the attempts that are passed over before the next one."""
    mm = boot(8, thp="madvise")
    fragment(mm)
    stalls = []
    for _ in range(8):
        with pytest.raises(OutOfMemory):
            mm.alloc_pages(GFP_TRANSHUGE | GFP_NORETRY, 9)
        stalls.append(events(mm)[0])
        check(mm)
    assert events(mm)[1] == 0
    assert int(mm.mem.vm[0].pgmigrate_success) == 0
    with pytest.raises(OutOfMemory):
        mm.alloc_pages(GFP_TRANSHUGE, 9)
    assert mm.mem.zone[0].compact_defer_shift == 1
    assert compaction_deferred(mm.mem, 0, 9)


def test_a_smaller_order_than_the_one_that_failed_is_not_deferred(boot: Boot) -> None:
    mm = boot(8)
    mm.mem.zone[0].compact_order_failed = 9
    for _ in range(3):
        defer_compaction(mm.mem, 0, 9)
    assert not compaction_deferred(mm.mem, 0, 4)
    assert [bool(compaction_deferred(mm.mem, 0, 9)) for _ in range(9)] == [True] * 7 + [False] * 2
    for _ in range(20):
        defer_compaction(mm.mem, 0, 3)
    assert (mm.mem.zone[0].compact_defer_shift, mm.mem.zone[0].compact_order_failed) == (6, 3)


def test_with_too_little_free_memory_nothing_is_tried(boot: Boot) -> None:
    """Compaction needs room to move pages to: twice the order above the watermark."""
    mm = boot(8)
    occupy(mm, keep_watermarks=True)
    assert try_to_compact_pages(mm.mem, GFP_TRANSHUGE, 9, 0, 0, COMPACT_PRIO_ASYNC, 0) == COMPACT_SKIPPED
    assert events(mm) == (0, 0, 0)


def test_with_a_block_at_hand_nothing_is_moved(boot: Boot) -> None:
    mm = boot(8)
    assert try_to_compact_pages(mm.mem, GFP_TRANSHUGE, 9, 0, 0, COMPACT_PRIO_ASYNC, 0) == COMPACT_SUCCESS
    assert take_captured_page(mm.mem) == NO_PAGE
    assert int(mm.mem.vm[0].pgmigrate_success) == 0


def test_balloon_pages_stay_where_they_are_in_direct_compaction(boot: Boot) -> None:
    """Compiled code cannot call their driver."""
    mm = boot(8, thp="madvise")
    stay = pages(*fragment_movable(mm))
    mm.balloon.enqueue(stay)
    calls: list[tuple[int, int]] = []

    def migratepage(new: Pfn, old: Pfn) -> bool:
        calls.append((new, old))
        return False

    mm.balloon.register_migratepage(migratepage)
    with pytest.raises(OutOfMemory):
        mm.alloc_pages(GFP_TRANSHUGE, 9)
    assert calls == []
    assert mm.balloon.count == len(stay)
    assert mm.compact_memory() == len(calls) > 0
    check(mm)
    mm.alloc_pages(GFP_TRANSHUGE, 9)
    assert mm.balloon.count == len(stay)


# ------------------------------------------------------------------ the captured page


def begin_capture(mm: MemoryManager, order: int, migratetype: int = MIGRATE_MOVABLE) -> None:
    compact_zone_begin(mm.mem, 0, order, migratetype, 1, False, 0)
    mm.mem.cc[0].capture_page = NO_PAGE
    mm.mem.vm[0].capture_order = order


def end_capture(mm: MemoryManager) -> int:
    compact_zone_end(mm.mem)
    mm.mem.vm[0].capture_order = 0
    pfn = int(take_captured_page(mm.mem))
    assert compaction_is_idle(mm.mem)
    return pfn


@pytest.fixture
def block(boot: Boot) -> tuple[MemoryManager, int]:
    """A guest without free memory, and the first of 16 aligned pages that may be freed."""
    mm = boot(4)
    taken = occupy(mm)
    return mm, next(pfn for pfn in taken if pfn % 16 == 0 and pfn > 600)


def free_as(mm: MemoryManager, pfn: int, order: int, *, zeroed: bool = False) -> None:
    """Free a block straight to the buddy lists, which is where captures are made."""
    for page in range(pfn, pfn + (1 << order)):
        mm.mem.mem_map[page]._refcount = 0
    if zeroed:
        mm.mem.mem_map[pfn].flags_f |= PG_private
    __free_one_page(mm.mem, pfn, 0, order, int(mm.mem.pageblock[pfn // 512]), FPI_NONE)


def test_the_first_block_of_the_order_is_captured_off_every_list(
    block: tuple[MemoryManager, int],
) -> None:
    """It is offered at each order, merged as far as it is by then."""
    mm, pfn = block
    begin_capture(mm, 3)
    free = int(mm.mem.zone[0].nr_free_pages)
    free_as(mm, pfn + 4, 2)
    assert mm.mem.zone[0].nr_free_pages == free + 4
    free_as(mm, pfn, 2)
    assert mm.mem.cc[0].capture_page == pfn
    assert mm.mem.zone[0].nr_free_pages == free
    assert not any(pfn in blocks or pfn + 4 in blocks for blocks in free_lists(mm.mem).values())
    free_as(mm, pfn + 8, 3)
    assert end_capture(mm) == pfn, "one capture is enough; the second block went to its list"
    assert free_lists(mm.mem)[0, 3, int(mm.mem.pageblock[pfn // 512])] == [pfn + 8]
    mm.mem.mem_map[pfn]._refcount = 1
    mm.free_pages(Pfn(pfn), 3)
    mm.drain_all_pages()
    check(mm)


def test_nothing_is_captured_for_nobody(block: tuple[MemoryManager, int]) -> None:
    mm, pfn = block
    free_as(mm, pfn, 3)
    assert int(take_captured_page(mm.mem)) <= 0
    assert any(pfn in blocks for blocks in free_lists(mm.mem).values())


@pytest.mark.parametrize(
    ("pageblock", "wanted", "captured"),
    [
        (MIGRATE_MOVABLE, MIGRATE_MOVABLE, True),
        (MIGRATE_UNMOVABLE, MIGRATE_MOVABLE, True),
        (MIGRATE_MOVABLE, MIGRATE_UNMOVABLE, False),
        (MIGRATE_CMA, MIGRATE_MOVABLE, False),
        (MIGRATE_ISOLATE, MIGRATE_MOVABLE, False),
    ],
)
def test_only_pages_that_the_request_may_have_are_captured(
    block: tuple[MemoryManager, int], pageblock: int, wanted: int, captured: bool
) -> None:
    mm, pfn = block
    mm.mem.pageblock[pfn // 512] = pageblock
    begin_capture(mm, 3, wanted)
    free_as(mm, pfn, 3)
    assert end_capture(mm) == (pfn if captured else NO_PAGE)


def test_another_zone_s_block_is_not_captured(boot: Boot) -> None:
    mm = boot(8, zones=(ZoneSpec("DMA32", 0, 1024), ZoneSpec("Normal", 1024, 2048)))
    taken = occupy(mm)
    pfn = next(page for page in taken if page >= 1024 and page % 8 == 0)
    begin_capture(mm, 3)
    for page in range(pfn, pfn + 8):
        mm.mem.mem_map[page]._refcount = 0
    __free_one_page(mm.mem, pfn, 1, 3, int(mm.mem.pageblock[pfn // 512]), FPI_NONE)
    assert end_capture(mm) == NO_PAGE


@pytest.mark.parametrize("halves", [(True, True), (True, False), (False, True), (False, False)])
def test_a_captured_page_s_hint_is_true_and_serves_the_request(
    block: tuple[MemoryManager, int], halves: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged like every other block: known to be zero if both halves were. It is read once, and gone."""
    mm, pfn = block
    page_bytes(mm, pfn, 8)[:] = 0x5A
    for half, zero in zip((pfn, pfn + 4), halves, strict=True):
        if zero:
            page_bytes(mm, half, 4)[:] = 0
    begin_capture(mm, 3)
    free_as(mm, pfn + 4, 2, zeroed=halves[1])
    free_as(mm, pfn, 2, zeroed=halves[0])
    assert is_marked_zero(mm.mem, pfn) == all(halves)
    assert not is_marked_zero(mm.mem, pfn + 4)
    compact_zone_end(mm.mem)
    mm.mem.vm[0].capture_order = 0
    before = mm.vm_stats()
    # The way on from here, with what compaction would have returned.
    monkeypatch.setattr(page_alloc, "try_to_compact_pages", lambda *args: COMPACT_SUCCESS)
    direct_compact = getattr(_direct_compact, "py_func", _direct_compact)
    gfp = GFP_KERNEL | GFP_ZERO | GFP_COMP
    got, _ = direct_compact(mm.mem, gfp, 3, 0, -1, 0, COMPACT_PRIO_SYNC_LIGHT, 0)
    after = mm.vm_stats()
    assert got == pfn
    assert reads_zero(mm, pfn, 3)
    assert not is_marked_zero(mm.mem, pfn)
    known = 8 * PAGE_SIZE if all(halves) else 0
    assert after.known_zero_bytes - before.known_zero_bytes == known
    assert after.zeroed_bytes - before.zeroed_bytes == 8 * PAGE_SIZE - known
    assert compaction_is_idle(mm.mem)
    mm.mem.mem_map[pfn]._refcount = 1
    mm.free_pages(Pfn(pfn), 3)
    check(mm)


def test_direct_compaction_hands_out_what_it_captured(scattered: Guest) -> None:
    mm, process, held = scattered
    free = free_pages(mm)
    got, result = _direct_compact(
        mm.mem, GFP_TRANSHUGE | GFP_ZERO, 9, 0, 0x7F00_0000_0000, 0, COMPACT_PRIO_SYNC_LIGHT, 0
    )
    assert result == COMPACT_SUCCESS
    assert reads_zero(mm, int(got), 9)
    assert free_pages(mm) == free - 512
    mm.mem.mem_map[got]._refcount = 1
    check(mm)
    mm.free_pages(Pfn(int(got)), 9)
    check(mm)
    assert holds(process, held)


# ------------------------------------------------------------------ on request


def test_on_request_free_memory_comes_together(scattered: Guest) -> None:
    mm, process, held = scattered
    free = free_pages(mm)
    assert mm.compact_memory() > 0
    assert free_pages(mm) == free
    assert int(mm.mem.zone[0].nr_free[9:].sum()) >= 1
    assert holds(process, held)
    assert events(mm) == (0, 0, 0), "nobody waited"
    check(mm)
    process.exit()
    mm.drain_all_pages()
    check(mm)


def test_every_zone_is_compacted_and_pages_stay_in_theirs(boot: Boot) -> None:
    mm = boot(12, zones=(ZoneSpec("DMA32", 0, 1536), ZoneSpec("Normal", 1536, 3072)))
    mm.balloon.enqueue(pages(*fragment_movable(mm)))
    moves: list[tuple[int, int]] = []

    def migratepage(new: Pfn, old: Pfn) -> bool:
        moves.append((old // 1536, new // 1536))
        return False

    mm.balloon.register_migratepage(migratepage)
    assert mm.compact_memory() == len(moves)
    assert set(moves) == {(0, 0), (1, 1)}
    check(mm)


def test_a_driver_that_compacts_or_allocates_in_its_callback_does_no_harm(boot: Boot) -> None:
    """Compaction never runs inside compaction (kernel: PF_MEMALLOC)."""
    mm = boot(8, thp="madvise")
    mm.balloon.enqueue(pages(*fragment_movable(mm)))
    inside: list[object] = []

    def migratepage(new: Pfn, old: Pfn) -> bool:
        inside.append(mm.compact_memory())
        inside.append(int(try_to_compact_pages(mm.mem, GFP_TRANSHUGE, 9, 0, 0, COMPACT_PRIO_ASYNC, 0)))
        raise BlockingIOError

    mm.balloon.register_migratepage(migratepage)
    assert mm.compact_memory() == 0
    assert set(inside[0::2]) == {0}
    assert set(inside[1::2]) == {COMPACT_SKIPPED}
    check(mm)


def test_results_rank_as_the_kernel_ranks_them() -> None:
    assert COMPACT_SKIPPED < COMPACT_DEFERRED < COMPACT_CONTINUE < COMPACT_COMPLETE < COMPACT_SUCCESS


def test_a_guest_of_kernel_pages_is_left_as_it_is(boot: Boot) -> None:
    mm = boot(8)
    stay = fragment(mm)
    assert mm.compact_memory() == 0
    assert (mm.mem.mem_map[stay]._refcount == 1).all()
    check(mm)
    release(mm, stay)
    mm.alloc_pages(GFP_KERNEL | GFP_COMP, 9)
    assert events(mm) == (0, 0, 0)
    assert mm.alloc_pages(GFP_HIGHUSER_MOVABLE) != 0
