# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of processes, reporting and the balloon share: page tables, a host, states of a guest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hostzero.mm import MemoryManager, PageReportingDevInfo, Process
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, USER_ADDR_NONE
from hostzero.mm.mmzone import MAX_PAGE_ORDER, NO_PAGE
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import PG_reported, PGTY_buddy
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.guest import is_marked_zero, page_bytes

MIB = 1 << 20
HUGE = 2 * MIB
LEVELS = (39, 30, 21, 12)
"""Shift of the address bits that each level of an x86-64 page table is indexed by."""

Entries = list[tuple[int, int]]


def free_pages(mm: MemoryManager) -> int:
    """Return how many pages nobody owns, parked ones included."""
    return mm.vm_stats().free_pages


def table_entries(mm: MemoryManager, process: Process, addr: int) -> list[int]:
    """Return the entries on the way to an address, top table first, up to an empty or huge one."""
    table, entries = int(process._pgd), list[int]()
    for shift in LEVELS:
        entries.append(int(mm.mem.ram[table * 512 + (addr >> shift) % 512]))
        if entries[-1] == 0 or (shift == 21 and entries[-1] & 0x80):
            break
        table = (entries[-1] % (1 << 52)) >> 12
    return entries


def pfn_at(mm: MemoryManager, process: Process, addr: int) -> int | None:
    """Return the page that an address is mapped to, or None."""
    entries = table_entries(mm, process, addr)
    if entries[-1] == 0:
        return None
    first = (entries[-1] % (1 << 52)) >> 12
    return first + (addr >> 12) % 512 if len(entries) == 3 else first


def is_huge(mm: MemoryManager, process: Process, addr: int) -> bool:
    """Return whether an address is mapped by a 2 MiB page."""
    entries = table_entries(mm, process, addr)
    return len(entries) == 3 and entries[-1] != 0


def mapped(mm: MemoryManager, process: Process, addr: int, length: int = HUGE) -> bytearray:
    """Return the bytes of mapped whole pages, by this module's own walk of the page tables.

    The same as `Process.read`, which copies byte by byte: too slow for 2 MiB uncompiled.
    """
    found = bytearray()
    while length > 0:
        pfn = pfn_at(mm, process, addr)
        assert pfn is not None
        count = 512 - (addr >> 12) % 512 if is_huge(mm, process, addr) else 1
        count = min(count, length >> 12)
        found += page_bytes(mm, pfn, count).tobytes()
        addr, length = addr + count * PAGE_SIZE, length - count * PAGE_SIZE
    return found


def pages(*pfns: int) -> NDArray[np.int64]:
    """Return page numbers as the array that batch calls take."""
    return np.array(pfns, dtype=np.int64)


def occupy(mm: MemoryManager, *, keep_watermarks: bool = False, gfp: int = GFP_HIGHUSER_MOVABLE) -> list[int]:
    """Allocate all memory as single pages and return them; without watermarks, to the last one."""
    if not keep_watermarks:
        zones = mm.mem.zone
        zones.watermark_min = zones.watermark_low = zones.watermark_high = zones.lowmem_reserve = 0
    taken: list[int] = []
    for order in range(MAX_PAGE_ORDER, -1, -1):
        # Large blocks cut up (kernel: split_page): page by page takes too long uncompiled.
        while (pfn := int(alloc_pages(mm.mem, gfp, order, USER_ADDR_NONE, 0, 0))) != NO_PAGE:
            mm.mem.mem_map[pfn : pfn + (1 << order)]._refcount = 1
            taken += range(pfn, pfn + (1 << order))
    return sorted(taken)


def release(mm: MemoryManager, pfns: Iterable[int]) -> None:
    """Free single pages and let them merge."""
    mm.free_pages_bulk(pages(*pfns))
    mm.drain_all_pages()


def release_blocks(mm: MemoryManager, blocks: Iterable[tuple[int, int]]) -> None:
    """Free whole blocks out of memory that `occupy` took, given as `(pfn, order)`."""
    for pfn, order in blocks:
        release(mm, range(pfn, pfn + (1 << order)))


Image = tuple[NDArray[Any], ...]


def image(mm: MemoryManager) -> Image:
    """Return a copy of a guest's allocator state and memory; no process or device may be in it."""
    return tuple(array.copy() for array in mm.mem)


def restore(mm: MemoryManager, saved: Image) -> MemoryManager:
    """Put a guest of the same size and configuration into a saved state."""
    base = int(mm.mem.vm[0].ram_base)
    for array, former in zip(mm.mem, saved, strict=True):
        array[:] = former
    mm.mem.vm[0].ram_base = base
    return mm


def fragment(mm: MemoryManager) -> list[int]:
    """Leave one page of each pageblock allocated, so that no block of order 9 is free."""
    taken = occupy(mm, keep_watermarks=True, gfp=GFP_KERNEL)
    stay = list({pfn // 512: pfn for pfn in taken}.values())
    release(mm, set(taken).difference(stay))
    assert int(mm.mem.zone[0].nr_free[9:].sum()) == 0
    return stay


def is_reported(mm: MemoryManager, pfn: int) -> bool:
    """Return whether a page carries `PG_reported`."""
    return bool(int(mm.mem.mem_map[pfn].flags_f) & PG_reported)


class FakeHost:
    """A host behind `PageReportingDevInfo.report` that answers truthfully, block by block.

    `zeroes` says of each block whether the host drops it; `fail` makes calls raise after
    that; `during` runs at the start of each call, as another CPU of the guest would.
    """

    def __init__(
        self,
        mm: MemoryManager,
        *,
        capacity: int = 0,
        order: int = -1,
        host_zeroes_pages: bool = True,
        zeroes: Callable[[int, int], bool] = lambda pfn, order: True,
    ) -> None:
        """Make the host; `register` binds it."""
        self.mm = mm
        self.zeroes = zeroes
        self.fail: BaseException | None = None
        self.during: Callable[[Entries], None] = lambda entries: None
        self.calls: list[Entries] = []
        self.info = PageReportingDevInfo(
            self.report, capacity=capacity, order=order, host_zeroes_pages=host_zeroes_pages
        )

    def register(self) -> FakeHost:
        """Register with the guest's page reporting."""
        self.mm.page_reporting.register(self.info)
        return self

    def blocks(self) -> Entries:
        """Return every block reported so far."""
        return [entry for call in self.calls for entry in call]

    def report(self, entries: Sequence[tuple[Pfn, int]]) -> None:
        """Serve one batch."""
        call = [(int(pfn), int(order)) for pfn, order in entries]
        self.calls.append(call)
        for pfn, _ in call:
            # Isolated: no list holds the block, and no mark of an earlier life is on it.
            page = self.mm.mem.mem_map[pfn]
            assert page.page_type != PGTY_buddy
            assert not is_marked_zero(self.mm.mem, pfn)
            assert not is_reported(self.mm, pfn)
        assert not self.info.zeroed_bitmap.any()
        self.during(call)
        for i, (pfn, order) in enumerate(call):
            if self.zeroes(pfn, order):
                page_bytes(self.mm, pfn, 1 << order)[:] = 0
                self.info.zeroed_bitmap[i] = True
        if self.fail is not None:
            raise self.fail


def contents(byte: int, length: int = PAGE_SIZE) -> bytes:
    """Return `length` bytes of one value."""
    return bytes([byte]) * length
