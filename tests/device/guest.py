# SPDX-License-Identifier: GPL-2.0-only
"""A guest written by hand in front of the device, and guest memories that misbehave.

`Guest` starts a device like a driver, writes requests into rings with `MockGuest` and compares
all of memory before and after each of them. It trusts nothing that the device says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.errors import RangeError
from hostzero.ram import GuestMemory, MemoryRegion, Ram, open_ram
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.virtio.balloon import bitmap_bytes, bitmap_test_le
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.mock import MockGuest
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE, RingLayout, ring_bytes
from hostzero.virtio.transport import Status

RAM_BYTES = 4 * PMD_SIZE
RAM_PAGES = RAM_BYTES // PAGE_SIZE

# The last 2 MiB hold what the guest itself needs; everything below is free for requests.
DATA_PAGES = 3 * 512
RING_PAGES = {
    role: range(first, first + 8)
    for role, first in zip(QueueRole, range(DATA_PAGES, DATA_PAGES + 40, 8), strict=True)
}
PFNS_AT = (DATA_PAGES + 64) * PAGE_SIZE
BITMAP_AT = (DATA_PAGES + 72) * PAGE_SIZE
SCRATCH_AT = (DATA_PAGES + 80) * PAGE_SIZE

FILL = 0xA5
ALL_FEATURES = DeviceConfig().features | Feature.MUST_TELL_HOST | Feature.PAGE_POISON
STARTING = int(Status.ACKNOWLEDGE | Status.DRIVER)
FEATURES_OK = STARTING | int(Status.FEATURES_OK)
DRIVER_OK = FEATURES_OK | int(Status.DRIVER_OK)

Segments = Sequence[tuple[int, int]]


class WrappedMemory(GuestMemory):
    """Guest memory at address 0 that records its discards."""

    def __init__(self, ram: Ram) -> None:
        super().__init__([MemoryRegion(Gpa(0), ram, 0, ram.size)])
        self.discards: list[tuple[int, int]] = []

    def discard(self, gpa: Gpa, length: int) -> bool:
        self.discards.append((gpa, length))
        return super().discard(gpa, length)


class FailingMemory(WrappedMemory):
    """Memory of which some pages cannot be dropped.

    A range with a bad page in it is dropped up to that page, and then the discard fails: with
    an OSError, a RamError, or by proving nothing.
    """

    def __init__(self, ram: Ram, bad: Callable[[int], bool], failure: Exception | None = None) -> None:
        super().__init__(ram)
        self.bad = bad
        self.failure = failure

    def discard(self, gpa: Gpa, length: int) -> bool:
        pages = range(gpa // PAGE_SIZE, (gpa + length) // PAGE_SIZE)
        good = next((n for n, pfn in enumerate(pages) if self.bad(pfn)), len(pages))
        if good == len(pages):
            return super().discard(gpa, length)
        self.discards.append((gpa, length))
        if good:
            GuestMemory.discard(self, gpa, good * PAGE_SIZE)
        if self.failure is not None:
            raise self.failure
        return False


class HugeMemory(WrappedMemory):
    """Memory that pretends to be on pages of 2 MiB and drops nothing smaller."""

    def page_size(self, gpa: Gpa) -> int:
        super().page_size(gpa)
        return PMD_SIZE

    def discard(self, gpa: Gpa, length: int) -> bool:
        if gpa % PMD_SIZE or length % PMD_SIZE or not length:
            raise RangeError(f"{length} bytes at {gpa:#x} are not whole pages of 2 MiB")
        return super().discard(gpa, length)


class Answer(NamedTuple):
    """What came back for one request."""

    used_len: int
    bitmap: bytes

    def claimed(self, pfns: Sequence[int]) -> set[int]:
        """Return the PFNs that the bitmap claims, read as the kernel reads it."""
        limit = self.used_len * 8
        return {pfn for n, pfn in enumerate(pfns) if n < limit and bitmap_test_le(self.bitmap, n)}


class Guest:
    """One guest with a started device; every page below `DATA_PAGES` is full of `FILL`."""

    def __init__(
        self,
        memory: GuestMemory,
        offered: Feature = ALL_FEATURES,
        accepted: Feature | None = None,
        *,
        discard_hints: bool = False,
    ) -> None:
        self.memory = memory
        self.device = BalloonDevice(memory, DeviceConfig(features=offered, discard_hints=discard_hints))
        self.bytes: NDArray[np.uint8] = memory.regions[0].ram.array(np.uint8)
        self.rings: dict[QueueRole, MockGuest] = {}
        self.indices: dict[QueueRole, int] = {}
        self.interrupts: dict[QueueRole, int] = dict.fromkeys(QueueRole, 0)
        self.config_changes = 0
        self.on_interrupt: Callable[[QueueRole], None] = lambda role: None
        self.device.on_config_change(self._on_config_change)
        self.accepted = (offered if accepted is None else accepted) | Feature.VERSION_1
        self.fill()
        self.start()

    def _on_config_change(self) -> None:
        self.config_changes += 1

    def fill(self) -> None:
        """Fill every page that a request may name with a value that is not zero."""
        self.bytes[: DATA_PAGES * PAGE_SIZE] = FILL

    def negotiate(self) -> None:
        """Go up to FEATURES_OK."""
        self.device.set_status(STARTING)
        self.device.set_driver_features(int(self.accepted))
        self.device.set_status(STARTING | Status.FEATURES_OK)
        assert self.device.status() == STARTING | Status.FEATURES_OK

    def setup(self) -> None:
        """Set up every queue of the accepted features."""
        roles = queue_roles(self.accepted)
        self.indices = {role: index for index, role in enumerate(roles)}
        for role, index in self.indices.items():
            size = self.device.queue_size_max(index)
            layout = RingLayout.contiguous(self.memory, size, Gpa(RING_PAGES[role][0] * PAGE_SIZE))
            self.rings[role] = MockGuest(self.memory, layout)
            self.device.setup_queue(index, layout, lambda role=role: self._on_interrupt(role))  # type: ignore[misc]

    def _on_interrupt(self, role: QueueRole) -> None:
        self.interrupts[role] += 1
        self.on_interrupt(role)

    def start(self) -> None:
        """Bring the device to DRIVER_OK."""
        self.negotiate()
        self.setup()
        self.go()

    def go(self) -> None:
        """Set DRIVER_OK."""
        self.device.set_status(STARTING | Status.FEATURES_OK | Status.DRIVER_OK)

    def put(self, role: QueueRole, readable: Segments = (), writable: Segments = (), first: int = 0) -> int:
        """Write a request into the ring without notifying the device; return its head."""
        ring = self.rings[role]
        descriptors = [(gpa, length, 0) for gpa, length in readable]
        descriptors += [(gpa, length, VIRTQ_DESC_F_WRITE) for gpa, length in writable]
        head = ring.chain(descriptors, first)
        ring.offer(head)
        return head

    def kick(self, role: QueueRole) -> None:
        """Notify the device of a queue, asking for every interrupt."""
        self.rings[role].set_used_event(self.rings[role].used_idx)
        self.device.notify(self.indices[role])

    def send(self, role: QueueRole, readable: Segments = (), writable: Segments = ()) -> int:
        """Send one request and return its used length; it has to come back exactly once."""
        head = self.put(role, readable, writable)
        self.kick(role)
        ((returned, used_len),) = self.rings[role].returned()
        assert returned == head
        return used_len

    def write_pfns(self, pfns: Sequence[int], at: int = PFNS_AT) -> tuple[int, int]:
        """Write a PFN array into guest memory and return its segment."""
        data = np.array(pfns, dtype="<u4").tobytes()
        self.memory.write(Gpa(at), data)
        return at, len(data)

    def inflate(self, pfns: Sequence[int], bitmap: Segments | None = None, at: int = PFNS_AT) -> Answer:
        """Inflate and check that claims are zero and that nothing else was written.

        The bitmap buffer is full of ones beforehand, and of the right length unless given.
        """
        array = self.write_pfns(pfns, at)
        segments = [(BITMAP_AT, bitmap_bytes(len(pfns)))] if bitmap is None else list(bitmap)
        for gpa, length in segments:
            self.memory.write(Gpa(gpa), b"\xff" * length)
        with self.unchanged(except_pages=self.touchable(pfns), except_bytes=segments):
            used_len = self.send(QueueRole.INFLATE, [array], segments)
        data = b"".join(self.memory.read(Gpa(gpa), length) for gpa, length in segments)
        answer = Answer(used_len, data)
        for pfn in answer.claimed(pfns):
            assert self.is_zero(pfn), f"page {pfn} is claimed and not zero"
        return answer

    def touchable(self, pfns: Sequence[int]) -> set[int]:
        """Return the pages that an inflate of `pfns` may change."""
        if not isinstance(self.memory, HugeMemory):
            return set(pfns)
        # A host page that this request completes goes as a whole.
        return {page for pfn in pfns for page in range(pfn - pfn % 512, pfn - pfn % 512 + 512)}

    def deflate(self, pfns: Sequence[int]) -> int:
        """Deflate and check that no byte of a page changed."""
        array = self.write_pfns(pfns)
        with self.unchanged():
            return self.send(QueueRole.DEFLATE, [array])

    def report(self, *segments: tuple[int, int]) -> int:
        """Report (first page, pages) ranges as one buffer and check that a claim is true."""
        named = {page for first, pages in segments for page in range(first, first + pages)}
        with self.unchanged(except_pages=named):
            used_len = self.send(
                QueueRole.REPORTING, (), [(first * PAGE_SIZE, pages * PAGE_SIZE) for first, pages in segments]
            )
        if used_len:
            assert used_len == sum(pages for _, pages in segments) * PAGE_SIZE
            assert all(self.is_zero(page) for page in named)
        return used_len

    def is_zero(self, pfn: int) -> bool:
        """Return whether a page reads as zero."""
        return not self.bytes[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE].any()

    def zero_pages(self) -> set[int]:
        """Return the pages below `DATA_PAGES` that read as zero."""
        pages = self.bytes[: DATA_PAGES * PAGE_SIZE].reshape(DATA_PAGES, PAGE_SIZE)
        return set(np.flatnonzero(~pages.any(axis=1)).tolist())

    @contextmanager
    def unchanged(self, except_pages: set[int] = frozenset(), except_bytes: Segments = ()) -> Iterator[None]:  # type: ignore[assignment]
        """Check that no byte but those of the exceptions and of the rings changes inside."""
        words = self.bytes.view(np.uint64)
        before = words.copy()
        yield
        changed = np.flatnonzero(before != words) * 8
        changed = changed[~np.isin(changed // PAGE_SIZE, list(except_pages))]
        # Byte by byte only where something changed; the guest itself writes its rings inside.
        rings = [
            part
            for ring in self.rings.values()
            for part in zip(
                (ring.layout.desc, ring.layout.avail, ring.layout.used),
                ring_bytes(ring.layout.size),
                strict=True,
            )
        ]
        allowed = [*except_bytes, *rings]
        was = before.view(np.uint8)
        for start in changed.tolist():
            for byte in range(start, start + 8):
                inside = any(gpa <= byte < gpa + length for gpa, length in allowed)
                assert inside or was[byte] == self.bytes[byte], f"byte {byte:#x} was changed"


@contextmanager
def ram_of(backing: str = "anonymous") -> Iterator[Ram]:
    """Open guest RAM of `RAM_BYTES`."""
    with open_ram(RAM_BYTES, backing) as ram:
        yield ram


def layout_on(
    device: BalloonDevice, size: int = 8, page: int = RING_PAGES[QueueRole.INFLATE][0]
) -> RingLayout:
    """Return a ring at a page of the device's guest memory."""
    return RingLayout.contiguous(device._state.discarder.memory, size, Gpa(page * PAGE_SIZE))


def ignore() -> None:
    """Be an interrupt that nobody waits for."""
