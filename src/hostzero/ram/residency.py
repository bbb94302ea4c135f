# SPDX-License-Identifier: GPL-2.0-only
"""How much of a range the host really backs, asked without faulting a page in.

Which interface tells the truth depends on the mapping:

=================  ===========================  ==========================================
mapping            asked                        why not the other
=================  ===========================  ==========================================
private anonymous  PAGEMAP_SCAN, or pagemap     mincore(2) counts the zero page, which a
                   entries before Linux 6.7     mere read maps and which holds no memory
shared shmem       mincore(2), which looks in   pagemap sees only what this process has
                   the page cache               mapped: not what a peer wrote, and nothing
                                                after MADV_DONTNEED although all is kept
shared hugetlbfs   mincore(2)                   the same; but mincore looks at this
                                                process's page table only there
                                                (mincore_hugetlb), so pages that only a
                                                peer has touched are not counted
=================  ===========================  ==========================================

Swapped-out pages are not resident. A 4 KiB hole in an anonymous huge page counts as
not resident at once, although the kernel keeps the whole folio until it splits it
under memory pressure (deferred_split_folio).
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import struct
from typing import Final

import numpy as np

from hostzero.ram import libc

# include/uapi/linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), twelve 64-bit fields.
_PM_SCAN_ARG: Final = struct.Struct("=12Q")
_PAGEMAP_SCAN: Final = (3 << 30) | (_PM_SCAN_ARG.size << 16) | (ord("f") << 8) | 16
_PAGE_IS_PRESENT: Final = 1 << 3
_PAGE_IS_PFNZERO: Final = 1 << 5
_REGIONS: Final = 512

# Documentation/admin-guide/mm/pagemap.rst: bits of one 64-bit pagemap entry.
_PM_EXCLUSIVE: Final = 1 << 56
_PM_PRESENT: Final = 1 << 63
_PAGEMAP_CHUNK: Final = 1 << 17

_PAGES_PER_READ: Final = 1 << 18


def private_resident(address: int, length: int) -> int:
    """Return the bytes of a private anonymous range that hold memory of their own.

    Both bounds are multiples of the host page. The shared zero page does not count.

    Raises:
        OSError: /proc/self/pagemap cannot be read.
    """
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            return scan_pagemap(pagemap, address, length)
        except OSError as error:
            # ENOTTY: before Linux 6.7. EINVAL: a later one that changed the structure.
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        return read_pagemap(pagemap, address, length)
    finally:
        os.close(pagemap)


def scan_pagemap(pagemap: int, address: int, length: int) -> int:
    """Count present bytes that are not the zero page with the PAGEMAP_SCAN ioctl.

    Raises:
        OSError: the kernel lacks the ioctl (before Linux 6.7).
    """
    regions = array.array("Q", bytes(_REGIONS * 24))
    vector, _ = regions.buffer_info()
    end = address + length
    total = 0
    while address < end:
        inverted, mask = _PAGE_IS_PFNZERO, _PAGE_IS_PRESENT | _PAGE_IS_PFNZERO
        argument = bytearray(
            _PM_SCAN_ARG.pack(
                _PM_SCAN_ARG.size,
                0,
                address,
                end,
                0,
                vector,
                _REGIONS,
                0,
                inverted,
                mask,
                0,
                _PAGE_IS_PRESENT,
            )
        )
        filled = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        total += sum(regions[1 : 3 * filled : 3]) - sum(regions[0 : 3 * filled : 3])
        # walk_end: where the walk stopped, because the vector was full or the range done.
        address = _PM_SCAN_ARG.unpack(argument)[4]
    return total


def read_pagemap(pagemap: int, address: int, length: int) -> int:
    """Count present bytes from pagemap entries, for kernels without PAGEMAP_SCAN.

    Only pages mapped exclusively count, because the zero page never is; a page still
    shared with a forked child is missed.

    Raises:
        OSError: pagemap cannot be read.
    """
    wanted = np.uint64(_PM_PRESENT | _PM_EXCLUSIVE)
    first = address // mmap.PAGESIZE
    last = first + length // mmap.PAGESIZE
    pages = 0
    for start in range(first, last, _PAGEMAP_CHUNK):
        count = min(_PAGEMAP_CHUNK, last - start)
        entries = np.frombuffer(os.pread(pagemap, count * 8, start * 8), dtype=np.uint64)
        pages += int(np.count_nonzero((entries & wanted) == wanted))
    return pages * mmap.PAGESIZE


def shared_resident(address: int, length: int) -> int:
    """Return the bytes of a shared file range whose pages are in memory.

    Both bounds are multiples of the host page.

    Raises:
        OSError: mincore(2) failed.
    """
    step = _PAGES_PER_READ * mmap.PAGESIZE
    pages = 0
    for start in range(0, length, step):
        vector = np.frombuffer(libc.mincore(address + start, min(step, length - start)), dtype=np.uint8)
        pages += int(np.count_nonzero(vector & 1))
    return pages * mmap.PAGESIZE
