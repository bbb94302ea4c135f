# SPDX-License-Identifier: GPL-2.0-only
"""What the host answers, what is believed of it, and what becomes of reported blocks."""

from __future__ import annotations

import pytest

from hostzero.errors import DeviceError, VmBug
from hostzero.mm import MemoryManager, PageReportingDevInfo
from hostzero.mm.buddy import PAGE_REPORTING_ACTIVE, PAGE_REPORTING_IDLE, PAGE_REPORTING_REQUESTED
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import MIGRATE_ISOLATE, MIGRATE_UNMOVABLE
from hostzero.mm.page_flags import PG_private, PG_uptodate
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, free_lists, is_marked_zero, reads_zero, verify
from tests.mm.processes import (
    Entries,
    FakeHost,
    is_reported,
    release_blocks,
)
from tests.mm.reporting import SCATTERED, movable, two_zones, with_blocks

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
