# SPDX-License-Identifier: GPL-2.0-only
"""Split virtqueues read a second time: slowly, plainly, from the text of virtio 1.3, 2.7.

What the fuzzers compare the device with must not share its mistakes. So nothing here comes from
`hostzero.virtio`: offsets and limits are written down anew, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NEXT, WRITE, INDIRECT = 1, 2, 4
SEGMENT = tuple[int, int]
"""An address and a length in bytes."""

ReadBytes = Callable[[int, int], bytes]
"""Returns so many bytes of guest memory from an address on."""


@dataclass(frozen=True)
class Space:
    """Guest memory as the guest knows it.

    Attributes:
        regions: each one's first byte, and the byte behind its last.
        origins: where on the host each one's first byte is; for those that are not named, where it
            is in guest space.
    """

    regions: tuple[tuple[int, int], ...]
    origins: tuple[int, ...] = ()

    def holds(self, start: int, length: int) -> bool:
        """Return whether one region holds the whole range."""
        return any(first <= start < end and start + length <= end for first, end in self.regions)

    def host_page(self, at: int, size: int) -> SEGMENT | None:
        """Return the host page of `size` bytes around a byte; None if no region holds all of it."""
        for index, (first, end) in enumerate(self.regions):
            if first <= at < end:
                origin = self.origins[index] if index < len(self.origins) else first
                start = at - (at - first + origin) % size
                return (start, size) if first <= start and start + size <= end else None
        return None


@dataclass(frozen=True)
class Parsed:
    """A chain as the specification reads it.

    Attributes:
        head: its first descriptor.
        readable: what the device may read, in order, empty descriptors left out.
        writable: what the device may write, in order, empty descriptors left out.
        bad: the rule that it breaks; empty for none, and then nothing of it may be touched.
    """

    head: int
    readable: tuple[SEGMENT, ...] = ()
    writable: tuple[SEGMENT, ...] = ()
    bad: str = ""

    @property
    def readable_bytes(self) -> int:
        """How many bytes the device may read."""
        return sum(length for _, length in self.readable)

    @property
    def writable_bytes(self) -> int:
        """How many bytes the device may write."""
        return sum(length for _, length in self.writable)


@dataclass(frozen=True)
class Place:
    """Where a ring lies.

    Attributes:
        size: how many descriptors it has.
        desc: the first byte of the descriptor table.
        avail: the first byte of the available ring.
        used: the first byte of the used ring.
    """

    size: int
    desc: int
    avail: int
    used: int

    def parts(self) -> list[SEGMENT]:
        """Return the three parts, the event indices included."""
        size = self.size
        return [(self.desc, 16 * size), (self.avail, 6 + 2 * size), (self.used, 6 + 8 * size)]

    def problem(self, space: Space) -> str:
        """Return the rule of virtio 1.3, 2.7 that the place breaks; empty for none."""
        if self.size not in {1 << bit for bit in range(16)}:
            return "the size is no power of two up to 32768"
        parts = self.parts()
        if self.desc % 16 or self.avail % 2 or self.used % 4:
            return "a part is not aligned"
        if any(start < 0 or not space.holds(start, length) for start, length in parts):
            return "a part is not in guest memory"
        for at, (start, length) in enumerate(parts):
            for other, more in parts[at + 1 :]:
                if start < other + more and other < start + length:
                    return "two parts overlap"
        return ""

    def used_entry(self, index: int) -> int:
        """Return the address of the used entry that a 16-bit index stands for."""
        return self.used + 4 + 8 * (index % self.size)

    def avail_entry(self, index: int) -> int:
        """Return the address of the available entry that a 16-bit index stands for."""
        return self.avail + 4 + 2 * (index % self.size)


def number(read: ReadBytes, at: int, width: int) -> int:
    """Return a little-endian number of guest memory."""
    return int.from_bytes(read(at, width), "little")


def parse_chain(read: ReadBytes, space: Space, place: Place, head: int) -> Parsed:
    """Follow a chain from `head`, which is below the ring's size."""
    readable: list[SEGMENT] = []
    writable: list[SEGMENT] = []
    seen_write = False
    total = 0
    at = head
    for _ in range(place.size):
        address = number(read, place.desc + 16 * at, 8)
        length = number(read, place.desc + 16 * at + 8, 4)
        flags = number(read, place.desc + 16 * at + 12, 2)
        following = number(read, place.desc + 16 * at + 14, 2)
        if flags & INDIRECT:
            return Parsed(head, bad="an indirect descriptor, which was not negotiated")
        if seen_write and not flags & WRITE:
            return Parsed(head, bad="a readable descriptor behind a writable one")
        seen_write = bool(flags & WRITE)
        total += length
        if total > 1 << 32:
            return Parsed(head, bad="more than 4 GiB")
        if length and not space.holds(address, length):
            return Parsed(head, bad="bytes outside guest memory")
        if length:
            (writable if seen_write else readable).append((address, length))
        if not flags & NEXT:
            return Parsed(head, tuple(readable), tuple(writable))
        if following >= place.size:
            return Parsed(head, bad="a descriptor outside the table")
        at = following
    return Parsed(head, bad="a loop")


def gather(read: ReadBytes, segments: Sequence[SEGMENT], limit: int) -> bytes:
    """Return the first `limit` bytes of the segments, or all there are."""
    found = b""
    for start, length in segments:
        if len(found) >= limit:
            break
        found += read(start, min(length, limit - len(found)))
    return found


def first_bytes(segments: Sequence[SEGMENT], limit: int) -> list[SEGMENT]:
    """Return the segments cut off after `limit` bytes."""
    cut: list[SEGMENT] = []
    for start, length in segments:
        if limit <= 0:
            break
        cut.append((start, min(length, limit)))
        limit -= length
    return cut


def overlap(one: Sequence[SEGMENT], other: Sequence[SEGMENT]) -> bool:
    """Return whether two lists of segments share a byte."""
    return any(a < b + m and b < a + n for a, n in one for b, m in other)


def passed(event: int, new: int, old: int) -> bool:
    """Return whether an index that went from `old` to `new` passed the entry of `event`."""
    steps = (new - old) & 0xFFFF
    return any((old + step) & 0xFFFF == event for step in range(steps))
