# SPDX-License-Identifier: GPL-2.0-only
"""Huge pages and memory cgroups: what is charged, and what a charge that fails leaves behind."""

from __future__ import annotations

import pytest

from hostzero.errors import MemcgOutOfMemory
from hostzero.mm import MemoryManager
from hostzero.mm.mmap import MADV_POPULATE_WRITE, MAP_HUGETLB, MAP_NORESERVE, MAP_SHARED
from tests.mm.conftest import Boot
from tests.mm.guest import is_marked_zero, verify
from tests.mm.huge import counters, head_at, hpg_zeroed, in_pool, pool, zeroed_by_host
from tests.mm.processes import HUGE


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with a pool of one page, and leave to take one more."""
    return pool(boot(12), 1, overcommit=1)


def test_a_huge_page_is_charged_until_its_last_reference_goes(mm: MemoryManager) -> None:
    memcg = mm.memcg.create(2 * HUGE)
    file = mm.hugetlb.create_file(HUGE)
    with mm.spawn() as process:
        process.memcg = memcg
        process.touch(process.mmap(HUGE, MAP_HUGETLB), HUGE)
        process.touch(process.mmap(HUGE, MAP_SHARED, file=file), HUGE)
        assert mm.memcg.usage_bytes(memcg) == 2 * HUGE
        verify(mm)
    assert mm.memcg.usage_bytes(memcg) == HUGE  # the file's
    file.close()
    assert mm.memcg.usage_bytes(memcg) == 0
    verify(mm)


def test_fallocate_is_charged_to_the_root(mm: MemoryManager) -> None:
    file = mm.hugetlb.create_file(HUGE)
    file.fallocate(0, HUGE)
    assert int(mm.mem.mem_map[int(file.pages[0])].memcg_data) == 0


@pytest.mark.parametrize("flags", [0, MAP_NORESERVE])
def test_a_failed_charge_gives_page_and_reservation_back(mm: MemoryManager, flags: int) -> None:
    """HPG table: a failed charge forgets the mark, for the page passes free_huge_folio."""
    memcg = mm.memcg.create(HUGE)
    with mm.spawn() as process:
        process.memcg = memcg
        addr = process.mmap(2 * HUGE, MAP_HUGETLB | flags)
        process.touch(addr, HUGE)
        before = mm.hugetlb.counters()
        with pytest.raises(MemcgOutOfMemory, match=f"cgroup {memcg} is at its limit"):
            process.touch(addr + HUGE, HUGE)
        assert mm.hugetlb.counters() == before
        assert mm.memcg.failcnt(memcg) == 1
        assert mm.memcg.usage_bytes(memcg) == HUGE
        verify(mm)
        mm.memcg.set_max(memcg, 2 * HUGE)
        process.touch(addr + HUGE, HUGE)
        assert process.read(addr + HUGE + 1, 8) == bytes(8)
        verify(mm)
    assert mm.hugetlb.counters() == counters(1, 1)
    assert mm.memcg.usage_bytes(memcg) == 0
    verify(mm)


def test_zeroing_before_a_failed_charge_is_in_vain(boot: Boot) -> None:
    """Patch 20 as 17 and 19: the fresh page was zeroed, and goes back to the buddy without a mark."""
    mm = pool(boot(12), 0, overcommit=1)
    with mm.spawn() as process:
        process.memcg = mm.memcg.create(0)
        addr = process.mmap(HUGE, MAP_HUGETLB | MAP_NORESERVE)
        with pytest.raises(MemcgOutOfMemory):
            process.touch(addr, HUGE)
        assert mm.vm_stats().zeroed_in_vain_bytes == HUGE
        mm.drain_all_pages()
        assert not any(is_marked_zero(mm.mem, pfn) for pfn in range(mm.nr_pages))
        verify(mm)


def test_a_page_of_the_pool_is_charged_before_it_is_zeroed(mm: MemoryManager) -> None:
    with mm.spawn() as process:
        process.memcg = mm.memcg.create(0)
        addr = process.mmap(HUGE, MAP_HUGETLB)
        with pytest.raises(MemcgOutOfMemory):
            process.madvise(addr, HUGE, MADV_POPULATE_WRITE)
        assert mm.vm_stats().zeroed_in_vain_bytes == 0
        assert [hpg_zeroed(mm, pfn) for pfn in in_pool(mm)] == [False]
        assert mm.hugetlb.counters() == counters(1, 1, rsvd=1)
        verify(mm)


def test_a_copy_that_cannot_be_charged_leaves_the_files_page(mm: MemoryManager) -> None:
    file = mm.hugetlb.create_file(HUGE)
    file.fallocate(0, HUGE)
    with mm.spawn() as process:
        process.memcg = mm.memcg.create(0)
        addr = process.mmap(HUGE, MAP_NORESERVE, file=file)
        with pytest.raises(MemcgOutOfMemory):
            process.write(addr, b"x")
        assert process.read(addr, 1) == bytes(1)
        assert head_at(mm, process, addr) == int(file.pages[0])
        verify(mm)


def test_what_the_host_zeroed_is_lost_with_the_charge(boot: Boot) -> None:
    """Known zero, not zeroed, so nothing was in vain; the hint went with the allocation."""
    mm = pool(boot(12), 0, overcommit=1)
    zeroed_by_host(mm)
    with mm.spawn() as process:
        process.memcg = mm.memcg.create(0)
        addr = process.mmap(HUGE, MAP_HUGETLB | MAP_NORESERVE)
        before = mm.vm_stats().known_zero_bytes
        with pytest.raises(MemcgOutOfMemory):
            process.touch(addr, HUGE)
        assert mm.vm_stats().known_zero_bytes - before >= HUGE
        assert mm.vm_stats().zeroed_in_vain_bytes == 0
        verify(mm)
