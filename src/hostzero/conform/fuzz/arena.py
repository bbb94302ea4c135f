# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory with a second copy, and a record of what may have been given away.

One file holds three regions and gaps between them, which no region covers::

    file   | LOW           | gap | DATA           | gap | FAR     | gap |
    guest  | anywhere            | DATA_GPA             | touches DATA  |

LOW has rings and buffers, and anything may become of it. Every byte of the rest is 0x80 or more,
so that no four of them, at whatever alignment a confused device reads them, name a page of this
memory. What a request could give away is recorded before the request is sent, in the widest
reading of what it says: `name_*`. A byte outside of that may never change, and a page that was
named holds its bytes or is zero as a whole.
"""

from __future__ import annotations

import functools
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.ram import GuestMemory, MemoryRegion, Ram, libc
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.vhost_user.payloads import MemTable, Region
from hostzero.virtio.ring_layout import ring_bytes

FILE_NAME: Final = "hostzero-fuzz"
"""What guest memory is called in /proc, by which mappings that are left behind are found."""

LOW_PAGES: Final = 256
DATA_PAGES: Final = 512
FAR_PAGES: Final = 64
_GAP_PAGES: Final = 16
_DATA_AT: Final = LOW_PAGES + _GAP_PAGES
_FAR_AT: Final = _DATA_AT + DATA_PAGES + _GAP_PAGES
FILE_PAGES: Final = _FAR_AT + FAR_PAGES + _GAP_PAGES

DATA_PFN: Final = 0x05A5_C300
"""No small number, and none that lengths and indices in a ring add up to."""
END_PFN: Final = DATA_PFN + DATA_PAGES + FAR_PAGES
LOW_GPAS: Final = (0, 0, 1 << 32, (1 << 64) - LOW_PAGES * PAGE_SIZE)
"""Where LOW may lie; the last one ends where 64 bits do."""

_USER: Final = (0x7F00_0000_0000, 0x7E00_0000_0000, 0x7D00_0000_0000)
BITMAP_BYTES_MAX: Final = 4096
"""More than any device answers to one inflate request."""

USED_BYTES_MAX: Final = sum(ring_bytes(1024)[2:])
"""The used ring of the largest queue that a backend is told of here."""


@functools.cache
def _pattern() -> NDArray[np.uint8]:
    pattern = np.random.default_rng(7).integers(0x80, 0x100, FILE_PAGES * PAGE_SIZE, dtype=np.uint8)
    pattern[: LOW_PAGES * PAGE_SIZE] = 0
    return pattern


class Arena:
    """Guest memory of one driver's life.

    Attributes:
        fd: the file.
        low: the guest address of LOW.
        guest: all of it by guest addresses, for whoever writes rings.
        lost: whether the file was cut short, so that nothing can be said of its bytes.
    """

    def __init__(self, low: int) -> None:
        """Make it, full of the pattern."""
        self.fd = os.memfd_create(FILE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(self.fd, FILE_PAGES * PAGE_SIZE)
        self.low = low
        self.lost = False
        self._parts = (
            (low, 0, LOW_PAGES),
            (DATA_PFN << PAGE_SHIFT, _DATA_AT, DATA_PAGES),
            ((DATA_PFN + DATA_PAGES) << PAGE_SHIFT, _FAR_AT, FAR_PAGES),
        )
        self._ram = Ram.from_fd(self.fd, 0, FILE_PAGES * PAGE_SIZE)
        self.guest = GuestMemory(
            [
                MemoryRegion(Gpa(gpa), self._ram, at * PAGE_SIZE, pages * PAGE_SIZE)
                for gpa, at, pages in self._parts
            ]
        )
        self._bytes = self._ram.array(np.uint8)
        self._bytes[:] = _pattern()
        self._open = np.zeros(FILE_PAGES * PAGE_SIZE, dtype=np.bool_)
        self._open[: LOW_PAGES * PAGE_SIZE] = True
        self._named = np.zeros(FILE_PAGES, dtype=np.bool_)

    def close(self) -> None:
        """Give the memory back."""
        del self._bytes
        self._ram.close()
        os.close(self.fd)

    # ------------------------------------------------------------------ what a front end says of it

    def table(self) -> tuple[MemTable, list[int]]:
        """Return the memory table and the descriptors that go with it."""
        regions = [
            Region(gpa, pages * PAGE_SIZE, user, at * PAGE_SIZE)
            for (gpa, at, pages), user in zip(self._parts, _USER, strict=True)
        ]
        return MemTable(tuple(regions)), [self.fd] * len(regions)

    def user(self, gpa: int) -> int:
        """Return the front end's address of a guest address; of one outside, some address outside."""
        for (start, _, pages), user in zip(self._parts, _USER, strict=True):
            if start <= gpa < start + pages * PAGE_SIZE:
                return user + gpa - start
        return gpa & (1 << 63) - 1

    # ------------------------------------------------------------------ what may change

    def name_pages(self, pfns: NDArray[np.int64]) -> None:
        """Record pages that a device may drop; others than DATA and FAR are ignored."""
        data = pfns[(pfns >= DATA_PFN) & (pfns < DATA_PFN + DATA_PAGES)]
        far = pfns[(pfns >= DATA_PFN + DATA_PAGES) & (pfns < END_PFN)]
        self._named[data - DATA_PFN + _DATA_AT] = True
        self._named[far - DATA_PFN - DATA_PAGES + _FAR_AT] = True

    def name_words(self, data: bytes) -> None:
        """Record the pages that four bytes anywhere in `data` could be the number of."""
        for shift in range(min(4, len(data))):
            whole = (len(data) - shift) // 4 * 4
            self.name_pages(np.frombuffer(data[shift : shift + whole], dtype="<u4").astype(np.int64))

    def name_segment(self, gpa: int, length: int) -> None:
        """Record a range that a device may drop if it is whole pages, or write an answer to.

        A range from one region into the next is guest memory, too, whether a device takes it or not.
        """
        whole = not gpa % PAGE_SIZE and not length % PAGE_SIZE
        end = gpa + min(length, BITMAP_BYTES_MAX)
        parts = self._covered(gpa, length)
        if sum(size for _, _, size in parts) < length:
            return
        for start, offset, size in parts:
            if whole:
                self._named[offset // PAGE_SIZE : (offset + size) // PAGE_SIZE] = True
            self._open[offset : offset + min(size, end - start)] = True

    def name_ring(self, gpa: int) -> None:
        """Record a place where a device was told that its used ring is, of any size."""
        for start, at, pages in self._parts:
            if start <= gpa < start + pages * PAGE_SIZE:
                offset = at * PAGE_SIZE + gpa - start
                end = min(offset + USED_BYTES_MAX, (at + pages) * PAGE_SIZE)
                self._open[offset:end] = True

    # What of a range lies in regions: guest address, offset in the file, length.
    def _covered(self, gpa: int, length: int) -> list[tuple[int, int, int]]:
        found = []
        for start, at, pages in self._parts:
            first, end = max(gpa, start), min(gpa + length, start + pages * PAGE_SIZE)
            if first < end:
                found.append((first, at * PAGE_SIZE + first - start, end - first))
        return found

    def pages(self, pfn: int, count: int) -> NDArray[np.uint8]:
        """Return the bytes of pages of DATA."""
        at = (pfn - DATA_PFN + _DATA_AT) * PAGE_SIZE
        assert pfn + count <= DATA_PFN + DATA_PAGES, "only DATA is used for what has to be answered"
        return self._bytes[at : at + count * PAGE_SIZE]

    def drop_low(self, page: int, count: int) -> None:
        """Take pages of LOW out of the file, as a front end may at any time."""
        libc.punch_hole(self.fd, page * PAGE_SIZE, count * PAGE_SIZE)

    def cut(self) -> None:
        """Make the file shorter than its regions; whoever touches the rest now gets a SIGBUS.

        Nothing of it may be touched here any more, either.
        """
        self.lost = True
        os.truncate(self.fd, 0)

    def check(self) -> None:
        """Check every byte that may not have changed.

        Raises:
            Found: one has.
        """
        if self.lost:
            return
        differs = (self._bytes != _pattern()) & ~self._open
        for page in np.flatnonzero(differs.reshape(FILE_PAGES, PAGE_SIZE).any(axis=1)):
            part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            if self._named[page] and not self._bytes[part][~self._open[part]].any():
                continue
            at = int(np.flatnonzero(differs[part])[0])
            how = "in part" if self._named[page] else "and nothing named it"
            raise Found(
                Kind.CONTENT,
                f"page {self._where(int(page))} changed {how}: the byte at {at:#x} is "
                f"{int(self._bytes[part][at]):#x}",
            )

    def _where(self, page: int) -> str:
        for start, at, pages in self._parts:
            if at <= page < at + pages:
                return f"{(start >> PAGE_SHIFT) + page - at:#x}"
        return f"{page} of the file, which is in no region,"
