# SPDX-License-Identifier: GPL-2.0-only
"""What the device counts, so that its claims can be checked against what it did.

Counters only grow, over resets too; a reader takes differences. They are plain integers that
the device alone writes. `BalloonMetrics.as_dict` is the form for a file or a socket:
one mapping per queue under the queue's name, and the counters of the whole device beside them.

============================  ====================================================================
counter of a queue            counts
============================  ====================================================================
``requests``                  buffers taken from the queue, malformed ones included
``malformed``                 buffers returned with used length 0 because they broke a rule
``interrupts``                used buffer notifications that were sent
``pfns``                      PFNs that inflate or deflate requests named, duplicates included
``runs``                      runs into which the PFNs of inflate requests were joined for discards
``discard_calls``             ranges given to the backing to discard
``discard_failed``            those of them that the backing failed or did not prove
``discarded_bytes``           bytes of all discard calls
``discard_sizes``             the discard calls by length: how many had at most the bytes of each
                              bound in `DISCARD_SIZE_BOUNDS` and more than the one before; the last
                              number is of those above all bounds
``proven_zero_bytes``         bytes of the calls that proved their whole range to read as zero
``claims``                    zero claims sent: bits set in a bitmap, or reported buffers answered
                              by their length
``claimed_zero_bytes``        bytes that these claims cover, each page of a request once
``skipped_bytes``             bytes that were named and not discarded, by reason (`SkipReason`)
============================  ====================================================================

``claimed_zero_bytes`` is never above ``proven_zero_bytes`` on a queue: what was not proven is
not claimed. It is below where bit 6 or 7 is not negotiated, where a page of the balloon was
already counted to an earlier request, or where another segment of the buffer failed.

============================  ====================================================================
counter of the device         counts
============================  ====================================================================
``config_changes``            configuration change notifications that were sent
``resets``                    resets by the driver or the host
``refused_negotiations``      attempts to set FEATURES_OK that the device turned down
``orphan_init_reported``      drivers that took bit 6 without REPORTING: most likely a driver that
                              means HINT_WAIT_ON_ACK by that bit
``broken_queues``             queues given up until the next reset, their ring being inconsistent
``stats_updates``             statistics buffers that were read
``hinted_bytes``              bytes of free page hints that belonged to a running hint
============================  ====================================================================
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Final

from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import QueueRole

DISCARD_SIZE_BOUNDS: Final = tuple(PAGE_SIZE << 3 * step for step in range(7))
"""Lengths in bytes, 4 KiB to 1 GiB in steps of eight, so that the three page sizes of x86-64 are
bounds: at 4 KiB a discard is a page by itself, from 2 MiB on it gives whole huge pages back."""


class SkipReason(enum.StrEnum):
    """Why bytes that the driver named were not discarded."""

    OUTSIDE_RAM = "outside-ram"
    """No guest RAM is there."""
    DEVICE_WRITES = "device-writes"
    """The page holds part of a live ring, or of the bitmap of this request."""
    PARTIAL_HOST_PAGE = "partial-host-page"
    """Only part of the large host page is in the balloon."""
    UNALIGNED = "unaligned"
    """A reported or hinted range is not made of whole host pages."""
    INHIBITED = "inhibited"
    """The host forbade discards (`BalloonDevice.inhibit_discard`)."""
    POISON = "poison"
    """The guest expects reported pages to hold a poison value, which a discard would not leave."""


@dataclass
class QueueMetrics:
    """The counters of one queue; see the table in the module's docstring."""

    requests: int = 0
    malformed: int = 0
    interrupts: int = 0
    pfns: int = 0
    runs: int = 0
    discard_calls: int = 0
    discard_failed: int = 0
    discarded_bytes: int = 0
    discard_sizes: list[int] = field(default_factory=lambda: [0] * (len(DISCARD_SIZE_BOUNDS) + 1))
    proven_zero_bytes: int = 0
    claims: int = 0
    claimed_zero_bytes: int = 0
    skipped_bytes: dict[SkipReason, int] = field(default_factory=lambda: dict.fromkeys(SkipReason, 0))

    def skip(self, reason: SkipReason, length: int) -> None:
        """Count bytes that were named and not discarded."""
        self.skipped_bytes[reason] += length

    def discard(self, length: int) -> None:
        """Count one discard call of `length` bytes, whatever becomes of it."""
        self.discard_calls += 1
        self.discarded_bytes += length
        self.discard_sizes[bisect_left(DISCARD_SIZE_BOUNDS, length)] += 1

    def as_dict(self) -> dict[str, object]:
        """Return the counters under their names, the skip reasons under theirs."""
        return asdict(self) | {
            "skipped_bytes": {str(reason): length for reason, length in self.skipped_bytes.items()}
        }


@dataclass
class BalloonMetrics:
    """The counters of the device; see the tables in the module's docstring."""

    queues: dict[QueueRole, QueueMetrics] = field(
        default_factory=lambda: {role: QueueMetrics() for role in QueueRole}
    )
    config_changes: int = 0
    resets: int = 0
    refused_negotiations: int = 0
    orphan_init_reported: int = 0
    broken_queues: int = 0
    stats_updates: int = 0
    hinted_bytes: int = 0

    @property
    def inflate(self) -> QueueMetrics:
        """The inflate queue's counters."""
        return self.queues[QueueRole.INFLATE]

    @property
    def deflate(self) -> QueueMetrics:
        """The deflate queue's counters."""
        return self.queues[QueueRole.DEFLATE]

    @property
    def stats(self) -> QueueMetrics:
        """The statistics queue's counters."""
        return self.queues[QueueRole.STATS]

    @property
    def free_page(self) -> QueueMetrics:
        """The free page hint queue's counters."""
        return self.queues[QueueRole.FREE_PAGE]

    @property
    def reporting(self) -> QueueMetrics:
        """The reporting queue's counters."""
        return self.queues[QueueRole.REPORTING]

    @property
    def requests(self) -> int:
        """Buffers taken from any queue."""
        return sum(queue.requests for queue in self.queues.values())

    @property
    def malformed(self) -> int:
        """Buffers of any queue that broke a rule."""
        return sum(queue.malformed for queue in self.queues.values())

    @property
    def discarded_bytes(self) -> int:
        """Bytes of all discard calls, for any queue."""
        return sum(queue.discarded_bytes for queue in self.queues.values())

    @property
    def proven_zero_bytes(self) -> int:
        """Bytes that discards for any queue proved to read as zero."""
        return sum(queue.proven_zero_bytes for queue in self.queues.values())

    @property
    def claimed_zero_bytes(self) -> int:
        """Bytes that the driver was told to be zero, on any queue."""
        return sum(queue.claimed_zero_bytes for queue in self.queues.values())

    def as_dict(self) -> dict[str, object]:
        """Return all counters as plain integers in nested mappings with text keys."""
        queues: dict[str, object] = {role.value: queue.as_dict() for role, queue in self.queues.items()}
        return queues | {
            "config_changes": self.config_changes,
            "resets": self.resets,
            "refused_negotiations": self.refused_negotiations,
            "orphan_init_reported": self.orphan_init_reported,
            "broken_queues": self.broken_queues,
            "stats_updates": self.stats_updates,
            "hinted_bytes": self.hinted_bytes,
        }
