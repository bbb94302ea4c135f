# SPDX-License-Identifier: GPL-2.0-only
"""Notifications in both directions, and how they are suppressed."""

from __future__ import annotations

from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.conform.rings import RawRing
from hostzero.conform.target import Ability
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature, QueueRole
from hostzero.virtio.ring_layout import VIRTQ_AVAIL_F_NO_INTERRUPT

EVENT_IDX = Feature.RING_EVENT_IDX
INTERRUPTS = (Ability.INTERRUPTS,)
DEFLATE = QueueRole.DEFLATE


@case("notify-used", "A used buffer is notified", "2.7.7.2", needs=INTERRUPTS)
def used(rig: Rig) -> None:
    ring = _start(rig, drop=EVENT_IDX)
    _one_more(rig, ring, 0)
    rig.judge.must(
        rig.settle(lambda: ring.interrupts > 0), "flags is 0, and no used buffer notification came"
    )


@case("notify-suppressed", "With flags 1 used buffers are not notified", "2.7.7.2", needs=INTERRUPTS)
def suppressed(rig: Rig) -> None:
    ring = _start(rig, drop=EVENT_IDX)
    ring.guest.set_avail_flags(VIRTQ_AVAIL_F_NO_INTERRUPT)
    _one_more(rig, ring, 0)
    rig.quiet()
    rig.judge.should(not ring.interrupts, f"flags is 1, and {ring.interrupts} used buffer notifications came")


@case("notify-ignores-used-event", "Without EVENT_IDX used_event means nothing", "2.7.7.2", needs=INTERRUPTS)
def ignores_used_event(rig: Rig) -> None:
    ring = _start(rig, drop=EVENT_IDX)
    ring.guest.set_used_event(1000)
    _one_more(rig, ring, 0)
    rig.judge.must(
        rig.settle(lambda: ring.interrupts > 0), "flags is 0, and no used buffer notification came"
    )


@case(
    "notify-event",
    "The used entry that used_event names is notified",
    "2.7.7.2",
    offers=EVENT_IDX,
    needs=INTERRUPTS,
)
def event(rig: Rig) -> None:
    ring = _start(rig)
    for n in range(6):
        ring.guest.set_used_event(n)
        before = ring.interrupts
        _one_more(rig, ring, n)
        rig.judge.must(
            rig.settle(lambda before=before: ring.interrupts > before),  # type: ignore[misc]
            f"used_event is {n}, used entry {n} was written, and no notification came",
        )


@case(
    "notify-event-not-yet",
    "Entries before the one that used_event names are not notified",
    "2.7.7.2",
    offers=EVENT_IDX,
    needs=INTERRUPTS,
)
def event_not_yet(rig: Rig) -> None:
    ring = _start(rig)
    ring.guest.set_used_event(5)
    for n in range(4):
        _one_more(rig, ring, n)
    rig.quiet()
    rig.judge.should(
        not ring.interrupts, f"used_event is 5, and {ring.interrupts} notifications came for entries 0 to 3"
    )


@case(
    "notify-event-ignores-flags",
    "With EVENT_IDX the flags of the available ring mean nothing",
    "2.7.7.2",
    offers=EVENT_IDX,
    needs=INTERRUPTS,
)
def event_ignores_flags(rig: Rig) -> None:
    ring = _start(rig)
    ring.guest.set_avail_flags(VIRTQ_AVAIL_F_NO_INTERRUPT)
    ring.guest.set_used_event(0)
    _one_more(rig, ring, 0)
    rig.judge.must(
        rig.settle(lambda: ring.interrupts > 0),
        "used_event is 0, entry 0 was written, and flags kept it quiet",
    )


@case("notify-used-flags", "Without EVENT_IDX the used ring's flags are 0 or 1", "2.7.10.2")
def used_flags(rig: Rig) -> None:
    ring = _start(rig, drop=EVENT_IDX)
    for n in range(4):
        _one_more(rig, ring, n)
        flags = ring.guest.used_flags
        rig.judge.must(flags in {0, 1}, f"flags of the used ring is {flags:#x}")


@case("notify-event-used-flags", "With EVENT_IDX the used ring's flags are 0", "2.7.10.2", offers=EVENT_IDX)
def event_used_flags(rig: Rig) -> None:
    ring = _start(rig)
    for n in range(4):
        _one_more(rig, ring, n)
        rig.judge.must(ring.guest.used_flags == 0, f"flags of the used ring is {ring.guest.used_flags:#x}")


@case("notify-needed", "A driver that notifies only when it has to is served", "2.7.10.2", lessons=(8,))
def needed(rig: Rig) -> None:
    _expect_served(rig)


@case("notify-needed-by-flags", "The same without EVENT_IDX", "2.7.10.2", lessons=(8,))
def needed_by_flags(rig: Rig) -> None:
    _expect_served(rig, drop=EVENT_IDX)


@case("notify-spurious", "Notifications without a buffer are tolerated", "2.7.10.2")
def spurious(rig: Rig) -> None:
    rig.start()
    rig.judge.transcript.sent("200 notifications of empty queues")
    for n in range(200):
        rig.transport.notify(n % len(rig.rings))
    rig.judge.safe(rig.connection.alive(), "the device went away")
    rig.expect_works()
    rig.expect_untouched()


@case("notify-event-any-value", "Any value of used_event is survived", "2.7.7.2", offers=EVENT_IDX)
def event_any_value(rig: Rig) -> None:
    ring = _start(rig)
    for n, value in enumerate((0xFFFF, 0x8000, 0x7FFF, 1, 0)):
        ring.guest.set_used_event(value)
        _one_more(rig, ring, n)
    rig.expect_untouched()


@case("notify-writes-no-descriptor", "Descriptor table and available ring are left as they are", "2.7.5.1")
def writes_no_descriptor(rig: Rig) -> None:
    ring = _start(rig)
    layout = ring.layout
    places = [(layout.desc, 16 * layout.size), (layout.avail, 6 + 2 * layout.size)]
    gpa, length = rig.write_pfns([rig.ram.pages(1)])
    for n in range(8):
        ring.guest.offer(ring.guest.chain([(gpa, length, 0)], first=n))
    before = [rig.ram.read(at, size) for at, size in places]
    ring.kick()
    rig.judge.must(
        rig.settle(lambda: len(ring.look()) == 8), f"{len(ring.look())} of 8 requests came back", "5.5.6"
    )
    for name, at, content in zip(("descriptor table", "available ring"), places, before, strict=True):
        rig.judge.must(rig.ram.read(*at) == content, f"the device wrote into the {name}")


def _start(rig: Rig, drop: Feature = Feature.PAGE_POISON) -> RawRing:
    rig.start(drop=drop, raw={DEFLATE})
    return rig.raw[DEFLATE]


def _one_more(rig: Rig, ring: RawRing, n: int) -> None:
    if not n:
        rig.ram.pages(1)
    gpa, length = rig.write_pfns([rig.ram.data.start // PAGE_SIZE])
    ring.guest.offer(ring.guest.chain([(gpa, length, 0)], first=n % ring.layout.size))
    rig.judge.transcript.sent(f"deflate request {n}")
    ring.kick()
    if not rig.settle(lambda: len(ring.look()) > n):
        rig.judge.fail(f"deflate request {n} did not come back; {rig.state()}", "5.5.6")


def _expect_served(rig: Rig, drop: Feature = Feature.PAGE_POISON) -> None:
    rig.start(drop=drop)
    ring = rig.rings[DEFLATE]
    gpa, length = rig.write_pfns([rig.ram.data.start // PAGE_SIZE])
    kicks = 0
    for turn in range(200):
        numbers = [ring.add([(gpa, length)]) for _ in range(1 + turn % 7)]
        kicks += ring.kick()
        rig.wait_for(DEFLATE, numbers)
    rig.judge.transcript.sent(f"200 batches of deflate requests with {kicks} notifications")
