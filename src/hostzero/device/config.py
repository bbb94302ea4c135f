# SPDX-License-Identifier: GPL-2.0-only
"""What a balloon device offers: features, queue sizes, and the one choice about hinted pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from hostzero.errors import UsageError
from hostzero.virtio.features import Feature, QueueRole, names
from hostzero.virtio.ring_layout import QUEUE_SIZE_MAX

IMPLEMENTED: Final = (
    Feature.MUST_TELL_HOST
    | Feature.STATS_VQ
    | Feature.DEFLATE_ON_OOM
    | Feature.FREE_PAGE_HINT
    | Feature.PAGE_POISON
    | Feature.REPORTING
    | Feature.DEVICE_INIT_REPORTED
    | Feature.DEVICE_INIT_ON_INFLATE
    | Feature.RING_EVENT_IDX
    | Feature.VERSION_1
)
"""Every feature that the device keeps. Others are refused: a device that offers what it does not
do is worse than one that does not offer it (one VMM offers PAGE_POISON and discards regardless)."""

DEFAULT_FEATURES: Final = IMPLEMENTED & ~(Feature.MUST_TELL_HOST | Feature.PAGE_POISON)
"""As QEMU offers with everything switched on, and bits 6 and 7. Add MUST_TELL_HOST for RAM on
large host pages: without it the device may not remember sub-pages from one request to the next."""

DEFAULT_QUEUE_SIZES: Final[Mapping[QueueRole, int]] = {
    QueueRole.INFLATE: 128,
    QueueRole.DEFLATE: 128,
    QueueRole.STATS: 128,
    QueueRole.FREE_PAGE: 1024,
    QueueRole.REPORTING: 32,
}
"""The sizes of QEMU (virtio-balloon.c). Linux reports at most 32 pages in one batch."""


@dataclass(frozen=True)
class DeviceConfig:
    """What the device is made of; nothing of it changes while the device exists.

    Attributes:
        features: what is offered. VERSION_1 is offered always, named or not: the legacy
            interface, with its guest-endian fields, is not served.
        queue_sizes: the most entries of each queue, a power of two; roles left out have the
            default.
        discard_hints: discard the pages of free page hinting. Off, and dangerous: Linux may take
            hinted pages back under memory pressure without telling the device, and a discard
            that comes later destroys what was written to them since. It never leads to a claim.

    Raises:
        UsageError: a feature is not implemented or needs one that is not offered (virtio 1.3,
            2.2.1), or a queue size is not a power of two up to 32768.
    """

    features: Feature = DEFAULT_FEATURES
    queue_sizes: Mapping[QueueRole, int] = field(default_factory=dict)
    discard_hints: bool = False

    def __post_init__(self) -> None:
        """Check what was given."""
        unknown = int(self.features) & ~int(IMPLEMENTED)
        if unknown:
            raise UsageError(f"the device does not implement {', '.join(names(unknown))}")
        if Feature.DEVICE_INIT_REPORTED in self.features and Feature.REPORTING not in self.features:
            raise UsageError("device-init-reported is about reported pages: offer reporting too")
        for role, size in self.queue_sizes.items():
            if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
                raise UsageError(
                    f"the {role.value} queue cannot have {size} entries: "
                    f"take a power of two up to {QUEUE_SIZE_MAX}"
                )

    @property
    def offered(self) -> Feature:
        """The features as the driver reads them."""
        return self.features | Feature.VERSION_1

    def queue_size(self, role: QueueRole) -> int:
        """Return the most entries that a queue may have."""
        return self.queue_sizes.get(role, DEFAULT_QUEUE_SIZES[role])
