# SPDX-License-Identifier: GPL-2.0-only
"""The statistics queue: one buffer, in the device's hands until it asks."""

from __future__ import annotations

from hostzero.driver.stats import update_balloon_stats
from hostzero.units import PAGE_SIZE
from hostzero.virtio import QueueRole, StatTag, unpack_stats
from tests.driver.conftest import MakeGuest
from tests.driver.fakes import FakeStats

HUGETLB = {StatTag.HTLB_PGALLOC, StatTag.HTLB_PGFAIL}


def test_sizes_are_in_bytes_and_events_are_not() -> None:
    """Every tag once, each from its own counter; what the guest does not have is zero."""
    entries = update_balloon_stats(FakeStats())
    stats = dict(entries)
    assert len(stats) == len(entries)
    assert set(stats) == set(StatTag) - HUGETLB
    assert {tag: value for tag, value in stats.items() if value} == {
        StatTag.MEMFREE: 10 * PAGE_SIZE,
        StatTag.AVAIL: 11 * PAGE_SIZE,
        StatTag.MEMTOT: 12 * PAGE_SIZE,
        StatTag.MINFLT: 13,
        StatTag.ALLOC_STALL: 14,
        StatTag.OOM_KILL: 15,
        StatTag.MAJFLT: 16,
        StatTag.SWAP_IN: 17 * PAGE_SIZE,
        StatTag.SWAP_OUT: 18 * PAGE_SIZE,
    }


def test_probe_hands_over_one_buffer(make_guest: MakeGuest) -> None:
    guest = make_guest()
    (request,) = guest.device.of(QueueRole.STATS)
    assert request.writable == ()
    assert len(request.data) == 10 * (len(StatTag) - len(HUGETLB))


def test_returning_the_buffer_brings_fresh_numbers(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.set_target(100)
    free = guest.mm.nr_free
    assert guest.device.return_kept(QueueRole.STATS) == 1
    first, second = guest.device.of(QueueRole.STATS)
    assert dict(unpack_stats(second.data))[StatTag.MEMFREE] == free * PAGE_SIZE
    assert dict(unpack_stats(first.data))[StatTag.MEMFREE] != free * PAGE_SIZE


def test_an_interrupt_without_a_buffer_leaves_the_devices_numbers_alone(make_guest: MakeGuest) -> None:
    guest = make_guest()
    (request,) = guest.device.of(QueueRole.STATS)
    guest.device.set_target(100)
    guest.device.interrupt(QueueRole.STATS)
    assert len(guest.device.of(QueueRole.STATS)) == 1
    assert guest.memory.read(*request.readable[0]) == request.data


def test_a_device_that_returns_the_buffer_at_once_cannot_stop_the_guest(make_guest: MakeGuest) -> None:
    """Each refill waits for the next tick of the guest's clock, so time goes on."""
    guest = make_guest(answer=lambda request: 0)
    guest.mm.clock.advance(1.0)
    assert 2 <= len(guest.device.of(QueueRole.STATS)) <= 260
    guest.driver.remove()
    count = len(guest.device.of(QueueRole.STATS))
    guest.mm.clock.advance(1.0)
    assert len(guest.device.of(QueueRole.STATS)) == count
