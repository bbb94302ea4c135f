# SPDX-License-Identifier: GPL-2.0-only
"""Allocation flags and what they ask for (kernel: `include/linux/gfp_types.h`).

Bit positions are the kernel's own where it fixes them by name; only the flags that
this memory manager reads are here. A name with two leading underscores cannot be used
inside a class body (Python mangles it), so `GFP_ZERO` and its like stand beside.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import inline

__GFP_DMA32: Final = 1 << 2
__GFP_MOVABLE: Final = 1 << 3
__GFP_RECLAIMABLE: Final = 1 << 4
__GFP_HIGH: Final = 1 << 5
__GFP_IO: Final = 1 << 6
__GFP_FS: Final = 1 << 7
__GFP_ZERO: Final = 1 << 8
__GFP_DIRECT_RECLAIM: Final = 1 << 10
__GFP_KSWAPD_RECLAIM: Final = 1 << 11
__GFP_NOWARN: Final = 1 << 13
__GFP_RETRY_MAYFAIL: Final = 1 << 14
__GFP_NORETRY: Final = 1 << 16
__GFP_MEMALLOC: Final = 1 << 17
__GFP_COMP: Final = 1 << 18
__GFP_NOMEMALLOC: Final = 1 << 19
__GFP_HARDWALL: Final = 1 << 20
__GFP_THISNODE: Final = 1 << 21
__GFP_ACCOUNT: Final = 1 << 22
__GFP_SKIP_ZERO: Final = 1 << 24

__GFP_RECLAIM: Final = __GFP_DIRECT_RECLAIM | __GFP_KSWAPD_RECLAIM

GFP_ATOMIC: Final = __GFP_HIGH | __GFP_KSWAPD_RECLAIM
GFP_KERNEL: Final = __GFP_RECLAIM | __GFP_IO | __GFP_FS
GFP_KERNEL_ACCOUNT: Final = GFP_KERNEL | __GFP_ACCOUNT
GFP_NOWAIT: Final = __GFP_KSWAPD_RECLAIM | __GFP_NOWARN
GFP_USER: Final = __GFP_RECLAIM | __GFP_IO | __GFP_FS | __GFP_HARDWALL
GFP_HIGHUSER_MOVABLE: Final = GFP_USER | __GFP_MOVABLE
GFP_TRANSHUGE_LIGHT: Final = (
    GFP_HIGHUSER_MOVABLE | __GFP_COMP | __GFP_NOMEMALLOC | __GFP_NOWARN
) & ~__GFP_RECLAIM
GFP_TRANSHUGE: Final = GFP_TRANSHUGE_LIGHT | __GFP_DIRECT_RECLAIM

# For class bodies, where Python would mangle the kernel's names.
GFP_ZERO: Final = __GFP_ZERO
GFP_COMP: Final = __GFP_COMP
GFP_NORETRY: Final = __GFP_NORETRY
GFP_RETRY_MAYFAIL: Final = __GFP_RETRY_MAYFAIL
GFP_THISNODE: Final = __GFP_THISNODE
GFP_NOMEMALLOC: Final = __GFP_NOMEMALLOC
GFP_NOWARN: Final = __GFP_NOWARN

USER_ADDR_NONE: Final = -1
"""No user address: all ones, because address 0 is a legal mapping (patch 7)."""

GFP_MOVABLE_MASK: Final = __GFP_RECLAIMABLE | __GFP_MOVABLE
GFP_MOVABLE_SHIFT: Final = 3


@inline
def gfp_migratetype(gfp: int) -> int:
    """Return the migrate type that `gfp` asks for (kernel: `gfp_migratetype`).

    The two mobility bits are laid out so that the shift yields MIGRATE_UNMOVABLE (0),
    MIGRATE_MOVABLE (1) or MIGRATE_RECLAIMABLE (2) directly.
    """
    return (gfp & GFP_MOVABLE_MASK) >> GFP_MOVABLE_SHIFT


@inline
def gfpflags_allow_blocking(gfp: int) -> bool:
    """Return whether the caller may sleep (kernel: `gfpflags_allow_blocking`)."""
    return (gfp & __GFP_DIRECT_RECLAIM) != 0
