# SPDX-License-Identifier: GPL-2.0-only
"""Our device core as a target, in this process: what the socket and the ring of a target add is missing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from hostzero.conform.target import Ability
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.device.config import IMPLEMENTED
from hostzero.ram import GuestMemory, MemoryRegion, open_ram
from hostzero.units import Gpa
from hostzero.virtio.balloon import StatTag

LOW_BYTES: Final = 64 << 20
"""Guest RAM from address 0 on; the arena is its upper half."""

HIGH_BYTES: Final = 2 << 20
"""Guest RAM from 4 GiB on, behind the other in the same file, as QEMU has it on a PC."""

HIGH_AT: Final = 4 << 30

MakeDevice = Callable[[GuestMemory], BalloonDevice]


def everything(memory: GuestMemory) -> BalloonDevice:
    """Return a device that offers all that it can."""
    return BalloonDevice(memory, DeviceConfig(IMPLEMENTED))


class InProcessTarget:
    """Devices in this process.

    Attributes:
        name: ``in-process``.
    """

    name = "in-process"

    def __init__(self, make: MakeDevice = everything, backing: str = "memfd") -> None:
        """Make devices by `make`, over guest memory of one of `hostzero.ram.BACKINGS`."""
        self._make = make
        self._backing = backing

    def describe(self) -> Mapping[str, str]:
        """Return the version of hostzero and the backing of guest memory."""
        return {"device": f"hostzero {importlib.metadata.version('hostzero')}", "memory": self._backing}

    def connect(self) -> InProcessConnection:
        """Return a fresh device.

        Raises:
            BackingUnavailable: this machine lacks the backing.
        """
        return InProcessConnection(self._make, self._backing)


class InProcessConnection:
    """One device and its guest memory."""

    missing: Mapping[Ability, str] = {}

    def __init__(self, make: MakeDevice, backing: str) -> None:
        with ExitStack() as stack:
            ram = stack.enter_context(open_ram(LOW_BYTES + HIGH_BYTES, backing))
            self.memory = GuestMemory(
                [
                    MemoryRegion(Gpa(0), ram, 0, LOW_BYTES),
                    MemoryRegion(Gpa(HIGH_AT), ram, LOW_BYTES, HIGH_BYTES),
                ]
            )
            self.transport = make(self.memory)
            self._exit = stack.pop_all()
        self.arena = range(LOW_BYTES // 2, LOW_BYTES)
        self.nowhere = Gpa(HIGH_AT // 2)

    def settle(self, until: Callable[[], bool], timeout: float) -> bool:
        """Look once: the device runs inside the calls to it."""
        return until()

    def alive(self) -> bool:
        """Return True: the device lives and dies with this process."""
        return True

    def set_target(self, pages: int) -> None:
        """Ask for another balloon size."""
        self.transport.set_target(pages)

    def request_stats(self) -> None:
        """Ask for statistics."""
        self.transport.request_stats()

    def stats(self) -> Mapping[StatTag, int]:
        """Return the latest statistics."""
        return self.transport.stats

    def hint_start(self) -> None:
        """Start a run of free page hinting."""
        self.transport.hint_start()

    def hint_stop(self) -> None:
        """Stop it."""
        self.transport.hint_stop()

    def hint_done(self) -> None:
        """End it."""
        self.transport.hint_done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Rings that are set up hold on to guest memory.
        self.transport.reset()
        self._exit.close()
