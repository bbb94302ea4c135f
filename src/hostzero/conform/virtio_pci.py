# SPDX-License-Identifier: GPL-2.0-only
"""A modern virtio device on PCI as a `Transport` (virtio 1.3, 4.1).

Registers are written and read one by one with the width that 4.1.3.1 asks for. Notifications of
the device are seen when `poll` looks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hostzero.conform.pci_device import PciDevice
from hostzero.conform.pci_interrupts import IsrStatus, Messages
from hostzero.errors import DeviceError, TargetError, VirtioError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.pci import FIRST_MODERN_DEVICE, NO_VECTOR, VENDOR, Common, Group, register_groups
from hostzero.virtio.ring_layout import RingLayout

FEATURE_WORDS: Final = 2
_WORD_MASK: Final = 0xFFFF_FFFF
_GENERATION_TRIES: Final = 10


class VirtioPciTransport:
    """One device, reached through its registers.

    Attributes:
        interrupts: how it tells what happened.
    """

    def __init__(
        self, device: PciDevice, virtio_id: int, memory: GuestMemory, messages: Gpa, queues: int
    ) -> None:
        """Find the registers and arrange for notifications.

        Args:
            device: the PCI function.
            virtio_id: what kind of virtio device it has to be.
            memory: guest memory, which the device can write to.
            messages: guest RAM for MSI-X messages, 4 bytes a queue and 4 more.
            queues: how many queues there may be.

        Raises:
            VirtioError: it is no modern virtio device of that kind.
            DeviceError: it has fewer MSI-X vectors than it says.
        """
        if (device.vendor, device.device) != (VENDOR, FIRST_MODERN_DEVICE + virtio_id):
            raise VirtioError(
                f"the PCI device is {device.vendor:04x}:{device.device:04x}, not "
                f"{VENDOR:04x}:{FIRST_MODERN_DEVICE + virtio_id:04x}"
            )
        groups = register_groups(device.config)
        if missing := [group.name.lower() for group in Group if group not in groups]:
            raise VirtioError(f"the device has no capability for its {', '.join(missing)} registers")
        self._bus = device.bus
        at = {group: device.bar(found.bar) + found.offset for group, found in groups.items()}
        self._common = at[Group.COMMON]
        self._device = at[Group.DEVICE]
        self._notify = at[Group.NOTIFY]
        self._multiplier = groups[Group.NOTIFY].multiplier
        self._doorbells: dict[int, int] = {}
        self._handlers: dict[int, Callable[[], None]] = {}
        events = queues + 1
        self.interrupts: Messages | IsrStatus
        if device.vectors >= events:
            self.interrupts = Messages(device, memory, messages, events)
        else:
            isr = at[Group.ISR]
            self.interrupts = IsrStatus(lambda: self._bus.read(isr, 1))
        self._want_config_changes()

    def close(self) -> None:
        """Let go of guest memory."""
        self.interrupts.close()

    def poll(self) -> None:
        """Run the handlers of what was notified since the last look."""
        for event in self.interrupts.take():
            if handler := self._handlers.get(event):
                handler()

    # ------------------------------------------------------------------ Transport

    def device_features(self) -> int:
        """Return the feature bits that the device offers."""
        features = 0
        for word in range(FEATURE_WORDS):
            self._write(Common.DEVICE_FEATURE_SELECT, 4, word)
            features |= self._read(Common.DEVICE_FEATURE, 4) << 32 * word
        return features

    def set_driver_features(self, features: int) -> None:
        """Write the feature bits that the driver accepts."""
        for word in range(FEATURE_WORDS):
            self._write(Common.DRIVER_FEATURE_SELECT, 4, word)
            self._write(Common.DRIVER_FEATURE, 4, features >> 32 * word & _WORD_MASK)

    def status(self) -> int:
        """Return the device status."""
        return self._read(Common.DEVICE_STATUS, 1)

    def set_status(self, status: int) -> None:
        """Write the device status; 0 resets the device."""
        self._write(Common.DEVICE_STATUS, 1, status)
        if status == 0:
            config = self._handlers.get(0)
            self._handlers = {} if config is None else {0: config}
            self._want_config_changes()

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the configuration space, all from one state of it (2.5.1)."""
        data = b""
        for _ in range(_GENERATION_TRIES):
            before = self._read(Common.CONFIG_GENERATION, 1)
            data = b"".join(
                self._bus.read(self._device + at, width).to_bytes(width, "little")
                for at, width in _accesses(offset, length)
            )
            if self._read(Common.CONFIG_GENERATION, 1) == before:
                return data
        raise TargetError(f"the configuration changed during each of {_GENERATION_TRIES} reads")

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the configuration space."""
        for at, width in _accesses(offset, len(data)):
            value = int.from_bytes(data[at - offset : at - offset + width], "little")
            self._bus.write(self._device + at, width, value)

    def queue_size_max(self, index: int) -> int:
        """Return the most entries that queue `index` takes; 0 if there is no such queue."""
        self._write(Common.QUEUE_SELECT, 2, index)
        return self._read(Common.QUEUE_SIZE, 2)

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        """Write where the ring of a queue lies, and enable it.

        Raises:
            DeviceError: the device has no vector for it.
        """
        self._write(Common.QUEUE_SELECT, 2, index)
        self._write(Common.QUEUE_SIZE, 2, layout.size)
        self._set_vector(Common.QUEUE_MSIX_VECTOR, index + 1)
        for register, address in (
            (Common.QUEUE_DESC, layout.desc),
            (Common.QUEUE_DRIVER, layout.avail),
            (Common.QUEUE_DEVICE, layout.used),
        ):
            # 64 bit fields are written as two halves (4.1.3.1).
            self._write(register, 4, int(address) & _WORD_MASK)
            self._write(register, 4, int(address) >> 32, 4)
        self._handlers[index + 1] = interrupt
        self._write(Common.QUEUE_ENABLE, 2, 1)

    def notify(self, index: int) -> None:
        """Ring the doorbell of a queue."""
        if index not in self._doorbells:
            self._write(Common.QUEUE_SELECT, 2, index)
            place = self._read(Common.QUEUE_NOTIFY_OFF, 2)
            self._doorbells[index] = self._notify + self._multiplier * place
        self._bus.write(self._doorbells[index], 2, index)

    def on_config_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called from `poll` when the configuration has changed."""
        self._handlers[0] = callback

    # ------------------------------------------------------------------ registers

    # A reset takes every vector away.
    def _want_config_changes(self) -> None:
        self._set_vector(Common.CONFIG_MSIX_VECTOR, 0)

    def _set_vector(self, register: Common, event: int) -> None:
        vector = self.interrupts.vector(event)
        self._write(register, 2, vector)
        # 4.1.5.1.2.1: a device that has no room for it answers with NO_VECTOR.
        if vector != NO_VECTOR and self._read(register, 2) == NO_VECTOR:
            raise DeviceError(f"the device has no MSI-X vector {vector}")

    def _read(self, register: Common, width: int) -> int:
        return self._bus.read(self._common + register, width)

    def _write(self, register: Common, width: int, value: int, offset: int = 0) -> None:
        self._bus.write(self._common + register + offset, width, value)


# Fields of the balloon have 32 bits; what is not aligned to that goes byte by byte.
def _accesses(offset: int, length: int) -> list[tuple[int, int]]:
    found = []
    at = offset
    while at < offset + length:
        width = 4 if at % 4 == 0 and offset + length - at >= 4 else 1
        found.append((at, width))
        at += width
    return found
