# SPDX-License-Identifier: GPL-2.0-only
"""The device's end against guests that write whatever they like."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import RingError
from hostzero.ram import GuestMemory, MemoryRegion, Ram, open_ram
from hostzero.units import Gpa
from hostzero.virtio import BadChain, Chain, DeviceQueue, MockGuest, RingLayout, ring_bytes
from tests.virtio.memory import BUFFERS, LOW, RING, split_memory
from tests.virtio.naive import naive_need_event, naive_walk

WRITE = 2


class Rig:
    """A ring with a hand-written guest before it and a device queue behind it."""

    def __init__(
        self, memory: GuestMemory, size: int = 4, *, event_idx: bool = False, start: int = 0
    ) -> None:
        self.memory = memory
        self.layout = RingLayout.contiguous(memory, size, RING)
        self.guest = MockGuest(memory, self.layout, start)
        self.interrupts = 0
        self.on_interrupt: Callable[[], None] = lambda: None
        self.queue = DeviceQueue(
            memory, self.layout, event_idx=event_idx, interrupt=self.interrupt, start_index=start
        )

    def interrupt(self) -> None:
        self.interrupts += 1
        self.on_interrupt()

    def offer(self, head: int, length: int = 16, flags: int = WRITE) -> int:
        """Make one buffer available, written at descriptor `head`."""
        self.guest.chain([(BUFFERS + 0x100 * head, length, flags)], head)
        self.guest.offer(head)
        return head

    def pop(self) -> Chain:
        """Pop a request that must be good."""
        item = self.queue.pop()
        assert isinstance(item, Chain)
        return item


@pytest.fixture
def rig(memory: GuestMemory) -> Rig:
    return Rig(memory)


def test_nothing_available_is_none(rig: Rig) -> None:
    assert rig.queue.pop() is None
    assert (rig.queue.in_flight, rig.queue.broken) == (0, None)


def test_requests_come_in_order_and_go_back_in_any(rig: Rig) -> None:
    for head in (2, 0, 3):
        rig.offer(head)
    assert [rig.pop().head for _ in range(3)] == [2, 0, 3]
    assert rig.queue.in_flight == 3
    for head, length in ((0, 16), (3, 0), (2, 7)):
        rig.queue.push(head, length)
    assert rig.guest.used_idx == 0, "nothing is published before flush"
    assert rig.queue.flush()
    assert rig.guest.returned() == [(0, 16), (3, 0), (2, 7)]
    assert (rig.queue.in_flight, rig.interrupts) == (0, 1)


def test_a_bad_chain_costs_its_own_request_only(rig: Rig) -> None:
    """Its head goes back with length 0, and the next request is served."""
    rig.guest.chain([(LOW, 16, WRITE)], 1)
    rig.guest.offer(1)
    rig.offer(2)
    bad = rig.queue.pop()
    assert isinstance(bad, BadChain)
    assert rig.pop().head == 2
    with pytest.raises(RingError, match="used length of 1 for the 0 writable bytes of head 1"):
        rig.queue.push(bad.head, 1)
    rig.queue.push(bad.head, 0)
    rig.queue.push(2, 16)
    rig.queue.flush()
    assert rig.guest.returned() == [(1, 0), (2, 16)]


@pytest.mark.parametrize("head", [4, 5, 0x7FFF, 0xFFFF])
def test_a_head_outside_the_table_breaks_the_queue(rig: Rig, head: int) -> None:
    rig.guest.offer(head)
    with pytest.raises(RingError, match=f"names descriptor {head} on a ring of 4"):
        rig.queue.pop()
    assert rig.queue.broken is not None
    assert rig.queue.pop() is None
    assert rig.queue.in_flight == 0


@pytest.mark.parametrize(("index", "ahead"), [(5, 5), (0x8000, 0x8000), (0xFFFF, 0xFFFF)])
def test_an_index_that_jumps_breaks_the_queue(rig: Rig, index: int, ahead: int) -> None:
    """0xFFFF is one step backwards, which clause 2.7.6.1 forbids."""
    rig.guest.set_avail_idx(index)
    with pytest.raises(RingError, match=f"index is {ahead} ahead on a ring of 4"):
        rig.queue.pop()
    assert rig.queue.pop() is None


def test_a_full_ring_is_no_jump(rig: Rig) -> None:
    for head in range(4):
        rig.offer(head)
    assert [rig.pop().head for _ in range(4)] == [0, 1, 2, 3]
    assert rig.queue.pop() is None


def test_a_head_in_flight_offered_again_breaks_the_queue(rig: Rig) -> None:
    """Else one head would be returned twice, or once for two requests."""
    rig.offer(1)
    assert rig.pop().head == 1
    rig.guest.offer(1)
    with pytest.raises(RingError, match="names descriptor 1, which is in flight already"):
        rig.queue.pop()
    assert rig.queue.in_flight == 1


def test_a_head_offered_again_after_its_return_is_a_new_request(rig: Rig) -> None:
    for _ in range(3):
        rig.offer(1)
        rig.queue.push(rig.pop().head, 16)
    rig.queue.flush()
    assert rig.guest.returned() == [(1, 16)] * 3


def test_what_was_popped_before_the_break_still_goes_back(rig: Rig) -> None:
    rig.offer(3)
    assert rig.pop().head == 3
    rig.guest.offer(9)
    with pytest.raises(RingError):
        rig.queue.pop()
    rig.queue.push(3, 4)
    assert rig.queue.flush()
    assert rig.guest.returned() == [(3, 4)]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_broken_queue_asks_for_nothing_more(memory: GuestMemory, event_idx: bool) -> None:
    rig = Rig(memory, event_idx=event_idx)
    rig.guest.offer(9)
    with pytest.raises(RingError):
        rig.queue.pop()
    before = memory.read(rig.layout.used, ring_bytes(4)[2])
    assert not rig.queue.enable_notifications()
    rig.queue.disable_notifications()
    assert memory.read(rig.layout.used, ring_bytes(4)[2]) == before


@pytest.mark.parametrize("head", [0, 1, 2, 4, -1, 1 << 20])
def test_pushing_what_is_not_in_flight_is_refused(rig: Rig, head: int) -> None:
    """Never popped, pushed before, or no head at all."""
    rig.offer(1)
    rig.queue.push(rig.pop().head, 0)
    rig.offer(2)
    with pytest.raises(RingError, match=f"head {head} was pushed, but it is not in flight"):
        rig.queue.push(head, 0)
    rig.queue.flush()
    assert rig.guest.returned() == [(1, 0)]


@pytest.mark.parametrize("length", [-1, 17, 1 << 32])
def test_a_used_length_that_is_not_true_is_refused(rig: Rig, length: int) -> None:
    """Clause 2.7.8.2; the head stays in flight and can be pushed with a true length."""
    rig.offer(0)
    rig.pop()
    with pytest.raises(RingError, match=f"used length of {length} for the 16 writable bytes"):
        rig.queue.push(0, length)
    rig.queue.push(0, 16)


def test_readable_bytes_are_not_counted_as_written(rig: Rig) -> None:
    rig.guest.chain([(BUFFERS, 100, 0), (BUFFERS + 100, 8, WRITE)])
    rig.guest.offer(0)
    rig.pop()
    with pytest.raises(RingError, match="used length of 9 for the 8 writable bytes"):
        rig.queue.push(0, 9)


class Racing(GuestMemory):
    """A guest that rewrites its ring whenever the device checks an address."""

    def __init__(self, ram: Ram) -> None:
        super().__init__([MemoryRegion(Gpa(0), ram, 0, LOW)])
        self.attack: Callable[[], None] = lambda: None

    def contains(self, gpa: Gpa, length: int) -> bool:
        answer = super().contains(gpa, length)
        self.attack()
        return answer


def test_a_descriptor_that_changes_after_its_check_changes_nothing(ram: Ram) -> None:
    memory = Racing(ram)
    rig = Rig(memory)
    rig.guest.chain([(BUFFERS, 16, 0), (BUFFERS + 16, 32, WRITE)])
    rig.guest.offer(0)

    checked = itertools.count()

    def attack() -> None:
        # Each descriptor turns evil the moment after its own check; the next is still good.
        rig.guest.descriptor(next(checked), LOW, 0xFFFF_FFFF, 7, 9)
        rig.guest.set_avail_entry(0, 0xFFFF)

    memory.attack = attack
    chain = rig.pop()
    assert chain.head == 0
    assert chain.readable == ((BUFFERS, 16),)
    assert chain.writable == ((BUFFERS + 16, 32),)
    assert next(checked) == 2


def test_the_device_writes_the_used_ring_only(rig: Rig, ram: Ram) -> None:
    rig.offer(0)
    before = bytes(ram.buffer[:LOW])
    rig.pop()
    rig.queue.push(0, 16)
    rig.queue.flush()
    used, length = rig.layout.used, ring_bytes(4)[2]
    after = bytes(ram.buffer[:LOW])
    assert after[:used] == before[:used]
    assert after[used + length :] == before[used + length :]
    assert after[used : used + 12] == bytes.fromhex("0000 0100 00000000 10000000")


def test_the_used_ring_is_never_believed(rig: Rig) -> None:
    """A guest that rewrites the used index does not move the device's own."""
    rig.offer(0)
    rig.queue.push(rig.pop().head, 5)
    rig.memory.write(rig.layout.used, b"\xff" * ring_bytes(4)[2])
    rig.queue.flush()
    assert rig.guest.used_idx == 1
    assert rig.queue.used_idx == 1


def test_without_event_index_the_flag_suppresses(rig: Rig) -> None:
    """Clause 2.7.7.2; used_event is ignored."""
    rig.guest.set_avail_flags(1)
    rig.offer(0)
    rig.queue.push(rig.pop().head, 0)
    assert not rig.queue.flush()
    assert rig.guest.used_idx == 1
    rig.guest.set_avail_flags(0)
    rig.guest.set_used_event(0x4444)
    rig.offer(0)
    rig.queue.push(rig.pop().head, 0)
    assert rig.queue.flush()
    assert rig.interrupts == 1


def test_with_event_index_the_flag_is_ignored(memory: GuestMemory) -> None:
    rig = Rig(memory, event_idx=True)
    rig.guest.set_avail_flags(1)
    rig.offer(0)
    rig.queue.push(rig.pop().head, 0)
    assert rig.queue.flush()


def test_flush_of_nothing_interrupts_nobody(rig: Rig) -> None:
    assert not rig.queue.flush()
    rig.offer(0)
    rig.queue.push(rig.pop().head, 0)
    assert [rig.queue.flush(), rig.queue.flush()] == [True, False]
    assert rig.interrupts == 1


@given(
    start=st.one_of(st.integers(65528, 65535), st.integers(0, 65535)),
    batches=st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 6)), min_size=1, max_size=8),
)
def test_event_index_interrupts_when_the_event_is_passed(start: int, batches: list[tuple[int, int]]) -> None:
    """Each batch: how many requests, and where used_event stands from the used index before it."""
    with open_ram(2 << 20) as ram:
        rig = Rig(split_memory(ram), event_idx=True, start=start)
        index = start
        for count, ahead in batches:
            rig.guest.set_used_event(index + ahead)
            for head in range(count):
                rig.offer(head)
            for _ in range(count):
                rig.queue.push(rig.pop().head, 0)
            new = (index + count) % 65536
            assert rig.queue.flush() is naive_need_event((index + ahead) % 65536, new, index)
            index = new
            assert rig.guest.used_idx == index


def test_an_empty_ring_asks_for_the_next_buffer(memory: GuestMemory) -> None:
    """With the event index, avail_event is the entry that is not there yet (2.7.10.2)."""
    rig = Rig(memory, event_idx=True, start=65535)
    rig.offer(0)
    rig.offer(1)
    rig.pop()
    assert rig.guest.avail_event == 65535, "not while there is more to pop"
    rig.pop()
    assert rig.queue.pop() is None
    assert rig.guest.avail_event == 1


def test_a_buffer_that_comes_just_before_the_request_is_seen(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver adds after the device looked and before it asked: no notification comes."""
    rig = Rig(memory, event_idx=True)
    look = rig.queue._look
    answers = []

    def late() -> bool:
        answers.append(look())
        if len(answers) == 1:
            rig.offer(2)
        return answers[-1]

    monkeypatch.setattr(rig.queue, "_look", late)
    assert rig.pop().head == 2
    assert answers == [False, True]


def test_notifications_can_be_refused_while_serving(rig: Rig) -> None:
    rig.queue.disable_notifications()
    assert rig.guest.used_flags == 1
    rig.offer(0)
    rig.pop()
    assert rig.guest.used_flags == 1
    assert rig.queue.pop() is None
    assert rig.guest.used_flags == 0


def test_enable_notifications_tells_of_what_is_there(rig: Rig) -> None:
    assert not rig.queue.enable_notifications()
    rig.offer(0)
    assert rig.queue.enable_notifications()
    assert rig.pop().head == 0


def test_with_event_index_the_flags_stay_zero(memory: GuestMemory) -> None:
    rig = Rig(memory, event_idx=True)
    rig.queue.disable_notifications()
    assert rig.guest.used_flags == 0


def test_an_interrupt_may_come_back_into_the_queue(rig: Rig) -> None:
    """The driver offers again from within its interrupt, and the device serves it there."""

    def again() -> None:
        if rig.interrupts < 5:
            rig.offer(rig.interrupts % 4)
            rig.queue.push(rig.pop().head, rig.interrupts)
            rig.queue.flush()

    rig.on_interrupt = again
    rig.offer(0)
    rig.queue.push(rig.pop().head, 0)
    rig.queue.flush()
    assert rig.guest.returned()[-4:] == [(1, 1), (2, 2), (3, 3), (0, 4)]
    assert rig.interrupts == 5


def test_rewind_makes_what_is_in_flight_available_again(memory: GuestMemory) -> None:
    """As a device does that is stopped with a statistics buffer in hand (GET_VRING_BASE)."""
    rig = Rig(memory, start=65534)
    for head in (0, 1, 2):
        rig.offer(head)
        rig.pop()
    rig.queue.push(0, 0)
    rig.queue.flush()
    assert (rig.queue.last_avail, rig.queue.used_idx) == (1, 65535)
    assert rig.queue.rewind() == 2
    assert (rig.queue.last_avail, rig.queue.used_idx, rig.queue.in_flight) == (65535, 65535, 0)
    resumed = DeviceQueue(
        memory, rig.layout, event_idx=False, interrupt=rig.interrupt, start_index=rig.queue.last_avail
    )
    for queue in (rig.queue, resumed):
        items = [queue.pop(), queue.pop(), queue.pop()]
        assert [item.head if item else None for item in items] == [1, 2, None]


def test_rewind_refuses_to_repeat_what_was_used(rig: Rig) -> None:
    for head in (0, 1, 2):
        rig.offer(head)
        rig.pop()
    rig.queue.push(2, 0)
    with pytest.raises(RingError, match="out of order"):
        rig.queue.rewind()
    assert rig.queue.in_flight == 2
    rig.queue.push(0, 0)
    rig.queue.push(1, 0)
    assert rig.queue.rewind() == 0


def test_release_lets_go_of_the_memory(rig: Rig) -> None:
    rig.offer(0)
    rig.offer(1)
    rig.pop()
    rig.queue.push(0, 0)
    rig.pop()
    rig.queue.release()
    assert rig.queue.pop() is None
    assert not rig.queue.flush()
    assert not rig.queue.enable_notifications()
    rig.queue.disable_notifications()
    with pytest.raises(RingError, match="not in flight"):
        rig.queue.push(1, 0)
    rig.queue.release()


# A guest that writes random bytes into its ring, with the numbers drawn near what works.
words = st.one_of(st.integers(0, 9), st.integers(0xFFF8, 0xFFFF), st.integers(0, 0xFFFF))
raw_descriptors = st.tuples(
    st.one_of(st.integers(0, LOW + 8), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 64), st.integers(0, 0xFFFF_FFFF)),
    st.one_of(st.sampled_from([0, 1, 2, 3]), words),
    words,
)


@given(
    start=st.sampled_from([0, 1, 65533, 65535]),
    event_idx=st.booleans(),
    rounds=st.lists(
        st.tuples(
            st.lists(raw_descriptors, min_size=4, max_size=4),
            st.lists(st.one_of(st.integers(0, 3), words), min_size=4, max_size=4),
            st.one_of(st.integers(0, 4), words),
            st.lists(st.integers(0, 100), max_size=6),
        ),
        max_size=4,
    ),
)
def test_random_rings_cost_at_most_the_queue(
    start: int,
    event_idx: bool,
    rounds: list[tuple[list[tuple[int, int, int, int]], list[int], int, list[int]]],
) -> None:
    """Whatever stands in the ring: what comes out agrees with the naive walk, each head that is
    popped goes back once, only the used ring is written, and the one error is `RingError`.
    """
    with open_ram(2 << 20) as ram:
        rig = Rig(split_memory(ram), event_idx=event_idx, start=start)
        used_end = rig.layout.used + ring_bytes(4)[2]
        held: list[Chain | BadChain] = []
        returned: list[tuple[int, int]] = []
        index = start
        for table, ring, ahead, pushes in rounds:
            for number, descriptor in enumerate(table):
                rig.guest.descriptor(number, *descriptor)
            for slot, head in enumerate(ring):
                rig.guest.set_avail_entry(slot, head)
            rig.guest.set_avail_idx(index + ahead)
            before = bytes(ram.buffer[: 2 * LOW])
            try:
                while (item := rig.queue.pop()) is not None:
                    assert item.head == ring[index % 4]
                    assert item.head not in [other.head for other in held]
                    expected = naive_walk(table, item.head)
                    if isinstance(item, Chain):
                        assert (list(item.readable), list(item.writable)) == expected
                    else:
                        assert expected is None
                    held.append(item)
                    index = (index + 1) % 65536
            except RingError:
                assert rig.queue.broken is not None
            assert rig.queue.in_flight == len(held)
            for choice in pushes:
                if held:
                    item = held.pop(choice % len(held))
                    limit = min(item.writable_len, 0xFFFF_FFFF) if isinstance(item, Chain) else 0
                    length = choice % (limit + 1)
                    rig.queue.push(item.head, length)
                    returned.append((item.head, length))
            rig.queue.flush()
            after = bytes(ram.buffer[: 2 * LOW])
            assert after[: rig.layout.used] == before[: rig.layout.used]
            assert after[used_end:] == before[used_end:]
            assert rig.guest.returned() == returned
            returned.clear()
            if rig.queue.broken is not None:
                break
