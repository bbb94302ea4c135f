# SPDX-License-Identifier: GPL-2.0-only
"""What a front end has said about one ring, and the descriptors that go with it.

::

               SET_VRING_KICK and SET_VRING_ENABLE 1, in either order
        STOPPED ------------------------------------------------------> RUNNING
           ^                                                               |
           +---- SET_VRING_ENABLE 0, GET_VRING_BASE, RESET_* , close ------+

A ring that runs is one that the device knows; one that does not is only numbers here. So a
stopped ring is never served, and one that runs again goes on at `base`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from hostzero.errors import MessageError, RingError
from hostzero.vhost_user.connection import Fd
from hostzero.vhost_user.eventfds import is_eventfd, notify, take
from hostzero.vhost_user.memory_table import MappedTable
from hostzero.vhost_user.payloads import VringAddr
from hostzero.vhost_user.protocol import ErrorKind
from hostzero.virtio.features import QueueRole
from hostzero.virtio.ring_layout import RingLayout

__all__ = ["Vring", "eventfd"]


@dataclass
class Vring:
    """One ring of a session.

    Attributes:
        index: its number.
        size: its entries (SET_VRING_NUM).
        base: the index of its next available entry while it is stopped (SET_VRING_BASE).
        addr: where it lies, in the front end's space (SET_VRING_ADDR).
        enabled: SET_VRING_ENABLE.
        running: whether the device serves it.
        role: what it carries, while it runs.
        kick: what the driver's notifications arrive on.
        call: what the device's notifications go out on.
        err: what a broken ring is told on.
        scheduled: whether a turn of serving it waits in the loop; there is never a second one.
        idle_kicks: notifications in a row that found nothing to do.
        resting: whether its notifications are not listened to for a moment.
        signalled: whether the present `call` was used.
        broken: whether the device has given the ring up.
    """

    index: int
    size: int = 0
    base: int = 0
    addr: VringAddr | None = None
    enabled: bool = False
    running: bool = False
    role: QueueRole | None = None
    kick: Fd | None = None
    call: Fd | None = None
    err: Fd | None = None
    scheduled: bool = False
    idle_kicks: int = 0
    resting: bool = False
    signalled: bool = False
    broken: bool = False

    def layout(self, table: MappedTable | None) -> RingLayout:
        """Return where the ring lies in guest memory.

        Raises:
            MessageError: its size, its addresses or the memory table are not there yet, or it
                cannot lie there.
        """
        if table is None or self.addr is None or not self.size:
            missing = "SET_MEM_TABLE" if table is None else "SET_VRING_NUM" if self.addr else "SET_VRING_ADDR"
            raise MessageError(ErrorKind.ORDER, f"queue {self.index} cannot start before {missing}")
        desc, avail, used = (table.to_gpa(at) for at in (self.addr.desc, self.addr.avail, self.addr.used))
        try:
            return RingLayout.validated(table.memory, self.size, desc, avail, used)
        except RingError as error:
            raise MessageError(ErrorKind.RING, f"queue {self.index}: {error}") from error

    def interrupt(self) -> bool:
        """Notify the driver; return whether there is a descriptor for it."""
        self.signalled = True
        if self.call is None:
            return False
        notify(self.call.fileno())
        return True

    def report_broken(self) -> None:
        """Tell the front end that the ring was given up."""
        if self.err is not None:
            notify(self.err.fileno())

    def take_kick(self) -> None:
        """Take note of notifications, all that have come."""
        if self.kick is not None:
            take(self.kick.fileno())

    def drop_kick(self) -> None:
        """Close the kick; it is watched by nobody."""
        if self.kick is not None:
            self.kick.close()
            self.kick = None

    def close(self) -> None:
        """Close its descriptors."""
        for fd in (self.kick, self.call, self.err):
            if fd is not None:
                fd.close()
        self.kick = self.call = self.err = None


def eventfd(fds: list[Fd]) -> Fd:
    """Take an eventfd out of the list of a message, and make it non-blocking.

    Any other kind of descriptor could block a read for ever, or take our eight bytes where they
    do harm.

    Raises:
        MessageError: it is none, and stays in the list.
    """
    if not is_eventfd(fds[0].fileno()):
        raise MessageError(ErrorKind.DESCRIPTORS, "the descriptor is no eventfd")
    os.set_blocking(fds[0].fileno(), False)
    return fds.pop(0)
