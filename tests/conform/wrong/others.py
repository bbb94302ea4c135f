# SPDX-License-Identifier: GPL-2.0-only
"""Wrong on the statistics, hint and reporting queues, and in the configuration space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hostzero.device import BalloonDevice
from hostzero.device.hint import HintStatus
from hostzero.device.state import QueueHandler
from hostzero.errors import DeviceError
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.virtio.balloon import StatTag, unpack_stats
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import QueueRole
from hostzero.virtio.ring_layout import Segment
from hostzero.virtio.transport import Status
from tests.conform.wrong.balloon import keeps
from tests.conform.wrong.device import Make, WrongDevice, answering, configured, patched

Right = BalloonDevice
STATS, HINT, REPORTING = QueueRole.STATS, QueueRole.FREE_PAGE, QueueRole.REPORTING

# ------------------------------------------------------------------ statistics


@answering(STATS)
def returns_at_once(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    inner.handle(chain)
    device._stats.take_held()
    return 0


never_asks = patched(request_stats=lambda self: False)
asks_with_a_length: Make


def _asks_with_a_length(self: WrongDevice) -> bool:
    server = self.server(STATS)
    head = self._stats.take_held()
    if head is None:
        return False
    self.any_length(STATS, head)
    server.queue.push(head, 10)
    server.queue.flush()
    return True


asks_with_a_length = patched(request_stats=_asks_with_a_length)
asks_20_times = patched(
    request_stats=lambda self: self.metrics.stats_updates <= 20 and Right.request_stats(self)
)


def reading(read: Callable[[list[tuple[int, int]], dict[StatTag, int]], dict[StatTag, int]]) -> Make:
    """Reads statistics in another way: gets the entries and the latest figures."""

    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        before = dict(device._stats.latest)
        kept = inner.handle(chain)
        device._stats.latest = read(unpack_stats(chain.read(4096)), before)
        return kept

    return answering(STATS)(answer)


def _up_to_unknown(entries: list[tuple[int, int]], _: dict[StatTag, int]) -> dict[StatTag, int]:
    found = {}
    for tag, value in entries:
        if tag not in set(StatTag):
            break
        found[StatTag(tag)] = value
    return found


big_endian = reading(
    lambda entries, _: {
        StatTag(t): int.from_bytes(v.to_bytes(8, "little"), "big") for t, v in entries if t < 16
    }
)
by_position = reading(lambda entries, _: {StatTag(n): value for n, (_, value) in enumerate(entries[:16])})
up_to_unknown = reading(_up_to_unknown)
first_figures = reading(lambda entries, before: before or {StatTag(t): v for t, v in entries if t < 16})


@answering(STATS)
def keeps_every_buffer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    try:
        inner.handle(chain)
    except DeviceError:
        return None
    return None


@answering(STATS, HINT, REPORTING)
def whole_length(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    """Returns the length of what could be written, whatever was done."""
    try:
        kept = inner.handle(chain) is None
    except DeviceError:
        kept = False
    return None if kept else chain.writable_len


# ------------------------------------------------------------------ hinting

idle_id = patched(read_config=lambda self, offset, length: _with_cmd_id(self, 5)[offset : offset + length])


def _with_cmd_id(device: BalloonDevice, cmd_id: int) -> bytes:
    data = bytearray(Right.read_config(device, 0, 16))
    data[8:12] = cmd_id.to_bytes(4, "little")
    return bytes(data)


never_starts = patched(hint_start=lambda self: 0)
starts_untold = patched(hint_start=lambda self: self._hint.start())
never_stops = patched(hint_stop=lambda self: None)
never_done = patched(hint_done=lambda self: None)


class OneId(WrongDevice):
    def hint_start(self) -> int:
        self._hint._run = 1
        return super().hint_start()


silent_about_pages = keeps(HINT, lambda _, chain: bool(chain.writable))
keeps_other_ids = keeps(HINT, lambda _, chain: bool(chain.readable) and chain.readable_len != 4)


@answering(HINT)
def drops_every_hint(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    for gpa, length in chain.writable:
        device.zap(gpa >> PAGE_SHIFT, length >> PAGE_SHIFT)
    return inner.handle(chain)


class DropsAnyId(WrongDevice):
    """Drops hints as soon as any id was sent, until its own run ends."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory, dataclasses.replace(configured()(memory).config, discard_hints=True))

    def poll(self) -> None:
        self._hint.status = HintStatus.STARTED


drops_hints = configured(discard_hints=True)

# ------------------------------------------------------------------ reporting

silent_reporting = keeps(REPORTING, lambda *_: True)
short_report_chains = keeps(REPORTING, lambda _, chain: len(chain.writable) > 8)


@answering(REPORTING)
def claims_without_dropping(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    # MADV_DONTNEED on shared memory: returns 0, and the bytes are still there.
    return chain.writable_len


class Inhibited(WrongDevice):
    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self.inhibit_discard("postcopy")


def dropping(change: Callable[[int, int], tuple[int, int]]) -> Make:
    """Drops another range than the one that was named."""

    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        for gpa, length in chain.writable:
            first, end = change(gpa, length)
            device.zap(first >> PAGE_SHIFT, end - first >> PAGE_SHIFT)
        return 0

    return answering(REPORTING)(answer)


one_page_too_far = dropping(lambda gpa, length: (gpa, gpa + length + PAGE_SIZE))
rounds_out = dropping(
    lambda gpa, length: (gpa & -PAGE_SIZE, (gpa + length + PAGE_SIZE - 1) & -PAGE_SIZE),
)


@answering(REPORTING)
def drops_what_it_may_only_read(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    for gpa, length in chain.readable:
        device.zap(gpa >> PAGE_SHIFT, length >> PAGE_SHIFT)
    return 0


def report_length(change: Callable[[WrongDevice, Chain, int], int]) -> Make:
    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        used_len = inner.handle(chain)
        return None if used_len is None else change(device, chain, used_len)

    return answering(REPORTING)(answer)


half_the_length = report_length(lambda device, chain, used_len: used_len // 2)
one_byte_the_second_time = report_length(
    lambda device, chain, used_len: used_len if device.metrics.reporting.requests == 1 else 1
)


@answering(REPORTING)
def sums_up(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    metrics = device.metrics.reporting
    return sum(
        segment.length
        for segment in chain.writable
        if device._state.discarder.discard_segment(segment, device._state.rings, metrics)
    )


@answering(REPORTING)
def rounds_length_up(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    # As a page-wise loop that counts pages it has touched.
    for gpa, length in chain.writable:
        device.zap(gpa + PAGE_SIZE - 1 >> PAGE_SHIFT, length >> PAGE_SHIFT)
    return chain.writable_len


def _of_the_first() -> Make:
    def make(memory: GuestMemory) -> BalloonDevice:
        proven: list[bool] = []

        def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
            proven.append(bool(inner.handle(chain)))
            return chain.writable_len if proven[0] else 0

        return answering(REPORTING)(answer)(memory)

    return make


answers_as_for_the_first = _of_the_first()


class BringsTheFileBack(WrongDevice):
    """Drops pages of a private file mapping: the file's bytes come back."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        state = self._state

        def discard_segment(segment: Segment, rings: Any, metrics: Any) -> bool:
            del rings, metrics
            memory.write(segment.gpa, b"\x7fELF")
            return True

        state.discarder.discard_segment = discard_segment  # type: ignore[method-assign]


@answering(QueueRole.FREE_PAGE)
def claims_hints(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    inner.handle(chain)
    return chain.writable_len


@answering(REPORTING)
def clamps_and_claims(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    inner.handle(chain)
    return chain.writable_len


class Clamps(WrongDevice):
    """Cuts a range at the end of RAM and then claims all of it."""

    def notify(self, index: int) -> None:
        server = self._queues[index]
        if server.role is REPORTING:
            layout = server.queue.layout
            gpa = int.from_bytes(self.memory.read(layout.desc, 8), "little")
            length = int.from_bytes(self.memory.read(Gpa(layout.desc + 8), 4), "little")
            if self.memory.contains(Gpa(gpa), 1) and not self.memory.contains(Gpa(gpa), length):
                self.zap(gpa >> PAGE_SHIFT)
                server.queue._popped[0] = server.queue._popped.get(0) or _popped(length)
                server.queue.push(0, length)
                server.queue.flush()
                return
        super().notify(index)


def _popped(length: int) -> Any:
    from hostzero.virtio.device_queue import _Popped

    return _Popped(0, length)


@answering(REPORTING)
def report_ignores_poison(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    value, device._state.space.poison_val = device._state.space.poison_val, 0
    try:
        return inner.handle(chain)
    finally:
        device._state.space.poison_val = value


@answering(REPORTING)
def poison_unasked(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    return 0 if device._state.space.poison_val else inner.handle(chain)


class PoisonUnasked(WrongDevice):
    """Heeds poison_val of a driver that did not accept the feature."""

    def write_config(self, offset: int, data: bytes) -> None:
        self._state.space.write(offset, data, poison_writable=True)
        if self._state.space.poison_val:
            self.inhibit_discard("poison")


class KeepsPoison(WrongDevice):
    def reset(self) -> None:
        value = self._state.space.poison_val
        super().reset()
        self._state.space.poison_val = value


# ------------------------------------------------------------------ configuration space


class NoEarlyConfig(WrongDevice):
    def read_config(self, offset: int, length: int) -> bytes:
        if not self._status & Status.FEATURES_OK:
            raise DeviceError("not yet")
        return super().read_config(offset, length)


from_the_start = patched(read_config=lambda self, offset, length: Right.read_config(self, 0, 16)[:length])
drops_writes = patched(write_config=lambda self, offset, data: None)


class DiesOfActual(WrongDevice):
    def write_config(self, offset: int, data: bytes) -> None:
        super().write_config(offset, data)
        self.dead = self.actual > 1 << 24
        self.check_alive()


class TakesEverything(WrongDevice):
    """Takes every field of a write."""

    cmd_id: bytes | None = None

    def write_config(self, offset: int, data: bytes) -> None:
        super().write_config(offset, data)
        space = bytearray(super().read_config(0, 16))
        space[offset : offset + len(data)] = data
        self._state.space.num_pages = int.from_bytes(space[:4], "little")
        self.cmd_id = bytes(space[8:12])

    def read_config(self, offset: int, length: int) -> bytes:
        space = bytearray(super().read_config(0, 16))
        space[8:12] = self.cmd_id or space[8:12]
        return bytes(space[offset : offset + length])


class BigEndianTarget(WrongDevice):
    def set_target(self, pages: int) -> None:
        super().set_target(0)
        self._state.space.num_pages = int.from_bytes(pages.to_bytes(4, "little"), "big")


tells_nobody = patched(_announce_config=lambda self: None)


class TargetStartsAtZero(WrongDevice):
    def set_status(self, status: int) -> None:
        super().set_status(status)
        if status & Status.DRIVER_OK:
            self._state.space.num_pages = 0


class TargetGoesWithReset(WrongDevice):
    def reset(self) -> None:
        super().reset()
        self._state.space.num_pages = 0


class ConfigWraps(WrongDevice):
    def write_config(self, offset: int, data: bytes) -> None:
        super().write_config(4 if offset >= 16 else offset, data)


# ------------------------------------------------------------------ notifications


def interrupting(change: Callable[[WrongDevice, Callable[[], None]], Callable[[], None]]) -> Make:
    def setup_queue(
        self: WrongDevice, index: int, layout: Any, interrupt: Callable[[], None], **more: Any
    ) -> None:
        Right.setup_queue(self, index, layout, change(self, interrupt), **more)

    return patched(setup_queue=setup_queue)


never_interrupts = interrupting(lambda device, interrupt: lambda: None)


class AlwaysInterrupts(WrongDevice):
    def setup_queue(self, index: int, layout: Any, interrupt: Callable[[], None], **more: Any) -> None:
        super().setup_queue(index, layout, interrupt, **more)
        queue = self._queues[index].queue
        flush = queue.flush

        def always() -> bool:
            fresh = queue.used_idx != queue._flushed
            told = flush()
            if fresh and not told:
                interrupt()
            return told

        queue.flush = always  # type: ignore[method-assign]


class HeedsFlags(WrongDevice):
    """With EVENT_IDX, too, flags keep it quiet."""

    def setup_queue(self, index: int, layout: Any, interrupt: Callable[[], None], **more: Any) -> None:
        def unless_told() -> None:
            if not self.memory.read(layout.avail, 1)[0] & 1:
                interrupt()

        super().setup_queue(index, layout, unless_told, **more)


def after_serving(change: Callable[[WrongDevice, Any], None]) -> Make:
    def notify(self: WrongDevice, index: int) -> None:
        WrongDevice.notify(self, index)
        change(self, self._queues[index].queue)

    return patched(notify=notify)


strange_used_flags = after_serving(lambda device, queue: device.memory.write(queue.layout.used, b"\x02\0"))
no_notify_with_event = after_serving(lambda device, queue: device.memory.write(queue.layout.used, b"\x01\0"))
never_wants_to_know = no_notify_with_event
wants_to_know_late = after_serving(
    lambda device, queue: device.memory.write(
        Gpa(queue.layout.used + 4 + 8 * queue.layout.size),
        (queue.last_avail + 100 & 0xFFFF).to_bytes(2, "little"),
    )
)

# ------------------------------------------------------------------ devices that die


class DiesOfMalformed(WrongDevice):
    """A panic at the first request that breaks a rule."""

    def notify(self, index: int) -> None:
        bad = self.metrics.malformed + self.metrics.broken_queues
        BalloonDevice.notify(self, index)
        self.dead = self.metrics.malformed + self.metrics.broken_queues > bad
        self.check_alive()


def dies_if(when: Callable[[WrongDevice, Any], bool]) -> Make:
    """A panic at a notification; gets the queue's layout."""

    def notify(self: WrongDevice, index: int) -> None:
        self.dead = when(self, self._queues[index].queue)
        WrongDevice.notify(self, index)

    return patched(notify=notify)


def _descriptors(device: WrongDevice, queue: Any) -> list[tuple[int, int, int]]:
    data = device.memory.read(queue.layout.desc, 16 * queue.layout.size)
    found = []
    for at in range(0, len(data), 16):
        gpa, length, flags = (
            int.from_bytes(data[at + low : at + high], "little") for low, high in ((0, 8), (8, 12), (12, 14))
        )
        if gpa or flags:
            found.append((gpa, length, flags))
    return found


dies_of_empty_descriptors = dies_if(
    lambda device, queue: any(not length for _, length, _ in _descriptors(device, queue))
)
dies_of_unknown_flags = dies_if(
    lambda device, queue: any(flags > 7 for _, _, flags in _descriptors(device, queue))
)
dies_of_odd_lengths = dies_if(
    lambda device, queue: (
        queue is device.server(QueueRole.STATS).queue
        and any(length % 10 or length > 400 for _, length, _ in _descriptors(device, queue))
    )
)
dies_of_its_own_ring = dies_if(
    lambda device, queue: any(gpa == queue.layout.desc for gpa, _, _ in _descriptors(device, queue))
)
dies_of_nothing_to_do = dies_if(
    lambda device, queue: (
        int.from_bytes(device.memory.read(Gpa(queue.layout.avail + 2), 2), "little") == queue.last_avail
    )
)
dies_of_far_events = dies_if(
    lambda device, queue: (
        int.from_bytes(device.memory.read(Gpa(queue.layout.avail + 4 + 2 * queue.layout.size), 2), "little")
        > 0x7FFF
    )
)
