# SPDX-License-Identifier: GPL-2.0-only
"""What a driver sees of a virtio device, whatever carries it.

In one process the device itself is the transport; over vhost-user a socket stands between.
Virtio 1.3, 2.1 (status), 2.2 (features), 2.5 (configuration space), 2.6 (virtqueues).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from hostzero.virtio.ring_layout import RingLayout


class Status(enum.IntFlag):
    """The device status field (virtio 1.3, 2.1); writing 0 resets the device."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


@runtime_checkable
class Transport(Protocol):
    """A virtio device as its driver reaches it.

    A call may come back into the driver before it returns: `notify` may run the interrupt of
    that queue, and `set_status` or `notify` may run the configuration callback.
    """

    def device_features(self) -> int:
        """Return the feature bits that the device offers."""
        ...

    def set_driver_features(self, features: int) -> None:
        """Write the feature bits that the driver accepts; FEATURES_OK tells whether they hold."""
        ...

    def status(self) -> int:
        """Return the device status; a bit that the device refused reads as clear."""
        ...

    def set_status(self, status: int) -> None:
        """Write the device status; 0 resets the device, and every queue is gone with it."""
        ...

    def read_config(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the configuration space."""
        ...

    def write_config(self, offset: int, data: bytes) -> None:
        """Write `data` to the configuration space; the device keeps only the writable fields."""
        ...

    def queue_size_max(self, index: int) -> int:
        """Return the most entries that queue `index` takes; 0 if there is no such queue."""
        ...

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        """Give the device the ring of queue `index` and what to call for a used buffer."""
        ...

    def notify(self, index: int) -> None:
        """Tell the device that queue `index` has new available buffers."""
        ...

    def on_config_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the device changes its configuration space."""
        ...
