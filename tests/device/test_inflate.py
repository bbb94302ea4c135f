# SPDX-License-Identifier: GPL-2.0-only
"""Inflate and deflate through a ring. `Guest.inflate` checks each claim by reading the page."""

from __future__ import annotations

import pytest

from hostzero.device.inflate import REQUEST_PFNS_MAX
from hostzero.device.metrics import SkipReason
from hostzero.errors import RamError
from hostzero.ram import Ram
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature, QueueRole
from tests.device.guest import (
    ALL_FEATURES,
    BITMAP_AT,
    FILL,
    PFNS_AT,
    RAM_PAGES,
    RING_PAGES,
    SCRATCH_AT,
    FailingMemory,
    Guest,
    HugeMemory,
    WrappedMemory,
    ram_of,
)

HUGE = 512
NO_BIT_7 = ALL_FEATURES & ~Feature.DEVICE_INIT_ON_INFLATE


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_pages_are_dropped_run_by_run_and_all_claimed(backing: str) -> None:
    with ram_of(backing) as ram:
        memory = WrappedMemory(ram)
        guest = Guest(memory)
        pfns = [20, 11, 10, 21, 12, 40]
        answer = guest.inflate(pfns)
        assert answer == (1, b"\x3f")
        assert guest.zero_pages() == set(pfns)
        assert memory.discards == [
            (10 * PAGE_SIZE, 3 * PAGE_SIZE),
            (20 * PAGE_SIZE, 2 * PAGE_SIZE),
            (40 * PAGE_SIZE, PAGE_SIZE),
        ]
        assert (guest.device.metrics.inflate.claims, guest.device.metrics.inflate.runs) == (6, 3)
        assert guest.device.metrics.inflate.claimed_zero_bytes == 6 * PAGE_SIZE


def test_the_bit_counts_the_place_in_the_request(guest: Guest) -> None:
    """Places 0 and 9 are RAM, all others are not: bytes 0x01 0x02, whatever the PFNs are."""
    pfns = [700, *range(RAM_PAGES, RAM_PAGES + 8), 300]
    assert guest.inflate(pfns) == (2, b"\x01\x02")


def test_a_clear_bitmap_is_written_and_counted(guest: Guest) -> None:
    """The driver's buffer is full of ones, and the used length does not say how many bits are set."""
    assert guest.inflate([RAM_PAGES] * 9) == (2, b"\x00\x00")
    assert guest.device.metrics.inflate.claims == 0


def test_duplicates_are_claimed_each_and_dropped_once(guest: Guest) -> None:
    assert guest.inflate([5, 9, 5, 5]) == (1, b"\x0f")
    inflate = guest.device.metrics.inflate
    assert (inflate.claims, inflate.claimed_zero_bytes) == (4, 2 * PAGE_SIZE)
    assert (inflate.discard_calls, inflate.discarded_bytes) == (2, 2 * PAGE_SIZE)


def test_a_flood_of_pfn_0_is_one_discard(guest: Guest) -> None:
    pfns = [value for pfn in range(100, 228) for value in (pfn, 0)]
    assert guest.inflate(pfns).claimed(pfns) == {0, *range(100, 228)}
    assert guest.device.metrics.inflate.discard_calls == 2


@pytest.mark.parametrize("pfns", [[RAM_PAGES], [0xFFFF_FFFF, 0xFFFF_FFFE], [0x8000_0000]])
def test_pages_outside_ram_are_skipped(guest: Guest, pfns: list[int]) -> None:
    assert guest.inflate(pfns) == (1, b"\x00")
    inflate = guest.device.metrics.inflate
    assert inflate.skipped_bytes[SkipReason.OUTSIDE_RAM] == len(pfns) * PAGE_SIZE
    assert inflate.discard_calls == 0


def test_without_bit_7_nothing_is_written_and_pages_are_dropped(ram: Ram) -> None:
    guest = Guest(WrappedMemory(ram), accepted=NO_BIT_7)
    assert guest.inflate([1, 2]) == (0, b"\xff")
    assert guest.zero_pages() == {1, 2}
    assert guest.device.metrics.inflate.claims == 0


def test_without_a_writable_part_there_is_no_bitmap(guest: Guest) -> None:
    assert guest.inflate([1, 2], bitmap=[]) == (0, b"")
    assert guest.zero_pages() == {1, 2}


def test_poison_means_no_bitmap_though_pages_are_dropped(guest: Guest) -> None:
    guest.device.write_config(12, b"\xaa\xaa\xaa\xaa")
    assert guest.inflate([1, 2]) == (0, b"\xff")
    assert guest.zero_pages() == {1, 2}


def test_a_poison_value_of_zero_is_compatible(guest: Guest) -> None:
    guest.device.write_config(12, bytes(4))
    assert guest.inflate([1, 2]) == (1, b"\x03")


def test_a_short_bitmap_buffer_takes_what_fits(guest: Guest) -> None:
    pfns = list(range(100, 120))
    answer = guest.inflate(pfns, bitmap=[(BITMAP_AT, 2)])
    assert answer == (2, b"\xff\xff")
    assert guest.device.metrics.inflate.claims == 16
    assert guest.device.metrics.inflate.claimed_zero_bytes == 16 * PAGE_SIZE


def test_a_long_bitmap_buffer_keeps_its_tail(guest: Guest) -> None:
    """A tail of ones past the used length is the driver's, and the device must not touch it."""
    assert guest.inflate([1] * 9, bitmap=[(BITMAP_AT, 8)]) == (2, b"\xff\x01" + b"\xff" * 6)


def test_a_bitmap_over_several_segments(guest: Guest) -> None:
    pfns = [*range(100, 110), RAM_PAGES, *range(111, 120)]
    answer = guest.inflate(pfns, bitmap=[(BITMAP_AT, 1), (SCRATCH_AT, 1), (BITMAP_AT + 100, 1)])
    assert answer == (3, b"\xff\xfb\x0f")


@pytest.mark.parametrize("length", [1, 2, 3, 5, 1023])
def test_an_array_that_is_not_whole_pfns_is_malformed(guest: Guest, length: int) -> None:
    guest.memory.write(PFNS_AT, bytes(1024))  # type: ignore[arg-type]
    with guest.unchanged():
        assert guest.send(QueueRole.INFLATE, [(PFNS_AT, length)], [(BITMAP_AT, 32)]) == 0
    assert guest.device.metrics.inflate.malformed == 1


def test_an_array_in_two_unaligned_pieces_is_one_array(guest: Guest) -> None:
    guest.write_pfns([7, 9])
    used_len = guest.send(QueueRole.INFLATE, [(PFNS_AT, 3), (PFNS_AT + 3, 5)], [(BITMAP_AT, 1)])
    assert used_len == 1
    assert guest.zero_pages() == {7, 9}


def test_an_array_in_a_writable_buffer_is_malformed(guest: Guest) -> None:
    array = guest.write_pfns([1, 2])
    with guest.unchanged():
        assert guest.send(QueueRole.INFLATE, (), [array]) == 0
    assert guest.device.metrics.inflate.malformed == 1


@pytest.mark.parametrize("role", [QueueRole.INFLATE, QueueRole.DEFLATE])
def test_the_longest_request_is_served_and_a_longer_one_refused(guest: Guest, role: QueueRole) -> None:
    array = guest.write_pfns([*range(REQUEST_PFNS_MAX), 3])
    with guest.unchanged():
        assert guest.send(role, [array]) == 0
    assert guest.device.metrics.queues[role].malformed == 1
    guest.send(role, [(PFNS_AT, REQUEST_PFNS_MAX * 4)])
    assert guest.device.metrics.queues[role].malformed == 1
    assert guest.device.metrics.queues[role].pfns == REQUEST_PFNS_MAX


def test_the_page_of_the_bitmap_is_neither_dropped_nor_claimed(guest: Guest) -> None:
    """The bitmap is written after the discards, so that page would not be zero."""
    answer = guest.inflate([50, 51, 52], bitmap=[(51 * PAGE_SIZE + 8, 1)])
    assert answer == (1, b"\x05")
    assert guest.zero_pages() == {50, 52}
    assert guest.bytes[51 * PAGE_SIZE + 9] == FILL


def test_a_bitmap_over_a_page_boundary_spares_both_pages(guest: Guest) -> None:
    pfns = [50, 51, 52, 53, *range(60, 72)]
    answer = guest.inflate(pfns, bitmap=[(52 * PAGE_SIZE - 1, 2)])
    assert answer.claimed(pfns) == set(pfns) - {51, 52}


def test_only_the_bytes_of_the_bitmap_that_are_written_count(guest: Guest) -> None:
    """The buffer goes on over two given pages, of which the device does not write a byte."""
    answer = guest.inflate([50, 51], bitmap=[(49 * PAGE_SIZE, 3 * PAGE_SIZE)])
    assert (answer.used_len, answer.bitmap[0]) == (1, 0x03)


def test_the_page_of_the_pfn_array_may_be_given_away(guest: Guest) -> None:
    answer = guest.inflate([50, 51], at=50 * PAGE_SIZE)
    assert answer == (1, b"\x03")


@pytest.mark.parametrize("role", list(QueueRole))
def test_ring_pages_are_neither_dropped_nor_claimed(guest: Guest, role: QueueRole) -> None:
    pfns = [100, RING_PAGES[role][0]]
    assert guest.inflate(pfns) == (1, b"\x01")
    assert guest.device.metrics.inflate.skipped_bytes[SkipReason.DEVICE_WRITES] == PAGE_SIZE


def test_a_bitmap_buffer_in_a_ring_is_malformed(guest: Guest) -> None:
    """What the device wrote there would be overwritten by its own used entries."""
    array = guest.write_pfns([1, 2])
    at = guest.rings[QueueRole.STATS].layout.used
    with guest.unchanged():
        assert guest.send(QueueRole.INFLATE, [array], [(at, 1)]) == 0
    assert guest.device.metrics.inflate.malformed == 1
    assert guest.zero_pages() == set()


def test_a_bitmap_buffer_over_itself_is_malformed(guest: Guest) -> None:
    """The second byte of the bitmap would be read in the place of the first."""
    array = guest.write_pfns(list(range(16)))
    with guest.unchanged():
        assert guest.send(QueueRole.INFLATE, [array], [(BITMAP_AT, 1), (BITMAP_AT, 1)]) == 0
    assert guest.device.metrics.inflate.malformed == 1


@pytest.mark.parametrize("failure", [None, OSError(12, "no memory"), RamError("closed")])
def test_a_run_that_fails_halfway_is_not_claimed(ram: Ram, failure: Exception | None) -> None:
    guest = Guest(FailingMemory(ram, lambda pfn: pfn == 12, failure))
    assert guest.inflate([10, 11, 12, 13, 20, 21]) == (1, b"\x30")
    inflate = guest.device.metrics.inflate
    assert (inflate.discard_failed, inflate.malformed) == (1, 0)
    assert inflate.proven_zero_bytes == inflate.claimed_zero_bytes == 2 * PAGE_SIZE


def test_inhibited_discards_are_not_claimed(guest: Guest) -> None:
    guest.device.inhibit_discard("postcopy")
    assert guest.inflate([1, 2]) == (1, b"\x00")
    assert guest.zero_pages() == set()
    guest.device.allow_discard("postcopy")
    assert guest.inflate([1, 2]) == (1, b"\x03")


def test_a_bitmap_in_a_page_that_the_request_before_gave_away(guest: Guest) -> None:
    """Both requests are waiting. The first claim holds when it is published, and the second
    request's bitmap is written after that: the interrupt in between sees a page of zeroes.
    """
    ring = guest.rings[QueueRole.INFLATE]
    seen: list[bool] = []
    first = guest.write_pfns([30])
    second = guest.write_pfns([31], SCRATCH_AT)
    guest.put(QueueRole.INFLATE, [first], [(BITMAP_AT, 1)], first=0)
    guest.put(QueueRole.INFLATE, [second], [(30 * PAGE_SIZE, 1)], first=2)

    def look() -> None:
        seen.append(guest.is_zero(30))
        ring.set_used_event(ring.used_idx)

    guest.on_interrupt = lambda role: look()
    guest.kick(QueueRole.INFLATE)
    assert ring.returned() == [(0, 1), (2, 1)]
    assert seen == [True, False]


# ------------------------------------------------------------- host pages of 2 MiB


def test_a_huge_page_is_dropped_when_its_last_sub_page_comes(huge_guest: Guest) -> None:
    """512 sub-pages come in requests of 256, as Linux sends them; QEMU never drops one."""
    pages = list(range(HUGE, 2 * HUGE))
    first = huge_guest.inflate(pages[:256])
    assert first.claimed(pages[:256]) == set()
    second = huge_guest.inflate(pages[:255:-1])
    assert second.claimed(pages[256:]) == set(pages[256:])
    assert huge_guest.zero_pages() == set(pages)
    inflate = huge_guest.device.metrics.inflate
    assert inflate.discard_calls == 1
    assert (inflate.proven_zero_bytes, inflate.claimed_zero_bytes) == (HUGE * PAGE_SIZE, 256 * PAGE_SIZE)
    assert inflate.skipped_bytes[SkipReason.PARTIAL_HOST_PAGE] == 256 * PAGE_SIZE


def test_a_pfn_between_that_is_no_ram_shifts_nothing(huge_guest: Guest) -> None:
    """QEMU's prototype marks the preceding indices of the request, and so the wrong ones here."""
    pfns = [*range(HUGE), RAM_PAGES + 5]
    pfns.insert(100, RAM_PAGES)
    pfns.insert(300, 7)
    answer = huge_guest.inflate(pfns)
    assert answer.claimed(pfns) == set(range(HUGE))
    assert answer.used_len == 65


def test_a_page_that_was_deflated_does_not_complete(huge_guest: Guest) -> None:
    huge_guest.inflate(list(range(511)))
    huge_guest.deflate([3])
    assert huge_guest.inflate([511]) == (1, b"\x00")
    assert huge_guest.zero_pages() == set()
    assert huge_guest.inflate([3]) == (1, b"\x01")


def test_a_page_that_left_and_came_back_is_dropped_again(huge_guest: Guest) -> None:
    huge_guest.inflate(list(range(HUGE)))
    huge_guest.deflate([8])
    huge_guest.fill()
    assert huge_guest.inflate([8]) == (1, b"\x01")


def test_without_must_tell_host_nothing_is_remembered(ram: Ram) -> None:
    """Such a driver may be using page 0 again by now (virtio 1.3, 5.5.6)."""
    guest = Guest(HugeMemory(ram), accepted=ALL_FEATURES & ~Feature.MUST_TELL_HOST)
    guest.inflate(list(range(256)))
    answer = guest.inflate(list(range(256, HUGE)))
    assert answer.claimed(list(range(256, HUGE))) == set()
    assert guest.zero_pages() == set()
    # A request that has it all is served, with nothing to remember.
    whole = list(range(HUGE))
    assert guest.inflate(whole).claimed(whole) == set(whole)


@pytest.mark.parametrize("length", [2, (REQUEST_PFNS_MAX + 1) * 4])
def test_a_deflate_that_cannot_be_read_forgets_all_sub_pages(huge_guest: Guest, length: int) -> None:
    """Nobody knows which pages the guest is using again, so none may complete a host page."""
    huge_guest.inflate(list(range(511)))
    assert huge_guest.send(QueueRole.DEFLATE, [(PFNS_AT, length)]) == 0
    assert huge_guest.inflate([511]) == (1, b"\x00")
    assert huge_guest.zero_pages() == set()


def test_a_deflate_of_a_broken_chain_forgets_all_sub_pages(huge_guest: Guest) -> None:
    huge_guest.inflate(list(range(511)))
    assert huge_guest.send(QueueRole.DEFLATE, [(1 << 50, 4)]) == 0
    assert huge_guest.inflate([511]) == (1, b"\x00")


def test_a_reset_forgets_all_sub_pages(huge_guest: Guest) -> None:
    huge_guest.inflate(list(range(511)))
    huge_guest.device.set_status(0)
    huge_guest.start()
    assert huge_guest.inflate([511]) == (1, b"\x00")


def test_the_huge_page_of_the_bitmap_is_left_whole(huge_guest: Guest) -> None:
    pfns = list(range(2 * HUGE))
    answer = huge_guest.inflate(pfns, bitmap=[(600 * PAGE_SIZE, 128)])
    assert answer.claimed(pfns) == set(range(HUGE))


def test_the_huge_page_of_the_rings_is_left_whole(huge_guest: Guest) -> None:
    pfns = list(range(RAM_PAGES - HUGE, RAM_PAGES))
    assert huge_guest.inflate(pfns).claimed(pfns) == set()


def test_a_huge_page_that_could_not_be_dropped_is_tried_again(huge_guest: Guest) -> None:
    huge_guest.device.inhibit_discard("vfio")
    huge_guest.inflate(list(range(HUGE)))
    huge_guest.device.allow_discard("vfio")
    assert huge_guest.inflate([0]) == (1, b"\x01")
    assert huge_guest.zero_pages() == set(range(HUGE))


# ------------------------------------------------------------- deflate


def test_deflate_changes_nothing_and_claims_nothing(guest: Guest) -> None:
    guest.inflate([1, 2])
    guest.fill()
    assert guest.deflate([2, 1, RAM_PAGES, 0xFFFF_FFFF]) == 0
    deflate = guest.device.metrics.deflate
    assert (deflate.pfns, deflate.discard_calls, deflate.claims, deflate.malformed) == (4, 0, 0, 0)


def test_a_deflate_without_a_readable_array_is_malformed(guest: Guest) -> None:
    with guest.unchanged():
        assert guest.send(QueueRole.DEFLATE, (), [(BITMAP_AT, 8)]) == 0
    assert guest.device.metrics.deflate.malformed == 1
