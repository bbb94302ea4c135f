# SPDX-License-Identifier: GPL-2.0-only
"""A backend that is turned by hand: a session over a socket pair, in the test's own thread.

It does what the server does, one event after the other and without waiting, so that a test is
repeatable and a thousand sessions take seconds.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.errors import ConnectionLost
from hostzero.ram import GuestMemory
from hostzero.vhost_user.connection import Connection, TooManyDescriptors
from hostzero.vhost_user.metrics import ServiceMetrics
from hostzero.vhost_user.server import device_config
from hostzero.vhost_user.session import Session
from hostzero.virtio.features import Feature
from tests.device.guest import ALL_FEATURES
from tests.vhost_user.front_end import FrontEnd, Memory

TURNS_MAX = 10_000
"""Turns after which a test has hung."""


class HandLoop:
    """A loop whose turns are taken by `Backend.pump`."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}
        self.due: list[Callable[[], None]] = []
        self.resting: list[Callable[[], None]] = []

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def soon(self, callback: Callable[[], None]) -> None:
        self.due.append(callback)

    def later(self, callback: Callable[[], None]) -> None:
        self.resting.append(callback)

    def turn(self) -> bool:
        """Do what is due now; return whether anything was."""
        ready, _, _ = select.select(list(self.watched), [], [], 0)
        due, self.due = self.due, []
        callbacks = [self.watched[fd] for fd in ready] + due
        for callback in callbacks:
            callback()
        return bool(callbacks)

    def rest(self) -> None:
        """Let the rests be over."""
        resting, self.resting = self.resting, []
        for callback in resting:
            callback()


class Backend:
    """A device and one session with it."""

    def __init__(self, config: DeviceConfig | None = None, device: BalloonDevice | None = None) -> None:
        self.device = BalloonDevice(GuestMemory([]), config or all_config()) if device is None else device
        self.metrics = ServiceMetrics()
        self.loop = HandLoop()
        self.session = Session(self.device, self.loop, self.metrics)
        self.ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.connection = Connection(theirs)
        self.lost = ""

    def pump(self) -> None:
        """Do everything that can be done without waiting."""
        for _ in range(TURNS_MAX):
            if not (self._messages() | self.loop.turn()):
                return
        raise AssertionError("the backend does not come to rest")

    def _messages(self) -> bool:
        if self.lost:
            return False
        try:
            try:
                message = self.connection.receive()
            except TooManyDescriptors as error:
                request, reply = error.header.request, self.session.refuse(error.header, error)
            else:
                if message is None:
                    return False
                request, reply = message.header.request, self.session.handle(message)
            if reply is not None:
                self.connection.reply(request, reply)
        except ConnectionLost as error:
            self.lost = str(error)
            self.close()
        return True

    def close(self) -> None:
        self.session.close()
        self.connection.close()


def all_config() -> DeviceConfig:
    """A device that offers everything that it has."""
    return device_config(ALL_FEATURES)


class Pair(FrontEnd):
    """A front end with its backend in the same thread."""

    def __init__(self, memory: Memory, backend: Backend) -> None:
        super().__init__(backend.ours, memory, backend.pump)
        self.backend = backend
        self.device = backend.device
        self.session = backend.session
        self.metrics = backend.metrics

    def close(self) -> None:
        super().close()
        self.backend.close()


@contextmanager
def pair(features: Feature | None = None, config: DeviceConfig | None = None) -> Iterator[Pair]:
    """A front end over fresh guest memory; with a driver that runs, if `features` says which."""
    memory = Memory()
    front_end = Pair(memory, Backend(config))
    try:
        memory.fill()
        if features is not None:
            front_end.start(features)
        yield front_end
    finally:
        front_end.close()
        memory.close()


def open_fds() -> dict[int, str]:
    """What this process has open now, by descriptor."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:
            continue  # the descriptor of this very listing
    return found


def null_fd() -> int:
    """A descriptor that is nothing that anybody asks for."""
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
