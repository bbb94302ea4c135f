# SPDX-License-Identifier: GPL-2.0-only
"""Sets of guest physical bytes: what the device itself is going to write.

A page that holds part of a live ring, or of the buffer that takes this request's bitmap, is
written by the device after the discard. A claim that it is zero would be false by the time the
driver reads it, and a discard would destroy what both ends are working with. So the device
knows these bytes as a set and leaves their pages alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hostzero.device.pfn_runs import Mask, PfnArray
from hostzero.units import PAGE_SHIFT
from hostzero.virtio.ring_layout import RingLayout, Segment, ring_bytes

_INT64_MAX: Final = (1 << 63) - 1


class ByteRanges:
    """An immutable set of bytes, kept as sorted ranges that neither touch nor overlap."""

    def __init__(self, segments: Iterable[tuple[int, int]] = ()) -> None:
        """Take the union of (first byte, length) ranges; lengths of zero add nothing."""
        joined: list[list[int]] = []
        for start, length in sorted(segments):
            if length <= 0:
                continue
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], start + length)
            else:
                joined.append([start, start + length])
        self._first = [start for start, _ in joined]
        self._behind = [end for _, end in joined]
        # Guest space has 64 bits and an int64 has 63. No PFN of 32 bits is near the bytes cut off here.
        self._starts: NDArray[np.int64] = np.array(
            [min(at, _INT64_MAX) for at in self._first], dtype=np.int64
        )
        self._ends: NDArray[np.int64] = np.array([min(at, _INT64_MAX) for at in self._behind], dtype=np.int64)

    def __or__(self, other: ByteRanges) -> ByteRanges:
        """Return the union of two sets."""
        return ByteRanges(self.segments() + other.segments())

    def __bool__(self) -> bool:
        """Whether the set holds any byte."""
        return bool(self._first)

    def segments(self) -> list[tuple[int, int]]:
        """Return the (first byte, length) ranges in ascending order."""
        return [(start, end - start) for start, end in zip(self._first, self._behind, strict=True)]

    def overlaps(self, start: int, length: int) -> bool:
        """Return whether any of `length` bytes from `start` is in the set."""
        if length <= 0:
            return False
        # The last range that begins before the end is the only one that can reach in furthest,
        # because the ranges are disjoint and sorted.
        index = bisect_left(self._first, start + length) - 1
        return index >= 0 and self._behind[index] > start

    def pages_mask(self, pfns: PfnArray) -> Mask:
        """Return for each PFN whether the page holds a byte of the set; shape of `pfns`."""
        if not self._starts.size:
            return np.zeros(pfns.shape, dtype=np.bool_)
        starts = pfns << PAGE_SHIFT
        index = np.searchsorted(self._starts, starts + (1 << PAGE_SHIFT), side="left") - 1
        reaches: Mask = self._ends[np.maximum(index, 0)] > starts
        return (index >= 0) & reaches


def overlap_each_other(segments: Iterable[tuple[int, int]]) -> bool:
    """Return whether two of the (first byte, length) ranges share a byte."""
    behind = -1
    for start, length in sorted(segment for segment in segments if segment[1] > 0):
        if start < behind:
            return True
        behind = start + length
    return False


def ring_segments(layout: RingLayout) -> list[Segment]:
    """Return the three parts of a ring (virtio 1.3, 2.7), the event indices included."""
    desc_bytes, avail_bytes, used_bytes = ring_bytes(layout.size)
    return [
        Segment(layout.desc, desc_bytes),
        Segment(layout.avail, avail_bytes),
        Segment(layout.used, used_bytes),
    ]
