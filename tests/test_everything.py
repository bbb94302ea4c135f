# SPDX-License-Identifier: GPL-2.0-only
"""Every feature at once, in any order, on one machine: they meet where no other test has them meet."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostzero.errors import BadAddress, MemcgOutOfMemory, MmError, OutOfMemory
from hostzero.jit import COMPILER_ON
from hostzero.mm.cachealias import evict, evict_all
from hostzero.mm.cma import cma_alloc_frozen_compound
from hostzero.mm.contig import alloc_contig_frozen_pages_user
from hostzero.mm.gfp import (
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NORETRY,
    GFP_THISNODE,
    GFP_ZERO,
    USER_ADDR_NONE,
)
from hostzero.mm.mempolicy import MPOL_BIND, MPOL_DEFAULT, MPOL_INTERLEAVE, MPOL_PREFERRED
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MAP_HUGE_SHIFT,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_SHARED,
)
from hostzero.mm.mmzone import NO_PAGE
from hostzero.units import PAGE_SIZE, Pfn
from tests.everything import GIGANTIC, HUGE_PAGES, PAGES, Area, User, World

MOST_MAPPED = PAGES // 2
MOST_BROKEN = 8
MOST_READ = 64 if COMPILER_ON else 2

CONFIGS = st.fixed_dictionaries(
    {
        "two_nodes": st.booleans(),
        "cma": st.booleans(),
        "gigantic": st.booleans(),
        "nr_cpus": st.sampled_from([1, 2]),
        "thp": st.sampled_from(["always", "always", "madvise", "never"]),
        "anon_orders": st.sampled_from([(), (2, 4, 8), (3,)]),
        "swap_size": st.sampled_from([0, 1 << 20, 4 << 20]),
        "init_on_alloc": st.sampled_from([False, False, True]),
        "init_on_free": st.sampled_from([False, False, False, True]),
        "page_poisoning": st.sampled_from([False, False, False, True]),
        "debug_vm": st.sampled_from([True, True, False]),
        "dcache_aliasing": st.sampled_from([False, False, True]),
        "user_zeroing": st.sampled_from(["allocator", "allocator", "caller"]),
        "placement": st.sampled_from(["linux", "zero-aware"]),
    }
)
FAULTS = st.lists(st.sampled_from(["none", "error", "half"]), max_size=4)
"""What the host's next discards do, the last one first."""

FAILS = (OutOfMemory, MemcgOutOfMemory)


class Everything(RuleBasedStateMachine):
    """Two processes, files, kernel users, a balloon, a host that fails at times, and failing memory."""

    w: World

    def teardown(self) -> None:
        if hasattr(self, "w"):
            self.w.close()

    @initialize(choice=CONFIGS, balloon=st.booleans(), pool=st.integers(0, 3), extra=st.integers(0, 4))
    def boot(self, choice: dict[str, Any], balloon: bool, pool: int, extra: int) -> None:
        self.w = World(choice)
        self.w.machine.flush()
        if balloon:
            self.w.machine.balloon(8 << 20)
            self.w.machine.balloon(2 << 20)
        self.w.mm.hugetlb.set_nr_hugepages(pool)
        self.w.mm.hugetlb.set_nr_overcommit(extra)
        if choice["gigantic"]:
            self.w.mm.hugetlb.set_nr_overcommit(1, GIGANTIC)

    def users_with(self, *, huge: bool | None = None) -> list[tuple[User, Area]]:
        return [
            (user, area)
            for user in self.w.users
            for area in user.areas
            if huge is None or (area.unit > 1) == huge
        ]

    def mapped(self) -> bool:
        return hasattr(self, "w") and bool(self.users_with())

    def some(self, data: st.DataObject, most: int, huge: bool | None = None) -> tuple[User, Area, int, int]:
        """Draw pages of a mapping: whole units of it if these stay together."""
        user, area = data.draw(st.sampled_from(self.users_with(huge=huge)))
        units = (area.end - area.start) // area.unit
        first = area.start + data.draw(st.integers(0, units - 1)) * area.unit
        length = data.draw(st.sampled_from([1, 2, 17, 512, 700]))
        end = min(area.end, first + max(min(length, most) // area.unit, 1) * area.unit)
        return user, area, first, end

    # Processes.

    @rule(
        i=st.integers(0, 1), pages=st.sampled_from([1, 3, 17, 512, 1100]), fill=st.sampled_from([None, 0, 7])
    )
    def mmap(self, i: int, pages: int, fill: int | None) -> None:
        user = self.w.users[i]
        if sum(area.end - area.start for _, area in self.users_with()) + pages > MOST_MAPPED:
            return
        start = user.process.mmap(pages * PAGE_SIZE) // PAGE_SIZE
        user.areas.append(Area(start, start + pages))
        if fill is not None:
            self.fill_pages(user, user.areas[-1], start, start + pages, fill)

    @rule(
        i=st.integers(0, 1),
        pages=st.integers(1, 3),
        flags=st.sampled_from([0, MAP_NORESERVE, MAP_SHARED, MAP_SHARED | MAP_NORESERVE]),
        gigantic=st.booleans(),
        which=st.integers(-2, 3),
    )
    def mmap_huge(self, i: int, pages: int, flags: int, gigantic: bool, which: int) -> None:
        user, file, offset = self.w.users[i], None, 0
        order = GIGANTIC if gigantic and self.w.mm.config.gigantic_order else 9
        pages = 1 if order == GIGANTIC else pages
        if 0 <= which < len(self.w.files):
            file = self.w.files[which]
            order, flags = 9, flags | MAP_SHARED
            offset = which % 2
        flags |= MAP_HUGETLB | (order + 12) << MAP_HUGE_SHIFT
        with suppress(OutOfMemory):
            start = user.process.mmap(
                pages << order << 12, flags, file=file, offset=offset * HUGE_PAGES * PAGE_SIZE
            )
            first = start // PAGE_SIZE
            area = Area(first, first + (pages << order), 1 << order, file, offset * HUGE_PAGES)
            area.shared = bool(flags & MAP_SHARED)
            user.areas.append(area)

    def fill_pages(self, user: User, area: Area, first: int, end: int, byte: int) -> None:
        try:
            user.process.fill(first * PAGE_SIZE, (end - first) * PAGE_SIZE, byte)
        except FAILS:
            return
        except (BadAddress, MmError):
            assert any(first <= page < end for page in user.lost) or area.file is not None
            return
        content = bytes([byte]) * PAGE_SIZE
        for page in range(first, end):
            self.w.shadow[self.w.place(user, area, page)] = content

    @precondition(mapped)
    @rule(data=st.data(), byte=st.integers(0, 255))
    def fill(self, data: st.DataObject, byte: int) -> None:
        self.fill_pages(*self.some(data, MOST_MAPPED), byte)

    @precondition(mapped)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        user, area, first, end = self.some(data, MOST_READ)
        first += data.draw(st.integers(0, end - first - 1))
        with suppress(*FAILS, BadAddress):
            self.w.compare(user, area, first, min(end, first + MOST_READ))

    @precondition(mapped)
    @rule(data=st.data())
    def populate(self, data: st.DataObject) -> None:
        user, _, first, end = self.some(data, MOST_MAPPED)
        with suppress(*FAILS, MmError, BadAddress):
            user.process.madvise(first * PAGE_SIZE, (end - first) * PAGE_SIZE, MADV_POPULATE_WRITE)

    @precondition(mapped)
    @rule(data=st.data())
    def munmap(self, data: st.DataObject) -> None:
        self.w.unmap(*self.some(data, MOST_MAPPED))

    @precondition(mapped)
    @rule(data=st.data())
    def dontneed(self, data: st.DataObject) -> None:
        user, area, first, end = self.some(data, MOST_MAPPED)
        self.w.with_room(
            lambda: user.process.madvise(first * PAGE_SIZE, (end - first) * PAGE_SIZE, MADV_DONTNEED)
        )
        if not area.shared:
            self.w.forget(user, area, first, end)

    def has_small(self) -> bool:
        return hasattr(self, "w") and bool(self.users_with(huge=False))

    @precondition(has_small)
    @rule(
        data=st.data(), advice=st.sampled_from([MADV_PAGEOUT, MADV_PAGEOUT, MADV_HUGEPAGE, MADV_NOHUGEPAGE])
    )
    def advise(self, data: st.DataObject, advice: int) -> None:
        user, _, first, end = self.some(data, MOST_MAPPED, huge=False)
        user.process.madvise(first * PAGE_SIZE, (end - first) * PAGE_SIZE, advice)

    @precondition(mapped)
    @rule(
        data=st.data(),
        mode=st.sampled_from([MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE]),
        mask=st.integers(1, 3),
    )
    def mbind(self, data: st.DataObject, mode: int, mask: int) -> None:
        user, _, first, end = self.some(data, MOST_MAPPED)
        mask = 0 if mode == MPOL_DEFAULT else mask if self.w.nr_nodes == 2 else 1
        user.process.mbind(first * PAGE_SIZE, (end - first) * PAGE_SIZE, mode, mask)

    @rule(pages=st.sampled_from([None, 0, 5, 600]))
    def limit(self, pages: int | None) -> None:
        used = self.w.mm.memcg.usage_bytes(self.w.cgroup)
        self.w.mm.memcg.set_max(self.w.cgroup, None if pages is None else used + pages * PAGE_SIZE)

    @rule(i=st.integers(0, 1))
    def exit_and_spawn(self, i: int) -> None:
        user = self.w.users[i]
        self.w.leave(user)
        cpu, node = self.w.mm.config.nr_cpus - 1, i % self.w.nr_nodes
        user.process = self.w.with_room(lambda: self.w.mm.spawn(cpu=cpu, node=node))
        if i:
            user.process.memcg = self.w.cgroup

    # Hugetlb.

    @rule(count=st.integers(0, 4), overcommit=st.integers(0, 4))
    def resize_pool(self, count: int, overcommit: int) -> None:
        self.w.mm.hugetlb.set_nr_hugepages(count)
        self.w.mm.hugetlb.set_nr_overcommit(overcommit)

    @precondition(lambda self: hasattr(self, "w") and self.w.mm.config.gigantic_order)
    @rule(count=st.integers(0, 1), overcommit=st.integers(0, 1))
    def resize_gigantic_pool(self, count: int, overcommit: int) -> None:
        self.w.mm.hugetlb.set_nr_hugepages(count, GIGANTIC)
        self.w.mm.hugetlb.set_nr_overcommit(overcommit, GIGANTIC)

    @rule(pages=st.integers(1, 3))
    def create_file(self, pages: int) -> None:
        if len(self.w.files) < 3:
            self.w.files.append(self.w.mm.hugetlb.create_file(pages * HUGE_PAGES * PAGE_SIZE))

    @precondition(lambda self: hasattr(self, "w") and self.w.files)
    @rule(data=st.data(), what=st.sampled_from(["fallocate", "punch", "memfd", "truncate", "close"]))
    def use_file(self, data: st.DataObject, what: str) -> None:
        file = data.draw(st.sampled_from(self.w.files))
        first, count = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
        size = file.page_size
        with suppress(OutOfMemory):
            if what == "fallocate":
                file.fallocate(first * size, count * size)
            elif what == "punch":
                file.punch_hole(first * size, count * size)
                self.w.forget_file(file, first * HUGE_PAGES, (first + count) * HUGE_PAGES)
            elif what == "memfd" and first < len(file.pages) and file.pages[first] == NO_PAGE:
                file.memfd_alloc_folio(first)
            elif what == "truncate":
                file.truncate(first * size)
                self.w.forget_file(file, first * HUGE_PAGES, 1 << 40)
            elif what == "close":
                file.close()
                self.w.files.remove(file)

    # The kernel.

    @rule(
        order=st.integers(0, 10),
        movable=st.booleans(),
        flags=st.sampled_from([0, GFP_ZERO, GFP_COMP, GFP_ZERO | GFP_COMP]),
        node=st.integers(0, 1),
        fate=st.sampled_from(["keep", "free", "nolock", "nolock-pcp", "zeroed"]),
    )
    def kernel_block(self, order: int, movable: bool, flags: int, node: int, fate: str) -> None:
        """A block is taken, written, and freed in one of four ways; small ones may stay."""
        mm, cpu = self.w.mm, self.w.mm.config.nr_cpus - 1
        gfp = (GFP_HIGHUSER_MOVABLE if movable else GFP_KERNEL) | GFP_NORETRY | flags
        try:
            pfn = mm.alloc_pages(gfp, order, cpu=cpu, node=node % self.w.nr_nodes)
        except OutOfMemory:
            return
        content = self.w.bytes_of(pfn, order)
        assert not flags & GFP_ZERO or not content.any()
        content[:] = 0x77
        zone = int(self.w.mem.mem_map[pfn].zone)
        if fate == "keep" and order <= 3 and len(self.w.blocks) < 12:
            self.w.blocks.append((pfn, order))
        elif fate.startswith("nolock"):
            with mm.zone_lock(zone, cpu=cpu if fate == "nolock-pcp" else None):
                mm.free_pages_nolock(pfn, order, cpu=cpu)
                self.w.check()
        elif fate == "zeroed":
            content[:] = 0
            self.w.mem.mem_map[pfn]._refcount = 0
            mm.free_frozen_pages_zeroed(pfn, order, cpu=cpu)
        else:
            mm.free_pages(pfn, order, cpu=cpu)

    @precondition(lambda self: hasattr(self, "w") and self.w.blocks)
    @rule()
    def free_kernel_block(self) -> None:
        pfn, order = self.w.blocks.pop(0)
        self.w.mm.free_pages(Pfn(pfn), order)

    @rule(
        order=st.integers(0, 11),
        flags=st.sampled_from([0, GFP_ZERO, GFP_COMP, GFP_ZERO | GFP_COMP]),
        node=st.integers(0, 1),
        only=st.booleans(),
        user=st.booleans(),
    )
    def take_run(self, order: int, flags: int, node: int, only: bool, user: bool) -> None:
        if len(self.w.runs) > 3:
            return
        node %= self.w.nr_nodes
        gfp = GFP_KERNEL | flags | (GFP_THISNODE if only else 0)
        address = 0x1234_5000 if user and flags & GFP_COMP else USER_ADDR_NONE
        pfn = alloc_contig_frozen_pages_user(self.w.mm, order, gfp, node, address)
        if pfn == NO_PAGE:
            return
        self.keep_run(self.w.runs, pfn, order, flags)
        assert not only or int(self.w.mem.zone[int(self.w.mem.mem_map[pfn].zone)].node) == node

    def keep_run(self, runs: list[tuple[int, int]], pfn: int, order: int, flags: int) -> None:
        assert pfn % (1 << order) == 0
        if self.w.mm.config.dcache_aliasing:
            evict(self.w.mem, pfn, 1 << order)  # the kernel sees its own lines first
        content = self.w.bytes_of(pfn, order)
        assert not flags & GFP_ZERO or not content.any()
        content[:] = 0x99
        runs.append((pfn, order))

    @precondition(lambda self: hasattr(self, "w") and self.w.mm.cma.count and len(self.w.cma) < 3)
    @rule(order=st.integers(0, 11), zero=st.booleans())
    def take_from_cma(self, order: int, zero: bool) -> None:
        pfn = cma_alloc_frozen_compound(self.w.mm, order, GFP_ZERO if zero else 0)
        if pfn != NO_PAGE:
            self.keep_run(self.w.cma, pfn, order, GFP_ZERO if zero else 0)

    @rule(count=st.integers(1, 2))
    def give_runs_back(self, count: int) -> None:
        self.w.give_runs_back(count)

    @rule(what=st.sampled_from(["compact", "drain", "evict"]))
    def housekeeping(self, what: str) -> None:
        if what == "compact":
            self.w.mm.compact_memory()
        elif what == "drain":
            self.w.mm.drain_all_pages()
        elif self.w.mm.config.dcache_aliasing:
            evict_all(self.w.mem)

    # Memory that breaks.

    @rule(data=st.data(), users=st.booleans())
    def break_page(self, data: st.DataObject, users: bool) -> None:
        if len(self.w.broken) >= MOST_BROKEN:
            return
        pfn = data.draw(st.integers(1, PAGES - 1))
        if users:
            owned = self.w.mem.mem_map.mapping[:PAGES].nonzero()[0].tolist()
            if owned:
                pfn = owned[pfn % len(owned)]
        self.w.break_page(pfn)

    @precondition(lambda self: hasattr(self, "w") and self.w.broken)
    @rule(data=st.data())
    def repair_page(self, data: st.DataObject) -> None:
        self.w.repair(data.draw(st.sampled_from(self.w.broken)))

    # The host.

    @rule(
        budget=st.sampled_from([1, 3, 1 << 20]),
        faults=st.lists(st.sampled_from(["none", "error", "half"]), max_size=6),
    )
    def flush(self, budget: int, faults: list[str]) -> None:
        self.w.faults = faults
        self.w.machine.flush(budget)
        self.w.faults = []

    @rule(
        pages=st.sampled_from([0, 1, 300, 1500, 2800]),
        faults=st.lists(st.sampled_from(["none", "half"]), max_size=3),
    )
    def balloon(self, pages: int, faults: list[str]) -> None:
        self.w.faults = faults
        self.w.machine.balloon(pages * PAGE_SIZE)
        self.w.faults = []

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.w.machine.clock.advance(seconds)

    @rule(how=st.sampled_from(["suspend", "hibernate"]))
    def sleep(self, how: str) -> None:
        if how == "hibernate":
            self.w.hibernate()
        else:
            self.w.machine.driver.freeze()
            self.w.machine.driver.restore()

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "w"):
            self.w.check()


Everything.TestCase.settings = settings(
    max_examples=40 if COMPILER_ON else 2,
    stateful_step_count=50 if COMPILER_ON else 10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEverything = Everything.TestCase
