# SPDX-License-Identifier: GPL-2.0-only
"""Discards of guest memory: the one place where evidence of zero comes from.

A range counts as zero only because `GuestMemory.discard` said that all of it is. An
inhibited, unaligned, failed or half-done discard is no evidence at all.
"""

from __future__ import annotations

import logging
from collections import Counter

from hostzero.device.byte_ranges import ByteRanges
from hostzero.device.geometry import RamSpan, ram_spans, span_at
from hostzero.device.metrics import QueueMetrics, SkipReason
from hostzero.errors import DeviceError, HostzeroError
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SHIFT, Gpa
from hostzero.virtio.ring_layout import Segment

_log = logging.getLogger(__name__)


class Discarder:
    """Guest memory as the device drops it.

    Attributes:
        memory: guest memory.
        spans: where RAM lies in it, and on which host pages.
    """

    def __init__(self, memory: GuestMemory) -> None:
        """Allow discards in `memory`."""
        self.memory = memory
        self.spans: tuple[RamSpan, ...] = ram_spans(memory)
        self._reasons: Counter[str] = Counter()
        self._failure_logged = False

    @property
    def inhibited(self) -> bool:
        """Whether any reason forbids discards."""
        return bool(self._reasons)

    def inhibit(self, reason: str) -> None:
        """Forbid discards until this reason is taken back as often as it was given."""
        self._reasons[reason] += 1

    def allow(self, reason: str) -> None:
        """Take one `inhibit` back; discards happen again when no reason is left.

        Raises:
            DeviceError: this reason does not forbid anything.
        """
        if not self._reasons[reason]:
            del self._reasons[reason]
            raise DeviceError(f"discards are not inhibited by {reason!r}")
        self._reasons[reason] -= 1
        if not self._reasons[reason]:
            del self._reasons[reason]

    def use(self, memory: GuestMemory) -> None:
        """Go over to another guest memory; the reasons stay."""
        self.memory = memory
        self.spans = ram_spans(memory)

    def discard(self, gpa: int, length: int, metrics: QueueMetrics) -> bool:
        """Drop whole host pages and return whether all of them are proven to read as zero."""
        if self.inhibited:
            metrics.skip(SkipReason.INHIBITED, length)
            return False
        metrics.discard(length)
        try:
            proven = self.memory.discard(Gpa(gpa), length)
        except (HostzeroError, OSError) as error:
            proven = False
            self._log_failure(gpa, length, str(error))
        if proven:
            metrics.proven_zero_bytes += length
        else:
            metrics.discard_failed += 1
            self._log_failure(gpa, length, "not proven to be zero")
        return proven

    def discard_segment(self, segment: Segment, rings: ByteRanges, metrics: QueueMetrics) -> bool:
        """Drop one reported or hinted range; return whether all of it is proven to read as zero.

        The range has to consist of whole host pages in one region of RAM (QEMU checks the same:
        madvise rounds a length up, and half a page would take the other half with it), and no
        byte of a live ring may be in it: the device writes there when it returns the buffer.
        """
        gpa, length = segment
        span = span_at(self.spans, gpa >> PAGE_SHIFT)
        if span is None or gpa + length > span.end << PAGE_SHIFT:
            reason = SkipReason.OUTSIDE_RAM
        elif not _whole_host_pages(span, gpa, length):
            reason = SkipReason.UNALIGNED
        elif rings.overlaps(gpa, length):
            reason = SkipReason.DEVICE_WRITES
        else:
            return self.discard(gpa, length, metrics)
        metrics.skip(reason, length)
        return False

    # A backing that fails fails for every request, and a guest decides how many there are: one
    # line says it, the metrics count the rest.
    def _log_failure(self, gpa: int, length: int, why: str) -> None:
        if not self._failure_logged:
            self._failure_logged = True
            _log.warning("discard of %d bytes at %#x: %s; more of these are only counted", length, gpa, why)


def _whole_host_pages(span: RamSpan, gpa: int, length: int) -> bool:
    host_bytes = span.sub_pages << PAGE_SHIFT
    start = gpa - (span.phase << PAGE_SHIFT)
    return length > 0 and start % host_bytes == 0 and length % host_bytes == 0
