# SPDX-License-Identifier: GPL-2.0-only
"""A backend without vhost-user for tests of the control socket: a device in this process, in a loop."""

from __future__ import annotations

import selectors
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostzero.device import BalloonDevice
from hostzero.vhost_user.control import ControlServer
from hostzero.vhost_user.control_commands import QueueFacts, SessionFacts
from tests.device.guest import RAM_BYTES


class NoCounters:
    """The vhost-user side of a backend that has none."""

    def as_dict(self) -> dict[str, object]:
        return {"sessions": 1, "errors": {"framing": 0, "memory": 2}}


class FakeService:
    """A device and what a session would say about it."""

    def __init__(self, device: BalloonDevice) -> None:
        self.device = device
        self.metrics = NoCounters()
        self.facts = SessionFacts(
            state="running",
            connected=True,
            peer_pid=4711,
            memory_bytes=RAM_BYTES,
            protocol_features=("mq", "config"),
            queues=(QueueFacts(0, "inflate", 128, "enabled"),),
        )

    def session_facts(self) -> SessionFacts:
        return self.facts


class Loop:
    """The loop of a backend, turned by hand or by a thread."""

    def __init__(self, service: FakeService) -> None:
        self.selector = selectors.DefaultSelector()
        self.server = ControlServer(service, self.selector)
        self.on_turn: Callable[[], None] = lambda: None

    def turn(self) -> int:
        """Serve every event that is there, once each; return how many there were."""
        events = self.selector.select(0)
        for key, mask in events:
            key.data(mask)
        return len(events)

    def settle(self) -> None:
        """Turn until nothing happens any more."""
        while self.turn():
            pass

    def close(self) -> None:
        self.server.close()
        assert not self.selector.get_map(), "something is registered still"
        self.selector.close()

    @contextmanager
    def running(self, path: Path) -> Iterator[None]:
        """Serve `path` in a thread, for tests of blocking clients."""
        self.server.listen(path)
        ending = threading.Event()

        def serve() -> None:
            while not ending.is_set():
                for key, mask in self.selector.select(0.01):
                    key.data(mask)
                self.on_turn()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
