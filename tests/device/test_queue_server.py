# SPDX-License-Identifier: GPL-2.0-only
"""Each request is answered once: nested calls, resets in the middle, and hostile rings."""

from __future__ import annotations

import logging

import pytest

from hostzero.device import LOG_LINES_MAX
from hostzero.ram import Ram
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import QueueRole
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE
from hostzero.virtio.transport import Status
from tests.device.guest import BITMAP_AT, PFNS_AT, STARTING, Guest, HugeMemory

DRIVER_OK = STARTING | int(Status.FEATURES_OK | Status.DRIVER_OK)


@pytest.mark.parametrize("role", [QueueRole.INFLATE, QueueRole.REPORTING])
def test_a_driver_that_notifies_from_its_interrupt(guest: Guest, role: QueueRole) -> None:
    """Each interrupt sends the next request; none is lost and none is nested."""
    ring = guest.rings[role]
    left = [40, 30, 20]
    depth: list[int] = []

    def put(pfn: int) -> None:
        if role is QueueRole.INFLATE:
            guest.put(role, [guest.write_pfns([pfn])])
        else:
            guest.put(role, (), [(pfn * PAGE_SIZE, PAGE_SIZE)])

    def on_interrupt(role: QueueRole) -> None:
        depth.append(1)
        assert sum(depth) == 1
        if left:
            ring.set_used_event(ring.used_idx)
            put(left.pop())
            guest.device.notify(guest.indices[role])
        depth.pop()

    guest.on_interrupt = on_interrupt
    put(10)
    guest.kick(role)
    assert guest.zero_pages() == {10, 20, 30, 40}
    assert guest.device.metrics.queues[role].requests == 4


@pytest.mark.parametrize("role", [QueueRole.INFLATE, QueueRole.REPORTING])
def test_a_driver_that_resets_from_its_interrupt(guest: Guest, role: QueueRole) -> None:
    guest.on_interrupt = lambda role: guest.device.set_status(0)
    for first in (0, 1):
        if role is QueueRole.INFLATE:
            guest.put(role, [guest.write_pfns([first], PFNS_AT + 64 * first)], first=first)
        else:
            guest.put(role, (), [(first * PAGE_SIZE, PAGE_SIZE)], first=first)
    guest.kick(role)
    assert guest.device.status() == 0
    assert guest.device.metrics.resets == 1


def test_an_interrupt_that_raises_leaves_the_device_usable(guest: Guest) -> None:
    def fail(role: QueueRole) -> None:
        raise ZeroDivisionError

    guest.on_interrupt = fail
    guest.put(QueueRole.INFLATE, [guest.write_pfns([1])])
    with pytest.raises(ZeroDivisionError):
        guest.kick(QueueRole.INFLATE)
    guest.on_interrupt = lambda role: None
    guest.rings[QueueRole.INFLATE].returned()
    assert guest.inflate([2]) == (1, b"\x01")


def test_a_reset_from_the_first_interrupt_at_driver_ok_ends_it(guest: Guest) -> None:
    """DRIVER_OK serves all queues; those after the reset are not served, their rings being gone."""
    guest.device.set_status(0)
    guest.negotiate()
    guest.setup()
    guest.put(QueueRole.INFLATE, [guest.write_pfns([1])])
    guest.put(QueueRole.REPORTING, (), [(8 * PAGE_SIZE, PAGE_SIZE)])
    guest.on_interrupt = lambda role: guest.device.set_status(0)
    guest.go()
    assert guest.device.status() == 0
    assert guest.zero_pages() == {1}


BAD_CHAINS = {
    "outside memory": [(1 << 50, 8, 0, 0)],
    "wrapping addresses": [((1 << 64) - 4, 8, 0, 0)],
    "loop": [(PFNS_AT, 4, VIRTQ_DESC_F_NEXT, 0)],
    "next outside the table": [(PFNS_AT, 4, VIRTQ_DESC_F_NEXT, 5000)],
    "indirect": [(PFNS_AT, 16, 4, 0)],
    "readable after writable": [
        (BITMAP_AT, 1, VIRTQ_DESC_F_WRITE | VIRTQ_DESC_F_NEXT, 1),
        (PFNS_AT, 4, 0, 0),
    ],
}


@pytest.mark.parametrize("role", list(QueueRole))
@pytest.mark.parametrize("descriptors", list(BAD_CHAINS.values()), ids=list(BAD_CHAINS))
def test_a_malformed_chain_costs_that_request(
    guest: Guest, role: QueueRole, descriptors: list[tuple[int, int, int, int]]
) -> None:
    ring = guest.rings[role]
    with guest.unchanged():
        for n, descriptor in enumerate(descriptors):
            ring.descriptor(n, *descriptor)
        ring.offer(0)
        guest.kick(role)
        assert ring.returned() == [(0, 0)]
    assert guest.device.metrics.queues[role].malformed == guest.device.metrics.malformed == 1
    assert guest.inflate([3]) == (1, b"\x01")


@pytest.mark.parametrize("role", list(QueueRole))
def test_a_broken_ring_is_given_up_and_the_others_go_on(guest: Guest, role: QueueRole) -> None:
    with guest.unchanged():
        guest.rings[role].set_avail_idx(5000)
        guest.kick(role)
    assert guest.device.status() & Status.NEEDS_RESET
    assert (guest.device.metrics.broken_queues, guest.config_changes) == (1, 1)
    guest.kick(role)
    assert guest.device.metrics.broken_queues == 1
    if role is not QueueRole.INFLATE:
        assert guest.inflate([3]) == (1, b"\x01")
    # A driver that writes the status without the device's bit clears nothing.
    guest.device.set_status(DRIVER_OK)
    assert guest.device.status() == DRIVER_OK | Status.NEEDS_RESET
    guest.device.set_status(0)
    guest.start()
    assert guest.inflate([4]) == (1, b"\x01")


def test_requests_before_the_one_that_breaks_the_ring_come_back(guest: Guest) -> None:
    ring = guest.rings[QueueRole.REPORTING]
    guest.put(QueueRole.REPORTING, (), [(0, PAGE_SIZE)])
    ring.offer(999)
    guest.kick(QueueRole.REPORTING)
    assert ring.returned() == [(0, PAGE_SIZE)]
    assert guest.device.status() & Status.NEEDS_RESET


def test_a_reset_between_a_broken_ring_and_its_notice_leaves_a_clean_status(guest: Guest) -> None:
    """The interrupt for what came before the break runs a driver that resets: nothing is broken then."""
    guest.on_interrupt = lambda role: guest.device.set_status(0)
    guest.put(QueueRole.REPORTING, (), [(0, PAGE_SIZE)])
    guest.rings[QueueRole.REPORTING].offer(999)
    guest.kick(QueueRole.REPORTING)
    assert guest.device.status() == 0
    assert guest.device.metrics.broken_queues == 1


def test_a_driver_that_resets_when_told_that_the_device_needs_it(guest: Guest) -> None:
    """The requests before the one that broke the ring were published by then."""
    guest.device.on_config_change(lambda: guest.device.set_status(0))
    ring = guest.rings[QueueRole.REPORTING]
    guest.put(QueueRole.REPORTING, (), [(0, PAGE_SIZE)])
    ring.offer(999)
    guest.kick(QueueRole.REPORTING)
    assert ring.returned() == [(0, PAGE_SIZE)]
    assert guest.device.status() == 0


def test_a_broken_deflate_ring_forgets_all_sub_pages(ram: Ram) -> None:
    guest = Guest(HugeMemory(ram))
    guest.inflate(list(range(511)))
    guest.rings[QueueRole.DEFLATE].set_avail_idx(5000)
    guest.kick(QueueRole.DEFLATE)
    assert guest.inflate([511]) == (1, b"\x00")


def test_malformed_requests_are_logged_up_to_a_limit(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hostzero.device"):
        for _ in range(LOG_LINES_MAX + 5):
            guest.send(QueueRole.INFLATE, (), [(BITMAP_AT, 1)])
    assert len(caplog.records) == LOG_LINES_MAX
    assert "malformed request on the inflate queue: the request has no device-readable PFN" in caplog.text
    assert [record.message.endswith("more of these are only counted") for record in caplog.records] == [
        *[False] * (LOG_LINES_MAX - 1),
        True,
    ]
    assert guest.device.metrics.inflate.malformed == LOG_LINES_MAX + 5


# ------------------------------------------------------------- a budget


def test_no_more_requests_are_answered_than_the_budget_allows(guest: Guest) -> None:
    index, ring = guest.indices[QueueRole.REPORTING], guest.rings[QueueRole.REPORTING]
    for page in range(5):
        guest.put(QueueRole.REPORTING, (), [(page * PAGE_SIZE, PAGE_SIZE)], first=page)
    assert guest.device.serve(index, 2)
    assert [head for head, _ in ring.returned()] == [0, 1]
    assert guest.zero_pages() == {0, 1}
    assert guest.device.serve(index, 2)
    assert not guest.device.serve(index, 2)
    assert [head for head, _ in ring.returned()] == [2, 3, 4]


def test_a_budget_that_is_just_enough_says_come_again(guest: Guest) -> None:
    """Whether more came meanwhile is not known until somebody looks."""
    index = guest.indices[QueueRole.REPORTING]
    guest.put(QueueRole.REPORTING, (), [(0, PAGE_SIZE)])
    assert guest.device.serve(index, 1)
    assert not guest.device.serve(index, 1)


def test_malformed_requests_cost_budget_too(guest: Guest) -> None:
    index, ring = guest.indices[QueueRole.INFLATE], guest.rings[QueueRole.INFLATE]
    for first in range(4):
        guest.put(QueueRole.INFLATE, [(0, 3)], first=first)
    assert guest.device.serve(index, 3)
    assert len(ring.returned()) == 3


def test_a_driver_that_asks_from_its_interrupt_does_not_stretch_the_budget(guest: Guest) -> None:
    index = guest.indices[QueueRole.INFLATE]

    def put() -> None:
        guest.put(QueueRole.INFLATE, [guest.write_pfns([1])], [])
        guest.rings[QueueRole.INFLATE].set_used_event(guest.rings[QueueRole.INFLATE].used_idx)

    def on_interrupt(role: QueueRole) -> None:
        put()
        assert not guest.device.serve(index, 100), "the call under way looks again"

    guest.on_interrupt = on_interrupt
    put()
    before = guest.device.metrics.inflate.requests
    assert guest.device.serve(index, 7)
    assert guest.device.metrics.inflate.requests == before + 7
