# SPDX-License-Identifier: GPL-2.0-only
"""Free page hinting: framed by command ids, held until DONE, never freed as zero."""

from __future__ import annotations

import pytest

from hostzero.driver.free_page_hint import HINT_BLOCK_BYTES, HINT_BLOCK_PAGES
from hostzero.virtio import CMD_ID_DONE, CMD_ID_MIN, CMD_ID_STOP, Feature, QueueRole
from tests.driver.conftest import Guest, MakeGuest
from tests.driver.fakes import ALL_FEATURES, Request

CMD = CMD_ID_MIN + 5


def commands(guest: Guest) -> list[int | str]:
    """What went over the hinting queue: command ids, and "block" for each block."""
    return [
        int.from_bytes(request.data, "little") if request.readable else "block"
        for request in guest.device.of(QueueRole.FREE_PAGE)
    ]


def test_a_run_is_framed_by_its_id_and_stop(make_guest: MakeGuest) -> None:
    """16 MiB of RAM is four blocks, and the driver's own pages lie in one of them."""
    guest = make_guest()
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert commands(guest) == [CMD, "block", "block", "block", CMD_ID_STOP]
    for request in guest.device.of(QueueRole.FREE_PAGE):
        assert [s.length for s in request.writable] in ([], [HINT_BLOCK_BYTES])
        assert all(s.gpa % HINT_BLOCK_BYTES == 0 for s in request.writable)
    assert guest.driver.num_free_page_blocks == 3


def test_done_gives_every_block_back_as_an_ordinary_page(make_guest: MakeGuest) -> None:
    guest = make_guest()
    free = guest.mm.nr_free
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert guest.mm.nr_free == free - 3 * HINT_BLOCK_PAGES
    guest.device.change(free_page_hint_cmd_id=CMD_ID_DONE)
    assert guest.mm.nr_free == free
    assert not guest.mm.known_zero.any(), "what a hinted block holds is unknown"


def test_stop_only_pauses(make_guest: MakeGuest) -> None:
    """A migration has many rounds; the kernel keeps the blocks from one to the next."""
    guest = make_guest()
    guest.device.change(free_page_hint_cmd_id=CMD)
    guest.device.change(free_page_hint_cmd_id=CMD_ID_STOP)
    assert guest.driver.num_free_page_blocks == 3
    guest.device.change(free_page_hint_cmd_id=CMD + 1)
    assert commands(guest)[-2:] == [CMD + 1, CMD_ID_STOP]
    guest.device.change(free_page_hint_cmd_id=CMD_ID_DONE)
    assert guest.driver.num_free_page_blocks == 0


def test_the_same_id_starts_one_run(make_guest: MakeGuest) -> None:
    """Every change of the configuration space calls back, also those about the balloon's size."""
    guest = make_guest()
    guest.device.change(free_page_hint_cmd_id=CMD)
    sent = len(commands(guest))
    guest.device.set_target(1)
    guest.device.change()
    assert len(commands(guest)) == sent


@pytest.mark.parametrize("cmd_id", [2, 3, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_any_other_id_starts_a_run(make_guest: MakeGuest, cmd_id: int) -> None:
    guest = make_guest()
    guest.device.change(free_page_hint_cmd_id=cmd_id)
    assert commands(guest)[0] == cmd_id


def test_a_stop_in_the_middle_ends_the_run(make_guest: MakeGuest) -> None:
    guest = make_guest()

    def stop_after_the_first(request: Request) -> int | None:
        if request.role is QueueRole.FREE_PAGE and request.writable:
            guest.device.config = guest.device.config._replace(free_page_hint_cmd_id=CMD_ID_STOP)
        return guest.device.honest(request)

    guest.device.answer = stop_after_the_first
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert commands(guest) == [CMD, "block", CMD_ID_STOP]


def test_an_id_that_changes_all_the_time_starts_one_run_a_callback(make_guest: MakeGuest) -> None:
    """A hostile host gets a start and a stop for each of its interrupts, and no endless loop."""
    guest = make_guest()

    def another_id(index: int) -> None:
        cmd_id = guest.device.config.free_page_hint_cmd_id + 1
        guest.device.config = guest.device.config._replace(free_page_hint_cmd_id=cmd_id)

    guest.device.before_notify = another_id
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert commands(guest) == [CMD, CMD_ID_STOP]


def test_a_ring_of_two_keeps_an_entry_for_the_stop_command(make_guest: MakeGuest) -> None:
    guest = make_guest(sizes={QueueRole.FREE_PAGE: 2})
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert commands(guest) == [CMD, "block", "block", "block", CMD_ID_STOP]


def test_a_device_that_reads_nothing_gets_a_ring_full_and_a_stop(make_guest: MakeGuest) -> None:
    """Hints may be withheld by either side: that is no failure, and DONE gives all of it back."""
    guest = make_guest(sizes={QueueRole.FREE_PAGE: 4})
    free = guest.mm.nr_free
    guest.device.answer = lambda r: None if r.role is QueueRole.FREE_PAGE else guest.device.honest(r)
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert commands(guest) == [CMD, "block", "block", CMD_ID_STOP]
    guest.device.change(free_page_hint_cmd_id=CMD + 1)
    assert len(commands(guest)) == 4, "no run while the device has not read the last"
    guest.device.change(free_page_hint_cmd_id=CMD_ID_DONE)
    assert guest.mm.nr_free == free
    guest.device.return_kept(QueueRole.FREE_PAGE)
    guest.device.answer = None
    guest.device.change(free_page_hint_cmd_id=CMD + 2)
    assert commands(guest)[4:] == [CMD + 2, "block", "block", "block", CMD_ID_STOP]


def test_remove_gives_the_blocks_back(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False)
    before = guest.mm.nr_free
    guest.driver.probe()
    guest.device.change(free_page_hint_cmd_id=CMD)
    guest.check_nothing_left(before)


def test_without_the_feature_the_command_id_is_not_read(make_guest: MakeGuest) -> None:
    guest = make_guest(features=int(ALL_FEATURES & ~Feature.FREE_PAGE_HINT))
    guest.device.change(free_page_hint_cmd_id=CMD)
    assert guest.device.of(QueueRole.FREE_PAGE) == []
    assert guest.driver.num_free_page_blocks == 0
