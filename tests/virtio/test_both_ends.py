# SPDX-License-Identifier: GPL-2.0-only
"""Driver end against device end through bytes in guest RAM, beside a model of Python lists.

The model knows what is on its way in each direction, who waits to be told, and every byte of
guest memory outside the ring. Each token must come back exactly once, with the length that was
pushed; whoever waits must be told; and no byte may change that nobody was asked to change.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostzero.errors import RingError
from hostzero.ram import open_ram
from hostzero.units import Gpa
from hostzero.virtio import Chain, DeviceQueue, DriverQueue, RingLayout, Segment, ring_bytes
from tests.virtio.memory import BUFFERS, LOW, RING, split_memory

SLOT = 64
"""Bytes between two buffers; each is shorter, so that a guard of untouched bytes follows it."""

START_INDICES = st.one_of(st.just(0), st.integers(65520, 65535), st.integers(0, 65535))


@dataclass
class Request:
    """What the model knows of one request."""

    token: int
    out: list[Segment]
    in_: list[Segment]
    data: bytes
    chain: Chain | None = None
    used_len: int = -1


class BothEnds(RuleBasedStateMachine):
    """Add, kick, pop, push, flush and collect in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ram = open_ram(2 << 20)
        self.memory = split_memory(self.ram)
        self.told_device = 0
        self.told_driver = 0
        self.tokens = itertools.count()
        # A request moves from list to list; afterwards it is in `done`.
        self.added: list[Request] = []
        self.available: list[Request] = []
        self.popped: list[Request] = []
        self.pushed: list[Request] = []
        self.used: list[Request] = []
        self.done: list[int] = []
        # Both ends start out waiting to be told of the first entry.
        self.device_waits = True
        self.device_refuses = False
        self.driver_waits = True

    @initialize(size=st.sampled_from([1, 2, 4, 8]), event_idx=st.booleans(), start=START_INDICES)
    def set_up(self, size: int, event_idx: bool, start: int) -> None:
        self.size, self.event_idx = size, event_idx
        self.ram.buffer[:LOW] = b"\xee" * LOW
        self.layout = RingLayout.contiguous(self.memory, size, RING)
        self.ring_end = self.layout.used + ring_bytes(size)[2]
        self.driver = DriverQueue(
            self.memory, self.layout, event_idx=event_idx, notify=self.notify, start_index=start
        )
        self.device = DeviceQueue(
            self.memory, self.layout, event_idx=event_idx, interrupt=self.interrupt, start_index=start
        )
        self.expected = bytearray(self.ram.buffer[self.ring_end : 2 * LOW])
        self.used_ring = self.read_used_ring()
        self.driver_parts = self.read_driver_parts()

    def notify(self) -> None:
        self.told_device += 1

    def interrupt(self) -> None:
        self.told_driver += 1

    def read_driver_parts(self) -> bytes:
        desc_bytes, avail_bytes, _ = ring_bytes(self.size)
        return self.memory.read(self.layout.desc, desc_bytes) + self.memory.read(
            self.layout.avail, avail_bytes
        )

    def read_used_ring(self) -> bytes:
        return self.memory.read(self.layout.used, ring_bytes(self.size)[2])

    def everywhere(self) -> list[Request]:
        return [*self.added, *self.available, *self.popped, *self.pushed, *self.used]

    def fill(self, segment: Segment, data: bytes) -> None:
        """Note in the model that a segment's bytes change."""
        at = segment.gpa - self.ring_end
        self.expected[at : at + len(data)] = data

    @rule(
        out=st.lists(st.integers(1, SLOT - 8), max_size=3),
        in_=st.lists(st.integers(1, SLOT - 8), max_size=3),
    )
    def add(self, out: list[int], in_: list[int]) -> None:
        occupied = {segment.gpa for request in self.everywhere() for segment in (*request.out, *request.in_)}
        places = (Gpa(at) for at in range(BUFFERS, LOW, SLOT) if at not in occupied)
        segments = [Segment(next(places), length) for length in (*out, *in_)]
        token = next(self.tokens)
        data = b"".join(bytes([(token + n) % 251]) * length for n, length in enumerate(out))
        request = Request(token, segments[: len(out)], segments[len(out) :], data)
        taken = sum(len(other.out) + len(other.in_) for other in self.everywhere())
        assert self.driver.num_free == self.size - taken
        if not segments or len(segments) > self.size - taken:
            with pytest.raises(RingError, match="ring full" if segments else "at least one segment"):
                self.driver.add(request.out, request.in_, token)
            return
        rest = data
        for segment in request.out:
            self.memory.write(segment.gpa, rest[: segment.length])
            self.fill(segment, rest[: segment.length])
            rest = rest[segment.length :]
        self.driver.add(request.out, request.in_, token)
        self.added.append(request)
        self.driver_parts = self.read_driver_parts()

    @rule()
    def kick(self) -> None:
        before = self.told_device
        told = self.driver.kick()
        if self.event_idx:
            expected = bool(self.added) and self.device_waits
        else:
            expected = bool(self.added) and not self.device_refuses
        assert told is expected
        assert self.told_device == before + expected
        if self.added:
            self.device_waits = False
        self.available += self.added
        self.added.clear()
        self.driver_parts = self.read_driver_parts()

    @rule()
    def pop(self) -> None:
        item = self.device.pop()
        if self.available:
            request = self.available.pop(0)
            assert isinstance(item, Chain)
            assert (list(item.readable), list(item.writable)) == (request.out, request.in_)
            assert item.read(1 << 20) == request.data
            request.chain = item
            self.popped.append(request)
        else:
            assert item is None
            self.device_waits, self.device_refuses = True, False
        self.used_ring = self.read_used_ring()

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        request = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        chain = request.chain
        assert chain is not None
        request.used_len = data.draw(st.integers(0, chain.writable_len))
        written = bytes([request.token % 251 + 1]) * request.used_len
        assert chain.write(written) == request.used_len
        rest = written
        for segment in request.in_:
            self.fill(segment, rest[: segment.length])
            rest = rest[segment.length :]
        self.device.push(chain.head, request.used_len)
        with pytest.raises(RingError, match="not in flight"):
            self.device.push(chain.head, request.used_len)
        self.pushed.append(request)
        self.used_ring = self.read_used_ring()

    @rule()
    def flush(self) -> None:
        before = self.told_driver
        expected = bool(self.pushed) and (self.driver_waits or not self.event_idx)
        assert self.device.flush() is expected
        assert self.told_driver == before + expected
        if self.pushed:
            self.driver_waits = False
        self.used += self.pushed
        self.pushed.clear()
        self.used_ring = self.read_used_ring()

    @rule()
    def collect(self) -> None:
        assert self.driver.collect() == [(request.token, request.used_len) for request in self.used]
        self.done += [request.token for request in self.used]
        self.used.clear()
        self.driver_waits = True
        self.driver_parts = self.read_driver_parts()

    @rule()
    def disable_notifications(self) -> None:
        self.device.disable_notifications()
        self.device_refuses = not self.event_idx
        self.used_ring = self.read_used_ring()

    @rule()
    def enable_notifications(self) -> None:
        assert self.device.enable_notifications() is bool(self.available)
        # With the event index, an entry that is there already is the one asked for: it came
        # before the request, so the next one is not told of.
        self.device_waits, self.device_refuses = not self.available, False
        self.used_ring = self.read_used_ring()

    @invariant()
    def nothing_else_changed(self) -> None:
        """Each rule refreshes the part of its own end only."""
        assert self.ram.buffer[self.ring_end : 2 * LOW] == self.expected
        assert self.read_driver_parts() == self.driver_parts
        assert self.read_used_ring() == self.used_ring

    @invariant()
    def both_ends_count_alike(self) -> None:
        assert self.driver.in_flight == len(self.everywhere())
        assert self.device.in_flight == len(self.popped)

    def teardown(self) -> None:
        try:
            if hasattr(self, "driver"):
                self.drain()
        finally:
            self.ram.close()

    def drain(self) -> None:
        """Let everything come home."""
        self.kick()
        while self.available:
            self.pop()
        while self.popped:
            request = self.popped.pop()
            assert request.chain is not None
            request.used_len = 0
            self.device.push(request.chain.head, 0)
            self.pushed.append(request)
        self.flush()
        self.collect()
        assert len(self.done) == len(set(self.done))
        assert self.everywhere() == []
        assert (self.driver.num_free, self.driver.in_flight, self.device.in_flight) == (self.size, 0, 0)
        assert self.device.pop() is None


TestBothEnds = BothEnds.TestCase
TestBothEnds.settings = settings(max_examples=40, stateful_step_count=50)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("serve_first", [False, True])
@given(start=START_INDICES, size=st.sampled_from([1, 2, 8]), batches=st.lists(st.integers(1, 8), max_size=20))
def test_one_process_with_everything_synchronous(
    event_idx: bool, serve_first: bool, start: int, size: int, batches: list[int]
) -> None:
    """The device runs inside kick, and the driver's interrupt inside flush.

    With `serve_first` the device flushes after each request, so that the driver comes back in
    the middle of a batch; else it flushes once at the end.
    """
    with open_ram(2 << 20) as ram:
        memory = split_memory(ram)
        layout = RingLayout.contiguous(memory, size, RING)
        collected: list[tuple[object, int]] = []

        def serve() -> None:
            while (item := device.pop()) is not None:
                assert isinstance(item, Chain)
                device.push(item.head, item.write(item.read(64)))
                if serve_first:
                    device.flush()
            device.flush()

        driver = DriverQueue(memory, layout, event_idx=event_idx, notify=serve, start_index=start)
        device = DeviceQueue(
            memory,
            layout,
            event_idx=event_idx,
            interrupt=lambda: collected.extend(driver.collect()),
            start_index=start,
        )
        tokens = itertools.count()
        expected = []
        for batch in batches:
            for _ in range(min(batch, max(1, size // 2))):
                token = next(tokens)
                if size == 1:
                    driver.add([], [Segment(BUFFERS, 8)], token)
                    expected.append((token, 0))
                else:
                    driver.add([Segment(BUFFERS, token % 7 + 1)], [Segment(Gpa(BUFFERS + 64), 8)], token)
                    expected.append((token, token % 7 + 1))
            assert driver.kick(), "the device has seen everything and waits"
        assert sorted(map(str, collected)) == sorted(map(str, expected))
        assert (driver.in_flight, device.in_flight) == (0, 0)


@pytest.mark.parametrize("event_idx", [False, True])
def test_two_to_the_sixteen_requests_and_some_more(event_idx: bool) -> None:
    """Every value of both indices is passed once, in batches that do not divide 2^16."""
    with open_ram(2 << 20) as ram:
        memory = split_memory(ram)
        layout = RingLayout.contiguous(memory, 128, RING)
        told = [0, 0]

        def notify() -> None:
            told[0] += 1

        def interrupt() -> None:
            told[1] += 1

        driver = DriverQueue(memory, layout, event_idx=event_idx, notify=notify)
        device = DeviceQueue(memory, layout, event_idx=event_idx, interrupt=interrupt)
        buffer = [Segment(BUFFERS, 0x100)]
        sent = rounds = 0
        while sent < 0x10000 + 500:
            batch = 1 + rounds * 37 % 128
            rounds += 1
            for token in range(sent, sent + batch):
                driver.add([], buffer, token)
            assert driver.kick()
            while (item := device.pop()) is not None:
                device.push(item.head, item.head)
            assert device.flush()
            assert [token for token, _ in driver.collect()] == list(range(sent, sent + batch))
            sent += batch
        assert told == [rounds, rounds]
        assert device.last_avail == device.used_idx == sent & 0xFFFF
