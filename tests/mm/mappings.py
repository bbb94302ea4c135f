# SPDX-License-Identifier: GPL-2.0-only
"""Whether page tables, page records and the swap area tell one story of a guest's processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from hostzero.mm import MemoryManager, Process
from tests.mm.processes import LEVELS

PRESENT, PSE = 1, 0x80


def entries_of(mm: MemoryManager, process: Process) -> Iterator[tuple[int, int, bool]]:
    """Yield page number, entry and whether it is a huge one, of all that a process has mapped."""

    def below(table: int, level: int, base: int) -> Iterator[tuple[int, int, bool]]:
        words = mm.mem.ram[table * 512 : table * 512 + 512]
        for i in np.flatnonzero(words):
            value, addr = int(words[i]), base + (int(i) << LEVELS[level])
            if level == 3 or (level == 2 and value & PSE):
                yield addr >> 12, value, level == 2
            else:
                yield from below((value % (1 << 52)) >> 12, level + 1, addr)

    yield from below(int(process._pgd), 0, 0)


def head_of(mm: MemoryManager, pfn: int) -> int:
    """Return the head of the folio that a page belongs to."""
    link = int(mm.mem.compound_head[pfn])
    return link >> 1 if link & 1 else pfn


def order_of(mm: MemoryManager, pfn: int) -> int:
    """Return the order of the folio that a page belongs to."""
    return int(mm.mem.mem_map[head_of(mm, pfn)].order)


def verify_mappings(mm: MemoryManager, processes: Sequence[Process]) -> None:
    """Check each folio's references, owner and place, and each swap slot, against the page tables.

    Assumes that nobody but these processes has anonymous pages or swap slots.
    """
    references: Counter[int] = Counter()
    pages: set[int] = set()
    slots: list[int] = []
    zero_page = int(mm.mem.vm[0].empty_zero_page)
    records = mm.mem.mem_map
    for process in processes:
        for number, value, huge in entries_of(mm, process):
            if not value & PRESENT:
                assert value & 0xFFF == 2
                slots.append(value >> 12)
                continue
            pfn = (value % (1 << 52)) >> 12
            if pfn == zero_page:
                continue
            head = head_of(mm, pfn)
            assert pfn not in pages
            pages.update(range(pfn, pfn + 512) if huge else [pfn])
            references[head] += 1
            assert int(records[pfn]._mapcount) == 0
            assert int(records[head].mapping) == process._mm_id
            assert int(records[head].index) + pfn - head == number
            assert huge == (order_of(mm, pfn) == 9)
    for head, count in references.items():
        assert int(records[head]._refcount) == count
        for pfn in range(head, head + (1 << order_of(mm, head))):
            assert order_of(mm, head) == 9 or (pfn in pages) == (int(records[pfn]._mapcount) == 0)
    assert len(set(slots)) == len(slots)
    assert set(slots) == set(np.flatnonzero(mm.mem.swap_map).tolist())
