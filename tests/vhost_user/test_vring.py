# SPDX-License-Identifier: GPL-2.0-only
"""One ring's numbers and descriptors."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from hostzero.errors import MessageError
from hostzero.vhost_user.connection import Fd
from hostzero.vhost_user.payloads import VringAddr
from hostzero.vhost_user.protocol import ErrorKind
from hostzero.vhost_user.vring import Vring, eventfd
from tests.vhost_user.at_once import at_once
from tests.vhost_user.backend import Pair, null_fd, open_fds
from tests.vhost_user.front_end import USER


def test_an_eventfd_is_taken_out_of_the_list_and_made_non_blocking() -> None:
    number = os.eventfd(0)
    fds = [Fd(number)]
    with eventfd(fds) as taken:
        assert taken.fileno() == number
        assert fds == []
        assert not os.get_blocking(number)


def test_another_descriptor_stays_in_the_list() -> None:
    fds = [Fd(null_fd())]
    with pytest.raises(MessageError, match="no eventfd"):
        eventfd(fds)
    assert len(fds) == 1
    fds[0].close()


def test_a_full_counter_blocks_nobody() -> None:
    number = os.eventfd(0, os.EFD_NONBLOCK)
    vring = Vring(0, call=Fd(number))
    os.eventfd_write(number, (1 << 64) - 2)
    assert vring.interrupt()
    assert os.eventfd_read(number) == (1 << 64) - 2
    vring.close()


@pytest.mark.parametrize("act", [Vring.interrupt, Vring.report_broken, Vring.take_kick])
def test_a_peer_that_makes_them_blocking_again_stops_nothing(act: Callable[[Vring], object]) -> None:
    full, empty = os.eventfd(0), os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    vring = Vring(0, kick=Fd(empty), call=Fd(full), err=Fd(os.dup(full)))
    at_once(lambda: act(vring))
    vring.close()


def test_nobody_to_notify() -> None:
    vring = Vring(0)
    assert not vring.interrupt()
    assert vring.signalled
    vring.report_broken()
    vring.take_kick()
    vring.drop_kick()


def test_taking_a_kick_that_is_not_there_does_not_wait() -> None:
    vring = Vring(0, kick=Fd(os.eventfd(0, os.EFD_NONBLOCK)))
    vring.take_kick()
    vring.close()


def test_closing_closes_each_descriptor_once() -> None:
    before = open_fds()
    vring = Vring(0, kick=Fd(null_fd()), call=Fd(null_fd()), err=Fd(null_fd()))
    vring.close()
    vring.close()
    assert open_fds() == before


def test_a_layout_needs_everything_that_describes_it(idle: Pair) -> None:
    idle.connect()
    idle.share()
    table = idle.session.rings.table
    addr = VringAddr(0, 0, USER, USER + 8192, USER + 4096)
    for vring, given, missing in [
        (Vring(0, size=8, addr=addr), None, "SET_MEM_TABLE"),
        (Vring(0, addr=addr), table, "SET_VRING_NUM"),
        (Vring(0, size=8), table, "SET_VRING_ADDR"),
    ]:
        with pytest.raises(MessageError, match=missing) as caught:
            vring.layout(given)
        assert caught.value.kind == ErrorKind.ORDER
    layout = Vring(0, size=8, addr=addr).layout(table)
    assert (layout.size, layout.desc, layout.avail, layout.used) == (8, 0, 4096, 8192)
