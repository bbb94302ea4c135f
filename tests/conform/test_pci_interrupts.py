# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from hostzero.conform.pci_device import PciDevice
from hostzero.conform.pci_interrupts import IsrStatus, Messages
from hostzero.conform.qemu import SLOT
from hostzero.device import BalloonDevice
from hostzero.ram import GuestMemory, open_ram
from hostzero.units import Gpa
from hostzero.virtio.pci import NO_VECTOR
from tests.conform.stand_in_pci import StandInPci


def test_each_message_is_taken_once_and_several_are_one() -> None:
    with open_ram(2 << 20) as ram:
        memory = GuestMemory.whole(ram)
        bus = StandInPci(memory, BalloonDevice(memory))
        messages = Messages(PciDevice(bus, SLOT), memory, Gpa(0x1000), 6)
        assert [messages.vector(event) for event in range(6)] == list(range(6))
        assert list(messages.take()) == []
        for vector in (0, 3, 3, 5):
            bus._message(vector)
        assert list(messages.take()) == [0, 3, 5]
        assert list(messages.take()) == []
        messages.close()


def test_the_isr_status_tells_a_change_of_the_configuration_and_nothing_of_queues() -> None:
    values = iter([0, 1, 2, 3])
    isr = IsrStatus(lambda: next(values))
    assert isr.vector(2) == NO_VECTOR
    assert [list(isr.take()) for _ in range(4)] == [[], [], [0], [0]]
    isr.close()
