# SPDX-License-Identifier: GPL-2.0-only
"""A small memory manager and a scripted device, both over real bytes.

`FakeMm` has the surface of `hostzero.mm.MemoryManager` that the driver uses. Every page that is
given up as known zero is read: one that holds anything else is a `false claim`.

`FakeDevice` is a device whose answers a test writes. It reads and writes the rings byte by byte
and checks nothing, so it can lie about everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hostzero.clock import Clock
from hostzero.driver.guest_mm import Mask, Pfns
from hostzero.errors import DriverError, HostzeroError, OutOfMemory
from hostzero.mm.gfp import GFP_ZERO
from hostzero.mm.page_reporting import PAGE_REPORTING_CAPACITY, PageReportingDevInfo
from hostzero.ram import GuestMemory, Ram
from hostzero.units import PAGE_SIZE, Gpa, Pfn
from hostzero.virtio import (
    BalloonConfig,
    Feature,
    MockDevice,
    QueueRole,
    RingLayout,
    Segment,
    Status,
    bitmap_bytes,
    mask_to_bitmap,
    queue_roles,
    unpack_pfns,
)

ALL_FEATURES = (
    Feature.STATS_VQ
    | Feature.DEFLATE_ON_OOM
    | Feature.FREE_PAGE_HINT
    | Feature.PAGE_POISON
    | Feature.REPORTING
    | Feature.DEVICE_INIT_REPORTED
    | Feature.DEVICE_INIT_ON_INFLATE
    | Feature.VERSION_1
)

DIRT = 0xA5
"""What the free memory of a fresh `FakeMm` holds, so that nothing is zero by accident."""


@dataclass
class FakeConfig:
    init_on_free: bool = False
    page_poisoning: bool = False
    confidential: bool = False


@dataclass(frozen=True)
class FakeStats:
    free_pages: int = 10
    available_pages: int = 11
    total_pages: int = 12
    pgfault: int = 13
    allocstall: int = 14
    oom_kill: int = 15
    pgmajfault: int = 16
    pswpin: int = 17
    pswpout: int = 18


class FakeBalloon:
    """The balloon's list; a page's mark survives until it is released."""

    def __init__(self, mm: FakeMm) -> None:
        self._mm = mm
        self.pages: list[int] = []
        self.zeroed: set[int] = set()
        self.migratepage: Callable[[Pfn, Pfn], bool] | None = None

    @property
    def count(self) -> int:
        return len(self.pages)

    def enqueue(self, pfns: Pfns) -> None:
        assert not self._mm.free[pfns].any(), "only allocated pages go into the balloon"
        self.pages.extend(pfns.tolist())

    def dequeue(self, count: int) -> Pfns:
        taken = [self.pages.pop() for _ in range(min(count, len(self.pages)))]
        return np.array(taken, dtype=np.int64)

    def set_zeroed(self, pfns: Pfns, mask: Mask) -> None:
        assert mask.shape == pfns.shape
        self.zeroed.update(pfns[mask].tolist())

    def register_migratepage(self, callback: Callable[[Pfn, Pfn], bool]) -> Callable[[], None]:
        assert self.migratepage is None, "there is one driver at a time"
        self.migratepage = callback

        def unregister() -> None:
            self.migratepage = None

        return unregister

    def release(self, pfns: Pfns) -> None:
        for pfn in pfns.tolist():
            assert pfn not in self.pages, "a page is released after it left the balloon"
            self._mm.give_back(pfn, 1, zeroed=pfn in self.zeroed)
            self.zeroed.discard(pfn)


class FakePageReporting:
    """Holds the one device and passes it batches that a test chooses."""

    def __init__(self, mm: FakeMm) -> None:
        self._mm = mm
        self.dev: PageReportingDevInfo | None = None

    def register(self, dev: PageReportingDevInfo) -> None:
        if self.dev is not None:
            raise DriverError("a reporting device is registered already")
        if not 0 < dev.capacity <= PAGE_REPORTING_CAPACITY:
            dev.capacity = PAGE_REPORTING_CAPACITY
        self.dev = dev

    def unregister(self, dev: PageReportingDevInfo) -> None:
        assert self.dev is dev
        self.dev = None

    def report(self, entries: Sequence[tuple[int, int]]) -> list[bool]:
        """Report blocks and return what the driver says of each; marks those pages known zero."""
        assert self.dev is not None
        self.dev.report([(Pfn(pfn), order) for pfn, order in entries])
        answers = [bool(bit) for bit in self.dev.zeroed_bitmap[: len(entries)]]
        if self.dev.host_zeroes_pages:
            for (pfn, order), zeroed in zip(entries, answers, strict=True):
                if zeroed:
                    self._mm.claim_zero(pfn, 1 << order)
        return answers


class FakeMm:
    """All of guest RAM in single pages: free or not, and known to be zero or not."""

    def __init__(self, ram: Ram, config: FakeConfig | None = None) -> None:
        self.config = config or FakeConfig()
        self.clock = Clock()
        self.nr_pages = ram.size // PAGE_SIZE
        self.ram = ram
        self.free: NDArray[np.bool_] = np.ones(self.nr_pages, dtype=np.bool_)
        self.known_zero: NDArray[np.bool_] = np.zeros(self.nr_pages, dtype=np.bool_)
        self.false_claims: list[int] = []
        self.managed = self.nr_pages
        self.balloon = FakeBalloon(self)
        self.page_reporting = FakePageReporting(self)
        self.oom_notifiers: list[Callable[[], int]] = []
        self.forgot_claims_with_free: int | None = None
        self._order = np.random.default_rng(37)
        self.alloc_log: list[tuple[int, int]] = []
        self._pages: NDArray[np.uint8] = ram.array(np.uint8).reshape(self.nr_pages, PAGE_SIZE)
        self._pages[:] = DIRT

    @property
    def nr_free(self) -> int:
        return int(self.free.sum())

    def page(self, pfn: int) -> NDArray[np.uint8]:
        """One page's bytes, shape (4096,), writable."""
        page: NDArray[np.uint8] = self._pages[pfn]
        return page

    def take_all_but(self, pages: int) -> None:
        """Allocate everything except the highest `pages` free pages."""
        taken = np.flatnonzero(self.free)[: max(0, self.nr_free - pages)]
        self.free[taken] = False

    def alloc_pages(self, gfp: int, order: int = 0) -> Pfn:
        self.alloc_log.append((gfp, order))
        blocks = self.free.reshape(-1, 1 << order).all(axis=1)
        if not blocks.any():
            raise OutOfMemory(f"no free block of order {order}")
        pfn = int(np.argmax(blocks)) << order
        self._take(np.arange(pfn, pfn + (1 << order)), gfp)
        return Pfn(pfn)

    def alloc_pages_bulk(self, gfp: int, count: int) -> Pfns:
        self.alloc_log.append((gfp, 0))
        # In no order: the position in a request must not agree with the PFN by accident.
        pfns = self._order.permutation(np.flatnonzero(self.free))[:count].astype(np.int64)
        self._take(pfns, gfp)
        return pfns

    def free_pages(self, pfn: Pfn, order: int = 0) -> None:
        self.give_back(pfn, 1 << order, zeroed=False)

    def adjust_managed_page_count(self, pages: int) -> None:
        self.managed += pages

    def register_oom_notifier(self, callback: Callable[[], int]) -> Callable[[], None]:
        self.oom_notifiers.append(callback)
        return lambda: self.oom_notifiers.remove(callback)

    def vm_stats(self) -> FakeStats:
        return FakeStats(free_pages=self.nr_free)

    def forget_zero_claims(self) -> None:
        self.forgot_claims_with_free = self.nr_free
        self.known_zero[:] = False

    def claim_zero(self, pfn: int, count: int) -> None:
        """Mark pages as known zero, after looking whether they are."""
        self.known_zero[pfn : pfn + count] = True
        self.false_claims.extend(page for page in range(pfn, pfn + count) if self._pages[page].any())

    def give_back(self, pfn: int, count: int, *, zeroed: bool) -> None:
        """Free pages, which must not be free already."""
        assert not self.free[pfn : pfn + count].any(), "freed twice"
        self.free[pfn : pfn + count] = True
        self.known_zero[pfn : pfn + count] = False
        if zeroed:
            self.claim_zero(pfn, count)

    def _take(self, pfns: NDArray[np.integer], gfp: int) -> None:
        self.free[pfns] = False
        if gfp & GFP_ZERO:
            self._pages[pfns[~self.known_zero[pfns]]] = 0
        self.known_zero[pfns] = False


class Request(NamedTuple):
    """One chain as the device found it."""

    role: QueueRole
    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]
    data: bytes

    @property
    def pfns(self) -> list[int]:
        return [int(pfn) for pfn in unpack_pfns(self.data)]


Answer = Callable[[Request], int | None]
"""Returns the used length to write, or None to keep the buffer."""


@dataclass
class FakeDevice:
    """A transport whose device does what `answer` says; the default is an honest device."""

    memory: GuestMemory
    features: int = int(ALL_FEATURES)
    sizes: dict[QueueRole, int] = field(default_factory=dict)
    config: BalloonConfig = field(default_factory=BalloonConfig)
    answer: Answer | None = None
    # Faults of the transport itself.
    refuse_features: bool = False
    never_resets: bool = False
    config_cut: int = 4
    before_notify: Callable[[int], None] | None = None
    raw_queue: Callable[[FakeDevice, QueueRole], bool] | None = None

    def __post_init__(self) -> None:
        self.acked = Feature(0)
        self.log: list[str] = []
        self.requests: list[Request] = []
        self.kept: list[Request] = []
        self.rings: dict[int, MockDevice] = {}
        self.statuses: list[int] = []
        self._status = 0
        self._interrupts: dict[int, Callable[[], None]] = {}
        self._callbacks: list[Callable[[], None]] = []

    # The transport.

    def device_features(self) -> int:
        return self.features

    def set_driver_features(self, features: int) -> None:
        self.acked = Feature(features)

    def status(self) -> int:
        return self._status

    def set_status(self, status: int) -> None:
        self.statuses.append(status)
        self.log.append(f"status {status:#x}")
        if status == 0:
            self.rings.clear()
            self._interrupts.clear()
            self.kept.clear()
            self.config = self.config._replace(actual=0, poison_val=0)
            if self.never_resets:
                return
        if self.refuse_features:
            status &= ~Status.FEATURES_OK
        self._status = int(status)

    def read_config(self, offset: int, length: int) -> bytes:
        return self.config.pack()[offset : offset + min(length, self.config_cut)]

    def write_config(self, offset: int, data: bytes) -> None:
        names = {4: "actual", 12: "poison_val"}
        assert len(data) == 4
        self.log.append(f"write {names[offset]} {int.from_bytes(data, 'little'):#x}")
        self.config = self.config._replace(**{names[offset]: int.from_bytes(data, "little")})

    def queue_size_max(self, index: int) -> int:
        roles = queue_roles(self.acked)
        # The sizes of QEMU, so that one ring is more than a page.
        usual = {QueueRole.FREE_PAGE: 1024, QueueRole.REPORTING: 32}
        role = roles[index] if index < len(roles) else None
        return self.sizes.get(role, usual.get(role, 128)) if role is not None else 0

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        self.log.append(f"setup {index}")
        self.rings[index] = MockDevice(self.memory, layout)
        self._interrupts[index] = interrupt

    def notify(self, index: int) -> None:
        assert self._status & Status.DRIVER_OK, "a driver must not notify before DRIVER_OK"
        self.log.append(f"notify {index}")
        if self.before_notify is not None:
            self.before_notify(index)
        role = queue_roles(self.acked)[index]
        ring = self.rings.get(index)
        if ring is None or (self.raw_queue is not None and self.raw_queue(self, role)):
            return
        for head in ring.offered():
            request = self.read_request(role, head)
            self.requests.append(request)
            used_len = (self.answer or self.honest)(request)
            if used_len is None:
                self.kept.append(request)
            else:
                ring.give_back((head, used_len))
        if Feature.RING_EVENT_IDX in self.acked:
            ring.set_avail_event(ring.avail_idx)
        if index in self._interrupts:
            self._interrupts[index]()

    def on_config_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    # What a test does with it.

    def set_target(self, pages: int) -> None:
        self.change(num_pages=pages)

    def change(self, **fields: int) -> None:
        """Change the configuration space and interrupt for it."""
        self.config = self.config._replace(**fields)
        for callback in self._callbacks:
            callback()

    def needs_reset(self) -> None:
        self._status |= Status.NEEDS_RESET
        self.change()

    def ring(self, role: QueueRole) -> MockDevice:
        return self.rings[queue_roles(self.acked).index(role)]

    def interrupt(self, role: QueueRole) -> None:
        self._interrupts[queue_roles(self.acked).index(role)]()

    def return_kept(self, role: QueueRole, used_len: int = 0) -> int:
        """Give back every buffer of a queue that was kept, then interrupt; return how many."""
        kept = [request for request in self.kept if request.role is role]
        self.kept = [request for request in self.kept if request.role is not role]
        self.ring(role).give_back(*((request.head, used_len) for request in kept))
        self.interrupt(role)
        return len(kept)

    def of(self, role: QueueRole) -> list[Request]:
        """The requests of one queue, in order."""
        return [request for request in self.requests if request.role is role]

    def read_request(self, role: QueueRole, head: int) -> Request:
        ring = self.ring(role)
        readable: list[Segment] = []
        writable: list[Segment] = []
        at = head
        while True:
            addr, length, flags, following = ring.descriptor(at)
            assert not flags & 4, "the driver must not use indirect descriptors"
            (writable if flags & 2 else readable).append(Segment(Gpa(addr), length))
            if not flags & 1:
                break
            at = following
        data = b"".join(self.memory.read(gpa, length) for gpa, length in readable)
        return Request(role, head, tuple(readable), tuple(writable), data)

    def honest(self, request: Request) -> int | None:
        """Do what a device that keeps bits 6 and 7 does."""
        if request.role is QueueRole.STATS:
            return None
        if request.role is QueueRole.REPORTING:
            done = all(self.memory.discard(gpa, length) for gpa, length in request.writable)
            offered = Feature.DEVICE_INIT_REPORTED in self.acked
            return sum(length for _, length in request.writable) if done and offered else 0
        if request.role is QueueRole.INFLATE:
            return self.discard_pfns(request, request.pfns)
        return 0

    def discard_pfns(self, request: Request, zero: Sequence[int]) -> int:
        """Discard the pages of an inflate request that are in `zero`; return the used length."""
        mask = np.array([pfn in set(zero) for pfn in request.pfns], dtype=np.bool_)
        for pfn in zero:
            with contextlib.suppress(HostzeroError):
                self.memory.discard(Gpa(pfn * PAGE_SIZE), PAGE_SIZE)
        return self.write_bitmap(request, mask_to_bitmap(mask)) if request.writable else 0

    def write_bitmap(self, request: Request, bitmap: bytes) -> int:
        """Write an inflate request's bitmap and return the used length of an honest device."""
        (segment,) = request.writable
        assert segment.length == bitmap_bytes(len(request.pfns))
        self.memory.write(segment.gpa, bitmap)
        return segment.length
