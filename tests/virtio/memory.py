# SPDX-License-Identifier: GPL-2.0-only
"""A small guest space for ring tests, and where things lie in it."""

from __future__ import annotations

from hostzero.ram import GuestMemory, MemoryRegion, Ram
from hostzero.units import Gpa

LOW = 0x10000
"""Bytes of the low region, which starts at address 0."""

HIGH = Gpa(0x1_0000_0000)
"""Where the high region starts; it is LOW bytes long too, and nothing lies between."""

RING = Gpa(0)
"""Where the tests put a ring, in the low region."""

BUFFERS = Gpa(0x4000)
"""Where the tests put buffers, in the low region above any ring that they use."""


def split_memory(ram: Ram) -> GuestMemory:
    """Return two regions of 64 KiB with a hole of 4 GiB between them, as a PC has one."""
    return GuestMemory([MemoryRegion(Gpa(0), ram, 0, LOW), MemoryRegion(HIGH, ram, LOW, LOW)])
