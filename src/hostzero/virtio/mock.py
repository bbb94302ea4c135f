# SPDX-License-Identifier: GPL-2.0-only
"""Hostile ends of a split virtqueue: every field of a ring can be written by hand.

`MockGuest` writes what a driver writes, and `MockDevice` what a device writes, with no check at
all. Tests of devices and drivers use them, and so do fuzzers; rust-vmm's `virtio-queue` ships
such a mock for the same reason. They write bytes into guest memory with plain offsets and share
no code with the two queues, so that a mistake there is not repeated here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_NEXT, RingLayout


class RawDescriptor(NamedTuple):
    """A `struct virtq_desc` as it stands in memory, with nothing checked."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0


class MockGuest:
    """The guest's side of a ring, written field by field.

    Values are cut to the width of their field, so that a test may write ``-1``.
    """

    def __init__(self, memory: GuestMemory, layout: RingLayout, start_index: int = 0) -> None:
        """Zero the ring and start both indices at `start_index`."""
        self.memory = memory
        self.layout = layout
        self.avail_idx = start_index & 0xFFFF
        self._seen_used = self.avail_idx
        memory.write(layout.desc, bytes(16 * layout.size))
        memory.write(layout.avail, bytes(6 + 2 * layout.size))
        memory.write(layout.used, bytes(6 + 8 * layout.size))
        self.set_avail_idx(start_index)
        self.set_used_event(start_index)
        _write16(memory, layout.used + 2, start_index)
        _write16(memory, layout.used + 4 + 8 * layout.size, start_index)

    def descriptor(self, index: int, addr: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Write descriptor `index` of the table."""
        data = struct.pack("<QIHH", addr & (1 << 64) - 1, length & 0xFFFF_FFFF, flags & 0xFFFF, next & 0xFFFF)
        self.memory.write(Gpa(self.layout.desc + 16 * index), data)

    def chain(self, descriptors: Sequence[tuple[int, int, int]], first: int = 0) -> int:
        """Write (addr, length, flags) entries from index `first` on, linked; return the head.

        NEXT is added to all but the last.
        """
        last = len(descriptors) - 1
        for step, (addr, length, flags) in enumerate(descriptors):
            index = (first + step) % self.layout.size
            following = (index + 1) % self.layout.size
            if step == last:
                self.descriptor(index, addr, length, flags, 0)
            else:
                self.descriptor(index, addr, length, flags | VIRTQ_DESC_F_NEXT, following)
        return first

    def offer(self, *heads: int) -> None:
        """Write entries into the available ring and publish them, without any notification."""
        for head in heads:
            self.set_avail_entry(self.avail_idx % self.layout.size, head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.set_avail_idx(self.avail_idx)

    def set_avail_entry(self, slot: int, head: int) -> None:
        """Write one entry of the available ring."""
        _write16(self.memory, self.layout.avail + 4 + 2 * slot, head)

    def set_avail_idx(self, value: int) -> None:
        """Write the available index."""
        _write16(self.memory, self.layout.avail + 2, value)

    def set_avail_flags(self, value: int) -> None:
        """Write the flags of the available ring (1: NO_INTERRUPT)."""
        _write16(self.memory, self.layout.avail, value)

    def set_used_event(self, value: int) -> None:
        """Write the used event index behind the available ring."""
        _write16(self.memory, self.layout.avail + 4 + 2 * self.layout.size, value)

    @property
    def published_idx(self) -> int:
        """The available index as it stands in memory, whoever wrote it."""
        return _read16(self.memory, self.layout.avail + 2)

    @property
    def used_idx(self) -> int:
        """The used index as it stands in memory."""
        return _read16(self.memory, self.layout.used + 2)

    @property
    def used_flags(self) -> int:
        """The flags of the used ring as they stand in memory (1: NO_NOTIFY)."""
        return _read16(self.memory, self.layout.used)

    @property
    def avail_event(self) -> int:
        """The available event index behind the used ring."""
        return _read16(self.memory, self.layout.used + 4 + 8 * self.layout.size)

    def used_entry(self, slot: int) -> tuple[int, int]:
        """Return (id, len) of one entry of the used ring."""
        return _used_entry(self.memory, self.layout, slot)

    def returned(self) -> list[tuple[int, int]]:
        """Return (id, len) of the entries that were published since the last call."""
        used_idx = self.used_idx
        count = (used_idx - self._seen_used) & 0xFFFF
        entries = [self.used_entry((self._seen_used + step) % self.layout.size) for step in range(count)]
        self._seen_used = used_idx
        return entries


class MockDevice:
    """The device's side of a ring, written field by field.

    Values are cut to the width of their field, so that a test may write ``-1``.
    """

    def __init__(self, memory: GuestMemory, layout: RingLayout, start_index: int = 0) -> None:
        """Look at a ring that a driver has set up; nothing is written."""
        self.memory = memory
        self.layout = layout
        self._next_used = start_index & 0xFFFF
        self._next_avail = start_index & 0xFFFF

    def give_back(self, *entries: tuple[int, int]) -> None:
        """Write (id, len) entries into the used ring and publish them, without any interrupt."""
        for head, length in entries:
            self.set_used_entry(self._next_used % self.layout.size, head, length)
            self._next_used = (self._next_used + 1) & 0xFFFF
        self.set_used_idx(self._next_used)

    def set_used_entry(self, slot: int, head: int, length: int) -> None:
        """Write one entry of the used ring."""
        data = struct.pack("<II", head & 0xFFFF_FFFF, length & 0xFFFF_FFFF)
        self.memory.write(Gpa(self.layout.used + 4 + 8 * slot), data)

    def set_used_idx(self, value: int) -> None:
        """Write the used index."""
        _write16(self.memory, self.layout.used + 2, value)

    def set_used_flags(self, value: int) -> None:
        """Write the flags of the used ring (1: NO_NOTIFY)."""
        _write16(self.memory, self.layout.used, value)

    def set_avail_event(self, value: int) -> None:
        """Write the available event index behind the used ring."""
        _write16(self.memory, self.layout.used + 4 + 8 * self.layout.size, value)

    @property
    def avail_idx(self) -> int:
        """The available index as it stands in memory."""
        return _read16(self.memory, self.layout.avail + 2)

    @property
    def used_event(self) -> int:
        """The used event index behind the available ring."""
        return _read16(self.memory, self.layout.avail + 4 + 2 * self.layout.size)

    def offered(self) -> list[int]:
        """Return the heads that were published since the last call."""
        avail_idx = self.avail_idx
        count = (avail_idx - self._next_avail) & 0xFFFF
        slots = [(self._next_avail + step) % self.layout.size for step in range(count)]
        self._next_avail = avail_idx
        return [_read16(self.memory, self.layout.avail + 4 + 2 * slot) for slot in slots]

    def descriptor(self, index: int) -> RawDescriptor:
        """Return descriptor `index` as it stands in memory."""
        data = self.memory.read(Gpa(self.layout.desc + 16 * index), 16)
        return RawDescriptor(*struct.unpack("<QIHH", data))


def _write16(memory: GuestMemory, gpa: int, value: int) -> None:
    memory.write(Gpa(gpa), struct.pack("<H", value & 0xFFFF))


def _read16(memory: GuestMemory, gpa: int) -> int:
    return int.from_bytes(memory.read(Gpa(gpa), 2), "little")


def _used_entry(memory: GuestMemory, layout: RingLayout, slot: int) -> tuple[int, int]:
    head, length = struct.unpack("<II", memory.read(Gpa(layout.used + 4 + 8 * slot), 8))
    return head, length
