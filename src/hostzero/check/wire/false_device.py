# SPDX-License-Identifier: GPL-2.0-only
"""A device that lies to its driver: a transport whose answers are planned one by one.

It takes the driver's requests out of the rings by its own reading of virtio 1.3 and answers each
by the next planned lie, or honestly when none is planned. Whatever it says, it says nothing that
a driver must believe and that is false: where the features that were negotiated make an exact
length or a bit a promise of zeros, the bytes really are zero. A device that breaks that promise
cannot be told from an honest one by any driver, so it is outside what can be checked. All pages of
a request that it may write to and makes no promise about, it fills with dirt: whoever believes
something that was not said, believes something false.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hostzero.check.wire.bounds import TakesForEver
from hostzero.check.wire.device_model import (
    FREE_PAGE_HINT,
    INIT_ON_INFLATE,
    INIT_REPORTED,
    PAGE,
    PAGE_POISON,
    REPORTING,
    STATS_VQ,
)
from hostzero.check.wire.wire_rings import SEGMENT, Parsed, Place, Space, gather, number, overlap, parse_chain
from hostzero.ram import Ram
from hostzero.virtio.ring_layout import RingLayout

CALLS_MAX = 20_000
"""Calls of the transport in one step, far above what any honest step needs."""

DIRT = b"\xc7" * PAGE

HONEST, WITHHOLD, LENGTH, OFF_BY, WRONG_ID, TWICE, JUMP, SHORT_BITMAP = range(8)
LONG_BITMAP, CALL_BACK, SPURIOUS, RAISE, LATER, ASK_RESET, SOME = range(8, 15)
LIES = 15
"""What a planned answer may be; each has one number beside it. `SOME` is honest about some pages."""


@dataclass
class FalseRing:
    """A queue as the device sees it."""

    role: str
    place: Place
    interrupt: Callable[[], None]
    last: int = 0
    used: int = 0
    kept: list[Parsed] = field(default_factory=list)


class FalseDevice:
    """A `hostzero.virtio.Transport`; `plan` holds the lies to come, (kind, number) each.

    Attributes:
        claimed: balloon pages by whether the last answer about them said zero, to be believed.
        said: reported blocks, by first byte, whether the last answer said zero, to be believed.
        given: the bytes of its requests that the driver lets it write.
        dirties: whether it fills reported blocks of which it promises nothing; not where the guest
            relies on what they hold, and negotiated that.
        raised: whether it raised OSError in this step.
        on_request: told of each request, before anything is done about it, with its queue and what else
            the device has and may write to; returns what is wrong with it.
        wrong: what a request of the driver had in it that it must not have; None: nothing.
        short_reads: fields of the configuration space that came back cut off in this step.
        unreset: rings and buffers that it held when a reset was asked for that did not happen.
        unreset_rings: the first bytes of those rings.
    """

    def __init__(self, ram: Ram) -> None:
        """Stand before the driver of a guest whose memory is `ram`, from address 0 on."""
        self.buffer = ram.buffer
        self.space = Space(((0, ram.size),))
        self.offered = 0
        self.offered_then = 0  # when the driver last asked
        self.sizes = [128, 128, 128, 64, 32]
        self.num_pages = 0
        self.cmd_id = 0
        self.written: dict[int, int] = {}
        self.plan: list[tuple[int, int]] = []
        self.claimed: dict[int, bool] = {}
        self.said: dict[int, bool] = {}
        self.given: list[SEGMENT] = []
        self.dirties = True
        self.raised = False
        self.wrong: str | None = None
        self.on_request: Callable[[str, Parsed, list[SEGMENT]], str | None] = _nothing
        self.short_reads = 0
        self.unreset: list[SEGMENT] = []
        self.unreset_rings: set[int] = set()
        self.calls = 0
        self.refuses_features = False
        self.never_resets = False
        self.config_cut = 4
        self.raise_after = 0
        self.rings: dict[int, FalseRing] = {}
        self.acked = 0
        self._status = 0
        self._callback: Callable[[], None] = _nobody

    # ------------------------------------------------------------------ the transport

    def device_features(self) -> int:
        """Return the bits that are offered."""
        self._called()
        self.offered_then = self.offered
        return self.offered

    def set_driver_features(self, features: int) -> None:
        """Take the bits that the driver accepts."""
        self._called()
        self.acked = features

    def status(self) -> int:
        """Return the status."""
        self._called()
        return self._status

    def set_status(self, status: int) -> None:
        """Take a status; 0 makes it forget, unless it never resets."""
        self._called()
        if status == 0:
            # What it held it does not touch any more: only a device that was not reset may.
            if not self.never_resets:
                self.unreset, self.unreset_rings = [], set()
            if self.never_resets:
                self.unreset += [part for ring in self.rings.values() for part in ring.place.parts()]
                self.unreset_rings |= {ring.place.desc for ring in self.rings.values()}
                # Reported blocks are not among them: the memory manager takes them back in any case.
                self.unreset += [part for part in self.given if part[1] < PAGE]
            self.rings = {}
            self.given = []
            if self.never_resets:
                return
            self.acked = 0
            self.written = {}
        if self.refuses_features:
            status &= ~8
        self._status = int(status)

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the configuration space, perhaps too few."""
        self._called()
        values = (self.num_pages, self.written.get(4, 0), self.cmd_id, self.written.get(12, 0))
        space = b"".join((value & 0xFFFF_FFFF).to_bytes(4, "little") for value in values)
        self.short_reads += length > self.config_cut
        return space[offset : offset + min(length, self.config_cut)]

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a field."""
        self._called()
        self.written[offset] = int.from_bytes(data, "little")

    def queue_size_max(self, index: int) -> int:
        """Return what the plan says of a queue."""
        self._called()
        return self.sizes[index] if index < len(self._roles()) else 0

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        """Take a ring."""
        self._called()
        place = Place(layout.size, layout.desc, layout.avail, layout.used)
        self.rings[index] = FalseRing(self._roles()[index], place, interrupt)

    def notify(self, index: int) -> None:
        """Answer what is in a queue, as planned."""
        self._called()
        ring = self.rings.get(index)
        while ring is not None and ring is self.rings.get(index):
            ahead = (number(self.read, ring.place.avail + 2, 2) - ring.last) & 0xFFFF
            if not ahead:
                return
            self._called()
            head = number(self.read, ring.place.avail_entry(ring.last), 2)
            ring.last = (ring.last + 1) & 0xFFFF
            parsed = parse_chain(self.read, self.space, ring.place, head)
            rings = [part for each in self.rings.values() for part in each.place.parts()]
            kept = [part for each in self.rings.values() for other in each.kept for part in other.writable]
            self.wrong = self.wrong or self.on_request(ring.role, parsed, rings + kept)
            self.given += parsed.writable
            self._answer(ring, parsed, *(self.plan.pop(0) if self.plan else (HONEST, 0)))

    def on_config_change(self, callback: Callable[[], None]) -> None:
        """Remember whom to call."""
        self._called()
        self._callback = callback

    # ------------------------------------------------------------------ what the host does

    def change_config(self) -> None:
        """Say that the configuration space changed."""
        self._callback()

    def needs_reset(self) -> None:
        """Ask for a reset."""
        self._status |= 64

    def give_stats_back(self) -> None:
        """Return every buffer that is kept, the statistics' above all, and interrupt."""
        for ring in list(self.rings.values()):
            kept, ring.kept = ring.kept, []
            for parsed in kept:
                self.give_back(ring, parsed.head, 0)
            if kept:
                ring.interrupt()

    def read(self, gpa: int, length: int) -> bytes:
        """Read guest memory."""
        return bytes(self.buffer[gpa : gpa + length])

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory, but no byte of a ring that is in use: that would be another lie."""
        rings = [part for ring in self.rings.values() for part in ring.place.parts()]
        if not overlap([(gpa, len(data))], rings):
            self.buffer[gpa : gpa + len(data)] = data

    def give_back(self, ring: FalseRing, head: int, length: int) -> None:
        """Write a used entry and publish it."""
        entry = (head & 0xFFFF_FFFF).to_bytes(4, "little") + (length & 0xFFFF_FFFF).to_bytes(4, "little")
        at = ring.place.used_entry(ring.used)
        self.buffer[at : at + 8] = entry
        self._used_idx(ring, ring.used + 1)

    # ------------------------------------------------------------------ answers

    def _answer(self, ring: FalseRing, parsed: Parsed, kind: int, value: int) -> None:
        if kind == RAISE:
            self._raise()
        if kind in {CALL_BACK, ASK_RESET}:
            if kind == ASK_RESET:
                self.needs_reset()
            self._callback()
        elif kind == SPURIOUS:
            ring.interrupt()
        if kind == WITHHOLD or (ring.role == "stats" and kind == HONEST):
            ring.kept.append(parsed)
            return
        if kind == LATER:
            # The next request that comes back brings this one along, behind it.
            ring.kept.append(parsed)
            return
        if kind == JUMP:
            # What it says is what the entry says that comes into view: an old one, or none.
            entry = self.read(ring.place.used_entry(ring.used), 8)
            self._serve(ring, parsed, LENGTH, int.from_bytes(entry[4:], "little"))
            self._used_idx(ring, ring.used + value)
            return
        length = self._serve(ring, parsed, kind, value)
        head = parsed.head + (value or 1 if kind == WRONG_ID else 0)
        self.give_back(ring, head, length)
        if kind == TWICE:
            self.give_back(ring, parsed.head, length)
        if ring.role != "stats":
            for other in ring.kept:
                self.give_back(ring, other.head, self._serve(ring, other, HONEST, 0))
            ring.kept = []
        ring.interrupt()

    def _serve(self, ring: FalseRing, parsed: Parsed, kind: int, value: int) -> int:
        # Do what makes the answer true, or dirty; return the used length.
        if ring.role == "reporting":
            return self._report(parsed, kind, value)
        if ring.role == "inflate":
            return self._inflate(parsed, kind, value)
        if ring.role == "free-page" and parsed.writable:
            self._fill(parsed.writable[0][0], parsed.writable[0][1], zero=False)
        return value if kind in {LENGTH, LONG_BITMAP} else 0

    def _report(self, parsed: Parsed, kind: int, value: int) -> int:
        exact = parsed.writable_bytes
        start = parsed.writable[0][0]
        length = exact
        if kind == LENGTH:
            length = value
        elif kind == OFF_BY:
            length = exact + value
        elif kind in {SHORT_BITMAP, SOME}:
            length = exact // 2
        length &= 0xFFFF_FFFF
        believed = length == exact and bool(self.acked & INIT_REPORTED)
        self.said[start] = believed
        if believed or self.dirties:
            for segment in parsed.writable:
                self._fill(*segment, zero=believed)
        return length

    def _inflate(self, parsed: Parsed, kind: int, value: int) -> int:
        data = gather(self.read, parsed.readable, 4096)
        pfns = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        room = parsed.writable_bytes
        promised = bool(self.acked & INIT_ON_INFLATE) and room > 0
        if room and not promised:
            self.wrong = "a driver that did not accept bit 7 asks for the bitmap"
        elif any(any(self.read(*segment)) for segment in parsed.writable):
            # A device may leave bytes alone that it does not count; what stands there must say nothing.
            self.wrong = "the bitmap is not empty when the device is given it"
        length = room
        if kind == LENGTH:
            length = value & 0xFFFF_FFFF
        elif kind == OFF_BY:
            length = (room + value) & 0xFFFF_FFFF
        elif kind == SHORT_BITMAP:
            length = room // 2
        elif kind == LONG_BITMAP:
            length = room + 1 + value % 4096
        bits = bytearray(room)
        for n, pfn in enumerate(pfns):
            zero = kind != SOME or bool(value >> n % 16 & 1)
            believed = promised and zero and n < 8 * min(length, room)
            # A bit that does not count is set, and the page is full of dirt.
            if promised and (believed or n >= 8 * min(length, room)):
                bits[n // 8] |= 1 << n % 8
            self.claimed[pfn] = believed
            self._fill(pfn * PAGE, PAGE, zero=believed)
        for n in range(len(pfns), 8 * room):
            bits[n // 8] |= 1 << n % 8
        if promised:
            self.write(parsed.writable[0][0], bytes(bits))
        return length

    def _fill(self, gpa: int, length: int, *, zero: bool) -> None:
        for at in range(gpa, gpa + length, PAGE):
            if self.space.holds(at, PAGE):
                self.write(at, bytes(PAGE) if zero else DIRT)

    def _used_idx(self, ring: FalseRing, value: int) -> None:
        ring.used = value & 0xFFFF
        at = ring.place.used + 2
        self.buffer[at : at + 2] = ring.used.to_bytes(2, "little")

    def _roles(self) -> list[str]:
        optional = ((STATS_VQ, "stats"), (FREE_PAGE_HINT, "free-page"), (REPORTING, "reporting"))
        return ["inflate", "deflate", *(role for bit, role in optional if self.acked & bit)]

    def _called(self) -> None:
        self.calls += 1
        if self.calls > CALLS_MAX:
            raise TakesForEver
        if self.raise_after:
            self.raise_after -= 1
            if not self.raise_after:
                self._raise()

    def _raise(self) -> None:
        self.raised = True
        raise OSError(5, "the transport has failed")


def _nobody() -> None:
    return


def _nothing(role: str, parsed: Parsed, taken: list[SEGMENT]) -> None:
    del role, parsed, taken


__all__ = ["LIES", "PAGE_POISON", "FalseDevice"]
