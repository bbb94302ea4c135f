# SPDX-License-Identifier: GPL-2.0-only
"""The virtio-balloon device as a pure core: no sockets, no threads, no clock.

`BalloonDevice` is what a driver or a vhost-user session talks to. One module per queue holds
what its requests do; `pfn_runs`, `partial_pages`, `byte_ranges` and `inflate_plan` are
arithmetic that touches no memory. The host sees guest memory and nothing of the guest's
structures.
"""

from hostzero.device.balloon_device import BalloonDevice
from hostzero.device.config import DEFAULT_FEATURES, DEFAULT_QUEUE_SIZES, IMPLEMENTED, DeviceConfig
from hostzero.device.hint import HintStatus
from hostzero.device.inflate import REQUEST_PFNS_MAX
from hostzero.device.metrics import DISCARD_SIZE_BOUNDS, BalloonMetrics, QueueMetrics, SkipReason
from hostzero.device.queue_server import LOG_LINES_MAX
from hostzero.device.stats import STATS_ENTRIES_MAX

__all__ = [
    "BalloonDevice",
    "DeviceConfig",
    "BalloonMetrics",
    "QueueMetrics",
    "SkipReason",
    "DISCARD_SIZE_BOUNDS",
    "HintStatus",
    "IMPLEMENTED",
    "DEFAULT_FEATURES",
    "DEFAULT_QUEUE_SIZES",
    "REQUEST_PFNS_MAX",
    "STATS_ENTRIES_MAX",
    "LOG_LINES_MAX",
]
