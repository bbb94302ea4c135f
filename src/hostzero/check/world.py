# SPDX-License-Identifier: GPL-2.0-only
"""A machine with every feature at once, its users and its host: who owns which pages, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from hostzero.check.host import Host
from hostzero.check.inventory import found
from hostzero.check.laws import Moment
from hostzero.check.oracle import Oracle
from hostzero.check.users import Area, File, User
from hostzero.check.world_setup import GIGANTIC, boot, checked, device_config
from hostzero.device import BalloonDevice
from hostzero.driver import State, VirtioBalloon
from hostzero.errors import DriverError, HostzeroError, MmError, OutOfMemory
from hostzero.mm.cma import cma_release_frozen
from hostzero.mm.contig import free_contig_frozen_range
from hostzero.mm.mmap import MADV_DONTNEED
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison, PG_private, PG_referenced, PG_uptodate
from hostzero.mm.page_free import __free_contig_range as free_contig_range
from hostzero.units import PAGE_SIZE, Pfn

T = TypeVar("T")

MOST_MOVED: Final = 600
"""How many folios may be in the way of a gigantic page that is asked for."""

OWNERS_FLAGS: Final = PG_private | PG_uptodate | PG_dirty | PG_referenced
"""What an owner may use for itself; two of them mean something else on a free list."""


class World:
    """One machine, its users and everybody else who holds pages, and what all of them must read.

    Attributes:
        machine: the machine; its driver and device change when the device is plugged in anew.
        host: what the host has shown, and how it fails.
        users: the processes.
        blocks: blocks of the kernel: page, order, the byte they are full of.
        private: pages whose owner uses flags of theirs for itself.
        rows: which rows of the lifecycle table were exercised.
        isolates: the operation takes blocks off the lists, and it is not known which.
        isolated: it does so with the pages from one to before the other.
        unasked: the operation asks for no memory that is zero.
        untouched: the operation gives processes pages of their own without writing or copying anything.
        touches: the operation writes at most one byte of a page, and not into its first word.
    """

    def __init__(self, setup: dict[str, Any], *, thorough: bool = True) -> None:
        """Boot on memory full of dirt; read every page after every step only if `thorough`."""
        self.unasked = False
        self.setup = setup = checked(setup)
        self.ram, self.machine, self.rest = boot(setup)
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
        self.ranges: list[tuple[int, int]] = []
        self.private = np.zeros(self.pages, dtype=np.bool_)
        self.rows: Counter[str] = Counter()
        self.step = "boot"
        self.isolates = False
        self.isolated = (0, 0)
        self.untouched = self.touches = False
        self.cgroup = self.mm.memcg.create(None)
        self.users = [User(self.mm.spawn(), 0), User(self.mm.spawn(node=self.nr_nodes - 1), 1)]
        self.users[1].process.memcg = self.cgroup
        self.oracle = Oracle(self, thorough=thorough)
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
        for give in (
            self.give_to_tables,
            self.give_blocks_back,
            partial(self.end_other, user),
            partial(self.drop_pages, user),
        ):
            try:
                return call()
            except OutOfMemory:
                give()
        return call()

    def give_to_tables(self) -> None:
        """Free the runs and empty the balloon."""
        self.give_runs_back(len(self.runs) + len(self.cma) + len(self.ranges))
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

    def drop_pages(self, user: User | None) -> None:
        """Have a process that has all memory drop a few pages of its own, where they are small ones."""
        if user is None:
            return
        for area in user.areas:
            for page in (area.start, area.end - 1) if area.unit == 1 else ():
                with suppress(OutOfMemory):
                    user.process.madvise(page * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
                    user.lost.discard(page)
                    area.dropped(page, page + 1)

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

    @property
    def crowded(self) -> bool:
        """Whether a large range would have to be emptied of very many folios first, one by one."""
        return bool(np.count_nonzero(self.mem.mem_map["mapping"][: self.pages]) > MOST_MOVED)

    # Other owners.

    def bytes_of(self, pfn: int, order: int) -> NDArray[np.uint8]:
        """Return a writable view of a block."""
        view: NDArray[np.uint8] = self.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE]
        return view

    def taken(self, pfn: int, order: int, *, zeroed: bool, fill: int | None) -> None:
        """Note that somebody was given a block; see that it is zero if that was asked for, and write it."""
        self.given(pfn, 1 << order, zeroed=zeroed, fill=fill)

    def given(self, pfn: int, pages: int, *, zeroed: bool, fill: int | None) -> None:
        """Note the same of a range of pages."""
        self.host.owned(pfn, pages)
        content = self.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + pages) * PAGE_SIZE]
        order = pages.bit_length() - 1
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
        flags = self.mem.mem_map["flags_f"][pfn : pfn + pages]
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
            elif self.ranges:
                self.give_range_back(*self.ranges.pop(0))

    def give_range_back(self, pfn: int, pages: int) -> None:
        """Free a range page by page."""
        free_contig_range(self.mem, pfn, pages, True, 0)

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
                area.dropped(page, page + 1)

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

    @property
    def before(self) -> Moment | None:
        """What was seen after the last step; None before the first look."""
        return self.oracle.before

    def check(self, step: str = "boot") -> None:
        """See that everything is as it must be after a step, and remember it for the next.

        Raises:
            Violated: something is not; with the page's history.
        """
        self.oracle.check(step)

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
        self.give_runs_back(len(self.runs) + len(self.cma) + len(self.ranges))
        for order in (9, GIGANTIC) if self.mm.config.gigantic_order else (9,):
            self.mm.hugetlb.set_nr_overcommit(0, order)
            self.mm.hugetlb.set_nr_hugepages(0, order)

    def close(self) -> None:
        """Have everybody give everything back, and see that nothing is missing.

        Raises:
            Violated: something is.
        """
        self.oracle.thorough = True
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
