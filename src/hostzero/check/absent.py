# SPDX-License-Identifier: GPL-2.0-only
"""Which pages of guest RAM the host backs: asked page by page, without touching one."""

from __future__ import annotations

import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hostzero.ram import Ram, libc
from hostzero.units import PAGE_SHIFT

# Documentation/admin-guide/mm/pagemap.rst. The zero page is never exclusive; a page in swap has bytes.
_EXCLUSIVE: Final = 1 << 56
_SWAPPED: Final = 1 << 62


def backed_pages(ram: Ram) -> NDArray[np.bool_]:
    """Return whether each page holds memory of its own; all others read as zero.

    Raises:
        OSError: the host does not answer.
    """
    count = ram.size >> PAGE_SHIFT
    if ram.fileno is not None:
        return np.frombuffer(libc.mincore(ram.base, ram.size), dtype=np.uint8)[:count] & 1 != 0
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entries = np.frombuffer(os.pread(pagemap, count * 8, (ram.base >> PAGE_SHIFT) * 8), dtype=np.uint64)
    finally:
        os.close(pagemap)
    return entries & np.uint64(_EXCLUSIVE | _SWAPPED) != 0


def wrong_bytes(
    words: NDArray[np.uint64], pfns: NDArray[np.int64], values: NDArray[np.uint8] | int
) -> NDArray[np.bool_]:
    """Return of each of some pages whether any byte differs from its value; `words` is guest RAM."""
    if not len(pfns):
        return np.zeros(0, dtype=np.bool_)
    wanted = np.asarray(values, dtype=np.uint64) * np.uint64(0x0101_0101_0101_0101)
    pages = words.reshape(-1, 512)
    # In pieces: a copy of everything at once would be as large as the guest.
    wrong = np.empty(len(pfns), dtype=np.bool_)
    for start in range(0, len(pfns), 256):
        piece = slice(start, start + 256)
        expected = wanted if wanted.ndim == 0 else wanted[piece, None]
        wrong[piece] = (pages[pfns[piece]] != expected).any(axis=1)
    return wrong


def first_wrong(words: NDArray[np.uint64], pfn: int, value: int) -> tuple[int, int]:
    """Return the offset in a page of its first byte that differs from `value`, and that byte."""
    page = words[pfn * 512 : pfn * 512 + 512].view(np.uint8)
    at = int(np.argmax(page != value))
    return at, int(page[at])
