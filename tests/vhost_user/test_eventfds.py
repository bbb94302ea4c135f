# SPDX-License-Identifier: GPL-2.0-only
"""Eventfds of a peer: counted, and never waited for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from hostzero.vhost_user import eventfds
from hostzero.vhost_user.eventfds import is_eventfd, notify, take
from tests.vhost_user.at_once import at_once
from tests.vhost_user.backend import null_fd

FULL = (1 << 64) - 2


@pytest.fixture
def fd() -> Iterator[int]:
    """One that is empty and blocks, as a peer may make it."""
    number = os.eventfd(0, os.EFD_CLOEXEC)
    yield number
    os.close(number)


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "preadv", preadv)


def test_what_is_notified_is_taken_once(fd: int) -> None:
    for _ in range(3):
        notify(fd)
    assert take(fd) == 3
    assert take(fd) == 0


def test_a_full_counter_counts_as_notified(fd: int) -> None:
    os.eventfd_write(fd, FULL)
    at_once(lambda: notify(fd))
    assert take(fd) == FULL


def test_an_empty_counter_is_not_waited_for(fd: int) -> None:
    at_once(lambda: take(fd))


def test_a_peer_that_empties_the_counter_first_stops_nothing(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had read between a look at the counter and the read."""
    monkeypatch.setattr(eventfds, "_ready", lambda *_: True)
    at_once(lambda: take(fd))


@pytest.mark.usefixtures("old_kernel")
def test_a_kernel_that_cannot_read_without_waiting_is_asked_first(fd: int) -> None:
    at_once(lambda: take(fd))
    notify(fd)
    assert take(fd) == 1


@pytest.mark.usefixtures("old_kernel")
def test_a_non_blocking_counter_that_a_peer_empties_first(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.set_blocking(fd, False)
    monkeypatch.setattr(eventfds, "_ready", lambda *_: True)
    assert take(fd) == 0


@pytest.mark.parametrize("act", [notify, take])
def test_what_is_no_descriptor_is_an_error(act: Callable[[int], object]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        act(1 << 20)


def test_eventfds_are_told_from_others() -> None:
    event, other = os.eventfd(0), null_fd()
    assert is_eventfd(event)
    assert not is_eventfd(other)
    os.close(event)
    os.close(other)
    # Where /proc cannot say, the descriptor is taken for what it has to be.
    assert is_eventfd(-1)
