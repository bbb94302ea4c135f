# SPDX-License-Identifier: GPL-2.0-only
"""The status machine, the queues by number, resets, and requests that break the rules."""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Iterator

import pytest

from hostzero.device import BalloonDevice
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
    DRIVER_OK,
    FEATURES_OK,
    RING_PAGES,
    STARTING,
    Guest,
    WrappedMemory,
    ignore,
    layout_on,
)

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
        device.setup_queue(0, layout_on(device), ignore)


def test_no_queue_is_set_up_after_driver_ok(guest: Guest) -> None:
    with pytest.raises(DeviceError, match="only between FEATURES_OK and DRIVER_OK"):
        guest.device.setup_queue(0, layout_on(guest.device), ignore)


def test_a_queue_that_cannot_be_set_up(device: BalloonDevice) -> None:
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    with pytest.raises(DeviceError, match="no queue 2"):
        device.setup_queue(2, layout_on(device), ignore)
    with pytest.raises(DeviceError, match="has at most 128 entries, not 256"):
        device.setup_queue(0, layout_on(device, 256), ignore)
    device.setup_queue(0, layout_on(device), ignore)
    with pytest.raises(DeviceError, match="set up already"):
        device.setup_queue(0, layout_on(device), ignore)


@pytest.mark.parametrize("index", [-1, 1, 5, 70000])
def test_a_notification_of_a_queue_that_was_not_set_up(device: BalloonDevice, index: int) -> None:
    device.set_driver_features(int(Feature.VERSION_1))
    device.set_status(FEATURES_OK)
    device.setup_queue(0, layout_on(device), ignore)
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
    guest.device.setup_queue(index, ring.layout, ignore, start_index=1)
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
