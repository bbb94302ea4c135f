# SPDX-License-Identifier: GPL-2.0-only
"""The held buffer, and what is read from it."""

from __future__ import annotations

import struct

import pytest

from hostzero.device.stats import STATS_ENTRIES_MAX
from hostzero.units import Gpa
from hostzero.virtio.balloon import StatTag
from hostzero.virtio.features import QueueRole
from tests.device.guest import BITMAP_AT, SCRATCH_AT, Guest


def _put(guest: Guest, data: bytes, first: int = 0) -> int:
    guest.memory.write(Gpa(SCRATCH_AT), data)
    head = guest.put(QueueRole.STATS, [(SCRATCH_AT, len(data))], first=first)
    guest.kick(QueueRole.STATS)
    return head


def _entries(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", tag, value) for tag, value in pairs)


def test_a_buffer_is_read_and_held_until_the_host_asks(guest: Guest) -> None:
    head = _put(guest, _entries((4, 1 << 40), (5, 2**64 - 1)))
    assert guest.rings[QueueRole.STATS].returned() == []
    assert guest.device.stats == {StatTag.MEMFREE: 1 << 40, StatTag.MEMTOT: 2**64 - 1}
    assert guest.device.request_stats()
    assert guest.rings[QueueRole.STATS].returned() == [(head, 0)]
    assert guest.device.metrics.stats.interrupts == guest.interrupts[QueueRole.STATS] == 1


def test_there_is_nothing_to_ask_with_until_the_next_buffer(guest: Guest) -> None:
    assert not guest.device.request_stats()
    _put(guest, _entries((4, 1)))
    assert guest.device.request_stats()
    assert not guest.device.request_stats()
    _put(guest, _entries((4, 2)))
    assert guest.device.stats == {StatTag.MEMFREE: 2}
    assert guest.device.metrics.stats_updates == 2
    assert guest.device.request_stats()


def test_a_second_buffer_goes_back_and_the_first_is_held(guest: Guest) -> None:
    first = _put(guest, _entries((4, 1)))
    second = _put(guest, _entries((4, 2)), first=5)
    assert guest.rings[QueueRole.STATS].returned() == [(second, 0)]
    assert guest.device.metrics.stats.malformed == 1
    assert guest.device.stats == {StatTag.MEMFREE: 1}
    guest.device.request_stats()
    assert guest.rings[QueueRole.STATS].returned() == [(first, 0)]


def test_unknown_tags_and_a_cut_entry_are_ignored_and_the_last_double_counts(guest: Guest) -> None:
    _put(guest, _entries((4, 1), (16, 9), (0xFFFF, 9), (4, 3)) + _entries((5, 7))[:9])
    assert guest.device.stats == {StatTag.MEMFREE: 3}


def test_figures_of_the_buffer_before_do_not_stay(guest: Guest) -> None:
    _put(guest, _entries((4, 1), (5, 1)))
    guest.device.request_stats()
    _put(guest, _entries((5, 2)))
    assert guest.device.stats == {StatTag.MEMTOT: 2}


def test_entries_past_the_limit_are_not_read(guest: Guest) -> None:
    _put(guest, _entries(*[(16, 0)] * (STATS_ENTRIES_MAX - 1), (4, 1), (5, 1)))
    assert guest.device.stats == {StatTag.MEMFREE: 1}


def test_all_16_tags_of_linux_are_known(guest: Guest) -> None:
    _put(guest, _entries(*((tag, tag + 100) for tag in range(16))))
    assert {int(tag): value for tag, value in guest.device.stats.items()} == {n: n + 100 for n in range(16)}


def test_a_writable_buffer_is_malformed(guest: Guest) -> None:
    with guest.unchanged():
        assert guest.send(QueueRole.STATS, (), [(SCRATCH_AT, 160)]) == 0
        assert guest.send(QueueRole.STATS, [(SCRATCH_AT, 160)], [(BITMAP_AT, 1)]) == 0
    assert guest.device.metrics.stats.malformed == 2


@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_buffer_without_a_whole_entry(guest: Guest, length: int) -> None:
    """An empty one is malformed; a cut one is a buffer like any other, with no figures in it."""
    _put(guest, bytes(length))
    assert guest.device.stats == {}
    assert guest.device.metrics.stats.malformed == (1 if length == 0 else 0)
    assert guest.device.request_stats() is (length > 0)


def test_a_reset_forgets_the_held_buffer_and_the_figures(guest: Guest) -> None:
    _put(guest, _entries((4, 1)))
    guest.device.set_status(0)
    assert not guest.device.request_stats()
    guest.start()
    assert not guest.device.request_stats()
    assert guest.device.stats == {}
    assert guest.rings[QueueRole.STATS].returned() == []


def test_stats_are_a_copy(guest: Guest) -> None:
    _put(guest, _entries((4, 1)))
    guest.device.stats.clear()
    assert guest.device.stats == {StatTag.MEMFREE: 1}
