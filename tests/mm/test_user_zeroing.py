# SPDX-License-Identifier: GPL-2.0-only
"""Who zeroes a user's page, how often, and for nothing at a cgroup's limit: the series and Linux 7.2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hostzero.errors import MemcgOutOfMemory
from hostzero.mm import MemoryManager, Process
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MAP_FIXED, MAP_UNINITIALIZED
from hostzero.mm.page_flags import PG_zeroed
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, verify
from tests.mm.processes import HUGE, MIB, FakeHost, mapped

BASE = 1 << 30

# ------------------------------------------------------------------ who zeroes

SIZES: dict[str, dict[str, Any]] = {
    "pmd": {"thp": "always"},
    "mthp": {"thp": "never", "anon_orders": (4,)},
    "page": {"thp": "never"},
}
BYTES = {"pmd": HUGE, "mthp": 16 * PAGE_SIZE, "page": PAGE_SIZE}


Times = tuple[int, int]
"""How often a folio is zeroed, and how much of that is for the second time."""


def prepared(mm: MemoryManager) -> Process:
    """A process whose page tables are there already, so that a fault zeroes nothing but its page."""
    process = mm.spawn()
    process.mmap(4 * HUGE, MAP_FIXED, BASE)
    process.madvise(BASE + 3 * HUGE, HUGE, MADV_NOHUGEPAGE)
    process.write(BASE + 3 * HUGE, b"x")
    if int(mm.mem.vm[0].thp_never):
        process.read(BASE + HUGE, 1)
    return process


def zeroing(mm: MemoryManager) -> tuple[int, int]:
    stats = mm.vm_stats()
    return stats.zeroed_bytes, stats.zeroed_twice_bytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("zeroer", "config", "large", "single"),
    [
        # Large folios, then single pages.
        ("allocator", {}, (1, 0), (1, 0)),
        ("allocator", {"init_on_alloc": True}, (1, 0), (1, 0)),
        ("allocator", {"init_on_free": True}, (0, 0), (0, 0)),
        ("allocator", {"init_on_alloc": True, "init_on_free": True}, (0, 0), (0, 0)),
        ("caller", {}, (1, 0), (1, 0)),
        ("caller", {"init_on_alloc": True}, (1, 0), (1, 0)),
        ("caller", {"init_on_free": True}, (1, 1), (0, 0)),
        ("caller", {"init_on_alloc": True, "init_on_free": True}, (0, 0), (0, 0)),
        ("caller", {"dcache_aliasing": True}, (1, 0), (1, 0)),
        ("caller", {"dcache_aliasing": True, "init_on_alloc": True}, (2, 1), (2, 1)),
        ("caller", {"icache_aliasing": True, "init_on_free": True}, (1, 1), (1, 1)),
    ],
)
def test_how_often_a_user_page_is_zeroed(
    boot: Boot, size: str, zeroer: str, config: dict[str, bool], large: Times, single: Times
) -> None:
    """The series zeroes at most once. Without it, `init_on_free` zeroes large folios twice on x86."""
    mm = boot(8, user_zeroing=zeroer, **config, **SIZES[size])
    if not config.get("init_on_free"):
        dirty_free_memory(mm)
    process = prepared(mm)
    before = zeroing(mm)
    addr = BASE + HUGE + 48 * PAGE_SIZE
    process.touch(addr, PAGE_SIZE)
    assert process.rss == PAGE_SIZE + BYTES[size]
    cost = [(after - once) // BYTES[size] for after, once in zip(zeroing(mm), before, strict=True)]
    assert tuple(cost) == (single if size == "page" else large)
    first = addr // BYTES[size] * BYTES[size]
    assert mapped(mm, process, first, BYTES[size]).count(0) == BYTES[size] - 1
    verify(mm)


@pytest.mark.parametrize("size", SIZES)
def test_without_the_series_a_hint_is_worth_nothing(boot: Boot, size: str) -> None:
    """A reported block is zeroed again, as Linux 7.2 does; with `init_on_alloc` too."""
    for init_on_alloc in (False, True):
        mm = boot(8, user_zeroing="caller", init_on_alloc=init_on_alloc, **SIZES[size])
        dirty_free_memory(mm)
        process = prepared(mm)
        FakeHost(mm, capacity=1, order=0).register()
        mm.drain_all_pages()
        mm.page_reporting.flush(10_000)
        before = mm.vm_stats()
        process.write(BASE + HUGE + 48 * PAGE_SIZE, b"x")
        after = mm.vm_stats()
        assert after.zeroed_bytes - before.zeroed_bytes == BYTES[size]
        assert after.dropped_hint_bytes - before.dropped_hint_bytes == BYTES[size]
        assert after.known_zero_bytes == before.known_zero_bytes
        verify(mm)


@pytest.mark.parametrize("zeroer", ["allocator", "caller"])
@pytest.mark.parametrize("aliasing", [False, True])
def test_a_zero_page_turns_to_zeros_on_every_machine(boot: Boot, zeroer: str, aliasing: bool) -> None:
    """Patches 13 and 14: one way for all, in a mapping that does not ask for zeros either."""
    mm = boot(4, user_zeroing=zeroer, dcache_aliasing=aliasing)
    dirty_free_memory(mm)
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED | MAP_UNINITIALIZED, BASE)
    process.read(BASE, 1)
    process.write(BASE + 9, b"x")
    assert process.read(BASE, PAGE_SIZE) == bytes(9) + b"x" + bytes(PAGE_SIZE - 10)


# ------------------------------------------------------------------ zeroed in vain


def in_vain(mm: MemoryManager, pages_left: int = 0) -> int:
    """Let a fault meet its cgroup's limit; return the bytes that were zeroed for nothing.

    The folio is freed as any other: no free list says that it is zero (patch 17).
    """
    process = prepared(mm)
    process.memcg = mm.memcg.create(pages_left * PAGE_SIZE)
    before = mm.vm_stats().zeroed_in_vain_bytes
    try:
        process.write(BASE + HUGE + 48 * PAGE_SIZE, b"x")
    except MemcgOutOfMemory:
        assert pages_left == 0
    assert not np.any(mm.mem.mem_map.flags_f & PG_zeroed)
    verify(mm)
    return mm.vm_stats().zeroed_in_vain_bytes - before


@pytest.mark.parametrize(
    ("size", "zeroer", "wasted"),
    [
        ("pmd", "allocator", HUGE),
        ("pmd", "caller", 0),
        ("mthp", "allocator", 16 * PAGE_SIZE),
        ("mthp", "caller", 0),
        # Linux 7.2 zeroes a single page before its charge too: nothing changed there.
        ("page", "allocator", 0),
        ("page", "caller", 0),
    ],
)
def test_the_price_of_zeroing_before_the_charge(boot: Boot, size: str, zeroer: str, wasted: int) -> None:
    """The cover letter's question: a folio that its cgroup refuses has been zeroed, and is not without."""
    mm = boot(8, user_zeroing=zeroer, **SIZES[size])
    assert in_vain(mm, pages_left=1) == wasted
    assert in_vain(mm, pages_left=0) == wasted + PAGE_SIZE


def test_each_size_that_is_refused_has_its_price(boot: Boot) -> None:
    mm = boot(8, anon_orders=(2, 4))
    assert in_vain(mm, pages_left=4) == HUGE + 16 * PAGE_SIZE
    assert in_vain(mm, pages_left=1) == HUGE + (16 + 4) * PAGE_SIZE


@pytest.mark.parametrize("aliasing", [False, True])
def test_a_single_page_was_always_zeroed_before_its_charge(boot: Boot, aliasing: bool) -> None:
    """By x86's own `vma_alloc_zeroed_movable_folio`, and by the generic one where caches alias."""
    mm = boot(8, thp="never", user_zeroing="caller", dcache_aliasing=aliasing)
    assert in_vain(mm) == PAGE_SIZE


@pytest.mark.parametrize("config", [{"init_on_free": True}, {}], ids=["init_on_free", "reported"])
def test_a_folio_that_was_zero_already_costs_nothing(boot: Boot, config: dict[str, bool]) -> None:
    """Zeroed when it was freed, or by the host: a refused charge wastes nothing."""
    mm = boot(8, anon_orders=(4,), **config)
    FakeHost(mm, capacity=1, order=0).register()
    mm.page_reporting.flush(10_000)
    process = mm.spawn()
    process.mmap(HUGE, MAP_FIXED, BASE)
    process.memcg = mm.memcg.create(0)
    with pytest.raises(MemcgOutOfMemory):
        process.write(BASE, b"x")
    assert mm.vm_stats().memcg_charge_fail == 3
    assert mm.vm_stats().zeroed_in_vain_bytes == 0
    verify(mm)


def test_init_on_alloc_zeroes_before_the_charge_in_any_case(boot: Boot) -> None:
    """Without the series too: so there the series costs nothing."""
    for zeroer in ("allocator", "caller"):
        mm = boot(8, user_zeroing=zeroer, init_on_alloc=True)
        assert in_vain(mm, pages_left=1) == HUGE
