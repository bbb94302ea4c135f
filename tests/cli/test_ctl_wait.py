# SPDX-License-Identifier: GPL-2.0-only
"""Waiting on a clock that a test turns: reached, not reached, asked for something else."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import pytest

from hostzero.cli import ctl_wait
from hostzero.cli.ctl_wait import Bar, Lines, fetch_statistics, open_progress, wait_for_target
from hostzero.errors import ControlError
from hostzero.vhost_user.control_client import ControlClient

MIB = 1 << 20
GUEST = 64 * MIB


class Device:
    """Answers as a device whose guest moves by 1 MiB each time somebody looks."""

    def __init__(self, target: int, *, live: bool = True, stuck_at: int | None = None) -> None:
        self.target, self.live, self.stuck_at = target, live, stuck_at
        self.actual = 0
        self.now = 0.0
        self.updates = 4
        self.acked = ["stats-vq"]
        self.on_look: Callable[[], None] = lambda: None

    def request(self, command: str) -> dict[str, Any]:
        if command == "stats":
            return {"requested": False, "updates": self.updates, "statistics": {}}
        assert command == "status"
        self.on_look()
        device = {
            "target_bytes": self.target,
            "actual_bytes": self.actual,
            "memory_bytes": GUEST,
            "guest_bytes": GUEST - self.actual,
            "live": self.live,
            "features_acked": self.acked,
        }
        if self.live and self.actual not in {self.target, self.stuck_at}:
            self.actual += MIB if self.actual < self.target else -MIB
        return {
            "device": device,
            "statistics": {"memfree": self.updates},
            "metrics": {"device": {"stats_updates": self.updates}},
        }

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, seconds: float, progress: Lines | Bar | None = None) -> dict[str, Any]:
        client = cast("ControlClient", self)
        shown = Lines(io.StringIO(), lambda: self.now) if progress is None else progress
        return wait_for_target(client, self.target, seconds, shown, clock=lambda: self.now, sleep=self.sleep)

    def fetch(self, seconds: float) -> dict[str, Any]:
        client = cast("ControlClient", self)
        return fetch_statistics(client, seconds, clock=lambda: self.now, sleep=self.sleep)


def test_it_ends_when_the_guest_is_there() -> None:
    device = Device(20 * MIB)
    assert device.wait(60) == {
        "memory_bytes": GUEST,
        "target_bytes": 20 * MIB,
        "actual_bytes": 20 * MIB,
        "guest_bytes": 44 * MIB,
        "live": True,
    }
    assert device.now == pytest.approx(20 * ctl_wait.POLL_EVERY)


def test_a_guest_that_keeps_its_memory() -> None:
    device = Device(20 * MIB, stuck_at=5 * MIB)
    with pytest.raises(ControlError, match=r"after 3 s: balloon 5 MiB, to be 20 MiB; it goes on without us"):
        device.wait(3)
    assert device.now == pytest.approx(3)


def test_a_driver_that_does_not_run() -> None:
    with pytest.raises(ControlError, match="no driver is running in the guest"):
        Device(0, live=False).wait(3)


def test_somebody_else_resizes() -> None:
    device = Device(20 * MIB)

    def other() -> None:
        if device.now > 0.5:
            device.target = 7 * MIB

    device.on_look = other
    with pytest.raises(ControlError, match="somebody else asked for a balloon of 7 MiB"):
        device.wait(60)


def test_a_log_gets_a_line_every_few_seconds() -> None:
    device = Device(120 * MIB)
    log = io.StringIO()
    device.wait(60, Lines(log, lambda: device.now))
    lines = log.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.endswith("to be 120 MiB") for line in lines)


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    log = io.StringIO()
    log.isatty = lambda: True  # type: ignore[method-assign]
    progress = open_progress(log)
    assert isinstance(progress, Bar)
    with progress:
        Device(3 * MIB).wait(60, progress)
    shown = log.getvalue()
    assert "balloon 2 MiB, to be 3 MiB" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor is back"


def test_a_pipe_gets_lines() -> None:
    assert isinstance(open_progress(io.StringIO()), Lines)


def test_statistics_that_came_after_the_question_are_fresh() -> None:
    device = Device(0)

    def answer() -> None:
        if device.now > 0.5:
            device.updates = 5

    device.on_look = answer
    assert device.fetch(2) == {"fresh": True, "statistics": {"memfree": 5}}


def test_statistics_that_do_not_come_are_the_latest() -> None:
    device = Device(0)
    assert device.fetch(2) == {"fresh": False, "statistics": {"memfree": 4}}
    assert device.now == pytest.approx(2)


@pytest.mark.parametrize(("live", "acked"), [(False, ["stats-vq"]), (True, ["reporting"])])
def test_a_guest_that_cannot_be_asked_is_not_waited_for(live: bool, acked: list[str]) -> None:
    device = Device(0, live=live)
    device.acked = acked
    assert device.fetch(2) == {"fresh": False, "statistics": {"memfree": 4}}
    assert device.now == 0
