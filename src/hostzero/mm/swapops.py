# SPDX-License-Identifier: GPL-2.0-only
"""What a page table entry says of a page that is not there (kernel: `include/linux/swapops.h`).

An entry that is not zero and not present names a type and an offset. The one type here is
the swap area; its offset is the slot. The layout is this house's own: bit 0 clear, the type
in the bits above it (never 0, so that slot 0 is an entry too), the offset where a present
entry has its page number.
"""

from __future__ import annotations

from typing import Final

from hostzero.jit import inline
from hostzero.mm.pgtable import PAGE_PRESENT
from hostzero.units import PAGE_SHIFT

SWP_TYPE_SHIFT: Final = 1
SWP_TYPE_MASK: Final = 0x1F
SWP_AREA: Final = 1


@inline
def pte_present(value: int) -> bool:
    """Return whether an entry maps a page (kernel: same name)."""
    return (value & PAGE_PRESENT) != 0


@inline
def is_swap_pte(value: int) -> bool:
    """Return whether an entry names something that is not in memory (kernel: same name)."""
    return value != 0 and (value & PAGE_PRESENT) == 0


@inline
def swp_type(value: int) -> int:
    """Return the type of an entry that is not present (kernel: same name)."""
    return (value >> SWP_TYPE_SHIFT) & SWP_TYPE_MASK


@inline
def swp_offset(value: int) -> int:
    """Return the offset of an entry that is not present: the slot (kernel: same name)."""
    return value >> PAGE_SHIFT


@inline
def swp_entry_to_pte(kind: int, offset: int) -> int:
    """Return the entry that names `offset` of a type (kernel: same name)."""
    return (offset << PAGE_SHIFT) | (kind << SWP_TYPE_SHIFT)
