# SPDX-License-Identifier: GPL-2.0-only
"""One buffer a block, one kick a batch, and an exact used length or no claim."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostzero.driver import State, VirtioBalloon
from hostzero.errors import DriverError, HostzeroError, RingError
from hostzero.ram import GuestMemory, open_ram
from hostzero.units import PAGE_SIZE, Pfn
from hostzero.virtio import DriverQueue, Feature, QueueRole
from tests.driver.conftest import Guest, MakeGuest
from tests.driver.fakes import ALL_FEATURES, FakeConfig, FakeDevice, FakeMm, Request

PMD = 9
HUGE = PAGE_SIZE << PMD
BLOCKS = [(512, PMD), (1024, PMD), (2048, 10)]


def lie(device: FakeDevice, lengths: list[int | None]) -> None:
    """Discard each reported block as an honest device, then return these used lengths instead."""
    queue = iter(lengths)

    def answer(request: Request) -> int | None:
        honest = device.honest(request)
        return next(queue) if request.role is QueueRole.REPORTING else honest

    device.answer = answer


def prdev_bits(guest: Guest) -> list[bool]:
    assert guest.mm.page_reporting.dev is not None
    return [bool(bit) for bit in guest.mm.page_reporting.dev.zeroed_bitmap]


def test_each_block_is_one_writable_buffer_and_the_batch_one_kick(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.log.clear()
    assert guest.mm.page_reporting.report(BLOCKS) == [True, True, True]
    requests = guest.device.of(QueueRole.REPORTING)
    assert [request.readable for request in requests] == [(), (), ()]
    assert [request.writable for request in requests] == [
        ((pfn * PAGE_SIZE, PAGE_SIZE << order),) for pfn, order in BLOCKS
    ]
    assert guest.device.log == ["notify 4"]
    assert guest.mm.false_claims == []


@pytest.mark.parametrize(
    ("used_len", "zero"),
    [
        (HUGE, True),
        (HUGE - 1, False),
        (HUGE + 1, False),
        (HUGE - PAGE_SIZE, False),
        (HUGE + PAGE_SIZE, False),
        (PAGE_SIZE, False),
        (1, False),
        (0, False),
        (0xFFFF_FFFF, False),
    ],
)
def test_only_the_exact_length_counts(make_guest: MakeGuest, used_len: int, zero: bool) -> None:
    """The block is of order 9; its neighbours in the batch have answers of their own."""
    guest = make_guest()
    lie(guest.device, [HUGE, used_len, 0])
    assert guest.mm.page_reporting.report(BLOCKS) == [True, zero, False]


def test_lengths_of_different_orders_are_not_confused(make_guest: MakeGuest) -> None:
    """Each answer is compared with its own block: swapped lengths prove nothing."""
    guest = make_guest()
    lie(guest.device, [2 * HUGE, HUGE, HUGE])
    assert guest.mm.page_reporting.report(BLOCKS) == [False, True, False]


def test_answers_in_any_order_go_to_their_own_entry(make_guest: MakeGuest) -> None:
    """The used ring may be in another order than the available ring (virtio 1.3, 2.7.8)."""
    guest = make_guest()

    def reverse(device: FakeDevice, role: QueueRole) -> bool:
        if role is not QueueRole.REPORTING:
            return False
        ring = device.ring(role)
        heads = ring.offered()
        lengths = [HUGE, 0, 2 * HUGE]
        ring.give_back(*reversed(list(zip(heads, lengths, strict=True))))
        return True

    guest.device.raw_queue = reverse
    assert guest.mm.page_reporting.report(BLOCKS) == [True, False, True]


def test_a_short_batch_after_a_full_one_has_no_stale_answer(make_guest: MakeGuest) -> None:
    """Entry i belongs to this call's list: what the call before it said is gone."""
    guest = make_guest()
    assert guest.mm.page_reporting.report(BLOCKS) == [True, True, True]
    lie(guest.device, [0])
    assert guest.mm.page_reporting.report(BLOCKS[:1]) == [False]
    assert prdev_bits(guest) == [False] * 32


def test_an_empty_batch_disturbs_nobody(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.log.clear()
    assert guest.mm.page_reporting.report([]) == []
    assert guest.device.log == []


@given(lengths=st.lists(st.sampled_from([0, 1, HUGE - 1, HUGE, HUGE + 1]), min_size=1, max_size=6))
@settings(max_examples=max(1, settings().max_examples // 4))
def test_the_answer_is_the_exact_lengths_and_no_other(lengths: list[int]) -> None:
    """Every batch of up to six huge blocks and every mixture of answers."""
    with open_ram(16 << 20) as ram:
        memory = GuestMemory.whole(ram)
        mm, device = FakeMm(ram), FakeDevice(memory)
        guest = Guest(ram, memory, mm, device, _probed(mm, memory, device))
        lie(device, list(lengths))
        blocks = [(512 * (i + 1), PMD) for i in range(len(lengths))]
        assert mm.page_reporting.report(blocks) == [length == HUGE for length in lengths]
        guest.driver.remove()


def test_without_bit_6_a_full_length_is_no_evidence(make_guest: MakeGuest) -> None:
    """Devices exist that return the buffer's length after a failed discard."""
    features = int(ALL_FEATURES & ~Feature.DEVICE_INIT_REPORTED)
    guest = make_guest(features=features)
    lie(guest.device, [HUGE, HUGE, 2 * HUGE])
    assert guest.mm.page_reporting.report(BLOCKS) == [False, False, False]
    assert guest.mm.page_reporting.dev is not None
    assert guest.mm.page_reporting.dev.host_zeroes_pages is False


def test_a_guest_that_poisons_at_run_time_believes_no_length(make_guest: MakeGuest) -> None:
    guest = make_guest()
    assert guest.mm.page_reporting.dev is not None
    assert guest.mm.page_reporting.dev.host_zeroes_pages is True
    guest.mm.config.page_poisoning = True
    assert guest.mm.page_reporting.report(BLOCKS) == [False, False, False]


@pytest.mark.parametrize("size", [1, 2, 4, 16, 32])
def test_the_capacity_is_the_ring(make_guest: MakeGuest, size: int) -> None:
    """Patch 4: a small ring works, and a full batch fits it exactly."""
    guest = make_guest(sizes={QueueRole.REPORTING: size})
    dev = guest.mm.page_reporting.dev
    assert dev is not None
    assert dev.capacity == size
    blocks = [(512 + 8 * i, 3) for i in range(size)]
    for _ in range(3):
        assert guest.mm.page_reporting.report(blocks) == [True] * size
    assert guest.mm.false_claims == []


def test_a_ring_above_32_is_left_to_the_memory_manager(make_guest: MakeGuest) -> None:
    """The driver says what the ring takes; the clamp is patch 4's, in register."""
    guest = make_guest(sizes={QueueRole.REPORTING: 256})
    assert guest.mm.page_reporting.dev is not None
    assert guest.mm.page_reporting.dev.capacity == 32


def test_a_batch_beyond_the_ring_waits_for_what_was_submitted_and_marks_none(make_guest: MakeGuest) -> None:
    """The third block does not fit a ring of two: two are answered, the batch fails, no claim."""
    guest = make_guest(sizes={QueueRole.REPORTING: 2})
    with pytest.raises(RingError, match="ring full"):
        guest.mm.page_reporting.report(BLOCKS)
    assert len(guest.device.of(QueueRole.REPORTING)) == 2
    assert prdev_bits(guest) == [False] * 32
    assert guest.driver.state is State.ACTIVE, "a batch that is too large is not the device's fault"
    assert guest.mm.page_reporting.report(BLOCKS[:2]) == [True, True]


def test_a_block_outside_guest_memory_is_refused_before_the_device_sees_it(make_guest: MakeGuest) -> None:
    guest = make_guest()
    with pytest.raises(RingError, match="not all in guest memory"):
        guest.mm.page_reporting.report([(4095, PMD)])
    assert guest.device.of(QueueRole.REPORTING) == []


def test_more_blocks_than_answers_is_refused(make_guest: MakeGuest) -> None:
    guest = make_guest(sizes={QueueRole.REPORTING: 64})
    with pytest.raises(DriverError, match="batch of 33 blocks, with room for 32 answers"):
        guest.mm.page_reporting.report([(512, 0)] * 33)
    assert guest.device.of(QueueRole.REPORTING) == []


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_withheld_answer_marks_none_and_resets_the_device(
    make_guest: MakeGuest, answered: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A block that the device still holds may be discarded at any time, so it is taken from it first."""
    guest = make_guest()
    answers: list[int | None] = [HUGE, HUGE, 2 * HUGE]
    answers[answered] = None
    lie(guest.device, answers)
    with (
        caplog.at_level(logging.ERROR, "hostzero.driver"),
        pytest.raises(DriverError, match="device did not answer: 1 requests"),
    ):
        guest.mm.page_reporting.report(BLOCKS)
    assert prdev_bits(guest) == [False] * 32
    assert guest.device.statuses[-1] == 0
    assert "is reset and not used any more" in caplog.text
    with pytest.raises(DriverError, match="no report: the balloon driver is failed"):
        guest.mm.page_reporting.report(BLOCKS)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([(7, HUGE)], "id 7, which is not in flight"),
        ([(0xFFFF_FFFF, HUGE)], "id 4294967295 on a ring"),
        ([(0, HUGE), (0, HUGE)], "id 0 twice"),
        ([(0, HUGE)] * 9, "moved by 9"),
    ],
)
def test_a_forged_used_ring_marks_none(
    make_guest: MakeGuest, entries: list[tuple[int, int]], reason: str
) -> None:
    guest = make_guest()

    def forge(device: FakeDevice, role: QueueRole) -> bool:
        device.ring(role).give_back(*entries)
        return True

    guest.device.raw_queue = forge
    with pytest.raises(RingError, match=reason):
        guest.mm.page_reporting.report(BLOCKS)
    assert prdev_bits(guest) == [False] * 32
    assert guest.driver.state is State.FAILED
    guest.driver.remove()


def test_an_answer_that_comes_later_is_waited_for(make_guest: MakeGuest) -> None:
    """Across processes `notify` returns at once; the wait hook then sleeps, here it runs the device."""
    guest = make_guest(probe=False)
    waits: list[int] = []

    def later(queue: DriverQueue) -> None:
        waits.append(queue.in_flight)
        ring = guest.device.ring(QueueRole.REPORTING)
        request = guest.device.kept.pop(0)
        guest.memory.discard(*request.writable[0])
        ring.give_back((request.head, request.writable[0].length))

    guest.device.answer = lambda r: None if r.role is QueueRole.REPORTING else guest.device.honest(r)
    driver = VirtioBalloon(guest.mm, guest.memory, guest.device, wait=later)
    driver.probe()
    guest.device.kept.clear()
    assert guest.mm.page_reporting.report(BLOCKS) == [True, True, True]
    assert waits == [3, 2, 1], "one answer at a time, and no further wait after the last"
    assert guest.mm.false_claims == []


def test_a_used_buffer_that_was_not_asked_about_fails_the_batch(make_guest: MakeGuest) -> None:
    """Between two batches nothing is in flight, so nothing can come back early."""
    guest = make_guest()
    guest.mm.page_reporting.report(BLOCKS)
    guest.device.ring(QueueRole.REPORTING).give_back((0, HUGE))
    with pytest.raises(HostzeroError):
        guest.mm.page_reporting.report(BLOCKS)
    assert prdev_bits(guest) == [False] * 32


def test_a_confidential_guest_still_reports(make_guest: MakeGuest) -> None:
    """It gives memory back; it only does not take the host's word for what comes again."""
    guest = make_guest(config=FakeConfig(confidential=True))
    assert guest.mm.page_reporting.report(BLOCKS) == [False, False, False]
    assert len(guest.device.of(QueueRole.REPORTING)) == 3


def test_config_changes_during_a_report_wait_for_its_end(make_guest: MakeGuest) -> None:
    """The balloon does not inflate in the middle of a batch: the guest's clock runs it a tick later."""
    guest = make_guest()
    guest.device.before_notify = lambda index: guest.device.set_target(5) if index == 4 else None
    guest.mm.page_reporting.report(BLOCKS)
    assert guest.driver.num_pages == 0
    guest.mm.clock.advance(0.01)
    assert guest.driver.num_pages == 5


def _probed(mm: FakeMm, memory: GuestMemory, device: FakeDevice) -> VirtioBalloon:
    driver = VirtioBalloon(mm, memory, device)
    driver.probe()
    return driver


def test_pfns_are_reported_as_guest_physical_addresses(make_guest: MakeGuest) -> None:
    guest = make_guest()
    assert guest.mm.page_reporting.dev is not None
    guest.mm.page_reporting.dev.report([(Pfn(3), 0)])
    assert guest.device.of(QueueRole.REPORTING)[0].writable == ((0x3000, 0x1000),)
