# SPDX-License-Identifier: GPL-2.0-only
"""More scenarios for `test_matrix`: what users of the allocator do with zero blocks beyond taking them.

Those that need a guest of another make boot one of their own, with the options under test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hostzero import Machine
from hostzero.errors import MemcgOutOfMemory, MmError
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.memory_failure import MF_RECOVERED
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MAP_HUGETLB,
    MAP_NORESERVE,
)
from hostzero.units import PAGE_SIZE
from tests.mm.guest import is_marked_zero
from tests.mm.mappings import verify_mappings
from tests.scenarios import (
    DIRT,
    MIB,
    believes,
    check,
    dirty_and_free,
    machine_of,
    scenario,
    take_and_free_all_orders,
)

HUGE = 2 * MIB


def another(machine: Machine, **options: Any) -> Machine:
    """Return a machine like this one but for some options of its guest."""
    return machine_of(dataclasses.replace(machine.mm.config, **options))


@scenario
def compacted_and_migrated(machine: Machine) -> None:
    """Every other page of a process stays, a balloon between: they move together, known zeros beside them."""
    dirty_and_free(machine)
    machine.flush()
    with machine.spawn() as process:
        address = process.mmap(8 * MIB)
        process.madvise(address, 8 * MIB, MADV_NOHUGEPAGE)
        process.fill(address, 8 * MIB, DIRT)
        machine.balloon(4 * MIB)
        for page in range(0, 8 * MIB, 8 * PAGE_SIZE):
            process.madvise(address + page, 4 * PAGE_SIZE, MADV_DONTNEED)
        check(machine)
        assert machine.mm.compact_memory() > 0
        check(machine)
        verify_mappings(machine.mm, [process])
        for page in range(0, 8 * MIB, 8 * PAGE_SIZE):
            expected = bytes(4 * PAGE_SIZE) + bytes([DIRT]) * 4 * PAGE_SIZE
            assert process.read(address + page, 8 * PAGE_SIZE) == expected
    machine.balloon(0)
    check(machine)
    take_and_free_all_orders(machine)


@scenario
def surplus_huge_pages(machine: Machine) -> None:
    """A surplus page keeps what was known; one of the pool is zeroed again for its next user."""
    dirty_and_free(machine)
    machine.flush()
    machine.mm.hugetlb.set_nr_overcommit(2)
    machine.mm.hugetlb.set_nr_hugepages(1)
    before = machine.stats().known_zero
    for _ in range(2):
        with machine.spawn() as process:
            address = process.mmap(3 * HUGE, MAP_HUGETLB | MAP_NORESERVE)
            process.madvise(address, 3 * HUGE, MADV_POPULATE_WRITE)
            assert process.find_nonzero(address, 3 * HUGE) is None
            check(machine)
            process.fill(address, 3 * HUGE, DIRT)
        check(machine)
    assert (machine.stats().known_zero - before >= HUGE) == believes(machine)
    machine.mm.hugetlb.set_nr_hugepages(0)
    check(machine)


@scenario
def refused_by_a_cgroup(machine: Machine) -> None:
    """A folio that was zero, or zeroed, and then not charged goes back as any other."""
    dirty_and_free(machine)
    machine.flush()
    memcg = machine.mm.memcg.create(3 * MIB)
    with machine.spawn() as process:
        process.memcg = memcg
        address = process.mmap(8 * MIB)
        for byte in (DIRT, 0x66):
            with pytest.raises(MemcgOutOfMemory):
                process.fill(address, 8 * MIB, byte)
            check(machine)
            assert process.find_nonzero(address, 8 * MIB) is None
            process.fill(address, 1 * MIB, byte)
            process.madvise(address, 8 * MIB, MADV_DONTNEED)
            assert machine.mm.memcg.usage_bytes(memcg) == 0
            check(machine)
    take_and_free_all_orders(machine)


@scenario
def swapped_out_and_in(machine: Machine) -> None:
    """What comes back asks for no zeros, and gets its bytes on pages known to be zero or not."""
    with another(machine, swap_size=4 * MIB, anon_orders=(4,)) as guest:
        dirty_and_free(guest)
        guest.flush()
        with guest.spawn() as process:
            address = process.mmap(5 * MIB)
            process.fill(address, 5 * MIB, DIRT)
            process.madvise(address, 5 * MIB, MADV_PAGEOUT)
            assert guest.mm.swap.used_bytes == 4 * MIB
            check(guest)
            guest.flush()
            assert process.read(address, 5 * MIB) == bytes([DIRT]) * 5 * MIB
            check(guest)
            verify_mappings(guest.mm, [process])
        assert guest.mm.swap.used_bytes == 0
        check(guest)
        take_and_free_all_orders(guest)


@scenario
def broken_memory(machine: Machine) -> None:
    """Pages break in a zero block, in a process and in a kernel block, and are repaired."""
    mm = machine.mm
    dirty_and_free(machine)
    machine.flush()
    mm.drain_all_pages()
    before = mm.vm_stats().free_pages
    inside = next(pfn for pfn in range(1024, mm.nr_pages, 512) if mm.mem.mem_map[pfn].private == 9) + 100
    assert mm.memory_failure.memory_failure(inside) == MF_RECOVERED
    assert not is_marked_zero(mm.mem, inside)
    check(machine)
    block = mm.alloc_pages(GFP_KERNEL, 6)
    mm.memory_failure.memory_failure(block + 5)
    mm.free_pages(block, 6)
    check(machine)
    with machine.spawn() as process:
        address = process.mmap(HUGE)
        process.fill(address, HUGE, DIRT)
        (owned,) = mm.mem.mem_map.mapping[: mm.nr_pages].nonzero()
        assert mm.memory_failure.memory_failure(int(owned[0])) == MF_RECOVERED
        check(machine)
        with pytest.raises(MmError, match="SIGBUS"):
            process.read(address, HUGE)
    check(machine)
    mm.drain_all_pages()
    assert mm.vm_stats().free_pages == before - 3
    for pfn in (inside, block + 5, int(owned[0])):
        assert mm.memory_failure.unpoison_memory(pfn)
        check(machine)
    assert mm.vm_stats().free_pages == before
    take_and_free_all_orders(machine)


@scenario
def placed_by_what_is_known(machine: Machine) -> None:
    """Requests choose among blocks by their marks; contents and claims are none the worse for it."""
    with another(machine, placement="zero-aware") as guest:
        dirty_and_free(guest)
        guest.flush()
        guest.balloon(4 * MIB)
        guest.balloon(0)
        check(guest)
        kernel = [guest.mm.alloc_pages(GFP_KERNEL, order) for order in (0, 1, 3, 5) for _ in range(20)]
        check(guest)
        assert (take_and_free_all_orders(guest) > 0) == believes(guest)
        for index, pfn in enumerate(kernel):
            guest.mm.free_pages(pfn, (0, 1, 3, 5)[index // 20])
        check(guest)
        take_and_free_all_orders(guest)
