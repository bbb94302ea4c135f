# SPDX-License-Identifier: GPL-2.0-only
"""Eventfds that a peer shares: written and read without ever waiting for it.

O_NONBLOCK belongs to the open file, so the peer may make one that is full or empty blocking at any
time. A read says by itself that it does not wait, where the kernel knows that for eventfds (Linux
5.8). A write cannot, so whether it would wait is asked first; the peer would have to fill the counter
between the two.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from pathlib import Path
from typing import Final

_COUNTER: Final = 8
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor is an eventfd; True where /proc cannot say."""
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("anon_inode:[eventfd")
    return True


def notify(fd: int) -> None:
    """Add one to the counter; one that is full holds 2^64 - 2 notifications already."""
    with contextlib.suppress(BlockingIOError):
        if _ready(fd, select.POLLOUT):
            os.eventfd_write(fd, 1)


def take(fd: int) -> int:
    """Empty the counter and return what was in it."""
    counter = bytearray(_COUNTER)
    try:
        os.preadv(fd, [counter], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return _take_if_ready(fd)
    return int.from_bytes(counter, sys.byteorder)


# As `take`, on a kernel that cannot read without waiting.
def _take_if_ready(fd: int) -> int:
    with contextlib.suppress(BlockingIOError):
        if _ready(fd, select.POLLIN):
            return os.eventfd_read(fd)
    return 0


def _ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(0))
