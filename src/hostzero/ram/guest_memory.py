# SPDX-License-Identifier: GPL-2.0-only
"""Guest physical address space: checked access for everything that a guest can name.

Addresses and lengths come out of rings, so any integer may arrive here. Nothing is
added to an address before the address is known to lie inside a region, so nothing
can wrap. A range lies inside one region or it is refused: regions that touch in guest
space need not touch on the host.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_right
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Final, NamedTuple

from hostzero.errors import RangeError
from hostzero.units import PAGE_SIZE, Gpa

if TYPE_CHECKING:
    from hostzero.ram.region import Ram

_log = logging.getLogger(__name__)

_GPA_LIMIT: Final = 1 << 64


class MemoryRegion(NamedTuple):
    """`size` bytes of guest space from `gpa` on, which are `ram` from `offset` on."""

    gpa: Gpa
    ram: Ram
    offset: int
    size: int


class GuestMemory:
    """Disjoint regions of guest space, as a device sees them."""

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        """Check and sort the regions; their RAM stays the caller's to close.

        Raises:
            RangeError: a region is empty, not in whole 4 KiB pages, outside its RAM or
                outside 64-bit guest space, or two regions overlap in guest space or in RAM.
        """
        for region in regions:
            _check_region(region)
        self.regions: tuple[MemoryRegion, ...] = tuple(sorted(regions, key=lambda region: region.gpa))
        for below, above in itertools.pairwise(self.regions):
            if below.gpa + below.size > above.gpa:
                raise RangeError(f"regions at {below.gpa:#x} and {above.gpa:#x} overlap in guest space")
        _check_ram_overlap(self.regions)
        # Parallel to `regions`: a sorted list for bisect, and bounds as plain tuples. The
        # views are not kept: they would hold the memory of a region that is closed.
        self._starts = [int(region.gpa) for region in self.regions]
        self._bounds = [(int(r.gpa), int(r.gpa) + r.size, r.ram, r.offset) for r in self.regions]
        self._failure_logged = False

    @classmethod
    def whole(cls, ram: Ram) -> GuestMemory:
        """Return a guest space that is `ram`, from address 0 on."""
        return cls([MemoryRegion(Gpa(0), ram, 0, ram.size)])

    def contains(self, gpa: Gpa, length: int) -> bool:
        """Whether one region holds the whole range; an empty range still needs its address inside."""
        try:
            self._locate(gpa, length)
        except RangeError:
            return False
        return True

    def view(self, gpa: Gpa, length: int) -> memoryview:
        """Return a range's bytes, writable and not copied.

        A guest that still runs can change the bytes at any time: read each value once.

        Raises:
            RangeError: no single region holds the whole range.
            RamError: the region's RAM is closed.
        """
        ram, offset, size = self._locate(gpa, length)
        return ram.buffer[offset : offset + size]

    def read(self, gpa: Gpa, length: int) -> bytes:
        """Return a copy of a range's bytes; raises as `view`."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: Gpa, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into guest memory; raises as `view`, and then has written nothing."""
        with memoryview(data).cast("B") as source:
            self.view(gpa, source.nbytes)[:] = source

    def page_size(self, gpa: Gpa) -> int:
        """Return the smallest piece that can be discarded at an address, in bytes.

        On RAM with huge pages those pieces start at multiples of the page in the RAM's
        file; a region whose guest addresses are not congruent to that never has a whole
        piece in a guest-aligned huge page, and nothing of it is proven zero.

        Raises:
            RangeError: no region holds the address.
        """
        return self._locate(gpa, 1)[0].page_size

    def discard(self, gpa: Gpa, length: int) -> bool:
        """Give a range back to the host; True only if all of it is proven zero afterwards.

        False can mean: discarded in part, discarded without proof, or not at all.

        Raises:
            RangeError: no single region holds the whole range, or it is empty or not in
                whole 4 KiB pages; no system call was made.
            RamError: the region's RAM is closed.
        """
        ram, offset, size = self._locate(gpa, length)
        proof = ram.discard(offset, size)
        if proof.error is not None and not self._failure_logged:
            # A backing that fails fails each time, and a guest decides how often that is.
            self._failure_logged = True
            _log.warning(
                "discard of %d bytes at %#x failed: %s; more of these are not told", size, gpa, proof.error
            )
        return proof.covers(offset, size)

    def _locate(self, gpa: Gpa, length: int) -> tuple[Ram, int, int]:
        # index() turns a NumPy integer, whose arithmetic could wrap, into an exact one.
        address, size = index(gpa), index(length)
        slot = bisect_right(self._starts, address) - 1
        if slot >= 0:
            start, end, ram, offset = self._bounds[slot]
            if address < end and 0 <= size <= end - address:
                return ram, offset + (address - start), size
        if size < 0:
            raise RangeError(f"range at guest address {address:#x} has the negative length {size}")
        raise RangeError(
            f"range of {size:#x} bytes at guest address {address:#x} is not inside one memory region"
        )


def _check_region(region: MemoryRegion) -> None:
    gpa, ram, offset, size = region
    if size <= 0 or gpa % PAGE_SIZE or offset % PAGE_SIZE or size % PAGE_SIZE:
        raise RangeError(
            f"region of {size:#x} bytes at {gpa:#x} (RAM offset {offset:#x}) is not whole 4 KiB pages"
        )
    if gpa < 0 or gpa > _GPA_LIMIT - size:
        raise RangeError(f"region of {size:#x} bytes at {gpa:#x} leaves the 64-bit guest space")
    if offset < 0 or offset > ram.size - size:
        raise RangeError(
            f"region of {size:#x} bytes at RAM offset {offset:#x} leaves the RAM of {ram.size:#x} bytes"
        )


def _check_ram_overlap(regions: Sequence[MemoryRegion]) -> None:
    # Two guest addresses of one byte would let a discard of one page zero another.
    by_ram = sorted(regions, key=lambda region: (id(region.ram), region.offset))
    for below, above in itertools.pairwise(by_ram):
        if below.ram is above.ram and below.offset + below.size > above.offset:
            raise RangeError(f"regions at {below.gpa:#x} and {above.gpa:#x} share bytes of their RAM")
