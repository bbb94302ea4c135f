# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostzero.errors import DeviceError, MmError, UsageError, VmBug
from hostzero.jit import COMPILER_ON
from hostzero.mm import MemoryManager, PageReportingDevInfo, ZoneSpec
from hostzero.mm.buddy import PAGE_REPORTING_ACTIVE, PAGE_REPORTING_IDLE, PAGE_REPORTING_REQUESTED
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import MIGRATE_ISOLATE, MIGRATE_MOVABLE, MIGRATE_UNMOVABLE
from hostzero.mm.page_flags import PG_private, PG_uptodate
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import booted, dirty, free_lists, is_marked_zero, page_bytes, reads_zero, verify
from tests.mm.processes import (
    Entries,
    FakeHost,
    Image,
    image,
    is_reported,
    occupy,
    release,
    release_blocks,
    restore,
)

# Blocks of order 4 that cannot merge, in two pageblocks; the first of each list is met first.
SCATTERED = [(1024 + 32 * i, 4) for i in range(16)] + [(1536 + 32 * i, 4) for i in range(16)]


def movable(mm: MemoryManager, order: int = 4) -> list[int]:
    return free_lists(mm.mem).get((0, order, MIGRATE_MOVABLE), [])


def with_blocks(mm: MemoryManager, blocks: Entries) -> MemoryManager:
    """Leave these blocks free, dirty, and single pages around them, so that both zones can spare a batch."""
    occupy(mm)
    for pfn, order in blocks:
        dirty(mm, pfn, order)
    release(mm, [*range(1, 128, 2), *(pfn + 16 + odd for pfn, _ in SCATTERED[16:] for odd in (1, 3, 5))])
    release_blocks(mm, blocks)
    return mm


@functools.cache
def scattered_image() -> Image:
    # Made once: taking all memory page by page is slow without the compiler.
    with booted() as mm:
        return image(with_blocks(mm, SCATTERED))


@pytest.fixture
def scattered(mm: MemoryManager) -> MemoryManager:
    """A guest with 32 free blocks of order 4 that cannot merge."""
    return restore(mm, scattered_image())


# ------------------------------------------------------------------ registering


@pytest.mark.parametrize(
    ("asked", "got"), [(0, 32), (-1, 32), (1, 1), (5, 5), (31, 31), (32, 32), (33, 32), (4096, 32)]
)
def test_the_capacity_is_clamped(mm: MemoryManager, asked: int, got: int) -> None:
    """Patch 4: 0 or more than 32 becomes 32; it need not be a power of two."""
    host = FakeHost(mm, capacity=asked).register()
    assert host.info.capacity == got


@pytest.mark.parametrize(("asked", "got"), [(-1, 9), (11, 9), (0, 0), (2, 2), (10, 10)])
def test_the_smallest_order(mm: MemoryManager, asked: int, got: int) -> None:
    FakeHost(mm, order=asked).register()
    assert mm.page_reporting.order == got


def test_only_one_device_at_a_time(mm: MemoryManager) -> None:
    first, second = FakeHost(mm).register(), FakeHost(mm)
    with pytest.raises(MmError, match="has a device already"):
        second.register()
    mm.page_reporting.unregister(second.info)
    with pytest.raises(MmError, match="has a device already"):
        second.register()
    mm.page_reporting.unregister(first.info)
    second.register()
    assert mm.page_reporting.state == PAGE_REPORTING_REQUESTED


def test_what_is_free_already_is_reported_after_registering(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, order=4).register()
    scattered.clock.advance(2)
    assert sorted(host.blocks()) == sorted(SCATTERED)
    assert all(is_reported(scattered, pfn) and is_marked_zero(scattered.mem, pfn) for pfn, _ in SCATTERED)
    verify(scattered)


def test_blocks_below_the_smallest_order_are_not_reported(mm: MemoryManager) -> None:
    with_blocks(mm, [(1024, 4), (1100, 2), (1200, 3)])
    host = FakeHost(mm, capacity=1, order=3).register()
    mm.clock.advance(2)
    assert sorted(host.blocks()) == [(1024, 4), (1200, 3)]


def test_a_smaller_order_written_later_reports_what_was_too_small(mm: MemoryManager) -> None:
    with_blocks(mm, [(1024, 4), (1100, 2), (1200, 3)])
    host = FakeHost(mm, capacity=1, order=4).register()
    mm.clock.advance(2)
    assert host.blocks() == [(1024, 4)]
    mm.page_reporting.order = 3
    mm.page_reporting.flush(10)
    assert host.blocks() == [(1024, 4), (1200, 3)]
    verify(mm)


@pytest.mark.parametrize("order", [-1, 11])
def test_an_order_that_no_block_has_is_refused(mm: MemoryManager, order: int) -> None:
    with pytest.raises(UsageError, match=f"page_reporting_order {order}: must be from 0 to 10"):
        mm.page_reporting.order = order


# ------------------------------------------------------------------ the batch


def test_the_batch_is_filled_from_its_end(scattered: MemoryManager) -> None:
    """The first block of the list is the last of the batch; what is left over starts at sg[offset]."""
    met = movable(scattered)
    host = FakeHost(scattered, capacity=5, order=4).register()
    scattered.page_reporting.process()
    # Budget ceil(32 / 80) = 1: two calls from the loop; the loop never sees a batch too many.
    assert [[pfn for pfn, _ in call] for call in host.calls] == [met[0:5][::-1], met[5:10][::-1]]
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED


def test_what_is_left_over_is_reported_once(scattered: MemoryManager) -> None:
    """Blocks of several lists share the last call, smaller orders behind larger ones."""
    release_blocks(scattered, [(640, 5), (700, 2), (800, 5)])
    host = FakeHost(scattered, capacity=30, order=4).register()
    met, larger = movable(scattered), movable(scattered, 5)
    scattered.page_reporting.process()
    assert [[pfn for pfn, _ in call] for call in host.calls] == [
        met[:30][::-1],
        (met[30:] + larger)[::-1],
    ]
    assert [order for _, order in host.calls[1]] == [5, 5, 4, 4]
    assert scattered.page_reporting.state == PAGE_REPORTING_IDLE


def two_zones(boot: Boot, **config: object) -> MemoryManager:
    return boot(8, zones=(ZoneSpec("DMA32", 0, 1024), ZoneSpec("Normal", 1024, 2048)), **config)


def test_each_zone_has_its_own_batch(boot: Boot) -> None:
    mm = with_blocks(two_zones(boot), [(512, 4), (600, 3), (1024, 4), (1100, 2), (1600, 3)])
    host = FakeHost(mm, capacity=4, order=2).register()
    mm.page_reporting.process()
    assert host.calls == [[(512, 4), (600, 3)], [(1024, 4), (1600, 3), (1100, 2)]]


def test_the_budget_allows_one_call_more_than_it_says(scattered: MemoryManager) -> None:
    """ceil(32 / (16 * 1)) = 2 is checked as `< 0`: three calls, then the next pass."""
    host = FakeHost(scattered, capacity=1, order=4).register()
    met = movable(scattered)
    scattered.page_reporting.process()
    assert [call[0][0] for call in host.calls] == met[:3]
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED
    # The next pass goes on where this one stopped, and the reported ones are at the tail.
    assert movable(scattered) == met[3:] + met[:3]
    verify(scattered)


def expected_pass(mm: MemoryManager, capacity: int, order_min: int) -> tuple[list[Entries], bool]:
    """Return the calls of one pass over zone 0 and whether its budget ran out, without merging."""
    lists = free_lists(mm.mem)
    zone = mm.mem.zone[0]
    calls, batch = list[Entries](), Entries()
    free, nr_free = int(zone.nr_free_pages), [int(n) for n in zone.nr_free]
    exhausted = False
    if free <= int(zone.watermark_low) + (capacity << order_min):
        return [], False

    def report() -> None:
        nonlocal free
        calls.append(batch[::-1])
        for _, order in batch:
            nr_free[order] += 1
            free += 1 << order
        batch.clear()

    for order in range(order_min, 11):
        for migratetype in range(5):
            blocks = [pfn for pfn in lists.get((0, order, migratetype), []) if not is_reported(mm, pfn)]
            budget = -(-nr_free[order] // (16 * capacity))
            for pfn in blocks:
                if len(batch) == capacity and budget >= 0:
                    report()
                    budget -= 1
                if budget < 0:
                    exhausted = True
                    break
                if free <= int(zone.watermark_min) + (1 << order):
                    break
                batch.append((pfn, order))
                nr_free[order] -= 1
                free -= 1 << order
    if batch:
        report()
    return calls, exhausted


@settings(max_examples=40 if COMPILER_ON else 4)
@given(
    halves=st.sets(st.integers(0, 127), min_size=1, max_size=70),
    orders=st.lists(st.integers(0, 3), min_size=128, max_size=128),
    capacity=st.integers(1, 40),
    order_min=st.integers(0, 3),
    watermark=st.integers(0, 40),
    passes=st.integers(1, 3),
)
def test_passes_report_what_a_naive_model_expects(
    halves: set[int], orders: list[int], capacity: int, order_min: int, watermark: int, passes: int
) -> None:
    """Blocks that cannot merge: each pass makes exactly the calls, in order, that the rules say."""
    with booted(4) as mm:
        occupy(mm)
        release_blocks(mm, [(512 + 4 * half, min(orders[half], 1)) for half in halves if half % 2 == 0])
        release_blocks(mm, [(512 + 4 * half, min(orders[half], 2)) for half in halves if half % 2 == 1])
        mm.mem.zone[0].watermark_min = watermark
        host = FakeHost(mm, capacity=capacity, order=order_min).register()
        for _ in range(passes):
            expected, exhausted = expected_pass(mm, host.info.capacity, order_min)
            host.calls.clear()
            mm.page_reporting.process()
            assert host.calls == expected
            state = PAGE_REPORTING_REQUESTED if exhausted else PAGE_REPORTING_IDLE
            assert mm.page_reporting.state == state
            verify(mm)


def test_reported_blocks_are_skipped_and_last_in_line(scattered: MemoryManager) -> None:
    """The host hears of a block once; an allocation takes what it did not hear of first."""
    host = FakeHost(scattered, capacity=32, order=4).register()
    scattered.page_reporting.process()
    assert len(host.blocks()) == 32
    scattered.page_reporting.process()
    assert len(host.blocks()) == 32
    release_blocks(scattered, [(640, 4)])
    assert movable(scattered)[0] == 640
    assert scattered.alloc_pages(GFP_HIGHUSER_MOVABLE, 4) == 640
    scattered.free_pages(Pfn(640), 4)
    scattered.page_reporting.process()
    assert host.calls[1:] == [[(640, 4)]]
    verify(scattered)


def test_the_next_block_is_rotated_to_the_front(mm: MemoryManager) -> None:
    """While the host works, the block that comes next is first, reported ones behind it."""
    with_blocks(mm, [(640, 4), (704, 4)])
    host = FakeHost(mm, capacity=1, order=4).register()
    mm.page_reporting.process()
    assert len(host.blocks()) == 2
    # Beside free blocks of order 5 a merge is likely, and such blocks go to the tail.
    release_blocks(mm, [(1056, 5), (1120, 5), (1024, 4), (1088, 4)])
    assert movable(mm)[2:] == [1024, 1088]
    seen: list[list[int]] = []
    host.during = lambda call: seen.append(movable(mm))
    mm.page_reporting.process()
    assert host.calls[2:4] == [[(1024, 4)], [(1088, 4)]]
    assert seen[0][0] == 1088
    verify(mm)


def test_a_block_that_merged_is_neither_reported_nor_known_zero(mm: MemoryManager) -> None:
    """Its buddy was freed, dirty, while the host worked: the claim was about the smaller block."""
    with_blocks(mm, [(1024, 4), (1200, 3)])
    page_bytes(mm, 1040, 16)[:] = 0x77
    host = FakeHost(mm, capacity=2, order=2).register()
    host.during = lambda call: release(mm, range(1040, 1056))
    mm.page_reporting.process()
    assert host.calls == [[(1024, 4), (1200, 3)]]
    assert movable(mm, 5) == [1024]
    assert not is_reported(mm, 1024)
    assert not is_marked_zero(mm.mem, 1024)
    assert is_reported(mm, 1200)
    verify(mm)
    # The free of the buddy asked for the pass in which the larger block is reported.
    host.during = lambda call: None
    assert mm.page_reporting.state == PAGE_REPORTING_REQUESTED
    mm.clock.advance(2)
    assert host.calls[1:] == [[(1024, 5)]]
    assert is_marked_zero(mm.mem, 1024)
    verify(mm)


def test_an_upper_half_that_merged_leaves_no_mark_inside(mm: MemoryManager) -> None:
    with_blocks(mm, [(1040, 4), (1200, 3)])
    page_bytes(mm, 1024, 16)[:] = 0x77
    host = FakeHost(mm, capacity=2, order=2).register()
    host.during = lambda call: release(mm, range(1024, 1040))
    mm.page_reporting.process()
    assert not is_marked_zero(mm.mem, 1040)
    assert not is_reported(mm, 1040)
    assert not is_marked_zero(mm.mem, 1024)
    verify(mm)


# ------------------------------------------------------------------ what the host answers


def test_only_the_blocks_whose_bit_is_set_become_known_zero(scattered: MemoryManager) -> None:
    """Lifecycle: drain, bit i belongs to the i-th entry of the call, in full and leftover batches."""
    chosen = {pfn for pfn, _ in SCATTERED[::3]}
    host = FakeHost(scattered, capacity=30, order=4, zeroes=lambda pfn, order: pfn in chosen).register()
    scattered.page_reporting.process()
    assert [len(call) for call in host.calls] == [30, 2]
    assert {pfn for pfn, _ in SCATTERED if is_marked_zero(scattered.mem, pfn)} == chosen
    assert all(is_reported(scattered, pfn) for pfn, _ in SCATTERED)
    verify(scattered)


def test_a_leftover_is_answered_from_bit_zero_on(scattered: MemoryManager) -> None:
    """Two blocks in a batch of 32: the host's bits 0 and 1, not 30 and 31."""
    mm = scattered
    chosen = {SCATTERED[0][0]}
    host = FakeHost(mm, capacity=32, order=3, zeroes=lambda pfn, order: pfn in chosen).register()
    mm.page_reporting.process()
    assert len(host.calls[0]) == 32
    release_blocks(mm, [(640, 4), (700, 2), (736, 3)])
    chosen |= {640}
    mm.page_reporting.process()
    assert host.calls[1:] == [[(640, 4), (736, 3)]]
    assert is_marked_zero(mm.mem, 640)
    assert not is_marked_zero(mm.mem, 736)
    verify(mm)


def test_bits_do_not_outlive_their_call(scattered: MemoryManager) -> None:
    """A host that leaves the bitmap as it found it has claimed nothing."""
    host = FakeHost(scattered, capacity=8, order=4)
    host.zeroes = lambda pfn, order: len(host.calls) == 1
    host.register()
    scattered.page_reporting.process()
    assert len(host.calls) == 2
    assert all(is_marked_zero(scattered.mem, pfn) for pfn, _ in host.calls[0])
    assert not any(is_marked_zero(scattered.mem, pfn) for pfn, _ in host.calls[1])
    verify(scattered)


def test_a_host_that_promises_no_zeros_is_not_believed(scattered: MemoryManager) -> None:
    """Set bits count only with host_zeroes_pages: an old device's bitmap is no claim."""
    FakeHost(scattered, capacity=32, order=4, host_zeroes_pages=False).register()
    scattered.page_reporting.process()
    assert all(is_reported(scattered, pfn) for pfn, _ in SCATTERED)
    assert not any(is_marked_zero(scattered.mem, pfn) for pfn, _ in SCATTERED)


@pytest.mark.parametrize("error", [OSError("device gone"), DeviceError("refused")])
def test_a_failing_device_marks_nothing(scattered: MemoryManager, error: Exception) -> None:
    """Lifecycle: no mark on error, whatever the bitmap says; the blocks go back and it goes on."""
    lists = free_lists(scattered.mem)
    host = FakeHost(scattered, capacity=8, order=4).register()
    host.fail = error
    scattered.clock.advance(2)
    assert len(host.calls) == 1
    assert scattered.page_reporting.failed_calls == 1
    assert scattered.page_reporting.reported_blocks == 0
    assert not any(is_reported(scattered, pfn) or is_marked_zero(scattered.mem, pfn) for pfn, _ in SCATTERED)
    assert {key: sorted(pfns) for key, pfns in free_lists(scattered.mem).items()} == {
        key: sorted(pfns) for key, pfns in lists.items()
    }
    assert scattered.page_reporting.state == PAGE_REPORTING_IDLE
    verify(scattered)
    # Nothing is queued for it, but the next free is.
    scattered.clock.advance(10)
    assert len(host.calls) == 1
    host.fail = None
    release_blocks(scattered, [(640, 4)])
    scattered.clock.advance(2)
    assert len(host.calls) > 1
    verify(scattered)


def test_a_failing_leftover_marks_nothing(mm: MemoryManager) -> None:
    with_blocks(mm, [(1024, 4), (1200, 3)])
    host = FakeHost(mm, capacity=4, order=2).register()
    host.fail = OSError("device gone")
    mm.page_reporting.process()
    assert host.calls == [[(1024, 4), (1200, 3)]]
    assert not is_reported(mm, 1024)
    assert not is_marked_zero(mm.mem, 1200)
    verify(mm)


def test_an_error_ends_the_pass_before_the_next_zone(boot: Boot) -> None:
    mm = with_blocks(two_zones(boot), [(512, 4), (1024, 4)])
    host = FakeHost(mm, capacity=1, order=3).register()
    host.fail = OSError("device gone")
    mm.page_reporting.process()
    assert host.calls == [[(512, 4)]]
    host.fail = None
    mm.page_reporting.process()
    assert host.calls[1:] == [[(512, 4)], [(1024, 4)]]


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), VmBug("a failed assertion")])
def test_a_defect_in_the_driver_is_not_taken_for_a_failing_device(
    scattered: MemoryManager, error: Exception
) -> None:
    """It reaches the caller; the blocks are back, and later passes run."""
    host = FakeHost(scattered, capacity=8, order=4).register()
    host.fail = error
    with pytest.raises(type(error)):
        scattered.clock.advance(2)
    assert not any(is_reported(scattered, pfn) or is_marked_zero(scattered.mem, pfn) for pfn, _ in SCATTERED)
    verify(scattered)
    host.fail = None
    release_blocks(scattered, [(640, 4)])
    scattered.clock.advance(2)
    assert len(host.calls) > 1
    verify(scattered)


def test_a_reported_block_is_allocated_without_zeroing(scattered: MemoryManager) -> None:
    FakeHost(scattered, capacity=32, order=4).register()
    scattered.page_reporting.process()
    before = scattered.vm_stats()
    pfn = scattered.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 4)
    after = scattered.vm_stats()
    assert reads_zero(scattered, pfn, 4)
    assert after.zeroed_bytes == before.zeroed_bytes
    assert after.known_zero_bytes == before.known_zero_bytes + (16 << 12)
    assert int(scattered.mem.mem_map[pfn].flags_f) & (PG_private | PG_uptodate) == 0
    dirty(scattered, pfn, 4)
    scattered.free_pages(pfn, 4)
    assert not is_marked_zero(scattered.mem, pfn)
    verify(scattered)


# ------------------------------------------------------------------ when


def test_a_pass_runs_two_seconds_after_the_request_and_once(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()
    scattered.clock.advance(1.999)
    assert host.calls == []
    scattered.clock.advance(0.001)
    assert len(host.calls) == 1
    scattered.clock.advance(100)
    assert len(host.calls) == 1
    # A second free within the two seconds does not postpone or double the pass.
    release_blocks(scattered, [(640, 4)])
    scattered.clock.advance(1)
    release_blocks(scattered, [(700, 2), (800, 4)])
    scattered.clock.advance(0.999)
    assert len(host.calls) == 1
    scattered.clock.advance(0.001)
    assert [sorted(call) for call in host.calls[1:]] == [[(640, 4), (800, 4)]]
    scattered.clock.advance(100)
    assert len(host.calls) == 2


def test_a_free_below_the_smallest_order_requests_nothing(scattered: MemoryManager) -> None:
    FakeHost(scattered, capacity=32, order=4).register()
    scattered.clock.advance(2)
    release_blocks(scattered, [(640, 3)])
    assert scattered.page_reporting.state == PAGE_REPORTING_IDLE
    release_blocks(scattered, [(648, 3)])
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED


def test_a_request_during_a_pass_queues_the_next(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()

    def free_one(call: Entries) -> None:
        assert scattered.page_reporting.state == PAGE_REPORTING_ACTIVE
        host.during = lambda later: None
        release_blocks(scattered, [(640, 4)])

    host.during = free_one
    scattered.clock.advance(2)
    assert len(host.calls) == 1
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED
    scattered.clock.advance(1.999)
    assert len(host.calls) == 1
    scattered.clock.advance(0.001)
    assert host.calls[1:] == [[(640, 4)]]
    assert scattered.page_reporting.state == PAGE_REPORTING_IDLE


def test_an_exhausted_budget_goes_on_two_seconds_later(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=1, order=4).register()
    for turn in range(1, 11):
        scattered.clock.advance(2)
        assert len(host.calls) == 3 * turn
    scattered.clock.advance(100)
    assert sorted(host.blocks()) == sorted(SCATTERED)
    assert scattered.page_reporting.state == PAGE_REPORTING_IDLE


def test_isolated_pageblocks_are_not_reported(mm: MemoryManager) -> None:
    with_blocks(mm, [(640, 4), (1024, 4)])
    taken = {mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 4) for _ in range(2)}
    assert taken == {640, 1024}
    mm.mem.pageblock[2] = MIGRATE_ISOLATE
    for pfn in taken:
        mm.free_pages(pfn, 4)
    host = FakeHost(mm, capacity=1, order=2).register()
    mm.page_reporting.process()
    assert host.calls == [[(640, 4)]]
    verify(mm)


def test_a_zone_short_of_memory_is_left_alone(scattered: MemoryManager) -> None:
    """free > low + (capacity << order), or the zone is skipped in silence."""
    zone = scattered.mem.zone[0]
    host = FakeHost(scattered, capacity=2, order=4).register()
    zone.watermark_low = int(zone.nr_free_pages) - 32
    scattered.page_reporting.process()
    assert host.calls == []
    assert scattered.page_reporting.state == PAGE_REPORTING_IDLE
    zone.watermark_low -= 1
    scattered.page_reporting.process()
    assert host.calls != []


# ------------------------------------------------------------------ flush


def test_flush_reports_at_least_its_budget(scattered: MemoryManager) -> None:
    """A pass reports three blocks here; flush overshoots to whole rounds of one or two passes."""
    host = FakeHost(scattered, capacity=1, order=4).register()
    scattered.page_reporting.process()
    count = scattered.page_reporting.flush(4)
    assert 4 <= count <= 9
    assert len(host.blocks()) == 3 + count
    assert len(host.blocks()) < 32


@pytest.mark.parametrize("budget", [32, 33, 2**32, 2**64, 2**64 - 1])
def test_flush_ends_when_nothing_is_left(scattered: MemoryManager, budget: int) -> None:
    host = FakeHost(scattered, capacity=1, order=4).register()
    assert scattered.page_reporting.flush(budget) == 32
    assert sorted(host.blocks()) == sorted(SCATTERED)
    assert scattered.page_reporting.flush(budget) == 0
    scattered.clock.advance(100)
    assert len(host.blocks()) == 32


def test_flush_of_nothing_does_nothing(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, order=4).register()
    assert scattered.page_reporting.flush(0, signal_pending=lambda: True) == 0
    assert host.calls == []
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED


def test_flush_takes_no_negative_budget(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, order=4).register()
    with pytest.raises(ValueError, match="unsigned"):
        scattered.page_reporting.flush(-1)
    assert host.calls == []


def test_flush_without_a_device_returns_zero(mm: MemoryManager) -> None:
    assert mm.page_reporting.flush(2**64) == 0


def test_a_signal_ends_a_flush(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=1, order=4).register()
    with pytest.raises(InterruptedError):
        scattered.page_reporting.flush(32, signal_pending=lambda: len(host.calls) >= 6)
    assert 6 <= len(host.calls) < 32
    with pytest.raises(InterruptedError):
        scattered.page_reporting.flush(1, signal_pending=lambda: True)


def test_flush_is_not_absorbed_by_a_pass_that_is_queued(boot: Boot) -> None:
    """Patch 29's double flush: a pass that finds nothing does not end the round."""
    mm = with_blocks(two_zones(boot), [(1024, 4)])
    host = FakeHost(mm, capacity=1, order=3).register()
    # The pass that is pending since registration fails; flush runs it, and one of its own.
    errors: list[BaseException | None] = [OSError("first call fails"), None, None]

    def next_error(call: Entries) -> None:
        host.fail = errors.pop(0)

    host.during = next_error
    assert mm.page_reporting.flush(1) == 1
    assert host.calls == [[(1024, 4)], [(1024, 4)]]


def test_flush_while_idle_runs_at_once(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()
    scattered.clock.advance(2)
    release_blocks(scattered, [(640, 2), (644, 2), (648, 3)])
    assert scattered.page_reporting.flush(1) == 1
    assert host.calls[1:] == [[(640, 4)]]
    scattered.clock.advance(100)
    assert len(host.calls) == 2


def test_flush_ends_with_a_device_that_always_fails(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()
    host.fail = OSError("device gone")
    assert scattered.page_reporting.flush(2**64) == 0
    assert 1 <= len(host.calls) <= 2


# ------------------------------------------------------------------ what becomes of reported blocks


def test_the_rest_of_a_reported_block_is_not_reported_again(mm: MemoryManager) -> None:
    """Patch 3: an allocation cuts a reported block; its parts inherit both marks."""
    with_blocks(mm, [(1024, 7)])
    host = FakeHost(mm, capacity=4, order=2).register()
    mm.page_reporting.process()
    assert host.calls == [[(1024, 7)]]
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 3)
    assert 1024 <= pfn < 1152
    for _ in range(3):
        mm.page_reporting.process()
    assert len(host.calls) == 1
    rest = [block for order in range(3, 7) for block in movable(mm, order)]
    assert len(rest) == 4
    assert all(is_reported(mm, block) and is_marked_zero(mm.mem, block) for block in rest)
    verify(mm)


def test_a_claimed_pageblock_is_not_reported_again(mm: MemoryManager) -> None:
    """Patches 3 and 26: a kernel page claims a reported movable pageblock."""
    with_blocks(mm, [(1024, 9)])
    assert movable(mm, 9) == [1024]
    host = FakeHost(mm, capacity=1, order=5).register()
    mm.page_reporting.process()
    assert host.calls == [[(1024, 9)]]
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 4)
    assert pfn == 1024
    rest = [
        block for order in range(4, 9) for block in free_lists(mm.mem).get((0, order, MIGRATE_UNMOVABLE), [])
    ]
    assert len(rest) == 5
    mm.page_reporting.process()
    assert len(host.calls) == 1
    assert all(is_marked_zero(mm.mem, block) for block in rest)
    assert mm.vm_stats().known_zero_bytes >= 16 << 12
    verify(mm)


def test_a_written_page_makes_the_merged_block_unknown(mm: MemoryManager) -> None:
    """After the round trip the block is whole again, and reported and zeroed anew."""
    with_blocks(mm, [(1024, 7)])
    host = FakeHost(mm, capacity=1, order=5).register()
    mm.page_reporting.process()
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 5)
    dirty(mm, pfn, 5)
    mm.free_pages(pfn, 5)
    assert movable(mm, 7) == [1024]
    assert not is_reported(mm, 1024)
    assert not is_marked_zero(mm.mem, 1024)
    verify(mm)
    mm.clock.advance(2)
    assert host.calls == [[(1024, 7)], [(1024, 7)]]
    verify(mm)


def test_claims_outlive_their_device(scattered: MemoryManager) -> None:
    """Unregistering keeps what is known; leaving its list still clears PG_reported."""
    host = FakeHost(scattered, capacity=32, order=4).register()
    scattered.page_reporting.process()
    scattered.page_reporting.unregister(host.info)
    assert all(is_marked_zero(scattered.mem, pfn) for pfn, _ in SCATTERED)
    verify(scattered)
    before = scattered.vm_stats()
    pfn = scattered.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 4)
    assert reads_zero(scattered, pfn, 4)
    assert scattered.vm_stats().zeroed_bytes == before.zeroed_bytes
    assert int(scattered.mem.mem_map[pfn].flags_f) & (PG_private | PG_uptodate) == 0
    assert scattered.vm_stats().bad_pages == 0
    verify(scattered)


def test_no_pass_runs_after_unregistering(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()
    scattered.page_reporting.unregister(host.info)
    release_blocks(scattered, [(640, 4)])
    scattered.clock.advance(100)
    scattered.page_reporting.process()
    assert host.calls == []
    # The next device starts with a pass of its own.
    other = FakeHost(scattered, capacity=32, order=4).register()
    scattered.clock.advance(2)
    assert len(other.blocks()) == 33


def test_a_device_without_promises_after_one_with(scattered: MemoryManager) -> None:
    """The promise belongs to the device: its successor's bitmap is not believed."""
    first = FakeHost(scattered, capacity=32, order=4).register()
    scattered.page_reporting.unregister(first.info)
    FakeHost(scattered, capacity=32, order=4, host_zeroes_pages=False).register()
    scattered.page_reporting.process()
    assert not any(is_marked_zero(scattered.mem, pfn) for pfn, _ in SCATTERED)


def test_counters(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=8, order=4).register()
    scattered.page_reporting.process()
    reporting = scattered.page_reporting
    assert (reporting.report_calls, reporting.reported_blocks) == (len(host.calls), len(host.blocks()))
    assert isinstance(host.info, PageReportingDevInfo)
