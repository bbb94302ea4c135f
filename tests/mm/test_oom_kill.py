# SPDX-License-Identifier: GPL-2.0-only
"""Who is asked for memory when there is none, how often, and when that ends."""

from __future__ import annotations

import pytest

from hostzero.errors import OutOfMemory
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_KERNEL, USER_ADDR_NONE
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.oom_kill import MAX_RECLAIM_RETRIES, nr_unowned_pages
from hostzero.mm.page_alloc import alloc_pages
from hostzero.units import Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import verify


@pytest.fixture
def full(boot: Boot) -> tuple[MemoryManager, list[Pfn]]:
    """A guest without a page to spare, and its pages."""
    mm = boot(4)
    taken: list[Pfn] = []
    while (pfn := int(alloc_pages(mm.mem, GFP_KERNEL, 0, USER_ADDR_NONE, 0, 0))) != NO_PAGE:
        taken.append(Pfn(pfn))
    return mm, taken


def test_a_notifier_that_frees_nothing_and_says_otherwise_is_asked_so_often_and_no_more(
    full: tuple[MemoryManager, list[Pfn]],
) -> None:
    mm, _ = full
    calls: list[int] = []
    mm.register_oom_notifier(lambda: calls.append(1) or 256)  # type: ignore[func-returns-value]
    for turn in (1, 2):
        with pytest.raises(OutOfMemory, match="no free block of order 0"):
            mm.alloc_pages(GFP_KERNEL)
        assert len(calls) == turn * MAX_RECLAIM_RETRIES
        assert mm.vm_stats().oom_kill == turn
    verify(mm)


def test_a_process_is_not_kept_waiting_for_empty_promises(full: tuple[MemoryManager, list[Pfn]]) -> None:
    """Populating and page tables ask in loops of their own."""
    mm, taken = full
    calls: list[int] = []
    mm.register_oom_notifier(lambda: calls.append(1) or 1)  # type: ignore[func-returns-value]
    with pytest.raises(OutOfMemory):
        mm.spawn()
    assert len(calls) == MAX_RECLAIM_RETRIES
    mm.free_pages(taken.pop())
    mm.free_pages(taken.pop())
    with mm.spawn() as process:
        address = process.mmap(4096)
        with pytest.raises(OutOfMemory):
            process.fill(address, 4096, 1)


def test_promises_count_anew_after_real_progress(full: tuple[MemoryManager, list[Pfn]]) -> None:
    """Fourteen empty promises and then a page, three times over: each request gets its page."""
    mm, taken = full
    calls: list[int] = []

    def free_one_at_last() -> int:
        calls.append(1)
        if len(calls) % (MAX_RECLAIM_RETRIES - 1) == 0:
            mm.free_pages(taken.pop())
        return 1

    mm.register_oom_notifier(free_one_at_last)
    for turn in (1, 2, 3):
        mm.alloc_pages(GFP_KERNEL)
        assert len(calls) == turn * (MAX_RECLAIM_RETRIES - 1)
    assert mm.vm_stats().oom_kill == 0
    verify(mm)


def test_pages_without_an_owner_are_free_parked_or_deferred(full: tuple[MemoryManager, list[Pfn]]) -> None:
    mm, taken = full
    before = nr_unowned_pages(mm.mem)
    mm.free_pages(taken.pop())
    assert nr_unowned_pages(mm.mem) == before + 1
    with mm.zone_lock(cpu=0):
        mm.free_pages_nolock(taken.pop())
    assert nr_unowned_pages(mm.mem) == before + 2
    mm.drain_all_pages()
    assert nr_unowned_pages(mm.mem) == before + 2
    verify(mm)
