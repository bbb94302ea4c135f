# SPDX-License-Identifier: GPL-2.0-only
"""A PCI function on bus 0, as firmware and a driver set it up: BARs placed, capabilities read.

The configuration space is reached through the two I/O ports of a PC (PCI local bus 3.0, 3.2.2.3.2).
Nothing else has set up the machine, so this chooses the addresses of the BARs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hostzero.conform.qtest import Bus
from hostzero.errors import VirtioError
from hostzero.virtio.pci import BARS, CAP_ID_MSIX, CONFIG_BYTES, capabilities

WINDOW: Final = 0xE000_0000
"""Where BARs are placed: between RAM and the interrupt controllers, on every PC."""

WINDOW_END: Final = 0xFE00_0000

_ADDRESS_PORT: Final = 0xCF8
_DATA_PORT: Final = 0xCFC
_ENABLE: Final = 1 << 31

_COMMAND: Final = 0x04
_MEMORY_SPACE: Final = 1 << 1
_BUS_MASTER: Final = 1 << 2
_FIRST_BAR: Final = 0x10

_MSIX_ENABLE: Final = 1 << 31  # in the 32 bits that also hold id and next pointer
_MSIX_FUNCTION_MASK: Final = 1 << 30
_MSIX_ENTRY: Final = 16


class PciDevice:
    """One function, with its memory BARs placed and bus mastering on.

    Attributes:
        vendor: the vendor id.
        device: the device id.
        config: the configuration space as it was when the function was found.
    """

    def __init__(self, bus: Bus, slot: int) -> None:
        """Set up function 0 in a slot of bus 0.

        Raises:
            VirtioError: nothing is there, or its BARs do not fit.
        """
        self._bus = bus
        self._slot = slot
        self.vendor, self.device = self._ids()
        words = [self._read_config(offset) for offset in range(0, CONFIG_BYTES, 4)]
        self.config = b"".join(word.to_bytes(4, "little") for word in words)
        self._bars = self._place_bars()
        self._msix = next((at for kind, at in capabilities(self.config) if kind == CAP_ID_MSIX), None)

    def _ids(self) -> tuple[int, int]:
        ids = self._read_config(0)
        if ids in {0, 0xFFFF_FFFF}:
            raise VirtioError(f"there is no PCI device in slot {self._slot}")
        return ids & 0xFFFF, ids >> 16

    @property
    def bus(self) -> Bus:
        """How to reach its registers."""
        return self._bus

    def bar(self, number: int) -> int:
        """Return the physical address of a memory BAR.

        Raises:
            VirtioError: there is none of that number.
        """
        if number not in self._bars:
            raise VirtioError(f"BAR {number} of the device is no memory BAR")
        return self._bars[number]

    @property
    def vectors(self) -> int:
        """How many MSI-X vectors it has; 0 without MSI-X."""
        if self._msix is None:
            return 0
        return (int.from_bytes(self.config[self._msix + 2 : self._msix + 4], "little") & 0x7FF) + 1

    def enable_msix(self, addresses: Iterable[int], data: int) -> None:
        """Have vector n write `data` (32 bits) to the n-th address.

        Raises:
            VirtioError: it has no MSI-X.
        """
        if self._msix is None:
            raise VirtioError("the device has no MSI-X")
        place = int.from_bytes(self.config[self._msix + 4 : self._msix + 8], "little")
        table = self.bar(place & 7) + (place & ~7)
        for vector, address in enumerate(addresses):
            entry = table + _MSIX_ENTRY * vector
            self._bus.write(entry, 4, address & 0xFFFF_FFFF)
            self._bus.write(entry + 4, 4, address >> 32)
            self._bus.write(entry + 8, 4, data)
            self._bus.write(entry + 12, 4, 0)
        control = self._read_config(self._msix)
        self._write_config(self._msix, control & ~_MSIX_FUNCTION_MASK | _MSIX_ENABLE)

    def _place_bars(self) -> dict[int, int]:
        free = WINDOW
        placed = {}
        number = 0
        while number < BARS:
            at = _FIRST_BAR + 4 * number
            kind = self._read_config(at) & 0xF
            wide = kind & 7 == 4
            size = self._bar_size(at, wide)
            if size and not kind & 1:
                free += -free % size
                if free + size > WINDOW_END:
                    raise VirtioError(
                        f"BAR {number} of the device has {size:#x} bytes: too many to be placed"
                    )
                self._write_config(at, free)
                placed[number] = free
                free += size
            number += 2 if wide else 1
        command = self._read_config(_COMMAND) & 0xFFFF
        self._write_config(_COMMAND, command | _MEMORY_SPACE | _BUS_MASTER)
        return placed

    # All bits that can be set are the size's; those below are the kind (3.0, 6.2.5.1).
    def _bar_size(self, at: int, wide: bool) -> int:
        self._write_config(at, 0xFFFF_FFFF)
        kept = self._read_config(at) & 0xFFFF_FFF0
        if not wide:
            return -kept & 0xFFFF_FFFF
        self._write_config(at + 4, 0xFFFF_FFFF)
        kept |= self._read_config(at + 4) << 32
        self._write_config(at + 4, 0)
        return -kept & 0xFFFF_FFFF_FFFF_FFFF

    def _read_config(self, offset: int) -> int:
        self._bus.outl(_ADDRESS_PORT, _ENABLE | self._slot << 11 | offset)
        return self._bus.inl(_DATA_PORT)

    def _write_config(self, offset: int, value: int) -> None:
        self._bus.outl(_ADDRESS_PORT, _ENABLE | self._slot << 11 | offset)
        self._bus.outl(_DATA_PORT, value)
