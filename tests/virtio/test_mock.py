# SPDX-License-Identifier: GPL-2.0-only
"""The hand-written ends put their bytes where clause 2.7 says."""

from __future__ import annotations

import pytest

from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio import MockDevice, MockGuest, RawDescriptor, RingLayout

DESC, AVAIL, USED = Gpa(0x100), Gpa(0x202), Gpa(0x304)


@pytest.fixture
def layout(memory: GuestMemory) -> RingLayout:
    return RingLayout.validated(memory, 4, DESC, AVAIL, USED)


def test_a_descriptor_is_16_bytes(memory: GuestMemory, layout: RingLayout) -> None:
    MockGuest(memory, layout).descriptor(2, 0x0102030405060708, 0x11121314, 0x2122, 0x3132)
    assert memory.read(Gpa(DESC + 32), 16) == bytes.fromhex("0807060504030201 14131211 2221 3231")
    expected = RawDescriptor(0x0102030405060708, 0x11121314, 0x2122, 0x3132)
    assert MockDevice(memory, layout).descriptor(2) == expected


def test_values_are_cut_to_their_fields(memory: GuestMemory, layout: RingLayout) -> None:
    guest = MockGuest(memory, layout)
    guest.descriptor(0, -1, -1, -1, -1)
    guest.set_avail_idx(-1)
    assert memory.read(DESC, 16) == b"\xff" * 16
    assert memory.read(AVAIL, 4) == b"\0\0\xff\xff"


def test_the_available_ring(memory: GuestMemory, layout: RingLayout) -> None:
    """flags, idx, four entries, used_event."""
    guest = MockGuest(memory, layout, 65534)
    guest.offer(3, 1, 2)
    guest.set_avail_flags(1)
    guest.set_used_event(0x1234)
    assert memory.read(AVAIL, 14) == bytes.fromhex("0100 0100 0200 0000 0300 0100 3412")
    device = MockDevice(memory, layout, 65534)
    assert (device.avail_idx, device.used_event) == (1, 0x1234)
    assert device.offered() == [3, 1, 2]
    assert device.offered() == []


def test_the_used_ring(memory: GuestMemory, layout: RingLayout) -> None:
    """flags, idx, four entries of 8 bytes, avail_event."""
    guest = MockGuest(memory, layout, 65535)
    device = MockDevice(memory, layout, 65535)
    device.give_back((3, 0x1000), (0xFFFFFFFF, 7))
    device.set_used_flags(1)
    device.set_avail_event(0x1234)
    entries = "ffffffff07000000" + "00" * 16 + "0300000000100000"
    assert memory.read(USED, 38) == bytes.fromhex("0100 0100" + entries + "3412")
    assert (guest.used_idx, guest.used_flags, guest.avail_event) == (1, 1, 0x1234)
    assert guest.returned() == [(3, 0x1000), (0xFFFFFFFF, 7)]
    assert guest.returned() == []
    assert guest.used_entry(3) == (3, 0x1000)


def test_a_chain_is_linked_round_the_table(memory: GuestMemory, layout: RingLayout) -> None:
    guest, device = MockGuest(memory, layout), MockDevice(memory, layout)
    assert guest.chain([(0x10, 1, 0), (0x20, 2, 0), (0x30, 3, 2)], first=2) == 2
    assert [device.descriptor(index) for index in (2, 3, 0, 1)] == [
        (0x10, 1, 1, 3),
        (0x20, 2, 1, 0),
        (0x30, 3, 2, 0),
        (0, 0, 0, 0),
    ]
