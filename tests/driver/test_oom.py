# SPDX-License-Identifier: GPL-2.0-only
"""What comes back when the guest runs out of memory."""

from __future__ import annotations

import pytest

from hostzero.driver.free_page_hint import HINT_BLOCK_PAGES
from hostzero.driver.guest_mm import Pfns
from hostzero.virtio import CMD_ID_DONE, Feature, QueueRole
from tests.driver.conftest import MakeGuest
from tests.driver.fakes import ALL_FEATURES, Request

NO_HINT = ALL_FEATURES & ~Feature.FREE_PAGE_HINT
CMD = 0x8000_0000


def test_up_to_256_pages_leak_at_a_time(make_guest: MakeGuest) -> None:
    guest = make_guest(features=int(NO_HINT))
    guest.device.set_target(300)
    (notify,) = guest.mm.oom_notifiers
    free = guest.mm.nr_free
    assert notify() == 256
    assert guest.mm.nr_free == free + 256
    assert guest.device.config.actual == 44
    assert notify() == 44
    assert notify() == 0
    assert guest.device.config.actual == 0


def test_known_zero_pages_stay_known_zero(make_guest: MakeGuest) -> None:
    guest = make_guest(features=int(NO_HINT))
    guest.device.set_target(300)
    guest.mm.oom_notifiers[0]()
    assert guest.mm.known_zero.sum() == 256
    assert guest.mm.false_claims == []


def test_without_the_feature_nobody_is_registered(make_guest: MakeGuest) -> None:
    guest = make_guest(features=int(NO_HINT & ~Feature.DEFLATE_ON_OOM))
    assert guest.mm.oom_notifiers == []


def test_hinted_blocks_go_first(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.change(free_page_hint_cmd_id=CMD)
    guest.device.set_target(300)
    blocks = guest.driver.num_free_page_blocks
    assert blocks > 0
    (notify,) = guest.mm.oom_notifiers
    assert notify() == blocks * HINT_BLOCK_PAGES
    assert guest.driver.num_pages == 300
    assert notify() == 256


def test_a_block_that_the_device_has_not_read_stays(make_guest: MakeGuest) -> None:
    """It may still act on the hint, and the guest would be writing to the page by then."""
    guest = make_guest(features=int(ALL_FEATURES & ~Feature.DEFLATE_ON_OOM))
    guest.device.answer = lambda r: None if r.role is QueueRole.FREE_PAGE else guest.device.honest(r)
    guest.device.change(free_page_hint_cmd_id=CMD)
    blocks = guest.driver.num_free_page_blocks
    (notify,) = guest.mm.oom_notifiers
    assert notify() == 0
    assert guest.driver.num_free_page_blocks == blocks > 0
    guest.device.change(free_page_hint_cmd_id=CMD_ID_DONE)
    assert guest.driver.num_free_page_blocks == 0


def test_an_oom_inside_a_request_leaks_nothing(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """The balloon's lock is held: the kernel deadlocked here before patch 28."""
    guest = make_guest(features=int(NO_HINT))
    freed: list[int] = []

    def out_of_memory(request: Request) -> int | None:
        if request.role is QueueRole.INFLATE:
            freed.append(guest.mm.oom_notifiers[0]())
        return guest.device.honest(request)

    guest.device.answer = out_of_memory
    guest.device.set_target(10)
    assert freed == [0]
    assert guest.driver.num_pages == 10
    assert caplog.text == "", "nothing is wrong with that"


def test_a_device_that_does_not_answer_frees_nothing_and_harms_nobody(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """The allocation that ran out of memory goes on to fail by itself, with its own error."""
    guest = make_guest(features=int(NO_HINT))
    guest.device.set_target(300)
    guest.device.answer = lambda request: None
    assert guest.mm.oom_notifiers[0]() == 0
    assert "cannot give pages back: device did not answer" in caplog.text
    assert guest.mm.oom_notifiers[0]() == 0, "and is not asked again"


def test_a_request_takes_no_memory_while_the_balloon_is_locked(
    make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch 28: offered indirect descriptors, a request of two buffers would allocate a table for them."""
    guest = make_guest(features=int(NO_HINT | Feature.RING_INDIRECT_DESC))
    assert Feature.RING_INDIRECT_DESC not in guest.driver.features
    locked: list[int] = []
    device = guest.device

    def under_the_lock(request: Request) -> int | None:
        # The notifier gives pages back unless the lock is held.
        if request.role in {QueueRole.INFLATE, QueueRole.DEFLATE}:
            locked.append(len(guest.mm.alloc_log))
            assert guest.mm.oom_notifiers[0]() == 0
        return device.honest(request)

    allocate = guest.mm.alloc_pages_bulk

    def outside_the_lock(gfp: int, count: int) -> Pfns:
        session = guest.driver._session
        assert session is not None
        assert not session.inflation.locked
        return allocate(gfp, count)

    monkeypatch.setattr(guest.mm, "alloc_pages_bulk", outside_the_lock)
    device.answer = under_the_lock
    allocations = len(guest.mm.alloc_log)
    device.set_target(300)
    device.set_target(0)
    # One bulk allocation before each of the two inflate requests, and nothing for the two of deflate.
    assert [count - allocations for count in locked] == [1, 2, 2, 2]
    inflate = device.of(QueueRole.INFLATE)
    assert [(len(r.readable), len(r.writable)) for r in inflate] == [(1, 1), (1, 1)]
