# SPDX-License-Identifier: GPL-2.0-only
"""A full memory barrier, and single loads and stores of ring fields.

Both ends publish an index and then read what the other end wrote about notifications. If the
read overtakes the store, both may decide that the other one is awake, and the queue hangs
(virtio 1.3, 2.7.13, steps 4 and 6). Between threads of one interpreter the lock of the
interpreter orders this already; across processes on shared memory it does not.
"""

from __future__ import annotations

import sys
import threading

_lock = threading.Lock()
_SWAP = sys.byteorder == "big"


def full_barrier() -> None:
    """Order every earlier load and store before every later one (kernel: `virtio_mb`).

    Python has no fence. Taking and releasing a lock runs two locked read-modify-write
    instructions, and on x86-64 one alone is a full fence; on other machines it is as strong
    as that pair.
    """
    with _lock:
        pass


def load_le16(words: memoryview, index: int) -> int:
    """Return a le16 of a memoryview of format ``H``, in one load.

    One item of a native-format view is one 16-bit load, so the value cannot be torn by a
    writer in another process, as an index assembled from two bytes could be.
    """
    value: int = words[index]
    return _swap16(value) if _SWAP else value


def store_le16(words: memoryview, index: int, value: int) -> None:
    """Store a le16 into a memoryview of format ``H``, in one store."""
    words[index] = _swap16(value) if _SWAP else value


def _swap16(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8
