# SPDX-License-Identifier: GPL-2.0-only
"""Each kind of descriptor is what it says, and none is left."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from hostzero.conform.fuzz import files
from hostzero.conform.fuzz.arena import FILE_NAME, FILE_PAGES
from hostzero.units import PAGE_SIZE
from tests.conform.fuzz.fakes import open_files


def link(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def number(fd: int) -> tuple[int, int]:
    assert stat.S_ISCHR(os.fstat(fd).st_mode)
    return os.major(os.fstat(fd).st_rdev), os.minor(os.fstat(fd).st_rdev)


def mode(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def fails(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def can(fd: int) -> str:
    readable, writable, _ = select.select([fd], [fd], [], 0)
    return "r" * bool(readable) + "w" * bool(writable)


def file_size(fd: int) -> int:
    assert FILE_NAME in link(fd)
    return os.fstat(fd).st_size


def is_sealed(fd: int) -> bool:
    assert FILE_NAME in link(fd)
    assert os.fstat(fd).st_size > 0
    return fails(lambda: os.pwrite(fd, b"x", 0)) == fails(lambda: os.truncate(fd, 0)) == errno.EPERM


def is_stream(fd: int, kind: int = socket.SOCK_STREAM) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.getpeername()  # raises where nobody is at the other end
        sock.send(b"x")
        return sock.type == kind


def is_lonely(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return fails(sock.getpeername) == errno.ENOTCONN and sock.type == socket.SOCK_STREAM


def is_endless(fd: int) -> bool:
    return os.eventfd_read(fd) == os.eventfd_read(fd) == 1 and can(fd) == "rw"


IS: dict[str, Callable[[int], bool]] = {
    "/dev/null": lambda fd: number(fd) == (1, 3) and mode(fd) == os.O_RDWR,
    "/dev/zero": lambda fd: number(fd) == (1, 5) and mode(fd) == os.O_RDWR,
    "folder": lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode),
    "O_PATH": lambda fd: fails(lambda: os.read(fd, 1)) == errno.EBADF,
    "read-only file": lambda fd: os.read(fd, 4) == b"\x7fELF" and mode(fd) == os.O_RDONLY,
    "closed pipe": lambda fd: fails(lambda: os.write(fd, b"x")) == errno.EPIPE,
    "empty pipe": lambda fd: (
        stat.S_ISFIFO(os.fstat(fd).st_mode) and mode(fd) == os.O_RDONLY and can(fd) == ""
    ),
    "epoll": lambda fd: "eventpoll" in link(fd),
    "socket": is_stream,
    "datagram socket": lambda fd: is_stream(fd, socket.SOCK_DGRAM),
    "unconnected socket": is_lonely,
    "twin memfd": lambda fd: file_size(fd) == FILE_PAGES * PAGE_SIZE,
    "vast memfd": lambda fd: file_size(fd) == 1 << 45,
    "short memfd": lambda fd: file_size(fd) == PAGE_SIZE,
    "ragged memfd": lambda fd: file_size(fd) % PAGE_SIZE > 0,
    "sealed memfd": is_sealed,
    "empty memfd": lambda fd: file_size(fd) == 0,
    "eventfd": lambda fd: "eventfd" in link(fd) and can(fd) == "w",
    "full eventfd": lambda fd: "eventfd" in link(fd) and can(fd) == "r",
    "endless eventfd": is_endless,
}


def test_each_kind_is_looked_at() -> None:
    assert set(IS) == set(files.ALL) == set(files.ODD) | set(files.MEMORY) | set(files.EVENTS)


@pytest.mark.parametrize("name", sorted(IS))
def test_a_descriptor_is_what_it_says(name: str) -> None:
    with files.opened([name]) as (fd,):
        assert IS[name](fd)


@pytest.mark.parametrize("name", sorted(files.EVENTS))
def test_no_eventfd_makes_its_reader_wait(name: str) -> None:
    with files.opened([name]) as (fd,):
        assert not os.get_blocking(fd)


@pytest.mark.parametrize("name", sorted(IS))
def test_no_program_that_is_started_inherits_one(name: str) -> None:
    with files.opened([name]) as (fd,):
        assert not os.get_inheritable(fd)


def test_they_come_in_order_and_none_is_left() -> None:
    before = open_files()
    names = [*files.ALL, *files.ALL]
    with files.opened(names) as fds:
        assert len(set(fds)) == len(names)
        assert [link(fd).partition(":")[0] for fd in fds[: len(IS)]] == [
            link(fd).partition(":")[0] for fd in fds[len(IS) :]
        ]
        assert IS[names[3]](fds[3])
    assert open_files() == before


def test_none_is_left_where_one_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stack: ExitStack) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setitem(files.ALL, "none", refuse)
    before = open_files()
    with pytest.raises(OSError, match="too many"), files.opened([*IS, "none"]):
        pass
    assert open_files() == before


def test_most_that_are_drawn_are_likely() -> None:
    drawn = files.draw(Random(1), 1000, files.EVENTS)
    assert len(drawn) == 1000
    assert set(drawn) == set(files.ALL)
    assert 600 < sum(name in files.EVENTS for name in drawn) < 900
    assert files.draw(Random(1), 1000, files.EVENTS) == drawn
    assert files.draw(Random(1), 0, files.EVENTS) == []
