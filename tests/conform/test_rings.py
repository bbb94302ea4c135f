# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.conform.guest_ram import GuestRam
from hostzero.conform.in_process import InProcessTarget
from hostzero.conform.judge import Failed, Judge
from hostzero.conform.rings import CarefulRing, RawRing
from hostzero.virtio.features import QueueRole
from hostzero.virtio.mock import MockDevice


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with InProcessTarget().connect() as connection:
        ram = GuestRam(connection)
        yield ram
        ram.close()


def test_a_careful_ring_gives_back_each_length_once(ram: GuestRam) -> None:
    layout = ram.ring(8)
    notified = []
    ring = CarefulRing(
        QueueRole.INFLATE,
        0,
        ram.memory,
        layout,
        event_idx=False,
        notify=lambda: notified.append(1),
        judge=Judge("5.5.6"),
    )
    device = MockDevice(ram.memory, layout)
    at = ram.control(64)
    numbers = [ring.add([(at, 4)], [(at + 8, 4)]), ring.add([(at, 8)])]
    assert ring.kick()
    assert notified == [1]
    assert ring.outstanding == 2
    first, second = device.offered()
    device.give_back((second, 0), (first, 3))
    assert ring.collect() == {numbers[0]: 3, numbers[1]: 0}
    assert ring.take(numbers[0]) == 3
    assert ring.collect() == {numbers[1]: 0}
    ring.release()


def test_a_broken_used_ring_fails_the_case(ram: GuestRam) -> None:
    layout = ram.ring(8)
    ring = CarefulRing(
        QueueRole.STATS,
        2,
        ram.memory,
        layout,
        event_idx=False,
        notify=lambda: None,
        judge=Judge("5.5.6.3"),
    )
    MockDevice(ram.memory, layout).give_back((5, 0))
    with pytest.raises(Failed) as failed:
        ring.collect()
    assert failed.value.miss.clause == "2.7.8"
    assert "stats queue" in failed.value.miss.text
    ring.release()


def test_a_raw_ring_sees_entries_and_an_index_that_jumps(ram: GuestRam) -> None:
    ring = RawRing(QueueRole.INFLATE, 0, ram.memory, ram.ring(8), lambda: None)
    device = MockDevice(ram.memory, ring.layout)
    ring.guest.offer(3)
    device.give_back((3, 7))
    assert ring.look() == [(3, 7)]
    assert ring.look() == [(3, 7)]
    assert not ring.overrun
    device.set_used_idx(2)
    assert ring.look() == [(3, 7)]
    assert ring.overrun


def test_a_raw_ring_lets_a_device_follow_an_index_that_jumps(ram: GuestRam) -> None:
    ring = RawRing(QueueRole.INFLATE, 0, ram.memory, ram.ring(8), lambda: None)
    device = MockDevice(ram.memory, ring.layout)
    ring.guest.set_avail_idx(9)
    device.give_back(*[(0, 0)] * 9)
    assert len(ring.look()) == 9
    assert not ring.overrun
    device.give_back((0, 0))
    ring.look()
    assert ring.overrun
