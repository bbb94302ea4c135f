# SPDX-License-Identifier: GPL-2.0-only
"""One queue of the device at a time, as vhost-user has it: set up late, stopped, resumed, broken."""

from __future__ import annotations

import struct

import pytest

from hostzero.device import BalloonDevice, HintStatus
from hostzero.errors import DeviceError
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.features import Feature, QueueRole
from tests.device.guest import (
    ALL_FEATURES,
    BITMAP_AT,
    DRIVER_OK,
    FEATURES_OK,
    RING_PAGES,
    STARTING,
    Guest,
    ignore,
    layout_on,
)


def test_a_queue_may_be_set_up_late_if_the_caller_says_so(device: BalloonDevice) -> None:
    device.set_status(STARTING)
    device.set_driver_features(int(ALL_FEATURES | Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    device.set_status(DRIVER_OK)
    with pytest.raises(DeviceError, match="only between"):
        device.setup_queue(0, layout_on(device), ignore)
    device.setup_queue(0, layout_on(device), ignore, late=True)
    device.notify(0)


def test_nothing_is_set_up_late_before_features_ok(device: BalloonDevice) -> None:
    with pytest.raises(DeviceError, match="only between"):
        device.setup_queue(0, layout_on(device), ignore, late=True)


def test_a_stopped_queue_goes_on_where_it_was(guest: Guest) -> None:
    index, ring = guest.indices[QueueRole.INFLATE], guest.rings[QueueRole.INFLATE]
    guest.inflate([1, 2])
    guest.inflate([3])
    assert guest.device.stop_queue(index) == 2
    with pytest.raises(DeviceError, match="not set up"):
        guest.device.notify(index)
    with pytest.raises(DeviceError, match="not set up"):
        guest.device.stop_queue(index)
    guest.device.setup_queue(index, ring.layout, ignore, start_index=2, late=True)
    assert guest.inflate([4]).used_len == 1
    assert guest.device.last_avail(index) == 3


def test_stopping_one_queue_leaves_the_others(guest: Guest) -> None:
    guest.device.stop_queue(guest.indices[QueueRole.INFLATE])
    assert guest.device.live
    assert guest.report((0, 1))


def test_the_ring_of_a_stopped_queue_may_be_discarded(guest: Guest) -> None:
    page = RING_PAGES[QueueRole.INFLATE][0]
    assert guest.report((page, 1)) == 0
    guest.device.stop_queue(guest.indices[QueueRole.INFLATE])
    guest.rings.pop(QueueRole.INFLATE)
    assert guest.report((page, 1)) == PAGE_SIZE


def test_a_held_statistics_buffer_is_available_again_after_a_stop(guest: Guest) -> None:
    index, ring = guest.indices[QueueRole.STATS], guest.rings[QueueRole.STATS]
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQ", 4, 9))
    guest.put(QueueRole.STATS, [(BITMAP_AT, 10)])
    guest.kick(QueueRole.STATS)
    assert guest.device.last_avail(index) == 1
    assert guest.device.stop_queue(index) == 0
    assert ring.returned() == []
    assert not guest.device.request_stats()
    guest.device.setup_queue(index, ring.layout, ignore, late=True)
    guest.device.notify(index)
    assert guest.device.request_stats()
    assert len(ring.returned()) == 1


def test_a_held_buffer_that_cannot_go_back_is_returned(guest: Guest) -> None:
    """The driver broke the rule of one buffer at a time, so the held one is not the last."""
    index, ring = guest.indices[QueueRole.STATS], guest.rings[QueueRole.STATS]
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQ", 4, 9))
    for first in (0, 1):
        guest.put(QueueRole.STATS, [(BITMAP_AT, 10)], first=first)
    guest.kick(QueueRole.STATS)
    assert ring.returned() == [(1, 0)]
    assert guest.device.stop_queue(index) == 2
    assert ring.returned() == [(0, 0)]


def _two_statistics_buffers(guest: Guest) -> None:
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQ", 4, 9))
    for first in (0, 1):
        guest.put(QueueRole.STATS, [(BITMAP_AT, 10)], first=first)
    guest.kick(QueueRole.STATS)
    guest.rings[QueueRole.STATS].set_used_event(1)


@pytest.mark.parametrize("stop", ["stop_queue", "suspend"])
def test_a_driver_may_reset_the_device_when_a_stop_returns_its_buffer(guest: Guest, stop: str) -> None:
    """The queue that stops is gone already then, and so are all others."""
    _two_statistics_buffers(guest)
    guest.on_interrupt = lambda role: guest.device.set_status(0)
    if stop == "suspend":
        guest.device.suspend()
    else:
        guest.device.stop_queue(guest.indices[QueueRole.STATS])
    assert guest.device.status() == 0
    assert guest.device.queue_size_max(0) == 0


def test_a_buffer_that_comes_when_a_stop_returns_another_is_not_lost(guest: Guest) -> None:
    _two_statistics_buffers(guest)
    index = guest.indices[QueueRole.STATS]

    def send(role: QueueRole) -> None:
        guest.on_interrupt = lambda role: None
        guest.put(role, [(BITMAP_AT, 10)], first=1)
        guest.device.notify(index)

    guest.on_interrupt = send
    # Three were sent, and the third one, which would have been kept, is available again.
    assert guest.device.stop_queue(index) == 2


def test_a_stop_ends_a_run_of_hinting_but_leaves_done(guest: Guest) -> None:
    index = guest.indices[QueueRole.FREE_PAGE]
    guest.device.hint_start()
    guest.device.stop_queue(index)
    status: list[HintStatus] = [guest.device.hint_status]
    guest.device.hint_done()
    guest.device.setup_queue(index, guest.rings[QueueRole.FREE_PAGE].layout, ignore, late=True)
    guest.device.stop_queue(index)
    status.append(guest.device.hint_status)
    assert status == [HintStatus.STOPPED, HintStatus.DONE]


def test_sub_pages_of_a_driver_that_may_be_gone_are_forgotten(huge_guest: Guest) -> None:
    """The next driver may own them: completing the host page would discard its memory."""
    guest = huge_guest
    index, ring = guest.indices[QueueRole.INFLATE], guest.rings[QueueRole.INFLATE]
    guest.inflate(list(range(256)))
    base = guest.device.stop_queue(index)
    guest.device.setup_queue(index, ring.layout, ignore, start_index=base, late=True)
    guest.inflate(list(range(256, 512)))
    assert not guest.zero_pages()


def test_suspend_keeps_what_the_driver_wrote_and_nothing_else(guest: Guest) -> None:
    guest.device.set_target(7)
    guest.device.write_config(4, struct.pack("<I", 5))
    guest.device.write_config(12, struct.pack("<I", 6))
    resets = guest.device.metrics.resets
    guest.device.suspend()
    assert (guest.device.target, guest.device.actual, guest.device.poison_val) == (7, 5, 6)
    assert (guest.device.status(), guest.device.acked, guest.device.live) == (0, Feature(0), False)
    assert guest.device.metrics.resets == resets
    guest.device.set_memory(guest.memory)
    guest.start()
    assert guest.report((0, 1)) == 0, "the poison value still counts"


def test_a_broken_queue_says_why(guest: Guest) -> None:
    index, ring = guest.indices[QueueRole.INFLATE], guest.rings[QueueRole.INFLATE]
    assert guest.device.broken(index) is None
    ring.set_avail_idx(0x8000)
    guest.device.notify(index)
    assert "ahead" in str(guest.device.broken(index))
    assert guest.device.broken(99) is None
