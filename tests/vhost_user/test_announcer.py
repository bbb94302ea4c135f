# SPDX-License-Identifier: GPL-2.0-only
"""When a front end is told of a configuration change."""

from __future__ import annotations

import socket
import struct

import pytest

from hostzero.device import BalloonDevice
from hostzero.ram import GuestMemory
from hostzero.vhost_user.announcer import Announcer
from hostzero.vhost_user.backend_channel import BackendChannel
from hostzero.vhost_user.connection import Fd
from hostzero.vhost_user.metrics import ServiceMetrics
from tests.vhost_user.front_end import header


class Heard:
    """An announcer over a device without a driver, and the front end's end of its channel."""

    def __init__(self) -> None:
        self.device = BalloonDevice(GuestMemory([]))
        self.metrics = ServiceMetrics()
        self.announcer = Announcer(self.device, self.metrics)
        self.far = self.new_channel()

    def new_channel(self) -> socket.socket:
        near, far = socket.socketpair()
        far.setblocking(False)
        self.announcer.use(BackendChannel(Fd(near.detach()), self.metrics))
        return far

    def target(self, pages: int) -> None:
        self.device._state.space.num_pages = pages
        assert self.device._config_changed is not None
        self.device._config_changed()

    def told(self) -> int:
        try:
            data = self.far.recv(1 << 16)
        except BlockingIOError:
            return 0
        assert data == header(2, 0) * (len(data) // 12)
        return len(data) // 12


@pytest.fixture
def heard() -> Heard:
    return Heard()


def close(heard: Heard) -> None:
    heard.announcer.close()
    heard.far.close()


def test_nothing_is_told_before_it_opens_or_after_it_shuts(heard: Heard) -> None:
    heard.target(1)
    assert heard.told() == 0
    heard.announcer.open()
    assert heard.told() == 0, "the driver that starts reads it anyway"
    heard.target(2)
    assert heard.told() == 1
    heard.announcer.shut()
    heard.target(3)
    assert heard.told() == 0
    assert (heard.metrics.config_changes_sent, heard.metrics.config_changes_dropped) == (1, 2)
    close(heard)


def test_what_changed_in_between_is_told_once_it_opens_again(heard: Heard) -> None:
    heard.announcer.open()
    heard.announcer.shut()
    heard.target(3)
    heard.target(4)
    heard.announcer.open()
    heard.announcer.open()
    assert heard.told() == 1
    heard.announcer.shut()
    heard.announcer.open()
    assert heard.told() == 0
    close(heard)


def test_what_the_driver_wrote_in_between_is_no_news_to_it(heard: Heard) -> None:
    heard.announcer.open()
    heard.announcer.shut()
    heard.device.write_config(4, struct.pack("<I", 9))
    heard.announcer.open()
    assert heard.told() == 0
    close(heard)


def test_a_second_channel_replaces_the_first(heard: Heard) -> None:
    first, heard.far = heard.far, heard.new_channel()
    assert first.recv(1) == b"", "the first was closed"
    first.close()
    heard.announcer.open()
    heard.target(1)
    assert heard.told() == 1
    close(heard)


def test_after_the_end_nobody_is_told(heard: Heard) -> None:
    heard.announcer.open()
    heard.announcer.close()
    heard.target(1)
    assert heard.told() == 0
    heard.far.close()


def test_without_a_channel_it_is_counted() -> None:
    device, metrics = BalloonDevice(GuestMemory([])), ServiceMetrics()
    announcer = Announcer(device, metrics)
    announcer.open()
    assert device._config_changed is not None
    device._config_changed()
    assert metrics.config_changes_dropped == 1
    announcer.close()
