# SPDX-License-Identifier: GPL-2.0-only
"""What the queues of a balloon device share, and what each of them is for the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hostzero.device.byte_ranges import ByteRanges
from hostzero.device.config_space import ConfigSpace
from hostzero.device.discard import Discarder
from hostzero.device.metrics import BalloonMetrics
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import Feature


@dataclass
class DeviceState:
    """What the device and the handlers of its queues all look at.

    Attributes:
        discarder: guest memory and the discards in it.
        space: the configuration space.
        metrics: the counters.
        acked: what the driver accepted; no bit before FEATURES_OK.
        rings: every byte of every live ring.
    """

    discarder: Discarder
    space: ConfigSpace = field(default_factory=ConfigSpace)
    metrics: BalloonMetrics = field(default_factory=BalloonMetrics)
    acked: Feature = field(default_factory=lambda: Feature(0))
    rings: ByteRanges = field(default_factory=ByteRanges)

    @property
    def poisoned(self) -> bool:
        """Whether the guest expects free pages to hold a value other than zero."""
        return Feature.PAGE_POISON in self.acked and self.space.poison_val != 0


class QueueHandler(Protocol):
    """What the device does with the requests of one queue."""

    def handle(self, chain: Chain) -> int | None:
        """Serve one request and return its used length; None keeps the buffer.

        Raises:
            DeviceError: the request is malformed; it is returned with used length 0, and
                nothing was done.
        """
        ...

    def refused(self) -> None:
        """Take note that a request of this queue could not be read."""
        ...

    def stopped(self) -> None:
        """Forget what would be wrong if the queue next ran for another driver."""
        ...

    def reset(self) -> None:
        """Forget everything that the requests left behind."""
        ...
