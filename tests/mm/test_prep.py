# SPDX-License-Identifier: GPL-2.0-only
"""The way in and the way out of the free lists: what is cleared, checked, written and skipped."""

from __future__ import annotations

from itertools import product

import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager
from hostzero.mm.buddy import FPI_NONE, FPI_ZEROED
from hostzero.mm.gfp import __GFP_SKIP_ZERO, GFP_COMP, GFP_KERNEL, GFP_ZERO, USER_ADDR_NONE
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import (
    PG_active,
    PG_dirty,
    PG_head,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_private,
    PG_reserved,
    PG_uptodate,
    compound_head,
)
from hostzero.mm.page_free import put_page
from hostzero.mm.prep import (
    fpi_zeroed_holds,
    free_tail_pages_prepare,
    overwrite_freed_pages,
    zero_new_pages,
)
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import (
    dirty,
    dirty_free_memory,
    free_lists,
    is_marked_zero,
    page_bytes,
    pcp_lists,
    reads_zero,
    verify,
)


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """The smallest guest that boots."""
    return boot(4)


def flags(mm: MemoryManager, pfn: int) -> int:
    return int(mm.mem.mem_map[pfn].flags_f)


def free_as_zero(mm: MemoryManager, pfn: int, order: int) -> None:
    mm.mem.mem_map[pfn]._refcount = 0
    mm.free_frozen_pages_zeroed(Pfn(pfn), order)


CONFIGS = [
    {"debug_vm": debug, "init_on_alloc": alloc, "init_on_free": free, "page_poisoning": poison}
    for debug, alloc, free, poison in product([True, False], repeat=4)
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: "+".join(k for k, v in config.items() if v) or "none"
)
@pytest.mark.parametrize("order", [0, 2, 5])
def test_life_of_a_block_under_every_configuration(boot: Boot, config: dict[str, bool], order: int) -> None:
    """Written and freed, freed as zero, allocated again: never non-zero where zero was promised.

    Poisoning is exclusive with init_on_alloc and init_on_free, and wins.
    """
    mm = boot(4, **config)
    poison = config["page_poisoning"]
    init_on_free = config["init_on_free"] and not poison
    init_on_alloc = config["init_on_alloc"] and not poison and not init_on_free
    size = PAGE_SIZE << order

    # An ordinary owner writes and frees: the mark is never set, whatever the bytes are.
    first = mm.alloc_pages(GFP_KERNEL, order)
    dirty(mm, first, order)
    mm.free_pages(first, order)
    assert not is_marked_zero(mm.mem, first)
    assert reads_zero(mm, first, order) == init_on_free
    if poison:
        assert (page_bytes(mm, first, 1 << order) == 0xAA).all()
    verify(mm)

    # The next one does not ask for zeros.
    mm.drain_all_pages()
    before = mm.vm_stats()
    again = mm.alloc_pages(GFP_KERNEL, order)
    assert again == first
    assert mm.vm_stats().zeroed_bytes - before.zeroed_bytes == (size if init_on_alloc else 0)
    assert reads_zero(mm, again, order) == (init_on_alloc or init_on_free)

    # It frees the block as zero: the mark is set unless poisoning has overwritten it.
    page_bytes(mm, again, 1 << order)[:] = 0
    before = mm.vm_stats()
    free_as_zero(mm, again, order)
    if order < 4:
        assert is_marked_zero(mm.mem, again) == (not poison)
        assert mm.vm_stats().zeroed_bytes == before.zeroed_bytes
    verify(mm)

    # Whoever wants zeros gets them, without work exactly if they were known to be there.
    before = mm.vm_stats()
    zeroed = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, order)
    assert reads_zero(mm, zeroed, order)
    assert flags(mm, zeroed) == 0
    if order < 4:
        assert zeroed == again
        after = mm.vm_stats()
        assert after.zeroed_bytes - before.zeroed_bytes == (size if poison else 0)
        known = not (poison or init_on_free)
        assert after.known_zero_bytes - before.known_zero_bytes == (size if known else 0)
        assert after.dropped_hint_bytes - before.dropped_hint_bytes == (size if init_on_free else 0)
    assert mm.vm_stats().bad_pages == 0
    assert mm.vm_stats().poison_errors == 0
    mm.free_pages(zeroed, order)
    verify(mm)


@pytest.mark.parametrize("config", [{}, {"init_on_alloc": True}])
def test_a_hint_is_dropped_if_nobody_wanted_zeros(boot: Boot, config: dict[str, bool]) -> None:
    mm = boot(4, **config)
    pfn = mm.alloc_pages(GFP_KERNEL)
    page_bytes(mm, pfn)[:] = 0
    free_as_zero(mm, pfn, 0)
    assert mm.alloc_pages(GFP_KERNEL) == pfn
    stats = mm.vm_stats()
    assert (stats.known_zero_bytes, stats.dropped_hint_bytes) == (
        (PAGE_SIZE, 0) if config else (0, PAGE_SIZE)
    )
    assert flags(mm, pfn) == 0


@pytest.mark.parametrize("config", [{"debug_vm": False}])
@pytest.mark.parametrize(("order", "page"), [(0, 0), (2, 0), (2, 3), (5, 0), (5, 17)])
@pytest.mark.parametrize("compound", [0, GFP_COMP])
def test_a_filesystems_private_flag_never_becomes_a_zero_claim(
    boot: Boot, config: dict[str, bool], order: int, page: int, compound: int
) -> None:
    """Head and tails: prepare clears the alias before the page can be on a list."""
    mm = boot(4, **config)
    pfn = mm.alloc_pages(GFP_KERNEL | compound, order)
    dirty(mm, pfn, order)
    mm.mem.mem_map[pfn + page].flags_f |= PG_private
    mm.free_pages(pfn, order)
    assert not any(is_marked_zero(mm.mem, pfn + i) for i in range(1 << order))
    verify(mm)
    zeroed = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, order)
    assert reads_zero(mm, zeroed, order)


def test_prepare_clears_a_stale_mark_before_the_caller_sets_its_own(boot: Boot) -> None:
    """FPI_ZEROED takes effect after prepare (patch 33): else prepare would wipe it."""
    mm = boot(4, debug_vm=False)
    for order in (0, 4):
        pfn = mm.alloc_pages(GFP_KERNEL, order)
        page_bytes(mm, pfn, 1 << order)[:] = 0
        mm.mem.mem_map[pfn].flags_f |= PG_private | PG_uptodate | PG_dirty
        before = {key: list(blocks) for key, blocks in free_lists(mm.mem).items()}
        buddy_free = any(pfn ^ (1 << order) in blocks for (_, o, _), blocks in before.items() if o == order)
        free_as_zero(mm, pfn, order)
        if order == 0 or not buddy_free:
            assert flags(mm, pfn) == PG_private
        verify(mm)


@pytest.mark.parametrize("flag", [PG_private, PG_lru, PG_locked, PG_active, PG_reserved])
@pytest.mark.parametrize(("order", "page"), [(0, 0), (2, 2)])
def test_a_page_freed_with_an_owners_flag_is_bad(mm: MemoryManager, flag: int, order: int, page: int) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, order)
    mm.mem.mem_map[pfn + page].flags_f |= flag
    mm.free_pages(pfn, order)
    assert mm.vm_stats().bad_pages == 1
    assert int(mm.mem.vm[0].bug_pfn) == pfn + page
    assert all(pfn not in blocks for blocks in [*free_lists(mm.mem).values(), *pcp_lists(mm.mem).values()])


def test_flags_that_an_owner_may_leave_are_cleared(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 1)
    for page in (pfn, pfn + 1):
        mm.mem.mem_map[page].flags_f |= PG_dirty | PG_uptodate
    mm.mem.mem_map[pfn].private = 99
    mm.mem.mem_map[pfn].mapping = 3
    mm.free_pages(pfn, 1)
    assert (flags(mm, pfn), flags(mm, pfn + 1)) == (0, 0)
    assert (int(mm.mem.mem_map[pfn].private), int(mm.mem.mem_map[pfn].mapping)) == (0, 0)
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


@pytest.mark.parametrize("field", ["_mapcount", "_refcount", "mapping", "page_type"])
def test_a_tail_that_is_still_in_use_is_bad(mm: MemoryManager, field: str) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 2)
    mm.mem.mem_map[field][pfn + 1] = 5
    mm.free_pages(pfn, 2)
    assert mm.vm_stats().bad_pages == 1


def test_checks_are_off_unless_something_turns_them_on(boot: Boot) -> None:
    mm = boot(4, debug_vm=False)
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.mem.mem_map[pfn].flags_f |= PG_locked
    mm.free_pages(pfn)
    assert mm.vm_stats().bad_pages == 0
    assert flags(mm, pfn) == 0


@pytest.mark.parametrize(
    "config", [{"init_on_alloc": True}, {"init_on_free": True}, {"page_poisoning": True}]
)
def test_hardening_turns_the_page_checks_on(boot: Boot, config: dict[str, bool]) -> None:
    mm = boot(4, debug_vm=False, **config)
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.mem.mem_map[pfn].flags_f |= PG_locked
    mm.free_pages(pfn)
    assert mm.vm_stats().bad_pages == 1


@pytest.mark.parametrize("debug", [True, False])
def test_broken_memory_is_never_used_again(boot: Boot, debug: bool) -> None:
    mm = boot(4, debug_vm=debug)
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.mem.mem_map[pfn].flags_f |= PG_hwpoison | PG_private
    mm.free_pages(pfn)
    mm.drain_all_pages()
    assert all(
        pfn not in range(b, b + (1 << o)) for (_, o, _), blocks in free_lists(mm.mem).items() for b in blocks
    )
    assert flags(mm, pfn) == PG_hwpoison
    verify(mm)


@pytest.mark.parametrize(("init_on_free", "zero"), [(0, False), (1, True)])
def test_a_page_freed_as_zero_is_zeroed_again_after_poison_was_written(
    mm: MemoryManager, init_on_free: int, zero: bool
) -> None:
    """Patch 34 must not skip then. The two exclude each other at boot; the rule must not rest on that."""
    vm = mm.mem.vm[0]
    vm.page_poisoning, vm.init_on_free = 1, init_on_free
    pfn = mm.alloc_pages(GFP_KERNEL, 1)
    overwrite_freed_pages(mm.mem, pfn, 1, FPI_ZEROED)
    assert reads_zero(mm, pfn, 1) == zero
    assert fpi_zeroed_holds(mm.mem, FPI_ZEROED) == zero
    assert (page_bytes(mm, pfn) == (0 if zero else 0xAA)).all()


@pytest.mark.parametrize(("fpi", "zeroed"), [(FPI_ZEROED, 0), (FPI_NONE, 2 * PAGE_SIZE)])
def test_init_on_free_does_not_zero_what_is_freed_as_zero(boot: Boot, fpi: int, zeroed: int) -> None:
    mm = boot(4, init_on_free=True)
    pfn = mm.alloc_pages(GFP_KERNEL, 1)
    overwrite_freed_pages(mm.mem, pfn, 1, fpi)
    assert mm.vm_stats().zeroed_bytes == zeroed


@pytest.mark.parametrize("poisoning", [0, 1])
@pytest.mark.parametrize("init_on_free", [0, 1])
def test_a_zero_free_holds_unless_only_poison_was_written(
    mm: MemoryManager, poisoning: int, init_on_free: int
) -> None:
    vm = mm.mem.vm[0]
    vm.page_poisoning, vm.init_on_free = poisoning, init_on_free
    assert fpi_zeroed_holds(mm.mem, FPI_ZEROED) == (not poisoning or bool(init_on_free))
    assert not fpi_zeroed_holds(mm.mem, FPI_NONE)


def test_poison_that_somebody_wrote_over_is_counted(boot: Boot) -> None:
    mm = boot(4, page_poisoning=True)
    pfn = mm.alloc_pages(GFP_KERNEL, 1)
    mm.free_pages(pfn, 1)
    page_bytes(mm, pfn + 1)[4095] = 0xAB
    assert mm.alloc_pages(GFP_KERNEL, 1) == pfn
    assert mm.vm_stats().poison_errors == 1


@pytest.mark.parametrize("order", [1, 3, 5])
def test_a_compound_page_leads_from_each_tail_to_its_head(mm: MemoryManager, order: int) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, order)
    assert flags(mm, pfn) == PG_head
    assert int(mm.mem.mem_map[pfn].order) == order
    assert {compound_head(mm.mem, pfn + page) for page in range(1 << order)} == {pfn}
    mm.free_pages(pfn, order)
    assert [compound_head(mm.mem, pfn + page) for page in range(1 << order)] == [
        pfn + page for page in range(1 << order)
    ]
    assert int(mm.mem.mem_map[pfn].order) == 0
    verify(mm)


def test_order_0_is_never_compound(mm: MemoryManager) -> None:
    assert flags(mm, mm.alloc_pages(GFP_KERNEL | GFP_COMP)) == 0


def test_a_tail_of_another_folio_is_bad(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 2)
    mm.mem.compound_head[pfn + 2] = 0
    mm.free_pages(pfn, 2)
    assert mm.vm_stats().bad_pages == 1


def test_a_compound_page_must_be_freed_with_its_order(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 3)
    with pytest.raises(VmBug, match="freed with another order"):
        free_tail_pages_prepare(mm.mem, pfn, 2, True)


@pytest.mark.parametrize("order", [1, 4, 9])
@pytest.mark.parametrize("user_addr", [0, 0x7F00_0000_3000, USER_ADDR_NONE])
def test_all_of_a_folio_is_zeroed_at_any_user_address(boot: Boot, order: int, user_addr: int) -> None:
    """The metadata must be there before the hook (patch 11); 0 is an address like any other (patch 7)."""
    mm = boot(8)
    dirty_free_memory(mm)
    pfn = alloc_pages(mm.mem, GFP_KERNEL | GFP_ZERO | GFP_COMP, order, user_addr, 0, 0)
    assert reads_zero(mm, pfn, order)


@pytest.mark.parametrize("user_addr", [0, 0x1000])
def test_a_large_zeroed_user_page_must_be_a_folio(mm: MemoryManager, user_addr: int) -> None:
    """v8 warns once; a debug build stops. Address 0 counts as a user address."""
    with pytest.raises(VmBug, match="order > 0 without __GFP_COMP"):
        alloc_pages(mm.mem, GFP_KERNEL | GFP_ZERO, 2, user_addr, 0, 0)


def test_blocks_that_are_no_folios_are_cleared_plainly(mm: MemoryManager) -> None:
    dirty_free_memory(mm)
    assert reads_zero(mm, alloc_pages(mm.mem, GFP_KERNEL | GFP_ZERO, 2, USER_ADDR_NONE, 0, 0), 2)
    mm.mem.vm[0].init_on_alloc = 1
    assert reads_zero(mm, alloc_pages(mm.mem, GFP_KERNEL, 2, 0x1000, 0, 0), 2)


def test_zeroing_is_counted_in_bytes(mm: MemoryManager) -> None:
    before = mm.vm_stats().zeroed_bytes
    pfn = mm.alloc_pages(GFP_KERNEL, 3)
    zero_new_pages(mm.mem, pfn, 3, GFP_KERNEL, USER_ADDR_NONE)
    assert mm.vm_stats().zeroed_bytes - before == 8 * PAGE_SIZE


def test_a_caller_that_zeroes_tags_itself_is_left_alone(boot: Boot) -> None:
    mm = boot(4, init_on_alloc=True)
    dirty_free_memory(mm)
    assert not reads_zero(mm, mm.alloc_pages(GFP_KERNEL | GFP_ZERO | __GFP_SKIP_ZERO))


def test_pages_are_counted_in_and_out(mm: MemoryManager) -> None:
    before = mm.vm_stats()
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_COMP, 4)
    assert mm.vm_stats().pgalloc - before.pgalloc == 16
    assert put_page(mm.mem, pfn, 0)
    assert mm.vm_stats().pgfree - before.pgfree == 16
