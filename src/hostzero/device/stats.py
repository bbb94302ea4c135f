# SPDX-License-Identifier: GPL-2.0-only
"""The statistics queue: one buffer that the device holds until the host asks for news.

The driver fills a buffer at its start; the device reads and keeps it. Giving it back is the
request for fresh figures, and the driver answers with the next buffer (virtio 1.3, 5.5.6.3).
What it holds are figures that a guest chose to send.
"""

from __future__ import annotations

from hostzero.device.state import DeviceState
from hostzero.errors import DeviceError
from hostzero.virtio.balloon import STAT_ENTRY, StatTag, unpack_stats
from hostzero.virtio.chain import Chain

STATS_ENTRIES_MAX = 256
"""Entries read from one buffer; further ones are ignored.

Linux 7.2 has 16 tags and sends each once; Firecracker reads at most 256 as well.
"""


class StatsQueue:
    """Serves the statistics queue.

    Attributes:
        latest: the figures of the last buffer by tag; a tag sent twice has its last value.
    """

    def __init__(self, state: DeviceState) -> None:
        """Start without figures."""
        self.latest: dict[StatTag, int] = {}
        self._state = state
        self._held: int | None = None

    def handle(self, chain: Chain) -> int | None:
        """Read one buffer and keep it.

        Unknown tags and a last entry that is cut short are ignored.

        Raises:
            DeviceError: the buffer is empty or device-writable, or another one is held already:
                the driver owes one buffer for each that it got back.
        """
        if chain.writable or not chain.readable:
            raise DeviceError("a statistics buffer is device-readable and not empty")
        if self._held is not None:
            raise DeviceError("a second statistics buffer came while one is held")
        entries = unpack_stats(chain.read(STATS_ENTRIES_MAX * STAT_ENTRY.size))
        self.latest = {StatTag(tag): value for tag, value in entries if tag in _KNOWN_TAGS}
        self._held = chain.head
        self._state.metrics.stats_updates += 1
        return None

    def take_held(self) -> int | None:
        """Return the head of the held buffer, which is held no more; None if there is none."""
        head, self._held = self._held, None
        return head

    def refused(self) -> None:
        """Do nothing: the last figures stay."""

    def stopped(self) -> None:
        """Forget the held buffer, which goes back into the ring; the figures stay."""
        self._held = None

    def reset(self) -> None:
        """Forget the held buffer, which went with its queue, and the figures of the old driver."""
        self._held = None
        self.latest = {}


_KNOWN_TAGS = frozenset(StatTag)
