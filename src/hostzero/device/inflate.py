# SPDX-License-Identifier: GPL-2.0-only
"""The inflate and deflate queues: PFN arrays in, and for bit 7 a bitmap of zero pages out.

A request carries its PFNs in the readable part. With DEVICE_INIT_ON_INFLATE negotiated a
writable part takes the bitmap: bit n of it answers the n-th PFN of this request (patch 36 of
the series). The whole bitmap is written, clear bits too, since the driver's buffer may hold
anything, and it is written after the last discard. The used length is the number of bitmap
bytes written even if no bit is set; it is 0 when there is no bitmap.
"""

from __future__ import annotations

import struct

import numpy as np

from hostzero.device.byte_ranges import ByteRanges, overlap_each_other
from hostzero.device.inflate_plan import SkippedPages, plain_discards, plan_inflate
from hostzero.device.metrics import QueueMetrics, SkipReason
from hostzero.device.partial_pages import PartialPages
from hostzero.device.pfn_runs import Mask, PfnRun, SortedPfns, join_runs, sort_pfns, zero_bitmap
from hostzero.device.state import DeviceState
from hostzero.errors import DeviceError
from hostzero.units import PAGE_SHIFT
from hostzero.virtio.balloon import bitmap_bytes, unpack_pfns
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import Feature
from hostzero.virtio.ring_layout import Segment

REQUEST_PFNS_MAX = 4096
"""PFNs in one request; a longer one is malformed.

Linux, FreeBSD, nanos and OSv send at most 256, virtio-win at most 1024 (one 4 KiB page of
le32). Four times the most of them leaves room for drivers unknown here and keeps what one
request makes the device do, and the bitmap of 512 bytes, small.
"""

_PFN_BYTES = 4


class InflateQueue:
    """Serves the inflate queue."""

    def __init__(self, state: DeviceState, partial: PartialPages) -> None:
        """Share `partial`, the sub-pages of large host pages in the balloon, with deflate."""
        self._state = state
        self._partial = partial

    def handle(self, chain: Chain) -> int:
        """Drop the pages of one request and return the bytes of bitmap written.

        Raises:
            DeviceError: the request has no PFN array or a bad one, or its bitmap buffer
                overlaps a live ring or itself; nothing was dropped or written.
        """
        state = self._state
        metrics = state.metrics.inflate
        count = _count_pfns(chain)
        data = chain.read(count * _PFN_BYTES)
        bitmap_at = self._bitmap_buffer(chain, count)
        metrics.pfns += count
        if not bitmap_at:
            numbers = struct.unpack(f"<{count}I", data)
            runs = plain_discards(numbers, state.discarder.spans, state.rings)
            if runs is not None:
                self._discard(runs, metrics)
                return 0
        request = sort_pfns(unpack_pfns(data))
        writes = state.rings | ByteRanges(bitmap_at) if bitmap_at else state.rings
        plan = plan_inflate(request.unique, state.discarder.spans, writes, self._remembered())
        _count_skipped(plan.skipped, metrics)
        proven = self._discard(plan.discards, metrics)
        if not bitmap_at:
            return 0
        return self._write_bitmap(chain, request, plan.zero_mask(proven), metrics)

    def refused(self) -> None:
        """Do nothing: pages of an unread request were not dropped, which harms nobody."""

    def stopped(self) -> None:
        """Forget all sub-pages: the next driver may own them."""
        self._partial.clear()

    def reset(self) -> None:
        """Take every page out of the balloon."""
        self._partial.clear()

    # Without MUST_TELL_HOST the driver may use pages of earlier requests again before it says so
    # (virtio 1.3, 5.5.6): then only what this one request names is known to be in the balloon.
    def _remembered(self) -> PartialPages:
        return self._partial if Feature.MUST_TELL_HOST in self._state.acked else PartialPages()

    # The bytes that will take the bitmap: as many as it has, or as fit. None: no bitmap.
    def _bitmap_buffer(self, chain: Chain, count: int) -> list[Segment]:
        if Feature.DEVICE_INIT_ON_INFLATE not in self._state.acked or self._state.poisoned:
            return []
        left = bitmap_bytes(count)
        segments = []
        for gpa, length in chain.writable:
            if left <= 0:
                break
            segments.append(Segment(gpa, min(length, left)))
            left -= length
        if any(self._state.rings.overlaps(gpa, length) for gpa, length in segments):
            raise DeviceError("the bitmap buffer overlaps a ring in use")
        if overlap_each_other(segments):
            # What was written through one segment would be read back through the other.
            raise DeviceError("the segments of the bitmap buffer overlap")
        return segments

    def _discard(self, runs: list[PfnRun], metrics: QueueMetrics) -> list[PfnRun]:
        metrics.runs += len(runs)
        discard = self._state.discarder.discard
        return [run for run in runs if discard(run.first << PAGE_SHIFT, run.pages << PAGE_SHIFT, metrics)]

    def _write_bitmap(self, chain: Chain, request: SortedPfns, zero: Mask, metrics: QueueMetrics) -> int:
        written = chain.write(zero_bitmap(request, zero)[: chain.writable_len])
        # Only bits that were written are claims; a buffer that is too short has fewer.
        answered = request.position[: written * 8]
        claimed = answered[zero[answered]]
        metrics.claims += claimed.size
        metrics.claimed_zero_bytes += int(np.count_nonzero(np.bincount(claimed))) << PAGE_SHIFT
        return written


class DeflateQueue:
    """Serves the deflate queue: the pages come back by themselves when the guest touches them."""

    def __init__(self, state: DeviceState, partial: PartialPages) -> None:
        """Share `partial`, the sub-pages of large host pages in the balloon, with inflate."""
        self._state = state
        self._partial = partial

    def handle(self, chain: Chain) -> int:
        """Take the pages of one request out of the balloon; the used length is 0.

        Raises:
            DeviceError: the request has no PFN array or a bad one.
        """
        self._state.metrics.deflate.pfns += _count_pfns(chain)
        if len(self._partial):
            unique = sort_pfns(unpack_pfns(chain.read(chain.readable_len))).unique
            for span in self._state.discarder.spans:
                for run in join_runs(unique[span.indices(unique)]):
                    self._partial.remove(span, run)
        return 0

    def refused(self) -> None:
        """Forget all sub-pages: nobody knows which of them the guest has taken back."""
        self._partial.clear()

    def stopped(self) -> None:
        """Forget all sub-pages: the next driver may own them."""
        self._partial.clear()

    def reset(self) -> None:
        """Take every page out of the balloon."""
        self._partial.clear()


def _count_pfns(chain: Chain) -> int:
    length = chain.readable_len
    if not length:
        raise DeviceError("the request has no device-readable PFN array")
    if length % _PFN_BYTES:
        raise DeviceError(f"a PFN array of {length} bytes is not a whole number of 4-byte PFNs")
    if length > REQUEST_PFNS_MAX * _PFN_BYTES:
        raise DeviceError(f"{length // _PFN_BYTES} PFNs in one request are above {REQUEST_PFNS_MAX}")
    return length // _PFN_BYTES


def _count_skipped(skipped: SkippedPages, metrics: QueueMetrics) -> None:
    metrics.skip(SkipReason.OUTSIDE_RAM, skipped.outside_ram << PAGE_SHIFT)
    metrics.skip(SkipReason.DEVICE_WRITES, skipped.device_writes << PAGE_SHIFT)
    metrics.skip(SkipReason.PARTIAL_HOST_PAGE, skipped.partial_host_page << PAGE_SHIFT)
