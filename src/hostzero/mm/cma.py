# SPDX-License-Identifier: GPL-2.0-only
"""The contiguous memory allocator: an area where only movable pages may live.

Kernel: `mm/cma.c`, Linux 7.2. The pageblocks at the end of memory (`MmConfig.cma_pages`) are
MIGRATE_CMA: movable allocations use them until the area's owner wants a run of pages, which
then is cleared as any contiguous range is. A bitmap says which pages the owner has.

Patch 9, as of v8: the flags that the run is allocated with are the area's own, except for
`__GFP_ZERO`, which is the caller's. Whoever marks such a folio as zeroed can believe it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hostzero.errors import UsageError
from hostzero.mm.contig import alloc_contig_frozen_range, free_contig_frozen_range
from hostzero.mm.gfp import GFP_COMP, GFP_KERNEL, GFP_NOWARN, GFP_ZERO
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_isolation import PB_ISOLATE_MODE_CMA_ALLOC

if TYPE_CHECKING:
    from hostzero.mm.manager import MemoryManager


class CmaArea:
    """The guest's one CMA area (kernel: `struct cma`), `[base_pfn, base_pfn + count)`.

    Attributes:
        base_pfn: the first page; a pageblock boundary.
        count: how many pages the area has; 0 if there is none.
        bitmap: by page, whether the owner has it; one bit a page (`order_per_bit` 0).
        nr_pages_succeeded: pages allocated since boot, as in `/sys/kernel/mm/cma`.
        nr_pages_failed: pages asked for in vain.
        nr_pages_released: pages given back.
    """

    def __init__(self, nr_pages: int, count: int) -> None:
        """Lay the area out at the end of a guest of `nr_pages` pages; nothing is allocated."""
        self.base_pfn = nr_pages - count
        self.count = count
        self.bitmap = np.zeros(count, dtype=np.bool_)
        self.nr_pages_succeeded = 0
        self.nr_pages_failed = 0
        self.nr_pages_released = 0

    @property
    def available_count(self) -> int:
        """How many pages the owner does not have; others may use them meanwhile."""
        return self.count - int(self.bitmap.sum())

    def holds(self, pfn: int, order: int) -> bool:
        """Return whether a run lies inside the area (kernel: `cma_pages_valid`)."""
        return self.base_pfn <= pfn and pfn + (1 << order) <= self.base_pfn + self.count

    def find_free(self, pfn: int, order: int) -> int:
        """Return the first aligned run from `pfn` on that the owner does not have, or NO_PAGE.

        Aligned is the page number, not the place in the area.
        """
        size = 1 << order
        start = -(-max(pfn, self.base_pfn) // size) * size
        while self.holds(start, order):
            if not self.bits(start, order).any():
                return start
            start += size
        return NO_PAGE

    def bits(self, pfn: int, order: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return a writable view of a run's bits."""
        start = pfn - self.base_pfn
        return self.bitmap[start : start + (1 << order)]


def cma_alloc_frozen_compound(manager: MemoryManager, order: int, gfp: int) -> int:
    """Allocate a folio without references out of the CMA area; return its head, or NO_PAGE.

    Source: same name, patch 9. Of `gfp` only `__GFP_ZERO` counts: with it the folio is zeroed,
    without it nothing is promised. A run that cannot be cleared is left and the next one tried.

    Raises:
        UsageError: the order is negative.
    """
    if order < 0:
        raise UsageError(f"order {order} is negative")
    cma = manager.cma
    flags = GFP_KERNEL | GFP_COMP | GFP_NOWARN | (gfp & GFP_ZERO)
    pfn = cma.find_free(cma.base_pfn, order)
    while pfn != NO_PAGE:
        bits = cma.bits(pfn, order)
        # Taken before the run is cleared, as in Linux: the area must not be given out twice.
        bits[:] = True
        done = False
        try:
            done = alloc_contig_frozen_range(
                manager, pfn, pfn + (1 << order), flags, mode=PB_ISOLATE_MODE_CMA_ALLOC
            )
        finally:
            bits[:] = done
        if done:
            cma.nr_pages_succeeded += 1 << order
            return pfn
        pfn = cma.find_free(pfn + (1 << order), order)
    cma.nr_pages_failed += 1 << order
    return NO_PAGE


def cma_release_frozen(manager: MemoryManager, pfn: int, order: int) -> bool:
    """Give a folio without references back to the area; False if it is not the area's.

    Raises:
        UsageError: it lies in the area, but is no allocation of this size.
    """
    cma = manager.cma
    if order < 0 or not cma.holds(pfn, order):
        return False
    bits = cma.bits(pfn, order)
    if not bits.all():
        raise UsageError(f"the CMA area did not give out pages {pfn:#x} of order {order}")
    free_contig_frozen_range(manager, pfn, order)
    bits[:] = False
    cma.nr_pages_released += 1 << order
    return True
