# SPDX-License-Identifier: GPL-2.0-only
"""Probe, remove, freeze, restore, and following the target, in front of good and bad devices."""

from __future__ import annotations

import logging

import pytest

from hostzero.driver import State, VirtioBalloon
from hostzero.errors import DriverError, HostzeroError, MmError, NegotiationError
from hostzero.mm.page_reporting import PageReportingDevInfo
from hostzero.virtio import BalloonConfig, DriverQueue, Feature, QueueRole
from tests.driver.conftest import MakeGuest
from tests.driver.fakes import ALL_FEATURES, FakeConfig, FakeDevice, Request

NO_OOM = ALL_FEATURES & ~Feature.DEFLATE_ON_OOM
CMD = 0x8000_0000


class TestLifecycle:
    def test_remove_leaves_no_page_allocated(self, make_guest: MakeGuest) -> None:
        """With pages in the balloon, blocks held for hinting and reported blocks."""
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.set_target(700)
        guest.device.change(free_page_hint_cmd_id=CMD)
        guest.check_nothing_left(before)
        assert guest.driver.features == Feature(0)
        assert guest.device.status() == 0

    def test_remove_tells_the_host_before_it_resets(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.device.set_target(300)
        guest.device.log.clear()
        guest.driver.remove()
        assert guest.device.log == [
            "notify 1",
            "write actual 0x2c",
            "notify 1",
            "write actual 0x0",
            "write actual 0x0",
            "status 0x0",
        ]

    def test_a_driver_can_be_bound_again(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        for _ in range(3):
            guest.driver.probe()
            guest.device.set_target(10)
            assert guest.driver.num_pages == 10
            guest.check_nothing_left(before)

    def test_the_target_is_followed_at_probe(self, make_guest: MakeGuest) -> None:
        guest = make_guest(config=None, probe=False)
        guest.device.config = BalloonConfig(num_pages=33)
        guest.driver.probe()
        assert guest.driver.num_pages == 33

    @pytest.mark.parametrize(
        ("call", "state", "needed"),
        [
            ("probe", "active", "not probed"),
            ("restore", "active", "frozen"),
            ("remove", "not probed", "active or frozen or failed"),
            ("freeze", "not probed", "active or failed"),
            ("probe", "frozen", "not probed"),
            ("freeze", "frozen", "active or failed"),
        ],
    )
    def test_calls_in_the_wrong_state_say_which_is_right(
        self, make_guest: MakeGuest, call: str, state: str, needed: str
    ) -> None:
        guest = make_guest(probe=state != "not probed")
        if state == "frozen":
            guest.driver.freeze()
        assert guest.driver.state.value == state
        with pytest.raises(DriverError, match=f"{call}: the driver is {state}, and must be {needed}"):
            getattr(guest.driver, call)()
        assert guest.driver.state.value == state

    def test_a_second_reporting_device_undoes_the_probe(self, make_guest: MakeGuest) -> None:
        """The kernel allows one; the driver that comes late must leave nothing behind."""
        guest = make_guest(probe=False)
        other = PageReportingDevInfo(report=lambda entries: None)
        guest.mm.page_reporting.register(other)
        before = guest.mm.nr_free
        with pytest.raises((DriverError, MmError), match="registered"):
            guest.driver.probe()
        assert guest.mm.page_reporting.dev is other
        assert guest.mm.nr_free == before
        assert guest.mm.oom_notifiers == []

    def test_callbacks_after_remove_do_nothing(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.driver.remove()
        guest.device.log.clear()
        guest.device.set_target(100)
        guest.mm.clock.advance(10)
        assert guest.device.log == []
        assert guest.driver.num_pages == 0

    def test_remove_takes_back_the_retry(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.mm.take_all_but(3)
        guest.device.set_target(80)
        assert guest.driver._size_work.pending
        guest.driver.remove()
        assert not guest.driver._size_work.pending


class TestPoisonVal:
    def test_poisoning_writes_its_value(self, make_guest: MakeGuest) -> None:
        guest = make_guest(config=FakeConfig(page_poisoning=True))
        assert guest.device.config.poison_val == 0xAAAA_AAAA
        assert Feature.DEVICE_INIT_REPORTED not in guest.driver.features

    def test_init_on_free_writes_zero_and_keeps_both_bits(self, make_guest: MakeGuest) -> None:
        guest = make_guest(config=FakeConfig(init_on_free=True))
        assert "write poison_val 0x0" in guest.device.log
        assert Feature.DEVICE_INIT_REPORTED in guest.driver.features
        assert Feature.DEVICE_INIT_ON_INFLATE in guest.driver.features

    def test_it_is_written_before_the_device_goes(self, make_guest: MakeGuest) -> None:
        guest = make_guest(config=FakeConfig(page_poisoning=True))
        log = guest.device.log
        assert log.index("write poison_val 0xaaaaaaaa") < log.index("status 0xf")

    def test_without_the_feature_it_is_not_written(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        assert not any("poison_val" in line for line in guest.device.log)


class TestTarget:
    def test_up_and_down(self, make_guest: MakeGuest) -> None:
        guest = make_guest(features=int(NO_OOM))
        for target in (10, 700, 257, 256, 0, 1):
            guest.device.set_target(target)
            assert guest.driver.num_pages == guest.mm.balloon.count == target
            assert guest.device.config.actual == target
            assert guest.mm.managed == guest.mm.nr_pages - target
        guest.driver.remove()
        assert guest.mm.false_claims == []

    def test_out_of_memory_retries_every_200_ms(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.mm.take_all_but(100)
        held = [guest.mm.alloc_pages(0) for _ in range(40)]
        guest.device.set_target(80)
        assert guest.driver.num_pages == guest.device.config.actual == 60
        guest.mm.clock.advance(0.19)
        for pfn in held:
            guest.mm.free_pages(pfn)
        assert guest.driver.num_pages == 60
        guest.mm.clock.advance(0.02)
        assert guest.driver.num_pages == guest.device.config.actual == 80
        notes = len(guest.device.log)
        guest.mm.clock.advance(5)
        assert len(guest.device.log) == notes, "at the target nothing is retried"

    @pytest.mark.parametrize("wish", [5000, 0x7FFF_FFFF, 0xFFFF_FFFF])
    def test_a_target_above_ram_means_all_of_ram(self, make_guest: MakeGuest, wish: int) -> None:
        guest = make_guest()
        guest.device.set_target(wish)
        assert guest.mm.nr_free == 0
        assert guest.driver.towards_target() == guest.mm.nr_pages - guest.driver.num_pages
        guest.mm.clock.advance(1)
        guest.device.set_target(0)
        assert guest.driver.num_pages == 0

    def test_a_host_that_changes_its_mind_at_every_request_cannot_keep_the_guest(
        self, make_guest: MakeGuest
    ) -> None:
        guest = make_guest()

        def other_way(index: int) -> None:
            pages = 0 if guest.device.config.num_pages else 1000
            guest.device.config = guest.device.config._replace(num_pages=pages)

        guest.device.before_notify = other_way
        guest.device.set_target(500)
        assert len(guest.device.requests) < 100
        guest.device.before_notify = None
        guest.device.set_target(7)
        assert guest.driver.num_pages == 7

    def test_a_callback_within_a_request_is_followed_by_the_same_loop(self, make_guest: MakeGuest) -> None:
        """The device raises the target while the driver inflates: no second inflation starts inside."""
        guest = make_guest()
        depth: list[int] = []

        def more(request: Request) -> int | None:
            if request.role is QueueRole.INFLATE and not depth:
                depth.append(guest.driver.num_pages)
                guest.device.set_target(20)
                assert guest.driver.num_pages == depth[0]
            return guest.device.honest(request)

        guest.device.answer = more
        guest.device.set_target(10)
        assert guest.driver.num_pages == 20

    def test_a_balloon_whose_list_is_short_does_not_spin(self, make_guest: MakeGuest) -> None:
        """Pages isolated for compaction are off the list for a while; the rest comes later."""
        guest = make_guest()
        guest.device.set_target(10)
        isolated = [guest.mm.balloon.pages.pop() for _ in range(4)]
        guest.device.set_target(0)
        assert guest.driver.num_pages == 4
        guest.mm.balloon.pages.extend(isolated)
        guest.mm.clock.advance(0.2)
        assert guest.driver.num_pages == 0


class TestFreezeAndRestore:
    def test_freeze_empties_the_balloon_and_lets_the_queues_go(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.set_target(300)
        guest.driver.freeze()
        assert guest.mm.nr_free == before
        assert guest.device.status() == 0
        with pytest.raises(DriverError, match="no report: the balloon driver is frozen"):
            guest.mm.page_reporting.report([(512, 9)])
        guest.device.set_target(1)
        assert guest.driver.num_pages == 0
        assert guest.mm.oom_notifiers[0]() == 0

    def test_restore_refills_and_reports_again(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.set_target(300)
        guest.driver.freeze()
        guest.driver.restore()
        assert guest.driver.num_pages == guest.device.config.actual == 300
        assert guest.mm.page_reporting.report([(2048, 3)]) == [True]
        assert len(guest.device.of(QueueRole.STATS)) == 2
        guest.check_nothing_left(before)

    def test_restore_writes_the_poison_value_again(self, make_guest: MakeGuest) -> None:
        """The device's value is 0 after its reset; the kernel leaves it there."""
        guest = make_guest(config=FakeConfig(page_poisoning=True))
        guest.driver.freeze()
        assert guest.device.config.poison_val == 0
        guest.driver.restore(hibernated=True)
        assert guest.device.config.poison_val == 0xAAAA_AAAA

    def test_hibernation_forgets_zero_claims_before_anything_is_allocated(
        self, make_guest: MakeGuest
    ) -> None:
        """The rings are asked for as zeroed pages: a false claim would be consumed right there."""
        guest = make_guest()
        guest.device.set_target(300)
        guest.driver.freeze()
        assert guest.mm.known_zero.sum() == 300
        free = guest.mm.nr_free
        # The image does not hold the contents of free pages.
        for pfn in range(guest.mm.nr_pages):
            if guest.mm.free[pfn]:
                guest.mm.page(pfn)[:] = 0x5A
        guest.device.set_target(0)
        guest.driver.restore(hibernated=True)
        assert guest.mm.forgot_claims_with_free == free
        assert not guest.mm.known_zero.any()

    def test_suspend_to_ram_keeps_the_claims(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.device.set_target(300)
        guest.device.config = guest.device.config._replace(num_pages=0)
        guest.driver.freeze()
        guest.driver.restore()
        assert guest.mm.forgot_claims_with_free is None
        assert guest.mm.known_zero.sum() >= 290

    def test_a_restored_device_that_lost_a_feature_is_refused(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.driver.freeze()
        guest.device.features &= ~int(Feature.DEVICE_INIT_REPORTED)
        with pytest.raises(NegotiationError, match="no longer offers device-init-reported"):
            guest.driver.restore()
        assert guest.driver.state is State.FROZEN
        guest.device.features |= int(Feature.DEVICE_INIT_REPORTED)
        guest.driver.restore()
        assert guest.mm.page_reporting.report([(2048, 3)]) == [True]

    def test_a_failed_restore_leaves_nothing_and_can_be_repeated(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.driver.freeze()
        guest.device.sizes[QueueRole.REPORTING] = 3
        with pytest.raises(DriverError, match="not a power of two"):
            guest.driver.restore()
        assert guest.mm.nr_free == before
        guest.device.sizes[QueueRole.REPORTING] = 8
        guest.driver.restore()
        guest.check_nothing_left(before)

    def test_a_smaller_reporting_ring_lowers_the_capacity(self, make_guest: MakeGuest) -> None:
        guest = make_guest(sizes={QueueRole.REPORTING: 32})
        dev = guest.mm.page_reporting.dev
        assert dev is not None
        guest.driver.freeze()
        guest.device.sizes[QueueRole.REPORTING] = 4
        guest.driver.restore()
        assert dev.capacity == 4

    def test_a_failed_device_can_be_frozen_and_restored(self, make_guest: MakeGuest) -> None:
        """The way back without unbinding: everything the device had is taken from it first."""
        guest = make_guest()
        guest.device.set_target(10)
        guest.device.answer = lambda request: None
        with pytest.raises(DriverError):
            guest.device.set_target(20)
        guest.device.answer = None
        guest.driver.freeze()
        assert guest.mm.balloon.count == 0
        guest.driver.restore()
        assert guest.driver.num_pages == 20


class TestBadDevices:
    def test_a_device_that_asks_for_a_reset_gets_one(
        self, make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
    ) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.set_target(10)
        with caplog.at_level(logging.ERROR, "hostzero.driver"):
            guest.device.needs_reset()
        assert "DEVICE_NEEDS_RESET" in caplog.text
        assert guest.driver.state is State.FAILED
        guest.check_nothing_left(before)

    def test_a_failed_driver_uses_the_device_no_more(self, make_guest: MakeGuest) -> None:
        guest = make_guest()
        guest.device.needs_reset()
        guest.device.log.clear()
        guest.device.set_target(10)
        guest.mm.clock.advance(5)
        assert guest.device.log == []

    def test_remove_without_answers_frees_everything_after_the_reset(self, make_guest: MakeGuest) -> None:
        """The host was not told, but a device that was reset owns nothing."""
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.set_target(600)
        guest.device.answer = lambda request: None
        guest.check_nothing_left(before)
        assert guest.device.statuses[-1] == 0

    def test_a_device_that_never_resets_keeps_what_it_may_write_to(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.never_resets = True
        with pytest.raises(DriverError, match="did not reset"):
            guest.driver.remove()
        assert guest.mm.nr_free < before
        assert guest.driver.state is State.FAILED
        guest.device.never_resets = False
        guest.check_nothing_left(before)

    def test_a_probe_whose_first_inflate_is_not_answered_is_undone(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False, config=None, answer=lambda request: None)
        guest.device.config = BalloonConfig(num_pages=5)
        before = guest.mm.nr_free
        with pytest.raises(DriverError, match="device did not answer"):
            guest.driver.probe()
        assert guest.driver.state is State.UNBOUND
        guest.check_nothing_left(before)

    def test_a_transport_that_dies_in_the_middle(self, make_guest: MakeGuest) -> None:
        """A socket error is not an answer either."""
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()

        def die(index: int) -> None:
            raise ConnectionResetError("the other end is gone")

        guest.device.before_notify = die
        with pytest.raises(ConnectionResetError):
            guest.device.set_target(10)
        assert guest.driver.state is State.FAILED
        guest.check_nothing_left(before)

    @pytest.mark.parametrize("role", [QueueRole.INFLATE, QueueRole.DEFLATE, QueueRole.FREE_PAGE])
    @pytest.mark.parametrize("entries", [[(99, 0)], [(1 << 31, 0)], [(0, 0)] * 200])
    def test_forged_used_rings_end_in_one_clear_error(
        self, make_guest: MakeGuest, role: QueueRole, entries: list[tuple[int, int]]
    ) -> None:
        guest = make_guest(probe=False)
        before = guest.mm.nr_free
        guest.driver.probe()
        guest.device.set_target(10)

        def forge(device: FakeDevice, queue: QueueRole) -> bool:
            if queue is role:
                device.ring(queue).give_back(*entries)
            return queue is role

        guest.device.raw_queue = forge
        change = {
            QueueRole.INFLATE: {"num_pages": 20},
            QueueRole.DEFLATE: {"num_pages": 0},
            QueueRole.FREE_PAGE: {"free_page_hint_cmd_id": CMD},
        }[role]
        with pytest.raises(HostzeroError):
            guest.device.change(**change)
        assert guest.driver.state is State.FAILED
        guest.check_nothing_left(before)

    def test_a_short_configuration_space_fails_the_probe(self, make_guest: MakeGuest) -> None:
        guest = make_guest(probe=False, config_cut=0)
        before = guest.mm.nr_free
        with pytest.raises(DriverError, match="returned 0 bytes for num_pages"):
            guest.driver.probe()
        guest.check_nothing_left(before)


def test_the_wait_hook_sees_the_queue_until_all_is_back(make_guest: MakeGuest) -> None:
    """As across processes: `notify` only rings, the hook then lets the device run."""
    guest = make_guest(probe=False)
    guest.device.raw_queue = lambda device, role: True

    def device_runs(queue: DriverQueue) -> None:
        assert queue.in_flight == 1
        raw, guest.device.raw_queue = guest.device.raw_queue, None
        for index in range(2):
            guest.device.notify(index)
        guest.device.raw_queue = raw

    driver = VirtioBalloon(guest.mm, guest.memory, guest.device, wait=device_runs)
    driver.probe()
    guest.device.set_target(300)
    assert driver.num_pages == 300
    assert len(guest.mm.balloon.zeroed) == 300
    guest.device.set_target(0)
    driver.remove()
    assert guest.mm.false_claims == []


def test_nothing_is_freed_before_the_device_was_reset(make_guest: MakeGuest) -> None:
    """Until then it may write to rings, buffers and pages of the balloon."""
    guest = make_guest(config=FakeConfig())
    free = guest.mm.nr_free
    guest.device.never_resets = True
    with pytest.raises(DriverError, match="did not reset"):
        guest.driver.remove()
    assert guest.mm.nr_free == free
