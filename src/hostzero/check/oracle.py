# SPDX-License-Identifier: GPL-2.0-only
"""What must be true of a world after a step: claims, contents, promises, counters, and laws between steps."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from hostzero.check.absent import backed_pages, first_wrong, wrong_bytes
from hostzero.check.inventory import BALLOON, DEFERRED, FREE, PLACES, POOL, Inventory, found, take_inventory
from hostzero.check.laws import Laws, Moment, counters_of, history_of
from hostzero.check.machine_rows import rows_of
from hostzero.check.users import Contents
from hostzero.check.violation import Violated
from hostzero.check.world_setup import FILES, REST
from hostzero.units import PAGE_SIZE

if TYPE_CHECKING:
    from hostzero.check.world import World

POISON: Final = 0xAA
READ_AGAIN: Final = 4
"""A page that stays where it is is read every so many steps, where time is short."""
EVENTS: Final = 48
"""How many operations a page's history reaches back."""


class Oracle:
    """Looks at one world after each step, and remembers what it has seen.

    Attributes:
        world: what is looked at; only the claims of pages that have an owner by now are dropped in it.
        before: what was seen after the last step.
        events: the moments that a page's history is made of.
        thorough: every page is read after every step.
    """

    def __init__(self, world: World, *, thorough: bool) -> None:
        """Have seen nothing yet."""
        self.world = world
        self.mm, self.mem, self.host = world.mm, world.mem, world.host
        self.pages = world.pages
        self.thorough = thorough
        self.before: Moment | None = None
        self.events: deque[tuple[str, Moment]] = deque(maxlen=EVENTS)
        self.seen: tuple[Any, ...] = ()
        self.turn = 0
        self.gigantic = 0

    def moment(self) -> Moment:
        """Walk every list of the guest, and ask the host what it backs."""
        reporting, mem = self.mm.page_reporting, self.mem
        # Of what decides where a page is: much of what can happen changes nothing of it.
        private = self.world.private
        arrays = (mem.mem_map, mem.zone, mem.pcp, mem.hstate, mem.pageblock, mem.compound_head, private)
        balloon = (int(mem.vm[0].nr_balloon_pages), int(mem.vm[0].nr_balloon_isolated))
        seen = (balloon, *(array.tobytes() for array in arrays))
        if seen != self.seen or self.before is None:
            pages = take_inventory(mem, private if private.any() else None)
            self.seen = seen
        else:
            pages = self.before.pages
        return Moment(
            pages,
            backed_pages(self.world.ram),
            counters_of(self.mem),
            (reporting.report_calls, reporting.failed_calls),
            self.mem.pageblock.copy(),
        )

    def check(self, step: str = "boot") -> None:
        """See that everything is as it must be after a step, and remember it for the next.

        Raises:
            Violated: something is not; with the page's history.
        """
        self.world.step = step
        try:
            self._check()
        except Violated as violated:
            violation = violated.violation
            if violation.pfn is None:
                raise
            raise Violated(violation.with_history(history_of(self.events, violation.pfn))) from None

    def _check(self) -> None:
        now, world = self.moment(), self.world
        self.turn += 1
        self.events.append((world.step, now))
        pages = now.pages
        self.claims_are_true(now)
        self.claims_have_reasons(pages)
        self.owners_read_theirs(now)
        self.free_pages_hold_their_promise(now)
        self.counters_are_right(now)
        self.the_rest_is_untouched()
        if self.before is not None:
            # A gigantic page is made of a range that is isolated, in a fault too.
            isolates = world.isolates or self.gigantic != int(self.mem.hstate[1].nr_huge_pages)
            laws = Laws(
                self.before,
                now,
                self.host,
                isolates=isolates,
                isolated=world.isolated,
                unasked=world.unasked,
                touches=world.touches or world.untouched,
            )
            laws.check(self.mem)
            if world.untouched:
                laws.untouched_pages_stay_absent(self.mem, single=world.setup["backing"] in FILES)
                # A mapping that need not be zero is faulted in as such.
                if all(area.unknown is None for user in world.users for area in user.areas):
                    laws.hints_are_used(self.mem)
            world.rows.update(rows_of(self.before, now, laws.delta, self.host, world.step))
        self.host.reports.clear()
        self.host.granted = 0
        world.isolates = world.untouched = world.touches = world.unasked = False
        world.isolated = (0, 0)
        self.gigantic = int(self.mem.hstate[1].nr_huge_pages)
        self.before = now

    def claims_are_true(self, now: Moment) -> None:
        """Every page under a claim is zero: read those that the host backs, the others are."""
        pages = now.pages
        claimed = np.flatnonzero(pages.zeroed & now.backed)
        words = self.mm.ram_bytes.view(np.uint64)
        wrong = wrong_bytes(words, claimed, 0)
        if wrong.any():
            self.false_claim(pages, int(claimed[np.argmax(wrong)]))
        if self.mm.config.dcache_aliasing:
            hidden = np.flatnonzero(
                pages.zeroed & (pages.place != POOL) & (self.mem.kernel_lines[: self.pages] != 0)
            )
            if len(hidden):
                what = "a page that is claimed to be zero has lines left in the kernel's cache"
                found("corruption", what, int(hidden[0]), where=pages.describe(self.mem, int(hidden[0])))

    def false_claim(self, pages: Inventory, pfn: int) -> None:
        """Stop: a page is believed to be zero, and is not."""
        offset, value = first_wrong(self.mm.ram_bytes.view(np.uint64), pfn, 0)
        head = int(pages.head[pfn])
        found(
            "corruption",
            f"a page on {PLACES[int(pages.place[pfn])].split(' ', 1)[1]} is claimed to be zero and is not",
            pfn,
            order=int(pages.order[pfn]),
            where=pages.describe(self.mem, pfn),
            claim="HPG_zeroed of its huge page" if pages.place[pfn] == POOL else "PG_zeroed of its block",
            wrong_offset=(pfn - head) * PAGE_SIZE + offset,
            wrong_value=value,
        )

    def claims_have_reasons(self, pages: Inventory) -> None:
        """No page is claimed to be zero that nobody has shown to be: luck is no reason."""
        unowned = (pages.place >= FREE) & (pages.place <= BALLOON)
        claimed = pages.zeroed & unowned
        baseless = claimed & ~self.host.zero
        if baseless.any():
            pfn = int(np.argmax(baseless))
            found(
                "corruption",
                "a page is claimed to be zero that nobody has shown to be zero",
                pfn,
                order=int(pages.order[pfn]),
                where=pages.describe(self.mem, pfn),
                claim="PG_zeroed",
            )
        untold = pages.reported & ~self.host.told
        if untold.any():
            pfn = int(np.argmax(untold))
            what = "a block is marked as reported, and the host was not told of all of it"
            found("rot", what, pfn, order=int(pages.order[pfn]), where=pages.describe(self.mem, pfn))
        self.host.zero &= unowned
        self.host.told &= unowned

    def due(self, pages: Inventory) -> NDArray[np.bool_]:
        """Return which pages to read: those that have come from elsewhere, and each every few steps."""
        if self.thorough or self.before is None:
            return np.ones(self.pages, dtype=np.bool_)
        due: NDArray[np.bool_] = pages.place != self.before.pages.place
        due[self.turn % READ_AGAIN :: READ_AGAIN] = True
        return due

    def owners_read_theirs(self, now: Moment) -> None:
        """Whatever somebody has written is there, and what nobody has written is zero."""
        contents = Contents(self.mm, now.pages, now.backed, self.due(now.pages))
        for user in self.world.users:
            contents.user(user)
        for file in self.world.files:
            contents.file(file)
        for pfn, order, value in self.world.blocks:
            contents.block(pfn, order, value)
        for pfn, order in self.world.runs + self.world.cma:
            contents.block(pfn, order, 0x99)
        for pfn, pages in self.world.ranges:
            contents.range(pfn, pages, 0x99)
        contents.compare()

    def free_pages_hold_their_promise(self, now: Moment) -> None:
        """With poisoning or init_on_free, what is free holds what the guest relies on."""
        config = self.mm.config
        if not config.page_poisoning and not config.want_init_on_free:
            return
        value = POISON if config.page_poisoning else 0
        place = now.pages.place
        free = (place >= FREE) & (place <= DEFERRED)
        if config.dcache_aliasing:
            # What the kernel has written is in its lines, and in RAM when it is handed out.
            lines = self.mem.kernel_lines[: self.pages]
            hidden = np.flatnonzero(free & (lines != 0) & (lines != value + 1))
            if len(hidden):
                found("corruption", "a free page's cache lines do not hold what is promised", int(hidden[0]))
            free &= lines == 0
        wrong = np.flatnonzero(free & ~now.backed) if value else np.zeros(0, dtype=np.int64)
        if not len(wrong):
            backed = np.flatnonzero(free & now.backed & self.due(now.pages))
            wrong = backed[wrong_bytes(self.mm.ram_bytes.view(np.uint64), backed, value)]
        if len(wrong):
            what = "a free page does not hold what init_on_free or poisoning promises"
            found("corruption", what, int(wrong[0]), where=now.pages.describe(self.mem, int(wrong[0])))

    def the_rest_is_untouched(self) -> None:
        """What else is in the file that guest memory is a part of stays as it was."""
        if any((part != REST).any() for part in self.world.rest):
            found("corruption", "the host has changed bytes of the file that are not guest memory")

    def counters_are_right(self, now: Moment) -> None:
        """Nothing bad was met, and accounts agree with what they count."""
        vm = self.mem.vm[0]
        if now.counters["nr_bad_pages"]:
            found("rot", "the guest has met a bad page", int(vm.bug_pfn))
        if int(vm.nr_poison_errors):
            found("rot", "the guest has found its poison overwritten")
        if now.counters["num_poisoned_pages"] != len(self.world.broken):
            found("rot", "the guest counts another number of broken pages than broke")
        if int(vm.nr_swap_pages) != np.count_nonzero(self.mem.swap_map == 0):
            found("rot", "nr_swap_pages does not match the slots in use")
        records = self.mem.mem_map[: self.pages]
        charged = np.flatnonzero(records["memcg_data"] == self.world.cgroup + 1)
        usage = int((1 << records["order"][charged].astype(np.int64)).sum()) if len(charged) else 0
        if usage * PAGE_SIZE != self.mm.memcg.usage_bytes(self.world.cgroup):
            found("rot", "a cgroup's usage is not what its pages are charged with")
