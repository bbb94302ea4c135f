# SPDX-License-Identifier: GPL-2.0-only
"""The reporting queue: free pages as device-writable buffers, dropped in place.

The used length is a claim only with DEVICE_INIT_REPORTED (bit 6) negotiated: the buffer's
length if all of it is proven to read as zero, else 0. Never anything between: QEMU adds up the
segments that it dropped, and a sum does not say which of them are zero. Without the bit it is
0 whatever was dropped, because used lengths of reported buffers have meant nothing so far.
"""

from __future__ import annotations

from hostzero.device.metrics import SkipReason
from hostzero.device.state import DeviceState
from hostzero.errors import DeviceError
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import Feature

_USED_LEN_MAX = 0xFFFF_FFFF


class ReportingQueue:
    """Serves the reporting queue."""

    def __init__(self, state: DeviceState) -> None:
        """Drop what is reported in the memory of `state`."""
        self._state = state

    def handle(self, chain: Chain) -> int:
        """Drop one reported buffer and return its used length: its length in bytes, or 0.

        Raises:
            DeviceError: the buffer is empty or partly device-readable; nothing was dropped.
        """
        state = self._state
        metrics = state.metrics.reporting
        if chain.readable:
            raise DeviceError("a reported buffer has a device-readable part")
        length = chain.writable_len
        if not length:
            raise DeviceError("a reported buffer is empty")
        if state.poisoned:
            # As QEMU does: the guest wants its pattern back, which a dropped page does not hold.
            metrics.skip(SkipReason.POISON, length)
            return 0
        # Every segment that can be dropped is, even if another one cannot be claimed.
        proven = [
            state.discarder.discard_segment(segment, state.rings, metrics) for segment in chain.writable
        ]
        # Exactly 4 GiB is a legal chain (virtio 1.3, 2.7.5.2) whose length no used entry holds.
        if not all(proven) or not self._may_claim() or length > _USED_LEN_MAX:
            return 0
        metrics.claims += 1
        metrics.claimed_zero_bytes += length
        return length

    def refused(self) -> None:
        """Do nothing: an unread report was not dropped, which harms nobody."""

    def stopped(self) -> None:
        """Do nothing, as for `reset`."""

    def reset(self) -> None:
        """Do nothing: reports leave nothing behind."""

    # Bit 6 means this only together with REPORTING, without which this queue does not exist.
    def _may_claim(self) -> bool:
        return Feature.DEVICE_INIT_REPORTED in self._state.acked
