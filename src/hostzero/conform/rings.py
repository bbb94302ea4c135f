# SPDX-License-Identifier: GPL-2.0-only
"""The driver's end of a queue under test: careful, or field by field.

`CarefulRing` keeps every rule, checks all that comes back, and is what most cases use. `RawRing`
writes whatever a case wants. Both count the notifications that came in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostzero.conform.judge import Judge
from hostzero.errors import RingError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.driver_queue import DriverQueue
from hostzero.virtio.features import QueueRole
from hostzero.virtio.mock import MockGuest
from hostzero.virtio.ring_layout import RingLayout, Segment

Segments = Sequence[tuple[int, int]]
"""Addresses and lengths in bytes."""


class CarefulRing:
    """A queue as a good driver has it.

    Attributes:
        role: what the queue carries.
        index: its number.
        layout: where it lies.
        interrupts: used buffer notifications so far.
    """

    def __init__(
        self,
        role: QueueRole,
        index: int,
        memory: GuestMemory,
        layout: RingLayout,
        *,
        event_idx: bool,
        notify: Callable[[], None],
        judge: Judge,
    ) -> None:
        self.role = role
        self.index = index
        self.layout = layout
        self.interrupts = 0
        self._queue = DriverQueue(memory, layout, event_idx=event_idx, notify=notify)
        self._judge = judge
        self._next = 0
        self._back: dict[int, int] = {}

    @property
    def outstanding(self) -> int:
        """Requests that the device has."""
        return self._queue.in_flight

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return self._queue.num_free

    def interrupt(self) -> None:
        """Count one notification; what the transport calls."""
        self.interrupts += 1

    def add(self, readable: Segments, writable: Segments = ()) -> int:
        """Place a request and return its number; the device sees it after `kick`."""
        number = self._next
        self._next += 1
        self._queue.add(_segments(readable), _segments(writable), number)
        return number

    def kick(self) -> bool:
        """Publish, and notify unless the device asked not to be; return whether it was notified."""
        return self._queue.kick()

    def collect(self) -> dict[int, int]:
        """Return the used length of every request that has come back and was not taken yet.

        Raises:
            Failed: the device broke the used ring.
        """
        try:
            for token, used_len in self._queue.collect():
                assert isinstance(token, int)
                self._back[token] = used_len
        except RingError as error:
            self._judge.fail(f"{self.role.value} queue: {error}", "2.7.8")
        return self._back

    def take(self, number: int) -> int:
        """Return the used length of a request that has come back, and forget it."""
        return self._back.pop(number)

    def release(self) -> None:
        """Let go of the ring's memory, so that it can be unmapped."""
        self._queue.release()


class RawRing:
    """A queue written field by field.

    Attributes:
        role: what the queue carries.
        index: its number.
        layout: where it lies.
        guest: writes the fields.
        interrupts: used buffer notifications so far.
        returned: (id, length) of every used entry seen so far.
        overrun: whether the used index went past the available index.
    """

    def __init__(
        self,
        role: QueueRole,
        index: int,
        memory: GuestMemory,
        layout: RingLayout,
        notify: Callable[[], None],
    ) -> None:
        self.role = role
        self.index = index
        self.layout = layout
        self.guest = MockGuest(memory, layout)
        self.interrupts = 0
        self.returned: list[tuple[int, int]] = []
        self.overrun = False
        self._notify = notify

    def interrupt(self) -> None:
        """Count one notification; what the transport calls."""
        self.interrupts += 1

    def kick(self) -> None:
        """Notify the device, whatever it asked for."""
        self._notify()

    def look(self) -> list[tuple[int, int]]:
        """Return every used entry so far.

        Whoever makes more available than the ring holds may get as much back; of entries that were
        written over the last ones are seen twice.
        """
        seen = len(self.returned)
        ahead, offered = (
            (index - seen) & 0xFFFF for index in (self.guest.used_idx, self.guest.published_idx)
        )
        self.overrun = self.overrun or ahead > offered
        if not self.overrun:
            self.returned += self.guest.returned()
        return self.returned


def _segments(parts: Segments) -> list[Segment]:
    return [Segment(Gpa(gpa), length) for gpa, length in parts]
