# SPDX-License-Identifier: GPL-2.0-only
"""Which node a page comes from: by policy, by address, and after a mapping was cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import BadAddress, MmError, OutOfMemory, UsageError
from hostzero.mm import MemoryManager, MmConfig, Process
from hostzero.mm.gfp import GFP_KERNEL, GFP_THISNODE, USER_ADDR_NONE
from hostzero.mm.mempolicy import (
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_INTERLEAVE,
    MPOL_PREFERRED,
    interleave_index,
    nearest_node,
    nth_node,
    vma_node,
    vma_zonelist,
)
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MADV_POPULATE_WRITE, MAP_FIXED
from hostzero.mm.mmzone import MAX_NUMNODES, ZoneSpec
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.vma import VM_READ, VM_WRITE, new_vma
from hostzero.ram import open_ram
from hostzero.units import PAGE_SHIFT, PAGE_SIZE
from tests.mm.conftest import Boot
from tests.mm.guest import verify
from tests.mm.processes import HUGE, is_huge, pfn_at

NODE_PAGES = 1024
"""4 MiB a node."""


def nodes(count: int, size: int = NODE_PAGES) -> tuple[ZoneSpec, ...]:
    return tuple(ZoneSpec(f"N{n}", n * size, (n + 1) * size, n) for n in range(count))


@pytest.fixture
def numa(boot: Boot) -> MemoryManager:
    """A guest of three nodes with 4 MiB each."""
    return boot(12, zones=nodes(3))


def node_at(mm: MemoryManager, process: Process, addr: int) -> int:
    pfn = pfn_at(mm, process, addr)
    assert pfn is not None
    return pfn // NODE_PAGES


def nodes_of(mm: MemoryManager, process: Process, addr: int, count: int, step: int = PAGE_SIZE) -> list[int]:
    """Fault pages in one by one and return where each is."""
    for page in range(count):
        process.write(addr + page * step, b"x")
    return [node_at(mm, process, addr + page * step) for page in range(count)]


def record(start: int, pages: int = 4096, pgoff: int | None = None, **fields: int) -> Any:
    vma = new_vma(start, start + pages * PAGE_SIZE, VM_READ | VM_WRITE, 0, 1, 0)
    if pgoff is not None:
        vma[0].vm_pgoff = pgoff
    for name, value in fields.items():
        vma[0][name] = value
    return vma


# ------------------------------------------------------------------ the index (patch 1)


@given(
    start=st.integers(0, 1 << 20),
    pgoff=st.integers(0, 1 << 20),
    order=st.integers(0, 10),
    page=st.integers(0, 4095),
)
def test_the_index_depends_on_the_aligned_block_alone_and_counts_blocks(
    start: int, pgoff: int, order: int, page: int
) -> None:
    """Patch 1. The mapping may start anywhere, at address 0 too, and have any offset in a file."""
    vma = record(start * PAGE_SIZE, pgoff=pgoff)
    addr = (start + page) * PAGE_SIZE
    size = PAGE_SIZE << order
    block = addr // size * size
    index = interleave_index(vma, addr, order)
    for inside in (block, block + size // 2, block + size - 1):
        if inside >= start * PAGE_SIZE:
            assert interleave_index(vma, inside, order) == index
    assert interleave_index(vma, block + size, order) == index + 1
    assert interleave_index(vma, start * PAGE_SIZE, order) == pgoff >> order


def test_anonymous_memory_takes_turns_by_address() -> None:
    """`vm_pgoff` counts: for anonymous memory it makes the index that of the address."""
    vma = record(100 * PAGE_SIZE)
    assert interleave_index(vma, 100 * PAGE_SIZE, 0) == 100
    assert interleave_index(vma, 1024 * PAGE_SIZE, 9) == 2
    assert interleave_index(record(100 * PAGE_SIZE, pgoff=7), 100 * PAGE_SIZE, 0) == 7


@pytest.mark.parametrize("start", [0, 1, 100, 511])
@pytest.mark.parametrize("subpage", [0, 1, 99, 100, 256, 511])
def test_a_huge_page_comes_from_the_same_node_whichever_subpage_faults(
    boot: Boot, start: int, subpage: int
) -> None:
    """Patch 1, mutant 40: the mapping does not start on a huge page, the fault address is raw."""
    mm = boot(16, zones=nodes(2, 2 * NODE_PAGES))
    with mm.spawn() as process:
        addr = process.mmap(3 * HUGE, MAP_FIXED, HUGE + start * PAGE_SIZE)
        process.mbind(addr, 3 * HUGE, MPOL_INTERLEAVE, 0b11)
        for block in (2 * HUGE, 3 * HUGE):
            process.write(block + subpage * PAGE_SIZE, b"x")
            assert is_huge(mm, process, block)
        assert [node_at(mm, process, block) // 2 for block in (2 * HUGE, 3 * HUGE)] == [0, 1]
        verify(mm)


# ------------------------------------------------------------------ policies


def test_without_a_policy_pages_are_local(numa: MemoryManager) -> None:
    for node in range(3):
        with numa.spawn(node=node) as process:
            addr = process.mmap(16 * PAGE_SIZE)
            assert nodes_of(numa, process, addr, 16) == [node] * 16
            assert int(vma_node(numa.mem, process._vmas[0], addr, 0)) == node


def test_pages_are_interleaved_in_turns_over_the_nodes_of_the_mask(numa: MemoryManager) -> None:
    with numa.spawn() as process:
        addr = process.mmap(12 * PAGE_SIZE, MAP_FIXED, 12 * PAGE_SIZE)
        process.mbind(addr, 12 * PAGE_SIZE, MPOL_INTERLEAVE, 0b111)
        assert nodes_of(numa, process, addr, 12) == [0, 1, 2] * 4
        other = process.mmap(12 * PAGE_SIZE, MAP_FIXED, 120 * PAGE_SIZE)
        process.mbind(other, 12 * PAGE_SIZE, MPOL_INTERLEAVE, 0b101)
        assert nodes_of(numa, process, other, 12) == [0, 2] * 6
        verify(numa)


def test_preferred_takes_the_first_node_of_its_mask_and_then_any_other(numa: MemoryManager) -> None:
    with numa.spawn() as process:
        addr = process.mmap(6 << 20)
        process.madvise(addr, 6 << 20, MADV_NOHUGEPAGE)
        process.mbind(addr, 6 << 20, MPOL_PREFERRED, 0b110)
        process.madvise(addr, 6 << 20, MADV_POPULATE_WRITE)
        found = [node_at(numa, process, at) for at in range(addr, addr + (6 << 20), PAGE_SIZE)]
        assert found[0] == 1
        assert set(found[-100:]) == {2}
        verify(numa)


def test_preferred_without_nodes_is_local(numa: MemoryManager) -> None:
    with numa.spawn(node=2) as process:
        addr = process.mmap(PAGE_SIZE)
        process.mbind(addr, PAGE_SIZE, MPOL_PREFERRED)
        assert nodes_of(numa, process, addr, 1) == [2]


@pytest.mark.parametrize(("mask", "node", "first"), [(6, 0, 1), (5, 1, 2), (3, 2, 0), (4, 2, 2)])
def test_bind_starts_with_the_nearest_of_its_nodes(
    numa: MemoryManager, mask: int, node: int, first: int
) -> None:
    with numa.spawn(node=node) as process:
        addr = process.mmap(PAGE_SIZE)
        process.mbind(addr, PAGE_SIZE, MPOL_BIND, mask)
        assert nodes_of(numa, process, addr, 1) == [first]


@pytest.mark.parametrize("advice", [None, MADV_NOHUGEPAGE])
def test_bind_fails_rather_than_take_a_page_from_another_node(
    numa: MemoryManager, advice: int | None
) -> None:
    """Node 1 is small; 0 and 2 have room that must not be used, for huge pages and small ones."""
    with numa.spawn() as process:
        addr = process.mmap(6 << 20)
        if advice is not None:
            process.madvise(addr, 6 << 20, advice)
        process.mbind(addr, 6 << 20, MPOL_BIND, 0b010)
        with pytest.raises(OutOfMemory):
            process.madvise(addr, 6 << 20, MADV_POPULATE_WRITE)
        there = [at for at in range(addr, addr + (6 << 20), PAGE_SIZE) if pfn_at(numa, process, at)]
        assert len(there) > NODE_PAGES // 2
        assert {node_at(numa, process, at) for at in there} == {1}
        verify(numa)
    verify(numa)


def test_bind_to_two_nodes_uses_both(numa: MemoryManager) -> None:
    with numa.spawn() as process:
        addr = process.mmap(6 << 20)
        process.mbind(addr, 6 << 20, MPOL_BIND, 0b110)
        process.madvise(addr, 6 << 20, MADV_POPULATE_WRITE)
        found = {node_at(numa, process, at) for at in range(addr, addr + (6 << 20), PAGE_SIZE)}
        assert found == {1, 2}


def test_this_node_means_the_policys_node(numa: MemoryManager) -> None:
    """A row of a mask is no node: __GFP_THISNODE must see through it."""
    with numa.spawn() as process:
        addr = process.mmap(PAGE_SIZE)
        process.mbind(addr, PAGE_SIZE, MPOL_BIND, 0b110)
        row = int(vma_zonelist(numa.mem, process._vmas[0], addr, 0))
    pfn = int(alloc_pages(numa.mem, GFP_KERNEL | GFP_THISNODE, 0, USER_ADDR_NONE, row, 0))
    assert pfn // NODE_PAGES == 1


def test_set_mempolicy_is_the_default_of_new_mappings(numa: MemoryManager) -> None:
    with numa.spawn() as process:
        before = process.mmap(PAGE_SIZE)
        process.set_mempolicy(MPOL_BIND, 0b100)
        after = process.mmap(PAGE_SIZE)
        process.set_mempolicy(MPOL_DEFAULT)
        last = process.mmap(PAGE_SIZE)
        assert [nodes_of(numa, process, at, 1)[0] for at in (before, after, last)] == [0, 2, 0]


# ------------------------------------------------------------------ mbind on mappings


def test_a_part_of_a_mapping_gets_its_own_policy_and_every_part_keeps_its_turn(numa: MemoryManager) -> None:
    """Cutting a mapping must move `vm_pgoff` along, or the turns shift behind the cut."""
    with numa.spawn() as process:
        addr = process.mmap(30 * PAGE_SIZE, MAP_FIXED, 31 * PAGE_SIZE)
        process.mbind(addr, 30 * PAGE_SIZE, MPOL_INTERLEAVE, 0b111)
        whole = [int(interleave_index(process._vmas[0], addr + n * PAGE_SIZE, 0)) for n in range(30)]
        process.mbind(addr + 7 * PAGE_SIZE, 6 * PAGE_SIZE, MPOL_BIND, 0b010)
        parts = sorted((int(v[0].vm_start), int(v[0].vm_end), int(v[0].policy)) for v in process._vmas)
        cuts = [addr + page * PAGE_SIZE for page in (0, 7, 13, 30)]
        kinds = [MPOL_INTERLEAVE, MPOL_BIND, MPOL_INTERLEAVE]
        assert parts == list(zip(cuts[:-1], cuts[1:], kinds, strict=True))
        for vma in process._vmas:
            first = (int(vma[0].vm_start) - addr) >> PAGE_SHIFT
            assert int(vma[0].vm_pgoff) == whole[first]
        turns = [(31 + n) % 3 for n in range(30)]
        turns[7:13] = [1] * 6
        assert nodes_of(numa, process, addr, 30) == turns
        process.munmap(addr + 15 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert nodes_of(numa, process, addr + 17 * PAGE_SIZE, 13) == turns[17:]
        verify(numa)


def test_mbind_leaves_pages_where_they_are(numa: MemoryManager) -> None:
    with numa.spawn() as process:
        addr = process.mmap(2 * PAGE_SIZE)
        process.write(addr, b"x")
        process.mbind(addr, 2 * PAGE_SIZE, MPOL_BIND, 0b100)
        assert nodes_of(numa, process, addr, 2) == [0, 2]


@pytest.mark.parametrize(
    ("mode", "mask"),
    [(MPOL_DEFAULT, 1), (MPOL_BIND, 0), (MPOL_INTERLEAVE, 0), (MPOL_BIND, 8), (4, 1), (MPOL_PREFERRED, -1)],
)
def test_policies_without_sense_are_refused(numa: MemoryManager, mode: int, mask: int) -> None:
    with numa.spawn() as process:
        addr = process.mmap(PAGE_SIZE)
        with pytest.raises(MmError, match="-EINVAL"):
            process.mbind(addr, PAGE_SIZE, mode, mask)
        with pytest.raises(MmError, match="-EINVAL"):
            process.set_mempolicy(mode, mask)
        assert nodes_of(numa, process, addr, 1) == [0]


def test_mbind_wants_a_mapped_range(numa: MemoryManager) -> None:
    with numa.spawn() as process:
        addr = process.mmap(PAGE_SIZE)
        with pytest.raises(BadAddress):
            process.mbind(addr, 2 * PAGE_SIZE, MPOL_BIND, 1)
        with pytest.raises(MmError, match="-EINVAL"):
            process.mbind(addr + 1, PAGE_SIZE, MPOL_BIND, 1)


def test_a_guest_has_no_more_nodes_than_a_mask_has_bits() -> None:
    zones = (ZoneSpec("N0", 0, 1024, 0), ZoneSpec("N8", 1024, 2048, MAX_NUMNODES))
    with open_ram(8 << 20) as ram, pytest.raises(UsageError, match="node 8"):
        MemoryManager(ram, MmConfig(zones=zones))


@given(mask=st.integers(1, 255), n=st.integers(0, 1000))
def test_turns_go_round_the_nodes_of_a_mask(mask: int, n: int) -> None:
    members = [node for node in range(8) if mask >> node & 1]
    assert nth_node(mask, n) == members[n % len(members)]


def test_the_rows_of_a_mask_hold_its_zones_in_the_nodes_order(numa: MemoryManager) -> None:
    rows = numa.mem.zonelists
    assert rows[:3].tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert rows[0b110 * 3 + 2].tolist() == [2, 1, -1]
    assert rows[0b001 * 3 + 1].tolist() == [0, -1, -1]
    assert len(rows) == 24
    assert nearest_node(numa.mem, 0b011, 2) == 0
