# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of migration and compaction share: isolating, moving, and guests in pieces."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import numpy as np

from hostzero.mm import MemoryManager, Process
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, USER_ADDR_NONE
from hostzero.mm.migrate import isolate_migratepages_range, migrate_pages
from hostzero.mm.mmap import MADV_DONTNEED
from hostzero.mm.mmzone import NR_PAGE_ORDERS, Memory
from hostzero.mm.page_alloc import __alloc_frozen_pages as _alloc_frozen_pages
from hostzero.mm.page_flags import PG_private
from hostzero.units import PAGE_SIZE
from tests.mm.guest import page_bytes, verify, walk
from tests.mm.processes import mapped, occupy, pfn_at, release


def isolate(mm: MemoryManager, start: int, end: int) -> list[int] | None:
    """Isolate what is movable in a range; return the heads, or None if something is not movable."""
    out = np.full(end - start, -7, dtype=np.int64)
    found = int(isolate_migratepages_range(mm.mem, start, end, out))
    return None if found < 0 else out[:found].tolist()


def target(mm: MemoryManager, order: int) -> int:
    """Return a frozen block to move a folio to, as contiguous allocation takes it."""
    gfp = GFP_HIGHUSER_MOVABLE | (GFP_COMP if order else 0)
    pfn = int(_alloc_frozen_pages(mm.mem, gfp, order, USER_ADDR_NONE, 0, 0))
    assert pfn < 0 or not int(mm.mem.mem_map[pfn].flags_f) & PG_private
    return pfn


def move(mm: MemoryManager, start: int, end: int) -> list[int]:
    """Move everything out of a range; return the heads that stayed."""
    heads = isolate(mm, start, end)
    assert heads is not None
    return migrate_pages(mm, heads, lambda order: target(mm, order))


def scatter(process: Process, pages: int, keep: int, seed: int = 1) -> tuple[int, dict[int, bytes]]:
    """Map `pages`, write each, and give all but `keep` of them back; return what the rest hold by address."""
    addr = process.mmap(pages * PAGE_SIZE)
    process.touch(addr, pages * PAGE_SIZE)
    kept = sorted(random.Random(seed).sample(range(pages), keep))
    held = {addr + i * PAGE_SIZE: b"page %d of %d" % (i, seed) for i in kept}
    for at, data in held.items():
        pfn = pfn_at(process._mm, process, at)
        assert pfn is not None
        page_bytes(process._mm, pfn)[:] = np.frombuffer(data.ljust(PAGE_SIZE, b"\0"), dtype=np.uint8)
    for low, high in itertools.pairwise([-1, *kept, pages]):
        if high > low + 1:
            process.madvise(addr + (low + 1) * PAGE_SIZE, (high - low - 1) * PAGE_SIZE, MADV_DONTNEED)
    return addr, held


def fragment_movable(mm: MemoryManager) -> list[int]:
    """Leave one movable page of each pageblock allocated and return these: no block of order 9 is free."""
    taken = occupy(mm, keep_watermarks=True)
    stay = list({pfn // 512: pfn for pfn in taken}.values())
    release(mm, set(taken).difference(stay))
    assert int(mm.mem.zone[0].nr_free[9:].sum()) == 0
    return stay


def holds(process: Process, held: dict[int, bytes]) -> bool:
    """Return whether each page still reads as it was written, and zero behind that."""
    found = (bytes(mapped(process._mm, process, at, PAGE_SIZE)) for at in held)
    return all(page == data.ljust(PAGE_SIZE, b"\0") for page, data in zip(found, held.values(), strict=True))


def compaction_is_idle(mem: Memory) -> bool:
    """Return whether compaction holds no page and waits for none."""
    first = int(mem.vm[0].compact_heads)
    lists: Iterable[list[int]] = (walk(mem, first + i) for i in range(NR_PAGE_ORDERS + 2))
    vm = mem.vm[0]
    return not any(lists) and (int(mem.cc[0].active), int(vm.capture_order), int(vm.nr_balloon_isolated)) == (
        0,
        0,
        0,
    )


def check(mm: MemoryManager) -> None:
    """Check every list and claim, and that compaction has let go of everything."""
    verify(mm)
    assert compaction_is_idle(mm.mem)
    assert mm.vm_stats().bad_pages == 0
