# SPDX-License-Identifier: GPL-2.0-only
"""Reports through a ring. `Guest.report` checks each claim by reading every page of it."""

from __future__ import annotations

import pytest

from hostzero.device.metrics import SkipReason
from hostzero.ram import Ram
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature, QueueRole
from tests.device.guest import (
    ALL_FEATURES,
    FILL,
    RAM_PAGES,
    RING_PAGES,
    FailingMemory,
    Guest,
    HugeMemory,
    WrappedMemory,
    ram_of,
)


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_a_dropped_buffer_is_answered_by_its_length(backing: str) -> None:
    with ram_of(backing) as ram:
        guest = Guest(WrappedMemory(ram))
        assert guest.report((512, 512)) == 512 * PAGE_SIZE
        assert guest.zero_pages() == set(range(512, 1024))
        reporting = guest.device.metrics.reporting
        assert (reporting.claims, reporting.claimed_zero_bytes) == (1, 512 * PAGE_SIZE)
        assert reporting.proven_zero_bytes == 512 * PAGE_SIZE


def test_without_bit_6_the_used_length_is_0_and_pages_are_dropped(ram: Ram) -> None:
    guest = Guest(WrappedMemory(ram), accepted=ALL_FEATURES & ~Feature.DEVICE_INIT_REPORTED)
    assert guest.report((0, 512)) == 0
    assert guest.zero_pages() == set(range(512))
    assert guest.device.metrics.reporting.claims == 0


def test_segments_that_are_all_dropped_are_one_claim(guest: Guest) -> None:
    assert guest.report((0, 1), (100, 4), (3, 2)) == 7 * PAGE_SIZE


@pytest.mark.parametrize("failure", [None, OSError(12, "no memory")])
def test_one_failed_segment_leaves_no_claim(ram: Ram, failure: Exception | None) -> None:
    """A sum of the dropped bytes would not say which segment failed."""
    guest = Guest(FailingMemory(ram, lambda pfn: pfn == 101, failure))
    assert guest.report((0, 1), (100, 4), (3, 2)) == 0
    assert guest.zero_pages() == {0, 3, 4, 100}
    reporting = guest.device.metrics.reporting
    assert (reporting.discard_failed, reporting.proven_zero_bytes, reporting.claims) == (1, 3 * PAGE_SIZE, 0)


@pytest.mark.parametrize(
    "segment",
    [(PAGE_SIZE + 512, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE + 1), (PAGE_SIZE, 1), (8, 4 * PAGE_SIZE)],
)
def test_a_buffer_that_is_not_whole_pages_is_not_dropped(guest: Guest, segment: tuple[int, int]) -> None:
    with guest.unchanged():
        assert guest.send(QueueRole.REPORTING, (), [segment]) == 0
    reporting = guest.device.metrics.reporting
    assert reporting.skipped_bytes[SkipReason.UNALIGNED] == segment[1]
    assert reporting.discard_calls == reporting.malformed == 0


def test_a_buffer_outside_ram_is_malformed(guest: Guest) -> None:
    with guest.unchanged():
        assert guest.send(QueueRole.REPORTING, (), [(RAM_PAGES * PAGE_SIZE, PAGE_SIZE)]) == 0
    assert guest.device.metrics.reporting.malformed == 1


@pytest.mark.parametrize("role", list(QueueRole))
def test_a_buffer_with_a_live_ring_is_not_dropped(guest: Guest, role: QueueRole) -> None:
    """The device writes its used entry there afterwards, so a claim would be false."""
    pages = RING_PAGES[role]
    assert guest.report((pages[0], len(pages))) == 0
    assert guest.device.metrics.reporting.skipped_bytes[SkipReason.DEVICE_WRITES] == len(pages) * PAGE_SIZE
    assert guest.report((0, 1)) == PAGE_SIZE


def test_a_readable_part_is_malformed(guest: Guest) -> None:
    with guest.unchanged():
        assert guest.send(QueueRole.REPORTING, [(0, PAGE_SIZE)], [(PAGE_SIZE, PAGE_SIZE)]) == 0
        assert guest.send(QueueRole.REPORTING, [(0, PAGE_SIZE)]) == 0
    assert guest.device.metrics.reporting.malformed == 2


def test_an_empty_buffer_is_malformed(guest: Guest) -> None:
    assert guest.send(QueueRole.REPORTING, (), [(0, 0)]) == 0
    assert guest.device.metrics.reporting.malformed == 1


def test_inhibited_discards_are_not_claimed(guest: Guest) -> None:
    guest.device.inhibit_discard("vfio")
    assert guest.report((0, 4)) == 0
    assert guest.zero_pages() == set()


def test_poison_means_no_discard(guest: Guest) -> None:
    guest.device.write_config(12, b"\xaa\xaa\xaa\xaa")
    assert guest.report((0, 4)) == 0
    assert guest.bytes[0] == FILL
    assert guest.device.metrics.reporting.skipped_bytes[SkipReason.POISON] == 4 * PAGE_SIZE
    guest.device.write_config(12, bytes(4))
    assert guest.report((0, 4)) == 4 * PAGE_SIZE


@pytest.mark.parametrize(
    ("segment", "used_len"),
    [((512, 512), 512 * PAGE_SIZE), ((0, 1024), 1024 * PAGE_SIZE), ((0, 256), 0), ((256, 512), 0)],
)
def test_huge_pages_are_claimed_whole_only(ram: Ram, segment: tuple[int, int], used_len: int) -> None:
    guest = Guest(HugeMemory(ram))
    assert guest.report(segment) == used_len
    assert len(guest.zero_pages()) == used_len // PAGE_SIZE


def test_a_batch_is_answered_each_by_its_own(ram: Ram) -> None:
    """Linux puts a batch as one buffer for each page and kicks once (patch 27)."""
    guest = Guest(FailingMemory(ram, lambda pfn: pfn == 20))
    for n in range(4):
        guest.put(QueueRole.REPORTING, (), [(10 * n * PAGE_SIZE, 2 * PAGE_SIZE)], first=n)
    guest.kick(QueueRole.REPORTING)
    returned = guest.rings[QueueRole.REPORTING].returned()
    assert returned == [(n, 0 if n == 2 else 2 * PAGE_SIZE) for n in range(4)]
    assert guest.zero_pages() == {0, 1, 10, 11, 30, 31}
    assert guest.interrupts[QueueRole.REPORTING] == 1
