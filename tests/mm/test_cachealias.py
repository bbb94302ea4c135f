# SPDX-License-Identifier: GPL-2.0-only
"""Machines whose caches alias: no user sees a stale line, no line destroys what a user wrote.

`evict_all` is the adversary: a cache may write its lines back at any time.
"""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, Process
from hostzero.mm.cachealias import evict, evict_all, flush_dcache_folio, has_kernel_lines
from hostzero.mm.clear_page import (
    clear_kernel_pages,
    folio_zero_user,
    kernel_poison_pages,
    kernel_unpoison_pages,
)
from hostzero.mm.gfp import (
    __GFP_SKIP_ZERO,
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_ZERO,
    USER_ADDR_NONE,
)
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MAP_FIXED, MAP_UNINITIALIZED
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import PG_zeroed
from hostzero.mm.page_free import free_frozen_pages_zeroed
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import (
    dirty,
    dirty_free_memory,
    free_lists,
    is_marked_zero,
    page_bytes,
    reads_zero,
    verify,
)
from tests.mm.processes import HUGE, FakeHost, contents, is_huge, mapped, pfn_at

PFN = 512
USER = 0x7F00_0000_3000
HARDENING: list[dict[str, Any]] = [
    {},
    {"init_on_alloc": True},
    {"init_on_free": True},
    {"init_on_alloc": True, "init_on_free": True},
    {"page_poisoning": True},
]


def name(config: dict[str, Any]) -> str:
    return "+".join(config) or "plain"


@pytest.fixture
def vipt(boot: Boot) -> MemoryManager:
    """A guest whose data cache aliases."""
    return boot(4, dcache_aliasing=True)


def fault(mm: MemoryManager, process: Process, addr: int) -> int:
    """Let a process write one byte and return the page that it got."""
    process.write(addr, b"\1")
    pfn = pfn_at(mm, process, addr)
    assert pfn is not None
    return pfn


# ------------------------------------------------------------------ the model


def test_what_the_kernel_clears_a_user_sees_only_after_a_flush(vipt: MemoryManager) -> None:
    dirty(vipt, PFN, 1)
    clear_kernel_pages(vipt.mem, PFN, 2)
    assert (page_bytes(vipt, PFN, 2) == 0x5A).all()
    flush_dcache_folio(vipt.mem, PFN, 0)
    assert reads_zero(vipt, PFN)
    assert (page_bytes(vipt, PFN + 1) == 0x5A).all()
    assert [bool(has_kernel_lines(vipt.mem, PFN + page, 1)) for page in range(3)] == [False, True, False]


def test_a_late_line_destroys_what_a_user_wrote(vipt: MemoryManager) -> None:
    clear_kernel_pages(vipt.mem, PFN, 1)
    dirty(vipt, PFN)
    evict(vipt.mem, PFN, 1)
    assert reads_zero(vipt, PFN)
    dirty(vipt, PFN)
    evict_all(vipt.mem)
    assert (page_bytes(vipt, PFN) == 0x5A).all()


def test_zeroing_through_the_users_mapping_is_right_at_once(vipt: MemoryManager) -> None:
    kernel_poison_pages(vipt.mem, PFN, 4)
    dirty(vipt, PFN, 2)
    folio_zero_user(vipt.mem, PFN, 2, USER)
    assert reads_zero(vipt, PFN, 2)
    dirty(vipt, PFN, 2, 7)
    evict_all(vipt.mem)
    assert (page_bytes(vipt, PFN, 4) == 7).all()


def test_the_kernel_finds_its_poison_in_its_own_lines(vipt: MemoryManager) -> None:
    kernel_poison_pages(vipt.mem, PFN, 2)
    kernel_unpoison_pages(vipt.mem, PFN, 2)
    assert vipt.vm_stats().poison_errors == 0
    clear_kernel_pages(vipt.mem, PFN, 1)
    evict_all(vipt.mem)
    kernel_unpoison_pages(vipt.mem, PFN, 2)
    assert vipt.vm_stats().poison_errors == 1


def test_other_machines_have_no_lines(boot: Boot) -> None:
    assert len(boot(4).mem.kernel_lines) == 0
    mm = boot(4, icache_aliasing=True)
    dirty(mm, PFN)
    clear_kernel_pages(mm.mem, PFN, 1)
    assert reads_zero(mm, PFN)
    assert not mm.mem.kernel_lines.any()
    assert not has_kernel_lines(mm.mem, PFN, 1)


# ------------------------------------------------------------------ users (patches 7, 12, 23)


@pytest.mark.parametrize("config", HARDENING, ids=name)
@pytest.mark.parametrize("huge", [False, True])
def test_a_users_page_reads_zero_and_keeps_what_is_written(
    boot: Boot, config: dict[str, Any], huge: bool
) -> None:
    """Patch 12's guard, mutant 38: with `init_on_free` the zeros may sit in the kernel's lines.

    A page goes from user to user; the second must neither see the first's bytes nor lose its own
    when the cache writes back.
    """
    mm = boot(8, dcache_aliasing=True, **config)
    dirty_free_memory(mm, 0xAA if config.get("page_poisoning") else 0 if config.get("init_on_free") else 0x33)
    length = HUGE if huge else 8 * PAGE_SIZE
    for byte in (0x11, 0x22):
        with mm.spawn() as process:
            addr = process.mmap(HUGE)
            if not huge:
                process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
            process.touch(addr, length)
            assert is_huge(mm, process, addr) == huge
            found = mapped(mm, process, addr, length)
            assert found[PAGE_SIZE] == 1
            assert found.count(0) == length - length // PAGE_SIZE
            process.fill(addr, length, byte)
            evict_all(mm.mem)
            assert mapped(mm, process, addr, length) == contents(byte, length)
            verify(mm)
    verify(mm)
    assert mm.vm_stats().poison_errors == 0


@pytest.mark.parametrize("huge", [False, True])
def test_address_zero_is_a_user_address(boot: Boot, huge: bool) -> None:
    """Patch 7, mutant 36: were 0 taken for "no user", the kernel's mapping would be cleared."""
    mm = boot(8, dcache_aliasing=True)
    dirty_free_memory(mm)
    with mm.spawn() as process:
        assert process.mmap(2 * HUGE, MAP_FIXED, 0) == 0
        if not huge:
            process.madvise(0, 2 * HUGE, MADV_NOHUGEPAGE)
        pfn = fault(mm, process, 0)
        assert is_huge(mm, process, 0) == huge
        assert page_bytes(mm, pfn)[:8].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
        assert reads_zero(mm, pfn + 1) or not huge
        evict_all(mm.mem)
        assert page_bytes(mm, pfn)[0] == 1


def test_a_page_that_lost_its_user_address_shows(vipt: MemoryManager) -> None:
    """What the model is for: cleared as the kernel's and mapped by a user, a page has old bytes."""
    dirty_free_memory(vipt)
    pfn = int(alloc_pages(vipt.mem, GFP_HIGHUSER_MOVABLE | GFP_ZERO, 0, USER_ADDR_NONE, 0, 0))
    assert not reads_zero(vipt, pfn)
    pfn = int(alloc_pages(vipt.mem, GFP_HIGHUSER_MOVABLE | GFP_ZERO, 0, USER, 0, 0))
    assert reads_zero(vipt, pfn)


@pytest.mark.parametrize("aliasing", ["none", "dcache", "icache"])
@pytest.mark.parametrize("order", [0, 3])
def test_only_aliasing_makes_the_guard_zero_again(boot: Boot, aliasing: str, order: int) -> None:
    """Patch 23, mutant 39: elsewhere `init_on_free` has done the work, and once is enough."""
    mm = boot(4, init_on_free=True, **({} if aliasing == "none" else {f"{aliasing}_aliasing": True}))
    size = PAGE_SIZE << order
    before = mm.vm_stats().zeroed_bytes
    pfn = alloc_pages(mm.mem, GFP_HIGHUSER_MOVABLE | GFP_ZERO | GFP_COMP, order, USER, 0, 0)
    assert mm.vm_stats().zeroed_bytes - before == (0 if aliasing == "none" else size)
    assert reads_zero(mm, pfn, order)
    for gfp, addr in [
        (GFP_KERNEL | GFP_ZERO, USER_ADDR_NONE),  # a kernel page
        (GFP_HIGHUSER_MOVABLE, USER),  # a user who will write it all
        (GFP_HIGHUSER_MOVABLE | GFP_ZERO | __GFP_SKIP_ZERO, USER),  # a caller that zeroes tags
    ]:
        before = mm.vm_stats().zeroed_bytes
        alloc_pages(mm.mem, gfp | GFP_COMP, order, addr, 0, 0)
        assert mm.vm_stats().zeroed_bytes == before


@pytest.mark.parametrize("config", HARDENING[:4], ids=name)
@pytest.mark.parametrize("aliasing", ["dcache", "icache"])
def test_a_page_that_the_host_zeroed_is_not_zeroed_again(
    boot: Boot, config: dict[str, Any], aliasing: str
) -> None:
    """The guard leaves host-zeroed pages out (mutant 38, second half): no line outlives the memory."""
    mm = boot(8, **config, **{f"{aliasing}_aliasing": True})
    block = mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP, 9)
    dirty(mm, block, 9)
    mm.free_pages(block, 9)
    mm.drain_all_pages()
    lines = aliasing == "dcache" and config.get("init_on_free", False)
    assert has_kernel_lines(mm.mem, block, 512) == lines
    host = FakeHost(mm, order=9, capacity=1).register()
    mm.page_reporting.flush(8)
    assert any(start <= block < start + (1 << order) for start, order in host.blocks())
    verify(mm)
    before = mm.vm_stats()
    pfn = alloc_pages(mm.mem, GFP_HIGHUSER_MOVABLE | GFP_ZERO | GFP_COMP, 9, USER, 0, 0)
    after = mm.vm_stats()
    assert after.zeroed_bytes == before.zeroed_bytes
    assert after.known_zero_bytes - before.known_zero_bytes == HUGE
    assert reads_zero(mm, pfn, 9)
    dirty(mm, pfn, 9)
    evict_all(mm.mem)
    assert (page_bytes(mm, pfn, 512) == 0x5A).all()


@pytest.mark.parametrize("config", HARDENING, ids=name)
def test_who_asks_for_no_zeros_writes_and_keeps_its_bytes(boot: Boot, config: dict[str, Any]) -> None:
    """Copies and swap-in write the page themselves: no line of its former life may come after."""
    mm = boot(4, dcache_aliasing=True, **config)
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    mm.free_pages(pfn)
    again = int(alloc_pages(mm.mem, GFP_HIGHUSER_MOVABLE, 0, USER, 0, 0))
    assert again == pfn
    dirty(mm, again)
    flush_dcache_folio(mm.mem, again, 0)
    evict_all(mm.mem)
    assert (page_bytes(mm, again) == 0x5A).all()
    with mm.spawn() as process:
        addr = process.mmap(PAGE_SIZE, MAP_UNINITIALIZED)
        process.fill(addr, PAGE_SIZE, 9)
        evict_all(mm.mem)
        assert mapped(mm, process, addr, PAGE_SIZE) == contents(9)


# ------------------------------------------------------------------ the kernel's own pages


@pytest.mark.parametrize("config", HARDENING, ids=name)
def test_the_kernels_own_pages_have_no_lines(boot: Boot, config: dict[str, Any]) -> None:
    """Page tables, driver buffers and the zero page are read and written through RAM from here on."""
    mm = boot(4, dcache_aliasing=True, **config)
    dirty_free_memory(mm, 0xAA if config.get("page_poisoning") else 0 if config.get("init_on_free") else 0x33)
    for _ in range(2):
        one = mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 2)
        many = mm.alloc_pages_bulk(GFP_KERNEL | GFP_ZERO, 3)
        with mm.spawn() as process:
            for pfn, order in [(one, 2), *((int(pfn), 0) for pfn in many), (process._pgd, 0)]:
                assert reads_zero(mm, pfn, order)
                assert not has_kernel_lines(mm.mem, pfn, 1 << order)
        mm.free_pages(one, 2)
        mm.free_pages_bulk(many)
    assert reads_zero(mm, int(mm.mem.vm[0].empty_zero_page))


@pytest.mark.parametrize("config", HARDENING, ids=name)
def test_processes_live_on_while_the_cache_does_its_worst(boot: Boot, config: dict[str, Any]) -> None:
    """Random faults, writes, unmappings and evictions, against a plain record of what was written."""
    mm = boot(8, dcache_aliasing=True, **config)
    rng = Random(7)
    alive: list[tuple[Process, int, dict[int, int]]] = []
    for _ in range(120):
        if len(alive) < 3:
            process = mm.spawn()
            alive.append((process, process.mmap(HUGE if rng.random() < 0.3 else 40 * PAGE_SIZE), {}))
        process, addr, written = rng.choice(alive)
        page = rng.randrange(40)
        action = rng.randrange(6)
        if action < 3:
            written[page] = rng.randrange(1, 256)
            process.write(addr + page * PAGE_SIZE + 5, bytes([written[page]]))
        elif action == 3:
            expected = bytes([0] * 5 + [written.get(page, 0)] + [0] * 2)
            assert process.read(addr + page * PAGE_SIZE, 8) == expected
        elif action == 4:
            evict_all(mm.mem)
        elif rng.random() < 0.3:
            process.exit()
            alive = [entry for entry in alive if entry[0] is not process]
    verify(mm)
    for process, addr, written in alive:
        for page, byte in written.items():
            assert process.read(addr + page * PAGE_SIZE + 5, 1) == bytes([byte])
        process.exit()
    verify(mm)
    assert mm.vm_stats().poison_errors == 0


# ------------------------------------------------------------------ claims


def test_a_page_freed_as_zero_has_no_lines_left(vipt: MemoryManager) -> None:
    """Patch 33: the claim is about what the next owner sees, whichever address it uses."""
    dirty_free_memory(vipt)
    pfn = int(alloc_pages(vipt.mem, GFP_HIGHUSER_MOVABLE | GFP_ZERO, 0, USER_ADDR_NONE, 0, 0))
    assert has_kernel_lines(vipt.mem, pfn, 1)
    vipt.mem.mem_map[pfn]._refcount = 0
    free_frozen_pages_zeroed(vipt.mem, pfn, 0, 0)
    assert is_marked_zero(vipt.mem, pfn)
    verify(vipt)
    assert int(alloc_pages(vipt.mem, GFP_HIGHUSER_MOVABLE | GFP_ZERO, 0, USER, 0, 0)) == pfn
    assert reads_zero(vipt, pfn)
    dirty(vipt, pfn)
    evict_all(vipt.mem)
    assert (page_bytes(vipt, pfn) == 0x5A).all()


def test_verify_finds_a_claim_that_a_line_will_break(vipt: MemoryManager) -> None:
    (_, order, _), blocks = next(iter(free_lists(vipt.mem).items()))
    vipt.mem.mem_map[blocks[0]].flags_f |= PG_zeroed
    page_bytes(vipt, blocks[0], 1 << order)[:] = 0
    verify(vipt)
    vipt.mem.kernel_lines[blocks[0]] = 1
    with pytest.raises(VmBug, match="claims to be zero"):
        verify(vipt)


@pytest.mark.parametrize("config", HARDENING, ids=name)
def test_no_line_survives_hibernation(boot: Boot, config: dict[str, Any]) -> None:
    """The machine was off: what free pages must hold is written again, and nothing else comes back."""
    mm = boot(4, dcache_aliasing=True, **config)
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.free_pages(pfn)
    kernel_poison_pages(mm.mem, pfn, 1)
    mm.forget_zero_claims()
    expected = 0xAA + 1 if config.get("page_poisoning") else int(bool(config.get("init_on_free")))
    assert int(mm.mem.kernel_lines[pfn]) == expected
    verify(mm)


# ------------------------------------------------------------------ zeroing once (third open question)


def zeroed_at_fault(mm: MemoryManager, huge: bool) -> int:
    """Return how many bytes are zeroed for a user's page that nobody knows to be zero."""
    with mm.spawn() as process:
        addr = process.mmap(2 * HUGE)
        process.madvise(addr, HUGE, MADV_NOHUGEPAGE)
        fault(mm, process, addr)  # the tables are there now
        before = mm.vm_stats().zeroed_bytes
        fault(mm, process, addr + (HUGE if huge else PAGE_SIZE))
        return mm.vm_stats().zeroed_bytes - before


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("aliasing", ["none", "dcache", "icache"])
@pytest.mark.parametrize(("init_on_alloc", "init_on_free"), list(product([False, True], repeat=2)))
def test_how_often_a_users_page_is_zeroed_with_the_series_and_without(
    boot: Boot, huge: bool, aliasing: str, init_on_alloc: bool, init_on_free: bool
) -> None:
    """Cover letter, third open question: the series zeroes once, or not at all where the free did it.

    Without it, `init_on_alloc` on a machine whose caches alias zeroes twice.
    """
    aliases = aliasing != "none"
    settings: dict[str, Any] = {"init_on_alloc": init_on_alloc, "init_on_free": init_on_free}
    if aliases:
        settings[f"{aliasing}_aliasing"] = True
    size = HUGE if huge else PAGE_SIZE
    series = boot(8, **settings)
    assert zeroed_at_fault(series, huge) == size * (aliases or not init_on_free)
    assert int(series.mem.vm[0].zeroed_twice_bytes) == 0

    # Linux 7.2 before it: x86 asks the allocator at order 0, everything else zeroes at the fault.
    linux = boot(8, user_zeroing="caller", **settings)
    if huge or aliases:
        in_allocator = init_on_alloc and not init_on_free
        at_fault = aliases or not init_on_alloc
    else:
        in_allocator, at_fault = not init_on_free, False
    assert zeroed_at_fault(linux, huge) == size * (in_allocator + at_fault)
    if aliases and init_on_alloc and not init_on_free:
        assert zeroed_at_fault(linux, huge) == 2 * size
