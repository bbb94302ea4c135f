# SPDX-License-Identifier: GPL-2.0-only
"""A machine with every feature at once, its users and its host, and what must be true of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from hostzero.check.absent import backed_pages, first_wrong, wrong_bytes
from hostzero.check.host import Host
from hostzero.check.inventory import BALLOON, DEFERRED, FREE, PLACES, POOL, Inventory, found, take_inventory
from hostzero.check.laws import Laws, Moment, counters_of, history_of
from hostzero.check.machine_rows import rows_of
from hostzero.check.users import Area, Contents, File, User
from hostzero.check.violation import Violated
from hostzero.check.world_setup import GIGANTIC, boot, checked, device_config
from hostzero.device import BalloonDevice
from hostzero.driver import State, VirtioBalloon
from hostzero.errors import DriverError, HostzeroError, MmError, OutOfMemory
from hostzero.mm.cma import cma_release_frozen
from hostzero.mm.contig import free_contig_frozen_range
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison, PG_private, PG_referenced, PG_uptodate
from hostzero.units import PAGE_SIZE, Pfn

T = TypeVar("T")

POISON: Final = 0xAA
READ_AGAIN: Final = 4
"""A page that stays where it is is read every so many steps, where time is short."""
OWNERS_FLAGS: Final = PG_private | PG_uptodate | PG_dirty | PG_referenced
"""What an owner may use for itself; two of them mean something else on a free list."""
EVENTS: Final = 48
"""How many operations a page's history reaches back."""


class World:
    """One machine, its users and everybody else who holds pages, and what all of them must read.

    Attributes:
        machine: the machine; its driver and device change when the device is plugged in anew.
        host: what the host has shown, and how it fails.
        users: the processes.
        blocks: blocks of the kernel: page, order, the byte they are full of.
        private: pages whose owner uses flags of theirs for itself.
        rows: which rows of the lifecycle table were exercised.
        unasked: the operation asks for no memory that is zero.
    """

    def __init__(self, setup: dict[str, Any], *, thorough: bool = True) -> None:
        """Boot on memory full of dirt; read every page after every step only if `thorough`."""
        self.thorough = thorough
        self.turn = 0
        self.seen: tuple[Any, ...] = ()
        self.gigantic = 0
        self.unasked = False
        self.setup = setup = checked(setup)
        self.ram, self.machine = boot(setup)
        self.mm = self.machine.mm
        self.mem = self.mm.mem
        self.pages = self.mm.nr_pages
        self.nr_nodes = int(self.mem.vm[0].nr_nodes)
        self.nr_cpus = self.mm.config.nr_cpus
        self.free = self.mm.vm_stats().free_pages
        self.host = Host(self.pages)
        self.host.watch(self.machine)
        self.host.attach(self.machine)
        self.files: list[File] = []
        self.blocks: list[tuple[int, int, int]] = []
        self.runs: list[tuple[int, int]] = []
        self.cma: list[tuple[int, int]] = []
        self.broken: list[int] = []
        self.private = np.zeros(self.pages, dtype=np.bool_)
        self.rows: Counter[str] = Counter()
        self.events: deque[tuple[str, Moment]] = deque(maxlen=EVENTS)
        self.step = "boot"
        self.isolates = False
        self.untouched = False
        self.cgroup = self.mm.memcg.create(None)
        self.users = [User(self.mm.spawn(), 0), User(self.mm.spawn(node=self.nr_nodes - 1), 1)]
        self.users[1].process.memcg = self.cgroup
        self.before: Moment | None = None
        self.check()

    def __enter__(self) -> Self:
        """Return the world itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the machine go, whatever state it is in."""
        self.drop()

    # What users must read.

    def with_room(self, call: Callable[[], T], user: User | None = None) -> T:
        """Make a call that may need a page for a table; if there is none, others give theirs back.

        Args:
            call: what is done; it can be done again after it has failed.
            user: the process that does it, which keeps what it has.
        """
        for give in (self.give_to_tables, self.give_blocks_back, partial(self.end_other, user)):
            try:
                return call()
            except OutOfMemory:
                give()
        return call()

    def give_to_tables(self) -> None:
        """Free the runs and empty the balloon."""
        self.give_runs_back(len(self.runs) + len(self.cma))
        self.balloon(0)

    def give_blocks_back(self) -> None:
        """Free every block of the kernel."""
        for pfn, order, _ in self.blocks:
            self.leave_flags(pfn, order)
            self.mm.free_pages(Pfn(pfn), order)
        self.blocks.clear()

    def end_other(self, user: User | None) -> None:
        """End the processes but one, and start others in their places."""
        for other in self.users:
            if other is not user and other.areas:
                self.leave(other)
                self.enter(other)

    def unmap(self, user: User, area: Area, first: int, end: int) -> None:
        """Unmap pages of an area and cut the area."""
        self.with_room(lambda: user.process.munmap(first * PAGE_SIZE, (end - first) * PAGE_SIZE), user)
        user.lost -= set(range(first, end))
        user.areas.remove(area)
        for low, high in ((area.start, first), (end, area.end)):
            if low < high:
                user.areas.append(area.part(low, high))

    def leave(self, user: User) -> None:
        """End a process."""
        user.process.exit()
        user.areas.clear()
        user.lost.clear()

    def enter(self, user: User) -> None:
        """Start a process in the place of one that has ended."""
        cpu, node = self.nr_cpus - 1, user.number % self.nr_nodes
        user.process = self.with_room(lambda: self.mm.spawn(cpu=cpu, node=node), user)
        if user.number:
            user.process.memcg = self.cgroup

    # Other owners.

    def bytes_of(self, pfn: int, order: int) -> NDArray[np.uint8]:
        """Return a writable view of a block."""
        view: NDArray[np.uint8] = self.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE]
        return view

    def taken(self, pfn: int, order: int, *, zeroed: bool, fill: int | None) -> None:
        """Note that somebody was given a block; see that it is zero if that was asked for, and write it."""
        self.host.owned(pfn, 1 << order)
        content = self.bytes_of(pfn, order)
        if zeroed and content.any():
            at = int(np.argmax(content != 0))
            found(
                "corruption",
                "a block that was asked for with zeros holds something else",
                pfn,
                order=order,
                where="an owner",
                wrong_offset=at,
                wrong_value=int(content[at]),
            )
        flags = self.mem.mem_map["flags_f"][pfn : pfn + (1 << order)]
        if (flags & PG_hwpoison != 0).any():
            found("rot", "a page whose memory is broken was handed out", pfn, order=order)
        if (flags & PG_private != 0).any():
            found("rot", "the mark of a zero page has reached an owner", pfn, order=order)
        if fill is not None:
            content[:] = fill

    def use_flags(self, pfn: int, order: int) -> None:
        """Have an owner set flags on all of its pages, as a filesystem does."""
        pages = slice(pfn, pfn + (1 << order))
        self.mem.mem_map["flags_f"][pages] |= OWNERS_FLAGS
        self.private[pages] = True

    def leave_flags(self, pfn: int, order: int) -> None:
        """Have an owner go: its flags stay, but for PG_private where that would lose the page."""
        pages = slice(pfn, pfn + (1 << order))
        config = self.mm.config
        checks = config.debug_vm or config.page_poisoning
        if self.private[pages].any() and (checks or config.want_init_on_alloc or config.want_init_on_free):
            self.mem.mem_map["flags_f"][pages] &= ~PG_private
        self.private[pages] = False

    def give_runs_back(self, count: int) -> None:
        """Free the oldest runs."""
        for _ in range(count):
            if self.runs:
                self.leave_flags(*self.runs[0])
                free_contig_frozen_range(self.mm, *self.runs.pop(0))
            elif self.cma:
                self.leave_flags(*self.cma[0])
                if not cma_release_frozen(self.mm, *self.cma.pop(0)):
                    found("rot", "the CMA area does not take back what it gave")

    def mapped_at(self, pfn: int) -> tuple[User, int] | None:
        """Return the user and the page number at which an anonymous page is mapped."""
        link = int(self.mem.compound_head[pfn])
        head = link >> 1 if link & 1 else pfn
        record = self.mem.mem_map[head]
        if not record.mapping or record.page_type or int(self.mem.mem_map[pfn].flags_f) & PG_hwpoison:
            return None
        for user in self.users:
            if user.process._mm_id == record.mapping:
                return user, int(record.index) + pfn - head
        return None

    def lose(self, user: User, page: int) -> None:
        """Note that a process has lost a page to a hardware error."""
        user.lost.add(page)
        for area in user.areas:
            if area.start <= page < area.end:
                area.content[page - area.start] = 0

    # The host.

    def plug(self, features: int) -> None:
        """Take the balloon's device out, if its driver can let go of it, and put another one in.

        Raises:
            HostzeroError: the driver cannot bind; that memory is short is one reason.
        """
        machine = self.machine
        if machine.driver.state is not State.UNBOUND:
            machine.driver.remove()
        machine.device = BalloonDevice(machine.memory, device_config(features, self.setup))
        machine.device.set_target(0)
        machine.driver = VirtioBalloon(machine.mm, machine.memory, machine.device)
        self.host.attach(machine)
        machine.driver.probe()
        machine.mm.page_reporting.order = self.setup["reporting"][1]

    def balloon(self, size: int) -> None:
        """Ask for a balloon of so many bytes; a device that does not work is no news."""
        try:
            self.machine.balloon(size)
        except (DriverError, HostzeroError):
            if self.machine.driver.failure is None:
                raise

    # Checks.

    def moment(self) -> Moment:
        """Walk every list of the guest, and ask the host what it backs."""
        reporting, mem = self.mm.page_reporting, self.mem
        # Of what decides where a page is: much of what can happen changes nothing of it.
        arrays = (mem.mem_map, mem.zone, mem.pcp, mem.hstate, mem.pageblock, mem.compound_head, self.private)
        balloon = (int(mem.vm[0].nr_balloon_pages), int(mem.vm[0].nr_balloon_isolated))
        seen = (balloon, *(array.tobytes() for array in arrays))
        if seen != self.seen or self.before is None:
            pages = take_inventory(mem, self.private if self.private.any() else None)
            self.seen = seen
        else:
            pages = self.before.pages
        return Moment(
            pages,
            backed_pages(self.ram),
            counters_of(self.mem),
            (reporting.report_calls, reporting.failed_calls),
            self.mem.pageblock.copy(),
        )

    def check(self, step: str = "boot") -> None:
        """See that everything is as it must be after a step, and remember it for the next.

        Raises:
            Violated: something is not; with the page's history.
        """
        self.step = step
        try:
            self._check()
        except Violated as violated:
            violation = violated.violation
            if violation.pfn is None:
                raise
            raise Violated(violation.with_history(history_of(self.events, violation.pfn))) from None

    def _check(self) -> None:
        now = self.moment()
        self.turn += 1
        self.events.append((self.step, now))
        pages = now.pages
        self.claims_are_true(now)
        self.claims_have_reasons(pages)
        self.owners_read_theirs(now)
        self.free_pages_hold_their_promise(now)
        self.counters_are_right(now)
        if self.before is not None:
            # A gigantic page is made of a range that is isolated, in a fault too.
            isolates = self.isolates or self.gigantic != int(self.mem.hstate[1].nr_huge_pages)
            laws = Laws(self.before, now, self.host, isolates=isolates, unasked=self.unasked)
            laws.check(self.mem)
            if self.untouched:
                laws.untouched_pages_stay_absent(self.mem)
            self.rows.update(rows_of(self.before, now, laws.delta, self.host, self.step))
        self.host.reports.clear()
        self.host.granted = 0
        self.isolates = self.untouched = self.unasked = False
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
        for user in self.users:
            contents.user(user)
        for file in self.files:
            contents.file(file)
        for pfn, order, value in self.blocks:
            contents.block(pfn, order, value)
        for pfn, order in self.runs + self.cma:
            contents.block(pfn, order, 0x99)
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

    def counters_are_right(self, now: Moment) -> None:
        """Nothing bad was met, and accounts agree with what they count."""
        vm = self.mem.vm[0]
        if now.counters["nr_bad_pages"]:
            found("rot", "the guest has met a bad page", int(vm.bug_pfn))
        if int(vm.nr_poison_errors):
            found("rot", "the guest has found its poison overwritten")
        if now.counters["num_poisoned_pages"] != len(self.broken):
            found("rot", "the guest counts another number of broken pages than broke")
        if int(vm.nr_swap_pages) != np.count_nonzero(self.mem.swap_map == 0):
            found("rot", "nr_swap_pages does not match the slots in use")
        records = self.mem.mem_map[: self.pages]
        charged = np.flatnonzero(records["memcg_data"] == self.cgroup + 1)
        usage = int((1 << records["order"][charged].astype(np.int64)).sum()) if len(charged) else 0
        if usage * PAGE_SIZE != self.mm.memcg.usage_bytes(self.cgroup):
            found("rot", "a cgroup's usage is not what its pages are charged with")

    # The end, of everybody or of everything.

    def give_everything_back(self) -> None:
        """Have everybody give everything back, as far as that is theirs to do; the guest goes on."""
        self.mm.memcg.set_max(self.cgroup, None)
        for user in self.users:
            self.leave(user)
        for file in self.files:
            file.file.close()
        self.files.clear()
        self.give_blocks_back()
        self.give_runs_back(len(self.runs) + len(self.cma))
        for order in (9, GIGANTIC) if self.mm.config.gigantic_order else (9,):
            self.mm.hugetlb.set_nr_overcommit(0, order)
            self.mm.hugetlb.set_nr_hugepages(0, order)

    def close(self) -> None:
        """Have everybody give everything back, and see that nothing is missing.

        Raises:
            Violated: something is.
        """
        self.thorough = True
        self.host.faults.clear()
        self.host.lies.clear()
        self.host.silent = 0
        self.host.reorder = False
        self.isolates = True
        self.give_everything_back()
        self.plug(self.setup["features"])
        for pfn in list(self.broken):
            self.mm.memory_failure.unpoison_memory(pfn)
        self.broken.clear()
        self.mm.drain_all_pages()
        self.check("everything is given back")
        if self.mm.swap.used_bytes:
            found("rot", "the swap area holds pages of processes that have ended")
        if self.mm.vm_stats().free_pages != self.free:
            found("rot", "another number of pages is free than at the start, and all were given back")

    def drop(self) -> None:
        """Let the host have its memory back."""
        with suppress(HostzeroError, MmError):
            self.machine.device.reset()
        with suppress(HostzeroError):
            self.ram.discard(0, self.ram.size)
        self.ram.close()
