# SPDX-License-Identifier: GPL-2.0-only
"""Registering, and one pass: which blocks are reported, in which calls and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostzero.errors import MmError, UsageError
from hostzero.jit import COMPILER_ON
from hostzero.mm import MemoryManager
from hostzero.mm.buddy import PAGE_REPORTING_IDLE, PAGE_REPORTING_REQUESTED
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import booted, free_lists, is_marked_zero, page_bytes, verify
from tests.mm.processes import (
    Entries,
    FakeHost,
    is_reported,
    occupy,
    release,
    release_blocks,
)
from tests.mm.reporting import SCATTERED, movable, two_zones, with_blocks

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


def test_time_that_passes_inside_a_report_starts_no_second_pass(scattered: MemoryManager) -> None:
    """Work does not run beside itself: the batch of the pass that is under way would be overwritten."""
    host = FakeHost(scattered, capacity=4, order=4).register()

    def let_time_pass(call: Entries) -> None:
        calls = len(host.calls)
        scattered.page_reporting.process()
        scattered.clock.advance(10)
        assert len(host.calls) == calls

    host.during = let_time_pass
    scattered.page_reporting.process()
    assert len(host.calls) == 2
    assert all(is_marked_zero(scattered.mem, pfn) for pfn, _ in host.blocks())
    verify(scattered)
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED
    scattered.clock.advance(200)
    assert sorted(host.blocks()) == sorted(SCATTERED)
    verify(scattered)


def test_a_device_that_leaves_inside_its_own_report_is_not_called_again(scattered: MemoryManager) -> None:
    """Nor are its answers drained under the promise of the device that comes after it."""
    host = FakeHost(scattered, capacity=4, order=4, host_zeroes_pages=False).register()
    other = FakeHost(scattered, capacity=8, order=4)

    def leave(call: Entries) -> None:
        scattered.page_reporting.unregister(host.info)
        other.register()

    host.during = leave
    scattered.page_reporting.process()
    assert len(host.calls) == 1
    assert not any(is_marked_zero(scattered.mem, pfn) for pfn, _ in host.blocks())
    verify(scattered)
    scattered.clock.advance(20)
    assert len(host.calls) == 1
    assert len(other.calls) > 0
    verify(scattered)
