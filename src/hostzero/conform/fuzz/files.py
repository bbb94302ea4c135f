# SPDX-License-Identifier: GPL-2.0-only
"""Descriptors that no message asks for, and right ones that are not as they should be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from random import Random
from typing import Final

from hostzero.conform.fuzz.arena import FILE_NAME, FILE_PAGES
from hostzero.units import PAGE_SIZE

_EVENT: Final = os.EFD_CLOEXEC | os.EFD_NONBLOCK
COUNTER_MAX: Final = (1 << 64) - 2
"""What an eventfd holds at most: a further write waits, or fails if it may not wait."""


def _null(_: ExitStack) -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def _zero(_: ExitStack) -> int:
    return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)


def _folder(_: ExitStack) -> int:
    return os.open("/", os.O_RDONLY | os.O_CLOEXEC)


def _path_only(_: ExitStack) -> int:
    return os.open("/proc/self/exe", os.O_PATH | os.O_CLOEXEC)


def _read_only(_: ExitStack) -> int:
    return os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)


def _closed_pipe(_: ExitStack) -> int:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)
    return writing


def _empty_pipe(stack: ExitStack) -> int:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, writing)
    return reading


def _epoll(stack: ExitStack) -> int:
    epoll = stack.enter_context(select.epoll())
    return os.dup(epoll.fileno())


def _socket(stack: ExitStack) -> int:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    return theirs.detach()


def _datagrams(stack: ExitStack) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    stack.enter_context(ours)
    return theirs.detach()


def _lonely_socket(_: ExitStack) -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


def _empty_memfd(_: ExitStack) -> int:
    return _memfd(0)


def _short_memfd(_: ExitStack) -> int:
    return _memfd(PAGE_SIZE)


def _ragged_memfd(_: ExitStack) -> int:
    return _memfd(8 * PAGE_SIZE + 100)


def _twin_memfd(_: ExitStack) -> int:
    return _memfd(FILE_PAGES * PAGE_SIZE)


def _vast_memfd(_: ExitStack) -> int:
    return _memfd(1 << 45)


def _sealed_memfd(_: ExitStack) -> int:
    fd = _memfd(64 * PAGE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    return fd


def _event(_: ExitStack) -> int:
    return os.eventfd(0, _EVENT)


def _full_event(_: ExitStack) -> int:
    fd = os.eventfd(0, _EVENT)
    os.eventfd_write(fd, COUNTER_MAX)
    return fd


def _many_events(_: ExitStack) -> int:
    # Each read takes one, so it stays readable for longer than anybody lives.
    fd = os.eventfd(0, _EVENT | os.EFD_SEMAPHORE)
    os.eventfd_write(fd, COUNTER_MAX)
    return fd


MEMORY: Final[dict[str, Callable[[ExitStack], int]]] = {
    "twin memfd": _twin_memfd,
    "vast memfd": _vast_memfd,
    "short memfd": _short_memfd,
    "ragged memfd": _ragged_memfd,
    "sealed memfd": _sealed_memfd,
    "empty memfd": _empty_memfd,
}
EVENTS: Final[dict[str, Callable[[ExitStack], int]]] = {
    "eventfd": _event,
    "full eventfd": _full_event,
    "endless eventfd": _many_events,
}
ODD: Final[dict[str, Callable[[ExitStack], int]]] = {
    "/dev/null": _null,
    "/dev/zero": _zero,
    "folder": _folder,
    "O_PATH": _path_only,
    "read-only file": _read_only,
    "closed pipe": _closed_pipe,
    "empty pipe": _empty_pipe,
    "epoll": _epoll,
    "socket": _socket,
    "datagram socket": _datagrams,
    "unconnected socket": _lonely_socket,
}
ALL: Final = ODD | MEMORY | EVENTS


@contextlib.contextmanager
def opened(names: Sequence[str]) -> Iterator[list[int]]:
    """Yield descriptors of the named kinds, which are closed here afterwards."""
    with ExitStack() as stack:
        fds = []
        for name in names:
            fds.append(ALL[name](stack))
            stack.callback(os.close, fds[-1])
        yield fds


def draw(rng: Random, count: int, likely: dict[str, Callable[[ExitStack], int]]) -> list[str]:
    """Return the names of some descriptors, most of them of the likely kinds."""
    return [rng.choice(list(likely if rng.random() < 0.7 else ALL)) for _ in range(count)]


def _memfd(size: int) -> int:
    fd = os.memfd_create(FILE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, size)
    return fd
