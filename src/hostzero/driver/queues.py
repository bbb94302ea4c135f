# SPDX-License-Identifier: GPL-2.0-only
"""The balloon's virtqueues: their rings in guest pages, their numbers, and waiting for an answer.

Queues are numbered densely over the features that were acknowledged (kernel: `init_vqs`), so
the set must be known before the first one is made. A ring is one block of zeroed guest pages.

A request that the device does not answer is still the device's: it may discard those pages
whenever it wakes up. Whoever gives up waiting therefore reports the failure to the `broken`
hook before the error goes on, and the hook resets the device, after which it owns nothing
(virtio 1.3, 2.4). The kernel waits for ever instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from hostzero.driver.guest_mm import GuestMm
from hostzero.driver.negotiate import reset
from hostzero.errors import DriverError, HostzeroError, OutOfMemory
from hostzero.mm.gfp import GFP_KERNEL, GFP_NOWARN, GFP_ZERO
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SHIFT, Pfn, pfn_to_gpa
from hostzero.virtio.driver_queue import DriverQueue
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.ring_layout import QUEUE_SIZE_MAX, RingLayout, Segment, contiguous_bytes
from hostzero.virtio.transport import Transport

Wait = Callable[[DriverQueue], None]
"""Called when a kick brought nothing back: returns once something may have come, or raises."""

Broken = Callable[[Exception], None]
"""Told of a device that broke the protocol or fell silent, before the error is raised."""

Interrupt = Callable[[], None]
"""Runs when the device has used a buffer of a queue."""

_RING_GFP: Final = GFP_KERNEL | GFP_ZERO | GFP_NOWARN


def no_answer(queue: DriverQueue) -> None:
    """Give up at once: in one process the device has run when `kick` returns.

    Raises:
        DriverError: always.
    """
    raise DriverError(f"device did not answer: {queue.in_flight} requests are still with it after the kick")


@dataclass(frozen=True)
class RingPages:
    """The guest pages under one ring."""

    pfn: Pfn
    order: int


class BalloonQueue:
    """One virtqueue with its role, and the one way to wait for it.

    Attributes:
        role: what the queue carries.
        index: its number on the wire.
        size: entries of the ring.
    """

    def __init__(
        self, role: QueueRole, index: int, ring: DriverQueue, pages: RingPages, wait: Wait, broken: Broken
    ) -> None:
        self.role = role
        self.index = index
        self.size = ring.layout.size
        self.pages = pages
        self._ring = ring
        self._wait = wait
        self._broken = broken

    @property
    def num_free(self) -> int:
        """Descriptors that no request occupies."""
        return self._ring.num_free

    def add(self, out: Sequence[Segment], in_: Sequence[Segment], token: object) -> None:
        """Place a request without telling the device yet.

        Raises:
            RingError: there is no room, or the request breaks a rule; nothing was added.
        """
        self._ring.add(out, in_, token)

    def kick(self) -> None:
        """Show the device what was added, and wait for nothing.

        Raises:
            OSError: the transport failed; the device was reported broken, as for any error of its own.
        """
        try:
            self._ring.kick()
        except (HostzeroError, OSError) as error:
            self._broken(error)
            raise

    def poll(self) -> list[tuple[object, int]]:
        """Kick, and return what has come back so far: (token, used length in bytes).

        Raises:
            HostzeroError: the device breaks a rule of the ring; it was reported broken.
        """
        try:
            self._ring.kick()
            return self._ring.collect()
        except (HostzeroError, OSError) as error:
            self._broken(error)
            raise

    def may_wait(self) -> bool:
        """Wait for the device once; False if it did not answer, which is no failure here."""
        try:
            self._wait(self._ring)
        except DriverError:
            return False
        return True

    def complete(self, tokens: Collection[object]) -> dict[object, int]:
        """Kick, wait until exactly these requests have come back, and return their used lengths.

        The lengths are as the device wrote them, in bytes.

        Raises:
            DriverError: the device did not answer, or returned a request that is not among
                `tokens`.
            HostzeroError: the device breaks a rule of the ring.
            OSError: the transport failed. In every case the device was reported broken.
        """
        lengths: dict[object, int] = {}
        try:
            self._ring.kick()
            while True:
                for token, used_len in self._ring.collect():
                    if token not in tokens:
                        raise DriverError(
                            f"{self.role.value} queue: an answer to an earlier request came back"
                        )
                    lengths[token] = used_len
                if len(lengths) == len(tokens):
                    return lengths
                self._wait(self._ring)
        except (HostzeroError, OSError) as error:
            self._broken(error)
            raise

    def release(self) -> None:
        """Let go of the ring's memory; the pages themselves belong to `del_vqs`."""
        self._ring.release()


def find_vqs(
    mm: GuestMm,
    memory: GuestMemory,
    transport: Transport,
    features: Feature,
    *,
    interrupts: dict[QueueRole, Interrupt],
    wait: Wait,
    broken: Broken,
) -> dict[QueueRole, BalloonQueue]:
    """Make every queue that `features` bring and hand their rings to the device.

    A queue without an entry in `interrupts` is waited for, not interrupted for.

    Raises:
        DriverError: a queue is missing, its size is no ring size, or it is too small for what
            goes through it (kernel: -ENOENT, -EINVAL, -ENOSPC).
        OutOfMemory: no pages for a ring. In every case the device was reset and no page is left
            allocated, unless it does not reset: then it may still write to the rings.
    """
    queues: dict[QueueRole, BalloonQueue] = {}
    try:
        for index, role in enumerate(queue_roles(features)):
            least = _least_size(role, features)
            size = _checked_size(transport.queue_size_max(index), index, role, least)
            layout, pages = _alloc_ring(mm, memory, size, least)

            def notify(index: int = index) -> None:
                transport.notify(index)

            ring = DriverQueue(memory, layout, event_idx=Feature.RING_EVENT_IDX in features, notify=notify)
            queues[role] = BalloonQueue(role, index, ring, pages, wait, broken)
            transport.setup_queue(index, layout, interrupts.get(role, _acknowledge))
    except (HostzeroError, OSError):
        # Nothing was submitted, but the device may know a ring by now.
        reset(transport)
        del_vqs(mm, queues)
        raise
    return queues


def del_vqs(mm: GuestMm, queues: dict[QueueRole, BalloonQueue]) -> None:
    """Free the rings' pages. The device must have been reset: it would write into them."""
    for queue in queues.values():
        queue.release()
        mm.free_pages(queue.pages.pfn, queue.pages.order)
    queues.clear()


def _least_size(role: QueueRole, features: Feature) -> int:
    # Patch 36: the bitmap is a second descriptor, and there is no indirect table to put it in.
    if role is QueueRole.INFLATE and Feature.DEVICE_INIT_ON_INFLATE in features:
        return 2
    # Kernel virtballoon_probe(): one entry stays free for the stop command.
    return 2 if role is QueueRole.FREE_PAGE else 1


def _checked_size(size: int, index: int, role: QueueRole, least: int) -> int:
    where = f"the {role.value} queue, number {index},"
    if size == 0:
        raise DriverError(f"{where} is missing, although its feature was offered")
    if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
        raise DriverError(f"{where} has {size} entries, not a power of two up to {QUEUE_SIZE_MAX}")
    if size < least:
        raise DriverError(f"{where} has {size} entries and needs {least} for one request (-ENOSPC)")
    return size


def _alloc_ring(mm: GuestMm, memory: GuestMemory, size: int, least: int) -> tuple[RingLayout, RingPages]:
    # A driver may use fewer entries than the device takes, so a large ring shrinks to the memory
    # there is (kernel: vring_create_virtqueue_split with may_reduce_num).
    while True:
        order = (contiguous_bytes(size) - 1 >> PAGE_SHIFT).bit_length()
        try:
            pfn = mm.alloc_pages(_RING_GFP, order)
        except OutOfMemory:
            if size // 2 < least:
                raise
            size //= 2
            continue
        try:
            return RingLayout.contiguous(memory, size, pfn_to_gpa(pfn)), RingPages(pfn, order)
        except HostzeroError:
            mm.free_pages(pfn, order)
            raise


def _acknowledge() -> None:
    # The waiter collects; there is nobody to wake in one process.
    return
