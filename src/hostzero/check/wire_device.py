# SPDX-License-Identifier: GPL-2.0-only
"""A hostile guest in front of a balloon device: one step done, everything that must hold checked.

`DeviceWorld` has a real device over a small guest memory: two regions that touch in guest space
and not on the host, a hole, one far away, and bytes between them that belong to nobody. Steps are
what a guest (or its host's user) can do. A shadow holds every byte as it must be. After each
step, and at each interrupt in the middle of one:

- every byte that changed is one that the device may change for a request that waits;
- used entries come in the order of the available ring, one for each request, and no length is
  larger than the bytes that may be written;
- what is claimed to be zero reads as zero, and nothing is claimed without the bit negotiated,
  over a poison value, or of a request that breaks a rule;
- nothing comes out of the device but the errors that it documents, where it documents them.

The rings of two queues never overlap here: what a device does to such a guest is the guest's own
loss, and nobody can say what it should have been.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from hostzero.check import wire_rings
from hostzero.check.violation import Kind, Violated, Violation
from hostzero.check.wire_bounds import TakesForEver, bounded
from hostzero.check.wire_device_model import (
    EVENT_IDX,
    HINT,
    INFLATE,
    INIT_ON_INFLATE,
    INIT_REPORTED,
    NEEDS_RESET,
    PAGE,
    REPORT,
    STATS,
    VERSION_1,
    DeviceModel,
    Request,
    Ring,
)
from hostzero.check.wire_rings import SEGMENT, Place, Space, gather, number, overlap
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.errors import DeviceError, RamError, RingError, UsageError
from hostzero.ram import BACKINGS, GuestMemory, MemoryRegion, Ram
from hostzero.units import Gpa
from hostzero.virtio.features import Feature, QueueRole
from hostzero.virtio.ring_layout import RingLayout

RAM_PAGES: Final = 256

REGIONS: Final = (
    (0, 0, 96),
    (96, 160, 48),
    (256, 112, 16),
    (1 << 28, 224, 16),
)
"""Pages: the first in guest space, the first in RAM, how many."""

QUEUE_SIZES: Final = {INFLATE: 8, "deflate": 4, STATS: 2, HINT: 16, REPORT: 32}
"""All different, so that a queue that took another's number is seen."""

HISTORY: Final = 12

_CLAIM: Final = "a page that the device says is zero is not"


@functools.cache
def _pattern() -> NDArray[np.uint8]:
    # No byte is zero, so that every wiped byte shows.
    return np.random.default_rng(4).integers(1, 256, RAM_PAGES * PAGE, dtype=np.uint8)


class DeviceWorld:
    """One device, one guest, and the model that judges them."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Make the device that `setup` describes: offered, backing, granule, discard_hints."""
        self.ram = Ram(BACKINGS[setup["backing"]](RAM_PAGES * PAGE), setup["backing"])
        self.memory = GuestMemory(
            [MemoryRegion(Gpa(gpa * PAGE), self.ram, at * PAGE, n * PAGE) for gpa, at, n in REGIONS]
        )
        self.granule = int(setup["granule"])
        # Of the memory, discards and the size of host pages are replaced; all else is the real one.
        self.memory.discard = self._discard  # type: ignore[method-assign]
        self.memory.page_size = self._page_size  # type: ignore[method-assign]
        self.bytes = self.ram.array(np.uint8)
        self._words = self.bytes.view(np.uint64)
        self._pattern = _pattern()
        self.bytes[:] = self._pattern
        self._shadow = self._pattern.copy()
        self._shadow_words = self._shadow.view(np.uint64)
        self._differs = np.zeros(self._words.size, dtype=np.bool_)
        space = Space(tuple((gpa * PAGE, (gpa + n) * PAGE) for gpa, _, n in REGIONS))
        offered = int(setup["offered"])
        hints = bool(setup["discard_hints"])
        self.model = DeviceModel(space, offered | VERSION_1, dict(QUEUE_SIZES), self.granule, hints)
        sizes = {QueueRole(role): size for role, size in QUEUE_SIZES.items()}
        config = DeviceConfig(features=Feature(offered), queue_sizes=sizes, discard_hints=hints)
        self.device = BalloonDevice(self.memory, config)
        self.device.on_config_change(self._on_config)
        self.violation: Violation | None = None
        self.done: list[list[Any]] = []
        self._discards = 0
        self._failing: dict[int, int] = {}
        self._failed_discard = False
        self._config_changes = 0
        self._interrupted: set[int] = set()
        self._at_interrupt = [0, 0, 0]
        self._avail: dict[int, int] = {}

    def close(self) -> None:
        """Give the memory back."""
        self.device.reset()
        del self._words, self.bytes
        self.ram.close()

    def step(self, step: list[Any]) -> None:
        """Do one step and check everything.

        Raises:
            Violated: something does not hold.
            UsageError: there is no such step.
        """
        operation = OPERATIONS.get(step[0])
        if operation is None:
            raise UsageError(f"the wire has no step {step[0]!r}")
        self.done.append(step)
        self._failed_discard = False
        self._interrupted.clear()
        before = [(ring, ring.used) for ring in self.model.rings.values()]
        for ring in self.model.rings.values():
            ring.served = False
        if step[0] in WRITES:
            operation(self, *step[1:])
            return
        try:
            with bounded():
                operation(self, *step[1:])
        except TakesForEver:
            self.fail("rot", "the device does not come back from a call")
        self._settle(final=True)
        self._check_notifications(before)
        self._check_state()

    # ------------------------------------------------------------------ what the guest writes

    def _offset(self, gpa: int, length: int) -> int | None:
        for first, at, count in REGIONS:
            start = gpa - first * PAGE
            if start >= 0 and start + length <= count * PAGE:
                return at * PAGE + start
        return None

    def write(self, gpa: int, data: bytes) -> None:
        """Write as the guest; outside its memory nothing is written.

        The index of a used ring in use is left alone: the checks tell by it what came back.
        """
        at = self._offset(gpa, len(data))
        indices = [(ring.place.used + 2, 2) for ring in self.model.rings.values()]
        if at is None or overlap([(gpa, len(data))], indices):
            return
        raw = np.frombuffer(data, dtype=np.uint8)
        self.bytes[at : at + len(data)] = raw
        self._shadow[at : at + len(data)] = raw

    def _read(self, gpa: int, length: int) -> bytes:
        at = self._offset(gpa, length)
        assert at is not None, "the model reads only what it has found to be in memory"
        return self.bytes[at : at + length].tobytes()

    def _read_before(self, gpa: int, length: int) -> bytes:
        at = self._offset(gpa, length)
        assert at is not None, "the model reads only what it has found to be in memory"
        return self._shadow[at : at + length].tobytes()

    def place(self, index: int) -> Place | None:
        """Return where the ring of a queue lies that is set up."""
        ring = self.model.rings.get(index)
        return None if ring is None else ring.place

    def offer(self, index: int, head: int) -> None:
        """Put a head into the available ring of a queue and publish it."""
        place = self.place(index)
        if place is None:
            return
        at = self._avail.get(index, 0)
        self.write(place.avail_entry(at), (head & 0xFFFF).to_bytes(2, "little"))
        self._avail[index] = (at + 1) & 0xFFFF
        self.write(place.avail + 2, self._avail[index].to_bytes(2, "little"))

    # ------------------------------------------------------------------ calls into the device

    def call(self, what: str, allowed: bool, function: Callable[..., Any], *args: Any) -> Any:
        """Call the device; it must refuse exactly what it documents to refuse."""
        try:
            result = function(*args)
        except (DeviceError, RingError) as error:
            self._raise_seen()
            if allowed:
                self.fail("rot", f"the device refuses {what}, although it documents to take it", str(error))
            return None
        except Exception as error:  # noqa: BLE001 - whatever a guest can cause here is what is looked for
            self._raise_seen()
            self.fail("rot", f"{type(error).__name__} comes out of the device at {what}", str(error))
        self._raise_seen()
        if not allowed:
            self.fail("rot", f"the device takes {what}, although it documents to refuse it")
        return result

    def begin(self, index: int, start: int) -> None:
        """Count the available index of a new ring from `start` on."""
        self._avail[index] = start

    def pattern(self, pfn: int) -> bytes:
        """Return bytes without a zero for one page, other ones for each."""
        at = pfn * 97 % RAM_PAGES * PAGE
        return self._pattern[at : at + PAGE].tobytes()

    def plan_interrupt(self, action: int, index: int, head: int) -> None:
        """Do something at the next interrupt; see the step `at_interrupt`."""
        self._at_interrupt = [action, index, head]

    def plan_failure(self, which: int, mode: int) -> None:
        """Have the `which`-th discard from now on fail."""
        self._failing = {self._discards + max(which, 0): min(max(mode, 1), 4)}

    @property
    def config_changes(self) -> int:
        """How often the device has said that its configuration space changed."""
        return self._config_changes

    def _raise_seen(self) -> None:
        # A check inside an interrupt may have failed, and the device may have swallowed that.
        if self.violation is not None:
            raise Violated(self.violation)

    def fail(self, kind: Kind, what: str, claim: str = "", **fields: Any) -> NoReturn:
        """Record and raise a violation."""
        history = tuple(str(step) for step in self.done[-HISTORY:])
        self.violation = self.violation or Violation(kind, what, claim=claim, history=history, **fields)
        raise Violated(self.violation)

    def expect(self, ring: Ring) -> None:
        """Take down what the device finds when it looks at a ring."""
        ring.served = True
        while not ring.broken:
            place = ring.place
            ahead = (number(self._read, place.avail + 2, 2) - ring.last) & 0xFFFF
            if not ahead:
                return
            head = number(self._read, place.avail_entry(ring.last), 2)
            taken = ring.held is not None and ring.held.parsed.head == head
            if ahead > place.size or head >= place.size or taken:
                ring.broken = True
                if ring.role == "deflate":
                    self.model.balloon = set()
                return
            ring.last = (ring.last + 1) & 0xFFFF
            parsed = wire_rings.parse_chain(self._read, self.model.space, place, head)
            request = Request(ring.role, parsed)
            good = not parsed.bad and bool(parsed.readable) and not parsed.writable
            if ring.role == STATS and ring.held is None and good:
                ring.held = request
            else:
                ring.waiting.append(request)

    def _discard(self, gpa: int, length: int) -> bool:
        # The host's discard: it may fail, or fail halfway, or see only whole pieces.
        mode = self._failing.pop(self._discards, 0)
        self._discards += 1
        size = self.granule * PAGE
        start, end = -(-gpa // size) * size, (gpa + length) // size * size
        if mode:
            self._failed_discard = True
            half = start + (end - start) // (2 * size) * size
            if mode != 1 and half > start:
                GuestMemory.discard(self.memory, Gpa(start), half - start)
            if mode == 3:
                raise OSError(12, "the host has no memory")
            if mode == 4:
                raise RamError("the host cannot do that now")
            return False
        if self.granule == 1:
            return GuestMemory.discard(self.memory, Gpa(gpa), length)
        whole = start < end and GuestMemory.discard(self.memory, Gpa(start), end - start)
        return whole and (start, end) == (gpa, gpa + length)

    def _page_size(self, gpa: int) -> int:
        del gpa
        return self.granule * PAGE

    def _on_config(self) -> None:
        self._config_changes += 1

    def interrupt(self, index: int) -> None:
        """Be the driver's interrupt of a queue: look at what came back, then do what is planned."""
        self._interrupted.add(index)
        if self.violation is not None:
            return
        try:
            self._settle(final=False)
        except Violated:
            return
        action, other, head = self._at_interrupt
        self._at_interrupt = [0, 0, 0]
        if action == 1:
            self.device.reset()
            self.model.reset()
        elif action == 2 and other in self.model.rings:
            self.offer(other, head)
        if action in {2, 3} and other in self.model.rings and self.model.live:
            self.expect(self.model.rings[other])
            self.device.notify(other)

    # ------------------------------------------------------------------ what must hold

    def _settle(self, *, final: bool) -> None:
        rings = self.model.rings
        np.not_equal(self._words, self._shadow_words, out=self._differs)
        changed = np.flatnonzero(self._differs)
        answered: list[tuple[Ring, Request, int]] = []
        allowed: list[SEGMENT] = []
        pages: set[int] = set()
        reads = [self._read_before, self._read] if changed.size else [self._read]
        for index, ring in list(rings.items()):
            place = ring.place
            count = (number(self._read, place.used + 2, 2) - ring.used) & 0xFFFF
            if count > len(ring.waiting):
                self.fail("rot", "a used index moves by more than the requests that wait", f"queue {index}")
            allowed += [(place.used, 4), (place.used + 4 + 8 * place.size, 2)]
            balloon, hint = self.model.balloon, self.model.hint
            for at, request in enumerate(ring.waiting):
                if at == count:
                    # What comes after has perhaps begun, but is not done.
                    balloon, hint = self.model.balloon, self.model.hint
                entry = place.used_entry(ring.used + at)
                allowed.append((entry, 8))
                change = self.model.may_change(request, reads)
                pages |= change.pages
                allowed += change.written
                if at < count:
                    head, length = number(self._read, entry, 4), number(self._read, entry + 4, 4)
                    if head != request.parsed.head:
                        self.fail("rot", "a used entry names another head than the one that is due")
                    answered.append((ring, request, length))
            if count < len(ring.waiting):
                self.model.balloon, self.model.hint = balloon, hint
            ring.used = (ring.used + count) & 0xFFFF
            ring.waiting = ring.waiting[count:]
            if final and ring.waiting:
                self.fail("rot", "a request does not come back", f"queue {index}: {ring.waiting[0]}")
        self._check_bytes(changed, pages, allowed)
        for at, (_, request, length) in enumerate(answered):
            later = [part for _, other, _ in answered[at + 1 :] for part in self._writes(other)]
            self._check_answer(request, length, later)
        self._shadow_words[changed] = self._words[changed]

    def _writes(self, request: Request) -> list[SEGMENT]:
        if request.role != INFLATE:
            return []
        return self.model.bitmap(request, len(self.model.pfns(request, self._read_before)) or 1) or []

    def _check_bytes(self, changed: Any, pages: set[int], allowed: list[SEGMENT]) -> None:
        ram_pages = {at for pfn in pages if (at := self._offset(pfn * PAGE, PAGE)) is not None}
        ranges = [(at, n) for start, n in allowed if (at := self._offset(start, n)) is not None]
        for word in changed.tolist():
            byte = word * 8
            dropped = byte - byte % PAGE in ram_pages
            if dropped and not self._words[word]:
                continue
            for place in range(byte, byte + 8):
                if self.bytes[place] == self._shadow[place] or (dropped and not self.bytes[place]):
                    continue
                if not any(at <= place < at + length for at, length in ranges):
                    what = "the device changes a byte that it was not given"
                    value = int(self.bytes[place])
                    self.fail("corruption", what, f"RAM {place:#x}", wrong_offset=place, wrong_value=value)

    def _check_answer(self, request: Request, length: int, later: list[SEGMENT]) -> None:
        parsed, model = request.parsed, self.model
        if parsed.bad and length:
            self.fail("corruption", "a chain that breaks a rule comes back with a used length", str(request))
        if length > parsed.writable_bytes:
            self.fail("corruption", "a used length is larger than what the device may write", str(request))
        if request.role == INFLATE:
            self._check_bitmap(request, length, later)
        elif request.role == REPORT:
            if length and (not model.acked & INIT_REPORTED or model.poisoned):
                what = "a used length is claimed that the negotiated features do not allow"
                self.fail("corruption", what, str(request))
            for start, size in wire_rings.first_bytes(parsed.writable, length):
                self._check_zero(start, size, later, f"used length {length} of {request}")
            if not length and model.claims_all(request) and not self._failed_discard:
                self.fail("lost", "a report that was dropped is not claimed to be zero", str(request))
        elif length:
            self.fail("rot", "a used length for a request into which nothing is written", str(request))

    def _check_bitmap(self, request: Request, length: int, later: list[SEGMENT]) -> None:
        model = self.model
        before, now = model.pfns(request, self._read_before), model.pfns(request, self._read)
        bitmap = model.bitmap(request, len(before)) or []
        room = sum(size for _, size in bitmap)
        if length > room:
            what = "an inflate's used length is larger than its bitmap may be"
            self.fail("corruption", what, f"{length} of {room}: {request}")
        if overlap(bitmap, later):
            return
        if length < room and model.acked & INIT_ON_INFLATE:
            self.fail("lost", "an inflate's bitmap is not all written", f"{length} of {room}: {request}")
        bits = gather(self._read, bitmap, length)
        device_writes = bitmap + model.live_bytes()
        for n in range(8 * length):
            claimed = bits[n // 8] >> n % 8 & 1
            if n >= len(before):
                if claimed:
                    self.fail("corruption", "a bit behind the last page of a request is set", str(request))
                continue
            pfn = before[n]
            known = before == now
            if claimed and known:
                if self._offset(pfn * PAGE, PAGE) is None:
                    self.fail("corruption", "a page outside guest memory is claimed to be zero", pfn=pfn)
                self._check_zero(pfn * PAGE, PAGE, later, f"bit {n} of {request}")
            elif known and self.granule == 1 and not (model.inhibited or self._failed_discard):
                page = [(pfn * PAGE, PAGE)]
                if self._offset(pfn * PAGE, PAGE) is not None and not overlap(page, device_writes):
                    self.fail("lost", "a page that was dropped is not claimed to be zero", pfn=pfn)

    def _check_zero(self, start: int, length: int, later: list[SEGMENT], claim: str) -> None:
        if overlap([(start, length)], later):
            return
        at = self._offset(start, length)
        assert at is not None, "a checked segment"
        wrong = np.flatnonzero(self.bytes[at : at + length])
        if wrong.size:
            first = int(wrong[0])
            value = int(self.bytes[at + first])
            pfn = (start + first) // PAGE
            self.fail("corruption", _CLAIM, claim, pfn=pfn, wrong_offset=first, wrong_value=value)

    def _check_notifications(self, before: list[tuple[Ring, int]]) -> None:
        for index, ring in self.model.rings.items():
            place = ring.place
            old = next((used for each, used in before if each is ring), ring.used)
            events = self.model.acked & EVENT_IDX
            event_at = place.avail + 4 + 2 * place.size
            if old != ring.used and index not in self._interrupted:
                if events:
                    event = number(self._read, event_at, 2)
                    wanted = wire_rings.passed(event, ring.used, old)
                else:
                    wanted = not number(self._read, place.avail, 2) & 1
                if wanted:
                    self.fail("rot", "requests come back and the driver is not told", f"queue {index}")
            if ring.served and not ring.broken and self.model.live:
                if events:
                    asks = number(self._read, place.used + 4 + 8 * place.size, 2) == ring.last
                else:
                    asks = number(self._read, place.used, 2) == 0
                if not asks:
                    self.fail("rot", "a queue was served and its next buffer would not be told of")

    def _check_state(self) -> None:
        model, device = self.model, self.device
        status = model.status | (NEEDS_RESET if model.needs_reset else 0)
        said = self.call("status", True, device.status)
        if said != status:
            self.fail("rot", "the status is not what was written and broken", f"{said:#x}, not {status:#x}")
        space = self.call("a read of the configuration space", True, device.read_config, 0, 16)
        if space != model.config():
            what = "the configuration space does not hold what was written to it"
            self.fail("rot", what, f"{space.hex()}, not {model.config().hex()}")
        for index in range(6):
            role = model.role(index)
            most = self.call("queue_size_max", True, device.queue_size_max, index)
            if most != (0 if role is None else model.sizes[role]):
                self.fail("rot", "a queue has not the number that the features give it", f"queue {index}")


Operation = Callable[..., None]
OPERATIONS: Final[dict[str, Operation]] = {}
"""What a step may be, by name; `wire_device_steps` fills it."""


WRITES: Final[set[str]] = set()
"""Those steps in which the guest only writes to its memory: nobody can have done anything wrong."""


def operation(function: Operation) -> Operation:
    """Make a function of a world and integers a step of its own name."""
    OPERATIONS[function.__name__] = function
    return function


def guest_write(function: Operation) -> Operation:
    """Make it a step that does not call the device."""
    WRITES.add(function.__name__)
    return operation(function)


def layout_of(world: DeviceWorld, place: Place) -> RingLayout | None:
    """Have a place checked by the product; it must agree with the text of the specification."""
    problem = place.problem(world.model.space)
    made = world.call(
        "a ring layout",
        not problem,
        RingLayout.validated,
        world.memory,
        place.size,
        place.desc,
        place.avail,
        place.used,
    )
    return None if made is None else made
