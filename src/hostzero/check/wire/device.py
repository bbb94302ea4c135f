# SPDX-License-Identifier: GPL-2.0-only
"""A hostile guest in front of a balloon device: one step done, everything that must hold checked.

`DeviceWorld` has a real device over a small guest memory (`wire_shadow`). Steps are what a guest,
or its host's user, can do. A shadow holds every byte as it must be. After each step, and at each
interrupt in the middle of one:

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

from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn

from hostzero.check.violation import Kind, Violated, Violation
from hostzero.check.wire import wire_rings
from hostzero.check.wire.bounds import TakesForEver, bounded
from hostzero.check.wire.device_answers import Answers
from hostzero.check.wire.device_model import (
    EVENT_IDX,
    HINT,
    INFLATE,
    NEEDS_RESET,
    PAGE,
    REPORT,
    STATS,
    VERSION_1,
    DeviceModel,
    Request,
    Ring,
)
from hostzero.check.wire.device_repertoire import OPERATIONS, WRITES
from hostzero.check.wire.shadow import ShadowedMemory
from hostzero.check.wire.wire_rings import SEGMENT, Place, gather, number, overlap
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.errors import DeviceError, RingError, UsageError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.features import Feature, QueueRole

QUEUE_SIZES: Final = {INFLATE: 8, "deflate": 4, STATS: 2, HINT: 16, REPORT: 32}
"""All different, so that a queue that took another's number is seen."""

HISTORY: Final = 12


class _Answered(NamedTuple):
    ring: Ring
    request: Request
    length: int
    dropped: set[int]  # pages that may have gone for it


class DeviceWorld:
    """One device, one guest, and the model that judges them."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Make the device that `setup` describes.

        It names what is offered, the backing, granule, shape and proves of `ShadowedMemory`, and
        discard_hints.
        """
        shape, proves = int(setup.get("shape", 0)), bool(setup.get("proves", 1))
        self.ram = ShadowedMemory(setup["backing"], int(setup["granule"]), shape, proves=proves)
        self.memory = self.ram.memory
        self.memory.contains = self._contains  # type: ignore[method-assign]
        self._race: list[int] = []
        self._taken: tuple[Request, bytes] | None = None
        offered = int(setup["offered"])
        hints = bool(setup["discard_hints"])
        sizes_by_role = dict(QUEUE_SIZES)
        self.model = DeviceModel(self.ram.space, offered | VERSION_1, sizes_by_role, self.ram.granule, hints)
        sizes = {QueueRole(role): size for role, size in QUEUE_SIZES.items()}
        config = DeviceConfig(features=Feature(offered), queue_sizes=sizes, discard_hints=hints)
        self.device = BalloonDevice(self.memory, config)
        self.device.on_config_change(self._on_config)
        self._answers = Answers(self.model, self.ram, self.fail)
        self.violation: Violation | None = None
        self.done: list[list[Any]] = []
        self._config_changes = 0
        self._interrupted: set[int] = set()
        self._at_interrupt = [0, 0, 0]
        self._avail: dict[int, int] = {}
        self.stopped: dict[int, Ring] = {}

    def close(self) -> None:
        """Give the memory back."""
        self.device.reset()
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
        self.ram.discard_failed = False
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
        self.settle(final=True)
        self._check_notifications(before)
        self._check_state()

    # ------------------------------------------------------------------ what the guest writes

    def write(self, gpa: int, data: bytes) -> None:
        """Write as the guest; outside its memory nothing is written.

        The index of a used ring in use is left alone: the checks tell by it what came back.
        """
        indices = [(ring.place.used + 2, 2) for ring in self.model.rings.values()]
        if not overlap([(gpa, len(data))], indices):
            self.ram.write(gpa, data)

    def write_around(self, gpa: int, data: bytes) -> None:
        """Write as the guest, but leave the rings in use as they are."""
        taken = sorted(part for ring in self.model.rings.values() for part in ring.place.parts())
        at = gpa
        for start, length in [*taken, (gpa + len(data), 0)]:
            if start > at:
                self.write(at, data[at - gpa : min(start - gpa, len(data))])
            at = max(at, start + length)

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

    def plan_interrupt(self, action: int, index: int, head: int, *, but: int = 0) -> None:
        """Do something at the next interrupt; see the step `at_interrupt`. A planned action `but` stays."""
        if not but or self._at_interrupt[0] != but:
            self._at_interrupt = [action, index, head]

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

    def expect(self, ring: Ring, most: int = 1 << 16) -> int:
        """Take down what the device finds when it looks at a ring; return how many requests, up to `most`."""
        ring.served = True
        for found in range(most):
            place = ring.place
            ahead = (number(self.ram.read, place.avail + 2, 2) - ring.last) & 0xFFFF
            if ring.broken or not ahead:
                return found
            head = number(self.ram.read, place.avail_entry(ring.last), 2)
            taken = ring.held is not None and ring.held.parsed.head == head
            if ahead > place.size or head >= place.size or taken:
                ring.broken = True
                if ring.role == "deflate":
                    self.model.balloon = set()
                return found
            ring.last = (ring.last + 1) & 0xFFFF
            parsed = wire_rings.parse_chain(self.ram.read, self.model.space, place, head)
            request = Request(ring.role, parsed)
            good = not parsed.bad and bool(parsed.readable) and not parsed.writable
            if ring.role == STATS and ring.held is None and good:
                ring.held, ring.held_at = request, (ring.last - 1) & 0xFFFF
                self._taken = request, gather(self.ram.read, parsed.readable, 2560)
                self.model.take_figures(self._taken[1])
            else:
                ring.waiting.append(request)
        return most

    def plan_race(self, which: int, addr: int, length: int) -> None:
        """Rewrite a descriptor just after the device has read it; see the step `race`."""
        self._race = [max(which, 0), addr & (1 << 64) - 1, length & 0xFFFF_FFFF]

    def _contains(self, gpa: Gpa, length: int) -> bool:
        # The device asks for a range that it has just read from a descriptor. A guest on another
        # CPU writes now. The device must go on with what it read, so nothing else is expected of
        # it; which is known only of one good request, each of whose descriptors it reads once.
        waiting = [(ring, each) for ring in self.model.rings.values() for each in ring.waiting]
        if self._race and len(waiting) == 1 and not waiting[0][1].parsed.bad:
            which, addr, more = self._race
            self._race[0] -= 1
            if not which:
                self._race = []
                place = waiting[0][0].place
                table = range(place.desc, place.desc + 16 * place.size, 16)
                read = self.ram.read
                same = [at for at in table if (number(read, at, 8), number(read, at + 8, 4)) == (gpa, length)]
                if len(same) == 1:
                    self.ram.write(same[0], addr.to_bytes(8, "little") + more.to_bytes(4, "little"))
        return GuestMemory.contains(self.memory, gpa, length)

    def _on_config(self) -> None:
        self._config_changes += 1

    def interrupt(self, index: int) -> None:
        """Be the driver's interrupt of a queue: look at what came back, then do what is planned."""
        self._interrupted.add(index)
        if self.violation is not None:
            return
        try:
            ring = self.model.rings.get(index)
            if ring is None:
                self.settle(final=False)
                return
            place = ring.place
            if self.model.acked & EVENT_IDX:
                event_at = place.avail + 4 + 2 * place.size
                # It had asked to be told of the very next entry, and as a good driver does so again.
                asked = number(self.ram.read, event_at, 2) == ring.used
                self.settle(final=False, told=place.used if asked else -1)
                self.write(event_at, ring.used.to_bytes(2, "little"))
            else:
                asked = not number(self.ram.read, place.avail, 2) & 1
                self.settle(final=False, told=place.used if asked else -1)
        except Violated:
            return
        action, other, head = self._at_interrupt
        self._at_interrupt = [0, 0, 0]
        if action == 1:
            self.device.reset()
            self.model.reset()
        elif action == 2 and other in self.model.rings:
            ring = self.model.rings[other]
            published = number(self.ram.read, ring.place.avail + 2, 2)
            # An entry that the device has not come to is left alone: nobody knows which it would read.
            if published == self._avail.get(other, 0) and len(ring.waiting) < ring.place.size:
                self.offer(other, head)
        if action in {2, 3} and other in self.model.rings and self.model.live:
            self.expect(self.model.rings[other])
            self.device.notify(other)

    # ------------------------------------------------------------------ what must hold

    def settle(self, *, final: bool, told: int = -1) -> None:
        """Judge what came back and what changed since the last time; `final`: nothing more may come.

        `told` is the used ring, if any, of which each publication has brought an interrupt: what
        is new there was published at once, and all of it had to be true at this moment.
        """
        rings = self.model.rings
        changed = self.ram.changed()
        answered: list[_Answered] = []
        allowed: list[SEGMENT] = []
        pages: set[int] = set()
        reads = [self.ram.read_before, self.ram.read] if changed.size else [self.ram.read]
        for index, ring in list(rings.items()):
            place = ring.place
            count = (number(self.ram.read, place.used + 2, 2) - ring.used) & 0xFFFF
            if count > len(ring.waiting):
                self.fail("rot", "a used index moves by more than the requests that wait", f"queue {index}")
            allowed += [(place.used, 4), (place.used + 4 + 8 * place.size, 2)]
            balloon, hints = self.model.balloon, self.model.hints
            for at, request in enumerate(ring.waiting):
                if at == count:
                    # What comes after has perhaps begun, but is not done.
                    balloon, hints = self.model.balloon, self.model.hints
                entry = place.used_entry(ring.used + at)
                allowed.append((entry, 8))
                change = self.model.may_change(request, reads)
                pages |= change.pages
                allowed += change.written
                if at < count:
                    head, length = number(self.ram.read, entry, 4), number(self.ram.read, entry + 4, 4)
                    if head != request.parsed.head:
                        self.fail("rot", "a used entry names another head than the one that is due")
                    answered.append(_Answered(ring, request, length, change.pages))
            if count < len(ring.waiting):
                self.model.balloon, self.model.hints = balloon, hints
            ring.used = (ring.used + count) & 0xFFFF
            ring.waiting = ring.waiting[count:]
            if final and ring.waiting:
                self.fail("rot", "a request does not come back", f"queue {index}: {ring.waiting[0]}")
        self._answers.check_bytes(changed, pages, allowed)
        for at, one in enumerate(answered):
            behind = answered[at + 1 :]
            later = [
                part
                for other in behind
                if other.ring.place.used != told
                for part in self._answers.writes(other.request)
            ]
            gone = [(page * PAGE, PAGE) for other in behind for page in other.dropped]
            self._answers.check(one.request, one.length, later, gone)
        self.ram.accept(changed)

    def _check_notifications(self, before: list[tuple[Ring, int]]) -> None:
        for index, ring in self.model.rings.items():
            place = ring.place
            old = next((used for each, used in before if each is ring), ring.used)
            events = self.model.acked & EVENT_IDX
            event_at = place.avail + 4 + 2 * place.size
            if old != ring.used and index not in self._interrupted:
                if events:
                    event = number(self.ram.read, event_at, 2)
                    wanted = wire_rings.passed(event, ring.used, old)
                else:
                    wanted = not number(self.ram.read, place.avail, 2) & 1
                if wanted:
                    self.fail("rot", "requests come back and the driver is not told", f"queue {index}")
            if ring.served and not ring.broken and self.model.live:
                if events:
                    asks = number(self.ram.read, place.used + 4 + 8 * place.size, 2) == ring.last
                else:
                    asks = number(self.ram.read, place.used, 2) == 0
                if not asks:
                    self.fail("rot", "a queue was served and its next buffer would not be told of")

    def _check_state(self) -> None:
        model, device = self.model, self.device
        status = model.status | (NEEDS_RESET if model.needs_reset else 0)
        said = self.call("status", True, device.status)
        if said != status:
            self.fail("rot", "the status is not what was written and broken", f"{said:#x}, not {status:#x}")
        space = self.call("a read of the configuration space", True, device.read_config, 0, 16)
        model.learn(int.from_bytes(space[8:12], "little"))
        if space != model.config():
            what = "the configuration space does not hold what was written to it"
            self.fail("rot", what, f"{space.hex()}, not {model.config().hex()}")
        for index in range(6):
            role = model.role(index)
            most = self.call("queue_size_max", True, device.queue_size_max, index)
            if most != (0 if role is None else model.sizes[role]):
                self.fail("rot", "a queue has not the number that the features give it", f"queue {index}")
        figures = {int(tag): value for tag, value in device.stats.items()}
        taken, self._taken = self._taken, None
        if taken is not None and gather(self.ram.read, taken[0].parsed.readable, 2560) != taken[1]:
            # An answer of another queue lies in the buffer; nobody says which was first.
            model.figures = figures
        says = (device.target, device.actual, device.poison_val, int(device.acked), device.live, figures)
        known = (model.target, model.actual, model.poison, model.acked, model.live, model.figures)
        if says != known:
            self.fail("rot", "the device does not tell its host what the guest said", f"{says}, not {known}")
        for queue in device.metrics.queues.values():
            if queue.claimed_zero_bytes > queue.proven_zero_bytes:
                self.fail("corruption", "the device counts more bytes claimed than proven to be zero")
        for index, ring in model.rings.items():
            if self.call("last_avail", True, device.last_avail, index) != ring.last:
                self.fail("rot", "a queue would not be resumed where it stopped", f"queue {index}")
