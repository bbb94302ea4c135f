# SPDX-License-Identifier: GPL-2.0-only
"""Small guests for the tests of `mm/`, and ways to look at what their allocator holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hostzero.mm import MemoryManager, MmConfig
from hostzero.mm.mmzone import (
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_NR_PAGES,
    Memory,
)
from hostzero.mm.page_flags import PG_zeroed
from hostzero.mm.verify import verify_memory
from hostzero.ram import open_ram
from hostzero.units import PAGE_SIZE

Block = tuple[int, int, int]
"""Zone, order and migrate type of a free list."""


@contextmanager
def booted(mib: int = 8, **config: Any) -> Iterator[MemoryManager]:
    """Boot a guest of `mib` MiB of anonymous RAM; debug assertions are on unless `config` says otherwise."""
    with open_ram(mib << 20) as ram:
        yield MemoryManager(ram, MmConfig(**config))


Links = tuple[list[int], list[int]]
"""The forward and the backward link of every node, as Python lists: a walk over records is slow."""


def links_of(mem: Memory) -> Links:
    """Return the links as they are now."""
    return mem.mem_map["lru_next"].tolist(), mem.mem_map["lru_prev"].tolist()


def walk(mem: Memory, head: int, links: Links | None = None) -> list[int]:
    """Return the nodes of a list in order; fails if forward and backward links do not agree."""
    following, previous = links or links_of(mem)
    found: list[int] = []
    before, node = head, following[head]
    while node != head:
        assert previous[node] == before
        assert len(found) < len(following)
        found.append(node)
        before, node = node, following[node]
    assert previous[head] == before
    return found


def free_head(mem: Memory, zone: int, order: int, migratetype: int) -> int:
    """Return the list head of a free area, from the layout that `mmzone` documents."""
    return int(mem.vm[0].nr_pages) + (zone * NR_PAGE_ORDERS + order) * MIGRATE_TYPES + migratetype


def pcp_head(mem: Memory, zone: int, cpu: int, pindex: int) -> int:
    """Return the list head of a per-CPU list."""
    first = int(mem.vm[0].nr_pages) + len(mem.zone) * NR_PAGE_ORDERS * MIGRATE_TYPES
    return first + (cpu * len(mem.zone) + zone) * NR_PCP_LISTS + pindex


def free_lists(mem: Memory) -> dict[Block, list[int]]:
    """Return every free list that is not empty, its blocks in order."""
    lists: dict[Block, list[int]] = {}
    links = links_of(mem)
    for zone in range(len(mem.zone)):
        for order in range(NR_PAGE_ORDERS):
            for migratetype in range(MIGRATE_TYPES):
                blocks = walk(mem, free_head(mem, zone, order, migratetype), links)
                if blocks:
                    lists[zone, order, migratetype] = blocks
    return lists


def pcp_lists(mem: Memory, zone: int = 0) -> dict[tuple[int, int], list[int]]:
    """Return a zone's per-CPU lists that are not empty, by CPU and index."""
    lists: dict[tuple[int, int], list[int]] = {}
    links = links_of(mem)
    for cpu in range(int(mem.vm[0].nr_cpus)):
        for pindex in range(NR_PCP_LISTS):
            blocks = walk(mem, pcp_head(mem, zone, cpu, pindex), links)
            if blocks:
                lists[cpu, pindex] = blocks
    return lists


def is_marked_zero(mem: Memory, pfn: int) -> bool:
    """Return whether a page carries `PG_zeroed`."""
    return bool(int(mem.mem_map[pfn].flags_f) & PG_zeroed)


def page_bytes(mm: MemoryManager, pfn: int, pages: int = 1) -> Any:
    """Return a writable view of the bytes of some pages."""
    return mm.ram_bytes[pfn * PAGE_SIZE : (pfn + pages) * PAGE_SIZE]


def reads_zero(mm: MemoryManager, pfn: int, order: int = 0) -> bool:
    """Return whether every byte of a block is zero."""
    return not np.any(page_bytes(mm, pfn, 1 << order))


def dirty(mm: MemoryManager, pfn: int, order: int = 0, value: int = 0x5A) -> None:
    """Write to every byte of a block, as its owner."""
    page_bytes(mm, pfn, 1 << order)[:] = value


def dirty_free_memory(mm: MemoryManager, value: int = 0x5A) -> None:
    """Leave earlier owners' bytes in every free page, as in a guest that has run for a while."""
    mm.drain_all_pages()
    for (_, order, _), blocks in free_lists(mm.mem).items():
        for pfn in blocks:
            if not is_marked_zero(mm.mem, pfn):
                dirty(mm, pfn, order, value)


def block_start(pfn: int) -> int:
    """Return the first page of the pageblock that holds `pfn`."""
    return pfn - pfn % PAGEBLOCK_NR_PAGES


def verify(mm: MemoryManager) -> None:
    """Check every list, counter and zero claim of a guest."""
    verify_memory(mm.mem)
