# SPDX-License-Identifier: GPL-2.0-only
"""The guest memory of one case: what it may use, what it wrote there, and what may have changed.

The first 2 MiB of the arena hold rings and buffers. The rest are data pages, full of a pattern
in which no word of 8 bytes is zero and no two are equal; a second copy of it stays here. So a
single wrong byte is found, and a discard that went too far is seen by content.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from hostzero.conform.target import Connection
from hostzero.ram import GuestMemory, MemoryRegion
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.virtio.ring_layout import RingLayout, contiguous_bytes

CONTROL_BYTES: Final = PMD_SIZE
"""Bytes at the start of the arena for rings and buffers."""

_ODD: Final = np.uint64(0x9E37_79B9_7F4A_7C15)


class GuestRam:
    """The arena of one connection.

    Attributes:
        memory: all of guest memory.
        data: the guest addresses of the data pages.
    """

    def __init__(self, connection: Connection) -> None:
        """Fill the data pages with the pattern."""
        self.memory: GuestMemory = connection.memory
        self.nowhere = int(connection.nowhere)
        self._arena = arena = connection.arena
        self.data = range(arena.start + CONTROL_BYTES, arena.stop)
        self._control = arena.start
        self._next_page = self.data.start >> PAGE_SHIFT
        self._bytes = np.frombuffer(self.memory.view(Gpa(self.data.start), len(self.data)), dtype=np.uint8)
        words = np.arange(len(self.data) // 8, dtype=np.uint64)
        words += np.uint64(1)
        words *= _ODD  # odd: no two products are equal, and none is zero
        self._expected = words.view(np.uint8)
        self._bytes[:] = self._expected
        self._open = np.zeros(len(self.data) // PAGE_SIZE, dtype=np.bool_)

    def close(self) -> None:
        """Let go of guest memory, so that it can be unmapped."""
        del self._bytes

    @property
    def region(self) -> MemoryRegion:
        """The memory region that holds the arena."""
        return next(r for r in self.memory.regions if r.gpa <= self.data.start < r.gpa + r.size)

    @property
    def host_page(self) -> int:
        """The smallest piece of 4 KiB pages, in pages, that the host can drop."""
        return self.region.ram.page_size // PAGE_SIZE

    @property
    def end_of_ram(self) -> int | None:
        """The address behind the arena if RAM ends there, else None."""
        region = self.region
        end = region.gpa + region.size
        adjoins = any(other.gpa == end for other in self.memory.regions)
        return end if self.data.stop == end and not adjoins else None

    # ------------------------------------------------------------------ places

    def control(self, length: int, align: int = 16) -> int:
        """Return the address of `length` zeroed bytes for a buffer; never a data page."""
        start = self._control + -self._control % align
        if start + length > self.data.start:
            raise ValueError("a case needs more buffers than the suite has room for")
        self._control = start + length
        self.memory.write(Gpa(start), bytes(length))
        return start

    def rewind(self) -> None:
        """Take all buffers and rings back; the device has been reset and owns none of them."""
        self._control = self._arena.start

    def ring(self, size: int) -> RingLayout:
        """Return room for a ring, on pages of its own."""
        start = self.control(contiguous_bytes(size), PAGE_SIZE)
        self._control += -self._control % PAGE_SIZE
        return RingLayout.contiguous(self.memory, size, Gpa(start))

    def pages(self, count: int, align: int = 1) -> int:
        """Return the first PFN of `count` data pages that nobody has, with untouched pages around.

        `align` is in pages.
        """
        first = self._next_page + 1
        first += -first % align
        if (first + count + 1) << PAGE_SHIFT > self.data.stop:
            raise ValueError("a case needs more pages than the suite has room for")
        self._next_page = first + count
        return first

    def last_pages(self, count: int) -> int:
        """Return the first PFN of the last data pages of the arena."""
        return (self.data.stop >> PAGE_SHIFT) - count

    # ------------------------------------------------------------------ content

    def write(self, gpa: int, data: bytes) -> None:
        """Write bytes that are expected to stay: into data pages or buffers."""
        self.memory.write(Gpa(gpa), data)
        if gpa in self.data:
            at = gpa - self.data.start
            self._expected[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
            first, last = at >> PAGE_SHIFT, at + len(data) - 1 >> PAGE_SHIFT
            self._open[first : last + 1] = False

    def fill(self, pfn: int, pages: int, byte: int) -> None:
        """Fill data pages with one byte, which is expected to stay."""
        self.write(pfn << PAGE_SHIFT, bytes([byte]) * (pages << PAGE_SHIFT))

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of bytes in guest memory."""
        return self.memory.read(Gpa(gpa), length)

    def is_zero(self, gpa: int, length: int) -> bool:
        """Return whether a range of guest memory reads as zero."""
        return not np.frombuffer(self.memory.view(Gpa(gpa), length), dtype=np.uint8).any() if length else True

    def is_kept(self, pfn: int) -> bool:
        """Return whether a data page holds what the case wrote there last."""
        return self.kept(pfn << PAGE_SHIFT, PAGE_SIZE)

    def kept(self, gpa: int, length: int) -> bool:
        """Return whether bytes of data pages hold what the case wrote there last."""
        at = gpa - self.data.start
        return bool(np.array_equal(self._bytes[at : at + length], self._expected[at : at + length]))

    def may_change(self, pfns: Iterable[int]) -> None:
        """Take data pages out of what `changed` looks at, until they are written again."""
        first = self.data.start >> PAGE_SHIFT
        for pfn in pfns:
            if 0 <= pfn - first < self._open.size:
                self._open[pfn - first] = True

    def changed(self) -> list[int]:
        """Return the addresses of changed words of 8 bytes that nobody gave away, a few at most."""
        differ = np.flatnonzero(self._bytes.view(np.uint64) != self._expected.view(np.uint64))
        if not differ.size:
            return []
        differ = differ[~self._open[differ >> (PAGE_SHIFT - 3)]]
        return [self.data.start + 8 * int(word) for word in differ[:8]]

    def resident(self, pfn: int, pages: int) -> int:
        """Return the bytes of data pages that hold host memory.

        Raises:
            RamError: the kernel does not answer.
        """
        region = self.region
        offset = region.offset + (pfn << PAGE_SHIFT) - region.gpa
        return region.ram.resident(offset, pages << PAGE_SHIFT)
