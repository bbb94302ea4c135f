# SPDX-License-Identifier: GPL-2.0-only
"""What the driver needs of the guest's memory manager, as protocols.

`hostzero.mm.MemoryManager` is what they describe. The driver is typed against the protocols
so that its tests can put a small memory manager with real pages in its place, and so that
one page lists everything the driver may touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hostzero.clock import Clock
from hostzero.units import Pfn

Pfns = NDArray[np.int64]
"""Page frame numbers, shape (n,)."""

Mask = NDArray[np.bool_]
"""One truth value for each page of a request, shape (n,)."""


class GuestConfig(Protocol):
    """The guest's boot parameters that the driver reads."""

    @property
    def init_on_free(self) -> bool:
        """``init_on_free=1``."""
        ...

    @property
    def page_poisoning(self) -> bool:
        """``page_poison=1``."""
        ...

    @property
    def confidential(self) -> bool:
        """Whether the guest distrusts its host."""
        ...


class BalloonPages(Protocol):
    """The balloon's page list (kernel: `mm/balloon.c`)."""

    @property
    def count(self) -> int:
        """Pages on the list."""
        ...

    def enqueue(self, pfns: Pfns, /) -> None:
        """Mark allocated pages as balloon pages and put them on the list."""
        ...

    def dequeue(self, count: int, /) -> Pfns:
        """Take up to `count` pages off the list."""
        ...

    def set_zeroed(self, pfns: Pfns, mask: Mask, /) -> None:
        """Mark the pages where `mask` holds as known zero (kernel: atomic `SetPageZeroed`)."""
        ...

    def release(self, pfns: Pfns, /) -> None:
        """Free dequeued pages, those known to be zero as such (kernel: `put_page_zeroed`)."""
        ...

    def register_migratepage(self, callback: Callable[[Pfn, Pfn], bool], /) -> Callable[[], None]:
        """Have `callback(newpage, page)` tell the host of a page's new place; returns what unregisters it."""
        ...


class VmStats(Protocol):
    """Counters for the statistics queue; pages of 4 KiB, or events since boot."""

    @property
    def total_pages(self) -> int:
        """Pages that the guest counts as its RAM."""
        ...

    @property
    def free_pages(self) -> int:
        """Free pages."""
        ...

    @property
    def available_pages(self) -> int:
        """Pages that a new program could have."""
        ...

    @property
    def pgfault(self) -> int:
        """Page faults."""
        ...

    @property
    def pgmajfault(self) -> int:
        """Those of them that waited for the swap area."""
        ...

    @property
    def pswpin(self) -> int:
        """Pages read from the swap area."""
        ...

    @property
    def pswpout(self) -> int:
        """Pages written to it."""
        ...

    @property
    def allocstall(self) -> int:
        """Allocations that had to wait."""
        ...

    @property
    def oom_kill(self) -> int:
        """Allocations that failed for want of memory."""
        ...


class PageReporting(Protocol):
    """Free page reporting (kernel: `mm/page_reporting.c`)."""

    def register(self, dev: Any, /) -> None:
        """Take on a device; there is at most one."""
        ...

    def unregister(self, dev: Any, /) -> None:
        """Let the device go; its `report` is not called again."""
        ...


class GuestMm(Protocol):
    """The guest's memory manager as its balloon driver sees it."""

    @property
    def config(self) -> GuestConfig:
        """The boot parameters."""
        ...

    @property
    def clock(self) -> Clock:
        """Guest time, for work that waits."""
        ...

    @property
    def nr_pages(self) -> int:
        """Pages of guest RAM."""
        ...

    @property
    def balloon(self) -> BalloonPages:
        """The balloon's page list."""
        ...

    @property
    def page_reporting(self) -> PageReporting:
        """Free page reporting."""
        ...

    def alloc_pages(self, gfp: int, order: int = 0) -> Pfn:
        """Allocate a block of 2**order pages, or raise `OutOfMemory`."""
        ...

    def alloc_pages_bulk(self, gfp: int, count: int) -> Pfns:
        """Allocate up to `count` single pages."""
        ...

    def free_pages(self, pfn: Pfn, order: int = 0) -> object:
        """Free a block; nothing is assumed about what it holds."""
        ...

    def adjust_managed_page_count(self, pages: int, /) -> None:
        """Add `pages`, which may be negative, to what the guest counts as its RAM."""
        ...

    def register_oom_notifier(self, callback: Callable[[], int], /) -> Callable[[], None]:
        """Have `callback` free pages when memory runs out; returns what unregisters it."""
        ...

    def vm_stats(self) -> VmStats:
        """Return the counters for the statistics queue."""
        ...

    def forget_zero_claims(self) -> object:
        """Drop every known-zero mark: contents were not preserved (hibernation)."""
        ...


ReportEntries = Sequence[tuple[Pfn, int]]
"""The blocks of one report call: (first page, order)."""
