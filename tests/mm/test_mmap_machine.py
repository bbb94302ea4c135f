# SPDX-License-Identifier: GPL-2.0-only
"""Any sequence of calls on two processes against a shadow of what they must read."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostzero.errors import MemcgOutOfMemory, MmError, OutOfMemory
from hostzero.jit import COMPILER_ON
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NORETRY
from hostzero.mm.kstrtox import UINT_MAX
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
)
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.guest import booted, dirty_free_memory, page_bytes, verify
from tests.mm.mappings import verify_mappings
from tests.mm.processes import MIB, FakeHost, contents, free_pages, mapped

MIBS = 16 if COMPILER_ON else 8
MOST_MAPPED = MIBS * MIB // 4 * 3  # so that huge pages run out
MOST_INFLATED = 32 * MIBS
MOST_READ = 64 * PAGE_SIZE if COMPILER_ON else 2 * PAGE_SIZE


class HostAndProcesses(RuleBasedStateMachine):
    """Two processes, a host that drops pages or does not, a balloon, swap and cgroups, on one small guest.

    The shadow holds what each mapped page must read as; a page that is not in it was never
    written to. Every read is compared, and after each rule every list, counter and zero
    claim of the guest is checked against its memory, and every mapping against its page.
    Process 1 is in a cgroup below another, and one of the two has a limit at times.
    """

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.mm = self.resources.enter_context(booted(MIBS, swap_size=MIBS * MIB // 4, **self.config))
        dirty_free_memory(self.mm, 0xAA)
        self.free = free_pages(self.mm)
        self.cgroups = [self.mm.memcg.create(None)]
        self.cgroups.append(self.mm.memcg.create(None, parent=self.cgroups[0]))
        self.limited = False
        self.processes = [self.mm.spawn(), self.mm.spawn()]
        self.processes[1].memcg = self.cgroups[1]
        self.shadows: list[dict[int, bytearray]] = [{}, {}]
        self.areas: list[set[int]] = [set(), set()]  # mapped page numbers
        self.answer = "zero"
        self.host: FakeHost | None = None
        self.kernel_pages: list[tuple[Pfn, int]] = []

    def teardown(self) -> None:
        self.limit(0, None)
        for i in (0, 1):
            for start in sorted(page for page in self.areas[i] if page - 1 not in self.areas[i]):
                end = start + 1
                while end in self.areas[i]:
                    end += 1
                self.compare(i, start, end if COMPILER_ON else min(end, start + 2))
            self.processes[i].exit()
        self.mm.balloon.release(self.mm.balloon.dequeue(self.mm.balloon.count))
        for pfn, order in self.kernel_pages:
            self.mm.free_pages(pfn, order)
        assert free_pages(self.mm) == self.free
        assert self.mm.vm_stats().bad_pages == 0
        assert self.mm.swap.used_bytes == 0
        assert [self.mm.memcg.usage_bytes(cgroup) for cgroup in self.cgroups] == [0, 0]
        verify(self.mm)
        self.resources.close()

    def expected(self, i: int, first: int, end: int) -> bytes:
        """Return what the pages `[first, end)` of process `i` must read as."""
        return b"".join(self.shadows[i].get(page, bytes(PAGE_SIZE)) for page in range(first, end))

    def may_fail(self, i: int) -> AbstractContextManager[object]:
        """Return what a call runs under that may meet a cgroup's limit; it suppresses that error alone."""
        return suppress(MemcgOutOfMemory) if i == 1 and self.limited else nullcontext()

    def compare(self, i: int, first: int, end: int) -> None:
        found = self.processes[i].read(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
        assert found == self.expected(i, first, end)

    def some_range(self, data: st.DataObject, i: int, most: int) -> tuple[int, int]:
        """Draw a mapped range of process `i`: start address and length in whole pages."""
        area = self.areas[i]
        start = data.draw(st.sampled_from(sorted(area)))
        length = data.draw(st.sampled_from([1, 2, 17, 511, 512, 700]))
        end = start + 1
        while end < start + min(length, most // PAGE_SIZE) and end in area:
            end += 1
        return start * PAGE_SIZE, (end - start) * PAGE_SIZE

    def has_memory(self) -> bool:
        return any(self.areas)

    def a_process(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from([i for i in (0, 1) if self.areas[i]]))

    @initialize(
        order=st.integers(0, 9),
        capacity=st.sampled_from([0, 1, 2, 3, 5, 31, 32]),
        honest=st.sampled_from([True, True, True, False]),
        reported=st.booleans(),
    )
    def plug_in(self, order: int, capacity: int, honest: bool, reported: bool) -> None:
        capacity = min(capacity or 32, max((512 if COMPILER_ON else 256) >> order, 1))
        self.host = FakeHost(self.mm, capacity=capacity, order=order, host_zeroes_pages=honest)
        self.host.zeroes = self.zeroes
        self.host.register()
        if reported:
            self.mm.page_reporting.flush(UINT_MAX)
        self.mmap(0, 1100, None, reported)

    def zeroes(self, pfn: int, order: int) -> bool:
        if self.answer == "mixed":
            return pfn >> order & 1 == 0
        return self.answer == "zero"

    @rule(answer=st.sampled_from(["zero", "zero", "mixed", "keep"]))
    def change_the_host(self, answer: str) -> None:
        self.answer = answer

    @rule()
    def fail_once(self) -> None:
        """The host drops pages, sets bits and then reports an error: none of it may be believed."""
        assert self.host is not None
        host = self.host
        host.fail = OSError("the host is busy")
        self.mm.page_reporting.process()
        host.fail = None

    @rule()
    def unplug_and_plug_in(self) -> None:
        assert self.host is not None
        self.mm.page_reporting.unregister(self.host.info)
        self.host.register()

    @rule(seconds=st.sampled_from([0.5, 2, 10]))
    def pass_time(self, seconds: float) -> None:
        self.mm.clock.advance(seconds)

    @rule(budget=st.sampled_from([0, 1, 3, UINT_MAX]))
    def flush(self, budget: int) -> None:
        self.mm.page_reporting.flush(budget)

    @rule()
    def drain(self) -> None:
        self.mm.drain_all_pages()

    @rule(really=st.sampled_from([False, False, False, True]))
    def forget(self, really: bool) -> None:
        if really:
            self.mm.forget_zero_claims()

    @rule(
        i=st.sampled_from([0, 1]),
        pages_=st.sampled_from([1, 3, 17, 512, 513, 1024, 1500]),
        fixed=st.sampled_from([None, None, 0, 5 << 30, (7 << 30) + 3 * PAGE_SIZE]),
        populate=st.booleans(),
    )
    def mmap(self, i: int, pages_: int, fixed: int | None, populate: bool) -> None:
        if sum(map(len, self.areas)) + pages_ > MOST_MAPPED // PAGE_SIZE:
            return
        process = self.processes[i]
        if fixed is None:
            addr = process.mmap(pages_ * PAGE_SIZE)
        else:
            wanted = set(range(fixed // PAGE_SIZE, fixed // PAGE_SIZE + pages_))
            if wanted & self.areas[i]:
                with pytest.raises(MmError, match="-EEXIST"):
                    process.mmap(pages_ * PAGE_SIZE, MAP_FIXED, fixed)
                return
            addr = process.mmap(pages_ * PAGE_SIZE, MAP_FIXED, fixed)
        added = set(range(addr // PAGE_SIZE, addr // PAGE_SIZE + pages_))
        assert not added & self.areas[i]
        self.areas[i] |= added
        if populate:
            with self.may_fail(i):
                process.madvise(addr, pages_ * PAGE_SIZE, MADV_POPULATE_WRITE)
                assert not any(mapped(self.mm, process, addr, pages_ * PAGE_SIZE))

    @precondition(has_memory)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write(self, data: st.DataObject, byte: int) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, 3 * PAGE_SIZE)
        skip = data.draw(st.integers(0, min(length - 1, PAGE_SIZE - 1)))
        text = contents(byte, data.draw(st.integers(1, length - skip)))
        with self.may_fail(i):
            self.processes[i].write(addr + skip, text)
            for at, value in enumerate(text, addr + skip):
                page = self.shadows[i].setdefault(at // PAGE_SIZE, bytearray(PAGE_SIZE))
                page[at % PAGE_SIZE] = value

    @precondition(has_memory)
    @rule(data=st.data(), byte=st.integers(0, 255))
    def fill(self, data: st.DataObject, byte: int) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_MAPPED)
        with self.may_fail(i):
            self.processes[i].fill(addr, length, byte)
            for page in range(addr // PAGE_SIZE, (addr + length) // PAGE_SIZE):
                self.shadows[i][page] = bytearray(contents(byte))

    @precondition(has_memory)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_READ)
        with self.may_fail(i):  # what is swapped out is charged when it comes back
            self.compare(i, addr // PAGE_SIZE, (addr + length) // PAGE_SIZE)

    @precondition(has_memory)
    @rule(data=st.data())
    def populate(self, data: st.DataObject) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_MAPPED)
        with self.may_fail(i):
            self.processes[i].madvise(addr, length, MADV_POPULATE_WRITE)
            expected = self.expected(i, addr // PAGE_SIZE, (addr + length) // PAGE_SIZE)
            assert mapped(self.mm, self.processes[i], addr, length) == expected

    @precondition(has_memory)
    @rule(data=st.data())
    def page_out(self, data: st.DataObject) -> None:
        """What the area has room for goes out; nobody notices until they look at the counters."""
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_MAPPED)
        before = self.processes[i].rss, self.mm.swap.used_bytes
        self.processes[i].madvise(addr, length, MADV_PAGEOUT)
        gone = before[0] - self.processes[i].rss
        assert self.mm.swap.used_bytes - before[1] == gone

    @rule(which=st.sampled_from([0, 1]), pages_=st.sampled_from([None, 0, 5, 600]))
    def limit(self, which: int, pages_: int | None) -> None:
        """Limit one of the two cgroups to so many pages more than it has, or neither."""
        for cgroup in self.cgroups:
            self.mm.memcg.set_max(cgroup, None)
        self.limited = pages_ is not None
        if pages_ is not None:
            used = self.mm.memcg.usage_bytes(self.cgroups[which])
            self.mm.memcg.set_max(self.cgroups[which], used + pages_ * PAGE_SIZE)

    @precondition(has_memory)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_MAPPED)
        self.processes[i].madvise(addr, length, MADV_DONTNEED)
        for page in range(addr // PAGE_SIZE, (addr + length) // PAGE_SIZE):
            self.shadows[i].pop(page, None)

    @precondition(has_memory)
    @rule(data=st.data())
    def munmap(self, data: st.DataObject) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_MAPPED)
        self.processes[i].munmap(addr, length)
        for page in range(addr // PAGE_SIZE, (addr + length) // PAGE_SIZE):
            self.shadows[i].pop(page, None)
            self.areas[i].discard(page)

    @precondition(has_memory)
    @rule(data=st.data(), advice=st.sampled_from([MADV_HUGEPAGE, MADV_NOHUGEPAGE]))
    def advise(self, data: st.DataObject, advice: int) -> None:
        i = self.a_process(data)
        addr, length = self.some_range(data, i, MOST_MAPPED)
        self.processes[i].madvise(addr, length, advice)

    @rule(i=st.sampled_from([0, 1]))
    def exit_and_spawn(self, i: int) -> None:
        self.processes[i].exit()
        self.processes[i] = self.mm.spawn()
        self.processes[i].memcg = self.cgroups[1] if i else 0
        self.shadows[i], self.areas[i] = {}, set()

    @rule(count=st.integers(1, 256), zeroed=st.sampled_from(["all", "none", "some"]))
    def inflate(self, count: int, zeroed: str) -> None:
        count = min(count, MOST_INFLATED - self.mm.balloon.count)
        taken = self.mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_NORETRY, count)
        verdict = np.array([zeroed == "all" or (zeroed == "some" and int(pfn) % 3 == 0) for pfn in taken])
        self.mm.balloon.enqueue(taken)
        for pfn, dropped in zip(taken, verdict, strict=True):
            page_bytes(self.mm, int(pfn))[:] = 0 if dropped else 0x66
        self.mm.balloon.set_zeroed(taken, verdict.astype(np.bool_))

    @rule(count=st.integers(1, 256))
    def deflate(self, count: int) -> None:
        self.mm.balloon.release(self.mm.balloon.dequeue(count))

    @rule(order=st.integers(0, 9), byte=st.integers(1, 255), keep=st.booleans())
    def kernel_work(self, order: int, byte: int, keep: bool) -> None:
        """A kernel page is taken and written to: nobody may believe it to be zero when it is free again.

        Those that are kept break up the pageblocks.
        """
        try:
            pfn = self.mm.alloc_pages(GFP_KERNEL, order)
        except OutOfMemory:
            return
        page_bytes(self.mm, pfn, 1 << order)[:] = byte
        if keep and order <= 3 and len(self.kernel_pages) < 16:
            self.kernel_pages.append((pfn, order))
        else:
            self.mm.free_pages(pfn, order)

    @precondition(lambda self: self.kernel_pages)
    @rule()
    def end_kernel_work(self) -> None:
        self.mm.free_pages(*self.kernel_pages.pop(0))

    @invariant()
    def the_guest_is_consistent(self) -> None:
        verify(self.mm)
        verify_mappings(self.mm, self.processes)


class HostAndProcessesOfLargeFolios(HostAndProcesses):
    """The same where faults below 2 MiB may take folios of 16, 64 and 1024 KiB."""

    config: ClassVar[dict[str, Any]] = {"anon_orders": (2, 4, 8)}


SETTINGS = settings(max_examples=40 if COMPILER_ON else 2, stateful_step_count=60 if COMPILER_ON else 15)
HostAndProcesses.TestCase.settings = SETTINGS
HostAndProcessesOfLargeFolios.TestCase.settings = SETTINGS
TestHostAndProcesses = HostAndProcesses.TestCase
TestHostAndProcessesOfLargeFolios = HostAndProcessesOfLargeFolios.TestCase
