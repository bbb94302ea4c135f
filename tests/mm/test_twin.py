# SPDX-License-Identifier: GPL-2.0-only
"""The allocator against its twin: after every operation both must be in the same state."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import OutOfMemory
from hostzero.jit import COMPILER_ON
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import (
    __GFP_NOMEMALLOC,
    __GFP_RECLAIMABLE,
    GFP_ATOMIC,
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NOWAIT,
    GFP_ZERO,
)
from hostzero.mm.page_flags import (
    PG_head,
    PG_private,
    PG_reported,
    PG_reserved,
    PG_zeroed,
    PGTY_buddy,
    PGTY_none,
)
from hostzero.mm.page_free import put_page
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.guest import booted, free_lists, page_bytes, pcp_lists, reads_zero, verify, walk
from tests.mm.naive import (
    MOVABLE,
    PAGEBLOCK,
    RECLAIMABLE,
    UNMOVABLE,
    WRITTEN,
    ZERO,
    Config,
    NaiveAllocator,
    Owned,
    Request,
)

CPUS = 2
MIB = 8
KINDS = {
    "kernel": (GFP_KERNEL, Request(0, UNMOVABLE)),
    "user": (GFP_HIGHUSER_MOVABLE, Request(0, MOVABLE)),
    "reclaimable": (GFP_KERNEL | __GFP_RECLAIMABLE, Request(0, RECLAIMABLE)),
    "atomic": (GFP_ATOMIC, Request(0, UNMOVABLE, may_block=False, high=True)),
    "atomic, no reserves": (
        GFP_ATOMIC | __GFP_NOMEMALLOC,
        Request(0, UNMOVABLE, may_block=False, high=True, no_reserves=True),
    ),
    "nowait": (GFP_NOWAIT, Request(0, UNMOVABLE, may_block=False)),
}


class Alloc(NamedTuple):
    kind: str
    order: int
    zero: bool
    compound: bool
    cpu: int
    repeat: int


class Free(NamedTuple):
    which: int
    how: str
    cpu: int


class Write(NamedTuple):
    which: int
    page: int
    byte: int


class Own(NamedTuple):
    """An owner's doings that leave traces: a reference, a mapping, a filesystem's PG_private."""

    which: int
    what: str
    page: int


class Discard(NamedTuple):
    which: int
    zeroes: bool


class Drain(NamedTuple):
    pass


class Crowd(NamedTuple):
    """A busy guest: little is left, users have most of that, and every so many pages one is freed."""

    spacing: int
    kind: str
    zeroed: bool


class Cycle(NamedTuple):
    """A block that is allocated and goes back as known zero, there and then."""

    kind: str
    order: int
    cpu: int


Operation = Alloc | Free | Write | Own | Discard | Drain | Crowd | Cycle

small_numbers = st.integers(0, 15)
orders = st.one_of(st.integers(0, 3), st.integers(0, 10))
cpus = st.integers(0, CPUS - 1)
repeats = st.sampled_from([1, 1, 1, 9, 99])
allocs = st.builds(Alloc, st.sampled_from(sorted(KINDS)), orders, st.booleans(), st.booleans(), cpus, repeats)
ways = ["free", "put", "zeroed", "frozen zeroed", "inside the zone lock", "inside both locks"]
frees = st.builds(Free, small_numbers, st.sampled_from(ways), cpus)
discards = st.builds(Discard, small_numbers, st.booleans())
operations: st.SearchStrategy[Operation] = st.one_of(
    allocs,
    frees,
    frees,
    discards,
    st.builds(Cycle, st.sampled_from(["kernel", "user", "reclaimable"]), st.integers(0, 10), cpus),
    st.builds(Write, small_numbers, st.integers(0, 1023), st.integers(0, PAGE_SIZE - 1)),
    st.builds(Own, small_numbers, st.sampled_from(["get", "map", "private"]), st.integers(0, 1023)),
    st.builds(Drain),
)
crowds = st.builds(
    Crowd, st.integers(1, 3), st.sampled_from(["user", "kernel", "reclaimable"]), st.booleans()
)
STEPS = 40 if COMPILER_ON else 20
sequences = st.tuples(
    st.lists(crowds, max_size=1), st.lists(operations, min_size=STEPS // 2, max_size=STEPS)
).map(lambda parts: [*parts[0], *parts[1]])

configs = st.sampled_from(
    [
        {},
        {"cma_pages": PAGEBLOCK},
        {"debug_vm": False},
        {"init_on_alloc": True},
        {"init_on_free": True},
        {"page_poisoning": True},
        {"debug_vm": False, "page_poisoning": True},
    ]
)
batches = st.sampled_from([1, 4])


class Pair:
    """A guest and its twin, doing the same things."""

    def __init__(self, guest: MemoryManager, batch: int) -> None:
        self.guest = guest
        self.mem = guest.mem
        # Pages of 8 MiB would be moved one by one; batches are what goes wrong.
        self.mem.pcp["batch"] = batch
        self.mem.pcp["high"] = 6 * batch
        self.mem.vm[0].page_reporting_enabled = 1
        self.mem.vm[0].page_reporting_order = PAGEBLOCK.bit_length() - 2
        config, zone = guest.config, self.mem.zone[0]
        self.twin = NaiveAllocator(
            Config(
                nr_pages=guest.nr_pages,
                nr_cpus=config.nr_cpus,
                watermark_min=int(zone.watermark_min),
                watermark_low=int(zone.watermark_low),
                batch=1,
                high=int(zone.pcp_high),
                cma_blocks=config.cma_pages // PAGEBLOCK,
                init_on_alloc=config.init_on_alloc,
                init_on_free=config.init_on_free,
                page_poisoning=config.page_poisoning,
            )
        )
        # The zero page is the first page that a guest allocates.
        self.zero_page = self.twin.allocate(Request(0, UNMOVABLE, zero=True), 0)
        assert self.zero_page is not None
        assert self.zero_page.pfn == int(self.mem.vm[0].empty_zero_page)
        self.twin.config.batch, self.twin.config.high = batch, 6 * batch
        self.twin.config.reporting_order = PAGEBLOCK.bit_length() - 2
        self.may_leave_private = not (config.debug_vm or config.init_on_alloc or config.init_on_free) and (
            not config.page_poisoning
        )

    def owned(self, which: int) -> Owned | None:
        mine = [owned for pfn, owned in sorted(self.twin.owned.items()) if owned is not self.zero_page]
        return mine[which % len(mine)] if mine else None

    def crowd(self, operation: Crowd) -> None:
        for order in (10, 9):
            self.alloc(Alloc("user", order, False, False, 0, 1))
        before = set(self.twin.owned)
        self.alloc(Alloc(operation.kind, 0, False, False, 0, 450))
        crowd = sorted(set(self.twin.owned) - before)
        if operation.kind == "user":
            self.mem.mem_map.mapping[crowd] = 1
            self.twin.mapped.update(crowd)
        for pfn in crowd[:: operation.spacing]:
            self.free_one(self.twin.owned[pfn], "zeroed" if operation.zeroed else "free", 0)

    def cycle(self, operation: Cycle) -> None:
        before = set(self.twin.owned)
        self.alloc(Alloc(operation.kind, operation.order, False, False, operation.cpu, 1))
        for pfn in set(self.twin.owned) - before:
            self.free_one(self.twin.owned[pfn], "frozen zeroed", operation.cpu)

    def alloc(self, operation: Alloc) -> None:
        gfp, request = KINDS[operation.kind]
        gfp |= (GFP_ZERO if operation.zero else 0) | (GFP_COMP if operation.compound else 0)
        request = Request(
            **{
                **asdict(request),
                "order": operation.order,
                "zero": operation.zero,
                "compound": operation.compound,
            }
        )
        for _ in range(operation.repeat):
            expected = self.twin.allocate(request, operation.cpu)
            try:
                got = self.guest.alloc_pages(gfp, operation.order, cpu=operation.cpu)
            except OutOfMemory:
                assert expected is None
                return
            assert expected is not None
            assert got == expected.pfn
            if operation.zero:
                assert reads_zero(self.guest, got, operation.order)

    def zero(self, owned: Owned) -> None:
        # The owner of a page that it frees as zero knows what it says.
        pages = range(owned.pfn, owned.pfn + (1 << owned.order))
        page_bytes(self.guest, owned.pfn, len(pages))[:] = 0
        self.twin.fill(pages, ZERO)

    def free(self, operation: Free) -> None:
        owned = self.owned(operation.which)
        if owned is not None:
            self.free_one(owned, operation.how, operation.cpu)

    def free_one(self, owned: Owned, how: str, cpu: int) -> None:
        pfn, order = Pfn(owned.pfn), owned.order
        is_folio = owned.compound or order == 0
        if how == "zeroed" and is_folio:
            self.zero(owned)
            freed = self.guest.put_page_zeroed(pfn, cpu=cpu)
            assert freed == self.twin.drop(owned, cpu, known_zero=True)
        elif how == "frozen zeroed" and owned.references == 1:
            self.zero(owned)
            self.mem.mem_map[pfn]._refcount = 0
            self.guest.free_frozen_pages_zeroed(pfn, order, cpu=cpu)
            assert self.twin.drop(owned, cpu, known_zero=True)
        elif how.startswith("inside"):
            self.twin.zone_locked, self.twin.lists_locked = True, how == "inside both locks"
            with self.guest.zone_lock(cpu=cpu if self.twin.lists_locked else None):
                freed = self.guest.free_pages_nolock(pfn, order, cpu=cpu)
            assert freed == self.twin.free_pages(owned, cpu)
            self.twin.zone_locked = self.twin.lists_locked = False
        elif how == "put" and is_folio:
            assert bool(put_page(self.mem, pfn, cpu)) == self.twin.drop(owned, cpu)
        else:
            assert self.guest.free_pages(pfn, order, cpu=cpu) == self.twin.free_pages(owned, cpu)

    def write(self, operation: Write) -> None:
        owned = self.owned(operation.which)
        if owned is None:
            return
        page = owned.pfn + operation.page % (1 << owned.order)
        page_bytes(self.guest, page)[operation.byte] = WRITTEN
        self.twin.contents[page] = WRITTEN

    def own(self, operation: Own) -> None:
        owned = self.owned(operation.which)
        if owned is None:
            return
        if operation.what == "get":
            self.mem.mem_map[owned.pfn]._refcount += 1
            owned.references += 1
        elif operation.what == "map" and owned.order == 0:
            self.mem.mem_map[owned.pfn].mapping = 1
            self.twin.mapped.add(owned.pfn)
        elif operation.what == "private" and self.may_leave_private:
            # The tails of a block that is no folio look as if nobody had them: verify would object.
            page = owned.pfn + (operation.page % (1 << owned.order) if owned.compound else 0)
            self.mem.mem_map[page].flags_f |= PG_private
            self.twin.private.add(page)

    def discard(self, operation: Discard) -> None:
        blocks = self.twin.free_blocks()
        if not blocks or self.guest.config.page_poisoning:
            return
        # The larger ones are the interesting ones.
        block = sorted(blocks, key=lambda block: -block.order)[operation.which % len(blocks)]
        self.twin.host_discards(block, zeroes=operation.zeroes)
        self.mem.mem_map[block.pfn].flags_f |= PG_reported
        if operation.zeroes:
            page_bytes(self.guest, block.pfn, 1 << block.order)[:] = 0
            self.mem.mem_map[block.pfn].flags_f |= PG_zeroed

    def do(self, operation: Operation) -> None:
        match operation:
            case Alloc():
                self.alloc(operation)
            case Free():
                self.free(operation)
            case Write():
                self.write(operation)
            case Own():
                self.own(operation)
            case Discard():
                self.discard(operation)
            case Crowd():
                self.crowd(operation)
            case Cycle():
                self.cycle(operation)
            case Drain():
                self.guest.drain_all_pages()
                self.twin.drain()

    def compare(self) -> None:
        twin, mem, count = self.twin, self.mem, self.guest.nr_pages
        assert free_lists(mem) == {
            (0, *key): [block.pfn for block in blocks] for key, blocks in twin.free.items() if blocks
        }
        assert pcp_lists(mem) == {
            key: [block.pfn for block in blocks] for key, blocks in twin.parked.items() if blocks
        }
        waiting = [block.pfn for block in reversed(twin.deferred)]
        assert walk(mem, int(mem.vm[0].trylock_heads)) == waiting
        assert int(mem.zone[0].nr_trylock_free) == sum(1 << block.order for block in twin.deferred)
        assert mem.pageblock.tolist() == twin.types
        flags, types, references = [0] * count, [PGTY_none] * count, [0] * count
        flags[0] = PG_reserved
        for block in twin.free_blocks():
            types[block.pfn] = PGTY_buddy
            flags[block.pfn] = PG_reported * block.reported | PG_zeroed * block.zeroed
        for blocks in [*twin.parked.values(), twin.deferred]:
            for block in blocks:
                flags[block.pfn] = PG_zeroed * block.zeroed
        for owned in twin.owned.values():
            references[owned.pfn] = owned.references
            flags[owned.pfn] = PG_head * owned.compound
        for page in twin.private:
            flags[page] |= PG_private
        same(mem.mem_map.flags_f[:count], flags)
        same(mem.mem_map.page_type[:count], types)
        same(mem.mem_map._refcount[:count], references)
        same(
            self.guest.ram_bytes.view(np.uint64).reshape(count, -1).any(axis=1),
            np.array(twin.contents) != ZERO,
        )
        counted = {name: int(mem.vm[0][name]) for name in asdict(twin.count)}
        assert counted == asdict(twin.count)
        assert int(mem.zone[0].nr_free_pages) == twin.nr_free_pages()
        for cpu in range(CPUS):
            assert int(mem.pcp[cpu]["count"]) == twin.parked_pages(cpu)


def same(found: Any, expected: Any) -> None:
    wrong = np.flatnonzero(np.asarray(found) != np.asarray(expected))
    assert not wrong.size, [(int(i), found[i], expected[i]) for i in wrong[:4]]


@given(configs, batches, sequences)
def test_allocator_and_twin_agree(config: dict[str, Any], batch: int, steps: list[Operation]) -> None:
    """The same pages, lists, order, flags, counters and bytes, step by step."""
    with booted(MIB, nr_cpus=CPUS, **config) as guest:
        pair = Pair(guest, batch)
        pair.compare()
        for step in steps:
            pair.do(step)
            pair.compare()
            if COMPILER_ON:
                verify(guest)
        verify(guest)
