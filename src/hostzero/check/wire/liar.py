# SPDX-License-Identifier: GPL-2.0-only
"""A device that lies within the limits that the specification leaves.

`Liar` stands between a driver and a real device and is a transport to both. The device serves
each request; before the driver sees the answer, the next number of `lies` decides how its used
length or bitmap is changed. No lie makes a promise that is false: a hint may be withheld, and
whatever promises nothing may hold anything. Without bit 6 a used length may even be the exact one
for a block that holds dirt. With it, a block is said to be zero only if the device said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hostzero.check.wire.device_model import INIT_ON_INFLATE, INIT_REPORTED
from hostzero.check.wire.wire_rings import Parsed, Place, Space, number, parse_chain
from hostzero.device import BalloonDevice
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.features import QueueRole
from hostzero.virtio.ring_layout import RingLayout

WAYS = 10
"""How many ways to lie about one answer there are; a lie is taken modulo this, and 0 is the truth."""


class Liar:
    """A `hostzero.virtio.Transport` in front of a device.

    Attributes:
        device: the real device; what is not of the transport is asked of it.
        lies: one number for each answer to come; with none left, the truth is told.
        told: how many answers were changed.
    """

    def __init__(self, device: BalloonDevice, memory: GuestMemory, lies: Sequence[int] = ()) -> None:
        """Stand before `device`, whose rings lie in `memory`."""
        self.device = device
        self.lies = list(lies)
        self.told = 0
        self._memory = memory
        self._space = Space(tuple((int(region.gpa), region.gpa + region.size) for region in memory.regions))
        self._seen: dict[int, tuple[Place, int]] = {}
        self._others = 0

    def __getattr__(self, name: str) -> Any:
        """Return what the real device has under that name."""
        return getattr(self.device, name)

    # ------------------------------------------------------------------ the transport

    def device_features(self) -> int:
        """Return the bits that the device offers."""
        return self.device.device_features()

    def set_driver_features(self, features: int) -> None:
        """Pass the driver's bits on."""
        self.device.set_driver_features(features)

    def status(self) -> int:
        """Return the device's status."""
        return self.device.status()

    def set_status(self, status: int) -> None:
        """Pass a status on; a reset takes the rings away, a start may bring answers."""
        if status == 0:
            self._seen.clear()
        self.device.set_status(status)
        for index in list(self._seen):
            self._falsify(index)

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the device's configuration space."""
        return self.device.read_config(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass a write to the configuration space on."""
        self.device.write_config(offset, data)

    def queue_size_max(self, index: int) -> int:
        """Return the most entries of a queue."""
        return self.device.queue_size_max(index)

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        """Give the device a ring, and remember where the answers will be."""

        def falsify_first() -> None:
            self._falsify(index)
            interrupt()

        self.device.setup_queue(index, layout, falsify_first)
        self._seen[index] = (Place(layout.size, layout.desc, layout.avail, layout.used), 0)

    def notify(self, index: int) -> None:
        """Have the device serve a queue; change what it answered."""
        self.device.notify(index)
        self._falsify(index)

    def on_config_change(self, callback: Callable[[], None]) -> None:
        """Pass the driver's callback on."""
        self.device.on_config_change(callback)

    # ------------------------------------------------------------------ lies

    def _falsify(self, index: int) -> None:
        # The driver has not looked yet: it runs in the interrupt, or after `notify` has returned.
        if index not in self._seen:
            return
        place, seen = self._seen[index]
        used = number(self._read, place.used + 2, 2)
        self._seen[index] = (place, used)
        role = self.device.queue_role(index)
        while seen != used and role is not None:
            at = place.used_entry(seen)
            head, length = number(self._read, at, 4), number(self._read, at + 4, 4)
            parsed = parse_chain(self._read, self._space, place, head)
            lie = self.lies.pop(0) % WAYS if self.lies else 0
            if lie and not parsed.bad:
                self.told += 1
                said = self._lie(role, parsed, length, lie)
                self._memory.write(Gpa(at + 4), (said & 0xFFFF_FFFF).to_bytes(4, "little"))
            self._others += length
            seen = (seen + 1) & 0xFFFF

    def _lie(self, role: QueueRole, parsed: Parsed, length: int, lie: int) -> int:
        room = parsed.writable_bytes
        said = (0, 0, length - 1, length + 1, length // 2, 2 * length, 0xFFFF_FFFF, self._others, room, 4096)[
            lie
        ]
        acked = int(self.device.acked)
        if role is QueueRole.REPORTING and acked & INIT_REPORTED:
            # The exact length is a promise, which only the device may give.
            return length if said & 0xFFFF_FFFF == room else said
        if role is QueueRole.INFLATE and acked & INIT_ON_INFLATE and room:
            self._lie_in_bits(parsed, length, said & 0xFFFF_FFFF, lie)
        return said

    def _lie_in_bits(self, parsed: Parsed, length: int, said: int, lie: int) -> None:
        # What lies behind the length that is said, or behind the last page, may hold anything; a bit
        # that counts may be taken back, never given.
        pages = parsed.readable_bytes // 4
        at = 0
        for start, size in parsed.writable:
            held = self._read(start, size)
            bits = bytearray(size)
            for n in range(size):
                counted = sum(1 << bit for bit in range(8) if 8 * (at + n) + bit < pages)
                # The device wrote only `length` bytes: behind them no bit is its word.
                truth = held[n] & counted if at + n < length else 0
                kept = truth & (0xFF if lie % 2 else 0x55)
                bits[n] = kept | (0xFF & ~counted) if at + n < said else 0xFF
            self._memory.write(Gpa(start), bytes(bits))
            at += size

    def _read(self, gpa: int, length: int) -> bytes:
        return self._memory.read(Gpa(gpa), length)
