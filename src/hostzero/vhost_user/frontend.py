# SPDX-License-Identifier: GPL-2.0-only
"""hostzero as a vhost-user front end: a device behind a socket as a `Transport`.

The front end owns guest memory, one or more regions over a file that the backend maps, and plays
what QEMU plays for a guest: the device status lives here, and reaches the backend as messages.

==============================  ================================================================
what the driver does            what the backend hears
==============================  ================================================================
FEATURES_OK                     SET_FEATURES; if it is refused, FEATURES_OK reads as clear
DRIVER_OK                       SET_MEM_TABLE; for each queue NUM, BASE, ADDR, KICK, CALL, ERR;
                                then ENABLE
notify                          the kick eventfd
reads and writes configuration  GET_CONFIG, SET_CONFIG
status 0                        ENABLE 0 and GET_VRING_BASE for each queue; RESET_DEVICE
==============================  ================================================================

Notifications of the backend are taken in `wait`, and while a reply is waited for. A ring that
the backend gives up (the ERR eventfd) reads as DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from hostzero.errors import DeviceError, VhostUserError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.vhost_user.eventfds import notify, take
from hostzero.vhost_user.frontend_session import FrontEndSession
from hostzero.vhost_user.payloads import U64, Config, MemTable, Region, VringAddr, VringFd, VringState
from hostzero.vhost_user.protocol import F_PROTOCOL_FEATURES, ProtocolFeature, Request
from hostzero.virtio.ring_layout import RingLayout
from hostzero.virtio.transport import Status

QUEUE_SIZE_MAX: Final = 128
"""The entries that every queue has at most; over vhost-user the front end decides. QEMU's default."""

NOTIFICATIONS_MAX: Final = 1 << 16
"""Notifications taken at once: a backend may write any number into the counter."""

USER_BASE: Final = 0x7F00_0000_0000
"""Guest memory in this front end's address space, as the backend is told: an offset, so that a
backend which takes one space for the other does not work by accident."""

NO_FEATURE_OF_A_DRIVER: Final = F_PROTOCOL_FEATURES | 1 << 26
"""Bits between front end and backend: PROTOCOL_FEATURES, and LOG_ALL for migration."""


@dataclass
class _Queue:
    index: int
    layout: RingLayout
    interrupt: Callable[[], None]
    kick: int
    call: int
    err: int


class VhostUserTransport:
    """A device behind a vhost-user socket.

    Attributes:
        session: the requests to it.
        memory: guest memory, over files with descriptors.
    """

    def __init__(self, session: FrontEndSession, memory: GuestMemory) -> None:
        """Use a session that has greeted the backend; closing this closes it.

        Raises:
            VhostUserError: a region of guest memory has no file to be shared.
        """
        if any(region.ram.fileno is None for region in memory.regions):
            raise VhostUserError("guest memory without a file cannot be shared: use memfd or hugetlb")
        self.session = session
        self.memory = memory
        self._status = Status(0)
        self._features = 0
        self._queues: dict[int, _Queue] = {}
        self._broken = False
        self._running = False

    @classmethod
    def connect(cls, path: str, memory: GuestMemory, timeout: float, clock: Callable[[], float]) -> Self:
        """Connect to the backend that listens at `path`; each reply may take `timeout` seconds of `clock`.

        Raises:
            OSError: nobody listens there.
            VhostUserError, TimeoutError: as `FrontEndSession.greet`.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        session = FrontEndSession(sock, timeout, clock)
        try:
            session.greet()
            return cls(session, memory)
        except BaseException:
            session.close()
            raise

    # ------------------------------------------------------------------ the driver's calls

    def device_features(self) -> int:
        """Return the feature bits that the backend offers a driver."""
        return self.session.number(Request.GET_FEATURES) & ~NO_FEATURE_OF_A_DRIVER

    def set_driver_features(self, features: int) -> None:
        """Take the feature bits that the driver accepts; they are sent with FEATURES_OK."""
        self._features = features

    def status(self) -> int:
        """Return the device status; FEATURES_OK is clear if the backend refused the features."""
        self.wait(0)
        return int(self._status | (Status.NEEDS_RESET if self._broken else 0))

    def set_status(self, status: int) -> None:
        """Write the device status; 0 stops the rings.

        Raises:
            DeviceError: the backend refuses a part of what DRIVER_OK needs.
            ConnectionLost, TimeoutError: it went away or does not answer.
        """
        wanted = Status(status)
        if not wanted:
            self._reset()
            return
        added = wanted & ~self._status
        if Status.FEATURES_OK in added:
            try:
                self.session.tell(Request.SET_FEATURES, U64(self._features | F_PROTOCOL_FEATURES))
            except DeviceError:
                wanted &= ~Status.FEATURES_OK
        if Status.DRIVER_OK in added:
            self._run()
        self._status = wanted

    def read_config(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the configuration space.

        Raises:
            DeviceError: the backend refuses (a reply with fewer bytes).
        """
        reply = self.session.ask(Request.GET_CONFIG, Config(offset, 0, bytes(length)))
        assert isinstance(reply, Config)
        if len(reply.data) != length:
            raise DeviceError(f"the backend refuses {length} bytes of configuration space at {offset}")
        return reply.data

    def write_config(self, offset: int, data: bytes) -> None:
        """Write `data` to the configuration space.

        Raises:
            DeviceError: the backend refuses.
        """
        self.session.tell(Request.SET_CONFIG, Config(offset, 0, data))

    def queue_size_max(self, index: int) -> int:
        """Return `QUEUE_SIZE_MAX` for each queue that the backend has."""
        return QUEUE_SIZE_MAX if 0 <= index < self.session.queues else 0

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        """Note the ring of a queue; DRIVER_OK hands it to the backend.

        Raises:
            DeviceError: there is no such queue, or it is set up already.
        """
        if index in self._queues or not self.queue_size_max(index):
            raise DeviceError(f"queue {index} is set up already, or the backend has no such queue")
        kick, call, err = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3))
        self._queues[index] = _Queue(index, layout, interrupt, kick, call, err)

    def notify(self, index: int) -> None:
        """Write to the kick eventfd."""
        notify(self._queues[index].kick)

    def on_config_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called for each CONFIG_CHANGE_MSG."""
        self.session.config_changes = callback

    # ------------------------------------------------------------------ what the backend says

    def wait(self, timeout: float) -> bool:
        """Take notifications, waiting up to `timeout` seconds for the first; return whether one came.

        Raises:
            ConnectionLost: the backend went away.
        """
        calls = {queue.call: queue for queue in self._queues.values()}
        errors = {queue.err for queue in self._queues.values()}
        waiting = [*calls, *errors, *self.session.filenos()]
        readable, _, _ = select.select(waiting, [], [], timeout)
        for fd in readable:
            if fd in calls:
                # Each write of the backend is one notification; several may stand in the counter.
                for _ in range(min(take(fd), NOTIFICATIONS_MAX)):
                    calls[fd].interrupt()
            elif fd in errors and take(fd):
                self._broken = True
        self.session.serve(readable)
        return bool(readable)

    def close(self) -> None:
        """Close the session and every eventfd; a second call does nothing."""
        self._drop_queues()
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _run(self) -> None:
        tell = self.session.tell
        regions = [
            Region(region.gpa, region.size, USER_BASE + region.gpa, region.offset)
            for region in self.memory.regions
        ]
        tell(Request.SET_MEM_TABLE, MemTable(tuple(regions)), fds=self._files())
        self._running = True
        for queue in self._queues.values():
            index, layout = queue.index, queue.layout
            user = VringAddr(
                index, 0, USER_BASE + layout.desc, USER_BASE + layout.used, USER_BASE + layout.avail
            )
            tell(Request.SET_VRING_NUM, VringState(index, layout.size))
            tell(Request.SET_VRING_BASE, VringState(index, self._used_index(layout)))
            tell(Request.SET_VRING_ADDR, user)
            tell(Request.SET_VRING_ERR, VringFd(index), fds=[queue.err])
            tell(Request.SET_VRING_CALL, VringFd(index), fds=[queue.call])
            tell(Request.SET_VRING_KICK, VringFd(index), fds=[queue.kick])
        for index in self._queues:
            tell(Request.SET_VRING_ENABLE, VringState(index, 1))

    def _reset(self) -> None:
        if self._running:
            for index in self._queues:
                self.session.tell(Request.SET_VRING_ENABLE, VringState(index, 0))
            for index in self._queues:
                self.session.ask(Request.GET_VRING_BASE, VringState(index, 0))
        if ProtocolFeature.RESET_DEVICE in self.session.protocol:
            self.session.tell(Request.RESET_DEVICE)
        self._drop_queues()
        self._running = self._broken = False
        self._features = 0
        self._status = Status(0)

    def _drop_queues(self) -> None:
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            for fd in (queue.kick, queue.call, queue.err):
                os.close(fd)

    def _files(self) -> list[int]:
        files = [region.ram.fileno for region in self.memory.regions]
        return [fd for fd in files if fd is not None]

    # A ring starts where both indices stand: 0 for every driver, unless it is resumed.
    def _used_index(self, layout: RingLayout) -> int:
        return int.from_bytes(self.memory.read(Gpa(layout.used + 2), 2), "little")
