# SPDX-License-Identifier: GPL-2.0-only
"""The driver's end against devices that write whatever they like."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import RingError
from hostzero.ram import GuestMemory, Ram, open_ram
from hostzero.units import Gpa
from hostzero.virtio import DriverQueue, MockDevice, RingLayout, Segment, ring_bytes
from tests.virtio.memory import BUFFERS, HIGH, LOW, RING, split_memory
from tests.virtio.naive import naive_need_event

NEXT, WRITE = 1, 2


class Rig:
    """A ring with a driver queue before it and a hand-written device behind it."""

    def __init__(
        self, memory: GuestMemory, size: int = 4, *, event_idx: bool = False, start: int = 0
    ) -> None:
        self.memory = memory
        self.layout = RingLayout.contiguous(memory, size, RING)
        self.notifications = 0
        self.on_notify: Callable[[], None] = lambda: None
        self.queue = DriverQueue(
            memory, self.layout, event_idx=event_idx, notify=self.notify, start_index=start
        )
        self.device = MockDevice(memory, self.layout, start)

    def notify(self) -> None:
        self.notifications += 1
        self.on_notify()

    def add(self, token: object = None, length: int = 16) -> int:
        """Add a request of one writable segment."""
        return self.queue.add([], [Segment(BUFFERS, length)], token)

    def submit(self, *tokens: object) -> list[int]:
        """Add and publish one request for each token; return the heads."""
        heads = [self.add(token) for token in tokens]
        self.queue.kick()
        return heads


@pytest.fixture
def rig(memory: GuestMemory) -> Rig:
    return Rig(memory)


@pytest.mark.parametrize("start", [0, 7, 65535])
def test_the_ring_starts_zeroed(memory: GuestMemory, ram: Ram, start: int) -> None:
    """Whatever stood there; only the indices and the events that follow them are `start`."""
    ram.buffer[:LOW] = b"\xee" * LOW
    layout = RingLayout.validated(memory, 4, 0x100, 0x202, 0x304)
    DriverQueue(memory, layout, event_idx=True, notify=lambda: None, start_index=start)
    word = start.to_bytes(2, "little")
    expected = bytearray(b"\xee" * LOW)
    expected[0x100:0x140] = bytes(64)
    expected[0x202:0x210] = b"\0\0" + word + bytes(8) + word
    expected[0x304:0x32A] = b"\0\0" + word + bytes(32) + word
    assert ram.buffer[:LOW] == expected


def test_a_request_is_a_chain_readable_first(rig: Rig) -> None:
    head = rig.queue.add(
        [Segment(BUFFERS, 10), Segment(HIGH, 20)], [Segment(Gpa(BUFFERS + 0x100), 0xBF00)], "token"
    )
    assert rig.device.offered() == [], "not published before kick"
    assert rig.queue.kick()
    assert rig.device.offered() == [head]
    first = rig.device.descriptor(head)
    second = rig.device.descriptor(first.next)
    third = rig.device.descriptor(second.next)
    assert first[:3] == (BUFFERS, 10, NEXT)
    assert second[:3] == (HIGH, 20, NEXT)
    assert third[:3] == (BUFFERS + 0x100, 0xBF00, WRITE)
    assert (rig.queue.num_free, rig.queue.in_flight) == (1, 1)


def test_tokens_come_back_with_their_lengths_in_any_order(rig: Rig) -> None:
    a, b, c = rig.submit("a", "b", "c")
    assert rig.queue.collect() == []
    rig.device.give_back((c, 16), (a, 0))
    assert rig.queue.collect() == [("c", 16), ("a", 0)]
    assert (rig.queue.num_free, rig.queue.in_flight) == (3, 1)
    rig.device.give_back((b, 5))
    assert rig.queue.collect() == [("b", 5)]
    assert rig.queue.collect() == []
    assert (rig.queue.num_free, rig.queue.in_flight) == (4, 0)


def test_a_full_ring_refuses_and_keeps_what_it_has(rig: Rig, ram: Ram) -> None:
    rig.submit("a", "b", "c")
    before = bytes(ram.buffer[:LOW])
    with pytest.raises(RingError, match="ring full: the request needs 2 descriptors and 1 of 4 are free"):
        rig.queue.add([Segment(BUFFERS, 1)], [Segment(BUFFERS, 1)], "d")
    assert ram.buffer[:LOW] == before
    assert (rig.queue.num_free, rig.queue.in_flight) == (1, 3)
    rig.add("d")
    with pytest.raises(RingError, match="ring full: the request needs 1 descriptors and 0 of 4 are free"):
        rig.add("e")


def test_a_ring_of_one_takes_one_request_at_a_time(memory: GuestMemory) -> None:
    rig = Rig(memory, size=1)
    for number in range(5):
        (head,) = rig.submit(number)
        rig.device.give_back((head, number))
        assert rig.queue.collect() == [(number, number)]


@pytest.mark.parametrize(
    ("out", "in_", "text"),
    [
        ([], [], "at least one segment"),
        ([(BUFFERS, 0)], [], "a segment of 0 bytes"),
        ([(BUFFERS, 8)], [(BUFFERS, -1)], "a segment of -1 bytes"),
        ([(0, 1 << 32)], [], "a segment of 4294967296 bytes"),
        ([(LOW - 1, 2)], [], "segment of 2 bytes at 0xffff is not all in guest memory"),
        ([], [(HIGH + LOW, 1)], "is not all in guest memory"),
        ([], [(-1, 1)], "is not all in guest memory"),
        ([(BUFFERS, 1)], [((1 << 64) - 1, 2)], "is not all in guest memory"),
    ],
)
def test_requests_that_break_a_rule_are_refused(
    rig: Rig, ram: Ram, out: list[tuple[int, int]], in_: list[tuple[int, int]], text: str
) -> None:
    before = bytes(ram.buffer[:LOW])
    with pytest.raises(RingError, match=text):
        rig.queue.add([Segment(Gpa(a), n) for a, n in out], [Segment(Gpa(a), n) for a, n in in_], None)
    assert ram.buffer[:LOW] == before
    assert (rig.queue.num_free, rig.queue.in_flight, rig.queue.kick()) == (4, 0, False)


class AllOfTheWorld(GuestMemory):
    """Every address is inside, so that only the sum of lengths can be wrong."""

    def contains(self, gpa: Gpa, length: int) -> bool:
        return True


def test_a_request_has_at_most_4_gib(ram: Ram) -> None:
    """Clause 2.7.5.2: 2^32 bytes in total are allowed, one more is not."""
    rig = Rig(AllOfTheWorld(split_memory(ram).regions))
    quarter = Segment(Gpa(0), 1 << 30)
    with pytest.raises(RingError, match="4294967297 bytes is longer than 2"):
        rig.queue.add([quarter] * 2, [quarter, Segment(Gpa(0), (1 << 30) + 1)], None)
    rig.queue.add([quarter] * 2, [quarter] * 2, None)


def test_numpy_integers_do_not_wrap(rig: Rig) -> None:
    """Addresses are computed from PFN arrays; what a driver passes may not be Python's int."""
    gpa = np.uint32(BUFFERS)
    head = rig.queue.add([Segment(Gpa(int(gpa)), np.uint16(0x9000))] * 2, [], "numpy")  # type: ignore[arg-type]
    assert rig.device.descriptor(head)[:3] == (BUFFERS, 0x9000, NEXT)


@pytest.mark.parametrize("bad", [4, 5, 0xFFFF, 0x1_0000, 0xFFFF_FFFF])
def test_an_id_outside_the_table_breaks_the_queue(rig: Rig, bad: int) -> None:
    rig.submit("a", "b")
    rig.device.give_back((bad, 0))
    with pytest.raises(RingError, match=f"returned id {bad} on a ring of 4"):
        rig.queue.collect()
    assert rig.queue.broken is not None


def test_an_id_that_is_not_a_head_in_flight_breaks_the_queue(rig: Rig) -> None:
    """The second descriptor of a chain is no head, and was never submitted as one."""
    head = rig.queue.add([Segment(BUFFERS, 1)], [Segment(BUFFERS, 1)], "a")
    rig.queue.kick()
    second = rig.device.descriptor(head).next
    rig.device.give_back((second, 0))
    with pytest.raises(RingError, match=f"returned id {second}, which is not in flight"):
        rig.queue.collect()


def test_an_id_returned_twice_breaks_the_queue(rig: Rig) -> None:
    """In a later call, and then within one."""
    a, _ = rig.submit("a", "b")
    rig.device.give_back((a, 1))
    assert rig.queue.collect() == [("a", 1)]
    rig.device.give_back((a, 1))
    with pytest.raises(RingError, match=f"returned id {a}, which is not in flight"):
        rig.queue.collect()


def test_an_id_returned_twice_at_once_breaks_the_queue(rig: Rig) -> None:
    a, _ = rig.submit("a", "b")
    rig.device.give_back((a, 1), (a, 1))
    with pytest.raises(RingError, match=f"returned id {a} twice"):
        rig.queue.collect()


def test_an_id_that_was_not_published_breaks_the_queue(rig: Rig) -> None:
    rig.submit("a")
    b = rig.add("b")
    rig.device.give_back((b, 16))
    with pytest.raises(RingError, match=f"returned id {b}, which was not yet published to it"):
        rig.queue.collect()


@pytest.mark.parametrize("index", [3, 0x8000, 0xFFFF])
def test_an_index_that_jumps_breaks_the_queue(rig: Rig, index: int) -> None:
    """By more than what was published: one request is added and not published here."""
    rig.submit("a", "b")
    rig.add("c")
    rig.device.set_used_idx(index)
    with pytest.raises(RingError, match=f"index moved by {index} with 2 requests in flight"):
        rig.queue.collect()


@pytest.mark.parametrize("length", [17, 0x1000, 0xFFFF_FFFF])
def test_a_length_beyond_the_buffer_is_returned_as_it_came(rig: Rig, length: int) -> None:
    """It breaks nothing: the caller's exactness rule refuses it as evidence."""
    (head,) = rig.submit("a")
    rig.device.give_back((head, length))
    assert rig.queue.collect() == [("a", length)]
    assert rig.queue.broken is None


def test_a_broken_queue_hands_out_nothing_and_detaches_everything(rig: Rig) -> None:
    """Also what came before the bad id in the same call: such a device's word is no evidence."""
    a, b, _ = rig.submit("a", "b", "c")
    rig.device.give_back((b, 16))
    assert rig.queue.collect() == [("b", 16)]
    rig.add("d")
    rig.device.give_back((a, 16), (99, 16))
    for _ in range(2):
        with pytest.raises(RingError, match="returned id 99"):
            rig.queue.collect()
    with pytest.raises(RingError, match="the queue is broken: the device returned id 99"):
        rig.add("e")
    assert not rig.queue.kick()
    assert rig.notifications == 1
    assert rig.queue.detach_unused() == ["a", "c", "d"]
    assert rig.queue.detach_unused() == []
    assert (rig.queue.num_free, rig.queue.in_flight) == (4, 0)


def test_detaching_ends_a_good_queue_too(rig: Rig) -> None:
    rig.submit("a")
    assert rig.queue.detach_unused() == ["a"]
    with pytest.raises(RingError, match="its requests were detached"):
        rig.add("b")


def test_a_device_that_rewrites_descriptors_confuses_nobody(rig: Rig) -> None:
    """Chains are freed from the driver's own record, never by following the table."""
    for _ in range(10):
        head = rig.queue.add([Segment(BUFFERS, 1)] * 2, [Segment(BUFFERS, 1)], "a")
        rig.queue.kick()
        rig.memory.write(rig.layout.desc, b"\xff" * ring_bytes(4)[0])
        rig.memory.write(rig.layout.avail, b"\xff" * ring_bytes(4)[1])
        rig.device.give_back((head, 1))
        assert rig.queue.collect() == [("a", 1)]
        assert rig.queue.num_free == 4


def test_the_driver_writes_descriptors_and_the_available_ring_only(rig: Rig, ram: Ram) -> None:
    before = bytes(ram.buffer[: 2 * LOW])
    (head,) = rig.submit("a")
    rig.device.give_back((head, 16))
    used_ring = rig.memory.read(rig.layout.used, ring_bytes(4)[2])
    rig.queue.collect()
    after = bytes(ram.buffer[: 2 * LOW])
    assert rig.memory.read(rig.layout.used, ring_bytes(4)[2]) == used_ring
    end = rig.layout.used + ring_bytes(4)[2]
    assert after[end:] == before[end:]


def test_without_event_index_the_flag_suppresses(rig: Rig) -> None:
    """Clause 2.7.10.1; avail_event is ignored."""
    rig.device.set_used_flags(1)
    rig.add("a")
    assert not rig.queue.kick()
    assert rig.device.avail_idx == 1
    rig.device.set_used_flags(0)
    rig.device.set_avail_event(0x4444)
    rig.add("b")
    assert rig.queue.kick()
    assert rig.notifications == 1


def test_with_event_index_the_flag_is_ignored(memory: GuestMemory) -> None:
    rig = Rig(memory, event_idx=True)
    rig.device.set_used_flags(1)
    rig.add()
    assert rig.queue.kick()


def test_kick_of_nothing_notifies_nobody(rig: Rig) -> None:
    assert not rig.queue.kick()
    rig.add()
    assert [rig.queue.kick(), rig.queue.kick()] == [True, False]
    assert rig.notifications == 1


@given(
    start=st.one_of(st.integers(65528, 65535), st.integers(0, 65535)),
    batches=st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 6)), min_size=1, max_size=8),
)
def test_event_index_notifies_when_the_event_is_passed(start: int, batches: list[tuple[int, int]]) -> None:
    """Each batch: how many requests, and where avail_event stands from the index before it."""
    with open_ram(2 << 20) as ram:
        rig = Rig(split_memory(ram), event_idx=True, start=start)
        index = start
        for count, ahead in batches:
            rig.device.set_avail_event(index + ahead)
            heads = [rig.add(number) for number in range(count)]
            new = (index + count) % 65536
            assert rig.queue.kick() is naive_need_event((index + ahead) % 65536, new, index)
            index = new
            assert rig.device.avail_idx == index
            rig.device.give_back(*[(head, head) for head in heads])
            assert rig.queue.collect() == list(zip(range(count), heads, strict=True))


def test_collect_asks_for_an_interrupt_at_the_next_entry(memory: GuestMemory) -> None:
    rig = Rig(memory, event_idx=True, start=65534)
    assert rig.device.used_event == 65534
    heads = rig.submit("a", "b", "c")
    rig.device.give_back(*[(head, 0) for head in heads])
    rig.queue.collect()
    assert rig.device.used_event == 1


def test_a_buffer_used_just_before_the_request_is_collected(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device returns one after the driver looked and before it asked: no interrupt comes."""
    rig = Rig(memory, event_idx=True)
    a, b = rig.submit("a", "b")
    rig.device.give_back((a, 0))
    read = rig.queue._read_used

    def late() -> list[tuple[int, int]]:
        batch = read()
        if batch == [(a, 0)]:
            rig.device.give_back((b, 7))
        return batch

    monkeypatch.setattr(rig.queue, "_read_used", late)
    assert rig.queue.collect() == [("a", 0), ("b", 7)]


def test_the_device_may_answer_within_kick(rig: Rig) -> None:
    """Notify runs the device, its interrupt runs the driver, and that one submits again."""
    collected: list[tuple[object, int]] = []

    def device() -> None:
        rig.device.give_back(*[(head, head) for head in rig.device.offered()])
        collected.extend(rig.queue.collect())
        if len(collected) < 7:
            rig.submit(len(collected), len(collected) + 1)

    rig.on_notify = device
    rig.submit("first")
    assert [token for token, _ in collected] == ["first", 1, 2, 3, 4, 5, 6]
    assert (rig.queue.num_free, rig.queue.in_flight) == (4, 0)


def test_release_lets_go_of_the_memory(rig: Rig) -> None:
    rig.submit("a")
    rig.add("b")
    rig.queue.release()
    assert not rig.queue.kick()
    with pytest.raises(RingError, match="its memory was released"):
        rig.queue.collect()
    assert rig.queue.detach_unused() == ["a", "b"]
    rig.queue.release()


entries = st.tuples(
    st.one_of(st.integers(0, 3), st.integers(0, 9), st.integers(0, 0xFFFF_FFFF)), st.integers(0, 0xFFFF_FFFF)
)


@given(
    start=st.sampled_from([0, 3, 65533, 65535]),
    event_idx=st.booleans(),
    rounds=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.lists(entries, min_size=4, max_size=4),
            st.one_of(st.integers(0, 5), st.integers(0, 0xFFFF)),
        ),
        max_size=8,
    ),
)
def test_random_used_rings_return_no_token_twice(
    start: int, event_idx: bool, rounds: list[tuple[int, list[tuple[int, int]], int]]
) -> None:
    """Whatever stands in the used ring, it agrees with a list of what is in flight."""
    with open_ram(2 << 20) as ram:
        rig = Rig(split_memory(ram), event_idx=event_idx, start=start)
        in_flight: dict[int, int] = {}
        tokens = 0
        index = start
        for adds, used_ring, ahead in rounds:
            for _ in range(min(adds, rig.queue.num_free)):
                in_flight[rig.add(tokens)] = tokens
                tokens += 1
            rig.queue.kick()
            for slot, (head, length) in enumerate(used_ring):
                rig.device.set_used_entry(slot, head, length)
            rig.device.set_used_idx(index + ahead)
            given = [used_ring[(index + step) % 4] for step in range(min(ahead, 4))]
            ids = [head for head, _ in given]
            good = ahead <= len(in_flight) and len(set(ids)) == len(ids) and set(ids) <= set(in_flight)
            if good:
                assert rig.queue.collect() == [(in_flight.pop(head), length) for head, length in given]
                index = (index + ahead) % 65536
                assert rig.queue.num_free == 4 - len(in_flight)
            else:
                with pytest.raises(RingError):
                    rig.queue.collect()
                assert set(rig.queue.detach_unused()) == set(in_flight.values())
                return
