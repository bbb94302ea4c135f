# SPDX-License-Identifier: GPL-2.0-only
"""Contiguous allocation: runs of pages that carry no hint and are zero exactly if asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hostzero.errors import UsageError, VmBug
from hostzero.mm import MemoryManager, ZoneSpec, contig
from hostzero.mm.contig import (
    MAX_FOLIO_ORDER,
    alloc_contig_frozen_pages,
    alloc_contig_frozen_pages_user,
    alloc_contig_frozen_range,
    free_contig_frozen_range,
)
from hostzero.mm.gfp import (
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_THISNODE,
    GFP_ZERO,
    USER_ADDR_NONE,
)
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.mm.mmzone import MIGRATE_ISOLATE, MIGRATE_MOVABLE, NO_PAGE, get_pageblock_migratetype
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PG_head,
    PG_zeroed,
    PGTY_none,
    compound_head,
    compound_order,
)
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import (
    booted,
    dirty,
    dirty_free_memory,
    free_lists,
    is_marked_zero,
    page_bytes,
    reads_zero,
    verify,
)
from tests.mm.processes import FakeHost, free_pages, occupy, release, release_blocks

FOLIO = GFP_KERNEL | GFP_COMP
ADDR = 0x7F00_0012_3456


def owned(mm: MemoryManager, pfn: int, order: int, *, compound: bool) -> None:
    """Check that a run is frozen, on no list, free of marks, and a folio or not."""
    pages = mm.mem.mem_map[pfn : pfn + (1 << order)]
    head = PG_head if compound else 0
    assert np.all(pages._refcount == 0)
    assert np.all(pages.page_type == PGTY_none)
    assert int(pages.flags_f[0]) & PAGE_FLAGS_CHECK_AT_PREP == head
    assert not np.any(pages.flags_f[1:] & PAGE_FLAGS_CHECK_AT_PREP)
    links = mm.mem.compound_head[pfn + 1 : pfn + (1 << order)]
    assert np.all(links == ((pfn << 1) | 1 if compound else 0))
    if compound:
        assert int(compound_order(mm.mem, pfn)) == order


def no_isolated_pageblock(mm: MemoryManager) -> bool:
    blocks = range(0, mm.nr_pages, 512)
    return all(int(get_pageblock_migratetype(mm.mem, block)) != MIGRATE_ISOLATE for block in blocks)


# ------------------------------------------------------------------ the pages


@pytest.mark.parametrize("zero", [0, GFP_ZERO])
@pytest.mark.parametrize("order", [1, 5, 9, 10, 11])
def test_a_folio_of_any_order_is_zero_if_asked_and_left_alone_if_not(
    boot: Boot, order: int, zero: int
) -> None:
    mm = boot(16)
    dirty_free_memory(mm)
    before = free_pages(mm)
    pfn = alloc_contig_frozen_pages_user(mm, order, FOLIO | zero, 0, ADDR)
    assert pfn != NO_PAGE
    assert pfn % (1 << order) == 0
    owned(mm, pfn, order, compound=True)
    assert reads_zero(mm, pfn, order) == bool(zero)
    assert zero or np.all(page_bytes(mm, pfn, 1 << order) == 0x5A)
    assert free_pages(mm) == before - (1 << order)
    verify(mm)
    free_contig_frozen_range(mm, pfn, order)
    assert free_pages(mm) == before
    assert no_isolated_pageblock(mm)
    verify(mm)


@pytest.mark.parametrize("order", [0, 3, 9, 11])
def test_a_run_that_is_no_folio_is_single_pages(boot: Boot, order: int) -> None:
    mm = boot(16)
    dirty_free_memory(mm)
    before = free_pages(mm)
    pfn = alloc_contig_frozen_pages(mm, order, GFP_KERNEL | GFP_ZERO)
    owned(mm, pfn, order, compound=False)
    assert reads_zero(mm, pfn, order)
    verify(mm)
    free_contig_frozen_range(mm, pfn, order)
    assert free_pages(mm) == before
    verify(mm)


@pytest.mark.parametrize(("start", "end"), [(1100, 1101), (1100, 1300), (1030, 2000), (1535, 1537)])
def test_exactly_the_range_is_taken(mm: MemoryManager, start: int, end: int) -> None:
    """What a free block has outside of the range goes back, and is not prepared for anyone."""
    mm.free_pages(Pfn(int(mm.mem.vm[0].empty_zero_page)))
    dirty_free_memory(mm)
    before, zeroed = free_pages(mm), mm.vm_stats().zeroed_bytes
    assert alloc_contig_frozen_range(mm, start, end, GFP_KERNEL | GFP_ZERO)
    assert free_pages(mm) == before - (end - start)
    assert mm.vm_stats().zeroed_bytes == zeroed + (end - start) * PAGE_SIZE
    assert not np.any(page_bytes(mm, start, end - start))
    outside = np.concatenate([page_bytes(mm, 1024, start - 1024), page_bytes(mm, end, 2048 - end)])
    assert np.all(outside == 0x5A)
    verify(mm)
    mm.mem.mem_map[start:end]._refcount = 1
    release(mm, range(start, end))
    assert free_pages(mm) == before
    assert no_isolated_pageblock(mm)
    verify(mm)


@pytest.mark.compiled_only
def test_the_largest_folio(boot: Boot) -> None:
    """Order 18: 1 GiB, as a gigantic hugetlb page; nothing of it is touched."""
    mm = boot(2048 + 64)
    pfn = alloc_contig_frozen_pages(mm, MAX_FOLIO_ORDER, FOLIO)
    assert pfn == 1 << MAX_FOLIO_ORDER
    owned(mm, pfn, MAX_FOLIO_ORDER, compound=True)
    assert int(compound_head(mm.mem, pfn + (1 << MAX_FOLIO_ORDER) - 1)) == pfn
    verify(mm)
    free_contig_frozen_range(mm, pfn, MAX_FOLIO_ORDER)
    verify(mm)


@pytest.mark.parametrize(
    "config", [{"init_on_alloc": True}, {"init_on_free": True}, {"page_poisoning": True}]
)
@pytest.mark.parametrize("zero", [0, GFP_ZERO])
def test_hardened_guests(boot: Boot, config: dict[str, bool], zero: int) -> None:
    """Poison is checked and overwritten, init_on_alloc zeroes unasked; parts cut off keep their pattern."""
    mm = boot(8, **config)
    pfn = alloc_contig_frozen_pages_user(mm, 9, FOLIO | zero, 0, ADDR)
    assert reads_zero(mm, pfn, 9) == (bool(zero) or "page_poisoning" not in config)
    dirty(mm, pfn, 9)
    free_contig_frozen_range(mm, pfn, 9)
    assert alloc_contig_frozen_range(mm, 1600, 1800, GFP_KERNEL | zero)
    assert reads_zero(mm, 1600, 6) == (bool(zero) or "page_poisoning" not in config)
    occupy(mm)
    assert mm.vm_stats().poison_errors == 0
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


# ------------------------------------------------------------------ hints


@pytest.mark.parametrize("compound", [True, False])
@pytest.mark.parametrize("zero", [0, GFP_ZERO])
def test_a_hint_of_the_blocks_is_neither_used_nor_handed_out(
    mm: MemoryManager, zero: int, compound: bool
) -> None:
    """Lifecycle: cleared before use, zeroed=False; a request for zeros pays for them."""
    FakeHost(mm, capacity=1).register()
    mm.page_reporting.flush(UINT_MAX)
    marked = [block for blocks in free_lists(mm.mem).values() for block in blocks]
    assert any(is_marked_zero(mm.mem, block) for block in marked if block >= 512)
    before = mm.vm_stats()
    pfn = alloc_contig_frozen_pages(mm, 9, GFP_KERNEL | zero | (GFP_COMP if compound else 0))
    owned(mm, pfn, 9, compound=compound)
    after = mm.vm_stats()
    assert after.zeroed_bytes - before.zeroed_bytes == (512 * PAGE_SIZE if zero else 0)
    assert (after.known_zero_bytes, after.dropped_hint_bytes) == (
        before.known_zero_bytes,
        before.dropped_hint_bytes,
    )
    verify(mm)
    # An owner has written by the time that it frees: nothing is known of the pages then.
    dirty(mm, pfn, 9)
    free_contig_frozen_range(mm, pfn, 9)
    mm.drain_all_pages()
    verify(mm)


def one_isolated_block(mm: MemoryManager) -> tuple[np.ndarray, np.ndarray]:
    """Take all memory and return a dirty block of order 4 at page 1024, isolated, as a list of one."""
    occupy(mm)
    dirty(mm, 1024, 4)
    mm.mem.mem_map[1024:1040]._refcount = 0
    mm.mem.mem_map[1024].flags_f |= PG_zeroed  # a false claim: whoever believes it hands out stale bytes
    return np.array([1024]), np.array([4])


def test_single_pages_leave_without_their_hint(mm: MemoryManager) -> None:
    """Lifecycle, split_free_frozen: the hint is cleared at this door, whoever isolated the block."""
    pfns, orders = one_isolated_block(mm)
    contig.split_free_frozen_pages(mm.mem, pfns, orders, 1, GFP_KERNEL | GFP_ZERO)
    owned(mm, 1024, 4, compound=False)
    assert reads_zero(mm, 1024, 4)


def test_a_folio_leaves_without_the_hints_of_its_blocks(mm: MemoryManager) -> None:
    """Lifecycle, alloc_contig: the hint is cleared at this door, whoever isolated the block."""
    pfns, _ = one_isolated_block(mm)
    contig.prep_contig_folio(mm.mem, pfns, 1, 4, FOLIO | GFP_ZERO, USER_ADDR_NONE)
    owned(mm, 1024, 4, compound=True)
    assert reads_zero(mm, 1024, 4)


SPY = """
from hostzero.mm import contig, prep
from hostzero.mm.gfp import GFP_COMP, GFP_KERNEL, GFP_ZERO
from tests.mm.guest import booted

seen = []
hook, zero = prep.post_alloc_hook, prep.folio_zero_user

def spy_hook(mem, pfn, order, gfp, user_addr, zeroed):
    seen.append(("hook", order, user_addr, zeroed, bool(prep.PageHead(mem, pfn))))
    hook(mem, pfn, order, gfp, user_addr, zeroed)

def spy_zero(mem, pfn, order, user_addr):
    seen.append(("zero", order, user_addr))
    zero(mem, pfn, order, user_addr)

with booted(16) as mm:
    prep.post_alloc_hook, prep.folio_zero_user, contig.post_alloc_hook = spy_hook, spy_zero, spy_hook
    gfp = GFP_KERNEL | GFP_COMP | GFP_ZERO
    assert contig.alloc_contig_frozen_pages_user(mm, 10, gfp, 0, ADDR) > 0
    assert contig.alloc_contig_frozen_pages_user(mm, 9, gfp, 0, 0) > 0
    assert contig.alloc_contig_frozen_pages(mm, 9, gfp) > 0
    assert contig.alloc_contig_frozen_pages_user(mm, 4, GFP_KERNEL | GFP_ZERO, 0, ADDR) > 0
print(seen)
"""


def test_the_raw_user_address_reaches_the_zeroing_of_a_folio() -> None:
    """Patches 8 and 11: not aligned, 0 is an address; the folio is one before it is zeroed.

    Compiled code cannot be spied on, so this runs in an interpreter without the compiler.
    """
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(
        [sys.executable, "-c", SPY.replace("ADDR", str(ADDR))],
        env={
            **os.environ,
            "NUMBA_DISABLE_JIT": "1",
            "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert eval(child.stdout) == [
        ("hook", 10, ADDR, False, True),
        ("zero", 10, ADDR),
        ("hook", 9, 0, False, True),
        ("zero", 9, 0),
        ("hook", 9, USER_ADDR_NONE, False, True),
        ("hook", 4, USER_ADDR_NONE, False, False),
    ]


# ------------------------------------------------------------------ where the range comes from


def test_a_range_with_a_kernel_page_is_passed_over(mm: MemoryManager) -> None:
    occupy(mm)
    release_blocks(mm, [(512, 8), (1024, 9)])
    mm.mem.mem_map[768:1024].mapping = 0
    assert alloc_contig_frozen_pages(mm, 9, FOLIO) == 1024
    assert alloc_contig_frozen_pages(mm, 9, FOLIO) == NO_PAGE
    assert free_lists(mm.mem) == {(0, 8, MIGRATE_MOVABLE): [512]}
    assert no_isolated_pageblock(mm)
    verify(mm)


def test_parked_pages_are_drained_first(mm: MemoryManager) -> None:
    occupy(mm)
    mm.mem.pcp.high = 4096
    for pfn in range(1024, 1536):
        mm.free_pages(Pfn(pfn))
    assert free_lists(mm.mem) == {}
    assert alloc_contig_frozen_pages(mm, 9, FOLIO) == 1024
    verify(mm)


def test_a_block_that_is_at_the_host_is_not_taken(mm: MemoryManager) -> None:
    """A report is under way: its blocks look free (no reference) and are not."""
    host = FakeHost(mm, capacity=1)
    tried: list[int] = []

    def allocate(entries: list[tuple[int, int]]) -> None:
        for pfn, order in entries:
            assert not alloc_contig_frozen_range(mm, pfn, pfn + (1 << order), GFP_KERNEL)
            tried.append(pfn)

    host.during = allocate
    host.register()
    mm.page_reporting.flush(UINT_MAX)
    assert tried
    assert no_isolated_pageblock(mm)
    assert all(is_marked_zero(mm.mem, pfn) for pfn in tried)
    verify(mm)


def test_a_frozen_run_of_somebody_is_not_taken_again(mm: MemoryManager) -> None:
    first = alloc_contig_frozen_pages(mm, 9, GFP_KERNEL)
    assert not alloc_contig_frozen_range(mm, first, first + 512, GFP_KERNEL)
    assert alloc_contig_frozen_pages(mm, 9, GFP_KERNEL) not in (first, NO_PAGE)
    verify(mm)


def test_cma_pageblocks_are_somebody_elses(boot: Boot) -> None:
    mm = boot(8, cma_pages=1024)
    assert alloc_contig_frozen_pages(mm, 10, FOLIO) == NO_PAGE
    assert not alloc_contig_frozen_range(mm, 1500, 1540, GFP_KERNEL)
    assert no_isolated_pageblock(mm)
    verify(mm)


def test_the_node_comes_first_and_thisnode_is_all(boot: Boot) -> None:
    zones = (ZoneSpec("DMA32", 0, 2048), ZoneSpec("Normal", 2048, 4096, node=1))
    mm = boot(16, zones=zones)
    assert alloc_contig_frozen_pages(mm, 10, FOLIO, 1) == 2048
    assert alloc_contig_frozen_pages(mm, 10, FOLIO, 1) == 3072
    assert alloc_contig_frozen_pages(mm, 10, FOLIO | GFP_THISNODE, 1) == NO_PAGE
    assert alloc_contig_frozen_pages(mm, 9, FOLIO, 1) < 2048
    verify(mm)


def test_a_folio_never_spans_zones(boot: Boot) -> None:
    mm = boot(16, zones=(ZoneSpec("DMA32", 0, 3072), ZoneSpec("Normal", 3072, 4096)))
    assert alloc_contig_frozen_pages(mm, 11, FOLIO) == NO_PAGE
    assert not alloc_contig_frozen_range(mm, 2560, 3584, GFP_KERNEL)
    verify(mm)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("order", "node"), [(-1, 0), (MAX_FOLIO_ORDER + 1, 0), (0, 1), (0, -1)])
def test_there_is_no_such_order_or_node(mm: MemoryManager, order: int, node: int) -> None:
    with pytest.raises(UsageError, match=r"order|node"):
        alloc_contig_frozen_pages(mm, order, FOLIO, node)


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (5, 5), (2047, 2049)])
def test_a_range_must_be_inside_memory(mm: MemoryManager, start: int, end: int) -> None:
    with pytest.raises(UsageError, match="there are no pages"):
        alloc_contig_frozen_range(mm, start, end, GFP_KERNEL)


@pytest.mark.parametrize(("start", "end"), [(1024, 1027), (1025, 1029)])
def test_a_folio_is_aligned_and_a_power_of_two(mm: MemoryManager, start: int, end: int) -> None:
    with pytest.raises(UsageError, match="cannot be one folio"):
        alloc_contig_frozen_range(mm, start, end, FOLIO)


def test_a_folio_is_freed_whole(mm: MemoryManager) -> None:
    pfn = alloc_contig_frozen_pages(mm, 9, FOLIO)
    for page, order in ((pfn, 8), (pfn + 1, 0), (mm.nr_pages - 1, 9)):
        with pytest.raises(UsageError, match=r"does not head a folio|there is no run"):
            free_contig_frozen_range(mm, page, order)
    free_contig_frozen_range(mm, pfn, 9)
    verify(mm)


def test_movable_pages_may_be_asked_for_by_their_flags(mm: MemoryManager) -> None:
    """The other flags of a caller do not matter here: hugetlb passes GFP_HIGHUSER_MOVABLE."""
    pfn = alloc_contig_frozen_pages(mm, 9, GFP_HIGHUSER_MOVABLE | GFP_COMP | GFP_ZERO)
    owned(mm, pfn, 9, compound=True)
    verify(mm)


def test_a_large_zeroed_block_for_a_user_must_be_a_folio_first() -> None:
    """Patch 11: without the compound metadata post_alloc_hook refuses to zero by folio."""
    with booted(8) as mm:
        pfns, _ = one_isolated_block(mm)
        contig.prep_contig_folio(mm.mem, pfns, 1, 4, FOLIO | GFP_ZERO, ADDR)
        assert reads_zero(mm, 1024, 4)
        mm.mem.mem_map[1024].flags_f &= ~PG_head
        with pytest.raises(VmBug, match="without __GFP_COMP"):
            contig.prep_contig_folio(mm.mem, pfns, 1, 4, GFP_KERNEL | GFP_ZERO, ADDR)
