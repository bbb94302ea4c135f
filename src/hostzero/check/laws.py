# SPDX-License-Identifier: GPL-2.0-only
"""What one operation may do to what is known: laws between an inventory and the next.

They are about loss. That no claim is false is another matter (`world`); here a claim, or the news
that the host has been told, must not go where the lifecycle table keeps it. Each law holds only for
operations of which the guest's own counters say that nothing else was going on: no memory was
waited for, nothing was isolated, moved or broken, and pages went in one direction only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hostzero.check.host import Host
from hostzero.check.inventory import (
    BALLOON,
    DEFERRED,
    FREE,
    OWNED,
    PLACES,
    POOL,
    Inventory,
    folio_heads,
    found,
)
from hostzero.mm.hugetlb_pool import hstate_is_gigantic
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER, Memory
from hostzero.mm.page_flags import PGTY_hugetlb
from hostzero.units import PAGE_SHIFT

COUNTERS: Final = (
    "pgalloc",
    "pgfree",
    "allocstall",
    "alloc_fail",
    "compact_stall",
    "pgmigrate_success",
    "pgmigrate_fail",
    "zeroed_bytes",
    "known_zero_bytes",
    "dropped_hint_bytes",
    "zeroed_in_vain_bytes",
    "memcg_charge_fail",
    "pswpin",
    "pswpout",
    "thp_fault_alloc",
    "fallback_claims",
    "fallback_steals",
    "num_poisoned_pages",
    "nr_bad_pages",
)

MOVES: Final = ("compact_stall", "pgmigrate_success", "pgmigrate_fail")
"""Counters that say that pages were moved, or were to be."""


class Moment(NamedTuple):
    """What is known of a guest between two operations.

    Attributes:
        pages: where each page is.
        backed: which pages the host holds memory for.
        counters: `COUNTERS` of the guest.
        reporting: how many reports were made, and how many failed.
        blocks: the migrate type of each pageblock.
    """

    pages: Inventory
    backed: NDArray[np.bool_]
    counters: dict[str, int]
    reporting: tuple[int, int]
    blocks: NDArray[np.int8]


def counters_of(mem: Memory) -> dict[str, int]:
    """Return the guest's counters."""
    vm = mem.vm[0]
    return {name: int(getattr(vm, name)) for name in COUNTERS}


def history_of(events: Iterable[tuple[str, Moment]], pfn: int) -> tuple[str, ...]:
    """Return what became of a page, operation by operation, as far as it changed."""
    lines: list[str] = []
    last = ""
    for step, moment in events:
        pages = moment.pages
        marks = [name for name, flag in (("zeroed", pages.zeroed), ("reported", pages.reported)) if flag[pfn]]
        text = f"{PLACES[int(pages.place[pfn])]}, order {int(pages.order[pfn])}"
        text += f", {' and '.join(marks)}" if marks else ""
        if text != last:
            lines.append(f"{step}: {text}")
            last = text
    return tuple(lines)


class Laws:
    """The laws, between two moments."""

    def __init__(
        self,
        before: Moment,
        after: Moment,
        host: Host,
        *,
        isolates: bool,
        isolated: tuple[int, int] = (0, 0),
        unasked: bool,
        touches: bool,
    ) -> None:
        """Compare.

        Args:
            before: the operation.
            after: it.
            host: what it has shown meanwhile.
            isolates: the operation takes blocks off the lists by design, and it is not known which.
            isolated: it does so with these pages, from one to before the other.
            unasked: the operation asks for no memory that is zero.
            touches: the operation writes at most one byte of a page, and not into its first word.
        """
        self.unasked, self.touches = unasked, touches
        self.isolated = np.zeros(len(before.backed), dtype=np.bool_)
        self.isolated[slice(*isolated)] = True
        self.before, self.after = before, after
        self.reports, self.granted = host.reports, host.granted
        self.delta = {name: after.counters[name] - before.counters[name] for name in COUNTERS}
        delta = self.delta
        self.reported = after.reporting != before.reporting
        self.quiet = (
            not isolates
            and not any(delta[name] for name in ("allocstall", "alloc_fail", *MOVES))
            and not after.counters["num_poisoned_pages"]
            and not before.counters["num_poisoned_pages"]
            and not delta["nr_bad_pages"]
        )

    def check(self, mem: Memory) -> None:
        """See that every law that applies was kept.

        Raises:
            Violated: one was not.
        """
        self.claims_do_not_multiply()
        vm = mem.vm[0]
        # A huge page that is moved may be split first, and its table is zeroed.
        moved = any(delta for name, delta in self.delta.items() if name in {*MOVES, "allocstall"})
        if self.unasked and not moved and not vm.init_on_alloc and not vm.init_on_free:
            self.nothing_is_zeroed_unasked()
        if not vm.zero_in_caller:
            self.nothing_is_zeroed_twice(mem)
        if not self.quiet:
            return
        allocated, freed = self.delta["pgalloc"], self.delta["pgfree"]
        if not self.reported:
            if not freed or not allocated:
                self.claims_are_kept(mem)
            if not freed and vm.page_reporting_enabled:
                self.news_is_kept(mem)
            if not freed and not vm.init_on_free and not vm.zero_in_caller:
                self.known_pages_are_not_zeroed(mem)
        elif not freed and not allocated and self.after.reporting[1] == self.before.reporting[1]:
            self.nothing_is_told_twice()
            self.answers_are_taken(mem)

    def claims_do_not_multiply(self) -> None:
        """What is claimed, and what was taken to be zero because it was claimed, was claimed or shown."""
        had = self.claimed(self.before.pages) + self.granted
        consumed = (self.delta["known_zero_bytes"] + self.delta["dropped_hint_bytes"]) >> PAGE_SHIFT
        if consumed + self.claimed(self.after.pages) > had:
            found("corruption", "more pages were taken to be zero than were known to be")

    @staticmethod
    def claimed(pages: Inventory) -> int:
        """Return how many pages are claimed to be zero, on free lists and in the balloon."""
        return int(np.count_nonzero(pages.zeroed & (pages.place >= FREE) & (pages.place <= BALLOON)))

    def claims_are_kept(self, mem: Memory) -> None:
        """A block of pages that nobody had, each of them known to be zero, is known to be zero."""
        before, after = self.before.pages, self.after.pages
        known = before.zeroed & (before.place >= FREE) & (before.place <= BALLOON) & ~self.isolated
        for pfn in _heads((after.place >= FREE) & (after.place <= DEFERRED) & ~after.zeroed & known, after):
            order = int(after.order[pfn])
            if not _may_be_put_together(mem, order) and known[pfn : pfn + (1 << order)].all():
                found(
                    "lost",
                    "a block that was known to be zero is not any more, and nobody had it",
                    pfn,
                    order=order,
                )

    def news_is_kept(self, mem: Memory) -> None:
        """What is left of a block that the host knows of is one, too."""
        before, after = self.before.pages, self.after.pages
        told = before.reported & (before.place == FREE) & ~self.isolated
        for pfn in _heads((after.place == FREE) & ~after.reported & told, after):
            order = int(after.order[pfn])
            last = pfn + (1 << order) - 1
            whole = before.head[pfn] == before.head[last] and not self.isolated[last]
            if whole and not _may_be_put_together(mem, order):
                found("lost", "a part of a reported block is not reported any more", pfn, order=order)

    def nothing_is_zeroed_twice(self, mem: Memory) -> None:
        """A page is zeroed once when it is handed out, and with init_on_free once when it is freed."""
        before, after = self.before.pages, self.after.pages
        pooled = np.count_nonzero((before.place == POOL) & (after.place == OWNED))
        handed = self.delta["pgalloc"] + int(pooled)
        if mem.vm[0].init_on_alloc:
            # Zeroed for the pool first: what a pool's page holds is not known of it.
            fresh = (before.place != OWNED) & (before.place != POOL) & (after.place == OWNED)
            huge = np.flatnonzero(fresh & (after.types == PGTY_hugetlb))
            handed += int((1 << mem.mem_map["order"][huge].astype(np.int64)).sum())
        if mem.vm[0].init_on_free:
            handed += self.delta["pgfree"] + max(-self.delta["num_poisoned_pages"], 0)
        if self.delta["zeroed_bytes"] - self.delta["zeroed_in_vain_bytes"] > handed << PAGE_SHIFT:
            found("lost", "more was zeroed than was handed out")

    def nothing_is_zeroed_unasked(self) -> None:
        """Nothing is zeroed if nobody has asked for zeros."""
        if self.delta["zeroed_bytes"]:
            found("lost", "memory was zeroed, and nobody had asked for zeros")

    def known_pages_are_not_zeroed(self, mem: Memory) -> None:
        """No more is zeroed than what was taken, was not known to be zero and is not overwritten at once."""
        before, after = self.before.pages, self.after.pages
        # From a free list to an owner, the balloon or a pool, or from a pool to an owner.
        held = (OWNED, BALLOON, POOL)
        taken = ~np.isin(before.place, held) & np.isin(after.place, held)
        taken |= (before.place == POOL) & (after.place == OWNED)
        unknown = int(np.count_nonzero(taken & ~(before.zeroed & ~self.isolated)))
        overwritten = 0
        if not mem.vm[0].init_on_alloc:
            overwritten = max(self.delta["pswpin"], self.copied(mem, taken) if self.touches else 0)
        if self.delta["zeroed_bytes"] > (int(np.count_nonzero(taken)) - overwritten) << PAGE_SHIFT:
            found("lost", "a page that is overwritten at once was zeroed first")
        if self.delta["zeroed_bytes"] > unknown << PAGE_SHIFT:
            known = taken & before.zeroed
            pfn = int(np.argmax(known)) if known.any() else None
            found("lost", "a page that was known to be zero was zeroed again", pfn)

    def copied(self, mem: Memory, taken: NDArray[np.bool_]) -> int:
        """Return how many pages a process was given with something in them that it has not written itself."""
        given = np.flatnonzero(taken & self.after.backed & (_mappings(mem, len(taken)) != 0))
        return int(np.count_nonzero(mem.ram[given << (PAGE_SHIFT - 3)]))

    def nothing_is_told_twice(self) -> None:
        """A block that the host knows of, and that nobody had since, is not reported to it."""
        before = self.before.pages
        seen: set[tuple[int, int]] = set()
        for pfn, order, _ in self.reports:
            known = before.place[pfn] == FREE and before.reported[pfn] and before.head[pfn] == pfn
            if (known and int(before.order[pfn]) == order) or (pfn, order) in seen:
                found("lost", "a block that the host knows of was reported again", pfn, order=order)
            seen.add((pfn, order))

    def answers_are_taken(self, mem: Memory) -> None:
        """A block that the host has shown to be zero, and that is back as it was, is known to be zero."""
        after = self.after.pages
        for pfn, order, shown in self.reports:
            back = after.place[pfn] == FREE and after.head[pfn] == pfn and int(after.order[pfn]) == order
            if back and shown and after.reported[pfn] and not after.zeroed[pfn]:
                found(
                    "lost",
                    "the host showed a block to be zero, and the guest does not know",
                    pfn,
                    order=order,
                )

    def untouched_pages_stay_absent(self, mem: Memory, *, single: bool) -> None:
        """A page that was known to be zero, populated and not touched, costs the host nothing.

        Args:
            mem: the guest's arrays.
            single: the host backs 4 KiB at a time; else it may back 2 MiB for a table in them, and this
                is about huge pages.
        """
        if not self.only_gave(mem):
            return
        fresh = self.given() & self.before.pages.zeroed & ~self.before.backed
        if single and not self.delta["pswpin"]:
            wrong = fresh & self.after.backed & (_mappings(mem, len(fresh)) != 0)
            if wrong.any():
                found("lost", "the host had to back a page that was known to be zero", int(np.argmax(wrong)))
        for start in range(0, len(fresh), PAGEBLOCK_NR_PAGES):
            block = slice(start, start + (1 << HPAGE_PMD_ORDER))
            if (
                not fresh[block].all()
                or not mem.mem_map[start].mapping
                or mem.mem_map[start].order != HPAGE_PMD_ORDER
            ):
                continue  # not one huge page of a process
            if self.after.backed[block].any():
                found("lost", "the host had to back a huge page that was known to be zero", start, order=9)

    def hints_are_used(self, mem: Memory) -> None:
        """Where only pages that have to be zero are asked for, no hint is dropped."""
        vm = mem.vm[0]
        # These pages are zeroed when they are freed, or by the fault, whatever is known of them.
        elsewhere = vm.init_on_free or vm.cpu_dcache_aliasing or vm.cpu_icache_aliasing
        if not self.only_gave(mem) or elsewhere or self.delta["pswpin"]:
            return
        # A pool asks for no zeros, and keeps what is known of its pages.
        fresh = ~np.isin(self.before.pages.place, (OWNED, POOL))
        if self.delta["dropped_hint_bytes"] and not (fresh & (self.after.pages.types == PGTY_hugetlb)).any():
            known = self.given() & self.before.pages.zeroed
            pfn = int(np.argmax(known)) if known.any() else None
            found("lost", "a page that was known to be zero was asked for as if that did not matter", pfn)

    def only_gave(self, mem: Memory) -> bool:
        """Return whether pages went to owners and nowhere else, and the allocator zeroes what has to be."""
        disturbed = not self.quiet or self.reported or self.delta["pgfree"]
        return not disturbed and not mem.vm[0].zero_in_caller

    def given(self) -> NDArray[np.bool_]:
        """Return which pages have an owner that neither had one nor were in a pool."""
        return ~np.isin(self.before.pages.place, (OWNED, POOL)) & (self.after.pages.place == OWNED)


# A range that a gigantic page could not have is isolated pageblock by pageblock and given back. What
# spans several of them is split and put together again meanwhile, which forgets what is known of the
# whole (rows merge-one and unisolate), and the guest counts nothing.
def _may_be_put_together(mem: Memory, order: int) -> bool:
    return order > PAGEBLOCK_ORDER and any(hstate_is_gigantic(mem, h) for h in range(len(mem.hstate)))


# To whom each page is mapped, by its folio; tables and the kernel's own have nobody.
def _mappings(mem: Memory, pages: int) -> NDArray[np.int64]:
    mappings: NDArray[np.int64] = mem.mem_map["mapping"]
    return mappings[folio_heads(mem, np.arange(pages))]


def _heads(mask: NDArray[np.bool_], pages: Inventory) -> list[int]:
    return np.flatnonzero(mask & (pages.head == np.arange(len(mask)))).tolist()
