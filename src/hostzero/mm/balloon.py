# SPDX-License-Identifier: GPL-2.0-only
"""The pages that are inside the balloon (kernel: `mm/balloon.c`).

A balloon page is allocated, off every free list, and typed offline. Between the
device's acknowledgement and its release it may carry `PG_zeroed` (patch 36): the one
place where an owned page does. The mark is sampled and cleared before the page is
freed, because `PG_private` on a page being freed makes it a bad page.

A balloon page can be migrated: its driver tells the host that another page takes its
place. While that is under way the page is off the balloon's list but keeps its type, and
the reference that the balloon held on it is the isolation's. Linux takes one reference
more for the isolation, so that the put of patch 37 cannot be the last one there, and a put
that is not the last loses the hint (patch 35). Here it is the last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from hostzero.errors import HostzeroError, MmError, VmBug
from hostzero.jit import compiled
from hostzero.mm.list import LIST_POISON, list_add, list_del, list_first, list_next
from hostzero.mm.mmzone import Memory
from hostzero.mm.page_flags import ClearPageZeroed, PageZeroed, PGTY_none, PGTY_offline, SetPageZeroed
from hostzero.mm.page_free import put_page, put_page_zeroed
from hostzero.units import Pfn

if TYPE_CHECKING:
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)


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
def balloon_put_page(mem: Memory, pfn: int, cpu: int) -> None:
    """Free a page that left the balloon, as known zero if it was marked (patch 37).

    The mark is sampled and cleared first: a page that is freed must not carry it.
    """
    zeroed = PageZeroed(mem, pfn)
    ClearPageZeroed(mem, pfn)
    if zeroed:
        put_page_zeroed(mem, pfn, cpu)
    else:
        put_page(mem, pfn, cpu)


@compiled
def balloon_release(mem: Memory, pfns: object, cpu: int) -> None:
    """Free pages that left the balloon, known-zero ones as known zero (patch 37)."""
    for i in range(len(pfns)):  # type: ignore[arg-type]
        balloon_put_page(mem, pfns[i], cpu)  # type: ignore[index]


@compiled
def balloon_page_isolate(mem: Memory, pfn: int) -> bool:
    """Take a page off the balloon's list to migrate it; False if nobody can (kernel: same name)."""
    if mem.mem_map[pfn].page_type != PGTY_offline or mem.vm[0].balloon_migratable == 0:
        return False
    if list_next(mem, pfn) == LIST_POISON:
        return False  # isolated already
    list_del(mem, pfn)
    mem.vm[0].nr_balloon_pages -= 1
    mem.vm[0].nr_balloon_isolated += 1
    return True


@compiled
def balloon_page_putback(mem: Memory, pfn: int) -> None:
    """Put an isolated page back into the balloon, its mark as it was (kernel: same name)."""
    list_add(mem, pfn, mem.vm[0].balloon_head)
    mem.vm[0].nr_balloon_pages += 1
    mem.vm[0].nr_balloon_isolated -= 1


@compiled
def balloon_page_replace(mem: Memory, newpage: int, page: int, zeroed: bool, cpu: int) -> None:
    """Put `newpage` into the balloon in the place of the isolated `page`, which is freed.

    Source: the second half of `balloon_page_migrate`; patches 36 and 37. `newpage` is frozen.
    """
    mem.mem_map[newpage]._refcount = 1
    mem.mem_map[newpage].page_type = PGTY_offline
    list_add(mem, newpage, mem.vm[0].balloon_head)
    mem.vm[0].nr_balloon_pages += 1
    if zeroed:
        SetPageZeroed(mem, newpage)
    mem.vm[0].nr_balloon_isolated -= 1
    mem.mem_map[page].page_type = PGTY_none
    balloon_put_page(mem, page, cpu)


class BalloonPages:
    """The balloon's page list, in batches: a request of 256 pages is one call each.

    Its pages can be migrated while a driver has registered for that.
    """

    def __init__(self, mem: Memory) -> None:
        """Start with an empty balloon."""
        self._mem = mem
        self._migratepage: Callable[[Pfn, Pfn], bool] | None = None

    @property
    def count(self) -> int:
        """How many pages are on the balloon's list; not those isolated to be migrated."""
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

    def register_migratepage(self, callback: Callable[[Pfn, Pfn], bool]) -> Callable[[], None]:
        """Have a driver move balloon pages (kernel: `b_dev_info->migratepage`).

        Args:
            callback: called with the new page and the old one, tells the host of both, and
                returns whether the host has shown the new one to be zero. It raises
                `BlockingIOError` if the balloon is busy (-EAGAIN).

        Returns:
            A function that takes the driver off again; balloon pages stay where they are then.

        Raises:
            MmError: a driver is registered already.
        """
        if self._migratepage is not None:
            raise MmError("the balloon's pages have a driver already: unregister it first")
        self._migratepage = callback
        self._mem.vm[0].balloon_migratable = 1
        return self._unregister_migratepage

    def _unregister_migratepage(self) -> None:
        self._migratepage = None
        self._mem.vm[0].balloon_migratable = 0

    def isolate(self, pfn: int) -> bool:
        """Take a page off the list to migrate it; False if it is no balloon page or cannot be moved."""
        return bool(balloon_page_isolate(self._mem, pfn))

    def putback(self, pfn: int) -> None:
        """Put an isolated page back on the list."""
        balloon_page_putback(self._mem, pfn)

    def migrate(self, newpage: int, page: int, cpu: int = 0) -> bool:
        """Let `newpage` take the place of the isolated `page`, and free that; False if it cannot.

        Source: `balloon_page_migrate`. On False `page` is still isolated and `newpage` still the
        caller's: the balloon is busy, or its device failed, which is the driver's to report.

        Args:
            newpage: a frozen page without a zero hint, whose contents nobody needs.
            page: an isolated balloon page.
            cpu: whose list `page` is freed to.

        Raises:
            VmBug: an assertion of the guest failed.
        """
        if self._migratepage is None:
            return False
        try:
            zeroed = self._migratepage(Pfn(newpage), Pfn(page))
        except BlockingIOError:
            return False
        except VmBug:
            raise
        except (HostzeroError, OSError) as error:
            _log.warning("balloon page %#x stays: the device failed: %s", page, error)
            return False
        balloon_page_replace(self._mem, newpage, page, bool(zeroed), cpu)
        return True
