# SPDX-License-Identifier: GPL-2.0-only
"""The state machine: requests in and out of order, and what QEMU does beside the specification."""

from __future__ import annotations

import logging
import os
import struct

import pytest

from hostzero.device import DEFAULT_FEATURES, DeviceConfig, HintStatus
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.vhost_user.protocol import ErrorKind, Request
from hostzero.vhost_user.server import device_config
from hostzero.vhost_user.session import LOG_LINES_MAX, OFFERED, SessionState
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from tests.device.guest import ALL_FEATURES
from tests.vhost_user.backend import Pair, null_fd, open_fds, pair
from tests.vhost_user.front_end import (
    BIT_30,
    FILL,
    HIGH_BYTES,
    HIGH_GPA,
    LOW_BYTES,
    NEED_REPLY,
    PROTOCOL,
    QUEUES,
    RING_SIZE,
    SCRATCH_AT,
    USER,
    USER_HIGH,
)

OPTIONAL = (Feature.STATS_VQ, Feature.FREE_PAGE_HINT, Feature.REPORTING)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


# ------------------------------------------------------------- the way through


def test_the_states_follow_each_other(idle: Pair) -> None:
    seen = [idle.session.state]
    idle.connect()
    seen.append(idle.session.state)
    idle.negotiate(DEFAULT_FEATURES)
    seen.append(idle.session.state)
    idle.share()
    idle.make_rings()
    idle.describe_rings()
    assert idle.session.state is SessionState.NEGOTIATED
    idle.enable()
    seen.append(idle.session.state)
    idle.stop()
    seen.append(idle.session.state)
    idle.close()
    assert [*seen, idle.session.state] == [
        SessionState.CONNECTED,
        SessionState.OWNED,
        SessionState.NEGOTIATED,
        SessionState.RUNNING,
        SessionState.NEGOTIATED,
        SessionState.CLOSED,
    ]


def test_what_is_offered_is_what_is_implemented(idle: Pair) -> None:
    offered = idle.number(1)
    assert offered == int(ALL_FEATURES | Feature.VERSION_1) | BIT_30
    assert idle.number(15) == int(OFFERED) == PROTOCOL
    assert idle.number(17) == QUEUES


def test_a_report_clears_the_block_and_gives_its_memory_back(running: Pair) -> None:
    memory = running.memory
    before = memory.blocks
    at = HIGH_GPA + 2 * PMD_SIZE
    untouched = memory.guest.read(Gpa(at - PAGE_SIZE), PAGE_SIZE)
    assert running.report((at, PMD_SIZE)) == PMD_SIZE
    assert memory.blocks == before - PMD_SIZE
    assert memory.guest.read(Gpa(at), PMD_SIZE) == bytes(PMD_SIZE)
    assert memory.guest.read(Gpa(at - PAGE_SIZE), PAGE_SIZE) == untouched
    assert memory.guest.read(Gpa(at + PMD_SIZE), PAGE_SIZE) == bytes([FILL]) * PAGE_SIZE


def test_an_inflate_answers_page_by_page_in_the_order_of_the_request(running: Pair) -> None:
    memory = running.memory
    running.inflate([2000])  # the array and the bitmap have their pages from here on
    before = memory.blocks
    outside_ram = 0x9_0000
    pfns = [1030, outside_ram, 1024, 1025]
    assert running.inflate(pfns) == (1, bytes([0b1101]))
    assert memory.blocks == before - 3 * PAGE_SIZE
    for pfn in (1024, 1025, 1030):
        assert memory.guest.read(Gpa(pfn * PAGE_SIZE), PAGE_SIZE) == bytes(PAGE_SIZE)
    for pfn in (1023, 1026, 1029, 1031):
        assert memory.guest.read(Gpa(pfn * PAGE_SIZE), PAGE_SIZE) == bytes([FILL]) * PAGE_SIZE


def test_without_bits_6_and_7_nothing_is_claimed() -> None:
    stock = Feature.STATS_VQ | Feature.REPORTING | Feature.RING_EVENT_IDX
    with pair(stock) as front_end:
        assert front_end.report((4 * PMD_SIZE, PMD_SIZE)) == 0
        assert front_end.memory.guest.read(Gpa(4 * PMD_SIZE), PMD_SIZE) == bytes(PMD_SIZE)
        assert front_end.inflate([1024])[0] == 0


@pytest.mark.parametrize("chosen", range(8))
def test_queues_are_numbered_over_the_accepted_features(chosen: int) -> None:
    """Quirk: Linux leaves no gap for a queue whose feature was not accepted."""
    features = Feature(0)
    for bit, feature in enumerate(OPTIONAL):
        features |= feature if chosen >> bit & 1 else Feature(0)
    with pair(features) as front_end:
        roles = queue_roles(features)
        queues = front_end.session.rings.vrings
        assert [queue.running for queue in queues] == [n < len(roles) for n in range(QUEUES)]
        assert [front_end.device.queue_role(n) for n in range(len(roles))] == list(roles)
        if QueueRole.REPORTING in roles:
            front_end.report((4 * PMD_SIZE, PMD_SIZE))
            assert front_end.memory.guest.read(Gpa(4 * PMD_SIZE), PAGE_SIZE) == bytes(PAGE_SIZE)


# ------------------------------------------------------------- what QEMU does


def test_a_ring_is_scanned_when_it_is_enabled(idle: Pair) -> None:
    """Quirk: the statistics buffer is in the ring before DRIVER_OK, and no kick comes for it."""
    idle.connect()
    idle.negotiate(DEFAULT_FEATURES)
    idle.share()
    idle.make_rings()
    idle.memory.guest.write(Gpa(SCRATCH_AT), struct.pack("<HQ", 4, 12345))
    idle.put(QueueRole.STATS, [(SCRATCH_AT, 10)])
    idle.describe_rings()
    assert idle.device.stats == {}
    idle.enable()
    assert list(idle.device.stats.values()) == [12345]
    assert idle.metrics.kicks == 0


def test_a_stale_num_pages_in_set_config_is_ignored(running: Pair) -> None:
    """Quirk: QEMU writes the whole space back, with whatever target it read last."""
    running.device.set_target(1000)
    running.set_config(num_pages=7, actual=500, cmd_id=99, poison_val=0xAA)
    assert struct.unpack("<IIII", running.get_config()) == (1000, 500, 0, 0xAA)
    assert (running.device.target, running.device.actual) == (1000, 500)


def test_config_changes_are_told_only_while_rings_run(idle: Pair) -> None:
    """Quirk: QEMU 11.1 crashes on CONFIG_CHANGE without a driver."""
    idle.device.set_target(1)
    idle.connect()
    idle.device.set_target(2)
    idle.negotiate(DEFAULT_FEATURES)
    idle.share()
    idle.make_rings()
    idle.describe_rings()
    idle.device.set_target(3)
    assert idle.nothing_on_the_channel()
    idle.enable()
    assert idle.nothing_on_the_channel(), "the driver reads it when it starts"
    idle.device.set_target(4)
    idle.config_changed()
    idle.vring(18, 2, 0)
    idle.device.set_target(5)
    idle.stop()
    idle.device.set_target(6)
    assert idle.nothing_on_the_channel()


def test_a_config_change_asks_for_no_reply_and_waits_for_none(running: Pair) -> None:
    """Quirk: QEMU holds its lock while it waits for us; each would wait for the other."""
    for target in range(1, 4):
        running.device.set_target(target)
    for _ in range(3):
        # The helper compares the flags: version 1 and nothing else.
        running.config_changed()
    assert running.nothing_on_the_channel()
    assert running.metrics.config_changes_sent == 3


def test_a_front_end_that_does_not_read_the_channel_costs_nothing(running: Pair) -> None:
    for target in range(2000):
        running.device.set_target(target)
    assert running.metrics.config_changes_dropped > 0
    assert running.number(17) == QUEUES
    running.config_changed()


@pytest.mark.parametrize("accepted", [True, False])
def test_a_poison_value_before_the_features_is_kept(idle: Pair, accepted: bool) -> None:
    """Quirk: with init_on_free=1 SET_CONFIG(poison_val) comes before SET_FEATURES."""
    idle.connect()
    idle.set_config(poison_val=0xAAAAAAAA)
    idle.negotiate(ALL_FEATURES if accepted else ALL_FEATURES & ~Feature.PAGE_POISON)
    idle.share()
    idle.make_rings()
    idle.describe_rings()
    idle.enable()
    assert idle.device.poison_val == 0xAAAAAAAA
    assert idle.report((4 * PMD_SIZE, PMD_SIZE)) == (0 if accepted else PMD_SIZE)
    kept = idle.memory.guest.read(Gpa(4 * PMD_SIZE), 4) == bytes([FILL]) * 4
    assert kept is accepted


def test_a_second_call_descriptor_replaces_the_first(running: Pair) -> None:
    """Quirk: SET_VRING_CALL comes up to three times for each queue."""
    index = running.indices[QueueRole.REPORTING]
    before = open_fds()
    for _ in range(5):
        old, running.calls[index] = running.calls[index], os.eventfd(0, os.EFD_NONBLOCK)
        os.close(old)
        running.vring_fd(13, index, running.calls[index])
    assert len(open_fds()) == len(before)
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_a_signal_that_went_to_the_old_descriptor_is_repeated(running: Pair) -> None:
    index = running.indices[QueueRole.REPORTING]
    running.put(QueueRole.REPORTING, (), [(4 * PMD_SIZE, PMD_SIZE)])
    running.kick(QueueRole.REPORTING)
    running.pump()
    new = os.eventfd(0, os.EFD_NONBLOCK)
    running.vring_fd(13, index, new)
    assert os.eventfd_read(new) == 1
    os.close(new)


def test_a_call_descriptor_can_be_taken_away(running: Pair) -> None:
    index = running.indices[QueueRole.REPORTING]
    running.vring_fd(13, index, None)
    running.put(QueueRole.REPORTING, (), [(4 * PMD_SIZE, PMD_SIZE)])
    running.kick(QueueRole.REPORTING)
    running.pump()
    assert running.rings[QueueRole.REPORTING].used_idx == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(running.calls[index])


def test_the_log_address_without_its_flag_is_ignored(running: Pair) -> None:
    """Quirk: SET_VRING_ADDR has a nonzero `log` with flags 0; every `describe_rings` sends it."""
    address = running.session.rings.vrings[0].addr
    assert address is not None
    assert (address.log, address.flags) == (0xDEAD_0000, 0)


def test_a_ring_that_is_to_be_logged_is_refused(idle: Pair) -> None:
    idle.connect()
    assert idle.ack(9, struct.pack("=IIQQQQ", 0, 1, 0, 0, 0, 0)) == 1


@pytest.mark.parametrize("unimplemented", [28, 33, 34, 35, 38, 40, 50, 8, 63])
def test_no_bit_that_is_not_implemented_is_offered_or_accepted(idle: Pair, unimplemented: int) -> None:
    """Quirk: a guest accepts what it is offered (35, 38, 40), and fails at 33 ACCESS_PLATFORM."""
    assert not idle.number(1) >> unimplemented & 1
    idle.connect()
    accepted = int(DEFAULT_FEATURES | Feature.VERSION_1) | 1 << unimplemented
    assert idle.ack(2, u64(accepted | BIT_30)) == 1
    assert idle.metrics.errors[ErrorKind.FEATURES] == 1
    assert idle.session.state is SessionState.OWNED


def test_queues_without_a_role_may_be_enabled_and_do_not_run(idle: Pair) -> None:
    """Quirk: QEMU enables every queue that it was told of (num_vqs)."""
    idle.start(Feature.STATS_VQ)
    vrings = idle.session.rings.vrings
    assert [(vring.enabled, vring.running) for vring in vrings] == [(True, n < 3) for n in range(5)]


def test_a_paused_guest_goes_on_where_it_was(running: Pair) -> None:
    """Quirk: a pause and a removed driver look alike; what the driver wrote has to survive."""
    running.memory.guest.write(Gpa(SCRATCH_AT), struct.pack("<HQ", 4, 1))
    running.put(QueueRole.STATS, [(SCRATCH_AT, 10)])
    running.kick(QueueRole.STATS)
    running.report((4 * PMD_SIZE, PMD_SIZE))
    running.set_config(actual=77)
    running.device.set_target(88)
    running.config_changed()
    bases = running.stop()
    # The held statistics buffer is available again, so it is popped once more.
    assert bases == [0, 0, 0, 0, 1]
    assert not running.device.live
    running.negotiate(ALL_FEATURES)
    running.share()
    running.describe_rings(bases)
    running.enable()
    assert running.nothing_on_the_channel()
    assert (running.device.target, running.device.actual) == (88, 77)
    assert running.device.request_stats()
    running.wait_call(QueueRole.STATS)
    assert running.report((5 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_a_target_that_moved_during_a_pause_is_told_when_it_ends(running: Pair) -> None:
    bases = running.stop()
    running.device.set_target(99)
    assert running.nothing_on_the_channel()
    running.negotiate(ALL_FEATURES)
    running.share()
    running.describe_rings(bases)
    running.enable()
    running.config_changed()
    assert running.nothing_on_the_channel()


def test_the_driver_may_go_and_another_one_come(running: Pair) -> None:
    running.set_config(actual=0)
    running.stop()
    running.negotiate(Feature.REPORTING | Feature.DEVICE_INIT_REPORTED)
    running.share()
    running.make_rings()
    running.describe_rings()
    running.enable()
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_rings_may_start_again_without_new_features(running: Pair) -> None:
    bases = running.stop()
    running.describe_rings(bases)
    running.enable()
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_one_ring_may_stop_and_go_on_while_the_others_run(running: Pair) -> None:
    index = running.indices[QueueRole.REPORTING]
    running.report((4 * PMD_SIZE, PMD_SIZE))
    running.vring(18, index, 0)
    running.put(QueueRole.REPORTING, (), [(5 * PMD_SIZE, PMD_SIZE)])
    running.kick(QueueRole.REPORTING)
    running.pump()
    assert running.rings[QueueRole.REPORTING].used_idx == 1, "a disabled ring is not served"
    assert running.inflate([1024])[0] == 1
    running.vring(18, index, 1)
    running.wait_call(QueueRole.REPORTING)
    assert running.rings[QueueRole.REPORTING].used_idx == 2


def test_a_done_that_was_not_read_yet_survives_a_pause(running: Pair) -> None:
    running.device.hint_start()
    running.device.hint_done()
    running.stop()
    assert running.device.hint_status is HintStatus.DONE


def test_a_hinting_run_does_not_outlive_its_driver(running: Pair) -> None:
    running.device.hint_start()
    running.stop()
    assert running.device.hint_status is HintStatus.STOPPED


def test_without_protocol_features_a_kick_starts_a_ring(idle: Pair) -> None:
    idle.connect()
    idle.do(2, u64(int(ALL_FEATURES | Feature.VERSION_1)))
    idle.features = int(ALL_FEATURES | Feature.VERSION_1)
    idle.indices = {role: n for n, role in enumerate(queue_roles(ALL_FEATURES))}
    idle.share()
    idle.make_rings()
    idle.describe_rings()
    assert idle.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_memory_may_be_shared_anew_while_rings_run(running: Pair) -> None:
    running.report((4 * PMD_SIZE, PMD_SIZE))
    running.share()
    assert running.session.state is SessionState.RUNNING
    assert running.report((5 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_rings_that_do_not_lie_in_the_new_memory_stop(running: Pair) -> None:
    only_high = struct.pack("=II4Q", 1, 0, HIGH_GPA, HIGH_BYTES, USER_HIGH, LOW_BYTES)
    assert running.ack(5, only_high, [running.memory.fd]) == 1
    assert running.session.state is SessionState.NEGOTIATED
    running.device.set_target(5)
    assert running.nothing_on_the_channel()
    running.share()
    running.enable()
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_the_configuration_space_may_be_read_larger_than_it_is(running: Pair) -> None:
    running.device.set_target(3)
    assert running.get_config(64) == struct.pack("<IIII", 3, 0, 0, 0) + bytes(48)


def test_reset_device_leaves_the_device_as_new_but_for_the_target(running: Pair) -> None:
    running.device.set_target(9)
    running.set_config(actual=4, poison_val=1)
    running.report((4 * PMD_SIZE, PMD_SIZE))
    running.do(34)
    assert running.session.state is SessionState.OWNED
    assert struct.unpack("<IIII", running.get_config()) == (9, 0, 0, 0)
    running.negotiate(ALL_FEATURES)
    running.share()
    running.make_rings()
    running.describe_rings()
    running.enable()
    assert running.report((5 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_reset_owner_disables_the_rings_and_nothing_else(running: Pair) -> None:
    running.do(4)
    assert running.session.state is SessionState.NEGOTIATED
    assert not any(vring.running for vring in running.session.rings.vrings)


# ------------------------------------------------------------- out of order

BEFORE_OWNER = {
    2: u64(int(Feature.VERSION_1)),
    4: b"",
    8: state(0, 8),
    10: state(0, 0),
    18: state(0, 1),
    25: struct.pack("=III", 0, 16, 0) + bytes(16),
    34: b"",
}


@pytest.mark.parametrize("request_", sorted(BEFORE_OWNER))
def test_what_needs_an_owner_is_refused_before(idle: Pair, request_: int) -> None:
    idle.send(16, u64(PROTOCOL))
    assert idle.ack(request_, BEFORE_OWNER[request_]) == 1
    assert idle.metrics.errors[ErrorKind.ORDER] == 1
    assert idle.session.state is SessionState.CONNECTED
    idle.connect()


def test_get_vring_base_before_the_owner_gets_an_empty_reply(idle: Pair) -> None:
    assert idle.ask(11, state(0, 0)) == b""


def test_a_second_owner_is_refused(idle: Pair) -> None:
    idle.connect()
    assert idle.ack(3) == 1


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(8, state(0, 8)), (10, state(0, 0)), (9, struct.pack("=IIQQQQ", 0, 0, 0, 0, 0, 0)), (16, u64(0))],
)
def test_what_describes_a_ring_is_refused_while_it_runs(running: Pair, request_: int, payload: bytes) -> None:
    assert running.ack(request_, payload) == 1
    assert running.metrics.errors[ErrorKind.ORDER] == 1
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_features_cannot_change_while_rings_run(running: Pair) -> None:
    assert running.ack(2, u64(running.features | BIT_30)) == 0
    assert running.ack(2, u64(int(Feature.VERSION_1) | BIT_30)) == 1
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


@pytest.mark.parametrize("missing", ["features", "memory", "num", "addr"])
def test_a_ring_that_is_not_described_does_not_start(idle: Pair, missing: str) -> None:
    idle.connect()
    if missing != "features":
        idle.negotiate(ALL_FEATURES)
    idle.indices = {QueueRole.INFLATE: 0}
    if missing != "memory":
        idle.share()
    idle.make_rings()
    layout = idle.rings[QueueRole.INFLATE].layout
    if missing != "num":
        idle.vring(8, 0, RING_SIZE)
    if missing != "addr":
        idle.do(
            9, struct.pack("=IIQQQQ", 0, 0, USER + layout.desc, USER + layout.used, USER + layout.avail, 0)
        )
    idle.vring_fd(12, 0, idle.kicks[0])
    assert idle.ack(18, state(0, 1)) == 1
    assert idle.metrics.errors[ErrorKind.ORDER] == 1
    assert not idle.session.rings.vrings[0].enabled
    assert not idle.device.live


def test_a_queue_without_a_role_cannot_start(idle: Pair) -> None:
    idle.connect()
    idle.negotiate(Feature(0))
    idle.share()
    idle.indices = {QueueRole.REPORTING: 4}
    idle.make_rings()
    idle.describe_rings()
    assert idle.ack(18, state(4, 1)) == 1
    assert idle.metrics.errors[ErrorKind.RING] == 1
    assert not idle.device.live


def test_a_ring_above_the_limit_cannot_start() -> None:
    with pair(config=DeviceConfig(features=ALL_FEATURES)) as front_end:
        front_end.connect()
        front_end.negotiate(ALL_FEATURES)
        front_end.share()
        front_end.make_rings()
        front_end.describe_rings()
        # The reporting queue of this device has at most 32 entries, and these have 128.
        assert front_end.ack(18, state(4, 1)) == 1
        assert not front_end.device.live
        assert front_end.ack(18, state(0, 1)) == 0
        assert front_end.inflate([1024])[0] == 1


def test_rings_that_overlap_or_leave_memory_cannot_start(idle: Pair) -> None:
    idle.connect()
    idle.negotiate(ALL_FEATURES)
    idle.share()
    idle.vring(8, 0, 1024)
    idle.vring_fd(12, 0, idle.kicks[0])
    end = USER + LOW_BYTES - PAGE_SIZE
    for desc, used, avail in [(USER, USER, USER), (end, USER, USER + PMD_SIZE), (USER + 8, USER, USER)]:
        idle.do(9, struct.pack("=IIQQQQ", 0, 0, desc, used, avail, 0))
        assert idle.ack(18, state(0, 1)) == 1
    assert idle.ack(9, struct.pack("=IIQQQQ", 0, 0, 1, USER, USER, 0)) == 1
    assert idle.metrics.errors[ErrorKind.RING] == 3
    assert idle.metrics.errors[ErrorKind.MEMORY] == 1


# ------------------------------------------------------------- malformed

VALID = {
    1: b"",
    2: u64(int(Feature.VERSION_1)),
    3: b"",
    4: b"",
    8: state(0, 8),
    9: struct.pack("=IIQQQQ", 0, 0, 0, 0, 0, 0),
    10: state(0, 0),
    11: state(0, 0),
    12: u64(0),
    13: u64(0),
    14: u64(0),
    15: b"",
    16: u64(PROTOCOL),
    17: b"",
    18: state(0, 0),
    21: b"",
    24: struct.pack("=III", 0, 16, 0) + bytes(16),
    25: struct.pack("=III", 0, 16, 0) + bytes(16),
    34: b"",
}
ASKS = {1, 11, 15, 17, 24}
FDS = {12: 1, 13: 1, 14: 1, 21: 1}


def test_the_table_below_has_every_request_but_the_memory_table() -> None:
    assert set(VALID) | {5, 6, 7} == {int(request) for request in Request}


def refused(front_end: Pair, request: int, payload: bytes, fds: list[int]) -> None:
    errors = sum(front_end.metrics.errors.values())
    if request in ASKS:
        assert front_end.ask(request, payload, fds) == b""
    else:
        assert front_end.ack(request, payload, fds) == 1
    assert sum(front_end.metrics.errors.values()) == errors + 1


@pytest.mark.parametrize("request_", sorted(VALID))
def test_a_payload_of_the_wrong_size_is_refused(running: Pair, request_: int) -> None:
    """Too short and too long, up to the largest payload that is read; the rings go on."""
    right = VALID[request_]
    wrong = {right + b"\0", right + bytes(4096 - len(right))}
    wrong |= {right[:-1], right[:4], b""} if right else set()
    fds = [running.errs[0]] * FDS.get(request_, 0)
    for payload in sorted(wrong):
        refused(running, request_, payload, fds)
    assert running.metrics.errors[ErrorKind.MALFORMED] == len(wrong)
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


@pytest.mark.parametrize("request_", sorted(VALID))
def test_the_wrong_number_of_descriptors_is_refused_and_they_are_closed(running: Pair, request_: int) -> None:
    right = FDS.get(request_, 0)
    before = len(open_fds())
    for count in {0, 1, 2, 8, 9, 30} - {right}:
        refused(running, request_, VALID[request_], [running.errs[0]] * count)
    assert len(open_fds()) == before
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


@pytest.mark.parametrize("request_", [6, 7, 19, 20, 22, 23, 26, 31, 35, 37, 39, 0, 99, 0xFFFF_FFFF])
def test_a_request_that_is_not_served_is_refused(running: Pair, request_: int) -> None:
    assert running.ack(request_, bytes(8), [running.errs[0]]) == 1
    assert running.metrics.errors[ErrorKind.UNKNOWN] == 1
    running.send(request_)
    assert running.number(17) == QUEUES, "no acknowledgement that nobody wanted"


@pytest.mark.parametrize(
    ("request_", "payload", "kind"),
    [
        (8, state(5, 8), ErrorKind.MALFORMED),
        (8, state(0xFFFF_FFFF, 8), ErrorKind.MALFORMED),
        (8, state(0, 0), ErrorKind.MALFORMED),
        (8, state(0, 3), ErrorKind.MALFORMED),
        (8, state(0, 1 << 16), ErrorKind.MALFORMED),
        (10, state(0, 1 << 16), ErrorKind.MALFORMED),
        (18, state(0, 2), ErrorKind.MALFORMED),
        (18, state(5, 1), ErrorKind.MALFORMED),
        (12, u64(1 << 8), ErrorKind.DESCRIPTORS),
        (13, u64(1 << 9), ErrorKind.MALFORMED),
        (13, u64(5 | 1 << 8), ErrorKind.MALFORMED),
        (16, u64(1 << 63), ErrorKind.FEATURES),
        (16, u64(PROTOCOL | 1 << 12), ErrorKind.FEATURES),
        (25, struct.pack("=III", 0, 16, 1) + bytes(16), ErrorKind.MALFORMED),
        (25, struct.pack("=III", 250, 16, 0) + bytes(16), ErrorKind.MALFORMED),
        (25, struct.pack("=III", 0, 0, 0), ErrorKind.MALFORMED),
        (25, struct.pack("=III", 0, 0xFFFF_FFFF, 0), ErrorKind.MALFORMED),
    ],
)
def test_values_that_cannot_be_are_refused(
    idle: Pair, request_: int, payload: bytes, kind: ErrorKind
) -> None:
    idle.connect()
    assert idle.ack(request_, payload) == 1
    assert idle.metrics.errors[kind] == 1


def test_a_configuration_write_behind_the_end_changes_nothing(running: Pair) -> None:
    running.set_config(actual=3)
    running.do(25, struct.pack("=III", 16, 8, 0) + b"\xff" * 8)
    running.do(25, struct.pack("=III", 4, 200, 0) + struct.pack("<I", 5) + b"\0" * 196)
    assert running.device.actual == 5


@pytest.mark.parametrize("request_", [12, 13, 14])
def test_what_is_no_eventfd_is_refused_and_closed(running: Pair, request_: int) -> None:
    before = len(open_fds())
    fd = null_fd()
    assert running.ack(request_, u64(0), [fd]) == 1
    assert running.ack(request_, u64(200), [running.errs[0]]) == 1
    os.close(fd)
    assert len(open_fds()) == before
    assert running.metrics.errors[ErrorKind.DESCRIPTORS] == 1
    assert running.inflate([1024])[0] == 1


def test_a_channel_that_is_no_socket_is_refused_and_the_old_one_stays(running: Pair) -> None:
    fd = null_fd()
    assert running.ack(21, b"", [fd]) == 1
    os.close(fd)
    running.device.set_target(1)
    running.config_changed()


def test_without_reply_ack_nobody_is_answered(idle: Pair) -> None:
    idle.send(3, flags=1 | NEED_REPLY)
    idle.send(3, flags=1 | NEED_REPLY)
    assert idle.number(17) == QUEUES
    assert idle.metrics.errors[ErrorKind.ORDER] == 1


def test_what_was_not_negotiated_is_not_served(idle: Pair) -> None:
    idle.send(16, u64(1 << 3))
    idle.do(3)
    assert idle.ask(24, VALID[24]) == b""
    assert idle.ack(25, VALID[25]) == 1
    assert idle.ack(34) == 1
    assert idle.ack(21, b"", [idle._theirs.fileno()]) == 1
    assert idle.metrics.errors[ErrorKind.ORDER] == 4


def test_refusals_are_logged_up_to_a_limit_and_counted_beyond(
    running: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hostzero.vhost_user"):
        for _ in range(100):
            running.ack(18, state(9, 1))
    assert running.metrics.errors[ErrorKind.MALFORMED] == 100
    lines = [record.message for record in caplog.records]
    assert len(lines) == LOG_LINES_MAX + 1
    assert "SET_VRING_ENABLE (18) refused (malformed): there is no queue 9" in lines[0]


def test_a_defect_costs_its_message(
    running: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> bytes:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(running.device, "write_config", fail)
    assert running.ack(25, VALID[25]) == 1
    assert running.metrics.errors[ErrorKind.INTERNAL] == 1
    assert "a defect" in caplog.text
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_closing_leaves_the_device_as_new_but_for_target_and_counters() -> None:
    with pair(ALL_FEATURES, device_config(ALL_FEATURES)) as front_end:
        device = front_end.device
        front_end.set_config(actual=5, poison_val=6)
        device.set_target(7)
        front_end.backend.close()
        front_end.backend.close()
        assert (device.target, device.actual, device.poison_val, device.status()) == (7, 0, 0, 0)
        assert device.metrics.config_changes == 1
        device.set_target(8)
