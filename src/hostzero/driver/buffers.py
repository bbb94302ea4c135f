# SPDX-License-Identifier: GPL-2.0-only
"""The driver's own buffers, one guest page of them (kernel: fields of `struct virtio_balloon`).

The device reads PFNs, statistics and command ids from here and writes the inflate bitmap
here. Every byte that it wrote is copied out once before anything is decided on it, because it
can write again at any time.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hostzero.driver.guest_mm import GuestMm, Pfns
from hostzero.mm.gfp import GFP_KERNEL, GFP_ZERO
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SIZE, Gpa, pfn_to_gpa
from hostzero.virtio.balloon import ARRAY_PFNS_MAX, STAT_ENTRY, VIRTIO_BALLOON_S_NR, bitmap_bytes, pack_pfns
from hostzero.virtio.ring_layout import Segment

_PFNS_AT: Final = 0
_BITMAP_AT: Final = _PFNS_AT + 4 * ARRAY_PFNS_MAX
_STATS_AT: Final = _BITMAP_AT + bitmap_bytes(ARRAY_PFNS_MAX)
_STATS_MAX: Final = STAT_ENTRY.size * VIRTIO_BALLOON_S_NR
_CMD_ID_ACTIVE_AT: Final = _STATS_AT + -(-_STATS_MAX // 4) * 4
_CMD_ID_STOP_AT: Final = _CMD_ID_ACTIVE_AT + 4
_CMD_ID_BYTES: Final = 4

assert _CMD_ID_STOP_AT + _CMD_ID_BYTES <= PAGE_SIZE


class DriverBuffers:
    """One zeroed guest page, divided among the requests of one driver."""

    def __init__(self, mm: GuestMm, memory: GuestMemory) -> None:
        """Allocate the page.

        Raises:
            OutOfMemory: there is none.
        """
        self._mm = mm
        self._memory = memory
        self._pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 0)
        self._base = pfn_to_gpa(self._pfn)

    def free(self) -> None:
        """Give the page back. The device must have been reset."""
        self._mm.free_pages(self._pfn, 0)

    def put_pfns(self, pfns: Pfns) -> Segment:
        """Write the PFN array of one request, at most 256 of them, and return where it lies."""
        assert 0 < len(pfns) <= ARRAY_PFNS_MAX
        return self._put(_PFNS_AT, pack_pfns(pfns))

    def clear_bitmap(self, count: int) -> Segment:
        """Zero the bitmap for `count` PFNs and return where it lies.

        Zeroed each time: a device that returns a length without writing must not have the
        answer to the request before count for this one.
        """
        assert 0 < count <= ARRAY_PFNS_MAX
        return self._put(_BITMAP_AT, bytes(bitmap_bytes(count)))

    def bitmap(self, count: int) -> bytes:
        """Return a copy of the bitmap for `count` PFNs."""
        return self._memory.read(Gpa(self._base + _BITMAP_AT), bitmap_bytes(count))

    def put_stats(self, stats: bytes) -> Segment:
        """Write the statistics entries and return where they lie."""
        assert 0 < len(stats) <= _STATS_MAX
        return self._put(_STATS_AT, stats)

    def put_cmd_id_active(self, cmd_id: int) -> Segment:
        """Write the command id that starts a hinting run and return where it lies."""
        return self._put(_CMD_ID_ACTIVE_AT, cmd_id.to_bytes(_CMD_ID_BYTES, "little"))

    def put_cmd_id_stop(self, cmd_id: int) -> Segment:
        """Write the command id that ends a hinting run and return where it lies."""
        return self._put(_CMD_ID_STOP_AT, cmd_id.to_bytes(_CMD_ID_BYTES, "little"))

    def _put(self, offset: int, data: bytes) -> Segment:
        gpa = Gpa(self._base + offset)
        self._memory.write(gpa, data)
        return Segment(gpa, len(data))


def as_pfns(*pfns: int) -> Pfns:
    """Return page frame numbers as an array of shape (n,)."""
    return np.array(pfns, dtype=np.int64)
