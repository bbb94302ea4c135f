# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, Process
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE
from hostzero.mm.migrate_folio import (
    MIGRATED_FLAGS,
    folio_isolate,
    folio_putback,
    folio_was_freed,
    free_unused_target,
    migrate_folio,
)
from hostzero.mm.mmap import MADV_DONTNEED
from hostzero.mm.page_flags import (
    PG_dirty,
    PG_hwpoison,
    PG_locked,
    PG_mlocked,
    PG_private,
    PG_referenced,
    PG_reserved,
    PG_writeback,
    PGTY_hugetlb,
    PGTY_offline,
)
from hostzero.units import PAGE_SIZE
from tests.mm.guest import dirty_free_memory, is_marked_zero, page_bytes
from tests.mm.migration import check, target
from tests.mm.processes import HUGE, free_pages, is_huge, mapped, pages, pfn_at


@pytest.fixture
def process(mm: MemoryManager) -> Process:
    """A process of a guest whose free memory is dirty."""
    dirty_free_memory(mm)
    return mm.spawn()


def page_of(mm: MemoryManager, process: Process, length: int = PAGE_SIZE) -> tuple[int, int]:
    """Map memory with contents; return its address and the head of its folio."""
    addr = process.mmap(length)
    process.touch(addr, length)
    pfn = pfn_at(mm, process, addr)
    assert pfn is not None
    page_bytes(mm, pfn, length >> 12)[:] = np.arange(length, dtype=np.uint32).view(np.uint8)[:length]
    return addr, pfn


@pytest.mark.parametrize(("length", "order"), [(PAGE_SIZE, 0), (HUGE, 9)], ids=["small", "huge"])
def test_contents_owner_and_references_move(
    mm: MemoryManager, process: Process, length: int, order: int
) -> None:
    addr, pfn = page_of(mm, process, length)
    before = bytes(mapped(mm, process, addr, length))
    old = mm.mem.mem_map[pfn].copy()
    free = free_pages(mm)
    assert folio_isolate(mm.mem, pfn)
    new = target(mm, order)
    assert migrate_folio(mm.mem, new, pfn, 0)
    assert pfn_at(mm, process, addr) == new != pfn
    assert is_huge(mm, process, addr) == (order == 9)
    assert bytes(mapped(mm, process, addr, length)) == before
    page = mm.mem.mem_map[new]
    for field in ("mapping", "index", "_refcount", "_mapcount", "order"):
        assert page[field] == old[field], field
    assert free_pages(mm) == free
    check(mm)
    process.exit()
    check(mm)


def test_the_old_page_is_freed_as_unknown(mm: MemoryManager, process: Process) -> None:
    """It held an owner's bytes: neither a mark of an earlier life nor a new one may be on it."""
    _, pfn = page_of(mm, process)
    assert folio_isolate(mm.mem, pfn)
    assert migrate_folio(mm.mem, target(mm, 0), pfn, 0)
    assert mm.mem.mem_map[pfn]._refcount == 0
    assert not is_marked_zero(mm.mem, pfn)
    assert page_bytes(mm, pfn).any()


def test_flags_and_charge_move(mm: MemoryManager, process: Process) -> None:
    process.memcg = memcg = mm.memcg.create(None)
    _, pfn = page_of(mm, process)
    mm.mem.mem_map[pfn].flags_f |= PG_referenced | PG_dirty | PG_mlocked
    assert folio_isolate(mm.mem, pfn)
    new = target(mm, 0)
    assert migrate_folio(mm.mem, new, pfn, 0)
    assert int(mm.mem.mem_map[new].flags_f) & MIGRATED_FLAGS == PG_referenced | PG_dirty | PG_mlocked
    assert mm.mem.mem_map[new].memcg_data == memcg + 1
    assert mm.mem.mem_map[pfn].memcg_data == 0
    check(mm)  # the old page had nothing on it that would make it bad
    mm.mem.mem_map[new].flags_f &= ~MIGRATED_FLAGS
    process.exit()
    assert mm.memcg.usage_bytes(memcg) == 0
    check(mm)


def test_an_isolated_folio_cannot_be_isolated_again(mm: MemoryManager, process: Process) -> None:
    _, pfn = page_of(mm, process)
    assert folio_isolate(mm.mem, pfn)
    assert not folio_isolate(mm.mem, pfn)
    folio_putback(mm.mem, pfn, 0)
    assert folio_isolate(mm.mem, pfn)
    folio_putback(mm.mem, pfn, 0)
    assert mm.mem.mem_map[pfn]._refcount == 1


@pytest.mark.parametrize("flag", [PG_locked, PG_writeback, PG_reserved, PG_hwpoison, PG_private])
def test_pages_at_work_or_broken_stay(mm: MemoryManager, process: Process, flag: int) -> None:
    """PG_private as well: on the new page the bit would claim that it is zero."""
    _, pfn = page_of(mm, process)
    mm.mem.mem_map[pfn].flags_f |= flag
    assert not folio_isolate(mm.mem, pfn)
    assert mm.mem.mem_map[pfn]._refcount == 1


@pytest.mark.parametrize("page_type", [PGTY_hugetlb, PGTY_offline])
def test_typed_pages_are_no_anonymous_folios(mm: MemoryManager, process: Process, page_type: int) -> None:
    _, pfn = page_of(mm, process)
    mm.mem.mem_map[pfn].page_type = page_type
    assert not folio_isolate(mm.mem, pfn)


def test_a_huge_page_with_a_broken_part_stays(mm: MemoryManager, process: Process) -> None:
    _, head = page_of(mm, process, HUGE)
    mm.mem.mem_map[head + 300].flags_f |= PG_hwpoison
    assert not folio_isolate(mm.mem, head)
    mm.mem.mem_map[head + 300].flags_f &= ~PG_hwpoison
    assert not folio_isolate(mm.mem, head + 300), "a tail is not a folio"
    assert folio_isolate(mm.mem, head)


def test_a_pinned_page_stays(mm: MemoryManager, process: Process) -> None:
    """More references than mappings: a device may be writing to the page where it is."""
    addr, pfn = page_of(mm, process)
    mm.mem.mem_map[pfn]._refcount += 1
    assert not folio_isolate(mm.mem, pfn)
    mm.mem.mem_map[pfn]._refcount -= 1
    assert folio_isolate(mm.mem, pfn)
    mm.mem.mem_map[pfn]._refcount += 1  # pinned after it was isolated
    new = target(mm, 0)
    assert not migrate_folio(mm.mem, new, pfn, 0)
    assert pfn_at(mm, process, addr) == pfn
    assert mm.mem.mem_map[new]._refcount == 0
    free_unused_target(mm.mem, new, 0, 0)
    mm.mem.mem_map[pfn]._refcount -= 1
    folio_putback(mm.mem, pfn, 0)
    check(mm)


def test_a_folio_that_its_owner_dropped_meanwhile_is_freed_by_the_putback(
    mm: MemoryManager, process: Process
) -> None:
    addr, pfn = page_of(mm, process)
    free = free_pages(mm)
    assert folio_isolate(mm.mem, pfn)
    assert not folio_was_freed(mm.mem, pfn)
    process.madvise(addr, PAGE_SIZE, MADV_DONTNEED)
    assert free_pages(mm) == free
    assert folio_was_freed(mm.mem, pfn)
    new = target(mm, 0)
    assert not migrate_folio(mm.mem, new, pfn, 0), "nobody is left to move it for"
    free_unused_target(mm.mem, new, 0, 0)
    folio_putback(mm.mem, pfn, 0)
    assert free_pages(mm) == free + 1
    check(mm)


def test_a_target_with_a_zero_hint_is_refused(mm: MemoryManager, process: Process) -> None:
    """Kept, the bit would be the new owner's PG_private, and the page bad when it is freed."""
    _, pfn = page_of(mm, process)
    assert folio_isolate(mm.mem, pfn)
    new = target(mm, 0)
    mm.mem.mem_map[new].flags_f |= PG_private
    with pytest.raises(VmBug, match="zero hint"):
        migrate_folio(mm.mem, new, pfn, 0)


def test_a_target_of_another_order_or_with_references_is_refused(mm: MemoryManager, process: Process) -> None:
    _, pfn = page_of(mm, process)
    assert folio_isolate(mm.mem, pfn)
    for new in (target(mm, 1), int(mm.alloc_pages(GFP_HIGHUSER_MOVABLE))):
        with pytest.raises(VmBug, match="not a frozen folio of the same order"):
            migrate_folio(mm.mem, new, pfn, 0)


def test_an_unused_target_goes_back_as_unknown(mm: MemoryManager, process: Process) -> None:
    """It may have been zero before, but who took it dropped the hint."""
    new = int(mm.alloc_pages(GFP_HIGHUSER_MOVABLE))
    page_bytes(mm, new)[:] = 0
    mm.put_page_zeroed(pages(new)[0])
    assert is_marked_zero(mm.mem, new)
    again = target(mm, 0)
    assert again == new
    assert not is_marked_zero(mm.mem, new)
    free_unused_target(mm.mem, new, 0, 0)
    assert not is_marked_zero(mm.mem, new)
    check(mm)
