# SPDX-License-Identifier: GPL-2.0-only
"""The status machine, the queues by number, resets, and requests that break the rules."""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Iterator

import pytest

from hostzero.device import BalloonDevice, DeviceConfig, HintStatus
from hostzero.errors import DeviceError
from hostzero.ram import GuestMemory, MemoryRegion, Ram
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.mock import MockGuest
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE, RingLayout
from hostzero.virtio.transport import Status, Transport
from tests.device.guest import (
    ALL_FEATURES,
    BITMAP_AT,
    RING_PAGES,
    STARTING,
    Guest,
    WrappedMemory,
)

FEATURES_OK = STARTING | int(Status.FEATURES_OK)
DRIVER_OK = FEATURES_OK | int(Status.DRIVER_OK)


@pytest.fixture
def device(ram: Ram) -> BalloonDevice:
    """A device that offers everything and that nobody has touched."""
    return BalloonDevice(WrappedMemory(ram), DeviceConfig(features=ALL_FEATURES))


def _layout(device: BalloonDevice, size: int = 8, page: int = RING_PAGES[QueueRole.INFLATE][0]) -> RingLayout:
    return RingLayout.contiguous(device._state.discarder.memory, size, Gpa(page * PAGE_SIZE))


def _ignore() -> None:
    pass


# ------------------------------------------------------------- features and status


def test_the_device_is_a_transport(device: BalloonDevice) -> None:
    assert isinstance(device, Transport)


def test_it_offers_what_its_configuration_says(device: BalloonDevice) -> None:
    assert device.device_features() == 0xFF | 1 << 29 | 1 << 32
    assert device.status() == 0
    assert device.acked == Feature(0)


def test_a_start_in_order(device: BalloonDevice) -> None:
    for status in (1, 3):
        device.set_status(status)
        assert device.status() == status
    device.set_driver_features(int(Feature.VERSION_1 | Feature.REPORTING))
    device.set_status(FEATURES_OK)
    assert device.status() == FEATURES_OK
    device.set_status(DRIVER_OK)
    assert device.status() == DRIVER_OK
    assert device.live


@pytest.mark.parametrize("extra", [1 << 50, int(Feature.ACCESS_PLATFORM), int(Feature.RING_INDIRECT_DESC)])
def test_features_ok_is_refused_for_a_bit_that_was_not_offered(device: BalloonDevice, extra: int) -> None:
    device.set_driver_features(int(Feature.VERSION_1) | extra)
    device.set_status(FEATURES_OK)
    assert device.status() == STARTING
    assert device.acked == Feature(0)
    assert device.metrics.refused_negotiations == 1
    with pytest.raises(DeviceError, match="DRIVER_OK before FEATURES_OK"):
        device.set_status(DRIVER_OK)
    # A driver may think again: nothing was decided.
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    assert device.status() == FEATURES_OK


def test_features_ok_is_refused_without_version_1(device: BalloonDevice) -> None:
    device.set_driver_features(int(Feature.REPORTING))
    device.set_status(FEATURES_OK)
    assert device.status() == STARTING


def test_features_do_not_change_after_features_ok(guest: Guest) -> None:
    with pytest.raises(DeviceError, match="cannot change after FEATURES_OK"):
        guest.device.set_driver_features(int(Feature.VERSION_1))
    assert guest.device.acked == ALL_FEATURES


@pytest.mark.parametrize("features", [-1, 1 << 64])
def test_features_are_64_bits(device: BalloonDevice, features: int) -> None:
    with pytest.raises(DeviceError, match="no set of 64 feature bits"):
        device.set_driver_features(features)


def test_bit_6_without_reporting_is_let_through_counted_and_means_nothing(
    ram: Ram, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that means HINT_WAIT_ON_ACK by bit 6 has no reporting queue to be claimed on."""
    accepted = Feature.DEVICE_INIT_REPORTED | Feature.FREE_PAGE_HINT
    with caplog.at_level(logging.WARNING, "hostzero.device"):
        guest = Guest(WrappedMemory(ram), accepted=accepted)
    assert "HINT_WAIT_ON_ACK" in caplog.text
    assert guest.device.metrics.orphan_init_reported == 1
    assert QueueRole.REPORTING not in guest.indices
    assert guest.send(QueueRole.FREE_PAGE, (), [(0, PAGE_SIZE)]) == 0


@pytest.mark.parametrize(
    ("status", "reason"),
    [(16, "does not define"), (256, "does not define"), (-1, "does not define"), (1, "clears bits")],
)
def test_a_status_that_no_driver_may_write(device: BalloonDevice, status: int, reason: str) -> None:
    device.set_status(STARTING)
    with pytest.raises(DeviceError, match=reason):
        device.set_status(status)
    assert device.status() == STARTING


def test_needs_reset_is_not_the_drivers_to_write(device: BalloonDevice) -> None:
    device.set_status(STARTING | Status.NEEDS_RESET)
    assert device.status() == STARTING


def test_driver_ok_needs_features_ok_read_back_first(device: BalloonDevice) -> None:
    device.set_driver_features(int(Feature.VERSION_1))
    with pytest.raises(DeviceError, match="DRIVER_OK before FEATURES_OK"):
        device.set_status(DRIVER_OK)
    assert device.status() == 0


def test_a_driver_that_gave_up_is_not_served(guest: Guest) -> None:
    guest.device.set_status(DRIVER_OK | Status.FAILED)
    with pytest.raises(DeviceError, match="no driver is running"):
        guest.kick(QueueRole.INFLATE)
    guest.device.set_target(1)
    assert guest.config_changes == 0


# ------------------------------------------------------------- queues


def _subsets() -> Iterator[Feature]:
    optional = [Feature.STATS_VQ, Feature.FREE_PAGE_HINT, Feature.REPORTING]
    for count in range(4):
        for chosen in itertools.combinations(optional, count):
            features = Feature.VERSION_1 | Feature.RING_EVENT_IDX
            for feature in chosen:
                features |= feature
            yield features


@pytest.mark.parametrize("accepted", list(_subsets()), ids=lambda features: f"{int(features) & 0xFF:#x}")
def test_queues_are_numbered_over_the_accepted_features(ram: Ram, accepted: Feature) -> None:
    guest = Guest(WrappedMemory(ram), accepted=accepted)
    roles = queue_roles(accepted)
    assert [guest.device.queue_role(n) for n in range(6)] == [*roles, *[None] * (6 - len(roles))]
    sizes = dict(zip(QueueRole, (128, 128, 128, 1024, 32), strict=True))
    assert [guest.device.queue_size_max(n) for n in range(len(roles) + 1)] == [
        *(sizes[r] for r in roles),
        0,
    ]
    if QueueRole.REPORTING in roles:
        guest.report((0, 1))
        assert guest.zero_pages() == {0}


def test_there_is_no_queue_before_features_ok(device: BalloonDevice) -> None:
    assert [device.queue_size_max(n) for n in (-1, 0, 1)] == [0, 0, 0]
    with pytest.raises(DeviceError, match="only between FEATURES_OK and DRIVER_OK"):
        device.setup_queue(0, _layout(device), _ignore)


def test_no_queue_is_set_up_after_driver_ok(guest: Guest) -> None:
    with pytest.raises(DeviceError, match="only between FEATURES_OK and DRIVER_OK"):
        guest.device.setup_queue(0, _layout(guest.device), _ignore)


def test_a_queue_that_cannot_be_set_up(device: BalloonDevice) -> None:
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    with pytest.raises(DeviceError, match="no queue 2"):
        device.setup_queue(2, _layout(device), _ignore)
    with pytest.raises(DeviceError, match="has at most 128 entries, not 256"):
        device.setup_queue(0, _layout(device, 256), _ignore)
    device.setup_queue(0, _layout(device), _ignore)
    with pytest.raises(DeviceError, match="set up already"):
        device.setup_queue(0, _layout(device), _ignore)


@pytest.mark.parametrize("index", [-1, 1, 5, 70000])
def test_a_notification_of_a_queue_that_was_not_set_up(device: BalloonDevice, index: int) -> None:
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    device.setup_queue(0, _layout(device), _ignore)
    with pytest.raises(DeviceError, match="no driver is running"):
        device.notify(0)
    device.set_status(DRIVER_OK)
    device.notify(0)
    with pytest.raises(DeviceError, match="not set up"):
        device.notify(index)


def test_buffers_from_before_driver_ok_are_served_by_it(ram: Ram) -> None:
    """Linux queues its statistics buffer before DRIVER_OK and kicks no more."""
    guest = Guest(WrappedMemory(ram))
    guest.device.set_status(0)
    guest.negotiate()
    guest.setup()
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQ", 4, 77))
    guest.put(QueueRole.STATS, [(BITMAP_AT, 10)])
    guest.put(QueueRole.REPORTING, (), [(0, PAGE_SIZE)])
    assert guest.device.stats == {}
    guest.go()
    assert list(guest.device.stats.values()) == [77]
    assert guest.rings[QueueRole.REPORTING].returned() == [(0, PAGE_SIZE)]


def test_a_queue_resumes_where_it_was(ram: Ram) -> None:
    guest = Guest(WrappedMemory(ram))
    guest.inflate([1])
    index = guest.indices[QueueRole.INFLATE]
    assert guest.device.last_avail(index) == 1
    guest.device.set_status(0)
    guest.negotiate()
    ring = guest.rings[QueueRole.INFLATE]
    guest.device.setup_queue(index, ring.layout, _ignore, start_index=1)
    guest.go()
    assert guest.inflate([2]) == (1, b"\x01")
    with pytest.raises(DeviceError, match="queue 1 is not set up"):
        guest.device.last_avail(1)


# ------------------------------------------------------------- configuration, target, poison


def test_the_target_reaches_a_running_driver_at_once(guest: Guest) -> None:
    guest.device.set_target(300)
    assert (guest.config_changes, guest.device.target) == (1, 300)
    assert struct.unpack("<4I", guest.device.read_config(0, 16)) == (300, 0, 0, 0)


def test_the_target_waits_for_a_driver(device: BalloonDevice) -> None:
    """A configuration change before DRIVER_OK crashes QEMU 11.1 over vhost-user."""
    called: list[int] = []
    device.on_config_change(lambda: called.append(1))
    device.set_target(300)
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    device.set_target(301)
    assert (called, device.metrics.config_changes) == ([], 0)
    assert device.read_config(0, 4) == struct.pack("<I", 301)


@pytest.mark.parametrize("pages", [-1, 2049, 1 << 32])
def test_a_target_that_no_guest_can_meet_is_refused(device: BalloonDevice, pages: int) -> None:
    with pytest.raises(DeviceError, match="not between 0 and 2048"):
        device.set_target(pages)
    assert device.target == 0


def test_a_target_before_there_is_memory(ram: Ram) -> None:
    device = BalloonDevice(GuestMemory([]))
    device.set_target(1 << 20)
    with pytest.raises(DeviceError):
        device.set_target(1 << 32)
    device.set_memory(GuestMemory.whole(ram))
    assert device.target == ram.size // PAGE_SIZE
    # Less memory, and more again: what was wanted is remembered.
    device.set_memory(GuestMemory.whole(ram))
    device.set_memory(GuestMemory([]))
    assert device.target == 1 << 20
    device.set_target(3)
    device.set_memory(GuestMemory.whole(ram))
    assert device.target == 3


def test_a_target_that_is_cut_is_told_to_a_driver_that_runs(ram: Ram) -> None:
    device = BalloonDevice(GuestMemory([]))
    device.set_target(1 << 20)
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    device.set_status(DRIVER_OK)
    told: list[int] = []
    device.on_config_change(lambda: told.append(device.target))
    device.set_memory(GuestMemory.whole(ram))
    device.set_memory(GuestMemory.whole(ram))
    assert told == [ram.size // PAGE_SIZE]


def test_actual_is_what_the_driver_writes(guest: Guest) -> None:
    guest.device.set_target(9)
    guest.device.write_config(0, struct.pack("<4I", 1, 7, 2, 3))
    assert (guest.device.actual, guest.device.target, guest.device.poison_val) == (7, 9, 3)


def test_poison_val_may_come_before_the_features(device: BalloonDevice) -> None:
    device.write_config(12, b"\x01\x02\x03\x04")
    device.set_driver_features(int(Feature.VERSION_1 | Feature.PAGE_POISON))
    device.set_status(FEATURES_OK)
    assert device.poison_val == 0x04030201
    assert device._state.poisoned


def test_poison_val_of_a_driver_that_does_not_accept_the_feature(device: BalloonDevice) -> None:
    device.write_config(12, b"\x01\0\0\0")
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    assert not device._state.poisoned
    device.write_config(12, b"\x02\0\0\0")
    assert device.poison_val == 1


def test_poison_val_is_not_taken_where_it_is_not_offered(ram: Ram) -> None:
    device = BalloonDevice(WrappedMemory(ram))
    device.write_config(12, b"\x01\0\0\0")
    assert device.poison_val == 0


def test_memory_cannot_change_under_a_queue(guest: Guest) -> None:
    with pytest.raises(DeviceError, match="reset first"):
        guest.device.set_memory(guest.memory)


# ------------------------------------------------------------- reset


def test_a_reset_forgets_the_driver_and_keeps_what_is_the_hosts(guest: Guest) -> None:
    device = guest.device
    device.set_target(5)
    device.inhibit_discard("vfio")
    device.write_config(4, struct.pack("<III", 3, 0, 9))
    device.set_status(0)
    assert (device.status(), device.acked, device.actual, device.poison_val) == (0, Feature(0), 0, 0)
    assert (device.target, device.inhibited, device.metrics.resets) == (5, True, 1)
    assert device.queue_size_max(0) == 0
    assert not device._state.rings
    with pytest.raises(DeviceError, match="no driver is running"):
        device.notify(0)


def test_old_rings_are_ordinary_memory_after_a_reset(ram: Ram) -> None:
    """The pages of rings that are no longer live may be dropped, and are claimed rightly."""
    guest = Guest(WrappedMemory(ram))
    old = RING_PAGES[QueueRole.STATS][0]
    guest.device.set_status(0)
    guest.rings.clear()
    guest.accepted &= ~Feature.STATS_VQ
    guest.start()
    assert guest.inflate([old]) == (1, b"\x01")


def test_a_reset_lets_go_of_guest_memory(guest: Guest) -> None:
    """A view that stays would keep the memory mapped after the machine is gone."""
    queues = [active.queue for active in guest.device._queues.values()]
    guest.device.set_status(0)
    assert all("released" in str(queue.broken) for queue in queues)
    guest.device.set_memory(GuestMemory([]))


def test_memory_at_the_end_of_guest_space_is_served(ram: Ram) -> None:
    """Addresses have 64 bits, one more than the integers of an array."""
    base = (1 << 64) - ram.size
    memory = GuestMemory([MemoryRegion(Gpa(base), ram, 0, ram.size)])
    device = BalloonDevice(memory)
    device.set_status(STARTING)
    device.set_driver_features(int(device.config.offered))
    device.set_status(STARTING | Status.FEATURES_OK)
    rings = {index: RingLayout.contiguous(memory, 8, Gpa(base + index * PAGE_SIZE)) for index in range(5)}
    guests = {index: MockGuest(memory, layout) for index, layout in rings.items()}
    for index, layout in rings.items():
        device.setup_queue(index, layout, lambda: None)
    device.set_status(STARTING | Status.FEATURES_OK | Status.DRIVER_OK)
    page, bitmap = base + 8 * PAGE_SIZE, base + ram.size - 1
    memory.write(Gpa(page), b"\x01" * PAGE_SIZE)
    guests[4].offer(guests[4].chain([(page, PAGE_SIZE, VIRTQ_DESC_F_WRITE)]))
    device.notify(4)
    assert guests[4].returned() == [(0, PAGE_SIZE)]
    guests[0].offer(guests[0].chain([(page, 4, 0), (bitmap, 1, VIRTQ_DESC_F_WRITE)]))
    device.notify(0)
    assert guests[0].returned() == [(0, 1)]
    assert memory.read(Gpa(bitmap), 1) == b"\0"


# ------------------------------------------------------------- one queue at a time (vhost-user)


def test_a_queue_may_be_set_up_late_if_the_caller_says_so(device: BalloonDevice) -> None:
    device.set_status(STARTING)
    device.set_driver_features(int(ALL_FEATURES | Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    device.set_status(DRIVER_OK)
    with pytest.raises(DeviceError, match="only between"):
        device.setup_queue(0, _layout(device), _ignore)
    device.setup_queue(0, _layout(device), _ignore, late=True)
    device.notify(0)


def test_nothing_is_set_up_late_before_features_ok(device: BalloonDevice) -> None:
    with pytest.raises(DeviceError, match="only between"):
        device.setup_queue(0, _layout(device), _ignore, late=True)


def test_a_stopped_queue_goes_on_where_it_was(guest: Guest) -> None:
    index, ring = guest.indices[QueueRole.INFLATE], guest.rings[QueueRole.INFLATE]
    guest.inflate([1, 2])
    guest.inflate([3])
    assert guest.device.stop_queue(index) == 2
    with pytest.raises(DeviceError, match="not set up"):
        guest.device.notify(index)
    with pytest.raises(DeviceError, match="not set up"):
        guest.device.stop_queue(index)
    guest.device.setup_queue(index, ring.layout, _ignore, start_index=2, late=True)
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
    guest.device.setup_queue(index, ring.layout, _ignore, late=True)
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
    guest.device.setup_queue(index, guest.rings[QueueRole.FREE_PAGE].layout, _ignore, late=True)
    guest.device.stop_queue(index)
    status.append(guest.device.hint_status)
    assert status == [HintStatus.STOPPED, HintStatus.DONE]


def test_sub_pages_of_a_driver_that_may_be_gone_are_forgotten(huge_guest: Guest) -> None:
    """The next driver may own them: completing the host page would discard its memory."""
    guest = huge_guest
    index, ring = guest.indices[QueueRole.INFLATE], guest.rings[QueueRole.INFLATE]
    guest.inflate(list(range(256)))
    base = guest.device.stop_queue(index)
    guest.device.setup_queue(index, ring.layout, _ignore, start_index=base, late=True)
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
