# SPDX-License-Identifier: GPL-2.0-only
"""Any history of contiguous, CMA and ordinary allocations over a dirty, partly reported guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hostzero.errors import OutOfMemory
from hostzero.jit import COMPILER_ON
from hostzero.mm import MemoryManager, contig
from hostzero.mm.cma import cma_alloc_frozen_compound, cma_release_frozen
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO, USER_ADDR_NONE
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.mm.mmzone import MIGRATE_ISOLATE, NO_PAGE, get_pageblock_migratetype
from hostzero.mm.page_flags import PG_zeroed
from hostzero.mm.verify import verify_memory
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.guest import booted, dirty_free_memory, free_lists, is_marked_zero, page_bytes, reads_zero
from tests.mm.processes import FakeHost, mapped, pfn_at

USER_PAGES = 32
Step = tuple[Any, ...]


@dataclass
class Run:
    """Pages that somebody owns, all bytes of which are `value`."""

    kind: str
    pfn: int
    count: int
    order: int
    value: int


class Guest:
    """A guest, who owns what in it, and what each step does to that."""

    def __init__(self, mm: MemoryManager) -> None:
        """Dirty everything and register a host that drops two of three blocks."""
        self.mm = mm
        self.runs: list[Run] = []
        self.process = mm.spawn()
        self.addr = self.process.mmap(USER_PAGES * PAGE_SIZE)
        self.written = bytearray(USER_PAGES * PAGE_SIZE)
        self.value = 0
        dirty_free_memory(mm)
        self.host = FakeHost(mm, capacity=1, order=3, zeroes=lambda pfn, order: pfn // 8 % 3 != 1)
        self.host.register()

    def own(self, kind: str, pfn: int, count: int, order: int, zero: int) -> None:
        """Check what was handed out, and write to it."""
        assert zero == 0 or not np.any(page_bytes(self.mm, pfn, count))
        assert not np.any(self.mm.mem.mem_map[pfn : pfn + count].flags_f & PG_zeroed)
        for run in self.runs:
            assert run.pfn + run.count <= pfn or pfn + count <= run.pfn
        self.value = self.value % 255 + 1
        page_bytes(self.mm, pfn, count)[:] = self.value
        self.runs.append(Run(kind, pfn, count, order, self.value))

    def take(self, step: Step) -> None:
        """Carry out one step; one that cannot be had is nothing."""
        mm, (what, *arguments) = self.mm, step
        if what == "report":
            mm.page_reporting.flush(UINT_MAX)
        elif what == "drain":
            mm.drain_all_pages()
        elif what == "write":
            self.write(*arguments)
        elif what == "free" and self.runs:
            self.free(self.runs.pop(arguments[0] % len(self.runs)), known_zero=arguments[1])
        elif what == "buddy":
            order, movable, zero = arguments
            gfp = GFP_HIGHUSER_MOVABLE if movable else GFP_KERNEL
            try:
                pfn = mm.alloc_pages(gfp | GFP_COMP | zero, order)
            except OutOfMemory:
                return
            self.own(what, pfn, 1 << order, order, zero)
        elif what == "contig":
            order, folio, zero = arguments
            addr = 0x1234_5678 if folio else USER_ADDR_NONE
            self.own_if_any(
                what,
                contig.alloc_contig_frozen_pages_user(mm, order, GFP_KERNEL | folio | zero, 0, addr),
                order,
                zero,
            )
        elif what == "range":
            start, count, zero = arguments
            end = min(start + count, mm.nr_pages)
            if contig.alloc_contig_frozen_range(mm, start, end, GFP_KERNEL | zero):
                self.own(what, start, end - start, 0, zero)
        elif what == "cma":
            order, zero = arguments
            self.own_if_any(what, cma_alloc_frozen_compound(mm, order, zero), order, zero)

    def own_if_any(self, kind: str, pfn: int, order: int, zero: int) -> None:
        """Own a run, unless there was none."""
        if pfn != NO_PAGE:
            self.own(kind, pfn, 1 << order, order, zero)

    def write(self, page: int) -> None:
        """Let a process write to a page of its own, which may be moved from then on."""
        self.value = self.value % 255 + 1
        try:
            self.process.write(self.addr + page * PAGE_SIZE, bytes([self.value]) * 16)
        except OutOfMemory:
            return
        self.written[page * PAGE_SIZE : page * PAGE_SIZE + 16] = bytes([self.value]) * 16

    def free(self, run: Run, *, known_zero: bool) -> None:
        """Free a run, as known to be zero if its owner has zeroed it and may say so."""
        mm = self.mm
        if known_zero and run.kind == "buddy":
            page_bytes(mm, run.pfn, run.count)[:] = 0
            mm.mem.mem_map[run.pfn]._refcount = 0
            mm.free_frozen_pages_zeroed(Pfn(run.pfn), run.order)
        elif run.kind == "buddy":
            mm.free_pages(Pfn(run.pfn), run.order)
        elif run.kind == "cma":
            assert cma_release_frozen(mm, run.pfn, run.order)
        elif run.kind == "contig":
            contig.free_contig_frozen_range(mm, run.pfn, run.order)
        else:
            for pfn in range(run.pfn, run.pfn + run.count):
                contig.free_contig_frozen_range(mm, pfn, 0)

    def check(self) -> None:
        """Check the allocator, every claim, and every byte that somebody owns."""
        mm = self.mm
        verify_memory(mm.mem, contents=COMPILER_ON)
        for (_, order, _), blocks in free_lists(mm.mem).items():
            assert all(reads_zero(mm, pfn, order) for pfn in blocks if is_marked_zero(mm.mem, pfn))
        for run in self.runs:
            assert np.all(page_bytes(mm, run.pfn, run.count) == run.value)
        for page in range(USER_PAGES):
            if pfn_at(mm, self.process, self.addr + page * PAGE_SIZE) is not None:
                place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                assert mapped(mm, self.process, self.addr + place.start, PAGE_SIZE) == self.written[place]
        types = [int(get_pageblock_migratetype(mm.mem, pfn)) for pfn in range(0, mm.nr_pages, 512)]
        assert MIGRATE_ISOLATE not in types


ZERO = st.sampled_from([0, GFP_ZERO])
STEPS = st.one_of(
    st.tuples(st.just("buddy"), st.integers(0, 9), st.booleans(), ZERO),
    st.tuples(st.just("contig"), st.integers(0, 10), st.sampled_from([0, GFP_COMP]), ZERO),
    st.tuples(st.just("range"), st.integers(1, 3071), st.integers(1, 1200), ZERO),
    st.tuples(st.just("cma"), st.integers(0, 9), ZERO),
    st.tuples(st.just("free"), st.integers(0, 100), st.booleans()),
    st.just(("report",)),
    st.just(("drain",)),
    st.tuples(st.just("write"), st.integers(0, 31)),
)


@settings(max_examples=60 if COMPILER_ON else 5, deadline=None)
@given(steps=st.lists(STEPS, max_size=20))
@example(
    steps=[
        ("contig", 8, GFP_COMP, GFP_ZERO),
        ("free", 0, False),
        ("contig", 7, 0, GFP_ZERO),
        ("report",),
        ("write", 0),
        ("write", 7),
        ("contig", 9, 0, GFP_ZERO),
        ("cma", 9, 0),
        ("range", 1600, 300, 0),
        ("contig", 9, GFP_COMP, GFP_ZERO),
        ("free", 0, False),
        ("report",),
        ("cma", 9, GFP_ZERO),
        ("contig", 0, 0, GFP_ZERO),
        ("free", 1, False),
        ("buddy", 9, True, GFP_ZERO),
        ("free", 2, True),
        ("contig", 9, 0, GFP_ZERO),
    ]
)
def test_zeroed_requests_read_zero_and_nobody_elses_bytes_change(steps: list[Step]) -> None:
    with booted(12, cma_pages=512) as mm:
        guest = Guest(mm)
        for step in steps:
            guest.take(step)
            guest.check()
        guest.process.munmap(guest.addr, USER_PAGES * PAGE_SIZE)
        while guest.runs:
            guest.free(guest.runs.pop(), known_zero=False)
        mm.drain_all_pages()
        guest.check()
        guest.process.exit()
        assert mm.vm_stats().bad_pages == 0
