# SPDX-License-Identifier: GPL-2.0-only
"""One balloon device that serves one guest after another, in an asyncio loop.

A front end that disconnects leaves the device as new: its queues, its features and what it
wrote are gone, while the target and the counters stay. The next front end may then connect;
one that connects while another is served is sent away at once.

Everything here runs in one thread, so whoever shares the loop (a control socket, an endpoint for
metrics) may call `Service.device` directly. No callback takes long: a queue is served a few
requests at a time, a socket is read a few messages at a time, and in between the loop looks
after everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from hostzero.device import DEFAULT_FEATURES, BalloonDevice, DeviceConfig
from hostzero.errors import ConnectionLost
from hostzero.ram import GuestMemory
from hostzero.vhost_user.connection import CLOSED, Connection, Peer, TooManyDescriptors
from hostzero.vhost_user.metrics import ServiceMetrics
from hostzero.vhost_user.protocol import ErrorKind
from hostzero.vhost_user.session import Session
from hostzero.virtio.features import Feature, QueueRole

_log = logging.getLogger(__name__)

QUEUE_SIZE_MAX: Final = 1024
"""Entries of any queue (QEMU's `VIRTQUEUE_MAX_SIZE`): the front end chooses one size for all."""
MESSAGES_PER_TURN: Final = 16
"""Messages that are handled before everybody else has a turn."""
REST_SECONDS: Final = 0.01
"""How long a queue is left alone whose driver notifies for nothing."""

Extra = Callable[["Service"], Awaitable[None]]
"""Something that runs beside the device in its loop until it is cancelled."""


def device_config(features: Feature = DEFAULT_FEATURES, *, discard_hints: bool = False) -> DeviceConfig:
    """Return what a device over vhost-user offers: any queue may be as large as QEMU makes them."""
    sizes = dict.fromkeys(QueueRole, QUEUE_SIZE_MAX)
    return DeviceConfig(features=features, queue_sizes=sizes, discard_hints=discard_hints)


class Service:
    """A device and the front ends that come to it.

    Attributes:
        device: the balloon device; its target and its counters outlive the sessions.
        metrics: the counters of the vhost-user side.
        session: the session that is served; None while nobody is connected.
        peer: who it is with; None while nobody is connected.
    """

    def __init__(self, config: DeviceConfig | None = None) -> None:
        """Make a device without memory that nobody is connected to."""
        self.device = BalloonDevice(GuestMemory([]), device_config() if config is None else config)
        self.metrics = ServiceMetrics()
        self.session: Session | None = None
        self.peer: Peer | None = None
        self._peer_name = ""
        self._connection: Connection | None = None
        self._gone = asyncio.Event()

    @property
    def label(self) -> str:
        """What to call the present guest in a log line."""
        return "no guest" if self.peer is None else f"guest of {self._peer_name}"

    def session_status(self) -> dict[str, object] | None:
        """Return what is known about the front end and its guest, as plain values with text keys.

        None while nobody is connected.
        """
        session, peer = self.session, self.peer
        if session is None or peer is None:
            return None
        table = session.rings.table
        return {
            "number": self.metrics.sessions,
            "pid": peer.pid,
            "peer": self._peer_name,
            "state": session.state.value,
            "protocol_features": [bit.name for bit in session.acked_protocol],
            "memory_bytes": 0 if table is None else table.size,
            "allocated_bytes": 0 if table is None else table.allocated(),
            "queues": [
                {
                    "index": vring.index,
                    "role": role.value if (role := self.device.queue_role(vring.index)) else None,
                    "size": vring.size,
                    "enabled": vring.enabled,
                    "running": vring.running,
                    "broken": vring.broken,
                }
                for vring in session.rings.vrings
            ],
        }

    async def serve(self, listener: socket.socket, extras: Sequence[Extra] = ()) -> None:
        """Accept front ends on a listening socket, one at a time, until cancelled.

        Args:
            listener: the socket, which is taken over.
            extras: what else runs in the loop meanwhile.
        """
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(listener, self._accept, listener)
        try:
            await self._beside(extras, asyncio.Event())
        finally:
            loop.remove_reader(listener)
            listener.close()
            self._end_session()

    async def serve_connection(self, sock: socket.socket, extras: Sequence[Extra] = ()) -> None:
        """Serve one front end over a connected socket, which is taken over, until it is gone."""
        self._gone = asyncio.Event()
        self._begin_session(sock)
        try:
            await self._beside(extras, self._gone)
        finally:
            self._end_session()

    async def _beside(self, extras: Sequence[Extra], until: asyncio.Event) -> None:
        tasks = [asyncio.ensure_future(extra(self)) for extra in extras]
        waiter = asyncio.ensure_future(until.wait())
        try:
            done, _ = await asyncio.wait({waiter, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            while waiter not in done and all(task.exception() is None for task in done):
                pending = {task for task in (waiter, *tasks) if not task.done()}
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (waiter, *tasks):
                task.cancel()
            await asyncio.gather(waiter, *tasks, return_exceptions=True)

    # ------------------------------------------------------------------ sessions

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("cannot accept a front end: %s", error)
            return
        if self.session is not None:
            self.metrics.refused_connections += 1
            _log.warning("%s is sent away: %s is served", describe(Peer.of(sock)), self.label)
            sock.close()
            return
        self._begin_session(sock)

    def _begin_session(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.metrics.sessions += 1
        self.peer = Peer.of(sock)
        self._peer_name = describe(self.peer)
        self.session = Session(self.device, _AsyncioLoop(), self.metrics)
        self._connection = Connection(sock)
        asyncio.get_running_loop().add_reader(sock, self._readable)
        _log.info("session %d begins with %s", self.metrics.sessions, self._peer_name)

    def _end_session(self) -> None:
        session, self.session = self.session, None
        connection, self._connection = self._connection, None
        if session is None or connection is None:
            return
        asyncio.get_running_loop().remove_reader(connection.sock)
        session.close()
        connection.close()
        _log.info("session %d ends", self.metrics.sessions)
        self.peer = None
        self._gone.set()

    def _readable(self) -> None:
        connection, session = self._connection, self.session
        if connection is None or session is None:
            return
        try:
            for _ in range(MESSAGES_PER_TURN):
                try:
                    message = connection.receive()
                except TooManyDescriptors as error:
                    request, reply = error.header.request, session.refuse(error.header, error)
                else:
                    if message is None:
                        return
                    request, reply = message.header.request, session.handle(message)
                if reply is not None:
                    # Whoever waits for a reply has sent nothing more. If there is more, the loop comes back.
                    connection.reply(request, reply)
                    return
        except ConnectionLost as error:
            if str(error) != CLOSED:
                self.metrics.errors[ErrorKind.FRAMING] += 1
                _log.warning("the connection is given up: %s", error)
            self._end_session()


class _AsyncioLoop:
    """The running asyncio loop, as a session sees it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._loop.add_reader(fd, callback)

    def unwatch(self, fd: int) -> None:
        self._loop.remove_reader(fd)

    def soon(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback)

    def later(self, callback: Callable[[], None]) -> None:
        self._loop.call_later(REST_SECONDS, callback)


def describe(peer: Peer) -> str:
    """Return a peer's program and process id, as far as /proc tells; all of it is printable.

    A process names itself, with any 15 bytes: they must not end a line of the log, move a
    terminal's cursor or be no text at all.
    """
    name = "pid"
    with contextlib.suppress(OSError):
        name = (
            Path(f"/proc/{peer.pid}/comm")
            .read_bytes()
            .removesuffix(b"\n")
            .decode("ascii", "backslashreplace")
        )
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in name)
    return f"{shown} {peer.pid}"
