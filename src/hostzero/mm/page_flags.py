# SPDX-License-Identifier: GPL-2.0-only
"""Page flags and page types (kernel: `include/linux/page-flags.h`, Linux 7.2).

Two flags are aliases that are only meaningful while a page is free:

* `PG_reported` is `PG_uptodate`, as in Linux;
* `PG_zeroed` is `PG_private`, as in the series (patch 22). Every owner of a page may
  use `PG_private` for something else, so the free path clears it before the page
  can reach a free list, and every allocation path consumes it.

The setters are the non-atomic forms (`__SetPage…`) unless their name lacks the
underscores; the atomic forms are separate functions because the places that need
them (balloon pages, outside the zone lock) are part of what the series specifies.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hostzero.jit import inline
from hostzero.mm.mmzone import Memory

PG_locked: Final = 1 << 0
PG_writeback: Final = 1 << 1
PG_referenced: Final = 1 << 2
PG_uptodate: Final = 1 << 3
PG_dirty: Final = 1 << 4
PG_lru: Final = 1 << 5
PG_head: Final = 1 << 6
PG_active: Final = 1 << 8
PG_owner_2: Final = 1 << 11
PG_reserved: Final = 1 << 13
PG_private: Final = 1 << 14
PG_private_2: Final = 1 << 15
PG_swapbacked: Final = 1 << 17
PG_unevictable: Final = 1 << 18
PG_mlocked: Final = 1 << 20
PG_hwpoison: Final = 1 << 22

PG_reported: Final = PG_uptodate
PG_zeroed: Final = PG_private

PAGEFLAGS_MASK: Final = (1 << 24) - 1

PAGE_FLAGS_CHECK_AT_FREE: Final = (
    PG_lru
    | PG_locked
    | PG_private
    | PG_private_2
    | PG_writeback
    | PG_reserved
    | PG_active
    | PG_unevictable
    | PG_mlocked
)
PAGE_FLAGS_CHECK_AT_PREP: Final = PAGEFLAGS_MASK & ~PG_hwpoison

MAGIC_HWPOISON: Final = 0x48575053
"""`private` of a broken page that nobody owns (kernel: `SetPageHWPoisonTakenOff`)."""

# page_type values; 0 means that the page has no type.
PGTY_none: Final = 0
PGTY_buddy: Final = 0xF0
PGTY_offline: Final = 0xF1
PGTY_table: Final = 0xF2
PGTY_guard: Final = 0xF3
PGTY_hugetlb: Final = 0xF4


@inline
def PageBuddy(mem: Memory, pfn: int) -> bool:
    """Return whether `pfn` heads a block on a free list."""
    return mem.mem_map[pfn].page_type == PGTY_buddy


@inline
def __SetPageBuddy(mem: Memory, pfn: int) -> None:
    mem.mem_map[pfn].page_type = PGTY_buddy


@inline
def __ClearPageBuddy(mem: Memory, pfn: int) -> None:
    mem.mem_map[pfn].page_type = PGTY_none


@inline
def PageReported(mem: Memory, pfn: int) -> bool:
    """Return whether the host has been told of this free block."""
    return (mem.mem_map[pfn].flags_f & PG_reported) != 0


@inline
def __SetPageReported(mem: Memory, pfn: int) -> None:
    mem.mem_map[pfn].flags_f |= PG_reported


@inline
def __ClearPageReported(mem: Memory, pfn: int) -> None:
    mem.mem_map[pfn].flags_f &= ~PG_reported


@inline
def PageZeroed(mem: Memory, pfn: int) -> bool:
    """Return whether every byte of this free block is known to be zero (patch 22)."""
    return (mem.mem_map[pfn].flags_f & PG_zeroed) != 0


@inline
def __SetPageZeroed(mem: Memory, pfn: int) -> None:
    mem.mem_map[pfn].flags_f |= PG_zeroed


@inline
def __ClearPageZeroed(mem: Memory, pfn: int) -> None:
    mem.mem_map[pfn].flags_f &= ~PG_zeroed


@inline
def SetPageZeroed(mem: Memory, pfn: int) -> None:
    """Mark a balloon page as known zero; atomic, the zone lock is not held (patch 36)."""
    mem.mem_map[pfn].flags_f |= PG_zeroed


@inline
def ClearPageZeroed(mem: Memory, pfn: int) -> None:
    """Drop the mark of a balloon page; atomic, the zone lock is not held (patch 36)."""
    mem.mem_map[pfn].flags_f &= ~PG_zeroed


@inline
def PageHWPoison(mem: Memory, pfn: int) -> bool:
    """Return whether the page's memory is broken and must never be used again."""
    return (mem.mem_map[pfn].flags_f & PG_hwpoison) != 0


@inline
def PageHead(mem: Memory, pfn: int) -> bool:
    """Return whether the page is the head of a compound page."""
    return (mem.mem_map[pfn].flags_f & PG_head) != 0


@inline
def PageTail(mem: Memory, pfn: int) -> bool:
    """Return whether the page is a tail of a compound page (`compound_head` bit 0)."""
    return (mem.compound_head[pfn] & 1) != 0


@inline
def compound_head(mem: Memory, pfn: int) -> int:
    """Return the head of the folio that `pfn` belongs to, which may be `pfn` itself."""
    head = mem.compound_head[pfn]
    if head & 1:
        return head >> 1
    return pfn


@inline
def compound_order(mem: Memory, pfn: int) -> int:
    """Return the order of the folio that `pfn` heads; 0 for a page that is not compound."""
    if mem.mem_map[pfn].flags_f & PG_head:
        return np.int64(mem.mem_map[pfn].order)  # type: ignore[return-value]
    return 0
