# SPDX-License-Identifier: GPL-2.0-only
"""The steps of a hostile guest: each takes a `DeviceWorld` and integers, and does one thing."""

from __future__ import annotations

from typing import Final

from hostzero.check.wire.device import DeviceWorld
from hostzero.check.wire.device_model import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    FREE_PAGE_HINT,
    PAGE,
    STATS,
    VERSION_1,
    Ring,
)
from hostzero.check.wire.device_repertoire import guest_write, operation
from hostzero.check.wire.wire_rings import NEXT, Place, overlap
from hostzero.virtio.ring_layout import RingLayout

RINGS_AT: Final = 64
"""The page from which on `start` puts its rings, one a page."""


@operation
def reset(world: DeviceWorld) -> None:
    """Reset the device by its status."""
    status(world, 0)


@operation
def status(world: DeviceWorld, value: int) -> None:
    """Write the device status."""
    model = world.model
    was_ok = model.status & DRIVER_OK
    allowed = model.write_status(value)
    if allowed and model.status & DRIVER_OK and not was_ok:
        for ring in model.rings.values():
            world.expect(ring)
    world.call("a status", allowed, world.device.set_status, value)


@operation
def features(world: DeviceWorld, word: int) -> None:
    """Write the features that the driver accepts."""
    model = world.model
    allowed = not model.status & FEATURES_OK and 0 <= word < 1 << 64
    world.call("feature bits", allowed, world.device.set_driver_features, word)
    if allowed:
        model.accepted = word


@operation
def setup(world: DeviceWorld, index: int, size: int, desc: int, avail: int, used: int, at: int) -> None:
    """Give the device the ring of a queue, both indices at `at`."""
    model = world.model
    place = Place(size, desc, avail, used)
    layout = ring_layout(world, place)
    if layout is None:
        return
    role = model.role(index)
    between = model.status & FEATURES_OK and not model.status & DRIVER_OK
    allowed = bool(between) and role is not None and index not in model.rings and size <= model.sizes[role]
    start = at & 0xFFFF
    if allowed and role is not None:
        for first, length in place.parts():
            world.write(first, bytes(length))
        for first in (avail + 2, avail + 4 + 2 * size, used + 2, used + 4 + 8 * size):
            world.write(first, start.to_bytes(2, "little"))
        model.rings[index] = Ring(role, place, start, start)
        world.begin(index, start)
    device = world.device
    world.call(
        "a queue",
        allowed,
        lambda: device.setup_queue(index, layout, lambda: world.interrupt(index), start_index=start),
    )


@operation
def start(world: DeviceWorld, word: int, bits: int, at: int, *places: int) -> None:
    """Begin anew in the proper order: features, all queues with up to `1 << bits` entries, go.

    `places` are three addresses for each ring, its parts in the order of the specification; what has
    none, or cannot lie there, has a page of its own.
    """
    status(world, 0)
    status(world, ACKNOWLEDGE)
    status(world, ACKNOWLEDGE | DRIVER)
    features(world, (word & world.model.offered) | VERSION_1)
    status(world, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    for index in range(5):
        role = world.model.role(index)
        if role is None:
            break
        size = min(world.model.sizes[role], 1 << (bits & 7))
        base = (RINGS_AT + index) * PAGE
        wanted = places[3 * index : 3 * index + 3]
        if len(wanted) < 3 or Place(size, *wanted).problem(world.model.space):
            wanted = (base, base + 1024, base + 2048)
        setup(world, index, size, *wanted, at)
    status(world, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)


@guest_write
def dirty(world: DeviceWorld, page: int, count: int) -> None:
    """Use pages again: fill them with bytes that are not zero, but for rings in use."""
    for pfn in range(page, page + min(count, 64)):
        world.write_around(pfn * PAGE, world.ram.pattern(pfn))


@guest_write
def put(world: DeviceWorld, gpa: int, width: int, value: int) -> None:
    """Write a number of `width` bytes anywhere."""
    width = min(max(width, 1), 128)
    world.write(gpa, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))


@guest_write
def put_command(world: DeviceWorld, gpa: int, more: int) -> None:
    """Write the command id that the configuration space has, plus a number."""
    command = int.from_bytes(world.model.config()[8:12], "little") + more
    world.write(gpa, (command & 0xFFFF_FFFF).to_bytes(4, "little"))


@guest_write
def pfns(world: DeviceWorld, gpa: int, *numbers: int) -> None:
    """Write an array of page numbers."""
    world.write(gpa, b"".join((pfn & 0xFFFF_FFFF).to_bytes(4, "little") for pfn in numbers))


@guest_write
def run(world: DeviceWorld, gpa: int, first: int, count: int) -> None:
    """Write an array of `count` page numbers from `first` on."""
    pfns(world, gpa, *range(first, first + min(count, 5000)))


@guest_write
def desc(world: DeviceWorld, index: int, at: int, addr: int, length: int, flags: int, following: int) -> None:
    """Write one descriptor of a queue that is set up."""
    place = world.place(index)
    if place is None:
        return
    data = (addr & (1 << 64) - 1).to_bytes(8, "little") + (length & 0xFFFF_FFFF).to_bytes(4, "little")
    data += (flags & 0xFFFF).to_bytes(2, "little") + (following & 0xFFFF).to_bytes(2, "little")
    world.write(place.desc + 16 * (at % place.size), data)


@guest_write
def chain(world: DeviceWorld, index: int, first: int, *fields: int) -> None:
    """Write (address, length, flags) descriptors from `first` on, linked, and offer their head."""
    place = world.place(index)
    if place is None or len(fields) < 3:
        return
    count = len(fields) // 3
    for step in range(count):
        addr, length, flags = fields[3 * step : 3 * step + 3]
        at = (first + step) % place.size
        more = step + 1 < count
        desc(world, index, at, addr, length, flags | (NEXT if more else 0), (at + 1) % place.size)
    world.offer(index, first % place.size)


@guest_write
def offer(world: DeviceWorld, index: int, head: int) -> None:
    """Offer a head, whatever its descriptors hold."""
    world.offer(index, head)


@guest_write
def avail_idx(world: DeviceWorld, index: int, value: int) -> None:
    """Write the available index of a queue."""
    place = world.place(index)
    if place is not None:
        world.write(place.avail + 2, (value & 0xFFFF).to_bytes(2, "little"))


@guest_write
def avail_flags(world: DeviceWorld, index: int, value: int) -> None:
    """Write the flags of an available ring: 1 wants no interrupts."""
    place = world.place(index)
    if place is not None:
        world.write(place.avail, (value & 0xFFFF).to_bytes(2, "little"))


@guest_write
def used_event(world: DeviceWorld, index: int, value: int) -> None:
    """Write which used entry the driver wants to be told of."""
    place = world.place(index)
    if place is not None:
        world.write(place.avail + 4 + 2 * place.size, (value & 0xFFFF).to_bytes(2, "little"))


@operation
def kick(world: DeviceWorld, index: int) -> None:
    """Notify the device of a queue."""
    model = world.model
    allowed = model.live and index in model.rings
    if allowed:
        world.expect(model.rings[index])
    world.call("a notification", allowed, world.device.notify, index)


@guest_write
def at_interrupt(world: DeviceWorld, action: int, index: int, head: int) -> None:
    """At the next interrupt: 1 reset the device, 2 offer a head and notify, 3 notify a queue."""
    world.plan_interrupt(action & 3, index, head)


@guest_write
def fail_discard(world: DeviceWorld, which: int, mode: int) -> None:
    """Have a discard fail.

    1: at once; 2: halfway; 3: halfway with OSError; 4: halfway with RamError; 5: the kernel's call, halfway.
    """
    world.ram.plan_failure(which, mode)


@guest_write
def stuck(world: DeviceWorld, page: int, count: int) -> None:
    """Have the host fail at these pages from now on, and at no others; what is before them it drops."""
    world.ram.plan_stuck(page, count)


@guest_write
def race(world: DeviceWorld, which: int, addr: int, length: int) -> None:
    """Rewrite the `which`-th descriptor of the next request just after the device has read it."""
    world.plan_race(which, addr, length)


@operation
def write_config(world: DeviceWorld, offset: int, length: int, value: int) -> None:
    """Write to the configuration space."""
    data = (value & (1 << 128) - 1).to_bytes(16, "little") + bytes(8)
    data = data[: min(max(length, 0), 24)]
    allowed = world.model.write_config(offset, data)
    world.call("a write to the configuration space", allowed, world.device.write_config, offset, data)


@operation
def read_config(world: DeviceWorld, offset: int, length: int) -> None:
    """Read a part of the configuration space."""
    allowed = offset >= 0 and length >= 0 and offset + length <= 16
    said = world.call("a read of part of it", allowed, world.device.read_config, offset, length)
    if allowed and said != world.model.config()[offset : offset + length]:
        world.fail("rot", "a part of the configuration space is not the part of the whole")


@operation
def set_target(world: DeviceWorld, pages: int) -> None:
    """Ask for a balloon of so many pages, as the host's user."""
    model = world.model
    allowed = 0 <= pages <= sum((end - first) // PAGE for first, end in model.space.regions)
    heard = world.config_changes
    if allowed:
        model.target = pages
    world.call("a target", allowed, world.device.set_target, pages)
    if allowed and model.live and world.config_changes == heard:
        world.fail("rot", "a running driver is not told of a target")


@operation
def inhibit(world: DeviceWorld) -> None:
    """Forbid discards."""
    world.model.inhibited += 1
    world.call("inhibit_discard", True, world.device.inhibit_discard, "check")


@operation
def allow(world: DeviceWorld) -> None:
    """Allow discards again."""
    allowed = world.model.inhibited > 0
    world.model.inhibited -= int(allowed)
    world.call("allow_discard", allowed, world.device.allow_discard, "check")


@operation
def request_stats(world: DeviceWorld) -> None:
    """Ask for statistics: the buffer that is held comes back."""
    model = world.model
    ring = next((each for each in model.rings.values() if each.role == STATS), None)
    held = ring.held if ring is not None and model.live else None
    if ring is not None and held is not None:
        ring.held = None
        ring.waiting.append(held)
    said = world.call("request_stats", True, world.device.request_stats)
    if said != (held is not None):
        world.fail("rot", "request_stats does not say whether it could ask")


@operation
def hint(world: DeviceWorld, command: int) -> None:
    """Start (0), stop (1) or end (2) a run of free page hinting."""
    model, device = world.model, world.device
    allowed = model.live and bool(model.acked & FREE_PAGE_HINT)
    if allowed and command % 3 == 0:
        model.run = model.run + 1 if 0x8000_0000 <= model.run < 0xFFFF_FFFF else 0x8000_0000
        model.hints = frozenset({"requested"})
    elif allowed:
        model.hints = frozenset({"stopped" if command % 3 == 1 else "done"})
    call = (device.hint_start, device.hint_stop, device.hint_done)[command % 3]
    world.call("a hint command", allowed, call)


def ring_layout(world: DeviceWorld, place: Place) -> RingLayout | None:
    """Have a place checked by the product; it must agree with the text of the specification.

    None if it is refused, or overlaps a ring in use: two rings in one place are left out.
    """
    if any(overlap(place.parts(), ring.place.parts()) for ring in world.model.rings.values()):
        return None
    problem = place.problem(world.model.space)
    made = world.call(
        "a ring layout",
        not problem,
        RingLayout.validated,
        world.memory,
        place.size,
        place.desc,
        place.avail,
        place.used,
    )
    return None if made is None else made
