# SPDX-License-Identifier: GPL-2.0-only
"""Free page hinting: command ids, and no claim whatever happens."""

from __future__ import annotations

import struct

import pytest

from hostzero.device.hint import HintStatus
from hostzero.errors import DeviceError
from hostzero.ram import Ram
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.balloon import CMD_ID_DONE, CMD_ID_MIN, CMD_ID_STOP
from hostzero.virtio.features import Feature, QueueRole
from tests.device.guest import ALL_FEATURES, RING_PAGES, SCRATCH_AT, Guest, WrappedMemory

BLOCK = (0, 4 * PAGE_SIZE)


def _send_id(guest: Guest, cmd_id: int) -> int:
    guest.memory.write(Gpa(SCRATCH_AT), struct.pack("<I", cmd_id))
    return guest.send(QueueRole.FREE_PAGE, [(SCRATCH_AT, 4)])


def _config_id(guest: Guest) -> int:
    return int.from_bytes(guest.device.read_config(8, 4), "little")


def _status(guest: Guest) -> HintStatus:
    return guest.device.hint_status


def _hint(guest: Guest) -> int:
    return guest.send(QueueRole.FREE_PAGE, (), [BLOCK])


def test_a_whole_run(guest: Guest) -> None:
    assert _config_id(guest) == CMD_ID_STOP
    assert guest.device.hint_start() == CMD_ID_MIN == _config_id(guest)
    assert _status(guest) is HintStatus.REQUESTED
    assert _send_id(guest, CMD_ID_MIN) == 0
    assert _status(guest) is HintStatus.STARTED
    # The driver reads the id again at any configuration change; another value would end the run.
    assert _config_id(guest) == CMD_ID_MIN
    assert _hint(guest) == 0
    assert _send_id(guest, CMD_ID_STOP) == 0
    assert _status(guest) is HintStatus.STOPPED
    guest.device.hint_done()
    assert _config_id(guest) == CMD_ID_DONE
    assert guest.config_changes == 2
    assert guest.device.metrics.hinted_bytes == BLOCK[1]


def test_each_run_has_its_own_id(guest: Guest) -> None:
    assert [guest.device.hint_start() for _ in range(3)] == [CMD_ID_MIN, CMD_ID_MIN + 1, CMD_ID_MIN + 2]


def test_ids_wrap_to_the_first_one_and_not_to_stop_or_done(guest: Guest) -> None:
    guest.device._hint._run = 0xFFFF_FFFE
    assert [guest.device.hint_start() for _ in range(2)] == [0xFFFF_FFFF, CMD_ID_MIN]


def test_pages_are_left_alone_and_nothing_is_claimed(guest: Guest) -> None:
    guest.device.hint_start()
    _send_id(guest, CMD_ID_MIN)
    with guest.unchanged():
        assert _hint(guest) == 0
    assert guest.device.metrics.free_page.claims == guest.device.metrics.claimed_zero_bytes == 0


def test_pages_outside_a_run_are_not_counted(guest: Guest) -> None:
    _hint(guest)
    guest.device.hint_start()
    _hint(guest)
    assert guest.device.metrics.hinted_bytes == 0


def test_an_id_of_an_earlier_run_starts_nothing(guest: Guest) -> None:
    old = guest.device.hint_start()
    guest.device.hint_start()
    _send_id(guest, old)
    assert _status(guest) is HintStatus.REQUESTED


def test_any_other_id_ends_a_running_run(guest: Guest) -> None:
    cmd_id = guest.device.hint_start()
    _send_id(guest, cmd_id)
    _send_id(guest, cmd_id)
    assert _status(guest) is HintStatus.STARTED
    _send_id(guest, cmd_id + 1)
    assert _status(guest) is HintStatus.STOPPED


def test_the_host_stops_and_ends_a_run(guest: Guest) -> None:
    cmd_id = guest.device.hint_start()
    _send_id(guest, cmd_id)
    guest.device.hint_stop()
    assert _config_id(guest) == CMD_ID_STOP
    _hint(guest)
    assert guest.device.metrics.hinted_bytes == 0
    guest.device.hint_done()
    assert _config_id(guest) == CMD_ID_DONE


@pytest.mark.parametrize("length", [1, 3, 5, 4096])
def test_an_id_that_is_not_4_bytes_is_malformed(guest: Guest, length: int) -> None:
    guest.device.hint_start()
    assert guest.send(QueueRole.FREE_PAGE, [(SCRATCH_AT, length)]) == 0
    assert guest.device.metrics.free_page.malformed == 1
    assert _status(guest) is HintStatus.REQUESTED


def test_an_id_with_pages_or_nothing_at_all_is_malformed(guest: Guest) -> None:
    assert guest.send(QueueRole.FREE_PAGE, [(SCRATCH_AT, 4)], [BLOCK]) == 0
    assert guest.send(QueueRole.FREE_PAGE, (), [(0, 0)]) == 0
    assert guest.device.metrics.free_page.malformed == 2


def test_pages_are_dropped_only_on_request_and_never_claimed(ram: Ram) -> None:
    guest = Guest(WrappedMemory(ram), discard_hints=True)
    _hint(guest)
    assert guest.zero_pages() == set()
    _send_id(guest, guest.device.hint_start())
    assert _hint(guest) == 0
    assert guest.zero_pages() == {0, 1, 2, 3}
    ring_page = RING_PAGES[QueueRole.STATS][0] * PAGE_SIZE
    with guest.unchanged():
        guest.send(QueueRole.FREE_PAGE, (), [(ring_page, PAGE_SIZE)])
    assert guest.device.metrics.claimed_zero_bytes == 0


def test_poisoned_pages_are_not_dropped(ram: Ram) -> None:
    guest = Guest(WrappedMemory(ram), discard_hints=True)
    guest.device.write_config(12, b"\x01\0\0\0")
    _send_id(guest, guest.device.hint_start())
    _hint(guest)
    assert guest.zero_pages() == set()


def test_hinting_needs_its_feature_and_a_driver(ram: Ram) -> None:
    guest = Guest(WrappedMemory(ram), accepted=ALL_FEATURES & ~Feature.FREE_PAGE_HINT)
    for call in (guest.device.hint_start, guest.device.hint_stop, guest.device.hint_done):
        with pytest.raises(DeviceError, match="accepted FREE_PAGE_HINT"):
            call()
    assert guest.config_changes == 0


def test_a_reset_ends_the_run_and_its_id_is_not_used_again(guest: Guest) -> None:
    guest.device.hint_start()
    guest.device.set_status(0)
    assert _config_id(guest) == CMD_ID_STOP
    guest.start()
    assert guest.device.hint_start() == CMD_ID_MIN + 1
