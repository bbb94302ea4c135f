# SPDX-License-Identifier: GPL-2.0-only
"""Anonymous folios of every size: which size a fault gets, who zeroes it, and how it goes again."""

from __future__ import annotations

import pytest

from hostzero.errors import UsageError
from hostzero.mm import MemoryManager, Process
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_UNINITIALIZED,
)
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, dirty_free_memory, page_bytes, verify
from tests.mm.mappings import order_of, verify_mappings
from tests.mm.processes import (
    HUGE,
    MIB,
    contents,
    free_pages,
    mapped,
    occupy,
    pfn_at,
    release_blocks,
)
from tests.mm.spy import spy

BASE = 1 << 30


def page_at(mm: MemoryManager, process: Process, addr: int) -> int:
    pfn = pfn_at(mm, process, addr)
    assert pfn is not None
    return pfn


def orders(mm: MemoryManager, process: Process, *at: int) -> list[int]:
    """Return the orders of the folios at page numbers of the mapping at BASE."""
    return [order_of(mm, page_at(mm, process, BASE + page * PAGE_SIZE)) for page in at]


# ------------------------------------------------------------------ which size


@pytest.mark.parametrize("thp", ["always", "never"])
def test_a_fault_gets_the_largest_permitted_folio(boot: Boot, thp: str) -> None:
    """Zeroed, one fault, naturally aligned in both spaces; PMD size is a matter of its own."""
    mm = boot(8, thp=thp, anon_orders=(2, 5))
    dirty_free_memory(mm)
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.write(BASE + 37 * PAGE_SIZE + 5, b"x")
    first = page_at(mm, process, BASE + 32 * PAGE_SIZE)
    assert first % 32 == 0
    assert [pfn_at(mm, process, BASE + page * PAGE_SIZE) for page in range(32, 64)] == list(
        range(first, first + 32)
    )
    expected = bytearray(32 * PAGE_SIZE)
    expected[5 * PAGE_SIZE + 5] = ord("x")
    assert mapped(mm, process, BASE + 32 * PAGE_SIZE, 32 * PAGE_SIZE) == expected
    assert process.rss == 32 * PAGE_SIZE
    assert mm.vm_stats().pgfault == 1
    assert pfn_at(mm, process, BASE + 31 * PAGE_SIZE) is None
    assert pfn_at(mm, process, BASE + 64 * PAGE_SIZE) is None
    verify_mappings(mm, [process])
    verify(mm)


def test_the_folio_lies_inside_the_mapping(boot: Boot) -> None:
    """A mapping of pages 3 to 21: order 4 fits nowhere, order 2 in the middle, single pages at the ends."""
    mm = boot(4, anon_orders=(2, 4))
    process = mm.spawn()
    process.mmap(19 * PAGE_SIZE, MAP_FIXED, BASE + 3 * PAGE_SIZE)
    process.madvise(BASE + 3 * PAGE_SIZE, 19 * PAGE_SIZE, MADV_POPULATE_WRITE)
    assert orders(mm, process, *range(3, 22)) == [0] + 16 * [2] + 2 * [0]
    assert mm.vm_stats().pgfault == 1 + 4 + 2
    verify_mappings(mm, [process])


def test_the_folio_takes_no_entry_that_is_in_use(boot: Boot) -> None:
    """A page, a zero page: what is mapped stays, and the fault gets the size beside it."""
    mm = boot(4, anon_orders=(1, 2, 3, 4))
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.madvise(BASE, PAGE_SIZE, MADV_NOHUGEPAGE)
    process.write(BASE, b"keep")
    process.read(BASE + 6 * PAGE_SIZE, 1)
    for page in (15, 5, 3):
        process.write(BASE + page * PAGE_SIZE, b"x")
    assert orders(mm, process, 0, 2, 3, 4, 5, 8, 15) == [0, 1, 1, 1, 1, 3, 3]
    assert process.read(BASE, 4) == b"keep"
    assert page_at(mm, process, BASE + 6 * PAGE_SIZE) == int(mm.mem.vm[0].empty_zero_page)
    verify_mappings(mm, [process])


def test_a_write_to_the_zero_page_gets_one_page(boot: Boot) -> None:
    """It replaces one entry (`wp_page_copy`), whatever sizes are permitted."""
    mm = boot(4, anon_orders=(4,))
    dirty_free_memory(mm)
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.read(BASE, 2 * PAGE_SIZE)
    process.write(BASE + PAGE_SIZE, b"x")
    assert orders(mm, process, 1) == [0]
    assert process.read(BASE, 2 * PAGE_SIZE) == bytes(PAGE_SIZE) + b"x" + bytes(PAGE_SIZE - 1)


def test_advice_against_huge_pages_is_against_every_size(boot: Boot) -> None:
    mm = boot(4, anon_orders=(4,))
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.madvise(BASE, MIB, MADV_NOHUGEPAGE)
    process.write(BASE, b"x")
    assert process.rss == PAGE_SIZE


def test_without_such_a_block_the_next_size_is_tried(boot: Boot) -> None:
    """Free: one block of order 3 and single pages. Order 5, then 3, then order 0."""
    mm = boot(8, anon_orders=(3, 5))
    process = mm.spawn()
    process.mmap(HUGE, MAP_FIXED, BASE)
    process.read(BASE + 500 * PAGE_SIZE, 1)
    occupy(mm)
    release_blocks(mm, [(1536, 3), *((pfn, 0) for pfn in range(1600, 1620, 2))])
    dirty(mm, 1536, 3)
    process.write(BASE, b"x")
    process.write(BASE + 8 * PAGE_SIZE, b"x")
    assert orders(mm, process, 0, 7, 8) == [3, 3, 0]
    assert page_at(mm, process, BASE + PAGE_SIZE) == 1537
    assert process.rss == 9 * PAGE_SIZE
    assert mapped(mm, process, BASE, 8 * PAGE_SIZE) == b"x" + bytes(8 * PAGE_SIZE - 1)
    verify_mappings(mm, [process])


def test_orders_that_are_none_are_refused(boot: Boot) -> None:
    for bad in ((0,), (9,), (2, -1)):
        with pytest.raises(UsageError, match="anon_orders"):
            boot(4, anon_orders=bad)


def test_an_uninitialized_mapping_has_large_folios_too(boot: Boot) -> None:
    mm = boot(4, anon_orders=(2,))
    dirty_free_memory(mm)
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED | MAP_UNINITIALIZED, BASE)
    process.write(BASE, b"x")
    assert mapped(mm, process, BASE, 4 * PAGE_SIZE) == b"x" + contents(0x5A, 4 * PAGE_SIZE - 1)


# ------------------------------------------------------------------ going in parts


@pytest.mark.parametrize("order", [1, 2, 8])
@pytest.mark.parametrize("how", ["munmap", "drop"])
def test_the_folio_goes_with_its_last_page(boot: Boot, order: int, how: str) -> None:
    """One reference a mapped page; what is left reads as before, and nothing is free before the end."""
    mm = boot(4, anon_orders=(order,))
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.write(BASE, b"x")
    count = 1 << order
    head = page_at(mm, process, BASE)
    for page in range(count):
        page_bytes(mm, head + page)[:] = page % 251 + 1
    free = free_pages(mm)
    parts = [0] if order == 1 else [0, count - 1, count // 2]
    for gone, page in enumerate(parts, 1):
        at = BASE + page * PAGE_SIZE
        process.munmap(at, PAGE_SIZE) if how == "munmap" else process.madvise(at, PAGE_SIZE, MADV_DONTNEED)
        assert int(mm.mem.mem_map[head]._refcount) == count - gone
        assert int(mm.mem.mem_map[head + page]._mapcount) == -1
        assert free_pages(mm) == free
        assert process.rss == (count - gone) * PAGE_SIZE
        verify_mappings(mm, [process])
        verify(mm)
    for page in set(range(count)) - set(parts):
        assert mapped(mm, process, BASE + page * PAGE_SIZE, PAGE_SIZE) == contents(page % 251 + 1)
    process.munmap(BASE, MIB)
    assert free_pages(mm) == free + count + 3  # and the tables
    assert (mm.mem.mem_map[head : head + count]._mapcount == -1).all()
    assert mm.vm_stats().bad_pages == 0
    verify(mm)


def test_a_hole_in_a_folio_is_filled_with_what_fits(boot: Boot) -> None:
    """Dropped pages come back as zeros in a folio of their own size, beside the old one's rest."""
    mm = boot(4, anon_orders=(1, 2, 3))
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.fill(BASE, 8 * PAGE_SIZE, 0x77)
    process.madvise(BASE + 2 * PAGE_SIZE, 2 * PAGE_SIZE, MADV_DONTNEED)
    process.write(BASE + 3 * PAGE_SIZE, b"n")
    assert orders(mm, process, 0, 2, 3, 4) == [3, 1, 1, 3]
    assert process.read(BASE, 5 * PAGE_SIZE) == (
        contents(0x77, 2 * PAGE_SIZE) + bytes(PAGE_SIZE) + b"n" + bytes(PAGE_SIZE - 1) + contents(0x77)
    )
    verify_mappings(mm, [process])
    process.exit()
    verify(mm)


def test_every_access_reaches_the_right_page_of_a_folio(boot: Boot) -> None:
    mm = boot(4, anon_orders=(3,))
    process = mm.spawn()
    process.mmap(MIB, MAP_FIXED, BASE)
    process.fill(BASE + 2 * PAGE_SIZE, 4 * PAGE_SIZE, 0x31)
    process.touch(BASE + 5 * PAGE_SIZE, 2 * PAGE_SIZE)
    process.write(BASE + 4 * PAGE_SIZE - 2, b"four")
    expected = bytearray(8 * PAGE_SIZE)
    expected[2 * PAGE_SIZE : 6 * PAGE_SIZE] = contents(0x31, 4 * PAGE_SIZE)
    expected[5 * PAGE_SIZE] = expected[6 * PAGE_SIZE] = 1
    expected[4 * PAGE_SIZE - 2 : 4 * PAGE_SIZE + 2] = b"four"
    assert process.read(BASE, 8 * PAGE_SIZE) == expected
    assert process.find_nonzero(BASE, MIB) == BASE + 2 * PAGE_SIZE
    assert process.find_nonzero(BASE + 7 * PAGE_SIZE, PAGE_SIZE) is None


# ------------------------------------------------------------------ the fault address

FAULTS = f"""
with booted(4, thp="never", anon_orders=(3, 4)) as mm:
    process = mm.spawn()
    process.mmap(1 << 20, {MAP_FIXED}, 1 << 30)
    start()
    process.write((1 << 30) + 27 * 4096 + 99, b"x")
    process.read((1 << 30) + 33 * 4096, 1)
    process.write((1 << 30) + 33 * 4096 + 7, b"x")
    process.write((1 << 30) + 42 * 4096 + 7, b"x")
"""


def test_the_raw_fault_address_reaches_the_allocator_with_a_wish_for_zeros() -> None:
    """Patches 13, 15, 17: of a large folio, of a page that replaces the zero page, of a folio beside it."""
    assert spy(FAULTS) == [
        ("hook", 4, BASE + 27 * PAGE_SIZE, True),
        ("zero", 4, BASE + 27 * PAGE_SIZE, True),
        ("hook", 0, BASE + 33 * PAGE_SIZE, True),
        ("zero", 0, BASE + 33 * PAGE_SIZE, True),
        ("hook", 3, BASE + 42 * PAGE_SIZE, True),
        ("zero", 3, BASE + 42 * PAGE_SIZE, True),
    ]
