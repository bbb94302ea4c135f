# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import numpy as np
import pytest

from hostzero.errors import MmError
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.page_flags import PG_private, PGTY_none, PGTY_offline
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, dirty_free_memory, is_marked_zero, page_bytes, reads_zero, verify
from tests.mm.processes import free_pages, pages


@pytest.fixture
def taken(mm: MemoryManager) -> list[int]:
    """Eight dirty pages, allocated for the balloon of a guest whose free memory is dirty."""
    dirty_free_memory(mm)
    pfns = [int(pfn) for pfn in mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, 8)]
    for pfn in pfns:
        dirty(mm, pfn)
    return pfns


def inflate(mm: MemoryManager, pfns: list[int], zeroed: list[bool]) -> None:
    """What the driver does: enqueue, let the host drop pages, believe its answer."""
    mm.balloon.enqueue(pages(*pfns))
    for pfn, dropped in zip(pfns, zeroed, strict=True):
        page_bytes(mm, pfn)[:] = 0 if dropped else 0x66
    mm.balloon.set_zeroed(pages(*pfns), np.array(zeroed))
    verify(mm)


def test_pages_go_in_and_come_out_newest_first(mm: MemoryManager, taken: list[int]) -> None:
    before = free_pages(mm)
    mm.balloon.enqueue(pages(*taken[:3]))
    mm.balloon.enqueue(pages(*taken[3:]))
    assert mm.balloon.count == mm.vm_stats().balloon_pages == 8
    assert all(mm.mem.mem_map[pfn].page_type == PGTY_offline for pfn in taken)
    verify(mm)
    out = mm.balloon.dequeue(5)
    assert out.tolist() == taken[:2:-1]
    assert all(mm.mem.mem_map[pfn].page_type == PGTY_none for pfn in out)
    assert mm.balloon.count == 3
    assert free_pages(mm) == before
    verify(mm)
    mm.balloon.release(out)
    assert free_pages(mm) == before + 5
    verify(mm)


def test_more_than_there_is_comes_out_as_what_there_is(mm: MemoryManager, taken: list[int]) -> None:
    assert mm.balloon.dequeue(3).tolist() == []
    mm.balloon.enqueue(pages(*taken))
    assert mm.balloon.dequeue(256).tolist() == taken[::-1]
    assert mm.balloon.dequeue(1).tolist() == []
    assert mm.balloon.count == 0


def test_only_acknowledged_pages_carry_the_mark(mm: MemoryManager, taken: list[int]) -> None:
    """Lifecycle: inflate ack sets PG_zeroed; bit 0 or no ack leaves it clear, and clears no other."""
    inflate(mm, taken, [i % 3 == 0 for i in range(8)])
    assert [is_marked_zero(mm.mem, pfn) for pfn in taken] == [i % 3 == 0 for i in range(8)]
    mm.balloon.set_zeroed(pages(*taken), np.zeros(8, dtype=np.bool_))
    assert [is_marked_zero(mm.mem, pfn) for pfn in taken] == [i % 3 == 0 for i in range(8)]


def test_deflated_known_zero_pages_are_not_zeroed_again(mm: MemoryManager, taken: list[int]) -> None:
    """Lifecycle: deflate samples and clears the mark, then frees as zeroed (patches 35 and 37)."""
    inflate(mm, taken, [True] * 8)
    mm.balloon.release(mm.balloon.dequeue(8))
    verify(mm)
    assert all(is_marked_zero(mm.mem, pfn) for pfn in taken)
    before = mm.vm_stats()
    again = [int(pfn) for pfn in mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 8)]
    assert set(again) == set(taken)
    assert all(reads_zero(mm, pfn) for pfn in again)
    after = mm.vm_stats()
    assert after.zeroed_bytes == before.zeroed_bytes
    assert after.known_zero_bytes == before.known_zero_bytes + 8 * PAGE_SIZE
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in again)
    verify(mm)


def test_deflated_unknown_pages_are_zeroed(mm: MemoryManager, taken: list[int]) -> None:
    inflate(mm, taken, [False] * 8)
    mm.balloon.release(mm.balloon.dequeue(8))
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in taken)
    before = mm.vm_stats().zeroed_bytes
    again = [int(pfn) for pfn in mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 8)]
    assert set(again) == set(taken)
    assert all(reads_zero(mm, pfn) for pfn in again)
    assert mm.vm_stats().zeroed_bytes == before + 8 * PAGE_SIZE


def test_the_verdict_is_per_page(mm: MemoryManager, taken: list[int]) -> None:
    zeroed = [i in {1, 2, 6} for i in range(8)]
    inflate(mm, taken, zeroed)
    mm.balloon.release(mm.balloon.dequeue(8))
    assert [is_marked_zero(mm.mem, pfn) for pfn in taken] == zeroed
    mm.drain_all_pages()
    verify(mm)


def test_a_kernel_page_without_wish_for_zeros_just_drops_the_hint(
    mm: MemoryManager, taken: list[int]
) -> None:
    inflate(mm, taken[:1], [True])
    mm.balloon.release(mm.balloon.dequeue(1))
    pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    assert pfn == taken[0]
    assert int(mm.mem.mem_map[pfn].flags_f) & PG_private == 0
    assert mm.vm_stats().dropped_hint_bytes == PAGE_SIZE
    dirty(mm, pfn)
    mm.free_pages(pfn)
    assert not is_marked_zero(mm.mem, pfn)
    verify(mm)


def test_a_marked_page_is_never_bad(mm: MemoryManager, taken: list[int]) -> None:
    """PG_private on a page being freed makes it a bad page: the mark goes before the free."""
    free = free_pages(mm)
    inflate(mm, taken, [True, False] * 4)
    mm.balloon.release(mm.balloon.dequeue(3))
    mm.balloon.release(mm.balloon.dequeue(5))
    assert mm.vm_stats().bad_pages == 0
    assert free_pages(mm) == free + 8


def test_another_reference_loses_the_hint(mm: MemoryManager, taken: list[int]) -> None:
    """Patch 35: whoever still holds the page may write to it."""
    pfn = taken[0]
    inflate(mm, [pfn], [True])
    mm.mem.mem_map[pfn]._refcount += 1
    free = free_pages(mm)
    mm.balloon.release(mm.balloon.dequeue(1))
    assert free_pages(mm) == free
    assert int(mm.mem.mem_map[pfn]._refcount) == 1
    assert not is_marked_zero(mm.mem, pfn)
    dirty(mm, pfn)
    mm.free_pages(Pfn(pfn))
    assert free_pages(mm) == free + 1
    assert not is_marked_zero(mm.mem, pfn)
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


def test_forgotten_claims_are_zeroed_again(mm: MemoryManager, taken: list[int]) -> None:
    """After hibernation nothing is known: in the balloon, parked, or on a free list."""
    inflate(mm, taken, [True] * 8)
    mm.balloon.release(mm.balloon.dequeue(4))
    assert mm.forget_zero_claims() == 8
    assert mm.forget_zero_claims() == 0
    for pfn in taken:
        dirty(mm, pfn)
    verify(mm)
    mm.balloon.release(mm.balloon.dequeue(4))
    for pfn in mm.alloc_pages_bulk(GFP_KERNEL | GFP_ZERO, 64):
        assert reads_zero(mm, int(pfn))


def test_forgetting_leaves_owners_alone(mm: MemoryManager, taken: list[int]) -> None:
    """PG_private of an owned page is the owner's, not a claim."""
    mm.mem.mem_map[taken[0]].flags_f |= PG_private
    assert mm.forget_zero_claims() == 0
    assert int(mm.mem.mem_map[taken[0]].flags_f) & PG_private


@pytest.mark.parametrize("zeroed", [True, False])
def test_poisoning_wins_over_the_hint(boot_poisoned: MemoryManager, zeroed: bool) -> None:
    """A page that poisoning overwrites at free is not known zero (patch 33)."""
    mm = boot_poisoned
    pfn = int(mm.alloc_pages(GFP_HIGHUSER_MOVABLE))
    inflate(mm, [pfn], [zeroed])
    mm.balloon.release(mm.balloon.dequeue(1))
    assert not is_marked_zero(mm.mem, pfn)
    assert page_bytes(mm, pfn).tobytes() == b"\xaa" * PAGE_SIZE
    verify(mm)


@pytest.fixture
def boot_poisoned(boot: Boot) -> MemoryManager:
    return boot(4, page_poisoning=True)


def test_a_page_that_is_being_migrated_is_off_the_list_with_its_mark(
    mm: MemoryManager, taken: list[int]
) -> None:
    inflate(mm, taken, [True] * 8)
    assert not mm.balloon.isolate(taken[0]), "nobody could tell the host"
    mm.balloon.register_migratepage(lambda new, old: False)
    with pytest.raises(MmError, match="a driver already"):
        mm.balloon.register_migratepage(lambda new, old: True)
    assert mm.balloon.isolate(taken[0])
    assert not mm.balloon.isolate(taken[0])
    assert taken[0] not in mm.balloon.dequeue(8)
    mm.balloon.putback(taken[0])
    assert is_marked_zero(mm.mem, taken[0])
    assert mm.balloon.count == 1
    verify(mm)
