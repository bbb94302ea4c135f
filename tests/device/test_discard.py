# SPDX-License-Identifier: GPL-2.0-only
"""Evidence of zero: what is discarded, what is refused, and what counts as proven."""

from __future__ import annotations

import logging

import pytest

from hostzero.device.byte_ranges import ByteRanges
from hostzero.device.discard import Discarder
from hostzero.device.metrics import QueueMetrics, SkipReason
from hostzero.errors import DeviceError, RamError
from hostzero.ram import GuestMemory, MemoryRegion, Ram
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.virtio.ring_layout import Segment
from tests.device.guest import FailingMemory, HugeMemory, WrappedMemory

NO_RINGS = ByteRanges()


def test_a_proven_discard_is_counted_as_zero(ram: Ram) -> None:
    metrics = QueueMetrics()
    assert Discarder(WrappedMemory(ram)).discard(PAGE_SIZE, 3 * PAGE_SIZE, metrics)
    assert (metrics.discard_calls, metrics.discarded_bytes, metrics.proven_zero_bytes) == (1, 12288, 12288)
    assert metrics.discard_sizes[1] == sum(metrics.discard_sizes) == 1
    assert metrics.discard_failed == 0


@pytest.mark.parametrize("failure", [None, OSError(12, "no memory"), RamError("closed")])
def test_a_failed_discard_is_counted_and_proves_nothing(ram: Ram, failure: Exception | None) -> None:
    metrics = QueueMetrics()
    assert not Discarder(FailingMemory(ram, lambda pfn: pfn == 2, failure)).discard(0, 4 * PAGE_SIZE, metrics)
    assert (metrics.discard_calls, metrics.discard_failed, metrics.proven_zero_bytes) == (1, 1, 0)


def test_failures_are_logged_once(ram: Ram, caplog: pytest.LogCaptureFixture) -> None:
    """A guest decides how many discards there are, and the log is the host's disk."""
    discarder = Discarder(FailingMemory(ram, lambda pfn: True, OSError(12, "no memory")))
    with caplog.at_level(logging.WARNING, "hostzero.device"):
        for _ in range(5):
            discarder.discard(0, PAGE_SIZE, QueueMetrics())
    assert len(caplog.records) == 1
    assert "no memory" in caplog.text


def test_reasons_nest_and_each_is_taken_back(ram: Ram) -> None:
    discarder, metrics = Discarder(WrappedMemory(ram)), QueueMetrics()
    for reason in ("postcopy", "vfio", "vfio"):
        discarder.inhibit(reason)
    for reason in ("vfio", "postcopy", "vfio"):
        assert not discarder.discard(0, PAGE_SIZE, metrics)
        discarder.allow(reason)
    assert not discarder.inhibited
    assert discarder.discard(0, PAGE_SIZE, metrics)
    assert metrics.skipped_bytes[SkipReason.INHIBITED] == 3 * PAGE_SIZE
    assert metrics.discard_calls == 1


def test_a_reason_that_does_not_stand_cannot_be_taken_back(ram: Ram) -> None:
    discarder = Discarder(WrappedMemory(ram))
    discarder.inhibit("vfio")
    with pytest.raises(DeviceError, match="not inhibited by 'postcopy'"):
        discarder.allow("postcopy")
    assert discarder.inhibited


@pytest.mark.parametrize(
    ("gpa", "length", "reason"),
    [
        (PAGE_SIZE + 1, PAGE_SIZE, SkipReason.UNALIGNED),
        (PAGE_SIZE, PAGE_SIZE // 2, SkipReason.UNALIGNED),
        (1 << 40, PAGE_SIZE, SkipReason.OUTSIDE_RAM),
        (7 * PAGE_SIZE, 2 * PAGE_SIZE, SkipReason.DEVICE_WRITES),
        (6 * PAGE_SIZE, 2 * PAGE_SIZE, None),
    ],
)
def test_segments_that_are_not_dropped(ram: Ram, gpa: int, length: int, reason: SkipReason | None) -> None:
    memory, metrics = WrappedMemory(ram), QueueMetrics()
    rings = ByteRanges([(9 * PAGE_SIZE - 2, 2)])
    assert Discarder(memory).discard_segment(Segment(Gpa(gpa), length), rings, metrics) is (reason is None)
    assert memory.discards == ([] if reason else [(gpa, length)])
    assert metrics.skipped_bytes == {each: length if each is reason else 0 for each in SkipReason}


def test_a_segment_over_the_end_of_a_region_is_not_dropped(ram: Ram) -> None:
    memory = GuestMemory([MemoryRegion(Gpa(0), ram, 0, PMD_SIZE)])
    metrics = QueueMetrics()
    segment = Segment(Gpa(PMD_SIZE - PAGE_SIZE), 2 * PAGE_SIZE)
    assert not Discarder(memory).discard_segment(segment, NO_RINGS, metrics)
    assert metrics.skipped_bytes[SkipReason.OUTSIDE_RAM] == 2 * PAGE_SIZE


@pytest.mark.parametrize(
    ("gpa", "length", "dropped"),
    [
        (0, PMD_SIZE, True),
        (PMD_SIZE, 2 * PMD_SIZE, True),
        (0, PAGE_SIZE, False),
        (PAGE_SIZE, PMD_SIZE, False),
        (0, PMD_SIZE + PAGE_SIZE, False),
    ],
)
def test_huge_host_pages_are_dropped_whole(ram: Ram, gpa: int, length: int, dropped: bool) -> None:
    memory = HugeMemory(ram)
    segment = Segment(Gpa(gpa), length)
    assert Discarder(memory).discard_segment(segment, NO_RINGS, QueueMetrics()) is dropped
    assert bool(memory.discards) is dropped
