# SPDX-License-Identifier: GPL-2.0-only
"""Which of several fitting free blocks a request gets, if it matters whether they are zero.

Not in Linux and not in the series: an answer to the cover letter's remark that few order-0 pages
come from reported memory, since a request takes whatever its list begins with. It is off unless
`MmConfig.placement` is "zero-aware". docs/placement.md has the figures, and the reason for the
limit: a request looks at blocks below the pageblock only. Larger ones are left to the rules that
keep memory whole, so a request breaks one only where it would have done so anyway.

Lists stay in the order that the kernel's rules give them (merge likelihood, cold ends). Only
the two ends of a list are looked at: reported blocks are put back at the tail, and frees and
the remainders of a split go to the head, so that unlike blocks gather at unlike ends.
"""

from __future__ import annotations

from hostzero.jit import compiled, inline
from hostzero.mm.buddy import page_del_and_expand
from hostzero.mm.gfp import __GFP_SKIP_ZERO, __GFP_ZERO
from hostzero.mm.list import list_first, list_last
from hostzero.mm.mmzone import NO_PAGE, PAGEBLOCK_ORDER, Memory, free_list
from hostzero.mm.page_flags import PageZeroed


@inline
def wants_zeros(mem: Memory, gfp: int) -> bool:
    """Return whether `post_alloc_hook` will want the page to be zero (kernel: `want_init_on_alloc`)."""
    return (mem.vm[0].init_on_alloc != 0 or (gfp & __GFP_ZERO) != 0) and (gfp & __GFP_SKIP_ZERO) == 0


@inline
def fitting_end(mem: Memory, head: int, zeros: bool) -> int:
    """Return the first or the last block of a list if it is known zero as wanted, else NO_PAGE.

    `zeros` False asks for a block that is *not* known to be zero.
    """
    pfn = list_first(mem, head)
    if pfn != head and PageZeroed(mem, pfn) != zeros:
        pfn = list_last(mem, head)
    return NO_PAGE if pfn == head or PageZeroed(mem, pfn) != zeros else pfn


@compiled
def __rmqueue_fitting(mem: Memory, zone: int, order: int, migratetype: int, zeros: bool) -> int:
    """Take the smallest block below the pageblock that is known zero as wanted, or return NO_PAGE.

    Only lists of `migratetype` are looked at; falling back stays with `__rmqueue`.
    """
    for current in range(order, PAGEBLOCK_ORDER):
        pfn = fitting_end(mem, free_list(mem, zone, current, migratetype), zeros)
        if pfn != NO_PAGE:
            page_del_and_expand(mem, pfn, zone, order, current, migratetype)
            return pfn
    return NO_PAGE
