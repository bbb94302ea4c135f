# SPDX-License-Identifier: GPL-2.0-only
"""A device in a process of its own: it copies what it may read to what it may write.

Arguments: the descriptor of the memory, its size, the ring's size, whether the event index is
negotiated (0 or 1), the start index, and the descriptors of two eventfds, kick and call. It
ends when the kick eventfd carries STOP.
"""

from __future__ import annotations

import os
import sys

from hostzero.ram import GuestMemory, Ram
from hostzero.virtio import Chain, DeviceQueue, RingLayout
from tests.virtio.memory import RING

STOP = 1 << 32
"""Added to the kick eventfd to end the device."""


def main(fd: int, nbytes: int, size: int, event_idx: int, start: int, kick: int, call: int) -> None:
    """Serve the queue: sleep whenever nothing is available, wake only when kicked."""
    memory = GuestMemory.whole(Ram.from_fd(fd, 0, nbytes))
    layout = RingLayout.contiguous(memory, size, RING)
    queue = DeviceQueue(
        memory,
        layout,
        event_idx=bool(event_idx),
        interrupt=lambda: os.eventfd_write(call, 1),
        start_index=start,
    )
    while True:
        queue.disable_notifications()
        while (item := queue.pop()) is not None:
            assert isinstance(item, Chain)
            queue.push(item.head, item.write(item.read(64)))
            queue.flush()
        if os.eventfd_read(kick) >= STOP:
            return


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
