# SPDX-License-Identifier: GPL-2.0-only
"""A backend without vhost-user for tests of the control socket: a device in this process, in a loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hostzero.device import BalloonDevice
from hostzero.vhost_user.control import ControlServer
from tests.device.guest import RAM_BYTES

T = TypeVar("T")


class NoCounters:
    """The vhost-user side of a backend that has none."""

    def as_dict(self) -> dict[str, object]:
        return {"sessions": 1, "errors": {"framing": 0, "memory": 2}}


class FakeService:
    """A device and what a session would say about it."""

    def __init__(self, device: BalloonDevice) -> None:
        self.device = device
        self.metrics = NoCounters()
        self.session: dict[str, object] | None = {
            "pid": 4711,
            "peer": "qemu 4711",
            "state": "running",
            "memory_bytes": RAM_BYTES,
            "allocated_bytes": 4096,
            "queues": [
                {"index": 0, "role": "inflate", "size": 128, "running": True, "broken": False},
            ],
        }

    def session_status(self) -> Mapping[str, object] | None:
        return self.session


class Loop:
    """The loop of a backend, turned by hand or by a thread."""

    TURNS = 100
    """More turns than anything here needs before it waits for the outside."""

    def __init__(self, service: FakeService) -> None:
        self.asyncio = asyncio.new_event_loop()
        self.server = ControlServer(service)
        self.on_turn: Callable[[], None] = lambda: None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something to its end."""
        return self.asyncio.run_until_complete(coroutine)

    def listen(self, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        self.run(self.server.listen(listener))

    def turn(self) -> None:
        """Serve every event that is there, once each."""
        self.asyncio.call_soon(self.asyncio.stop)
        self.asyncio.run_forever()

    def settle(self) -> None:
        """Turn until nothing happens any more."""
        for _ in range(self.TURNS):
            self.turn()

    def close(self) -> None:
        self.run(self.server.close())
        self.settle()
        assert not asyncio.all_tasks(self.asyncio), "something goes on still"
        self.asyncio.close()

    @contextmanager
    def running(self, path: Path) -> Iterator[None]:
        """Serve `path` in a thread, for tests of blocking clients."""
        self.listen(path)
        ending = threading.Event()

        async def serve() -> None:
            while not ending.is_set():
                self.on_turn()
                await asyncio.sleep(0.001)

        thread = threading.Thread(target=self.run, args=(serve(),))
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
