# SPDX-License-Identifier: GPL-2.0-only
"""Can a page in a pool be known to be zero? Patch 21 asks; in v8 the answer is no."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hostzero.errors import MmError, OutOfMemory
from hostzero.mm import Process, hugetlbfs
from hostzero.mm.gfp import GFP_ZERO, USER_ADDR_NONE
from hostzero.mm.hugetlb import (
    account_surplus_hugetlb_folio,
    alloc_buddy_frozen_folio,
    alloc_hugetlb_folio_nodemask,
)
from hostzero.mm.hugetlb_pool import HPG_zeroed
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
)
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PGTY_hugetlb
from hostzero.mm.page_free import put_page
from tests.mm.guest import booted, dirty_free_memory, verify
from tests.mm.huge import counters
from tests.mm.processes import HUGE, FakeHost


class EveryWayIntoThePool(RuleBasedStateMachine):
    """Everything that can be done to a pool, in any order, on memory that the host has zeroed.

    The question of patch 21: can a page of the pool be known to be zero? After no step is
    one, and no `alloc_hugetlb_folio_reserve` ever says so.
    """

    def __init__(self) -> None:
        """Boot a guest whose free memory is all known to be zero."""
        super().__init__()
        self.boot = booted(12)
        self.mm = self.boot.__enter__()
        dirty_free_memory(self.mm)
        FakeHost(self.mm, capacity=1, order=9).register()
        self.mm.page_reporting.flush(100)
        self.file = self.mm.hugetlb.create_file(2 * HUGE)
        self.processes: list[tuple[Process, int]] = []
        self.targets: list[int] = []

    def teardown(self) -> None:
        """Let everything go; then the pool must be empty."""
        for pfn in self.targets:
            put_page(self.mm.mem, pfn, 0)
        for process, _ in self.processes:
            process.exit()
        self.file.close()
        self.mm.hugetlb.set_nr_hugepages(0)
        assert self.mm.hugetlb.counters() == counters(0, 0)
        verify(self.mm)
        self.boot.__exit__(None, None, None)

    @rule(count=st.integers(0, 2))
    def resize(self, count: int) -> None:
        self.mm.hugetlb.set_nr_hugepages(count)

    @rule(count=st.integers(0, 3))
    def overcommit(self, count: int) -> None:
        self.mm.hugetlb.set_nr_overcommit(count)

    @rule(kind=st.sampled_from(["anonymous", "shared", "private"]), flags=st.sampled_from([0, MAP_NORESERVE]))
    def map(self, kind: str, flags: int) -> None:
        process = self.mm.spawn()
        try:
            if kind == "anonymous":
                addr = process.mmap(2 * HUGE, flags | MAP_HUGETLB)
            else:
                addr = process.mmap(
                    2 * HUGE, flags | (MAP_SHARED if kind == "shared" else MAP_PRIVATE), file=self.file
                )
        except OutOfMemory:
            process.exit()
        else:
            self.processes.append((process, addr))

    @precondition(lambda self: self.processes)
    @rule(which=st.integers(0), page=st.integers(0, 1), write=st.booleans())
    def fault(self, which: int, page: int, write: bool) -> None:
        process, addr = self.processes[which % len(self.processes)]
        try:
            if write:
                process.fill(addr + page * HUGE, 4096, 0xDD)
            else:
                process.read(addr + page * HUGE, 1)
        except OutOfMemory:
            pass

    @precondition(lambda self: self.processes)
    @rule(which=st.integers(0))
    def drop(self, which: int) -> None:
        process, addr = self.processes[which % len(self.processes)]
        process.madvise(addr, HUGE, MADV_DONTNEED)

    @precondition(lambda self: self.processes)
    @rule(which=st.integers(0))
    def leave(self, which: int) -> None:
        self.processes.pop(which % len(self.processes))[0].exit()

    @rule()
    def lose_the_race_for_a_surplus_page(self) -> None:
        mem, hs = self.mm.mem, self.mm.mem.hstate[0]
        pfn = int(alloc_buddy_frozen_folio(mem, 0, GFP_ZERO, USER_ADDR_NONE, 0, 0))
        if pfn != NO_PAGE:
            allowed, hs.nr_overcommit_huge_pages = int(hs.nr_overcommit_huge_pages), 0
            assert account_surplus_hugetlb_folio(mem, 0, pfn, GFP_ZERO, 0) == NO_PAGE
            hs.nr_overcommit_huge_pages = allowed

    @rule()
    def migrate(self) -> None:
        pfn = int(alloc_hugetlb_folio_nodemask(self.mm.mem, 0, 0, 0))
        if pfn != NO_PAGE:
            self.targets.append(pfn)

    @precondition(lambda self: self.targets)
    @rule()
    def free_a_target(self) -> None:
        put_page(self.mm.mem, self.targets.pop(), 0)

    @rule(index=st.integers(0, 1))
    def allocate_for_a_driver(self, index: int) -> None:
        before = self.mm.vm_stats().zeroed_bytes
        try:
            self.file.memfd_alloc_folio(index)
        except MmError:
            assert self.mm.vm_stats().zeroed_bytes == before
        else:
            # Zeroed here: alloc_hugetlb_folio_reserve did not say that it was zero.
            assert self.mm.vm_stats().zeroed_bytes - before == HUGE

    @rule(index=st.integers(0, 1), punch=st.booleans())
    def change_the_file(self, index: int, punch: bool) -> None:
        try:
            if punch:
                self.file.punch_hole(index * HUGE, HUGE)
            else:
                self.file.fallocate(index * HUGE, HUGE)
        except OutOfMemory:
            pass

    @invariant()
    def no_page_of_the_pool_is_known_to_be_zero(self) -> None:
        pages = self.mm.mem.mem_map[: self.mm.nr_pages]
        huge = pages.page_type == PGTY_hugetlb
        assert not (pages.private[huge] & HPG_zeroed).any()


TestEveryWayIntoThePool = EveryWayIntoThePool.TestCase
TestEveryWayIntoThePool.settings = settings(settings(), stateful_step_count=25, max_examples=10)


def test_one_place_only_sets_the_mark() -> None:
    """So that what the state machine tries is all there is: nobody else writes `HPG_zeroed`."""
    room = Path(hugetlbfs.__file__).parent
    writers = {
        (source.stem, function.name)
        for source in room.glob("*.py")
        for function in ast.walk(ast.parse(source.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.BitOr)
        and "HPG_zeroed" in ast.unparse(node.value)
    }
    assert writers == {("hugetlb", "account_surplus_hugetlb_folio")}
