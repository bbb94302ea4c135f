# SPDX-License-Identifier: GPL-2.0-only
"""What a balloon device may do with a request: a second, slow reading of the documents.

`DeviceModel` is told what the guest does and knows from that which queues there are, which
requests wait in them, what the configuration space reads, which bytes the device may change and
which claims it may make. It shares no code with `hostzero.device` or `hostzero.virtio`.

What the device *may* do is wide (it may drop any page that a well-formed request names, or none);
what it may *claim* is judged by the bytes in memory. Only where nothing stands in the way of a
claim is the lack of it called a lost one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hostzero.check.wire.wire_rings import (
    SEGMENT,
    Parsed,
    Place,
    ReadBytes,
    Space,
    first_bytes,
    gather,
    overlap,
)

PAGE = 4096
PFNS_MAX = 4096  # PFNs in one request (hostzero.device.REQUEST_PFNS_MAX)

MUST_TELL_HOST, STATS_VQ, FREE_PAGE_HINT, PAGE_POISON = 1 << 0, 1 << 1, 1 << 3, 1 << 4
REPORTING, INIT_REPORTED, INIT_ON_INFLATE = 1 << 5, 1 << 6, 1 << 7
EVENT_IDX, VERSION_1 = 1 << 29, 1 << 32

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_KNOWN_STATUS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

INFLATE, DEFLATE, STATS, HINT, REPORT = "inflate", "deflate", "stats", "free-page", "reporting"


@dataclass
class Request:
    """One entry of the available ring that waits for its used entry."""

    role: str
    parsed: Parsed


@dataclass
class Ring:
    """A queue that the device has taken over.

    Attributes:
        role: what it carries.
        place: where it lies.
        last: the next available index that the device has not taken.
        used: the next used index that was not seen.
        broken: whether its ring cannot be trusted until a reset.
        waiting: requests without a used entry, in the order in which they must come back.
        held: the statistics buffer that the device keeps.
        held_at: the available index of its entry.
        served: whether the device has looked at it in this operation.
    """

    role: str
    place: Place
    last: int
    used: int
    broken: bool = False
    waiting: list[Request] = field(default_factory=list)
    held: Request | None = None
    held_at: int = 0
    served: bool = False


@dataclass
class Change:
    """What one request allows: pages that may be dropped, and bytes that may be written."""

    pages: set[int] = field(default_factory=set)
    written: list[SEGMENT] = field(default_factory=list)


@dataclass
class DeviceModel:
    """A balloon device as its documents describe it.

    Attributes:
        space: guest memory.
        offered: the feature bits that it offers.
        sizes: the most entries of each queue, by role.
        granule: pages of 4 KiB that the host drops in one piece.
        discard_hints: whether hinted pages may be dropped.
        balloon: pages that may be in the balloon, as far as the device may remember.
        hints: where the run of hints may stand; more than one place only within a step, if a command
            lies in memory that the same step gives away.
    """

    space: Space
    offered: int
    sizes: dict[str, int]
    granule: int = 1
    discard_hints: bool = False
    status: int = 0
    accepted: int = 0
    acked: int = 0
    target: int = 0
    actual: int = 0
    poison: int = 0
    inhibited: int = 0
    hints: frozenset[str] = frozenset({"stopped"})
    run: int = 0x7FFF_FFFF
    gave_up: bool = False
    rings: dict[int, Ring] = field(default_factory=dict)
    balloon: set[int] = field(default_factory=set)
    figures: dict[int, int] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Whether a driver is running."""
        return bool(self.status & DRIVER_OK) and not self.status & FAILED

    @property
    def poisoned(self) -> bool:
        """Whether the guest expects another value than zero in free pages."""
        return bool(self.acked & PAGE_POISON) and self.poison != 0

    @property
    def needs_reset(self) -> bool:
        """Whether a ring is broken, or was when it was stopped."""
        return self.gave_up or any(ring.broken for ring in self.rings.values())

    def role(self, index: int) -> str | None:
        """Return what queue `index` carries: numbers are dense over the accepted features."""
        if not self.status & FEATURES_OK:
            return None
        roles = [INFLATE, DEFLATE]
        roles += [
            role
            for bit, role in ((STATS_VQ, STATS), (FREE_PAGE_HINT, HINT), (REPORTING, REPORT))
            if self.acked & bit
        ]
        return roles[index] if 0 <= index < len(roles) else None

    def write_status(self, value: int) -> bool:
        """Take a status; False if the device must refuse it."""
        if value == 0:
            self.reset()
            return True
        before = self.status & _KNOWN_STATUS
        wanted = value & _KNOWN_STATUS
        added = wanted & ~before
        if value & ~(_KNOWN_STATUS | NEEDS_RESET) or before & ~wanted:
            return False
        if added & DRIVER_OK and not before & FEATURES_OK:
            return False
        if added & FEATURES_OK:
            if self.accepted & VERSION_1 and not self.accepted & ~(self.offered | VERSION_1):
                self.acked = self.accepted
            else:
                wanted &= ~FEATURES_OK
        self.status = wanted
        return True

    def reset(self) -> None:
        """Forget everything that a driver said; the target and what inhibits are the host's."""
        self.status = self.accepted = self.acked = self.actual = self.poison = 0
        self.hints = frozenset({"stopped"})
        self.gave_up = False
        self.rings = {}
        self.balloon = set()
        self.figures = {}

    def stop(self, ring: Ring) -> int:
        """Take note that a queue stops; return the available index at which it goes on.

        The statistics buffer becomes available again, or comes back if another one did since.
        """
        if ring.held is not None and ring.last == (ring.held_at + 1) & 0xFFFF:
            ring.last = ring.held_at
        elif ring.held is not None:
            ring.waiting.append(ring.held)
        ring.held = None
        if any(each is ring for each in self.rings.values()):
            # Else a reset at its last interrupt has taken it away, and forgotten what was broken.
            self.gave_up = self.gave_up or ring.broken
        if ring.role in {INFLATE, DEFLATE}:
            self.balloon = set()
        if ring.role == HINT:
            self.hints = frozenset("done" if hint == "done" else "stopped" for hint in self.hints)
        return ring.last

    def suspend(self) -> None:
        """Forget the features once every queue has stopped; what the driver wrote stays."""
        self.status = self.accepted = self.acked = 0
        self.gave_up = False
        self.rings = {}

    def config(self) -> bytes:
        """Return the 16 bytes of the configuration space."""
        values = (self.target, self.actual, self._command_of(min(self.hints)), self.poison)
        return b"".join(value.to_bytes(4, "little") for value in values)

    def learn(self, command: int) -> None:
        """Go by the command id that the device shows, where a run of hints may stand in several places."""
        shown = frozenset(hint for hint in self.hints if self._command_of(hint) == command)
        self.hints = shown or self.hints

    def _command_of(self, hint: str) -> int:
        return {"stopped": 0, "done": 1}.get(hint, self.run)

    def write_config(self, offset: int, data: bytes) -> bool:
        """Take a write to the configuration space; False if the device must refuse it."""
        if offset < 0 or offset + len(data) > 16:
            return False
        space = bytearray(self.config())
        space[offset : offset + len(data)] = data
        self.actual = int.from_bytes(space[4:8], "little")
        if (self.acked if self.status & FEATURES_OK else self.offered) & PAGE_POISON:
            self.poison = int.from_bytes(space[12:16], "little")
        return True

    def take_figures(self, data: bytes) -> None:
        """Take statistics: tag and value, 10 bytes each; of the 16 tags that are known, the last counts."""
        entries = [data[at : at + 10] for at in range(0, len(data) - 9, 10)]
        pairs = [(int.from_bytes(each[:2], "little"), int.from_bytes(each[2:], "little")) for each in entries]
        self.figures = {tag: value for tag, value in pairs if tag < 16}

    def live_bytes(self) -> list[SEGMENT]:
        """Return every byte of every live ring."""
        return [part for ring in self.rings.values() for part in ring.place.parts()]

    # ------------------------------------------------------------------ requests

    def pfns(self, request: Request, read: ReadBytes) -> list[int]:
        """Return the page numbers of an inflate or deflate request; none if it is malformed."""
        length = request.parsed.readable_bytes
        if request.parsed.bad or not length or length % 4 or length > 4 * PFNS_MAX:
            return []
        data = gather(read, request.parsed.readable, length)
        return [int.from_bytes(data[at : at + 4], "little") for at in range(0, length, 4)]

    def bitmap(self, request: Request, count: int) -> list[SEGMENT] | None:
        """Return where the bitmap for `count` pages goes; None if its buffer must be refused."""
        if not self.acked & INIT_ON_INFLATE or self.poisoned:
            return []
        segments = first_bytes(request.parsed.writable, (count + 7) // 8)
        if overlap(segments, self.live_bytes()):
            return None
        if any(overlap([one], segments[at + 1 :]) for at, one in enumerate(segments)):
            return None
        return segments

    def may_change(self, request: Request, reads: Sequence[ReadBytes]) -> Change:
        """Return what the device may do for a request, and note what it leaves behind.

        Args:
            request: the request.
            reads: guest memory as it was and as it is, where the two differ: the device may
                have read either, and is left where either leads.
        """
        change = Change()
        balloon, hints = self.balloon, self.hints
        balloons: set[int] = set()
        after: frozenset[str] = frozenset()
        for read in reads:
            self.balloon, self.hints = balloon, hints
            one = self._may_change(request, read)
            change.pages |= one.pages
            change.written += one.written
            balloons |= self.balloon
            after |= self.hints
        self.balloon, self.hints = balloons, after
        return change

    def _may_change(self, request: Request, read: ReadBytes) -> Change:
        parsed = request.parsed
        if request.role == INFLATE:
            return self._may_inflate(request, read)
        if request.role == DEFLATE:
            named = set(self.pfns(request, read))
            # A request that nobody could read may have named any page.
            self.balloon = self.balloon - named if named else set()
        elif request.role == HINT and not parsed.bad:
            if parsed.readable and parsed.writable:
                return Change()
            if parsed.readable:
                self._command(gather(read, parsed.readable, 5))
            elif self.discard_hints and "started" in self.hints and not self.poisoned:
                return Change(self._dropped(parsed.writable))
        elif request.role == REPORT and not parsed.bad and not parsed.readable and not self.poisoned:
            return Change(self._dropped(parsed.writable))
        return Change()

    def _may_inflate(self, request: Request, read: ReadBytes) -> Change:
        pfns = self.pfns(request, read)
        bitmap = self.bitmap(request, len(pfns)) if pfns else None
        if bitmap is None:
            return Change()
        written = self.live_bytes() + bitmap
        in_ram = {pfn for pfn in pfns if self.space.holds(pfn * PAGE, PAGE)}
        # Without MUST_TELL_HOST the guest may have taken back what earlier requests named.
        balloon = in_ram | (self.balloon if self.acked & MUST_TELL_HOST else set())
        self.balloon = self.balloon | in_ram
        if self.inhibited:
            return Change(set(), bitmap)
        return Change(self.whole_pieces(in_ram, balloon, written), bitmap)

    def whole_pieces(self, pfns: Iterable[int], balloon: set[int], written: Sequence[SEGMENT]) -> set[int]:
        """Return the pages of those host pages that can be dropped for `pfns`.

        They lie whole in `balloon`, and nothing of them is in `written`.
        """
        pages: set[int] = set()
        for piece in {self.space.host_page(pfn * PAGE, self.granule * PAGE) for pfn in pfns}:
            if piece is None or overlap([piece], written):
                continue
            whole = range(piece[0] // PAGE, (piece[0] + piece[1]) // PAGE)
            if balloon.issuperset(whole):
                pages.update(whole)
        return pages

    def _dropped(self, segments: Sequence[SEGMENT]) -> set[int]:
        # Pages, in whole pieces of the host's, that lie in one segment and in no ring.
        pages: set[int] = set()
        if self.inhibited:
            return pages
        rings = self.live_bytes()
        for start, length in segments:
            whole = set(range(-(-start // PAGE), (start + length) // PAGE))
            pages |= self.whole_pieces(whole, whole, rings)
        return pages

    def _command(self, data: bytes) -> None:
        if len(data) != 4:
            return
        same = int.from_bytes(data, "little") == self.run
        leads = {"requested": "started"} if same else {"started": "stopped"}
        self.hints = frozenset(leads.get(hint, hint) for hint in self.hints)

    def claims_all(self, request: Request) -> bool:
        """Return whether nothing stands in the way of a report's claim but a discard that fails."""
        parsed = request.parsed
        return (
            bool(self.acked & INIT_REPORTED)
            and not (parsed.bad or parsed.readable or self.poisoned or self.inhibited)
            and 0 < parsed.writable_bytes < 1 << 32
            and all(self._whole(start, length) for start, length in parsed.writable)
            and not overlap(parsed.writable, self.live_bytes())
        )

    def _whole(self, start: int, length: int) -> bool:
        size = self.granule * PAGE
        return length % size == 0 and self.space.host_page(start, size) == (start, size)
