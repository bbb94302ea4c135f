# SPDX-License-Identifier: GPL-2.0-only
"""`Machine`: RAM, guest, driver and device, joined in one process.

Nothing here happens by itself: no thread runs, no clock ticks, a kick runs the device
before it returns. The same calls give the same page numbers every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from hostzero.clock import Clock
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.driver import VirtioBalloon
from hostzero.errors import UsageError
from hostzero.mm import MemoryManager, MmConfig, Process
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.ram import GuestMemory, Ram, open_ram
from hostzero.units import PAGE_SHIFT, parse_size
from hostzero.virtio.features import Feature

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(frozen=True)
class MachineStats:
    """What a machine's two sides know about its memory, in bytes."""

    memory: int
    resident: int
    free: int
    balloon: int
    guest_zeroed: int
    known_zero: int
    host_discarded: int
    host_proven_zero: int


class Machine:
    r"""A guest and its host, joined by a virtio balloon.

    >>> from hostzero import Machine
    >>> from hostzero.mm.mmap import MADV_POPULATE_WRITE
    >>> with Machine(memory="128M") as machine, machine.spawn() as process:
    ...     address = process.mmap(4 << 20)
    ...     process.fill(address, 4 << 20, 0xAA)
    ...     process.munmap(address, 4 << 20)
    ...     reported = machine.flush()
    ...     address = process.mmap(4 << 20)
    ...     process.madvise(address, 4 << 20, MADV_POPULATE_WRITE)
    ...     print(process.read(address, 4), machine.stats().known_zero >= 4 << 20)
    b'\x00\x00\x00\x00' True

    Attributes:
        ram: guest memory on the host.
        memory: the same, as guest physical addresses.
        clock: guest time; `machine.clock.advance(2)` lets the reporting delay pass.
        mm: the guest's memory manager.
        driver: the guest's balloon driver.
        device: the host's balloon device.
    """

    def __init__(
        self,
        memory: str | int = "2G",
        *,
        backing: str = "anonymous",
        device: DeviceConfig | None = None,
        features: Feature | None = None,
        mm: MmConfig | None = None,
        ram: Ram | None = None,
    ) -> None:
        """Build a machine and probe its balloon.

        Args:
            memory: guest memory, a multiple of 2 MiB, as bytes or as text such as ``"2G"``.
            backing: what holds it on the host; see `hostzero.ram.BACKINGS`.
            device: how the device is made; none means its defaults.
            features: short for a `device` that offers just these.
            mm: how the guest kernel is built and booted.
            ram: memory to boot on, its contents kept, as at a reboot. `memory` and
                `backing` are its own then, and it stays open when the machine closes.

        Raises:
            UsageError: sizes or options do not fit, or both `device` and `features` are given.
            BackingUnavailable: this host lacks the backing, or enough of it.
            DriverError, NegotiationError: driver and device cannot work together.
        """
        if device is not None and features is not None:
            raise UsageError("give the device or its features, not both: a device has features of its own")
        self._own_ram = ram is None
        size = parse_size(memory) if isinstance(memory, str) else memory
        self.ram = open_ram(size, backing) if ram is None else ram
        try:
            if device is None:
                device = DeviceConfig() if features is None else DeviceConfig(features=features)
            self.memory = GuestMemory.whole(self.ram)
            self.clock = Clock()
            self.mm = MemoryManager(self.ram, mm, self.clock)
            self.device = BalloonDevice(self.memory, device)
            self.driver = VirtioBalloon(self.mm, self.memory, self.device)
            self.driver.probe()
        except BaseException:
            self._give_back()
            raise

    def __enter__(self) -> Self:
        """Return the machine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the memory back to the host."""
        self.close()

    def close(self) -> None:
        """Give the memory back to the host; the machine cannot be used after, but closed again."""
        self.device.reset()
        self._give_back()

    def _give_back(self) -> None:
        if not self._own_ram or self.ram.closed:
            return
        # Guest, driver and device refer to each other, and their arrays keep the mapping until
        # the garbage collector looks; the memory under it need not wait for that.
        self.ram.discard(0, self.ram.size)
        self.ram.close()

    def spawn(self, *, cpu: int = 0) -> Process:
        """Return a new guest process."""
        return self.mm.spawn(cpu=cpu)

    def flush(self, budget: int = UINT_MAX) -> int:
        """Report free memory now; return how many blocks were reported (patch 29)."""
        return self.mm.page_reporting.flush(budget)

    def balloon(self, size: int) -> int:
        """Ask the guest for a balloon of `size` bytes; return the bytes that it holds then."""
        self.device.set_target(size >> PAGE_SHIFT)
        return self.driver.num_pages << PAGE_SHIFT

    def stats(self) -> MachineStats:
        """Return what both sides know now. Residency is asked of the host, without touching."""
        guest = self.mm.vm_stats()
        host = self.device.metrics
        return MachineStats(
            memory=self.ram.size,
            resident=self.ram.resident(),
            free=guest.free_pages << PAGE_SHIFT,
            balloon=guest.balloon_pages << PAGE_SHIFT,
            guest_zeroed=guest.zeroed_bytes,
            known_zero=guest.known_zero_bytes,
            host_discarded=host.discarded_bytes,
            host_proven_zero=host.proven_zero_bytes,
        )
