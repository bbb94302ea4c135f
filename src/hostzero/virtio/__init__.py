# SPDX-License-Identifier: GPL-2.0-only
"""The wire between driver and device: feature bits, split virtqueues, and balloon requests.

Both ends of a virtqueue work on bytes in guest memory and believe nothing that the other one
writes. Only split rings of VERSION_1 are served: no packed ring, no indirect descriptors, no
legacy byte order.
"""

from hostzero.virtio.balloon import (
    ARRAY_PFNS_MAX,
    CMD_ID_DONE,
    CMD_ID_MIN,
    CMD_ID_STOP,
    CONFIG,
    CONFIG_ACTUAL,
    CONFIG_FREE_PAGE_HINT_CMD_ID,
    CONFIG_NUM_PAGES,
    CONFIG_POISON_VAL,
    STAT_ENTRY,
    VIRTIO_BALLOON_PFN_SHIFT,
    VIRTIO_BALLOON_S_NR,
    VIRTIO_ID_BALLOON,
    BalloonConfig,
    StatTag,
    bitmap_bytes,
    bitmap_set_le,
    bitmap_test_le,
    bitmap_to_mask,
    mask_to_bitmap,
    pack_pfns,
    pack_stats,
    unpack_pfns,
    unpack_stats,
)
from hostzero.virtio.chain import BadChain, Chain
from hostzero.virtio.device_queue import DeviceQueue
from hostzero.virtio.driver_queue import DriverQueue
from hostzero.virtio.features import Feature, QueueRole, names, parse_features, queue_roles
from hostzero.virtio.mock import MockDevice, MockGuest, RawDescriptor
from hostzero.virtio.ring_layout import (
    CHAIN_BYTES_MAX,
    QUEUE_SIZE_MAX,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY,
    RingLayout,
    Segment,
    contiguous_bytes,
    need_event,
    ring_bytes,
)
from hostzero.virtio.transport import Status, Transport

__all__ = [
    "ARRAY_PFNS_MAX",
    "CHAIN_BYTES_MAX",
    "CMD_ID_DONE",
    "CMD_ID_MIN",
    "CMD_ID_STOP",
    "CONFIG",
    "CONFIG_ACTUAL",
    "CONFIG_FREE_PAGE_HINT_CMD_ID",
    "CONFIG_NUM_PAGES",
    "CONFIG_POISON_VAL",
    "QUEUE_SIZE_MAX",
    "STAT_ENTRY",
    "VIRTIO_BALLOON_PFN_SHIFT",
    "VIRTIO_BALLOON_S_NR",
    "VIRTIO_ID_BALLOON",
    "VIRTQ_AVAIL_F_NO_INTERRUPT",
    "VIRTQ_DESC_F_INDIRECT",
    "VIRTQ_DESC_F_NEXT",
    "VIRTQ_DESC_F_WRITE",
    "VIRTQ_USED_F_NO_NOTIFY",
    "BadChain",
    "BalloonConfig",
    "Chain",
    "DeviceQueue",
    "DriverQueue",
    "Feature",
    "MockDevice",
    "MockGuest",
    "QueueRole",
    "RawDescriptor",
    "RingLayout",
    "Segment",
    "StatTag",
    "Status",
    "Transport",
    "bitmap_bytes",
    "bitmap_set_le",
    "bitmap_test_le",
    "bitmap_to_mask",
    "contiguous_bytes",
    "mask_to_bitmap",
    "names",
    "need_event",
    "pack_pfns",
    "pack_stats",
    "parse_features",
    "queue_roles",
    "ring_bytes",
    "unpack_pfns",
    "unpack_stats",
]
