# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's debug assertions (kernel: `include/linux/mmdebug.h`, CONFIG_DEBUG_VM).

They are on when `MmConfig.debug_vm` is, which every test sets. A failed one leaves the
frame number in `vm.bug_pfn` and its caller raises `VmBug`. Compiled code can only raise
constant texts, so `describe_bug` puts the page's state beside the text for the reader.
"""

from __future__ import annotations

from hostzero.errors import VmBug
from hostzero.jit import inline
from hostzero.mm.mmzone import MIGRATE_NAMES, NO_PAGE, Memory, get_pageblock_migratetype


@inline
def VM_BUG_ON_PAGE(mem: Memory, condition: bool, pfn: int) -> bool:
    """Return whether the caller must raise `VmBug` about a page, and remember the page."""
    if condition and mem.vm[0].debug_vm != 0:
        mem.vm[0].bug_pfn = pfn
        return True
    return False


@inline
def lockdep_assert_zone_not_held(mem: Memory, zone: int) -> None:
    """Raise `VmBug` if the zone lock is held: taking it once more would wait for ever.

    One thing happens at a time here, so a lock that somebody holds is held by our own caller
    (kernel: `lockdep_assert_not_held(&zone->lock)`).
    """
    if mem.vm[0].debug_vm != 0 and mem.zone[zone].locked != 0:
        mem.vm[0].bug_pfn = NO_PAGE
        raise VmBug("the zone lock is taken by a caller that holds it: a deadlock")


def describe_page(mem: Memory, pfn: int) -> str:
    """Return what `dump_page` would print of one page, on one line."""
    if not 0 <= pfn < int(mem.vm[0].nr_pages):
        return f"pfn {pfn:#x} is outside of mem_map"
    page = mem.mem_map[pfn]
    migratetype = MIGRATE_NAMES[int(get_pageblock_migratetype(mem, pfn))]
    return (
        f"pfn {pfn:#x} flags {int(page.flags_f):#x} type {int(page.page_type):#x} "
        f"refcount {page._refcount} mapcount {page._mapcount} private {page.private} "
        f"compound_head {mem.compound_head[pfn]} mapping {page.mapping} block {migratetype}"
    )


def describe_bug(mem: Memory, bug: VmBug) -> str:
    """Return a failed assertion's text with the state of the page it was about."""
    pfn = int(mem.vm[0].bug_pfn)
    return str(bug) if pfn == NO_PAGE else f"{bug}: {describe_page(mem, pfn)}"
