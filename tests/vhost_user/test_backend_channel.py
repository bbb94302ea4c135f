# SPDX-License-Identifier: GPL-2.0-only
"""The channel to the front end: what is sent, and peers that do not read or are gone."""

from __future__ import annotations

import os
import socket

import pytest

from hostzero.errors import MessageError
from hostzero.vhost_user.backend_channel import BackendChannel
from hostzero.vhost_user.connection import Fd
from hostzero.vhost_user.metrics import ServiceMetrics
from tests.vhost_user.at_once import at_once
from tests.vhost_user.backend import null_fd, open_fds
from tests.vhost_user.front_end import header


def test_a_config_change_is_twelve_bytes_without_a_wish_for_a_reply() -> None:
    near, far = socket.socketpair()
    metrics = ServiceMetrics()
    channel = BackendChannel(Fd(near.detach()), metrics)
    assert channel.config_change()
    channel.close()
    assert far.recv(100) == header(2, 0)
    assert far.recv(100) == b""
    far.close()
    assert (metrics.config_changes_sent, metrics.config_changes_dropped) == (1, 0)


def test_a_full_channel_drops_and_goes_on_with_whole_messages() -> None:
    near, far = socket.socketpair()
    far.settimeout(10)
    metrics = ServiceMetrics()
    channel = BackendChannel(Fd(near.detach()), metrics)
    while channel.config_change():
        pass
    sent = metrics.config_changes_sent
    assert metrics.config_changes_dropped == 1
    assert far.recv(12 * sent, socket.MSG_WAITALL) == header(2, 0) * sent
    assert channel.config_change()
    assert far.recv(100) == header(2, 0)
    channel.close()
    far.close()


def test_a_front_end_that_makes_the_channel_blocking_again_stops_nothing() -> None:
    near, far = socket.socketpair()
    kept = near.dup()
    metrics = ServiceMetrics()
    channel = BackendChannel(Fd(near.detach()), metrics)
    while channel.config_change():
        pass
    kept.setblocking(True)
    at_once(channel.config_change)
    assert metrics.config_changes_dropped == 2
    channel.close()
    kept.close()
    far.close()


def test_a_front_end_that_is_gone_is_nobody_to_tell() -> None:
    near, far = socket.socketpair()
    far.close()
    metrics = ServiceMetrics()
    channel = BackendChannel(Fd(near.detach()), metrics)
    assert not channel.config_change()
    assert not channel.config_change()
    assert metrics.config_changes_dropped == 2
    channel.close()


@pytest.mark.parametrize("kind", ["file", "datagram", "eventfd"])
def test_what_is_no_stream_socket_is_refused_and_closed(kind: str) -> None:
    before = open_fds()
    if kind == "datagram":
        fd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    else:
        fd = null_fd() if kind == "file" else os.eventfd(0)
    with pytest.raises(MessageError, match="backend channel is no"):
        BackendChannel(Fd(fd), ServiceMetrics())
    assert open_fds() == before
