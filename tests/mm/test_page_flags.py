# SPDX-License-Identifier: GPL-2.0-only
"""Each setter touches its own bit; two flags are aliases that the checks must know."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.mm import MemoryManager
from hostzero.mm import page_flags as flags
from hostzero.mm.mmzone import Memory
from tests.mm.conftest import Boot

PFN = 77

Setter = Callable[[Memory, int], None]
Test = Callable[[Memory, int], bool]


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """The smallest guest that boots."""
    return boot(4)


@pytest.mark.parametrize(
    ("setter", "clearer", "bit"),
    [
        (flags.__SetPageReported, flags.__ClearPageReported, flags.PG_uptodate),
        (flags.__SetPageZeroed, flags.__ClearPageZeroed, flags.PG_private),
        (flags.SetPageZeroed, flags.ClearPageZeroed, flags.PG_private),
    ],
)
def test_a_setter_sets_one_bit_and_its_clearer_clears_it(
    mm: MemoryManager, setter: Setter, clearer: Setter, bit: int
) -> None:
    page = mm.mem.mem_map[PFN]
    others = flags.PAGEFLAGS_MASK & ~bit
    page.flags_f = others
    setter(mm.mem, PFN)
    assert int(page.flags_f) == others | bit
    clearer(mm.mem, PFN)
    assert int(page.flags_f) == others


@pytest.mark.parametrize(
    ("test", "bit"),
    [
        (flags.PageReported, flags.PG_reported),
        (flags.PageZeroed, flags.PG_zeroed),
        (flags.PageHWPoison, flags.PG_hwpoison),
        (flags.PageHead, flags.PG_head),
    ],
)
def test_a_test_sees_its_bit_and_no_other(mm: MemoryManager, test: Test, bit: int) -> None:
    mm.mem.mem_map[PFN].flags_f = bit
    assert test(mm.mem, PFN)
    mm.mem.mem_map[PFN].flags_f = flags.PAGEFLAGS_MASK & ~bit
    assert not test(mm.mem, PFN)


def test_buddy_is_a_page_type(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(0)
    flags.__SetPageBuddy(mm.mem, pfn)
    assert flags.PageBuddy(mm.mem, pfn)
    flags.__ClearPageBuddy(mm.mem, pfn)
    assert not flags.PageBuddy(mm.mem, pfn)
    mm.mem.mem_map[pfn].page_type = flags.PGTY_offline
    assert not flags.PageBuddy(mm.mem, pfn)


def test_the_free_check_sees_private_and_the_prep_check_everything_but_hwpoison() -> None:
    assert flags.PAGE_FLAGS_CHECK_AT_FREE & flags.PG_zeroed
    assert not flags.PAGE_FLAGS_CHECK_AT_FREE & (flags.PG_reported | flags.PG_head | flags.PG_hwpoison)
    assert flags.PAGE_FLAGS_CHECK_AT_PREP & flags.PG_zeroed
    assert flags.PAGE_FLAGS_CHECK_AT_PREP & flags.PG_reported
    assert not flags.PAGE_FLAGS_CHECK_AT_PREP & flags.PG_hwpoison


def test_flags_do_not_overlap() -> None:
    names = [
        name for name in vars(flags) if name.startswith("PG_") and name not in {"PG_reported", "PG_zeroed"}
    ]
    bits = [int(getattr(flags, name)) for name in names]
    assert len(bits) == len(set(bits))
    assert all(bit.bit_count() == 1 and bit & flags.PAGEFLAGS_MASK for bit in bits)


def test_a_tail_leads_to_its_head(mm: MemoryManager) -> None:
    mm.mem.compound_head[PFN] = (64 << 1) | 1
    assert flags.PageTail(mm.mem, PFN)
    assert flags.compound_head(mm.mem, PFN) == 64
    mm.mem.compound_head[PFN] = 0
    assert not flags.PageTail(mm.mem, PFN)
    assert flags.compound_head(mm.mem, PFN) == PFN


def test_only_a_head_has_a_compound_order(mm: MemoryManager) -> None:
    page = mm.mem.mem_map[PFN]
    page.order = 5
    assert flags.compound_order(mm.mem, PFN) == 0
    page.flags_f = flags.PG_head
    assert flags.compound_order(mm.mem, PFN) == 5
