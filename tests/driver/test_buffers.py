# SPDX-License-Identifier: GPL-2.0-only
"""The driver's page: no two buffers share a byte, and each lands where it says."""

from __future__ import annotations

import itertools

from hostzero.driver.buffers import DriverBuffers, as_pfns
from hostzero.units import PAGE_SIZE
from hostzero.virtio import VIRTIO_BALLOON_S_NR, unpack_pfns
from tests.driver.conftest import MakeGuest


def test_full_buffers_do_not_overlap(make_guest: MakeGuest) -> None:
    """All of them at their largest: 256 PFNs, their bitmap, sixteen statistics, two command ids."""
    guest = make_guest(probe=False)
    buffers = DriverBuffers(guest.mm, guest.memory)
    segments = [
        buffers.put_pfns(as_pfns(*range(1000, 1256))),
        buffers.put_stats(b"\x77" * 10 * VIRTIO_BALLOON_S_NR),
        buffers.put_cmd_id_active(0x8000_0001),
        buffers.put_cmd_id_stop(0),
        buffers.clear_bitmap(256),
    ]
    for one, other in itertools.combinations(segments, 2):
        assert one.gpa + one.length <= other.gpa or other.gpa + other.length <= one.gpa
    assert len({segment.gpa // PAGE_SIZE for segment in segments}) == 1
    assert unpack_pfns(guest.memory.read(*segments[0])).tolist() == list(range(1000, 1256))
    assert guest.memory.read(*segments[1]) == b"\x77" * 160
    assert guest.memory.read(*segments[2]) == b"\x01\x00\x00\x80"


def test_the_bitmap_is_a_copy_of_the_devices_bytes(make_guest: MakeGuest) -> None:
    """What is decided on cannot change after it was looked at."""
    guest = make_guest(probe=False)
    buffers = DriverBuffers(guest.mm, guest.memory)
    segment = buffers.clear_bitmap(20)
    guest.memory.write(segment.gpa, b"\x01\x02\x03")
    copy = buffers.bitmap(20)
    guest.memory.write(segment.gpa, b"\xff\xff\xff")
    assert copy == b"\x01\x02\x03"
    assert buffers.bitmap(8) == b"\xff"


def test_the_page_goes_back(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False)
    before = guest.mm.nr_free
    buffers = DriverBuffers(guest.mm, guest.memory)
    assert guest.mm.nr_free == before - 1
    buffers.free()
    assert guest.mm.nr_free == before
