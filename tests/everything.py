# SPDX-License-Identifier: GPL-2.0-only
"""A machine with every feature at once, and a shadow of what its users must find in their memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hostzero import Machine
from hostzero.device import DeviceConfig
from hostzero.device.config import DEFAULT_FEATURES
from hostzero.errors import MmError, OutOfMemory
from hostzero.mm import MmConfig, Process
from hostzero.mm.cma import cma_release_frozen
from hostzero.mm.contig import free_contig_frozen_range
from hostzero.mm.hugetlbfs import HugetlbFile
from hostzero.mm.memory_failure import MF_RECOVERED
from hostzero.mm.mmzone import ZoneSpec
from hostzero.mm.page_flags import compound_head
from hostzero.mm.verify import verify_memory
from hostzero.ram import open_ram
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.features import Feature, QueueRole
from tests.mm.mappings import verify_mappings
from tests.scenarios import ownerless

T = TypeVar("T")

MIB = 1 << 20
SIZE = 32 * MIB
PAGES = SIZE // PAGE_SIZE
DIRT = 0x5A
GIGANTIC = 11
HUGE_PAGES = 512
FEATURES = DEFAULT_FEATURES | Feature.PAGE_POISON

Place = tuple[Any, int]
"""Whose memory, and the number of a page there: a process and its address, or a file and its offset."""


@dataclass
class Area:
    """A mapping, or what is left of one: pages `[start, end)`."""

    start: int
    end: int
    unit: int = 1  # pages that stay together
    file: HugetlbFile | None = None
    offset: int = 0  # of page `start` in the file
    shared: bool = False  # a file, perhaps without a name, keeps the contents


@dataclass
class User:
    """A process and what it has mapped."""

    process: Process
    number: int
    areas: list[Area] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)


def config_of(choice: dict[str, Any]) -> MmConfig:
    """Return a guest's configuration; `two_nodes`, `cma` and `gigantic` stand for sizes."""
    choice = dict(choice)
    half = PAGES // 2
    zones = (ZoneSpec("Normal", 0, half, 0), ZoneSpec("Normal", half, PAGES, 1))
    return MmConfig(
        zones=zones if choice.pop("two_nodes") else (),
        cma_pages=2560 if choice.pop("cma") else 0,
        gigantic_order=GIGANTIC if choice.pop("gigantic") else 0,
        **choice,
    )


class World:
    """One machine, its users and everybody else who holds pages, and what all of them must read."""

    def __init__(self, choice: dict[str, Any], features: Feature = FEATURES) -> None:
        """Boot on memory full of dirt."""
        self.ram = open_ram(SIZE)
        self.ram.array(np.uint8)[:] = DIRT
        device = DeviceConfig(features=features, queue_sizes={QueueRole.REPORTING: 2})
        self.machine = Machine(ram=self.ram, device=device, mm=config_of(choice))
        self.mm = self.machine.mm
        self.mem = self.mm.mem
        self.nr_nodes = int(self.mem.vm[0].nr_nodes)
        self.free = self.mm.vm_stats().free_pages
        self.shadow: dict[Place, bytes] = {}
        self.files: list[HugetlbFile] = []
        self.blocks: list[tuple[int, int]] = []  # of the kernel
        self.runs: list[tuple[int, int]] = []  # contiguous ones
        self.cma: list[tuple[int, int]] = []
        self.broken: list[int] = []
        self.faults: list[str] = []  # what the host's next discards do
        self.discard = self.machine.memory.discard
        self.machine.memory.discard = self.discard_or_not  # type: ignore[method-assign]
        self.cgroup = self.mm.memcg.create(None)
        self.users = [User(self.mm.spawn(), 0), User(self.mm.spawn(node=self.nr_nodes - 1), 1)]
        self.users[1].process.memcg = self.cgroup

    def discard_or_not(self, gpa: Gpa, length: int) -> bool:
        """Be a host whose backing fails at times, having dropped half of what was asked for."""
        fault = self.faults.pop() if self.faults else "none"
        if fault == "none":
            return self.discard(gpa, length)
        self.discard(gpa, length // 2 // PAGE_SIZE * PAGE_SIZE or PAGE_SIZE)
        if fault == "error":
            raise OSError("the backing is busy")
        return False

    # What users must read.

    def place(self, user: User, area: Area, page: int) -> Place:
        """Return whose page it is that a user has at a page number."""
        if area.file is not None:
            return area.file, area.offset + page - area.start
        return user.number, page

    def expected(self, user: User, area: Area, first: int, end: int) -> bytes:
        """Return what pages of an area must read as."""
        zero = bytes(PAGE_SIZE)
        return b"".join(self.shadow.get(self.place(user, area, page), zero) for page in range(first, end))

    def forget(self, user: User, area: Area, first: int, end: int) -> None:
        """Note that pages are gone from an address space; a file keeps its own."""
        user.lost -= set(range(first, end))
        if area.file is None:
            for page in range(first, end):
                self.shadow.pop((user.number, page), None)

    def forget_file(self, file: HugetlbFile, first: int, end: int) -> None:
        """Note that pages of a file have become holes."""
        for key in [key for key in self.shadow if key[0] is file and first <= key[1] < end]:
            del self.shadow[key]

    def compare(self, user: User, area: Area, first: int, end: int) -> None:
        """Read pages and compare them, or see that the lost ones among them cannot be read."""
        if any(first <= page < end for page in user.lost):
            with suppress(MmError):
                user.process.read(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
                raise AssertionError("a lost page can be read")
            return
        found = user.process.read(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
        assert found == self.expected(user, area, first, end)

    def unmap(self, user: User, area: Area, first: int, end: int) -> None:
        """Unmap pages of an area and cut the area."""
        self.with_room(lambda: user.process.munmap(first * PAGE_SIZE, (end - first) * PAGE_SIZE))
        self.forget(user, area, first, end)
        user.areas.remove(area)
        for low, high in ((area.start, first), (end, area.end)):
            if low < high:
                offset = area.offset + low - area.start
                user.areas.append(Area(low, high, area.unit, area.file, offset, area.shared))

    def leave(self, user: User) -> None:
        """End a process."""
        user.process.exit()
        for area in user.areas:
            self.forget(user, area, area.start, area.end)
        user.areas.clear()
        assert not user.lost

    # Other owners.

    def bytes_of(self, pfn: int, order: int) -> NDArray[np.uint8]:
        """Return a writable view of a block."""
        view: NDArray[np.uint8] = self.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE]
        return view

    def mapped_at(self, pfn: int) -> tuple[User, int] | None:
        """Return the user and the page number at which an anonymous page is mapped."""
        head = int(compound_head(self.mem, pfn))
        record = self.mem.mem_map[head]
        if not record.mapping or record.page_type or int(self.mem.mem_map[pfn].flags_f) >> 22 & 1:
            return None
        for user in self.users:
            if user.process._mm_id == record.mapping:
                return user, int(record.index) + pfn - head
        return None

    def break_page(self, pfn: int) -> None:
        """Have the hardware report a page."""
        if pfn in self.broken:
            return
        at = self.mapped_at(pfn)
        refs = int(self.mem.mem_map[int(compound_head(self.mem, pfn))]._refcount)
        result = self.mm.memory_failure.memory_failure(pfn)
        self.broken.append(pfn)
        if at is not None and refs and result == MF_RECOVERED:
            user, page = at
            user.lost.add(page)
            self.shadow.pop((user.number, page), None)

    def repair(self, pfn: int) -> None:
        """Take a broken page back into use."""
        assert self.mm.memory_failure.unpoison_memory(pfn)
        self.broken.remove(pfn)

    def hibernate(self) -> None:
        """Come back from an image: free memory holds what the loader left there."""
        self.machine.driver.freeze()
        for pfn, order in list(ownerless(self.machine)):
            self.bytes_of(pfn, order)[:] = 0xC3
        self.machine.driver.restore(hibernated=True)

    # Checks.

    def check(self) -> None:
        """Walk every list, counter and mapping, and read every claim."""
        verify_memory(self.mem)
        stats = self.mm.vm_stats()
        assert (stats.bad_pages, stats.poison_errors) == (0, 0)
        assert self.mm.memory_failure.num_poisoned_pages == len(self.broken)
        assert self.mem.cc[0].active == 0
        assert int(self.mem.vm[0].nr_balloon_isolated) == 0
        if not any(area.unit > 1 for user in self.users for area in user.areas):
            verify_mappings(self.mm, [user.process for user in self.users])

    def close(self) -> None:
        """Give everything back and see that nothing is missing."""
        self.faults.clear()
        self.mm.memcg.set_max(self.cgroup, None)
        for user in self.users:
            self.leave(user)
        for file in self.files:
            file.close()
        for pfn, order in self.blocks:
            self.mm.free_pages(pfn, order)  # type: ignore[arg-type]
        self.give_runs_back(len(self.runs) + len(self.cma))
        for order in (9, GIGANTIC) if self.mm.config.gigantic_order else (9,):
            self.mm.hugetlb.set_nr_overcommit(0, order)
            assert self.mm.hugetlb.set_nr_hugepages(0, order) == 0
        assert self.machine.balloon(0) == 0
        for pfn in list(self.broken):
            self.repair(pfn)
        self.check()
        self.mm.drain_all_pages()
        assert self.mm.vm_stats().free_pages == self.free
        assert self.mm.swap.used_bytes == 0
        assert self.mm.memcg.usage_bytes(self.cgroup) == 0
        self.machine.close()
        self.ram.close()

    def with_room(self, call: Callable[[], T]) -> T:
        """Make a call that may need a page for a table; if there is none, others give theirs back."""
        try:
            return call()
        except OutOfMemory:
            self.give_runs_back(len(self.runs) + len(self.cma))
            self.machine.balloon(0)
            return call()

    def give_runs_back(self, count: int) -> None:
        """Free the oldest runs."""
        for _ in range(count):
            if self.runs:
                free_contig_frozen_range(self.mm, *self.runs.pop(0))
            elif self.cma:
                assert cma_release_frozen(self.mm, *self.cma.pop(0))
