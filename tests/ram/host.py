# SPDX-License-Identifier: GPL-2.0-only
"""What this machine can map, and small helpers over whole pages."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from hostzero.errors import BackingUnavailable
from hostzero.ram import BACKINGS, Ram, open_ram
from hostzero.units import PAGE_SIZE, PMD_SIZE

SIZE: Final = 4 * PMD_SIZE
PAGES: Final = SIZE // PAGE_SIZE


def _probe() -> tuple[list[str], dict[str, str]]:
    available, lacking = [], {}
    for name in BACKINGS:
        try:
            # Twice what a test takes: two regions may be open at once.
            open_ram(2 * SIZE, name).close()
        except BackingUnavailable as error:
            lacking[name] = str(error)
        else:
            available.append(name)
    return available, lacking


AVAILABLE, LACKING = _probe()
"""Backings that this machine has, and the message of each that it lacks."""


def fill(ram: Ram) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """Give every page its own non-zero bytes; return the region as rows of pages."""
    pages = ram.array(np.uint64).reshape(-1, PAGE_SIZE // 8)
    pages[:] = 0x5A00_0000_0000_0001 + np.arange(len(pages), dtype=np.uint64)[:, None]
    return pages


def open_descriptors() -> list[str]:
    """Return the numbers of this process's open descriptors."""
    # The listing's own descriptor is among the entries, and is closed when they are looked at.
    return sorted(entry.name for entry in list(Path("/proc/self/fd").iterdir()) if entry.exists())


def mapped(address: int) -> bool:
    """Whether anything is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False
