# SPDX-License-Identifier: GPL-2.0-only
"""How a wrong device is made of a right one: one method, or the answer of one queue, is another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hostzero.conform.in_process import InProcessConnection, InProcessTarget
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.device.config import IMPLEMENTED
from hostzero.device.queue_server import QueueServer
from hostzero.device.state import QueueHandler
from hostzero.errors import TargetError
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.virtio.balloon import unpack_pfns
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import QueueRole
from hostzero.virtio.ring_layout import RingLayout

Make = Callable[[GuestMemory], BalloonDevice]


class WrongDevice(BalloonDevice):
    """A device with everything right, to be spoilt; it can die, and act of its own accord."""

    dead = False

    def __init__(self, memory: GuestMemory, config: DeviceConfig | None = None) -> None:
        super().__init__(memory, config or DeviceConfig(IMPLEMENTED))
        self.memory = memory

    def notify(self, index: int) -> None:
        super().notify(index)
        self.check_alive()

    def check_alive(self) -> None:
        if self.dead:
            raise TargetError("connection reset by peer")

    def poll(self) -> None:
        """Do what a device does while nobody calls it."""

    def server(self, role: QueueRole) -> QueueServer:
        return next(server for server in self._queues.values() if server.role is role)

    def layout(self, role: QueueRole) -> RingLayout:
        return self.server(role).queue.layout

    def zap(self, pfn: int, pages: int = 1) -> None:
        """Drop pages that are RAM, asked or not."""
        for page in range(pfn, pfn + pages):
            if self.memory.contains(Gpa(page << PAGE_SHIFT), PAGE_SIZE):
                self.memory.discard(Gpa(page << PAGE_SHIFT), PAGE_SIZE)

    def any_length(self, role: QueueRole, head: int) -> None:
        """Let a head be returned with any used length."""
        popped = self.server(role).queue._popped
        popped[head] = popped[head]._replace(writable_len=1 << 32)


Answer = Callable[[WrongDevice, QueueHandler, Chain], int | None]
"""What a wrong device answers to a request: the used length, or None to keep it."""


class _Handler:
    def __init__(self, device: WrongDevice, role: QueueRole, inner: QueueHandler, answer: Answer) -> None:
        self.device = device
        self.role = role
        self.inner = inner
        self.answer = answer

    def handle(self, chain: Chain) -> int | None:
        used_len = self.answer(self.device, self.inner, chain)
        if used_len is not None:
            self.device.any_length(self.role, chain.head)
        return used_len

    def refused(self) -> None:
        self.inner.refused()

    def stopped(self) -> None:
        self.inner.stopped()

    def reset(self) -> None:
        self.inner.reset()


def answering(*roles: QueueRole) -> Callable[[Answer], Make]:
    """Make a device that answers requests of some queues by the decorated function."""

    def decorate(answer: Answer) -> Make:
        def make(memory: GuestMemory) -> BalloonDevice:
            device = WrongDevice(memory)
            for role in roles:
                device._handlers[role] = _Handler(device, role, device._handlers[role], answer)
            return device

        return make

    return decorate


def patched(**methods: Any) -> Make:
    """Make a device some of whose methods are others."""

    def make(memory: GuestMemory) -> BalloonDevice:
        return type("Patched", (WrongDevice,), methods)(memory)  # type: ignore[no-any-return]

    return make


def configured(**values: Any) -> Make:
    """Make a right device that was configured wrongly."""

    def make(memory: GuestMemory) -> BalloonDevice:
        return WrongDevice(memory, replace(DeviceConfig(IMPLEMENTED), **values))

    return make


def pfns_of(chain: Chain) -> list[int]:
    """The PFNs of a request."""
    data = chain.read(1 << 22)
    return [int(pfn) for pfn in unpack_pfns(data[: len(data) & ~3])]


class WrongConnection(InProcessConnection):
    def settle(self, until: Callable[[], bool], timeout: float) -> bool:
        device = self.transport
        if isinstance(device, WrongDevice):
            device.poll()
        return until()

    def alive(self) -> bool:
        return not getattr(self.transport, "dead", False)


class WrongTarget(InProcessTarget):
    """A target of wrong devices; with `huge`, on host pages of 2 MiB."""

    def __init__(self, make: Make, *, huge: bool = False) -> None:
        super().__init__(make)
        self.huge = huge

    def connect(self) -> InProcessConnection:
        def make(memory: GuestMemory) -> BalloonDevice:
            if self.huge:
                # A discard is rounded inward to this, as on hugetlb.
                for region in memory.regions:
                    region.ram.page_size = PMD_SIZE
            return self._make(memory)

        return WrongConnection(make, self._backing)
