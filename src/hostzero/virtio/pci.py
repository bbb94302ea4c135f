# SPDX-License-Identifier: GPL-2.0-only
"""Where a modern virtio device has its registers on PCI (virtio 1.3, 4.1.4).

Vendor specific capabilities in the configuration space name a BAR, an offset and a length for
each group of registers. Everything is little endian.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final, NamedTuple

VENDOR: Final = 0x1AF4
"""PCI vendor of every virtio device."""

FIRST_MODERN_DEVICE: Final = 0x1040
"""PCI device id of a modern device is this and the virtio device id (virtio 1.3, 4.1.2)."""

CONFIG_BYTES: Final = 256
"""The conventional configuration space of a PCI function."""

BARS: Final = 6

CAPABILITY_POINTER: Final = 0x34
CAP_ID_VENDOR: Final = 0x09
CAP_ID_MSIX: Final = 0x11

NO_VECTOR: Final = 0xFFFF
"""`VIRTIO_MSI_NO_VECTOR`: an event has no MSI-X vector."""

ISR_CONFIG: Final = 2
"""Bit of the ISR status: the configuration has changed."""

_CAPABILITY_BYTES: Final = 16


class Group(enum.IntEnum):
    """`cfg_type` of `struct virtio_pci_cap`: what kind of registers a capability names."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4


class Common(enum.IntEnum):
    """Offsets in `struct virtio_pci_common_cfg` (virtio 1.3, 4.1.4.3)."""

    DEVICE_FEATURE_SELECT = 0
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_MSIX_VECTOR = 16
    NUM_QUEUES = 18
    DEVICE_STATUS = 20
    CONFIG_GENERATION = 21
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_MSIX_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC = 32
    QUEUE_DRIVER = 40
    QUEUE_DEVICE = 48


class Registers(NamedTuple):
    """Where one group of registers lies.

    Attributes:
        bar: the number of the BAR.
        offset: where the group starts in it, in bytes.
        length: its bytes.
        multiplier: `notify_off_multiplier` of the notify group, else 0.
    """

    bar: int
    offset: int
    length: int
    multiplier: int


def capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """Yield id and offset of each capability of a configuration space.

    A list that runs off the space or that has no end stops there.
    """
    at = config[CAPABILITY_POINTER] & ~3
    for _ in range(len(config) // 4):
        if at == 0 or at + 4 > len(config):
            return
        yield config[at], at
        at = config[at + 1] & ~3


def register_groups(config: bytes) -> dict[Group, Registers]:
    """Return where each group of registers lies; of several of a kind the first counts (4.1.4.1)."""
    groups: dict[Group, Registers] = {}
    for kind, at in capabilities(config):
        cap = config[at : at + _CAPABILITY_BYTES + 4]
        if kind != CAP_ID_VENDOR or len(cap) < _CAPABILITY_BYTES or cap[3] not in list(Group):
            continue
        if cap[4] >= BARS:
            continue  # reserved, and such a capability is to be ignored
        offset, length, multiplier = (int.from_bytes(cap[n : n + 4], "little") for n in (8, 12, 16))
        group = Group(cap[3])
        groups.setdefault(
            group, Registers(cap[4], offset, length, multiplier if group is Group.NOTIFY else 0)
        )
    return groups
