# SPDX-License-Identifier: GPL-2.0-only
"""The pages that are inside the balloon (kernel: `mm/balloon.c`).

A balloon page is allocated, off every free list, and typed offline. Between the
device's acknowledgement and its release it may carry `PG_zeroed` (patch 36): the one
place where an owned page does. The mark is sampled and cleared before the page is
freed, because `PG_private` on a page being freed makes it a bad page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hostzero.jit import compiled
from hostzero.mm.list import list_add, list_del, list_first
from hostzero.mm.mmzone import Memory
from hostzero.mm.page_flags import ClearPageZeroed, PageZeroed, PGTY_none, PGTY_offline, SetPageZeroed
from hostzero.mm.page_free import put_page, put_page_zeroed

if TYPE_CHECKING:
    from numpy.typing import NDArray


@compiled
def balloon_page_list_enqueue(mem: Memory, pfns: object) -> None:
    """Put allocated pages into the balloon (kernel: same name)."""
    head = mem.vm[0].balloon_head
    for i in range(len(pfns)):  # type: ignore[arg-type]
        pfn = pfns[i]  # type: ignore[index]
        mem.mem_map[pfn].page_type = PGTY_offline
        list_add(mem, pfn, head)
        mem.vm[0].nr_balloon_pages += 1


@compiled
def balloon_page_list_dequeue(mem: Memory, pfns: object) -> int:
    """Take pages out of the balloon, newest first; return how many there were."""
    head = mem.vm[0].balloon_head
    for i in range(len(pfns)):  # type: ignore[arg-type]
        pfn = list_first(mem, head)
        if pfn == head:
            return i
        list_del(mem, pfn)
        mem.mem_map[pfn].page_type = PGTY_none
        mem.vm[0].nr_balloon_pages -= 1
        pfns[i] = pfn  # type: ignore[index]
    return len(pfns)  # type: ignore[arg-type]


@compiled
def balloon_set_zeroed(mem: Memory, pfns: object, zeroed: object) -> None:
    """Mark the balloon pages that the device acknowledged as zero (patch 36)."""
    for i in range(len(pfns)):  # type: ignore[arg-type]
        if zeroed[i]:  # type: ignore[index]
            SetPageZeroed(mem, pfns[i])  # type: ignore[index]


@compiled
def balloon_release(mem: Memory, pfns: object, cpu: int) -> None:
    """Free pages that left the balloon, known-zero ones as known zero (patch 37)."""
    for i in range(len(pfns)):  # type: ignore[arg-type]
        pfn = pfns[i]  # type: ignore[index]
        zeroed = PageZeroed(mem, pfn)
        ClearPageZeroed(mem, pfn)
        if zeroed:
            put_page_zeroed(mem, pfn, cpu)
        else:
            put_page(mem, pfn, cpu)


class BalloonPages:
    """The balloon's page list, in batches: a request of 256 pages is one call each."""

    def __init__(self, mem: Memory) -> None:
        """Start with an empty balloon."""
        self._mem = mem

    @property
    def count(self) -> int:
        """How many pages are in the balloon."""
        return int(self._mem.vm[0].nr_balloon_pages)

    def enqueue(self, pfns: NDArray[np.int64]) -> None:
        """Put allocated order-0 pages into the balloon."""
        balloon_page_list_enqueue(self._mem, pfns)

    def dequeue(self, count: int) -> NDArray[np.int64]:
        """Take up to `count` pages out, newest first; they stay allocated."""
        pfns = np.empty(count, dtype=np.int64)
        return pfns[: balloon_page_list_dequeue(self._mem, pfns)]

    def set_zeroed(self, pfns: NDArray[np.int64], zeroed: NDArray[np.bool_]) -> None:
        """Mark those pages as known zero for which `zeroed` is True; clears no mark."""
        balloon_set_zeroed(self._mem, pfns, zeroed)

    def release(self, pfns: NDArray[np.int64]) -> None:
        """Free dequeued pages; those marked known zero are freed as known zero."""
        balloon_release(self._mem, pfns, 0)
