# SPDX-License-Identifier: GPL-2.0-only
"""`MmConfig.placement`: who gets which block, what it must leave alone, and that off is off."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import MIGRATE_MOVABLE, MIGRATE_UNMOVABLE, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER
from hostzero.mm.placement import __rmqueue_fitting as rmqueue_fitting
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import (
    booted,
    dirty,
    dirty_free_memory,
    free_lists,
    is_marked_zero,
    pcp_lists,
    reads_zero,
    verify,
)

ZEROS = GFP_HIGHUSER_MOVABLE | GFP_ZERO
NO_ZEROS = GFP_HIGHUSER_MOVABLE


def small_blocks(mm: MemoryManager, zeroed: int, other: int, *, order: int = 0) -> tuple[set[int], set[int]]:
    """Leave blocks of `order` free whose buddies are not: so many known to be zero, so many not.

    Nothing else below the pageblock is free in movable lists, and nothing is parked.
    """
    for at in reversed(range(PAGEBLOCK_ORDER)):
        mm.alloc_pages_bulk(NO_ZEROS, len(free_lists(mm.mem).get((0, at, MIGRATE_MOVABLE), ())), order=at)
        mm.drain_all_pages()
    whole = mm.alloc_pages(NO_ZEROS, PAGEBLOCK_ORDER)
    # Split by hand into blocks with an owner each, as the kernel's split_page.
    mm.mem.mem_map["_refcount"][whole : whole + PAGEBLOCK_NR_PAGES : 1 << order] = 1
    firsts = range(whole, whole + PAGEBLOCK_NR_PAGES, 2 << order)
    clean, rest = set(firsts[:zeroed]), set(firsts[zeroed : zeroed + other])
    for pfn in sorted(clean):
        mm.ram_bytes[pfn << 12 : (pfn + (1 << order)) << 12] = 0
        mm.mem.mem_map[pfn]._refcount = 0
        mm.free_frozen_pages_zeroed(Pfn(pfn), order)
    for pfn in sorted(rest):
        dirty(mm, pfn, order)
        mm.free_pages(Pfn(pfn), order)
    mm.drain_all_pages()
    assert set(free_lists(mm.mem)[0, order, MIGRATE_MOVABLE]) == clean | rest
    return clean, rest


@pytest.fixture
def aware(boot: Boot) -> MemoryManager:
    return boot(8, placement="zero-aware")


# ------------------------------------------------------------------ who gets what


@pytest.mark.parametrize("zeroed_first", [True, False])
def test_each_request_gets_its_kind_until_that_is_used_up(aware: MemoryManager, zeroed_first: bool) -> None:
    clean, rest = small_blocks(aware, 5, 5)
    requests = [ZEROS, NO_ZEROS] if zeroed_first else [NO_ZEROS, ZEROS]
    got = {gfp: {aware.alloc_pages(gfp) for _ in range(5)} for gfp in requests}
    assert got == {ZEROS: clean, NO_ZEROS: rest}
    assert all(reads_zero(aware, pfn) for pfn in clean)
    assert not any(is_marked_zero(aware.mem, pfn) for pfn in clean | rest)
    verify(aware)


def test_linux_takes_what_the_list_begins_with(boot: Boot) -> None:
    """The same requests without the option: the order of the list decides, not what is wanted."""
    mm = boot(8)
    clean, rest = small_blocks(mm, 5, 5)
    line = free_lists(mm.mem)[0, 0, MIGRATE_MOVABLE]
    assert set(line[:5]) == rest
    assert [mm.alloc_pages(ZEROS) for _ in range(5)] == line[:5]
    assert {mm.alloc_pages(NO_ZEROS) for _ in range(5)} == clean
    verify(mm)


@pytest.mark.parametrize("gfp", [ZEROS, NO_ZEROS])
def test_a_request_takes_the_other_kind_before_it_breaks_a_pageblock(aware: MemoryManager, gfp: int) -> None:
    clean, rest = small_blocks(aware, 4, 4)
    huge = [(key, len(blocks)) for key, blocks in free_lists(aware.mem).items() if key[1] >= PAGEBLOCK_ORDER]
    assert {aware.alloc_pages(gfp) for _ in range(8)} == clean | rest
    aware.drain_all_pages()
    after = [(key, len(blocks)) for key, blocks in free_lists(aware.mem).items() if key[1] >= PAGEBLOCK_ORDER]
    assert after == huge
    verify(aware)


def test_a_zero_request_leaves_whole_zero_pageblocks_alone(aware: MemoryManager) -> None:
    """A known-zero block of pageblock order is not broken while anything smaller is free."""
    whole = aware.alloc_pages(NO_ZEROS, PAGEBLOCK_ORDER)
    aware.ram_bytes[whole << 12 : (whole + PAGEBLOCK_NR_PAGES) << 12] = 0
    _, rest = small_blocks(aware, 0, 3)
    aware.mem.mem_map[whole]._refcount = 0
    aware.free_frozen_pages_zeroed(whole, PAGEBLOCK_ORDER)
    aware.drain_all_pages()
    assert {aware.alloc_pages(ZEROS) for _ in range(3)} == rest
    assert rmqueue_fitting(aware.mem, 0, 0, MIGRATE_MOVABLE, True) == -1
    verify(aware)


def test_a_larger_fitting_block_is_split_and_its_parts_keep_their_mark(aware: MemoryManager) -> None:
    """A zero request cuts a zero block of order 3 although a single page is free that is not zero."""
    (block,), _ = small_blocks(aware, 1, 0, order=3)
    single = Pfn(block + 16)  # held since the pageblock was split, by eights: free one page of it
    aware.mem.mem_map["_refcount"][single : single + 8] = 1
    aware.free_pages(single)
    aware.drain_all_pages()
    got = aware.alloc_pages(ZEROS)
    assert block <= got < block + 8
    aware.drain_all_pages()
    parts = [
        pfn
        for (_, order, kind), blocks in free_lists(aware.mem).items()
        if order < 3 and kind == MIGRATE_MOVABLE
        for pfn in blocks
        if block <= pfn < block + 8
    ]
    assert parts
    assert all(is_marked_zero(aware.mem, pfn) for pfn in parts)
    verify(aware)


def test_init_on_alloc_wants_zeros_for_everyone(boot: Boot) -> None:
    mm = boot(8, placement="zero-aware", init_on_alloc=True)
    clean, _ = small_blocks(mm, 4, 4)
    assert {mm.alloc_pages(NO_ZEROS) for _ in range(4)} == clean
    verify(mm)


# ------------------------------------------------------------------ what it leaves alone


def test_other_migrate_types_are_not_looked_at(aware: MemoryManager) -> None:
    """Kernel requests want no zeros; the movable blocks that would fit stay where they are."""
    small_blocks(aware, 0, 6)
    kernel = aware.alloc_pages(GFP_KERNEL)
    assert aware.mem.pageblock[kernel >> PAGEBLOCK_ORDER] == MIGRATE_UNMOVABLE
    assert len(free_lists(aware.mem)[0, 0, MIGRATE_MOVABLE]) == 6
    verify(aware)


def test_cma_balance_comes_before_the_kind(boot: Boot) -> None:
    """Once most free memory is CMA, movable requests go there, whatever fits elsewhere."""
    mm = boot(16, placement="zero-aware", cma_pages=4 << 8)
    cma = int(mm.mem.vm[0].nr_pages) - (4 << 8)
    small_blocks(mm, 0, 1, order=4)
    while mm.mem.zone[0].nr_free_cma <= mm.mem.zone[0].nr_free_pages // 2:
        mm.alloc_pages(GFP_KERNEL, PAGEBLOCK_ORDER)
    assert all(mm.alloc_pages(gfp) >= cma for gfp in (ZEROS, NO_ZEROS) * 3)
    assert mm.alloc_pages(NO_ZEROS, 4) >= cma  # not through a per-CPU list
    verify(mm)


def test_a_batch_fetched_for_its_kind_never_fills_the_lists(aware: MemoryManager) -> None:
    """At one batch below `high`, a request takes the parked page that does not fit."""
    small_blocks(aware, 100, 0)
    pcp = aware.mem.pcp[0]
    held = aware.alloc_pages_bulk(NO_ZEROS | GFP_ZERO, int(pcp.batch))
    aware.free_pages_bulk(held)  # dirty as far as anybody knows
    pcp.high = int(pcp["count"]) + int(pcp.batch)
    assert not is_marked_zero(aware.mem, (page := aware.alloc_pages(ZEROS)))
    assert page in held
    assert int(pcp["count"]) == len(held) - 1
    verify(aware)


def test_a_parked_page_of_the_kind_is_preferred_to_a_hotter_one(aware: MemoryManager) -> None:
    """The list of the CPU is looked at from both ends."""
    zero, other = (aware.alloc_pages(NO_ZEROS) for _ in range(2))
    aware.drain_all_pages()
    aware.ram_bytes[zero << 12 : (zero + 1) << 12] = 0
    aware.mem.mem_map[zero]._refcount = 0
    aware.free_frozen_pages_zeroed(zero)
    aware.free_pages(other)
    assert pcp_lists(aware.mem)[0, MIGRATE_MOVABLE] == [other, zero]
    assert aware.alloc_pages(ZEROS) == zero
    assert aware.alloc_pages(NO_ZEROS) == other
    verify(aware)


# ------------------------------------------------------------------ any sequence


def play(mm: MemoryManager, seed: int, steps: int, *, tell: bool = True) -> list[int]:
    """Play a random history and return every page number that it gave.

    `tell` False frees the same pages, zero as they are, without saying so.
    """
    rng = random.Random(seed)
    held: list[tuple[Pfn, int]] = []
    told: list[int] = []
    for _ in range(steps):
        if held and rng.random() < 0.45:
            pfn, order = held.pop(rng.randrange(len(held)))
            zero = rng.random() < 0.5
            dirty(mm, pfn, order, value=0 if zero else 0x5A)
            if zero and tell:
                mm.mem.mem_map[pfn]._refcount = 0
                mm.free_frozen_pages_zeroed(pfn, order)
            else:
                mm.free_pages(pfn, order)
        else:
            order = rng.choice((0, 0, 0, 0, 1, 3, 4))
            gfp = rng.choice((ZEROS, NO_ZEROS, GFP_KERNEL, GFP_KERNEL | GFP_ZERO))
            pfn = mm.alloc_pages(gfp, order)
            assert not gfp & GFP_ZERO or reads_zero(mm, pfn, order)
            held.append((pfn, order))
            told.append(pfn)
        if rng.random() < 0.05:
            mm.drain_all_pages()
    return told


@given(seed=st.integers(0, 1 << 32))
def test_every_claim_stays_true_and_zeros_are_zeros(seed: int) -> None:
    with booted(8, placement="zero-aware") as mm:
        dirty_free_memory(mm)
        play(mm, seed, 120)
        verify(mm)


@given(seed=st.integers(0, 1 << 32))
def test_with_the_option_off_marks_decide_nothing(seed: int) -> None:
    """The same history gives the same pages, whether the allocator is told of zeros or not.

    That these are Linux's pages is what `test_twin` checks.
    """
    histories = []
    for tell in (True, False):
        with booted(8) as mm:
            histories.append(play(mm, seed, 150, tell=tell))
    assert histories[0] == histories[1]


def test_with_the_option_on_marks_do_decide() -> None:
    """The counter-test: the history above can tell the two apart."""
    histories = []
    for tell in (True, False):
        with booted(8, placement="zero-aware") as mm:
            histories.append(play(mm, 1, 150, tell=tell))
    assert histories[0] != histories[1]


def test_off_is_what_a_guest_has_by_default(boot: Boot) -> None:
    assert boot(8).mem.vm[0].placement == 0
    assert np.all(boot(8).mem.pcp.fitting_misses == 0)
