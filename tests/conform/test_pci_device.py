# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.conform.pci_device import WINDOW, PciDevice
from hostzero.conform.qemu import SLOT
from hostzero.device import BalloonDevice
from hostzero.errors import VirtioError
from hostzero.ram import GuestMemory, open_ram
from tests.conform import stand_in_pci
from tests.conform.stand_in_pci import BAR, IO_BAR, MSIX_BAR, StandInPci


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with open_ram(2 << 20) as ram:
        yield GuestMemory.whole(ram)


def pci(memory: GuestMemory, vectors: int = 6) -> StandInPci:
    return StandInPci(memory, BalloonDevice(memory), vectors)


def test_memory_bars_are_placed_one_behind_the_other(memory: GuestMemory) -> None:
    bus = pci(memory)
    device = PciDevice(bus, SLOT)
    assert (device.vendor, device.device) == (0x1AF4, 0x1045)
    assert device.bar(MSIX_BAR) == WINDOW
    assert device.bar(BAR) == WINDOW + 0x4000
    assert bus.config[4] == 6  # memory space and bus mastering
    with pytest.raises(VirtioError, match="BAR 0 of the device is no memory BAR"):
        device.bar(IO_BAR)


def test_vectors_write_what_they_are_told_to(memory: GuestMemory) -> None:
    bus = pci(memory, vectors=2)
    device = PciDevice(bus, SLOT)
    assert device.vectors == 2
    device.enable_msix([0x1000, 0x1004], 0x77)
    bus._message(1)
    assert bytes(memory.view(memory.regions[0].gpa, 0x1008)[0x1000:]) == b"\0\0\0\0\x77\0\0\0"


def test_a_device_without_msix(memory: GuestMemory) -> None:
    device = PciDevice(pci(memory, vectors=0), SLOT)
    assert device.vectors == 0
    with pytest.raises(VirtioError, match="no MSI-X"):
        device.enable_msix([0x1000], 1)


def test_an_empty_slot(memory: GuestMemory) -> None:
    with pytest.raises(VirtioError, match="no PCI device in slot 7"):
        PciDevice(pci(memory), 7)


def test_a_bar_that_does_not_fit(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stand_in_pci.SIZES, BAR, 1 << 30)
    with pytest.raises(VirtioError, match="BAR 4 of the device has 0x40000000 bytes"):
        PciDevice(pci(memory), SLOT)
