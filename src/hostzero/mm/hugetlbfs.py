# SPDX-License-Identifier: GPL-2.0-only
"""Files of huge pages, and mappings of them.

Kernel: `fs/hugetlbfs/inode.c`, `mm/memfd.c`, and the reservations of `mm/hugetlb.c`. A file
is what hugetlbfs or `memfd_create(MFD_HUGETLB)` gives. An anonymous mapping has a file too,
as in Linux: nobody can open it, and a private mapping never puts a page there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hostzero.errors import MmError, OutOfMemory
from hostzero.mm.hugetlb import alloc_hugetlb_folio_reserve, hugetlb_zero_user
from hostzero.mm.hugetlb_fault import hugetlb_add_to_page_cache, hugetlbfs_alloc, unmap_hugepage_range
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_free import put_page
from hostzero.mm.vma import VM_HUGETLB, VM_SHARED, new_vma
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Pfn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hostzero.mm.hugetlb_sysfs import Hugetlb


class HugetlbMapping:
    """What all pieces of one `mmap` of a file share (kernel: `struct resv_map` and its vmas).

    Attributes:
        file: the file.
        shared: writes go to the file.
        vmas: returns the pieces that are still mapped.
    """

    def __init__(self, file: HugetlbFile, *, shared: bool, pages: int, vmas: Callable[[], list[Any]]) -> None:
        """Map `file`; `pages` is the end of the mapping in it."""
        self.file = file
        self.shared = shared
        self.vmas = vmas
        self._resv = np.zeros(0 if shared else pages, dtype=np.int64)

    @property
    def resv(self) -> NDArray[np.int64]:
        """The reservations that faults use: the file's if shared, else its own."""
        return self.file.resv if self.shared else self._resv


class HugetlbFile:
    """A file whose pages are huge folios; make one with `Hugetlb.create_file`.

    Attributes:
        order: the size of its pages.
        pages: the page cache: by number, the head of the folio, NO_PAGE for a hole.
        resv: 1 for each hole that a page is reserved for.
    """

    def __init__(self, hugetlb: Hugetlb, h: int, pages: int, *, anonymous: bool = False) -> None:
        """Make an empty file of `pages` huge pages; an anonymous one nobody has open."""
        self._hugetlb = hugetlb
        self._mem = hugetlb.mem
        self.h = h
        self.order = int(self._mem.hstate[h].order)
        self.page_size = PAGE_SIZE << self.order
        self.pages = np.full(pages, NO_PAGE, dtype=np.int64)
        self.resv = np.zeros(pages, dtype=np.int64)
        self._mappings: list[HugetlbMapping] = []
        self.anonymous = anonymous
        self.is_open = not anonymous

    @property
    def size(self) -> int:
        """The length in bytes (`i_size`), a multiple of the page size."""
        return len(self.pages) * self.page_size

    @property
    def nr_pages(self) -> int:
        """How many huge pages the file holds."""
        return int(np.count_nonzero(self.pages != NO_PAGE))

    def fallocate(self, offset: int, length: int) -> None:
        """Allocate the pages under a range, extending the file (kernel: `hugetlbfs_fallocate`).

        Raises:
            MmError: -EINVAL for an empty or negative range, -EBADF for a closed file.
            OutOfMemory: -ENOSPC; pages allocated before it stay.
        """
        first, end = self._range(offset, length, "fallocate")
        self.grow(end)
        vma = new_vma(0, self.size, VM_SHARED | VM_HUGETLB, 0, 0, 0)
        vma[0].hstate, vma[0].vm_pgoff = self.h, 0
        for index in range(first, end):
            if self.pages[index] == NO_PAGE:
                self._fill(vma, index)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free the whole huge pages inside a range (`FALLOC_FL_PUNCH_HOLE`).

        Parts of pages at the ends are zeroed, as in Linux.
        """
        self._range(offset, length, "fallocate")
        size = self.page_size
        end = min(offset + length, self.size)
        first, last = -(-offset // size), end // size
        if first > last:
            self._zero(offset, end)
            return
        self._zero(offset, min(first * size, end))
        self._zero(last * size, end)
        self._remove(first, last)

    def truncate(self, size: int) -> None:
        """Set the length; pages beyond it are unmapped everywhere and freed (kernel: `hugetlb_vmtruncate`).

        Raises:
            MmError: -EINVAL for a length that is not whole huge pages, -EBADF for a closed file.
        """
        self._require_open("truncate")
        if size < 0 or size % self.page_size:
            raise MmError(f"truncate: -EINVAL: {size} is not whole pages of {self.page_size} bytes")
        pages = size // self.page_size
        self.grow(pages)
        self._remove(pages, len(self.pages))
        self.pages, self.resv = self.pages[:pages].copy(), self.resv[:pages].copy()

    def close(self) -> None:
        """Close the file; its memory goes when the last mapping has gone."""
        self.is_open = False
        self._evict()

    def memfd_alloc_folio(self, index: int) -> Pfn:
        """Allocate a page of the file outside of any fault, for a driver that pins it.

        Source: `memfd_alloc_folio`. Reserves a page, takes it from the pool, and zeroes it
        unless it is known to be zero (patch 21), which in v8 it never is: see
        `hugetlb.alloc_hugetlb_folio_reserve`.

        Raises:
            OutOfMemory: no page could be reserved.
            MmError: -EEXIST, the file has that page.
        """
        if not 0 <= index < len(self.pages) or self.pages[index] != NO_PAGE:
            raise MmError(f"memfd_alloc_folio: page {index} is there already or beyond the file's end")
        reserved = not self.resv[index]
        if reserved:
            self.reserve(index, index + 1)
        pfn, zeroed = alloc_hugetlb_folio_reserve(self._mem, self.h, 0)
        if pfn == NO_PAGE:  # every free page is broken
            if reserved:
                self.unreserve(index, index + 1)
            raise OutOfMemory("memfd_alloc_folio: no usable huge page")
        self.resv[index] = 0
        if not zeroed:
            hugetlb_zero_user(self._mem, pfn, self.order, 0)
        hugetlb_add_to_page_cache(self._mem, self.pages, index, pfn, self.order)
        self._mem.mem_map[pfn]._refcount -= 1
        return Pfn(int(pfn))

    def map(self, mapping: HugetlbMapping) -> None:
        """Note a mapping of the file."""
        self._mappings.append(mapping)

    def unmap(self, mapping: HugetlbMapping) -> None:
        """Forget a mapping none of whose pieces is left."""
        self._mappings.remove(mapping)
        self._evict()

    def grow(self, pages: int) -> None:
        """Make the file at least `pages` huge pages long."""
        more = pages - len(self.pages)
        if more > 0:
            self.pages = np.append(self.pages, np.full(more, NO_PAGE, dtype=np.int64))
            self.resv = np.append(self.resv, np.zeros(more, dtype=np.int64))

    def reserve(self, first: int, last: int, *, node: int = 0, cpu: int = 0) -> None:
        """Reserve a page for each hole in `[first, last)` (kernel: `hugetlb_reserve_pages`).

        Raises:
            OutOfMemory: the pool has too few pages and may not grow; nothing was reserved.
        """
        holes = (self.pages[first:last] == NO_PAGE) & (self.resv[first:last] == 0)
        self._hugetlb.acct_memory(self.h, int(np.count_nonzero(holes)), node=node, cpu=cpu)
        self.resv[first:last][holes] = 1

    def unreserve(self, first: int, last: int) -> None:
        """Give up the reservations in `[first, last)` (kernel: `hugetlb_unreserve_pages`)."""
        held = int(self.resv[first:last].sum())
        self.resv[first:last] = 0
        self._hugetlb.acct_memory(self.h, -held)

    def _fill(self, vma: Any, index: int) -> None:
        def fault(fresh: int) -> tuple[int, int]:
            return index * self.page_size, int(
                hugetlbfs_alloc(self._mem, vma, self.resv, self.pages, index, fresh, 0)
            )

        self._hugetlb.resolve(fault, self.h, 0)

    def _remove(self, first: int, last: int) -> None:
        # remove_inode_hugepages: unmapped everywhere first, private copies included.
        for mapping in self._mappings:
            for vma in mapping.vmas():
                start = int(vma[0].vm_pgoff) >> self.order
                pages = (int(vma[0].vm_end) - int(vma[0].vm_start)) // self.page_size
                low, high = max(first - start, 0), min(last - start, pages)
                if low < high:
                    base = int(vma[0].vm_start)
                    unmap_hugepage_range(
                        self._mem,
                        vma,
                        mapping.resv,
                        base + low * self.page_size,
                        base + high * self.page_size,
                        0,
                    )
        for index in range(first, last):
            if (pfn := int(self.pages[index])) != NO_PAGE:
                self.pages[index] = NO_PAGE
                put_page(self._mem, pfn, 0)
        self.unreserve(first, last)
        self._hugetlb.free_deferred()

    def _zero(self, start: int, end: int) -> None:
        # hugetlbfs_zero_partial_page
        if start < end and (pfn := int(self.pages[start // self.page_size])) != NO_PAGE:
            base = (pfn << PAGE_SHIFT) - start // self.page_size * self.page_size
            self._hugetlb.ram_bytes[base + start : base + end] = 0

    def _evict(self) -> None:
        if not self.is_open and not self._mappings:
            self._remove(0, len(self.pages))

    def _range(self, offset: int, length: int, call: str) -> tuple[int, int]:
        self._require_open(call)
        if offset < 0 or length <= 0:
            raise MmError(f"{call}: -EINVAL: [{offset}, +{length}) is empty or negative")
        return offset // self.page_size, -(-(offset + length) // self.page_size)

    def _require_open(self, call: str) -> None:
        if not self.is_open:
            raise MmError(f"{call}: -EBADF: the file is closed")
