# SPDX-License-Identifier: GPL-2.0-only
"""Every command against a device with a guest, and every kind of line that is no request."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device import BalloonDevice, HintStatus
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.vhost_user.control_commands import Commands
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX, PROTOCOL_VERSION, Refusal
from hostzero.virtio.features import QueueRole
from tests.device.guest import BITMAP_AT, RAM_BYTES, Guest
from tests.vhost_user.control_service import FakeService


@pytest.fixture
def commands(service: FakeService) -> Commands:
    return Commands(service)


def ask(commands: Commands, command: str, **arguments: object) -> dict[str, Any]:
    """Return the result of a command that has to succeed."""
    request = {"version": 1, "command": command, "arguments": arguments}
    answer = json.loads(commands.answer(json.dumps(request).encode() + b"\n"))
    assert answer.pop("version") == PROTOCOL_VERSION
    assert answer.pop("ok") is True, answer
    result: dict[str, Any] = answer.pop("result")
    assert not answer
    return result


def refusal(commands: Commands, line: bytes) -> tuple[Refusal, str]:
    """Return the kind and the message of the error that a line is answered by."""
    text = commands.answer(line)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    answer = json.loads(text)
    assert (answer["version"], answer["ok"]) == (PROTOCOL_VERSION, False)
    return Refusal(answer["error"]["kind"]), answer["error"]["message"]


def refused(commands: Commands, command: str, **arguments: object) -> tuple[Refusal, str]:
    request = {"version": 1, "command": command, "arguments": arguments}
    return refusal(commands, json.dumps(request).encode())


# ------------------------------------------------------------- status, metrics


def test_status_says_what_device_and_session_say(commands: Commands, guest: Guest) -> None:
    guest.device.set_target(300)
    guest.device.write_config(4, struct.pack("<I", 200))
    guest.device.inhibit_discard("vfio")
    status = ask(commands, "status")
    assert status["session"]["peer_pid"] == 4711
    assert status["session"]["queues"] == [{"index": 0, "role": "inflate", "size": 128, "state": "enabled"}]
    device = status["device"]
    assert (device["target_bytes"], device["actual_bytes"]) == (300 * PAGE_SIZE, 200 * PAGE_SIZE)
    assert device["guest_bytes"] == RAM_BYTES - 200 * PAGE_SIZE
    assert (device["live"], device["hint"], device["discards_inhibited"]) == (True, "stopped", True)
    assert "device-init-reported" in device["features_acked"]
    assert status["metrics"]["device"] == guest.device.metrics.as_dict()
    assert status["metrics"]["vhost_user"]["errors"]["memory"] == 2


def test_status_before_any_guest(service: FakeService) -> None:
    service.device = BalloonDevice(GuestMemory([]))
    service.facts = dataclasses.replace(service.facts, state="listening", connected=False, memory_bytes=0)
    device = ask(Commands(service), "status")["device"]
    assert (device["live"], device["features_acked"], device["guest_bytes"]) == (False, [], 0)


def test_a_guest_that_claims_too_much_is_not_below_zero(commands: Commands, guest: Guest) -> None:
    guest.device.write_config(4, b"\xff" * 4)
    device = ask(commands, "status")["device"]
    assert (device["actual_bytes"], device["guest_bytes"]) == (0xFFFF_FFFF * PAGE_SIZE, 0)


def test_metrics_count_the_control_socket_too(commands: Commands) -> None:
    refusal(commands, b"nonsense")
    control = ask(commands, "metrics")["control"]
    assert (control["requests"], control["errors"]["malformed"]) == (2, 1)
    assert set(control["errors"]) == {kind.value for kind in Refusal}


# ------------------------------------------------------------- resize


def test_resize_by_what_remains_for_the_guest(commands: Commands, guest: Guest) -> None:
    result = ask(commands, "resize", guest_bytes=RAM_BYTES - 100 * PAGE_SIZE)
    assert guest.device.target == 100
    assert guest.config_changes == 1
    assert (result["target_bytes"], result["actual_bytes"], result["live"]) == (100 * PAGE_SIZE, 0, True)


def test_resize_by_the_balloon(commands: Commands, guest: Guest) -> None:
    ask(commands, "resize", balloon_bytes=100 * PAGE_SIZE)
    assert guest.device.target == 100
    ask(commands, "resize", balloon_bytes=0)
    assert guest.device.target == 0


@pytest.mark.parametrize("key", ["guest_bytes", "balloon_bytes"])
def test_all_of_the_guests_memory_is_a_size(commands: Commands, guest: Guest, key: str) -> None:
    ask(commands, "resize", **{key: RAM_BYTES})
    assert guest.device.target == (0 if key == "guest_bytes" else RAM_BYTES // PAGE_SIZE)


@pytest.mark.parametrize("key", ["guest_bytes", "balloon_bytes"])
@pytest.mark.parametrize(
    "value", [RAM_BYTES + PAGE_SIZE, PAGE_SIZE + 1, -PAGE_SIZE, 1.5, "1G", True, None, [], 1 << 64]
)
def test_a_size_that_is_none_changes_nothing(
    commands: Commands, guest: Guest, key: str, value: object
) -> None:
    assert refused(commands, "resize", **{key: value})[0] is Refusal.INVALID_ARGUMENT
    assert (guest.device.target, guest.config_changes) == (0, 0)


@pytest.mark.parametrize("arguments", [{}, {"guest_bytes": PAGE_SIZE, "balloon_bytes": 0}])
def test_resize_takes_exactly_one_size(commands: Commands, arguments: dict[str, object]) -> None:
    kind, message = refused(commands, "resize", **arguments)
    assert (kind, message) == (
        Refusal.INVALID_ARGUMENT,
        "resize takes either guest_bytes or balloon_bytes",
    )


def test_what_remains_is_not_known_before_there_is_memory(service: FakeService) -> None:
    service.device = BalloonDevice(GuestMemory([]))
    service.facts = dataclasses.replace(service.facts, memory_bytes=0)
    commands = Commands(service)
    assert refused(commands, "resize", guest_bytes=PAGE_SIZE)[0] is Refusal.REFUSED
    assert ask(commands, "resize", balloon_bytes=PAGE_SIZE)["live"] is False
    assert service.device.target == 1
    assert refused(commands, "resize", balloon_bytes=PAGE_SIZE << 32)[0] is Refusal.REFUSED


# ------------------------------------------------------------- stats, hint


def test_stats_asks_the_guest(commands: Commands, guest: Guest) -> None:
    assert ask(commands, "stats") == {"requested": False, "updates": 0, "statistics": {}}
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQ", 4, 77))
    head = guest.put(QueueRole.STATS, [(BITMAP_AT, 10)])
    guest.kick(QueueRole.STATS)
    assert ask(commands, "stats") == {"requested": True, "updates": 1, "statistics": {"memfree": 77}}
    assert guest.rings[QueueRole.STATS].returned() == [(head, 0)]


def test_hint_goes_through_its_states(commands: Commands, guest: Guest) -> None:
    started = ask(commands, "hint", action="start")
    assert started == {"hint": "requested", "cmd_id": 0x8000_0000}
    assert ask(commands, "hint", action="stop") == {"hint": "stopped"}
    assert ask(commands, "hint", action="done") == {"hint": "done"}
    assert guest.device.hint_status is HintStatus.DONE


@pytest.mark.parametrize("action", [None, "begin", 1, ["start"]])
def test_hint_knows_three_actions(commands: Commands, guest: Guest, action: object) -> None:
    assert refused(commands, "hint", action=action)[0] is Refusal.INVALID_ARGUMENT
    assert guest.device.hint_status is HintStatus.STOPPED


def test_what_the_device_refuses_is_an_answer(commands: Commands, guest: Guest) -> None:
    guest.device.set_status(0)
    kind, message = refused(commands, "hint", action="start")
    assert kind is Refusal.REFUSED
    assert "needs a running driver" in message


# ------------------------------------------------------------- what is no request


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"\n", Refusal.MALFORMED),
        (b"status\n", Refusal.MALFORMED),
        (b"\xff\xfe\n", Refusal.MALFORMED),
        (b"[" * (LINE_BYTES_MAX - 1), Refusal.MALFORMED),
        (b"9" * (LINE_BYTES_MAX - 1), Refusal.MALFORMED),
        (b"null", Refusal.MALFORMED),
        (b'["status"]', Refusal.MALFORMED),
        (b"{}", Refusal.MALFORMED),
        (b'{"command":"status"}', Refusal.MALFORMED),
        (b'{"version":true,"command":"status"}', Refusal.MALFORMED),
        (b'{"version":1}', Refusal.MALFORMED),
        (b'{"version":1,"command":7}', Refusal.MALFORMED),
        (b'{"version":1,"command":"status","x":1}', Refusal.MALFORMED),
        (b'{"version":1,"command":"status","arguments":[]}', Refusal.MALFORMED),
        (b'{"version":2,"command":"status"}', Refusal.VERSION),
        (b'{"version":1,"command":"__init__"}', Refusal.UNKNOWN_COMMAND),
        (b'{"version":1,"command":"\\ud800"}', Refusal.UNKNOWN_COMMAND),
        (b'{"version":1,"command":"status","arguments":{"a":1}}', Refusal.INVALID_ARGUMENT),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_is_no_request_has_its_answer(commands: Commands, line: bytes, kind: Refusal) -> None:
    assert refusal(commands, line)[0] is kind
    assert commands.metrics.errors[kind] == 1


def test_what_was_sent_comes_back_cut_short(commands: Commands) -> None:
    _, message = refused(commands, "x" * 3000)
    assert len(message) < 200


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_line_is_answered(line: bytes) -> None:
    commands = Commands(FakeService(BalloonDevice(GuestMemory([]))))
    assert refusal(commands, line)[0] is Refusal.MALFORMED


def test_a_defect_costs_one_answer(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(service, "session_facts", broken)
    commands = Commands(service)
    assert refused(commands, "status")[0] is Refusal.INTERNAL
    assert "a defect" in caplog.text
    assert ask(commands, "metrics")["control"]["errors"]["internal"] == 1
