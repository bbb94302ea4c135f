# SPDX-License-Identifier: GPL-2.0-only
"""Gigantic pages: pools, faults and copies of pages larger than any free block (patches 8 and 9)."""

from __future__ import annotations

import pytest

from hostzero.errors import OutOfMemory
from hostzero.mm.cachealias import evict_all
from hostzero.mm.gfp import USER_ADDR_NONE
from hostzero.mm.hugetlb_pool import HPG_cma
from hostzero.mm.mempolicy import MPOL_BIND
from hostzero.mm.mmap import MAP_HUGETLB, MAP_NORESERVE
from hostzero.mm.mmzone import NO_PAGE, ZoneSpec
from hostzero.units import PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import dirty_free_memory, page_bytes, reads_zero, verify
from tests.mm.huge import GIGANTIC, GIGANTIC_SIZE, MAP_GIGANTIC, counters, head_at, in_pool, run_uncompiled
from tests.mm.processes import HUGE, contents, free_pages, mapped


def test_a_gigantic_pool_grows_and_shrinks(boot: Boot) -> None:
    mm = boot(32, gigantic_order=GIGANTIC)
    dirty_free_memory(mm)
    free, before = free_pages(mm), mm.vm_stats().zeroed_bytes
    assert mm.hugetlb.set_nr_hugepages(2, GIGANTIC) == 2
    assert mm.hugetlb.counters(GIGANTIC) == counters(2, 2)
    assert mm.hugetlb.counters() == counters(0, 0)
    assert all(pfn % (1 << GIGANTIC) == 0 for pfn in in_pool(mm, 1))
    assert mm.vm_stats().zeroed_bytes == before
    verify(mm)
    assert mm.hugetlb.set_nr_hugepages(0, GIGANTIC) == 0
    assert free_pages(mm) == free
    verify(mm)


def test_gigantic_pages_come_from_the_cma_area_first(boot: Boot) -> None:
    mm = boot(32, gigantic_order=GIGANTIC, cma_pages=2048)
    assert mm.hugetlb.set_nr_hugepages(2, GIGANTIC) == 2
    assert mm.cma.available_count == 0
    second, first = in_pool(mm, 1)
    assert (first >= mm.cma.base_pfn, second >= mm.cma.base_pfn) == (True, False)
    assert [int(mm.mem.mem_map[pfn].private) & HPG_cma for pfn in (first, second)] == [HPG_cma, 0]
    mm.hugetlb.set_nr_hugepages(0, GIGANTIC)
    assert mm.cma.available_count == 2048
    verify(mm)


def test_a_gigantic_reservation_that_fails_takes_nothing(boot: Boot) -> None:
    mm = boot(32, gigantic_order=GIGANTIC)
    free = free_pages(mm)
    mm.hugetlb.set_nr_overcommit(2, GIGANTIC)
    with mm.spawn() as process:
        with pytest.raises(OutOfMemory, match="cannot be reserved"):
            process.mmap(3 * GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC)
        assert mm.hugetlb.counters(GIGANTIC) == counters(0, 0)
        assert free_pages(mm) == free - 1
        verify(mm)


def test_no_room_for_a_gigantic_page_is_a_sigbus(boot: Boot) -> None:
    mm = boot(16, gigantic_order=GIGANTIC)
    mm.hugetlb.set_nr_overcommit(2, GIGANTIC)
    mm.hugetlb.set_nr_hugepages(1, GIGANTIC)
    with mm.spawn() as process:
        addr = process.mmap(2 * GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE)
        process.touch(addr, GIGANTIC_SIZE)
        with pytest.raises(OutOfMemory, match="SIGBUS"):
            process.touch(addr + GIGANTIC_SIZE, PAGE_SIZE)
        assert mm.hugetlb.counters(GIGANTIC) == counters(1, 0)
        verify(mm)


def test_a_gigantic_page_that_was_not_needed_goes_back(boot: Boot) -> None:
    """While Python allocated it, somebody else freed one: the fault takes that."""
    mm = boot(32, gigantic_order=GIGANTIC)
    mm.hugetlb.set_nr_overcommit(2, GIGANTIC)
    free = free_pages(mm)
    mm.hugetlb.set_nr_hugepages(1, GIGANTIC)
    (pfn,) = in_pool(mm, 1)
    mm.mem.hstate[1].resv_huge_pages = 1  # taken, until the allocation happens
    hugetlb = mm.hugetlb
    allocate = hugetlb._alloc_gigantic

    def and_meanwhile(h: int, gfp: int, user_addr: int, node: int, nodemask: int) -> int:
        mm.mem.hstate[1].resv_huge_pages = 0
        return allocate(h, gfp, user_addr, node, nodemask)

    with mm.spawn() as process, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugetlb, "_alloc_gigantic", and_meanwhile)
        addr = process.mmap(GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE)
        process.touch(addr, PAGE_SIZE)
        assert head_at(mm, process, addr) == pfn
        assert mm.hugetlb.counters(GIGANTIC) == counters(1, 0)
        verify(mm)
    mm.hugetlb.set_nr_hugepages(0, GIGANTIC)
    assert free_pages(mm) == free
    verify(mm)


def test_a_gigantic_page_that_is_one_too_many_by_now_goes_back(boot: Boot) -> None:
    mm = boot(32, gigantic_order=GIGANTIC)
    mm.hugetlb.set_nr_overcommit(1, GIGANTIC)
    free = free_pages(mm)
    hugetlb = mm.hugetlb
    allocate = hugetlb._alloc_gigantic

    def and_meanwhile(h: int, gfp: int, user_addr: int, node: int, nodemask: int) -> int:
        hugetlb.set_nr_overcommit(0, GIGANTIC)
        return allocate(h, gfp, user_addr, node, nodemask)

    with mm.spawn() as process, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugetlb, "_alloc_gigantic", and_meanwhile)
        addr = process.mmap(GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE)
        with pytest.raises(OutOfMemory, match="SIGBUS"):
            process.touch(addr, PAGE_SIZE)
    assert mm.hugetlb.counters(GIGANTIC) == counters(0, 0)
    assert free_pages(mm) == free
    verify(mm)


@pytest.mark.parametrize("cma", [0, 2048])
@pytest.mark.parametrize("gfp_zero", [0, 1 << 8])
def test_a_gigantic_page_is_zero_if_zeros_were_asked_for(boot: Boot, cma: int, gfp_zero: int) -> None:
    """Patch 9: the CMA branch gets the caller's __GFP_ZERO as the other does."""
    mm = boot(24, gigantic_order=GIGANTIC, cma_pages=cma)
    dirty_free_memory(mm)
    pfn = mm.hugetlb._alloc_gigantic(1, gfp_zero, USER_ADDR_NONE, 0)
    assert pfn != NO_PAGE
    assert (pfn >= mm.nr_pages - cma) == bool(cma)
    assert reads_zero(mm, pfn, GIGANTIC) == bool(gfp_zero)


SPY_GIGANTIC = """
from hostzero.mm import prep
from hostzero.mm.mmap import MAP_HUGETLB, MAP_NORESERVE
from tests.mm.guest import booted
from tests.mm.huge import MAP_GIGANTIC

seen = []
zero = prep.folio_zero_user

def spy(mem, pfn, order, user_addr):
    seen.append((int(order), int(user_addr) - addr))
    zero(mem, pfn, order, user_addr)

prep.folio_zero_user = spy
with booted(24, gigantic_order=11) as mm:
    mm.hugetlb.set_nr_overcommit(1, 11)
    process = mm.spawn()
    addr = process.mmap(8 << 20, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE)
    process.write(addr + 1234 * 4096 + 5, b"x")
print(seen)
"""


def test_the_real_fault_address_reaches_a_gigantic_page() -> None:
    """Patches 8 and 9: through Python, the contiguous allocation and `post_alloc_hook`."""
    assert eval(run_uncompiled(SPY_GIGANTIC)) == [(11, 1234 * PAGE_SIZE)]


@pytest.mark.parametrize("cma", [0, 2 * 2048])
@pytest.mark.parametrize("reserve", [0, MAP_NORESERVE])
def test_a_gigantic_page_is_mapped_by_several_entries(boot: Boot, cma: int, reserve: int) -> None:
    """Allocated by Python when a fault needs it, or at the reservation; zeroed once, all of it."""
    mm = boot(32, gigantic_order=GIGANTIC, cma_pages=cma)
    dirty_free_memory(mm)
    free = free_pages(mm)
    mm.hugetlb.set_nr_overcommit(2, GIGANTIC)
    with mm.spawn() as process:
        addr = process.mmap(2 * GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC | reserve)
        before = mm.vm_stats().zeroed_bytes
        process.write(addr + GIGANTIC_SIZE + 3 * HUGE + 5, b"x")
        zeroed = mm.vm_stats().zeroed_bytes - before
        assert GIGANTIC_SIZE <= zeroed <= GIGANTIC_SIZE + 3 * PAGE_SIZE
        head = head_at(mm, process, addr + GIGANTIC_SIZE)
        assert head % (1 << GIGANTIC) == 0
        assert [head_at(mm, process, addr + GIGANTIC_SIZE + i * HUGE) for i in range(4)] == [
            head + i * 512 for i in range(4)
        ]
        assert mapped(mm, process, addr + GIGANTIC_SIZE, GIGANTIC_SIZE).count(0) == GIGANTIC_SIZE - 1
        assert process.hugetlb_usage == GIGANTIC_SIZE
        held = 0 if reserve else 1
        assert mm.hugetlb.counters(GIGANTIC) == counters(1 + held, held, rsvd=held, surp=1 + held)
        verify(mm)
    assert mm.hugetlb.counters(GIGANTIC) == counters(0, 0)
    assert free_pages(mm) == free
    assert mm.cma.available_count == cma
    verify(mm)


def test_a_gigantic_copy_is_not_zeroed(boot: Boot) -> None:
    """Patch 9 and mutant 42: what is asked for without zeros carries no claim to be zero."""
    mm = boot(32, gigantic_order=GIGANTIC, cma_pages=2 * 2048)
    dirty_free_memory(mm)
    mm.hugetlb.set_nr_overcommit(2, GIGANTIC)
    file = mm.hugetlb.create_file(GIGANTIC_SIZE, GIGANTIC)
    file.fallocate(0, GIGANTIC_SIZE)
    page_bytes(mm, int(file.pages[0]), 1 << GIGANTIC)[:] = 0x21
    with mm.spawn() as process:
        addr = process.mmap(GIGANTIC_SIZE, MAP_NORESERVE, file=file)
        before = mm.vm_stats().zeroed_bytes
        process.write(addr, b"x")
        assert mm.vm_stats().zeroed_bytes - before <= 2 * PAGE_SIZE
        assert mapped(mm, process, addr, GIGANTIC_SIZE) == b"x" + contents(0x21, GIGANTIC_SIZE - 1)
        verify(mm)
    file.close()
    assert mm.cma.available_count == 2 * 2048
    verify(mm)


def test_a_cma_page_reads_zero_where_the_data_cache_aliases(boot: Boot) -> None:
    """The area is not told the user's address: its zeros must not stay in the kernel's lines."""
    mm = boot(32, gigantic_order=GIGANTIC, cma_pages=2048, dcache_aliasing=True)
    dirty_free_memory(mm)
    mm.hugetlb.set_nr_overcommit(1, GIGANTIC)
    with mm.spawn() as process:
        addr = process.mmap(GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE)
        process.write(addr, b"x")
        assert head_at(mm, process, addr) >= mm.cma.base_pfn
        evict_all(mm.mem)
        assert mapped(mm, process, addr, GIGANTIC_SIZE) == b"x" + bytes(GIGANTIC_SIZE - 1)
        verify(mm)


@pytest.mark.parametrize("cma", [0, 2560])
def test_a_bound_mapping_has_no_gigantic_page_of_another_node(boot: Boot, cma: int) -> None:
    """MPOL_BIND forbids what a preferred node only prefers, the CMA area's node included."""
    half = 4096
    zones = (ZoneSpec("Normal", 0, half, 0), ZoneSpec("Normal", half, 2 * half, 1))
    mm = boot(32, gigantic_order=GIGANTIC, zones=zones, cma_pages=cma)
    mm.hugetlb.set_nr_overcommit(2, GIGANTIC)
    with mm.spawn() as process:
        addr = process.mmap(2 * GIGANTIC_SIZE, MAP_HUGETLB | MAP_GIGANTIC | MAP_NORESERVE)
        process.mbind(addr, 2 * GIGANTIC_SIZE, MPOL_BIND, 1)
        process.write(addr, b"x")
        assert head_at(mm, process, addr) < half
        with pytest.raises(OutOfMemory, match="SIGBUS"):
            process.write(addr + GIGANTIC_SIZE, b"x")
        process.mbind(addr, 2 * GIGANTIC_SIZE, MPOL_BIND, 2)
        process.write(addr + GIGANTIC_SIZE, b"x")
        assert head_at(mm, process, addr + GIGANTIC_SIZE) >= half
        verify(mm)
