# SPDX-License-Identifier: GPL-2.0-only
"""Where every page of a guest is: on which list, under which claim; read from outside, list by list.

`mm/verify.py` asks the same for the tests. This is another hand's answer, on whole arrays, so that
it costs the same with the compiler off, and so that a defect of the one is not one of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from hostzero.check.violation import Kind, Violated, Violation
from hostzero.mm.hugetlb_pool import HPG_zeroed
from hostzero.mm.list import LIST_POISON
from hostzero.mm.mmzone import (
    MAX_NUMNODES,
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_NAMES,
    MIGRATE_TYPES,
    NR_HSTATES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_ORDER,
    PB_MIGRATETYPE_MASK,
    Memory,
)
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PG_dirty,
    PG_head,
    PG_hwpoison,
    PG_private,
    PG_referenced,
    PG_reported,
    PG_reserved,
    PG_uptodate,
    PG_zeroed,
    PGTY_buddy,
    PGTY_hugetlb,
    PGTY_none,
    PGTY_offline,
)
from hostzero.mm.pcplist import pindex_to_order

# Where a page is.
OWNED: Final = 0  # somebody's, or nobody's and on no list: a part of the kernel, or broken
FREE: Final = 1
PARKED: Final = 2
DEFERRED: Final = 3
BALLOON: Final = 4
POOL: Final = 5
PLACES: Final = (
    "an owner",
    "a free list",
    "a per-CPU list",
    "the deferred frees",
    "the balloon",
    "a huge page pool",
)

_OWN_ORDER: Final = -1


def folio_heads(mem: Memory, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first page of the folio of each page; a page that is in none is its own."""
    links = mem.compound_head[pfns].astype(np.int64)
    return np.where(links & 1, links >> 1, pfns)


def found(kind: Kind, what: str, pfn: int | None = None, **more: Any) -> NoReturn:
    """Stop because something is as it must never be."""
    raise Violated(Violation(kind, what, pfn, **more))


class Inventory(NamedTuple):
    """What each page is, one entry a page; a block's page `i` says what its head says.

    Attributes:
        place: one of OWNED to POOL.
        head: the first page of the block that it is in; itself for an owned page.
        order: of that block.
        zeroed: whether the block is claimed to be zero.
        reported: whether the host is said to know of the block.
        flags: `page->flags`.
        types: `page->page_type`.
    """

    place: NDArray[np.int8]
    head: NDArray[np.int64]
    order: NDArray[np.int8]
    zeroed: NDArray[np.bool_]
    reported: NDArray[np.bool_]
    flags: NDArray[np.int64]
    types: NDArray[np.int32]

    def blocks(self) -> Iterator[int]:
        """Yield the first page of every block that nobody owns."""
        unowned = (self.place != OWNED) & (self.head == np.arange(len(self.head)))
        yield from np.flatnonzero(unowned).tolist()

    def describe(self, mem: Memory, pfn: int) -> str:
        """Return where a page is, in words."""
        place = int(self.place[pfn])
        if place != FREE:
            return PLACES[place]
        kind = MIGRATE_NAMES[int(mem.pageblock[pfn >> PAGEBLOCK_ORDER]) & PB_MIGRATETYPE_MASK]
        return f"the free list of order {int(self.order[pfn])}, {kind}, zone {int(mem.mem_map[pfn].zone)}"


class _List(NamedTuple):
    place: int
    zone: int
    order: int
    migratetype: int
    cpu: int = 0


class _Walk:
    """One walk over all lists."""

    def __init__(self, mem: Memory) -> None:
        vm = mem.vm[0]
        self.mem = mem
        self.n = n = int(vm.nr_pages)
        pages = mem.mem_map
        self.next, self.prev = pages["lru_next"], pages["lru_prev"]
        self.following: list[int] = self.next.tolist()
        self.blocks = mem.pageblock & PB_MIGRATETYPE_MASK
        self.lists: list[tuple[_List, int, int]] = []
        self.listed: list[int] = []
        self.flags = pages["flags_f"][:n].copy()
        self.types = pages["page_type"][:n].copy()
        self.private = pages["private"]
        self.zone = pages["zone"][:n]
        self.place = np.zeros(n, dtype=np.int8)
        self.head = np.arange(n, dtype=np.int64)
        self.order = np.zeros(n, dtype=np.int8)
        self.zeroed = np.zeros(n, dtype=np.bool_)
        self.reported = np.zeros(n, dtype=np.bool_)
        zones, cpus = int(vm.nr_zones), int(vm.nr_cpus)
        self.nr_free = np.zeros((zones, NR_PAGE_ORDERS), dtype=np.int64)
        self.free_pages = np.zeros((zones, MIGRATE_TYPES), dtype=np.int64)
        self.parked = np.zeros(zones * cpus, dtype=np.int64)
        self.deferred = np.zeros(zones, dtype=np.int64)
        self.balloon = 0
        self.waiting = int(vm.hugetlb_heads) + NR_HSTATES * MAX_NUMNODES
        self.pools = np.zeros((NR_HSTATES, MAX_NUMNODES), dtype=np.int64)

    def list_of(self, head: int) -> _List | None:
        """Return what a list head is the head of; None for compaction's, which have none now."""
        vm, n = self.mem.vm[0], self.n
        if head < int(vm.pcp_heads):
            rest, migratetype = divmod(head - n, MIGRATE_TYPES)
            zone, order = divmod(rest, NR_PAGE_ORDERS)
            return _List(FREE, zone, order, migratetype)
        if head < int(vm.hugetlb_heads):
            at, pindex = divmod(head - int(vm.pcp_heads), NR_PCP_LISTS)
            cpu, zone = divmod(at, int(vm.nr_zones))
            return _List(PARKED, zone, int(pindex_to_order(pindex)), -1, cpu)
        pool = head - int(vm.hugetlb_heads)
        if pool < NR_HSTATES * MAX_NUMNODES:
            h, node = divmod(pool, MAX_NUMNODES)
            return _List(POOL, node, int(self.mem.hstate[h].order), h)
        if int(vm.trylock_heads) <= head < int(vm.trylock_heads) + int(vm.nr_zones):
            return _List(DEFERRED, head - int(vm.trylock_heads), _OWN_ORDER, -1)
        if head == int(vm.balloon_head):
            return _List(BALLOON, -1, 0, -1)
        return None

    def walk(self, head: int) -> None:
        """Follow one list and remember its blocks."""
        where = self.list_of(head)
        if head == self.waiting:
            return  # huge pages that left their pool are somebody's until hugetlb has the word
        if where is None:
            found(
                "rot", "a list that must be empty between two operations holds a page", int(self.next[head])
            )
        pfns: list[int] = []
        following, n, pfn = self.following, self.n, self.following[head]
        while pfn != head:
            if not 0 <= pfn < n or len(pfns) > n:
                found("rot", "a list's links do not match", pfns[-1] if pfns else None)
            pfns.append(pfn)
            pfn = following[pfn]
        if int(self.prev[head]) != pfns[-1]:
            found("rot", "a list's links do not match", pfns[-1])
        self.lists.append((where, head, len(pfns)))
        self.listed += pfns

    def note(self) -> None:
        """Note the blocks of all lists, at once."""
        if not self.lists:
            return
        counts = [count for _, _, count in self.lists]
        table = np.array([[*where, head] for where, head, _ in self.lists], dtype=np.int64)
        first = np.cumsum(counts) - counts
        place, zone, order, kind, cpu, head = np.repeat(table, counts, axis=0).T
        pfns = np.array(self.listed, dtype=np.int64)
        before = np.concatenate([head[:1], pfns[:-1]])
        before[first] = table[:, -1]
        self.none_of(pfns, self.prev[pfns] != before, "a list's links do not match")
        order = np.where(order == _OWN_ORDER, self.private[pfns], order)
        sizes = np.left_shift(1, np.clip(order, 0, 18))
        wrong = (order < 0) | (order > 18) | (pfns & (sizes - 1) != 0) | (pfns + sizes > self.n)
        self.none_of(pfns, wrong, "a block on a list is unaligned or has no order")
        flags, private = self.flags[pfns], self.private[pfns]
        zeroed = np.where(place == POOL, private & HPG_zeroed != 0, flags & PG_zeroed != 0)
        # One entry a page from here on.
        heads = np.repeat(pfns, sizes)
        pages = heads + np.arange(len(heads)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        block = np.repeat(np.arange(len(pfns)), sizes)
        self.place[pages] = place[block]
        if len(pages) != np.count_nonzero(self.place):
            twice = np.bincount(pages, minlength=self.n) > 1
            self.none(twice, "a page is on two lists, or inside a block that is on one")
        self.head[pages], self.order[pages], self.zeroed[pages] = heads, order[block], zeroed[block]
        free = place == FREE
        self.reported[pages] = (free & (flags & PG_reported != 0))[block]
        wrong = free & ((self.types[pfns] != PGTY_buddy) | (private != order))
        self.none_of(pfns, wrong, "a block on a free list is not marked free, or with another order")
        strange = (place != BALLOON) & (place != POOL) & (self.zone[pfns] != zone)
        strange[block] |= free[block] & (self.blocks[pages >> PAGEBLOCK_ORDER] != kind[block])
        self.none_of(pfns, strange, "a block is on the list of another zone or migrate type than its own")
        np.add.at(self.nr_free, (zone[free], order[free]), 1)
        np.add.at(self.free_pages, (zone[free], kind[free]), sizes[free])
        parked, deferred, pool = place == PARKED, place == DEFERRED, place == POOL
        np.add.at(self.parked, (cpu * len(self.deferred) + zone)[parked], sizes[parked])
        np.add.at(self.deferred, zone[deferred], sizes[deferred])
        np.add.at(self.pools, (kind[pool], zone[pool]), 1)
        self.balloon = int(np.count_nonzero(place == BALLOON))

    def none_of(self, pfns: NDArray[np.int64], wrong: NDArray[np.bool_], what: str) -> None:
        """Stop if something is wrong with any of some blocks."""
        if wrong.any():
            found("rot", what, int(pfns[np.argmax(wrong)]))

    def check_counters(self) -> None:
        """Compare what was counted with what the guest counts."""
        mem, vm = self.mem, self.mem.vm[0]
        zones = mem.zone
        listed = self.free_pages.copy()
        listed[:, MIGRATE_ISOLATE] = 0
        if (self.nr_free != zones["nr_free"]).any():
            found("rot", "nr_free does not match the free lists")
        if (
            (listed.sum(axis=1) != zones["nr_free_pages"]).any()
            or (listed[:, MIGRATE_CMA] != zones["nr_free_cma"]).any()
            or (listed[:, MIGRATE_HIGHATOMIC] != zones["nr_free_highatomic"]).any()
        ):
            found("rot", "nr_free_pages, nr_free_cma or nr_free_highatomic does not match the free lists")
        if (self.parked != mem.pcp["count"]).any():
            found("rot", "a per-CPU count does not match its lists")
        if (self.deferred != zones["nr_trylock_free"]).any():
            found("rot", "a zone's count of deferred pages does not match its list")
        if self.balloon != int(vm.nr_balloon_pages) or int(vm.nr_balloon_isolated):
            found("rot", "the balloon's count does not match its list")
        for h in range(NR_HSTATES):
            pool = mem.hstate[h]
            if (self.pools[h] != pool.free_huge_pages_node).any() or self.pools[
                h
            ].sum() != pool.free_huge_pages:
                found("rot", "a huge page pool's counters do not match its pages")
            if not 0 <= int(pool.surplus_huge_pages) <= int(pool.nr_huge_pages):
                found("rot", "a huge page pool has more surplus pages than pages")
            if not 0 <= int(pool.resv_huge_pages) <= int(pool.free_huge_pages):
                found("rot", "a huge page pool has promised more pages than it has")

    def check_pages(self) -> None:
        """See that no page carries what it must not carry where it is."""
        pages, n = self.mem.mem_map[: self.n], self.n
        listed = (self.place >= FREE) & (self.place <= DEFERRED)
        heads = self.head == np.arange(n)
        traces = (
            (pages["_refcount"] != 0)
            | (pages["_mapcount"] != -1)
            | (pages["mapping"] != 0)
            | (pages["memcg_data"] != 0)
            | (self.mem.compound_head[:n] != 0)
            | ((self.types != PGTY_none) & ~((self.place == FREE) & heads & (self.types == PGTY_buddy)))
        )
        self.none(listed & traces, "a page on a list has an owner's traces")
        allowed = np.where(heads & listed, PG_zeroed | np.where(self.place == FREE, PG_reported, 0), 0)
        wrong = self.flags & PAGE_FLAGS_CHECK_AT_PREP & ~allowed != 0
        self.none(
            listed & wrong & (self.flags & PG_zeroed != 0), "a mark lies inside a block or on a page of it"
        )
        self.none(listed & wrong, "a page on a list has a flag that it must not have there")
        free = self.place == FREE
        self.none(~free & (self.types == PGTY_buddy), "a page says that it is free and is on no free list")
        self.none(
            (self.types == PGTY_offline) != (self.place == BALLOON),
            "a page says that it is in the balloon and is not",
        )
        pfns = np.flatnonzero(free & heads & (self.order < PAGEBLOCK_ORDER))
        buddies = pfns ^ np.left_shift(1, self.order[pfns].astype(np.int64))
        inside = buddies < n
        pfns, buddies = pfns[inside], buddies[inside]
        unmerged = free[buddies] & heads[buddies] & (self.order[buddies] == self.order[pfns])
        unmerged &= self.zone[buddies] == self.zone[pfns]
        if unmerged.any():
            pfn = int(pfns[np.argmax(unmerged)])
            found("rot", "two free buddies were not merged", pfn, order=int(self.order[pfn]))

    def check_owned(self, private: NDArray[np.bool_] | None) -> None:
        """See that what has an owner carries nothing of what the free lists know."""
        owned = self.place == OWNED
        allowed = np.full(self.n, PG_head | PG_reserved, dtype=np.int64)
        if private is not None:
            allowed[private] |= PG_private | PG_uptodate | PG_dirty | PG_referenced
        wrong = self.flags & PAGE_FLAGS_CHECK_AT_PREP & ~allowed
        self.none(owned & (wrong & PG_zeroed != 0), "the mark of a zero page has reached an owner, or nobody")
        self.none(
            owned & (wrong & PG_reported != 0), "the mark of a reported page has reached an owner, or nobody"
        )
        self.none(owned & (wrong != 0), "an owned page has a flag that it must not have")
        balloon = self.place == BALLOON
        kept = self.flags & PAGE_FLAGS_CHECK_AT_PREP & ~PG_zeroed
        self.none(balloon & (kept != 0), "a balloon page has a flag that it must not have")
        huge = owned & (self.types == PGTY_hugetlb) & (self.flags & PG_head != 0)
        self.none(
            huge & (self.private[: self.n] & HPG_zeroed != 0), "HPG_zeroed stays on a folio that somebody has"
        )

    def none(self, mask: NDArray[np.bool_], what: str) -> None:
        """Stop if a condition holds of any page."""
        if mask.any():
            pfn = int(np.argmax(mask))
            where = PLACES[int(self.place[pfn])]
            found(
                "rot",
                what,
                pfn,
                order=int(self.order[pfn]),
                where=where,
                claim=f"flags {int(self.flags[pfn]):#x}",
            )


def take_inventory(mem: Memory, private: NDArray[np.bool_] | None = None) -> Inventory:
    """Walk every list and return where each page is.

    Args:
        mem: the guest's arrays.
        private: pages whose owners use flags for themselves.

    Raises:
        Violated: a list, counter or flag is as it must never be.
    """
    walk = _Walk(mem)
    heads = np.arange(walk.n, len(walk.next))
    linked = (walk.next[walk.n :] != heads) & (walk.next[walk.n :] != LIST_POISON)
    for head in heads[linked].tolist():
        walk.walk(head)
    walk.note()
    walk.check_counters()
    walk.check_pages()
    walk.check_owned(private)
    return Inventory(walk.place, walk.head, walk.order, walk.zeroed, walk.reported, walk.flags, walk.types)


def broken_pages(inventory: Inventory) -> NDArray[np.int64]:
    """Return the pages whose memory is broken."""
    return np.flatnonzero(inventory.flags & PG_hwpoison)
